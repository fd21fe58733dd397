"""Writes files and folders whole: after a kill the old one or the new one is there.

Everything is written in a hidden workplace inside its folder, forced to the disk and renamed from there. A workplace is
locked as long as its writer lives; the next writer in the folder removes those of dead writers.
"""

import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from treadle.common.errors import OptionError, TreadleError
from treadle.common.files import make_folder

HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""A lock is seen by processes of the same machine, so a workplace says which machine it belongs to."""
PREFIX, SUFFIX = f".treadle-{HOST}-", ".part"
WORKPLACE = re.compile(r"\.treadle-[0-9a-f]{8}-\w{8}\.part")
DAY_SECONDS = 24 * 60 * 60.0
"""Age from which another machine's workplace counts as left over."""
NUM_SYNCS = 8
"""Files forced to the disk at the same time. The file system then writes its journal once for all."""
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)
"""Answers of file systems that have no locks, or cannot force a folder to the disk."""


def check_writable(file: Path) -> None:
    """Refuse a file that could not be written, before long work whose result it is to hold.

    Raises:
        OptionError: the file is a folder, or its folder is a file or may not be written to.
    """
    above = next(each for each in file.absolute().parents if os.path.lexists(each))
    if file.is_dir():
        raise OptionError(f"{file} is a folder; name a file.")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "is not a folder" if not above.is_dir() else "may not be written to"
        raise OptionError(f"{file.parent} cannot hold files: {above} {reason}; name another.")


def write_text(file: Path, text: str) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file; at every moment the old one or the new one is there, whole.

    Raises:
        OptionError: the system refuses to write there; the old file is as it was.
    """
    with refused(file):
        if file.exists() and not file.is_file():  # a pipe or a device, such as /dev/stdout
            file.write_bytes(content)
            return
        target = Path(os.path.realpath(file))  # a link stays a link
        with _workplace(target.parent) as place:
            new = place / "new"
            new.write_bytes(content)
            if target.exists():
                shutil.copymode(target, new)
            put(new, target)


def append_text(file: Path, text: str) -> None:
    """Append to a text file and force it to the disk; nothing is left of what the system refuses."""
    with refused(file), file.open("a", encoding="utf-8") as opened:
        before = opened.tell()
        try:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        except OSError:
            os.truncate(file, before)
            raise


@contextmanager
def workplace(folder: Path) -> Generator[Path]:
    """Yield a new hidden folder inside `folder`, which is made where it is missing; it is removed after the block.

    Raises:
        OptionError: the system refuses to write there. A folder that was made for it is removed again.
    """
    with refused(folder), _workplace(folder) as place:
        yield place


@contextmanager
def refused(path: Path) -> Generator[None]:
    """Turn the system's refusal to write at `path` into an OptionError of one line."""
    try:
        yield
    except TreadleError:
        raise
    except Exception as error:  # the errors of libraries written in Rust have no narrower base in common
        if (reason := refusal_of(error)) is None:
            raise
        message = f"{path} cannot be written: {reason}; make room or give the right to write there, or name another."
        raise OptionError(message) from error


def refusal_of(error: Exception) -> str | None:
    """Return the system's own words for an error that is its refusal; Rust libraries keep only the number."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = RUST_ERROR.search(str(error))
    return os.strerror(int(number[1])) if number else None


def put(new: Path, target: Path) -> None:
    """Move a file or folder to its place once all of it is on the disk. A folder replaces none."""
    sync(new)
    os.replace(new, target)
    sync_names(target.parent)


def put_all(made: Path, folder: Path, last: str) -> None:
    """Move everything in the folder `made` into another folder; `last` comes last and says that the rest is whole."""
    sync(made)
    for entry in sorted(made.iterdir(), key=lambda entry: entry.name == last):
        if entry.name == last:
            sync_names(folder)
        os.replace(entry, folder / entry.name)
    sync_names(folder)


def sync(path: Path) -> None:
    """Force a file, or a folder with everything in it, to the disk."""
    inside = [each for each in path.rglob("*") if not each.is_symlink()] if path.is_dir() else []
    with ThreadPoolExecutor(NUM_SYNCS) as pool:
        list(pool.map(_sync_one, [path, *inside]))


def sync_names(*folders: Path) -> None:
    """Force to the disk which names folders hold."""
    for folder in folders:
        _sync_one(folder)


@contextmanager
def locked(folder: Path, *, is_shared: bool = False) -> Generator[None]:
    """Keep other writers of a folder waiting (and readers, unless shared); where there are no locks nobody waits."""
    with _opened(folder) as opened:
        _lock(opened, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
        yield


@contextmanager
def _workplace(folder: Path) -> Generator[Path]:
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder)
    try:
        with ExitStack() as stack:
            with locked(folder):  # or another writer could find the new place before its lock
                _remove_left_over(folder)
                place = Path(tempfile.mkdtemp(SUFFIX, PREFIX, folder))
                _lock(stack.enter_context(_opened(place)), fcntl.LOCK_EX)
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            yield place
    finally:
        with suppress(OSError):  # it holds what was written
            for each in missing:
                each.rmdir()


def _remove_left_over(folder: Path) -> None:
    """Remove the workplaces of dead writers."""
    for place in [folder / name for name in os.listdir(folder) if WORKPLACE.fullmatch(name)]:
        with suppress(OSError), _opened(place, os.O_DIRECTORY | os.O_NOFOLLOW) as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error: its writer lives
            is_old = time.time() - os.fstat(opened).st_mtime > DAY_SECONDS
            if is_old or place.name.startswith(PREFIX):
                shutil.rmtree(place)


@contextmanager
def _opened(path: Path, flags: int = 0) -> Generator[int]:
    opened = os.open(path, os.O_RDONLY | flags)
    try:
        yield opened
    finally:
        os.close(opened)


def _lock(opened: int, kind: int) -> None:
    try:
        fcntl.flock(opened, kind)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync_one(path: Path) -> None:
    with _opened(path) as opened:
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
