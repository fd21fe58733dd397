"""Folders that a person named, and digests of what is in documents."""

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
    """Return what tells a JSON document from others."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]
