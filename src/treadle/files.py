"""Folders and JSON documents that a person named, and digests of what is in them."""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from treadle.errors import OptionError, TreadleError


def make_folder(path: Path) -> Path:
    """Return a folder, made with those above it where it is not there; an OptionError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file has its name, or a folder above may not be written to
        raise OptionError(f"{path} cannot be a folder: {error.strerror}; name another.") from error
    return path


def read_object(file: Path, error_type: type[TreadleError]) -> dict[str, Any]:
    """Return the object that a JSON file holds; an error of `error_type` where it holds none or cannot be read."""
    try:
        document = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise error_type(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise error_type(f"{file} does not hold an object.")
    return cast(dict[str, Any], document)


def digest(document: Any) -> str:
    """Return what tells a JSON document from others."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]
