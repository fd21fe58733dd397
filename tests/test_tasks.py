"""Tasks beyond the paper's: MBPP's programs, and anything that a JSON file describes."""

import json
from pathlib import Path
from typing import Any

import pytest

from treadle.common.errors import DataError
from treadle.experiments.data import load_examples
from treadle.experiments.metrics import METRICS
from treadle.experiments.sandbox import passes
from treadle.experiments.tasks import PAPER_TASKS, TASKS, Example, find_task, read_task

MBPP = {
    "text": "Write a function to add. ",
    "code": "def add(a, b):\r\n    return a + b\r\n",
    "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
    "test_setup_code": "",
}
TASK = {"name": "capital", "prompt": "Q: {land}\nA:", "completion": " {city}"}


def write(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content), "utf-8")
    return file


def test_the_completion_is_the_reference_where_no_answers_are_known():
    assert Example("Q", " A").references == (" A",)
    assert Example("Q", " A", answers=("A", "a")).references == ("A", "a")


# Built-in tasks


def test_the_tasks_of_the_paper_are_built_in_and_use_adapters_of_their_own():
    assert set(PAPER_TASKS) == set(TASKS) - {"mbpp", "science-text"}
    assert [TASKS[name].adapter for name in PAPER_TASKS] == [""] * 4
    assert (TASKS["mbpp"].adapter, TASKS["science-text"].adapter) == ("code", "science")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_built_in_task_has_metrics_that_exist_and_rows_on_the_hub(task):
    assert task.metrics
    assert set(task.metrics) <= set(METRICS)
    held_out = {"validation", "test"} if task.name != "code" else {""}  # of rows that nobody trains on
    assert task.dataset.split(":")[-1] in held_out


def test_a_row_of_mbpp_shows_its_tests_and_its_own_program_passes_them():
    example = find_task("mbpp").read(MBPP)
    assert example == Example(
        "Question: Write a function to add.\nYour code should pass these tests:\n"
        "assert add(1, 2) == 3\nassert add(2, 2) == 4\n\nAnswer:",
        "\ndef add(a, b):\n    return a + b",
        "Write a function to add.",
        tests=("assert add(1, 2) == 3", "assert add(2, 2) == 4"),
    )
    assert passes(example.completion, example.tests)


@pytest.mark.parametrize(("setup", "tests"), [("", 2), (None, 2), ("one = 1", 3)])
def test_the_setup_of_mbpp_runs_before_the_tests_and_is_not_shown(setup, tests):
    row = {**MBPP, "test_setup_code": setup}
    if setup:
        row["test_list"] = ["assert add(one, 2) == 3", MBPP["test_list"][1]]
    example = find_task("mbpp").read(row)
    assert len(example.tests) == tests
    assert passes(example.completion, example.tests)
    assert "one = 1" not in example.prompt


def test_a_row_of_mbpp_needs_no_setup_but_a_text(tmp_path):
    row = {key: value for key, value in MBPP.items() if key != "test_setup_code"}
    assert find_task("mbpp").read(row) == find_task("mbpp").read(MBPP)
    del row["text"]
    with pytest.raises(DataError, match="row 1: KeyError: 'text'"):
        load_examples(write(tmp_path / "rows.jsonl", row), "mbpp")


# Tasks in JSON files


def test_a_task_file_needs_a_name_a_prompt_and_a_completion(tmp_path):
    task = read_task(write(tmp_path / "task.json", TASK))
    assert (task.name, task.dataset, task.metrics, task.max_tokens, task.adapter) == ("capital", "", (), 128, "")
    assert task.read({"land": "Peru", "city": "Lima", "more": 1}) == Example("Q: Peru\nA:", " Lima")


