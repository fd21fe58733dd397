"""Where the files of a bundle lie, and how a new version takes the place of the old one.

A new version is written aside, whole. One rename makes it the bundle: it is then the folder `.treadle-new` inside the
bundle's own. After that its files take the places of the old ones, and `.treadle-new` goes. Readers look there first.
So beside a writer, or after a kill, they find one whole version. Whatever else is in the folder stays where it is.

Folders could also be exchanged at once (renameat2, RENAME_EXCHANGE). But not every file system can, macOS has another
call, a mounted folder cannot be exchanged, and a shell inside the old one would find itself in a deleted folder.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from treadle.common.documents import read_object
from treadle.common.errors import BundleError, TreadleError
from treadle.common.writing import locked, put, sync, sync_names, workplace

BUNDLE_FILE, CENTROIDS_FILE, SAMPLES_FILE = "bundle.json", "centroids.safetensors", "samples.json"
STATES_FILE = "states.safetensors"
ADAPTERS, EMBEDDER = "adapters", "embedder"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NEW = ".treadle-new"
"""Holds a whole version whose files are on their way to their places."""
NUM_TRIES = 5
"""Readings that a writer may disturb before the reader makes writers wait."""
Read = TypeVar("Read")
Version = tuple[tuple[int, ...] | None, ...]


def read_version(folder: Path, read: Callable[[Path], Read]) -> Read:
    """Call `read` with the folder of one version of a bundle, and return its result."""
    for _ in range(NUM_TRIES):
        before = _version(folder)
        try:
            found = read(_current(folder))
        except (TreadleError, OSError):
            if _version(folder) == before:
                raise
        else:
            if _version(folder) == before:
                return found
    with locked(folder, is_shared=True):
        return read(_current(folder))


def has_bundle(folder: Path) -> bool:
    """Return whether a folder holds a bundle."""
    return (_current(folder) / BUNDLE_FILE).exists()


def replace_bundle(folder: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Make what `write` writes into an empty folder the bundle in `folder`.

    Raises:
        BundleError: there is a bundle and `overwrite` is not set, or files of somebody else are in the way.
        OptionError: the system refuses to write there. In each case the old bundle is as it was.
    """
    with workplace(folder) as place:
        new = place / "bundle"
        new.mkdir()
        write(new)
        with locked(folder):
            _finish(folder, place)
            if has_bundle(folder) and not overwrite:
                raise BundleError(f"{folder} holds a bundle already; name another folder, or overwrite it.")
            _check_owned(folder, _units(new))
            put(new, folder / NEW)
            _finish(folder, place)


def finish_replacing(folder: Path) -> None:
    """Finish a replacement that a kill interrupted; call this before the files are read in place."""
    if (folder / NEW).exists():
        with workplace(folder) as place, locked(folder):
            _finish(folder, place)


def _finish(folder: Path, place: Path) -> None:
    """Put the files of a whole new version in their places, also those that a kill left on their way."""
    new, aside = folder / NEW, Path(tempfile.mkdtemp(dir=place))
    if not (new / BUNDLE_FILE).is_file():
        return
    made = _units(new)
    for unit in made:
        _link(new / unit, aside / unit)
    sync(aside)
    (folder / ADAPTERS).mkdir(exist_ok=True)
    old = [unit for unit in _units(folder) if unit not in made]
    for unit in [*old, *made]:  # ends with bundle.json, which names the old ones
        if (folder / unit).is_dir():
            shutil.rmtree(folder / unit)
        elif unit in old:
            (folder / unit).unlink()
        if unit in made:
            os.replace(aside / unit, folder / unit)
    sync_names(folder, folder / ADAPTERS)
    os.replace(new, aside / NEW)


def _link(source: Path, target: Path) -> None:
    """Link a file, or a folder's files, at another place; copy where there are no links."""
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file)
    else:
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_owned(folder: Path, units: list[str]) -> None:
    """Refuse to replace files in the folder that belong to no bundle."""
    file = folder / BUNDLE_FILE
    owned = _units(folder) if file.exists() else []
    foreign = [unit for unit in units if os.path.lexists(folder / unit) and unit not in owned]
    if foreign and not (file.exists() and _names(folder) is None):  # a damaged bundle's own files cannot be told
        raise BundleError(f"{folder} holds {', '.join(foreign)}, which belongs to no bundle; name another folder.")


def _units(folder: Path) -> list[str]:
    """Return which files and folders of a version are there, as paths below its folder."""
    adapters = [f"{ADAPTERS}/{name}" for name in _names(folder) or ()]
    units = [CENTROIDS_FILE, STATES_FILE, SAMPLES_FILE, EMBEDDER, *adapters, BUNDLE_FILE]
    return [unit for unit in units if os.path.lexists(folder / unit)]


def _names(folder: Path) -> list[str] | None:
    """Return the names of a version's adapters; None where its bundle.json cannot be read."""
    try:
        document = read_object(folder / BUNDLE_FILE, BundleError)
    except BundleError:
        return None
    entries = document.get("adapters")
    found = cast(list[Any], entries if isinstance(entries, list) else [])
    names = [cast(dict[str, Any], entry).get("name") for entry in found if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str) and NAME.fullmatch(name)]


def _current(folder: Path) -> Path:
    """Return where the newest whole version of a bundle lies."""
    new = folder / NEW
    return new if (new / BUNDLE_FILE).is_file() else folder


def _version(folder: Path) -> Version:
    """Return the identity of a bundle's version."""
    return tuple(_identity(each / BUNDLE_FILE) for each in (folder / NEW, folder))


def _identity(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
