"""Rows of a data file or of a hub data set, as `Example`s.

Reads `.jsonl`, `.jsonl.gz` and plain `.txt` (one sample text a line) from disk, and anything that `datasets` can fetch.
"""

import gzip
import io
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from treadle.common.documents import is_file, open_file, parse_json
from treadle.common.errors import DataError, OptionError, first_of, problem_list
from treadle.experiments.tasks import ChatExample, Example, Row, Task, as_text, find_task
from treadle.routing.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnySample = TypeVar("AnySample", bound=Sample)
CHAT_TASK = "chat"
"""The name of rows that hold chat messages."""
MAX_REPORTED_ROWS = 10
"""How many bad rows one message lists."""
MAX_LINE_CHARACTERS = 1 << 26
"""Characters of a line."""


def load_examples(
    source: str | Path, task: str | Task | None = None, *, limit: int | None = None, seed: int = 0
) -> list[Example]:
    """Return the examples of a file or hub data set, or a seeded random choice of `limit`.

    Args:
        source: a `.jsonl` or `.jsonl.gz` file, or `name[:config]:split` of a hub data set.
        task: whose rows they are, by its name in `treadle.experiments.tasks` or itself; None = rows have `prompt`,
            `completion`.
        limit: how many examples to keep; None keeps all, in the order of the file.
        seed: of the choice.

    Raises:
        DataError: the source cannot be read, or rows lack fields (the first ten are listed).
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit must be at least 1, or none, not {limit}")
    rows = list(read_rows(source))
    examples: list[Example] = []
    problems: list[str] = []
    task = find_task(task) if isinstance(task, str) else task
    read = task.read if task else _prompt_and_completion
    for number, row in enumerate(rows, 1):
        try:
            example = read(row)
            _check_text(example)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            problems.append(f"row {number}: {type(error).__name__}: {error}; fields: {', '.join(row)}")
            continue
        if example.completion.strip():  # six rows of CodeAlpaca have no output: there is nothing to learn from them
            examples.append(example)
    kind = f"a row of task {task.name!r}" if task else "{'prompt': ..., 'completion': ...} (or name a --task)"
    _refuse(problems, f"{source}: rows are not {kind}:")
    if not examples:
        raise DataError(f"{source}: no examples in it")
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
        examples = [examples[index] for index in chosen]
    return examples


def chat_task(tokenizer: "PreTrainedTokenizerBase") -> Task:
    """Return the task whose rows hold `messages`: the last is the answer, those before it the prompt of a chat."""
    return Task(CHAT_TASK, "", partial(_chat, tokenizer))


def _chat(tokenizer: "PreTrainedTokenizerBase", row: Row) -> Example:
    from treadle.engine.chat import BLANK_LINE, joined
    from treadle.engine.tokenization import chat_text

    *before, last = row["messages"]
    if last["role"] != "assistant" or not before:
        raise ValueError("the last message must be the assistant's, with a message before it")
    *asked, answer = _contents(row)
    prompt = chat_text(tokenizer, before)
    start = str(tokenizer.decode(tokenizer("").input_ids))  # what the tokenizer itself puts before every text
    return ChatExample(prompt.removeprefix(start), answer, bare=asked[-1], said=joined(asked) + BLANK_LINE)


def _contents(row: Row) -> list[str]:
    """Return the texts of a row's messages; a ValueError where one has none."""
    from treadle.engine.chat import contents_of

    contents = [message["content"] for message in row["messages"]]
    texts = [each if isinstance(each, list) else as_text(each, "content") for each in contents]
    return contents_of([{"content": text} for text in texts])


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


def _prompt_and_completion(row: dict[str, Any]) -> Example:
    return Example(as_text(row["prompt"], "prompt"), as_text(row["completion"], "completion"), bare=_bare(row))


def _bare(row: dict[str, Any]) -> str:
    return as_text(row.get("bare", ""), "bare")


def _samples_of(rows: Iterable[dict[str, Any]], source: str | Path) -> list[Sample]:
    """Return rows as samples; a DataError lists the first bad ones."""
    samples: list[Sample] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            samples.append(_check_text(_sample_of(row)))
        except (KeyError, ValueError, TypeError) as error:
            problems.append(f"row {number}: {error}; fields: {', '.join(row)}")
    _refuse(problems, f"{source}: rows need a field 'text', 'messages', or 'prompt' and 'completion':")
    return samples


def _check_text(example: AnySample) -> AnySample:
    """Return a sample; a ValueError where it holds half a surrogate pair, which is JSON but no text."""
    try:
        "".join((example.prompt, example.completion, example.bare)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from error
    return example


def _sample_of(row: dict[str, Any]) -> Sample:
    if "text" in row:
        return Sample(as_text(row["text"], "text"), bare=_bare(row))
    if "prompt" in row:
        completion = as_text(row.get("completion", ""), "completion")
        return Sample(as_text(row["prompt"], "prompt"), completion, _bare(row))
    from treadle.engine.chat import BLANK_LINE, joined

    *before, last = _contents(row)
    said = joined(before)
    return Sample(said + BLANK_LINE, last) if said else Sample(last)


def _refuse(problems: Sequence[str], title: str) -> None:
    """Raise a DataError that lists the first problems, if there are any."""
    if problems:
        raise DataError(problem_list(title, first_of(problems, MAX_REPORTED_ROWS)))
