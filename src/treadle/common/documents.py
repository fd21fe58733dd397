"""Reads JSON documents and texts that somebody else wrote, in bounded time and memory; every fault is one short error.

Only regular files are read: a pipe or a device has no end. A document holds no numbers beyond floating point, no key
twice, no half of a surrogate pair, and is not nested deeply. So its values are safe to use.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from treadle.common.errors import OptionError, TreadleError, shown

MOST_BYTES = 256 << 20
"""Size limit of a document or a text that is read as a whole."""
MOST_DEPTH = 64
"""Lists and objects within each other."""
LONGEST_PATH = 1000
"""Characters of a path that a file names."""
LONGEST_NUMBER = 400
"""Digits; a longer number is not in floating point."""
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def is_file(path: str | Path) -> bool:
    """Return whether there is a regular file; False, too, for a path that no system takes."""
    return os.path.isfile(path)


def is_inside(folder: Path, path: str) -> bool:
    """Return whether a path, its links followed, stays below a folder; one that no system takes does not."""
    if "\0" in path or len(path) > LONGEST_PATH:
        return False
    return Path(os.path.realpath(folder / path)).is_relative_to(os.path.realpath(folder))


@contextmanager
def open_file(file: str | Path, error_type: type[TreadleError], most_bytes: int | None = None) -> Generator[BinaryIO]:
    """Open a regular file for reading; an error of `error_type` says why that is not possible."""
    try:
        opened = open(file, "rb", opener=_open_at_once)
    except ValueError as error:  # a path with a null character or half of a surrogate pair
        raise error_type(f"{shown(str(file))} cannot be read: {error}") from error
    except OSError as error:
        raise error_type(f"{file} cannot be read: {error.strerror or error}") from error
    with opened:
        state = os.fstat(opened.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise error_type(f"{file} cannot be read: it is not a file")
        if most_bytes is not None and state.st_size > most_bytes:
            raise error_type(f"{file} cannot be read: it has {state.st_size} bytes; allowed: {most_bytes}")
        try:
            yield opened
        except OSError as error:
            raise error_type(f"{file} cannot be read: {error.strerror or error}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe that nobody writes to would wait for ever


def read_text(file: str | Path, error_type: type[TreadleError], most_bytes: int = MOST_BYTES) -> str:
    """Return the text of a file in UTF-8, without a byte order mark."""
    with open_file(file, error_type, most_bytes) as opened:
        raw = opened.read(most_bytes + 1)
    if len(raw) > most_bytes:  # it grew
        raise error_type(f"{file} cannot be read: it has more than {most_bytes} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise error_type(f"{file} cannot be read: it is not UTF-8 (byte {error.start})") from error


def read_json(
    file: str | Path, error_type: type[TreadleError], most_bytes: int = MOST_BYTES, *, strict: bool = True
) -> Any:
    """Read a JSON file; an error of `error_type` says why it cannot be read."""
    text = read_text(file, error_type, most_bytes)
    try:
        return parse_json(text, strict=strict)
    except ValueError as error:
        raise error_type(f"{file} cannot be read as JSON: {error}") from error


def read_object(
    file: str | Path, error_type: type[TreadleError], most_bytes: int = MOST_BYTES, *, strict: bool = True
) -> dict[str, Any]:
    """Return the object that a JSON file holds; an error of `error_type` where it holds none or cannot be read."""
    document = read_json(file, error_type, most_bytes, strict=strict)
    if not isinstance(document, dict):
        raise error_type(f"{file} does not hold an object.")
    return cast(dict[str, Any], document)


def parse_json(text: str, *, strict: bool = True) -> Any:
    """Read a JSON text; a ValueError says why it cannot be read.

    Args:
        text: of one document.
        strict: False takes what Python's own json may have written: NaN, Infinity and halves of surrogate pairs.
    """
    constant, number = (_no_constant, _finite) if strict else (None, None)
    try:
        document = json.loads(
            text, parse_constant=constant, parse_float=number, parse_int=_integer, object_pairs_hook=_unique
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels") from None
    check_depth(document)
    if strict:
        check_surrogates(text, document)
    return document


def check_depth(document: Any, most_values: int | None = None) -> None:
    """Raise a ValueError if a document is nested too deeply, or has too many values where their number is limited."""
    level, depth, count = [document], 0, 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
        inner: list[Any] = []
        for each in level:
            inner += cast(dict[Any, Any], each).values() if isinstance(each, dict) else cast(list[Any], each)
            if most_values is not None and count + len(inner) > most_values:
                raise ValueError(f"it has more than {most_values} values")
        count += len(inner)
        level = inner


def check_surrogates(text: str, document: Any) -> None:
    """Raise a ValueError if a document, read from this JSON text, holds half of a surrogate pair."""
    if not SURROGATE.search(text):
        return
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no text") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER or (len(text) > 300 and math.isinf(float(text))):
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def check_text(value: Any) -> None:
    """Raise an OptionError where a value is no text; half of a surrogate pair is none (bytes other than UTF-8)."""
    if not isinstance(value, str):
        raise OptionError(f"got {shown(value)}; allowed: a text.")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"character {error.start} of the text is half of a surrogate pair; give UTF-8.") from error
