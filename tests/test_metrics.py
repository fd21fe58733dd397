"""What a text is worth, by hand: a metric that is wrong here is wrong in every table."""

import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.common.errors import TreadleError
from treadle.experiments.metrics import LIBRARIES, METRICS, final_number, is_python, program
from treadle.experiments.tasks import TASKS, Example

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROGRAM = "def add(a, b):\n    return a + b"
PERFECT = {
    "exact_number": Example("", " 3 + 4 is 7.\n#### 7"),
    "letter": Example("", " B"),
    "exact_match": Example("", " rain", answers=("rain", "the rain")),
    "f1": Example("", " rain", answers=("rain", "the rain")),
    "rouge_l": Example("", "\n" + PROGRAM),
    "chrf": Example("", "\n" + PROGRAM),
    "parses": Example("", "\n" + PROGRAM),
    "pass_at_1": Example("", "\n" + PROGRAM, tests=("assert add(1, 2) == 3",)),
}


def test_every_metric_of_a_task_exists():
    assert set(PERFECT) == set(METRICS)
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_a_reference_is_worth_one_and_nothing_is_worth_zero(name):
    assert METRICS[name](PERFECT[name].completion, PERFECT[name]) == 1
    assert METRICS[name]("", PERFECT[name]) == 0


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"pass_at_1"}))
@given(text=st.text(max_size=40), reference=st.text(max_size=40))
@quick
def test_any_text_is_worth_something_from_zero_to_one_or_does_not_count(name, text, reference):
    value = METRICS[name](text, Example("", reference))
    assert 0 <= value <= 1 if value is not None else name == "parses"


# Numbers and letters


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234),
        ("1234.0", 1234),
        ("3 apples and 4 pears", 4),
        ("so 3.\n#### 5\nQuestion: what is 7 + 8?", 5),
        ("#### 5 and not 6", 5),
        ("#### 5\n#### 6", 5),
        ("it is 3 ####", 3),
        ("#### -$1,234.50.", -1234.5),
        ("It costs $18.", 18),
        ("-2", -2),
        ("from 5-10", 10),  # a dash between numbers is no sign
        ("(4)-2", 2),
        ("x = -$7", -7),
        ("1,2,3", 3),
        ("1,000,000", 1_000_000),
        ("about .5", 0.5),
        ("1, 2, 3,", 3),
        ("no number", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_one_after_the_mark_else_the_last(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "points"),
    [("1234.0", 1), ("#### 1,234\nThen 9", 1), ("#### 1235", 0), ("1234 or 1235", 0), ("none", 0)],
)
def test_a_number_counts_by_its_value(text, points):
    assert METRICS["exact_number"](text, Example("", " so many\n#### 1,234")) == points


def test_two_texts_without_numbers_do_not_agree():
    assert METRICS["exact_number"]("none", Example("", "none")) == 0


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (" B", 1),
        ("B. fog", 1),
        ("(B)", 1),
        ("The answer: B or C", 1),
        (" C, not B", 0),
        ("Both", 0),
        ("b", 0),
        ("F", 0),
        ("A plant makes B", 1),  # the article is no choice
        ("A or B", 0),
        ("A is right, not B", 0),
    ],
)
def test_the_first_lone_letter_counts(text, points):
    assert METRICS["letter"](text, Example("", " B")) == points


# Words


@pytest.mark.parametrize(
    ("text", "answers", "match", "f1"),
    [
        ("the cat sat", ("cat sat down",), 0, 0.8),  # {cat, sat} of 2 and 3 words
        ("The cat!", ("a CAT",), 1, 1),
        ("cat cat", ("cat",), 0, 2 / 3),  # a word counts as often as it is wanted
        ("dog", ("cat", "the dog", "dog house"), 1, 1),
        ("dog", ("cat", "red dog house"), 0, 0.5),
        ("anthem", ("them",), 0, 0),  # articles go as whole words only
        ("U.S.", ("us",), 1, 1),
        ("the", ("a",), 1, 0),  # no word of either is left: so SQuAD's script has it
        ("", ("cat",), 0, 0),
    ],
)
def test_words_are_compared_as_squad_does_with_the_best_answer(text, answers, match, f1):
    example = Example("", " unused", answers=answers)
    assert METRICS["exact_match"](text, example) == match
    assert METRICS["f1"](text, example) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("name", "text", "answers", "value"),
    [
        ("rouge_l", "the cat ran", ("the cat sat",), 2 / 3),  # longest common: 2 of 3 and 3 words
        ("rouge_l", "sat cat the", ("the cat sat",), 1 / 3),  # order counts
        ("rouge_l", "cats", ("cat",), 0),  # no stemming
        ("rouge_l", "dog", ("cat", "dog"), 1),
        ("chrf", "abc", ("abd",), 7 / 18),  # the mean of 2/3, 1/2 and 0, for 1, 2 and 3 characters
        ("chrf", " abc\n", ("abc",), 1),
        ("chrf", "dog", ("cat", "dog"), 1),
    ],
)
def test_texts_are_compared_by_hand(name, text, answers, value):
    assert METRICS[name](text, Example("", " unused", answers=answers)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "module"), [("rouge_l", "rouge_score.rouge_scorer"), ("chrf", "sacrebleu.metrics.chrf")]
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, name, module):
    LIBRARIES[name].cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TreadleError, match=rf"{name} needs: pip install 'treadle\[eval\]'"):
        METRICS[name]("a", Example("", "a"))


# Programs


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (PROGRAM, True),
        ("print('hi')", True),
        ("import re\nre.compile('\\d')", True),  # Python warns of the escape, and runs it
        (f"Here it is:\n```python\n{PROGRAM}\n```\nHave fun!", True),
        (f"```\n{PROGRAM}", True),
        (f"Here it is:\n{PROGRAM}", False),
        ("```js\nlet a = 1;\n```", False),
        ("yes", False),
        ("answer: yes", False),
        ("", False),
        ("def f(:", False),
        ("x = '\0'", False),
        ("x = '\ud800'", False),
        ("x = " + "(" * 5000 + ")" * 5000, False),
    ],
)
def test_what_is_a_program(text, is_one):
    assert is_python(text) is is_one


def test_only_the_first_fenced_block_is_the_program():
    assert program("a\n```python\nx = 1\n```\nb\n```\nx = 2\n```") == "x = 1"
    assert program(" x = 1\n") == "x = 1"


def test_a_text_need_not_parse_where_the_reference_does_not():
    assert METRICS["parses"](PROGRAM, Example("", " SELECT name FROM people;")) is None
    assert METRICS["parses"]("Sure!", Example("", PROGRAM)) == 0


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (f"Sure!\n```python\n{PROGRAM}\n```", 1),
        (f"Sure!\n{PROGRAM}", 0),
        ("def add(a, b):\n    return a - b", 0),
        ("def add(a, b):\n    return 3", 0),
    ],
)
def test_a_program_counts_where_it_passes_all_tests(text, points):
    tests = ("assert add(1, 2) == 3", "assert add(2, 2) == 4")
    assert METRICS["pass_at_1"](text, Example("", "", tests=tests)) == points
