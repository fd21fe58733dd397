"""Rows of a data file or of a hub data set, as `Example`s; `treadle.engine.sample_files` reads the rows."""

import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.common.errors import DataError, OptionError
from treadle.engine.sample_files import bare_of, checked_text, messages_of, read_rows, refuse_rows
from treadle.experiments.tasks import ChatExample, Example, Row, Task, find_task
from treadle.routing.samples import as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TASK = "chat"
"""The name of rows that hold chat messages."""


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
            checked_text(example)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            problems.append(f"row {number}: {type(error).__name__}: {error}; fields: {', '.join(row)}")
            continue
        if example.completion.strip():  # six rows of CodeAlpaca have no output: there is nothing to learn from them
            examples.append(example)
    kind = f"a row of task {task.name!r}" if task else "{'prompt': ..., 'completion': ...} (or name a --task)"
    refuse_rows(problems, f"{source}: rows are not {kind}:")
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
    *asked, answer = messages_of(row)
    prompt = chat_text(tokenizer, before)
    start = str(tokenizer.decode(tokenizer("").input_ids))  # what the tokenizer itself puts before every text
    return ChatExample(prompt.removeprefix(start), answer, bare=asked[-1], said=joined(asked) + BLANK_LINE)


def _prompt_and_completion(row: dict[str, Any]) -> Example:
    return Example(as_text(row["prompt"], "prompt"), as_text(row["completion"], "completion"), bare=bare_of(row))
