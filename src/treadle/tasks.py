"""The paper's four tasks: how a row of each data set becomes a prompt and its completion.

These formats are used for training, for centroids and for evaluation alike, and live only here.
This module knows rows and text; it knows nothing of models, files or metrics.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.errors import OptionError, unknown_name

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One prompt and the completion that a model should give; `prompt + completion` is the running text.

    `bare` is the same question without the template's words (`Question:`, `Choices:` ...): a router that is fitted on
    both forms learns the domain, not the template.
    """

    prompt: str
    completion: str
    bare: str = ""


@dataclass(frozen=True)
class Task:
    """One data set of the paper: its short name, its hub id and the function that reads one of its rows."""

    name: str
    dataset: str
    read: Callable[[Row], Example]


def _math(row: Row) -> Example:
    question = row["question"].strip()
    return Example(f"Question: {question}\n\nAnswer:", " " + row["answer"].strip(), bare=question)


def _science(row: Row) -> Example:
    texts, labels = row["choices"]["text"], list(row["choices"]["label"])
    letters = "ABCDE"[: len(texts)]  # some rows label their choices 1-4
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    question, choices = row["question"].strip(), "\n".join(lines)
    return Example(
        f"Question: {question}\n\nChoices:\n{choices}\n\nAnswer:",
        " " + letters[labels.index(row["answerKey"])],
        bare=" ".join([question, *texts]),
    )


def _code(row: Row) -> Example:
    asked = "\n".join(part.strip() for part in (row["instruction"], row.get("input") or "") if part.strip())
    return Example(f"Question: {asked}\n\nAnswer:", "\n" + row["output"].strip(), bare=asked)


def _reading(row: Row) -> Example:
    context, question = row["context"].strip(), row["question"].strip()
    return Example(
        f"Context: {context}\n\nQuestion: {question}\n\nAnswer:",
        " " + row["answers"]["text"][0].strip(),
        bare=f"{context} {question}",
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("math", "openai/gsm8k", _math),
        Task("science", "allenai/ai2_arc", _science),
        Task("code", "sahil2801/CodeAlpaca-20k", _code),
        Task("reading", "rajpurkar/squad", _reading),
    )
}


def get_task(name: str) -> Task:
    """Return the task called `name`; an unknown name is an OptionError that lists the known ones."""
    if name not in TASKS:
        raise OptionError(unknown_name("task", name, TASKS))
    return TASKS[name]
