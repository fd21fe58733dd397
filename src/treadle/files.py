"""Folders that a person named, and digests of what is in documents."""

import hashlib
import json
from pathlib import Path
from typing import Any

from treadle.errors import OptionError


def make_folder(path: Path) -> Path:
    """Return a folder, made with those above it where it is not there; an OptionError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file has its name, or a folder above may not be written to
        raise OptionError(f"{path} cannot be a folder: {error.strerror}; name another.") from error
    return path


def digest(document: Any) -> str:
    """Return what tells a JSON document from others."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]
