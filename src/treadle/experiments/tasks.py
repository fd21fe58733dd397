"""Tasks: how a row of a data set becomes a prompt and its completion, and which metrics judge an answer.

These formats are used for training, for centroids and for evaluation alike, and live only here. The paper's four tasks
and MBPP are built in; any other is a few lines of JSON. This module knows rows and text; it knows nothing of models.
"""

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from treadle.common.documents import read_json
from treadle.common.errors import DataError, OptionError, problem_list, shown, unknown_name
from treadle.experiments.metrics import METRICS
from treadle.routing.samples import Sample, as_text

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example(Sample):
    """One prompt and the completion that a model should give; the NLL is that of the completion.

    Attributes:
        answers: all accepted answers, where there are several.
        options: the completions to choose from, where the task is a choice.
        tests: statements that a generated program must pass.
    """

    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """The accepted answers; the completion where no others are known."""
        return self.answers or (self.completion,)


@dataclass(frozen=True)
class ChatExample(Example):
    """An example whose prompt is a chat: a router reads the contents of its messages alone, `said`."""

    said: str = ""

    @property
    def routed(self) -> str:
        """The part of the prompt that a router reads."""
        return self.said


@dataclass(frozen=True)
class Task:
    """One kind of example and how answers to it are judged.

    Attributes:
        name: its short name.
        dataset: hub id of its data set, with configuration and evaluation split (`name:config:split`).
        read: makes an Example of a row.
        metrics: names of `treadle.experiments.metrics` that judge generated texts.
        max_tokens: tokens to generate at most.
        adapter: the adapter of its own, which the arm `oracle` uses; "" = the one called like the task.
        stop: strings that end a generated answer: a base that has not learned to end would go on to another question.
    """

    name: str
    dataset: str
    read: Callable[[Row], Example]
    metrics: tuple[str, ...] = ()
    max_tokens: int = 128
    adapter: str = ""
    stop: tuple[str, ...] = ()


def _math(row: Row) -> Example:
    question = row["question"].strip()
    return Example(f"Question: {question}\n\nAnswer:", " " + row["answer"].strip(), bare=question)


def _science(row: Row) -> Example:
    question, texts, right = _choice(row)
    letters = "ABCDE"[: len(texts)]  # some rows label their choices 1-4
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    return Example(
        f"Question: {question}\n\nChoices:\n{choices}\n\nAnswer:",
        " " + letters[right],
        bare=" ".join([question, *texts]),
        options=tuple(f" {letter}" for letter in letters),
    )


def _science_text(row: Row) -> Example:
    question, texts, right = _choice(row)
    options = tuple(f" {text.strip()}" for text in texts)
    return Example(f"Question: {question}\n\nAnswer:", options[right], bare=question, options=options)


def _choice(row: Row) -> tuple[str, list[str], int]:
    """Return the question of a row of ARC or OpenBookQA, its choices, and which of them is right."""
    question = row["question_stem" if "question_stem" in row else "question"].strip()
    return question, row["choices"]["text"], list(row["choices"]["label"]).index(row["answerKey"])


def _code(row: Row) -> Example:
    asked = "\n".join(part.strip() for part in (row["instruction"], row.get("input") or "") if part.strip())
    return Example(f"Question: {asked}\n\nAnswer:", "\n" + row["output"].strip(), bare=asked)


def _reading(row: Row) -> Example:
    context, question = row["context"].strip(), row["question"].strip()
    return Example(
        f"Context: {context}\n\nQuestion: {question}\n\nAnswer:",
        " " + row["answers"]["text"][0].strip(),
        bare=f"{context} {question}",
        answers=tuple(row["answers"]["text"]),
    )


def _mbpp(row: Row) -> Example:
    asked, tests = row["text"].strip(), tuple(row["test_list"])
    listed = "\n".join(tests)
    setup = tuple(filter(None, [row.get("test_setup_code", "")]))
    return Example(
        f"Question: {asked}\nYour code should pass these tests:\n{listed}\n\nAnswer:",
        "\n" + row["code"].replace("\r\n", "\n").strip(),
        bare=asked,
        tests=setup + tests,
    )


CODE_ADAPTER = "code"
STOP_STRINGS = ("\n\nQuestion:", "\n\nContext:")
"""How a next example would begin."""
TASKS: dict[str, Task] = {  # CodeAlpaca has a training split alone: its rows are asked where someone held some out
    task.name: task
    for task in (
        Task("math", "openai/gsm8k:main:test", _math, ("exact_number",), 192, stop=STOP_STRINGS),
        Task("science", "allenai/ai2_arc:ARC-Challenge:validation", _science, ("letter",), 8, stop=STOP_STRINGS),
        Task(
            "science-text",  # the same questions without letters: which text is the likeliest answer?
            "allenai/ai2_arc:ARC-Challenge:validation",
            _science_text,
            ("exact_match",),
            24,
            "science",
            ("\n",),
        ),
        Task("code", "", _code, ("rouge_l", "chrf", "parses"), stop=STOP_STRINGS),
        Task("reading", "rajpurkar/squad:validation", _reading, ("exact_match", "f1"), 24, stop=("\n",)),
        Task(
            "mbpp",
            "google-research-datasets/mbpp:full:validation",
            _mbpp,
            ("pass_at_1", "parses"),
            192,
            CODE_ADAPTER,
            STOP_STRINGS,
        ),
    )
}
WIDE_FORMAT_PATTERN = re.compile(r"\d{4}")
"""A width or precision of a format that is surely a mistake."""
MAX_TASK_BYTES = 1 << 20
"""Bytes of a task's file."""
ANSWER_CUE = "\n\nAnswer:"
"""The end of every built-in prompt."""
SEPARATOR = "\n\n"
"""Separates the examples of a joined text: training sequences, mixed streams, shots before a prompt."""
PAPER_TASKS = ("math", "science", "code", "reading")
"""The tasks of the paper."""
FILE_KEYS = ("name", "source", "prompt", "completion", "bare", "answers", "metrics", "max_tokens", "adapter", "stop")


