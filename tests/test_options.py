"""An option means the same whether it comes from Python, a flag, a file or a request."""

import pickle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.common.errors import OptionError, TreadleError, listed, problem_list, shown, unknown_name
from treadle.common.options import check_fields, meanings, option, raise_problems, read_options
from treadle.common.params import RoutingParams, SamplingParams, read_routing
from treadle.experiments.params import BenchParams, EvalParams, TrainParams
from treadle.serving.openai.params import ServeParams
from treadle.serving.vllm.params import PluginParams

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Colour = Literal["red", "green"]


@dataclass(frozen=True)
class Paint:
    colour: Colour = option("red", "of the wall")
    layers: int | None = option(2, "how many", at_least=1)
    share: float = option(0.5, "of white", at_least=0, at_most=1)
    is_dry: bool = option(False, "touch it")
    names: tuple[str, ...] = option((), "who paints")
    doors: tuple[int, ...] = option((), "which ones", at_least=0)
    mix: Mapping[str, float] | None = option(None, "name=share", at_least=0)

    def __post_init__(self) -> None:
        raise_problems("paint:", check_fields(self))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layers", "3", 3),
        ("layers", 3, 3),
        ("layers", "none", None),
        ("layers", "None", None),
        ("layers", None, None),
        ("share", "0.5", 0.5),
        ("share", 1, 1.0),
        ("share", "1e-3", 1e-3),
        ("is_dry", "true", True),
        ("is_dry", "No", False),
        ("is_dry", "0", False),
        ("is_dry", True, True),
        ("colour", "green", "green"),
        ("names", "a, b", ("a, b",)),
        ("names", " a , b,", (" a , b,",)),
        ("names", "", ("",)),
        ("names", ["a", "b, c"], ("a", "b, c")),
        ("names", [], ()),
        ("doors", "1, 2", (1, 2)),
        ("doors", ["1,2", "3", 4], (1, 2, 3, 4)),
        ("mix", "math=0.7,code=0.3", {"math": 0.7, "code": 0.3}),
        ("mix", " math = 1 ", {"math": 1.0}),
        ("mix", "", {}),
        ("mix", {"math": "1"}, {"math": 1.0}),
        ("mix", "none", None),
    ],
)
def test_text_and_values_are_read_as(name, value, expected):
    read = getattr(read_options(Paint, {name: value}), name)
    assert (read, type(read)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", "many", "layers must be a whole number of at least 1, or none, not 'many'"),
        ("layers", "1.5", "layers must be a whole number of at least 1, or none, not '1.5'"),
        ("layers", 1.5, "layers must be a whole number of at least 1, or none, not 1.5"),
        ("layers", True, "layers must be a whole number of at least 1, or none, not True"),
        ("share", "x", "share must be a finite number from 0 to 1, not 'x'"),
        ("share", "none", "share must be a finite number from 0 to 1, not 'none'"),
        ("share", None, "share must be a finite number from 0 to 1, not None"),
        ("share", False, "share must be a finite number from 0 to 1, not False"),
        ("share", 10**400, "share must be a finite number from 0 to 1, not 1000"),
        ("share", [1.0], "share must be a finite number from 0 to 1, not [1.0]"),
        ("is_dry", "maybe", "is_dry must be true or false, not 'maybe'"),
        ("is_dry", 1, "is_dry must be true or false, not 1"),
        ("colour", "gren", "unknown colour 'gren'. Did you mean 'green'? Allowed: red, green."),
        ("colour", None, "colour must be 'red' or 'green', not None"),
        ("names", ["a", 1], "names must be a text or a list of texts, not ['a', 1]"),
        ("names", 5, "names must be a text or a list of texts, not 5"),
        ("doors", "1,x", "doors must be whole numbers of at least 0, not [1, 'x']"),
        ("mix", "math", "mix must be name=number pairs like math=0.7, each a finite number of at least 0, or none"),
        ("mix", 5, 'mix must be an object like {"math": 0.7}, each a finite number of at least 0, or none, not 5'),
        ("mix", "math=x", "mix.math must be a finite number of at least 0, not 'x'"),
        ("mix", {"math": None}, "mix.math must be a finite number of at least 0, not None"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, message):
    with pytest.raises(OptionError) as caught:
        read_options(Paint, {name: value})
    assert message in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("options", [RoutingParams, SamplingParams, Paint])
@given(data=st.data())
@quick
def test_any_json_becomes_options_or_an_option_error(options, data):
    names = [entry.name for entry in fields(options)]
    document = data.draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=3), json_values, max_size=4))
    with suppress(OptionError):
        assert isinstance(read_options(options, document), options)


