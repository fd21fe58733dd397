"""Where a prompt's domain changes for the last time, and that only what follows counts."""

import re
from dataclasses import replace

import numpy as np
import pytest

from treadle.common.params import RoutingParams
from treadle.routing.explain import explain
from treadle.routing.router import Router
from treadle.routing.schedule import DecisionCursor, finish_views

MATH = "add three plus four the sum plus three four plus four add " * 5 + "\n"
SCIENCE = "the atom heat planet heat cell cell atom planet heat the planet " * 5 + "\n"
CODE = "def loop return list return the list loop def list list return " * 5 + "\n"
PARAMS = RoutingParams(change=1.0)


@pytest.mark.parametrize(
    ("before", "last", "nearest"),
    [
        ("", MATH, 0),
        (SCIENCE, MATH, 0),
        (SCIENCE + CODE, MATH, 0),
        (MATH + SCIENCE, CODE, 2),
        (CODE + MATH, SCIENCE, 1),
    ],
)
def test_what_counts_is_of_the_last_domain(router: Router, before: str, last: str, nearest: int) -> None:
    begin = router.topic_start(before + last, PARAMS)
    assert bool(begin) == bool(before)
    assert router.weights([before + last], PARAMS)[0].argmax() == nearest
    assert begin == len(before)
    counted = (before + last)[begin:]
    np.testing.assert_array_equal(
        router.weights([before + last], PARAMS), router.weights([counted], replace(PARAMS, change=None))
    )
    explanation = explain(router, before + last, PARAMS)
    assert explanation.begin == begin
    assert explanation.weights == pytest.approx(router.weights([counted], replace(PARAMS, change=None))[0])


@pytest.mark.parametrize(
    "params",
    [
        replace(PARAMS, change=None),
        replace(PARAMS, change=1e6),
        replace(PARAMS, score="cosine"),
        replace(PARAMS, window=20),
        RoutingParams.one("math"),
        RoutingParams.paper(),
    ],
)
def test_all_of_the_prompt_counts_where_it_is_asked_for(router: Router, params: RoutingParams) -> None:
    assert router.topic_start(SCIENCE + MATH, params) == 0


def test_a_few_words_of_another_domain_are_no_change(router: Router) -> None:
    assert router.topic_start(SCIENCE + "add three plus four", PARAMS) == 0
    assert router.topic_start("atom planet heat\n" + "add three " * 20, PARAMS) == 0
    assert router.topic_start("", PARAMS) == 0


def test_a_domain_begins_with_a_line(router: Router) -> None:
    assert router.topic_start(SCIENCE.strip() + " " + MATH, PARAMS) == 0
    for mark in ("\n", "\n\n", "\r\n", " \n  \n "):
        assert router.topic_start(SCIENCE.strip() + mark + MATH, PARAMS) == len(SCIENCE.strip() + mark)
    lines = MATH.replace("sum plus", "sum\nplus")  # of one domain, and many of them
    assert (
        0 <= router.topic_start(SCIENCE + lines, PARAMS) - len(SCIENCE) < 40
    )  # lines that are tried are 8 words apart
    assert router.topic_start(SCIENCE + lines * 5, PARAMS) >= len(SCIENCE)


def test_running_text_goes_on_from_the_change(router: Router) -> None:
    """Decided token by token, whole or at once; what was said before the change stays out for good."""
    pieces = re.findall(r"\S+\s*", SCIENCE + MATH)
    begin = len("".join(pieces)[: router.topic_start("".join(pieces), PARAMS)].split())
    assert begin
    text = DecisionCursor(router, PARAMS, pieces, len(pieces))
    views = text.decide_last(len(pieces))
    assert views is not None
    assert text.begin == begin
    (weights,) = router.weigh(finish_views(router.embedder, [views]), PARAMS)
    np.testing.assert_allclose(weights, router.weights([SCIENCE + MATH], PARAMS)[0], atol=1e-6)

    later = [*pieces, "star ", "atom "]
    text.add(later[len(pieces) :])
    views = text.decide_last(len(later))
    assert views is not None
    seen = finish_views(router.embedder, [views])[0]
    np.testing.assert_allclose(seen, router.embedder.encode(["".join(later[begin:]), "".join(later[-32:])]), atol=1e-6)
    trace = router.trace(later, len(pieces), PARAMS)
    np.testing.assert_allclose(trace[0], weights, atol=1e-6)
    np.testing.assert_allclose(trace[-1], router.weigh(seen[None], PARAMS)[0], atol=1e-6)