def find_task(name: str, also: Iterable[str] = ()) -> Task:
    """Return the task called `name`, or the one that a `.json` file describes; `also`: names that the caller knows."""
    if name.endswith(".json"):
        return read_task(name)
    if name not in TASKS:
        raise OptionError(unknown_name("task", name, [*TASKS, *also]) + " A task of your own is a .json file.")
    return TASKS[name]


def read_task(file: str | Path) -> Task:
    """Return the task that a JSON file describes.

    Its keys: `name`; `prompt` and `completion`, texts in which `{field}` (or `{field[inner]}`) stands for a field of
    the row; optional `source` (file or hub id of the rows), `bare`, `answers` (the field of all accepted answers),
    `metrics` (names of `treadle.experiments.metrics`), `max_tokens`, `stop` (strings that end an answer), `adapter`.
    """
    judges = [name for name in METRICS if name != "pass_at_1"]  # which needs tests, that a task file cannot name
    try:
        given = read_json(file, DataError, MAX_TASK_BYTES)
    except DataError as error:
        raise DataError(f"task file {error}") from error
    if not isinstance(given, dict):
        raise DataError(f"task file {file}: expected an object with {', '.join(FILE_KEYS)}")
    given = cast(dict[str, Any], given)
    problems = [unknown_name("key", key, FILE_KEYS) for key in given if key not in FILE_KEYS]
    problems += [f"{key} is missing or empty" for key in ("name", "prompt", "completion") if not given.get(key)]
    texts = {key: given.get(key, "") for key in FILE_KEYS if key not in {"metrics", "max_tokens", "stop"}}
    problems += [f"{key} must be a text" for key, text in texts.items() if not isinstance(text, str)]
    templates = {key: _template(texts[key], problems) for key in ("prompt", "completion", "bare")}
    metrics, stop, tokens = given.get("metrics", []), given.get("stop", []), given.get("max_tokens", 128)
    if not isinstance(metrics, list):
        problems.append("metrics must be a list of names")
    else:
        problems += [unknown_name("metric", str(name), judges) for name in metrics if name not in judges]
    if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
        problems.append("stop must be a list of texts")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        problems.append(f"max_tokens must be a whole number of at least 1, not {tokens!r:.60}")
    if problems:
        raise DataError(problem_list(f"task file {file}:", problems))

    def read(row: Row) -> Example:
        answers = _answers(texts["answers"], row) if texts["answers"] else ()
        return Example(
            templates["prompt"](row), templates["completion"](row), bare=templates["bare"](row), answers=answers
        )

    return Task(texts["name"], texts["source"], read, tuple(metrics), tokens, texts["adapter"], tuple(stop))


def _template(text: Any, problems: list[str]) -> Callable[[Row], str]:
    """Return a function that fills the `{field}`s of a text from a row; a missing field is a KeyError."""
    names: list[str] = []
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(str(text)) if name is not None]
    except ValueError as error:  # a lone brace
        problems.append(f"{shown(text)} is not a template: {error}; write {{{{ and }}}} for braces")
    if "" in names:
        problems.append(f"{shown(text)}: braces need the name of a field; write {{{{ and }}}} for braces themselves")

    return lambda row: _Fields().vformat(str(text), (), row)


class _Fields(string.Formatter):
    """Fills templates from the fields of a row, and from nothing else."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        value = _field(kwargs, field_name)
        as_text(value, field_name)
        return value, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if WIDE_FORMAT_PATTERN.search(format_spec):
            raise ValueError(f"{shown(format_spec)} asks for more than 999 characters")
        return super().format_field(value, format_spec)


def _field(row: Row, name: str) -> Any:
    """Return a field of a row, `name`, or what is in it, `name[inner]`; a KeyError where it is not there."""
    head, *inner = [name] if name in row else name.removesuffix("]").replace("][", "[").split("[")
    value = row[head]
    for key in inner:
        if isinstance(value, Mapping):
            value = cast(Row, value)[key]
        elif isinstance(value, list) and key.isdigit():
            value = cast(list[Any], value)[int(key)]
        else:
            raise KeyError(name)
    return value


def _answers(name: str, row: Row) -> tuple[str, ...]:
    """Return the accepted answers that a field of a row holds: a text, or a list of texts."""
    value = _field(row, name)
    return tuple(as_text(each, name) for each in (value if isinstance(value, list) else [value]))
