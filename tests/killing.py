"""Stops a writer before each of its changes to the file system, one after the other, as `kill -9` would."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.chmod", "os.symlink"}
MOST = 500
"""Changes after which a writer counts as one that never ends."""


class Killed(BaseException):
    """Raised at the moment of death, and at every change that the dead would make while this goes up."""


class _Watch:
    """Counts changes while a writer runs; Python cannot remove what listens to its events."""

    left: int | None = None
    is_there = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.left is not None and (event in CHANGES or (event == "open" and _writes(arguments))):
            self.left -= 1
            if self.left <= 0:
                raise Killed


WATCH = _Watch()


def kills(write: Callable[[], object], every: int = 1) -> Iterator[int]:
    """Run `write` so that it dies before its first, second ... change; yield after each death.

    The last run dies of nothing and is not yielded: by then every moment was tried, or one of `every` so many.
    """
    if not WATCH.is_there:
        sys.addaudithook(WATCH)
        WATCH.is_there = True
    for count in range(1, MOST, every):
        WATCH.left = count
        try:
            write()
        except Killed:
            WATCH.left = None
            yield count
        else:
            return
        finally:
            WATCH.left = None
    raise AssertionError(f"still writing after {MOST} changes")


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, _, flags = arguments
    is_device = isinstance(path, str) and path.startswith("/dev/")
    return not is_device and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
