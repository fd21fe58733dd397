"""Progress of a long command: a bar in a terminal, and lines now and then in a log."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

SPEED_SECONDS = 3600.0
"""Seconds of progress that estimate the time left: a cell may take minutes."""
LOG_SECONDS = 30.0
"""Seconds between two lines of a log."""

Advance = Callable[[str, int, bool], None]
"""Takes what is at work, how many of its parts are done, and whether they were found done already."""


@contextmanager
def progress(total: int, *, seconds: float = LOG_SECONDS) -> Generator[Advance]:
    """Show on standard error how many of `total` parts are done; a log gets a line every so many seconds."""
    if not sys.stderr.isatty():
        yield _lines(total, seconds)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=SPEED_SECONDS) as bar:
        shown = bar.add_task("", total=total)

        def advance(name: str, count: int, was_done: bool) -> None:
            if was_done:  # it took no time, and says nothing of the time left
                bar.update(shown, total=(bar.tasks[shown].total or 0) - count)
            else:
                bar.update(shown, advance=count, description=name)

        yield advance


def _lines(total: int, seconds: float) -> Advance:
    """Return a function that prints a line where the last is some seconds old, or all is done."""
    started = last = time.monotonic()
    done = 0

    def advance(name: str, count: int, was_done: bool) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= seconds or done >= total:
            last = now
            print(f"{name}: {done} of {total} after {now - started:.0f} s", file=sys.stderr, flush=True)

    return advance