def as_text(value: Any) -> Any:
    """Return a value as a flag gives it: several texts are several flags, as commas may belong to one."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number!r}" for name, number in value.items())
    return list(value) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    "params",
    [
        RoutingParams(),
        RoutingParams.paper(),
        RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.3}, every=None),
        RoutingParams(score="centred", rule="top_k", top_k=3, temperature=0.1, window=64),
        RoutingParams(prefill="causal", every=8),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9, top_k=40, max_tokens=5, stop=("a", "b c"), seed=3),
    ],
)
def test_options_survive_text_and_values(params):
    assert read_options(type(params), asdict(params)) == params
    assert read_options(type(params), {name: as_text(value) for name, value in asdict(params).items()}) == params


def test_given_options_lie_over_others():
    base = Paint(colour="green", layers=None)
    assert read_options(Paint, {"share": "0.1"}, onto=base) == Paint("green", None, 0.1)
    assert read_options(Paint, {"share": "0.1"}) == Paint(share=0.1)
    assert read_options(Paint, {"layers": None}, onto=Paint()) == Paint(layers=None)
    assert read_options(Paint, {}, onto=base) == base


def test_an_unknown_option_is_an_error_that_names_the_nearest():
    with pytest.raises(OptionError, match=r"unknown option 'color'\. Did you mean 'colour'\? Allowed: colour, layers"):
        read_options(Paint, {"color": "red"})


def test_a_field_that_cannot_be_read_is_one_problem_and_clashes_with_nothing():
    with pytest.raises(OptionError) as caught:
        read_options(RoutingParams, {"rule": "fixed", "fixed": "heavy"})
    assert "fixed must be name=number pairs like math=0.7" in str(caught.value)
    (problem,) = caught.value.problems
    assert (problem.options, problem.given) == (("fixed",), "heavy")
    with pytest.raises(OptionError) as caught:
        read_options(RoutingParams, {"every": "often", "top_k": 0, "rule": "fixed", "scor": 1})
    assert [problem.options for problem in caught.value.problems] == [
        ("scor",),
        ("top_k",),
        ("every",),
        ("fixed", "rule"),
    ]
    assert str(caught.value).count("\n  - ") == 4


def test_an_error_of_options_has_its_parts_for_those_who_name_options_otherwise():
    with pytest.raises(OptionError) as caught:
        RoutingParams(rule="fixed", fixed={"math": -1.0}, every=0)
    parts = {problem.options: (problem.given, problem.allowed) for problem in caught.value.problems}
    assert parts == {
        ("every",): (0, "a whole number of at least 1, or none"),
        ("fixed.math",): (-1.0, "a finite number of at least 0"),
    }
    assert caught.value.problems[0].fields == {"fixed"}
    plain = OptionError(problem_list("options:", ["one", "two"]))
    assert [problem.text for problem in plain.problems] == ["one", "two"]
    assert [problem.text for problem in pickle.loads(pickle.dumps(caught.value)).problems] == [
        problem.text for problem in caught.value.problems
    ]


def test_every_option_says_what_it_means():
    assert list(meanings(Paint).values())[:4] == ["of the wall", "how many", "of white", "touch it"]
    for options in (RoutingParams, SamplingParams):
        assert all(meanings(options).values())
        assert list(meanings(options)) == [entry.name for entry in fields(options)]


OPTIONS = {
    RoutingParams: {},
    SamplingParams: {},
    EvalParams: {},
    BenchParams: {},
    TrainParams: {},
    ServeParams: {},
    PluginParams: {"bundle": "b"},
    Paint: {},
}
"""Every class of options that people fill in, with what it needs."""
NOTHING_LIKES = (object(), b"bytes", 1j, float("nan"), [[]], {3: 4}, -(10**5000))
"""Values that no option of any class may have."""


@pytest.mark.parametrize("options", OPTIONS)
def test_a_value_of_the_wrong_type_from_python_is_refused_by_name(options):
    for entry in fields(options):
        for value in (*NOTHING_LIKES, *([] if isinstance(entry.default, bool) else [True])):
            with pytest.raises(OptionError) as caught:
                options(**{**OPTIONS[options], entry.name: value})
            assert entry.name in {field for problem in caught.value.problems for field in problem.fields}
            assert len(str(caught.value)) < 600


@pytest.mark.parametrize("options", OPTIONS)
def test_all_fields_of_the_wrong_type_are_one_message(options):
    names = [entry.name for entry in fields(options)]
    with pytest.raises(OptionError) as caught:
        options(**dict.fromkeys(names, 1j))
    assert {field for problem in caught.value.problems for field in problem.fields} == set(names)


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", 1.0), ("layers", "2"), ("layers", 0), ("share", "0.5"), ("share", 1.5), ("share", 10**400),
     ("is_dry", 1), ("is_dry", "yes"), ("names", ["a", 1]), ("names", {"a"}), ("doors", [1.5]), ("doors", [-1]),
     ("doors", "1"), ("mix", {"a": "1"}), ("mix", {"a": -1}), ("mix", [("a", 1)]), ("colour", None)],
)  # fmt: skip
def test_python_is_not_read_like_text(name, value):
    with pytest.raises(OptionError, match=f"(paint:\n  - {name}|unknown {name})"):
        Paint(**{name: value})


def test_numbers_of_numpy_and_lists_become_plain_python():
    paint = Paint(layers=np.int64(3), share=np.float32(0.5), names=["a", "b"], doors=[np.int8(2)], mix={"a": 1})
    assert paint == Paint(layers=3, share=0.5, names=("a", "b"), doors=(2,), mix={"a": 1})
    assert [type(paint.layers), type(paint.share), type(paint.names), type(paint.doors[0])] == [int, float, tuple, int]
    assert (Paint(names="a").names, Paint(doors=4).doors) == (("a",), (4,))


# Messages


def test_one_message_lists_all_problems():
    assert problem_list("options:", ["one", "two"]) == "options:\n  - one\n  - two"


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert unknown_name("fruit", "aple", ["apple", "pear"]) == (
        "unknown fruit 'aple'. Did you mean 'apple'? Allowed: apple, pear."
    )
    assert unknown_name("fruit", "xyz", ["apple"]) == "unknown fruit 'xyz'. Allowed: apple."
    assert unknown_name("fruit", "xyz", []) == "unknown fruit 'xyz'. Allowed: none."


def test_a_long_name_is_cut_and_has_no_neighbour():
    message = unknown_name("fruit", "apple" * 100_000, ["apple"])
    assert len(message) < 120
    assert "Did you mean" not in message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("x", "'x'"),
        ({"a": [1, False, "b"]}, '{"a": [1, false, "b"]}'),
        (float("nan"), "NaN"),
        ("x" * 100, "'" + "x" * 55 + " ..."),
        ([{}] * 100, "[{}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, ..."),
    ],
)
def test_a_value_is_shown_as_json_and_cut(value, text):
    assert shown(value) == text


def test_values_are_listed_with_an_or():
    assert [listed(["a"]), listed(["a", "b"]), listed([1, None, "c"])] == ["'a'", "'a' or 'b'", "1, null or 'c'"]


def test_an_option_error_is_a_value_error_too():
    assert issubclass(OptionError, TreadleError)
    assert issubclass(OptionError, ValueError)


def test_fixed_weights_and_their_rule_imply_each_other():
    """The same in flags, files, lm-eval and requests: all of them read routing here."""
    one = RoutingParams.one("math")
    assert read_routing({"fixed": {"math": 1.0}}, RoutingParams()).rule == "fixed"
    assert read_routing({"fixed": "math=1.0", "every": "none"}, RoutingParams()) == one
    assert read_routing({"rule": "top_k", "every": 2}, one) == RoutingParams(rule="top_k", every=2)
    assert read_routing({"every": 4}, one).fixed == one.fixed
    with pytest.raises(OptionError, match="go together"):
        read_routing({"rule": "softmax", "fixed": {"math": 1.0}}, RoutingParams())
