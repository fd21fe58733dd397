"""An option means the same whether it comes from Python, a flag, a file or a request."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.errors import OptionError, TreadleError, problem_list, unknown_name
from treadle.options import meanings, option, parse, read_options
from treadle.params import RoutingParams, SamplingParams

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Weights = Mapping[str, float]
Names = tuple[str, ...]
Colour = Literal["red", "green"]


@dataclass(frozen=True)
class Paint:
    colour: Colour = option("red", "of the wall")
    layers: int | None = option(2, "how many")
    share: float = option(0.5, "of white")
    is_dry: bool = option(False, "touch it")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "3", 3),
        (int, 3, 3),
        (int, "-1", -1),
        (float, "0.5", 0.5),
        (float, 2, 2.0),
        (float, "1e-3", 1e-3),
        (bool, "true", True),
        (bool, "No", False),
        (bool, "0", False),
        (bool, True, True),
        (str, "text", "text"),
        (str, "", ""),
        (Colour, "green", "green"),
        (Names, "a, b", ("a, b",)),
        (Names, " a , b,", (" a , b,",)),
        (Names, ["a", "b, c"], ("a", "b, c")),
        (Names, [], ()),
        (Weights, "math=0.7,code=0.3", {"math": 0.7, "code": 0.3}),
        (Weights, " math = 1 ", {"math": 1.0}),
        (Weights, "", {}),
        (Weights, {"math": 1}, {"math": 1.0}),
        (int | None, None, None),
        (int | None, "none", None),
        (int | None, "None", None),
        (int | None, "7", 7),
        (Weights | None, "none", None),
        (Weights | None, "math=1", {"math": 1.0}),
    ],
)
def test_text_and_values_are_read_as(kind, value, expected):
    parsed = parse(kind, value, "it")
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, "many", "it: expected int, got 'many'."),
        (int, "1.5", "it: expected int, got '1.5'."),
        (int, 1.5, "it: expected int, got 1.5."),
        (int, True, "it: expected int, got True."),
        (int, None, "it: expected int, got None."),
        (int, "none", "it: expected int, got 'none'."),
        (float, "x", "it: expected float, got 'x'."),
        (float, False, "it: expected float, got False."),
        (float, 10**400, "it: expected float, got 1000"),
        (float, [1.0], "it: expected float, got [1.0]."),
        (bool, "maybe", "it: expected bool, got 'maybe'."),
        (bool, 1, "it: expected bool, got 1."),
        (str, 5, "it: expected str, got 5."),
        (Colour, "gren", "unknown it 'gren'. Did you mean 'green'? Allowed: red, green."),
        (Colour, None, "unknown it 'None'"),
        (Names, ["a", 1], "it: expected a text or a list of texts, got ['a', 1]."),
        (Names, 5, "it: expected a text or a list of texts, got 5."),
        (Weights, "math", "it: expected name=number pairs, got"),
        (Weights, "math=x", "it: expected name=number pairs, got"),
        (Weights, {"math": None}, "it: expected name=number pairs, got"),
        (Weights | None, 5, "it: expected name=number pairs, got 5."),
        (int | None, "many", "it: expected int, got 'many'."),
    ],
)
def test_a_value_of_another_type_is_refused(kind, value, message):
    with pytest.raises(OptionError) as caught:
        parse(kind, value, "it")
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
        RoutingParams(score="centred", rule="top_k", top_k=3, temperature=0.1, unit_scale=True, floor=-0.5, window=64),
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


def test_every_option_says_what_it_means():
    assert meanings(Paint) == {"colour": "of the wall", "layers": "how many", "share": "of white", "is_dry": "touch it"}
    for options in (RoutingParams, SamplingParams):
        assert all(meanings(options).values())
        assert list(meanings(options)) == [entry.name for entry in fields(options)]


# Messages


def test_one_message_lists_all_problems():
    assert problem_list("options:", ["one", "two"]) == "options:\n  - one\n  - two"


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert unknown_name("fruit", "aple", ["apple", "pear"]) == (
        "unknown fruit 'aple'. Did you mean 'apple'? Allowed: apple, pear."
    )
    assert unknown_name("fruit", "xyz", ["apple"]) == "unknown fruit 'xyz'. Allowed: apple."
    assert unknown_name("fruit", "xyz", []) == "unknown fruit 'xyz'. Allowed: none."


def test_an_option_error_is_a_value_error_too():
    assert issubclass(OptionError, TreadleError)
    assert issubclass(OptionError, ValueError)
