"""Folders that a person named, treadle's cache, and digests of documents."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from treadle.common.errors import OptionError


def make_folder(path: Path) -> Path:
    """Return a folder, made with those above it where it is not there; an OptionError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file has its name, or a folder above may not be written to
        raise OptionError(f"{path} cannot be a folder: {error.strerror}; name another.") from error
    return path


def folder_below(root: Path, path: str) -> Path | None:
    """Return the folder that a path means, links followed; None where there is none below the root."""
    if "\0" in path:
        return None
    top = Path(os.path.realpath(root))
    folder = Path(os.path.realpath(top / path))
    is_below = folder.is_relative_to(top) and folder != top
    return folder if is_below and os.path.isdir(folder) else None  # False, too, where a name is too long for a file


def digest(document: Any) -> str:
    """Return a digest of a JSON document."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]


def home() -> Path:
    """Return treadle's cache folder: `TREADLE_HOME`, else `treadle` in the user's cache folder."""
    if given := os.environ.get("TREADLE_HOME"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treadle"


def cached_folder(name: str) -> Path:
    """Return where the cache keeps (or would keep) the base model called `name`."""
    return home() / "models" / name.replace("/", "--")


def locate(name: str) -> str:
    """Return a folder of this name, the cached one, or the name itself, for transformers to load."""
    for folder in (Path(name).expanduser(), cached_folder(name)):
        if (folder / "config.json").is_file():
            return str(folder)
    return name
