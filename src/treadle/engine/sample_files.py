"""Reads the sample texts of adapters from files, as `Sample`s, and rows of JSON lines.

Reads `.jsonl`, `.jsonl.gz` and plain `.txt` (one sample text a line) from disk, and anything that `datasets` can fetch.
"""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from treadle.common.documents import is_file, open_file, parse_json
from treadle.common.errors import DataError, first_of, problem_list
from treadle.engine.chat import contents_of, joined
from treadle.routing.samples import Sample, as_text
from treadle.routing.schedule import BLANK_LINE

AnySample = TypeVar("AnySample", bound=Sample)
MAX_REPORTED_ROWS = 10
"""How many bad rows one message lists."""
MAX_LINE_CHARACTERS = 1 << 26
"""Characters of a line."""


def load_samples(source: str | Path) -> list[Sample]:
    """Return the samples of a file, one a row.

    A `.txt` holds one text a line; rows of JSON lines hold `text`, chat `messages`, or `prompt` and `completion`
    (and `bare`).
    """
    if str(source).endswith(".txt"):
        samples = [Sample(line.strip()) for line in _lines(_existing(source)) if line.strip()]
    else:
        samples = _samples_of(read_rows(source), source)
    if not samples:
        raise DataError(f"{source}: no sample texts in it")
    return samples


def load_texts(source: str | Path) -> list[str]:
    """Return the samples of a file (`load_samples`) as plain texts, one a row."""
    return [sample.whole for sample in load_samples(source)]


def read_rows(source: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file or of a hub data set (`name[:config]:split`)."""
    if str(source).endswith((".jsonl", ".jsonl.gz", ".json")) or is_file(source):
        yield from _read_file(_existing(source))
    else:
        yield from _read_hub(str(source))


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, strict=False)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield row


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, packed or not; a line longer than MAX_LINE_CHARACTERS is an error."""
    with open_file(path, DataError) as raw:
        unpacked = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        lines = io.TextIOWrapper(cast(BinaryIO, unpacked), encoding="utf-8-sig")
        try:
            while line := lines.readline(MAX_LINE_CHARACTERS):
                if len(line) == MAX_LINE_CHARACTERS:
                    raise DataError(f"{path}: a line has more than {MAX_LINE_CHARACTERS} characters")
                yield line
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # a damaged archive, or not UTF-8
            raise DataError(f"{path}: cannot be read: {error}") from error


def _read_hub(source: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: no such file, and hub data sets need: pip install 'treadle[data]'") from error
    name, *rest = source.split(":")
    config, split = (rest[0] if len(rest) > 1 else None), (rest[-1] if rest else "train")
    try:
        yield from datasets.load_dataset(name, config, split=split)  # type: ignore[misc]
    except (OSError, ValueError, RuntimeError) as error:  # unreachable hub, unknown name, unknown split
        raise DataError(f"{source}: no such file, and the hub says: {error}") from error


def _existing(source: str | Path) -> Path:
    path = Path(source)
    if not is_file(path):
        raise DataError(f"{source}: no such file")
    return path


def _samples_of(rows: Iterable[dict[str, Any]], source: str | Path) -> list[Sample]:
    """Return rows as samples; a DataError lists the first bad ones."""
    samples: list[Sample] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            samples.append(checked_text(_sample_of(row)))
        except (KeyError, ValueError, TypeError) as error:
            problems.append(f"row {number}: {error}; fields: {', '.join(row)}")
    refuse_rows(problems, f"{source}: rows need a field 'text', 'messages', or 'prompt' and 'completion':")
    return samples


def checked_text(example: AnySample) -> AnySample:
    """Return a sample; a ValueError where it holds half a surrogate pair, which is JSON but no text."""
    try:
        "".join((example.prompt, example.completion, example.bare)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from error
    return example


def _sample_of(row: dict[str, Any]) -> Sample:
    if "text" in row:
        return Sample(as_text(row["text"], "text"), bare=bare_of(row))
    if "prompt" in row:
        completion = as_text(row.get("completion", ""), "completion")
        return Sample(as_text(row["prompt"], "prompt"), completion, bare_of(row))
    *before, last = messages_of(row)
    said = joined(before)
    return Sample(said + BLANK_LINE, last) if said else Sample(last)


def messages_of(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row's messages; a ValueError where one has none."""
    contents = [message["content"] for message in row["messages"]]
    texts = [each if isinstance(each, list) else as_text(each, "content") for each in contents]
    return contents_of([{"content": text} for text in texts])


def bare_of(row: Mapping[str, Any]) -> str:
    """Return a row's prompt without the template's words; "" where it gives none."""
    return as_text(row.get("bare", ""), "bare")


def refuse_rows(problems: Sequence[str], title: str) -> None:
    """Raise a DataError that lists the first problems, if there are any."""
    if problems:
        raise DataError(problem_list(title, first_of(problems, MAX_REPORTED_ROWS)))