def test_a_task_file_may_say_everything(tmp_path):
    more = {
        "source": "cities.jsonl",
        "bare": "{land}",
        "metrics": ["f1", "chrf"],
        "max_tokens": 8,
        "adapter": "science",
    }
    task = read_task(str(write(tmp_path / "task.json", {**TASK, **more})))
    assert (task.dataset, task.metrics, task.max_tokens, task.adapter) == ("cities.jsonl", ("f1", "chrf"), 8, "science")
    rows = write(tmp_path / "rows.jsonl", {"land": "Peru", "city": "Lima"})
    assert load_examples(rows, task) == [Example("Q: Peru\nA:", " Lima", "Peru")]


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("no field", {}, "no field"),
        ("{a}{a} {b}", {"a": "x", "b": "y"}, "xx y"),
        ("{{a}} {a}", {"a": "x"}, "{a} x"),
        ("{a}", {"a": "{b} {"}, "{b} {"),  # what a row says is no template
        ("{a} {a:.1f} {b!r}", {"a": 2, "b": "y"}, "2 2.0 'y'"),
        ("{a}", {"a": "é漢"}, "é漢"),
        ("{a[text][1]} {a[b]}", {"a": {"text": ["x", "y"], "b": 3}, "a[b]": "z"}, "y z"),
    ],
)
def test_a_template_is_filled_from_the_row(tmp_path, template, row, text):
    task = read_task(write(tmp_path / "task.json", {**TASK, "prompt": template, "completion": "c"}))
    assert task.read(row).prompt == text


@pytest.mark.parametrize("template", ["{city}", "{a.__class__}", "{a[0]}", "{0}", "{a:{city}}"])
def test_a_template_reads_fields_of_the_row_and_nothing_else(tmp_path, template):
    task = read_task(write(tmp_path / "task.json", {**TASK, "prompt": template, "completion": "c"}))
    rows = write(tmp_path / "rows.jsonl", {"a": "x"})
    with pytest.raises(DataError, match="rows are not a row of task 'capital':\n  - row 1: KeyError"):
        load_examples(rows, task)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("prompt", "{}", "'{}': braces need the name of a field"), ("metrics", ["pass_at_1"], "unknown metric 'pass_at_1'"),
])  # fmt: skip
def test_what_a_task_file_cannot_ask_for_is_refused(tmp_path, key, value, message):
    with pytest.raises(DataError, match=message):
        read_task(write(tmp_path / "task.json", {**TASK, key: value}))


BAD = {
    "name": 5,
    "promt": "Q",
    "completion": "{oops",
    "bare": ["x"],
    "metrics": ["chr", ["f1"], {"f1": 1}, "chrf"],
    "max_tokens": 0,
    "stop": "end",
    "answers": 3,
}


def test_all_problems_of_a_task_file_are_in_one_message(tmp_path):
    file = write(tmp_path / "task.json", BAD)
    with pytest.raises(DataError) as caught:
        read_task(file)
    message = str(caught.value)
    for problem in (
        f"task file {file}:",
        "unknown key 'promt'. Did you mean 'prompt'?",
        "prompt is missing",
        "name must be a text",
        "bare must be a text",
        "'{oops' is not a template: ",
        "unknown metric 'chr'. Did you mean 'chrf'?",
        "unknown metric \"['f1']\"",
        "unknown metric \"{'f1': 1}\"",
        "stop must be a list of texts",
        "answers must be a text",
        "max_tokens must be a whole number of at least 1, not 0",
    ):
        assert message.count(problem) == 1, problem
    assert message.count("\n") == 11  # and nothing else


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": "f1"}, "metrics must be a list of names"),
        ({"max_tokens": True}, "max_tokens must be a whole number of at least 1, not True"),
        ({"max_tokens": "9"}, "max_tokens must be a whole number of at least 1, not '9'"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number of at least 1, not 1.5"),
        ({"prompt": "}"}, "write {{ and }} for braces"),
        ({"tests": ["x"]}, "unknown key 'tests'. "),
    ],
)
def test_a_value_that_is_not_possible_is_named(tmp_path, change, message):
    with pytest.raises(DataError) as caught:
        read_task(write(tmp_path / "task.json", {**TASK, **change}))
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{oops", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "expected an object with name"),
        (None, "cannot"),
    ],
)
def test_a_file_that_is_no_task_is_refused_by_its_name(tmp_path, content, message):
    file = tmp_path / "task.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=rf"task file .*task\.json.*{message}"):
        read_task(file)
