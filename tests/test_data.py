"""Rows of the paper's four tasks become exactly these texts; whatever is wrong with a file is said with its place."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from treadle.common.errors import DataError, OptionError
from treadle.engine.chat import read_prompt
from treadle.engine.sample_files import load_samples, load_texts, read_rows
from treadle.experiments.data import CHAT_TASK, chat_task, load_examples
from treadle.experiments.tasks import TASKS, Example, find_task
from treadle.experiments.train import TrainParams, training_rows
from treadle.routing.samples import sample_texts

from conftest import byte_tokenizer

PAIRS = [{"prompt": f"Q{index}", "completion": f" A{index}"} for index in range(20)]


def write(file: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


# Formats: what the adapters were trained on


def choices(labels: str) -> dict[str, list[str]]:
    return {"text": ["ice", "steam", "fog", "dew", "hail"][: len(labels)], "label": list(labels)}


@pytest.mark.parametrize(
    ("task", "row", "prompt", "completion", "bare"),
    [
        (
            "math",
            {"question": "2 + 2? ", "answer": "It is 4.\n#### 4\n"},
            "Question: 2 + 2?\n\nAnswer:",
            " It is 4.\n#### 4",
            "2 + 2?",
        ),
        (
            "science",
            {"question": "Which is cold?", "choices": choices("ABCD"), "answerKey": "A"},
            "Question: Which is cold?\n\nChoices:\nA. ice\nB. steam\nC. fog\nD. dew\n\nAnswer:",
            " A",
            "Which is cold? ice steam fog dew",
        ),
        (
            "science",  # some rows of ARC label their choices 1-4; the prompt always says A-D
            {"question": "Which is cold?", "choices": choices("1234"), "answerKey": "3"},
            "Question: Which is cold?\n\nChoices:\nA. ice\nB. steam\nC. fog\nD. dew\n\nAnswer:",
            " C",
            "Which is cold? ice steam fog dew",
        ),
        (
            "science",
            {"question": "Which is cold?", "choices": choices("ABC"), "answerKey": "C"},
            "Question: Which is cold?\n\nChoices:\nA. ice\nB. steam\nC. fog\n\nAnswer:",
            " C",
            "Which is cold? ice steam fog",
        ),
        (
            "science",
            {"question": "Which is cold?", "choices": choices("ABCDE"), "answerKey": "E"},
            "Question: Which is cold?\n\nChoices:\nA. ice\nB. steam\nC. fog\nD. dew\nE. hail\n\nAnswer:",
            " E",
            "Which is cold? ice steam fog dew hail",
        ),
        (
            "science",  # OpenBookQA
            {"question_stem": "Cold is", "choices": choices("ABCD"), "answerKey": "A"},
            "Question: Cold is\n\nChoices:\nA. ice\nB. steam\nC. fog\nD. dew\n\nAnswer:",
            " A",
            "Cold is ice steam fog dew",
        ),
        (
            "science-text",
            {"question": "Which is cold?", "choices": choices("1234"), "answerKey": "3"},
            "Question: Which is cold?\n\nAnswer:",
            " fog",
            "Which is cold?",
        ),
        (
            "code",
            {"instruction": "Add them.", "input": "1, 2", "output": "1 + 2\n"},
            "Question: Add them.\n1, 2\n\nAnswer:",
            "\n1 + 2",
            "Add them.\n1, 2",
        ),
        (
            "code",
            {"instruction": "Print.", "input": "", "output": "print()"},
            "Question: Print.\n\nAnswer:",
            "\nprint()",
            "Print.",
        ),
        (
            "reading",
            {"context": "It rained. ", "question": "What fell?", "answers": {"text": ["rain", "water"]}},
            "Context: It rained.\n\nQuestion: What fell?\n\nAnswer:",
            " rain",
            "It rained. What fell?",
        ),
    ],
)
def test_a_row_becomes(tmp_path, task, row, prompt, completion, bare):
    example = find_task(task).read(row)
    assert (example.prompt, example.completion, example.bare) == (prompt, completion, bare)
    assert load_examples(write(tmp_path / "rows.jsonl", [row]), task) == [example]


@pytest.mark.parametrize(
    ("task", "row", "options", "references"),
    [
        ("math", {"question": "2?", "answer": "#### 2"}, (), (" #### 2",)),
        (
            "science",
            {"question": "?", "choices": choices("ABCD"), "answerKey": "B"},
            (" A", " B", " C", " D"),
            (" B",),
        ),
        ("science", {"question": "?", "choices": choices("123"), "answerKey": "1"}, (" A", " B", " C"), (" A",)),
        (
            "science-text",
            {"question": "?", "choices": choices("123"), "answerKey": "2"},
            (" ice", " steam", " fog"),
            (" steam",),
        ),
        ("code", {"instruction": "Print.", "input": "", "output": "print()"}, (), ("\nprint()",)),
        (
            "reading",
            {"context": "It rained.", "question": "?", "answers": {"text": ["rain", "water"]}},
            (),
            ("rain", "water"),
        ),
    ],
)
def test_a_row_offers_options_and_accepts_references(task, row, options, references):
    example = find_task(task).read(row)
    assert (example.options, example.references, example.tests) == (options, references, ())
    assert not options or example.completion in options


def test_an_unknown_task_names_the_known():
    assert set(TASKS) == {"math", "science", "science-text", "code", "reading", "mbpp"}
    with pytest.raises(OptionError, match=r"unknown task 'maths'\. Did you mean 'math'\?"):
        find_task("maths")


# Files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.data"])
def test_rows_are_read_in_their_order(tmp_path, name):
    file = write(tmp_path / name, PAIRS)
    assert list(read_rows(file)) == PAIRS
    assert load_examples(str(file)) == [Example(row["prompt"], row["completion"]) for row in PAIRS]


def test_blank_lines_and_other_alphabets_are_fine(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"prompt": "é漢", "completion": " 😀"}\n  \n', "utf-8")
    assert load_examples(file) == [Example("é漢", " 😀")]


def test_a_limit_is_a_seeded_choice_in_the_order_of_the_file(tmp_path):
    file = write(tmp_path / "rows.jsonl", PAIRS)
    everything = load_examples(file)
    chosen = load_examples(file, limit=7, seed=1)
    assert chosen == load_examples(file, limit=7, seed=1)
    assert [example for example in everything if example in chosen] == chosen
    assert len(set(chosen)) == 7
    assert chosen != everything[:7]
    assert chosen != load_examples(file, limit=7, seed=2)
    assert load_examples(file, limit=20) == load_examples(file, limit=99) == everything


def test_rows_without_an_answer_teach_nothing(tmp_path):
    rows = [{"instruction": "a", "input": "", "output": " "}, {"instruction": "b", "input": "", "output": "c"}]
    assert load_examples(write(tmp_path / "rows.jsonl", rows), "code") == [
        Example("Question: b\n\nAnswer:", "\nc", "b")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no examples in it"),
        (b'{"prompt": "a", "completion": "b"}\n{oops\n', "line 2: not JSON"),
        (b"\n[1, 2]\n", "line 2: expected an object, got list"),
        (b'{"prompt": "a"}\n', "row 1: KeyError: 'completion'; fields: prompt"),
        (b'{"prompt": "a", "completion": "\\ud800"}\n', "row 1: ValueError: character 1 is half of a surrogate pair"),
        (b'{"prompt": "a", "completion": "\xff"}\n', "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_examples(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"plain" + data], ids=["truncated", "not gzip"]
)
def test_a_damaged_archive_is_refused(tmp_path, damage):
    file = write(tmp_path / "rows.jsonl.gz", PAIRS)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read"):
        load_examples(file)


def test_all_bad_rows_are_in_one_message_the_first_ten_in_full(tmp_path):
    good = {"question": "a", "answer": "b"}
    file = write(tmp_path / "rows.jsonl", [good, *[{"question": "a"}] * 3, good, {"question": 7, "answer": "b"}])
    with pytest.raises(DataError) as caught:
        load_examples(file, "math")
    message = str(caught.value)
    assert "rows are not a row of task 'math':" in message
    assert [f"row {n}:" in message for n in range(1, 7)] == [False, True, True, True, False, True]
    file = write(tmp_path / "rows.jsonl", [{"question": "a"}] * 25)
    with pytest.raises(DataError, match=r"(?s)row 10: .*and 15 more"):
        load_examples(file, "math")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?", "choices": choices("ABCD"), "answerKey": "E"},
        {"question": "?", "choices": {"text": ["one"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "?", "choices": {"text": list("123456"), "label": list("ABCDEF")}, "answerKey": "A"},
        {"question": "?", "choices": "A B C", "answerKey": "A"},
    ],
)
def test_a_choice_that_does_not_exist_is_a_bad_row(tmp_path, row):
    with pytest.raises(DataError, match="row 1: "):
        load_examples(write(tmp_path / "rows.jsonl", [row]), "science")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.jsonl.gz", "missing.txt"])
def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        (load_texts if name.endswith("txt") else load_examples)(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:main:validation", ("owner/name", "main", "validation")),
    ],
)
def test_a_hub_data_set_is_named_with_config_and_split(monkeypatch, source, expected):
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return PAIRS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_examples(source)) == len(PAIRS)
    assert asked == [expected]


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("unreachable")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="owner/name: no such file, and the hub says: unreachable"):
        load_examples("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'treadle\[data\]'"):
        load_examples("owner/name")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, name):
    content = b"\xef\xbb\xbf" + (b"add three\n" if name == "a.txt" else b'{"prompt": "add", "completion": " three"}\n')
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert load_texts(tmp_path / name) == ["add three"]
    if name != "a.txt":
        assert load_examples(tmp_path / name)[0].prompt == "add"


@pytest.mark.parametrize("missing", ["NaN", "Infinity", "-Infinity", "null", "[]"])
@pytest.mark.parametrize("field", ["prompt", "completion", "bare"])
def test_a_missing_value_is_no_text(tmp_path, field, missing):
    row = {"prompt": '"add"', "completion": '" three"', "bare": '"add"', field: missing}
    line = "{" + ", ".join(f'"{key}": {value}' for key, value in row.items()) + "}\n"
    (tmp_path / "a.jsonl").write_text(line)
    for read in (load_examples, load_samples):
        with pytest.raises(DataError, match=rf"row 1: .*{field} is .*, not a text"):
            read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), None])
def test_a_missing_value_is_no_text_in_a_task_of_ones_own(tmp_path, missing):
    task = {"name": "own", "prompt": "Q: {q}", "completion": "{a[0]}", "answers": "a"}
    (tmp_path / "own.json").write_text(json.dumps(task))
    own = find_task(str(tmp_path / "own.json"))
    for row in ({"q": missing, "a": ["x"]}, {"q": "x", "a": [missing]}):
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=r"row 1: .*, not a text"):
            load_examples(tmp_path / "a.jsonl", own)


# Sample texts of a router


def words(count: int) -> str:
    return " ".join(f"w{index}" for index in range(count))


def texts_of(samples) -> list[str]:
    return [each.text for each in sample_texts(samples)]


def test_samples_hold_each_whole_and_each_prompt_with_and_without_the_template():
    examples = [Example("Question: a b", " c", "a b"), Example("just text", "")]
    texts = texts_of(examples)
    for text in ("Question: a b c", "Question: a b", "a b c", "a b", "just text"):
        assert text in texts


def test_samples_hold_beginnings_of_the_prompt_and_of_the_answer():
    prompt, completion = words(100), " and then " + words(100)
    made = sample_texts([Example(prompt, completion)] * 20)
    begun, grown = ([each.text for each in made if each.kind == kind] for kind in ("begin", "grow"))
    assert len(begun) == 20
    assert {len(text.split()) for text in begun} == {8, 16, 32, 64}
    assert all(prompt.startswith(text) for text in begun)
    assert all((prompt + completion).startswith(text) and len(text) > len(prompt) for text in grown)
    assert len({len(text.split()) for text in grown}) > 10


def test_samples_are_the_same_every_time():
    examples = [Example(words(90), words(90), words(80))] * 3
    assert sample_texts(examples) == sample_texts(examples)
    assert sample_texts(examples) != sample_texts(examples, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one two\n\n  three  \n", ["one two", "three"]),
        ("a.jsonl", '{"text": "one"}\n', ["one"]),
        ("a.jsonl", '{"prompt": "one", "completion": " two"}\n', ["one", "one two"]),
        ("a.jsonl", '{"prompt": "one"}\n', ["one"]),
        ("a.jsonl", '{"prompt": "Q: one", "completion": " two", "bare": "one"}\n', ["Q: one two", "one two", "one"]),
    ],
)
def test_sample_files_hold_texts_or_pairs(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    texts = texts_of(load_samples(tmp_path / name))
    assert set(expected) <= set(texts)
    assert all(any(text in whole for whole in expected) for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "no sample texts in it"),
        ("a.jsonl", "", "no sample texts in it"),
        ("a.txt", "\udcff", "cannot be read"),
        (
            "a.jsonl",
            '{"body": "x"}\n',
            "rows need a field 'text', 'messages', or 'prompt' and 'completion':\n  - row 1: 'messages'; fields: body",
        ),
    ],
)
def test_sample_files_without_texts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(DataError, match=message):
        load_texts(tmp_path / name)


# Chats and templates


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "with a first token"])
def test_a_chat_is_trained_on_as_it_is_generated(tmp_path: Path, begins: bool) -> None:
    tokenizer = byte_tokenizer()
    if begins:  # as Llama's: the template writes the first token, and so does the tokenizer
        tokenizer.add_special_tokens({"bos_token": "<unused>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<unused> $A", special_tokens=[("<unused>", 256)]
        )
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    rows = [chat("Hi", "Hello", "What is 2 + 2?", "4")]
    (example,) = load_examples(write(tmp_path / "chats.jsonl", rows), chat_task(tokenizer))
    assert (example.completion, example.bare) == ("4", "What is 2 + 2?")
    (row,) = training_rows(tokenizer, [example], (), TrainParams(join=0.0))
    asked = read_prompt(tokenizer, rows[0]["messages"][:-1]).ids
    assert row["input_ids"] == [*asked, *tokenizer("4", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    made = {each.kind: each.text for each in sample_texts(load_samples(tmp_path / "chats.jsonl"))}
    assert made["prompt"] == "Hi\n\nHello\n\nWhat is 2 + 2?\n\n"
    assert made["whole"] == "Hi\n\nHello\n\nWhat is 2 + 2?\n\n4"


def test_a_router_is_fitted_on_what_chats_say(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    asked = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    row = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": asked},
            *chat("", "4")["messages"][1:],
        ]
    }
    file = write(tmp_path / "chats.jsonl", [row])
    trained, sampled = (
        {each.kind: each.text for each in sample_texts(rows)}
        for rows in (load_examples(file, chat_task(tokenizer)), load_samples(file))
    )
    for made in (trained, sampled):
        assert (made["prompt"], made["whole"]) == ("What is 2 + 2?\n\n", "What is 2 + 2?\n\n4")
    assert not any("user" in text or "assistant" in text for text in trained.values())
    prompt = read_prompt(tokenizer, row["messages"][:-1])
    assert prompt.chat is not None
    assert "".join(prompt.chat.pieces) + "\n\n" == trained["prompt"]
    with pytest.raises(DataError, match=r"row 1: .*message 0: content is \[7\]"):
        load_texts(write(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": [7]}]}]))


def test_chats_that_end_in_no_answer_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", [chat("Hi"), chat("Hi", "Hello", "Bye"), {"text": "no"}, {"messages": []}])
    with pytest.raises(DataError) as caught:
        load_examples(file, chat_task(byte_tokenizer()))
    assert str(caught.value).count("the last message must be the assistant's") == 2
    for part in ("row 1", "row 2", "row 3: KeyError", "row 4"):
        assert part in str(caught.value)


def test_tasks_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    file = tmp_path / "sql.json"
    file.write_text(json.dumps({"name": "sql", "prompt": "Q: {q}\nA:", "completion": " {a}"}))
    (example,) = load_examples(write(tmp_path / "rows.jsonl", [{"q": "all?", "a": "SELECT"}]), find_task(str(file)))
    assert (example.prompt, example.completion) == ("Q: all?\nA:", " SELECT")
    assert find_task("math") is TASKS["math"]
    with pytest.raises(OptionError, match="Did you mean 'chat'"):
        find_task("chats", also=[CHAT_TASK])
