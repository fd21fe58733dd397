"""The rules are pure functions of scores; weights are a pure function of the text so far."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

from treadle.common.errors import AdapterError, OptionError, TreadleError
from treadle.common.params import RoutingParams
from treadle.engine.tokenization import Detokenizer
from treadle.routing.centroids import log_softmax
from treadle.routing.fitting import fit
from treadle.routing.router import Router
from treadle.routing.rules import apply_rule, apply_rule_beside_base, boosted, softmax, top_k
from treadle.routing.schedule import DecisionCursor, Seen, decision_length, decisions_from, next_decision

from conftest import SAMPLES, WORDS

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = tuple(SAMPLES)


def scores(low: float = -20.0, high: float = 20.0, unique: bool = False) -> st.SearchStrategy:
    """(B, N) float32."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
    return hnp.arrays(np.float32, shapes, elements=st.floats(low, high, width=32), unique=unique)


cosines = scores(-1.0, 1.0)
RULES = {
    "softmax": lambda s: softmax(s, 1.7),
    "boosted": lambda s: boosted(s / 20),  # cosines
    "top_k": lambda s: top_k(s, 2, 1.7),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# Laws of the rules


@every_rule
@given(scores())
@quick
def test_rows_are_not_negative_and_sum_to_one(rule, s):
    weights = rule(s)
    assert weights.dtype == np.float32
    assert weights.shape == s.shape
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@every_rule
@given(s=scores(unique=True), data=st.data())
@quick
def test_adapters_in_another_order_get_the_same_weights(rule, s, data):
    order = data.draw(st.permutations(range(s.shape[1])))
    np.testing.assert_allclose(rule(s[:, order]), rule(s)[:, order], atol=1e-6)


@every_rule
@given(scores())
@quick
def test_a_batch_is_its_rows(rule, s):
    np.testing.assert_allclose(rule(s), np.stack([rule(row) for row in s]), atol=1e-6)
    np.testing.assert_allclose(rule(s[None]), rule(s)[None], atol=1e-6)


@every_rule
@given(scores(unique=True))
@quick
def test_a_higher_score_never_gets_a_lower_weight(rule, s):
    ordered = np.take_along_axis(rule(s), s.argsort(-1), -1)
    assert (np.diff(ordered) >= 0).all()


@given(scores(unique=True), st.integers(1, 8))
@quick
def test_top_k_keeps_the_k_largest(s, k):
    kept = top_k(s, k) > 0
    assert (kept.sum(-1) == min(k, s.shape[1])).all()
    assert (np.where(kept, s, np.inf).min(-1) >= np.where(kept, -np.inf, s).max(-1)).all()


def test_top_k_gives_ties_to_the_earlier_adapter():
    np.testing.assert_array_equal(top_k(np.float32([1, 1, 1]), 2), np.float32([0.5, 0.5, 0]))


@given(scores(), st.integers(-50, 50))
@quick
def test_softmax_ignores_a_shift(s, shift):
    np.testing.assert_allclose(softmax(s + np.float32(shift), 2.0), softmax(s, 2.0), atol=1e-5)


def test_softmax_of_minus_infinity_is_zero():
    np.testing.assert_array_equal(softmax(np.float32([[0, -np.inf], [-np.inf, 3]])), np.eye(2))


def test_boosted_is_the_papers_softmax():
    # 4 * 0.5 = 2: exp(2), exp(0.25), exp(0) are 7.389056, 1.284025, 1, together 9.673081
    expected = [0.763878, 0.132742, 0.103380]
    np.testing.assert_allclose(boosted(np.float32([0.5, 0.25, 0])), expected, atol=1e-6)
    fixed = np.float32([0.31, 0.62, 0.18, 0.44])
    raised = np.exp(fixed * [1, 4, 1, 1])
    np.testing.assert_allclose(boosted(fixed, 4.0), raised / raised.sum(), atol=1e-6)


def test_boosted_divides_a_negative_largest_cosine():
    raised = np.exp([-0.2 / 4, -0.4])
    np.testing.assert_allclose(boosted(np.float32([-0.2, -0.4])), raised / raised.sum(), atol=1e-6)


@given(cosines, st.floats(1.0, 16.0, width=32))
@quick
def test_boosting_never_lowers_the_nearest(s, boost):
    nearest = s.argmax(-1)[:, None]
    lifted, plain = (np.take_along_axis(w, nearest, -1) for w in (boosted(s, boost), softmax(s)))
    assert (lifted >= plain - 1e-6).all()
    apart = (np.abs(s.max(-1)) > 0.1) & (s.shape[1] > 1) & (boost > 1.5)
    assert (lifted > plain)[apart].all()


def test_the_temperature_is_the_cosines_the_bundles_or_the_params():
    s = np.float32([[0.1, 0.3, -0.2], [4, 1, 2]])
    np.testing.assert_allclose(apply_rule(s, RoutingParams(score="cosine")), softmax(s, 0.05), atol=1e-6)
    own = np.float32([[2.0], [3.0]])  # of a prompt and a running text
    np.testing.assert_allclose(apply_rule(s, RoutingParams(), own), softmax(s / own), atol=1e-6)
    np.testing.assert_allclose(apply_rule(s, RoutingParams(temperature=5.0), own), softmax(s, 5.0), atol=1e-6)


@given(scores(), st.integers(1, 6), st.floats(0.5, 20))
@quick
def test_the_base_takes_its_part_of_the_posterior(s, k, temperature):
    divisor = np.full((len(s), 1), temperature, np.float32)
    posterior = special.softmax(s.astype(np.float64) / temperature, -1)  # of the adapters, and last of the base
    weights = apply_rule_beside_base(s, RoutingParams(), divisor)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, posterior[:, :-1], atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1) + posterior[:, -1], 1, atol=1e-5)
    some = apply_rule_beside_base(s, RoutingParams(rule="top_k", top_k=k), divisor)
    assert ((some > 0).sum(-1) <= k).all()
    kept = np.sort(posterior[:, :-1], -1)[:, -k:].sum(-1)
    np.testing.assert_allclose(some.sum(-1), kept / (kept + posterior[:, -1]), atol=1e-5)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "cosin"}, "unknown score 'cosin'. Did you mean 'cosine'?"),
        ({"rule": "hard"}, "unknown rule 'hard'"),
        ({"combine": "cat"}, "unknown combine 'cat'. Allowed: sum, linear, paper."),
        ({"prefill": "all"}, "unknown prefill"),
        ({"past": "forget"}, "unknown past"),
        ({"boost": 0.0}, "boost must be a finite number from 1e-06 to 1000, not 0.0"),
        ({"boost": None}, "boost must be a finite number from 1e-06 to 1000, not None"),
        ({"boost": "4"}, "boost must be a finite number from 1e-06 to 1000, not '4'"),
        ({"temperature": -1.0}, "temperature must be a finite number from 1e-06 to 1000000, or none, not -1.0"),
        ({"temperature": float("nan")}, "temperature must be a finite number from 1e-06 to 1000000, or none, not nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number from 1e-06 to 1000000, or none, not inf"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, not 0"),
        ({"top_k": None}, "top_k must be a whole number of at least 1, not None"),
        ({"every": 0}, "every must be a whole number of at least 1, or none, not 0"),
        ({"every": 1.5}, "every must be a whole number of at least 1, or none, not 1.5"),
        ({"window": -3}, "window must be a whole number of at least 1, or none, not -3"),
        ({"rule": "fixed", "fixed": {"math": -1.0}}, "fixed.math must be a finite number of at least 0"),
        ({"rule": "fixed", "fixed": {"math": float("inf")}}, "fixed.math must be"),
        ({"rule": "boosted"}, "rule boosted multiplies a cosine; with score lda use rule softmax"),
        ({"rule": "fixed"}, "rule fixed and fixed weights go together"),
        ({"fixed": {"math": 1.0}}, "rule fixed and fixed weights go together"),
        ({"prefill": "causal", "every": None}, "prefill causal decides in blocks of `every` tokens"),
        ({"prefill": "causal", "past": "recompute"}, "it cannot be causal"),
        ({"prefill": "causal", "lag": 1}, "weights that come late (lag) cannot"),
        ({"lag": 2}, "lag must be a whole number from 0 to 1, not 2"),
    ],
)
def test_params_refuse(options, message):
    with pytest.raises(OptionError) as caught:
        RoutingParams(**options)
    assert message in str(caught.value)


def test_params_report_all_problems_at_once():
    with pytest.raises(OptionError) as caught:
        RoutingParams(score="l", boost=-1.0, every=0, window=0, fixed={"math": -1.0})
    message = str(caught.value)
    for part in ("unknown score", "boost must", "every must", "window must", "fixed.math must", "go together"):
        assert part in message
    assert message.count("\n  - ") == 6


def test_named_params_are_what_their_names_say():
    paper = RoutingParams.paper()
    assert (paper.score, paper.rule, paper.boost, paper.every) == ("cosine", "boosted", 4.0, 2)
    assert (paper.past, paper.combine, paper.window) == ("recompute", "paper", None)
    assert RoutingParams.base().fixed == {}
    assert RoutingParams.one("math").fixed == {"math": 1.0}
    assert RoutingParams.uniform(NAMES).fixed == dict.fromkeys(NAMES, 1 / 3)


def test_fixed_weights_are_copied():
    given_weights = {"math": 1.0}
    params = RoutingParams(rule="fixed", fixed=given_weights)
    given_weights["math"] = 5.0
    assert params.fixed == {"math": 1.0}


# When weights are decided, and from how much of the text


@pytest.mark.parametrize(
    ("params", "expected"),  # lengths for positions 0..9 of a text whose prompt has 4 tokens
    [
        (RoutingParams(every=1), [4, 4, 4, 4, 5, 6, 7, 8, 9, 10]),
        (RoutingParams(every=2), [4, 4, 4, 4, 4, 6, 6, 8, 8, 10]),
        (RoutingParams(every=3), [4, 4, 4, 4, 4, 4, 7, 7, 7, 10]),
        (RoutingParams(every=2, window=1), [4, 4, 4, 4, 4, 6, 6, 8, 8, 10]),  # a window moves the start, not the end
        (RoutingParams(every=2, past="recompute"), [4, 4, 4, 4, 4, 6, 6, 8, 8, 10]),
        (RoutingParams(every=2, lag=1), [4, 4, 4, 4, 4, 4, 4, 6, 6, 8]),
        (RoutingParams(every=1, lag=1), [4, 4, 4, 4, 4, 5, 6, 7, 8, 9]),
        (RoutingParams(every=None, lag=1), [4] * 10),
        (RoutingParams(every=None), [4] * 10),
        (RoutingParams(every=1, prefill="causal"), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (RoutingParams(every=3, prefill="causal"), [1, 1, 1, 4, 4, 4, 7, 7, 7, 10]),
        (RoutingParams.base(), [0] * 10),
    ],
)
def test_weights_are_decided_from(params, expected):
    assert [decision_length(position, 4, params) for position in range(10)] == expected


every = st.integers(1, 5)
when = st.one_of(
    st.builds(RoutingParams, every=st.none() | every), st.builds(RoutingParams, every=every, prefill=st.just("causal"))
)


@given(when, st.integers(1, 12))
@quick
def test_weights_never_see_the_future_and_never_forget(params, prompt_tokens):
    lengths = [decision_length(position, prompt_tokens, params) for position in range(40)]
    for position, length in enumerate(lengths):
        whole_prompt = params.prefill == "prompt" and position < prompt_tokens
        assert 1 <= length <= (prompt_tokens if whole_prompt else position + 1)
    assert lengths == sorted(lengths)
    if params.every:  # nor do they lag behind by a block
        assert all(position + 1 - length < params.every for position, length in enumerate(lengths))


@given(every, st.integers(0, 40), st.integers(1, 12), st.integers(1, 12))
@quick
def test_causal_weights_do_not_depend_on_where_the_prompt_ends(k, position, one, other):
    params = RoutingParams(every=k, prefill="causal")
    assert decision_length(position, one, params) == decision_length(position, other, params)


# The router


@pytest.fixture(scope="module")
def routed(embedder) -> Router:
    return fit(SAMPLES, embedder)


def test_fit_knows_its_own_samples(routed):
    for index, texts in enumerate(SAMPLES.values()):
        weights = routed.weights(texts)
        assert weights.shape == (len(texts), 3)
        assert weights.dtype == np.float32
        assert (weights.argmax(-1) == index).all()
        assert (routed.scores(texts).argmax(-1) == index).all()


def test_weights_of_texts_are_the_rule_of_the_scores_of_their_embeddings(routed):
    texts = ["add three", "the planet loop", "heat"]
    for score in ("cosine", "centred", "lda"):
        params = RoutingParams(score=score, rule="top_k", temperature=0.7, fallback=False)
        seen = routed.see(texts)
        is_running = np.zeros(3, bool)
        compared = routed.compare(seen, params)
        np.testing.assert_array_equal(compared.cosines, routed.centroids.cosines(seen.views[:, 0]))
        if score == "lda":
            evidence = routed.centroids.evidence(seen.views, is_running)[:, :3]
            np.testing.assert_allclose(compared.scores, log_softmax(evidence), atol=1e-5)
        else:
            cosines = routed.centroids.cosines(routed.embedder.encode(texts), score)
            np.testing.assert_array_equal(compared.scores, cosines)
        expected = apply_rule(compared.scores, params)
        np.testing.assert_allclose(routed.weights(texts, params), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(routed.weigh(seen, params), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(routed.scores(texts, params), compared.scores)


@pytest.mark.parametrize("score", ["cosine", "centred", "lda"])
@pytest.mark.parametrize("rule", ["softmax", "top_k", "boosted"])
@pytest.mark.parametrize("fallback", [True, False])
def test_a_text_without_a_known_word_is_evidence_for_nobody(routed, score, rule, fallback):
    if (score, rule) == ("lda", "boosted"):
        return
    params = RoutingParams(score=score, rule=rule, top_k=1, fallback=fallback)
    each = 0 if score == "lda" and fallback else 1 / 3  # the base answers, or all adapters alike
    silent = ["", "  \n", "\U0001f389"]
    assert not routed.embedder.encode(silent[:2]).any()
    np.testing.assert_allclose(routed.weights(silent[:2], params), np.full((2, 3), each), rtol=1e-6)
    views = np.zeros((2, 3, routed.embedder.dim), np.float32)
    views[1, 0] = routed.embedder.encode(["add three"])[0]  # the whole text has words, its newest tokens none
    for is_running in (False, True):
        weights = routed.weigh(Seen(views, np.full(2, is_running)), params)
        np.testing.assert_allclose(weights[0], [each] * 3, rtol=1e-6)
        assert np.isfinite(weights[1]).all()
        assert weights[1].sum() > 0
    np.testing.assert_allclose(routed.trace(["", "\n"], 1, params), np.full((2, 3), each), rtol=1e-6)


@given(st.lists(st.sampled_from([*WORDS, "Paris", "é", "7"]), max_size=40).map(" ".join), st.booleans())
@quick
def test_weights_and_the_bases_share_are_the_posterior(routed, text, is_running):
    assert routed.centroids.general is not None
    seen = routed.see([text], is_running=is_running)
    evidence = routed.centroids.evidence(seen.views, seen.is_running)[0].astype(np.float64)
    temperature = routed.centroids.calibrations["running" if is_running else "prompt"].temperature
    posterior = special.softmax(evidence / temperature)
    weights = routed.weigh(seen, RoutingParams())[0]
    np.testing.assert_allclose(weights, posterior[:3], atol=1e-5)
    np.testing.assert_allclose(1 - weights.sum(), posterior[3], atol=1e-5)
    alone = routed.weigh(seen, RoutingParams(fallback=False))[0]
    np.testing.assert_allclose(alone.sum(), 1, atol=1e-5)
    np.testing.assert_allclose(alone, special.softmax(evidence[:3] / temperature), atol=1e-5)


def test_without_general_text_the_adapters_share_all_weight(terse):
    routed = fit(SAMPLES, terse)
    assert routed.centroids.general is None
    texts = ["add three", "the planet loop", "", "unheard"]
    np.testing.assert_allclose(routed.weights(texts).sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(routed.weights(texts)[2:], 1 / 3, atol=1e-6)
    np.testing.assert_array_equal(routed.weights(texts), routed.weights(texts, RoutingParams(fallback=False)))


def test_embeddings_that_are_not_finite_are_an_error(routed):
    views = routed.see(["add three"]).views
    views[0, 1, 2] = np.nan
    with pytest.raises(TreadleError, match="scores of a text are not finite"):
        routed.weigh(Seen(views, np.zeros(1, bool)), RoutingParams())
    views[0, 0, 2] = np.inf
    for score in ("cosine", "centred", "lda"):
        with np.errstate(invalid="ignore"), pytest.raises(TreadleError, match="scores of a text are not finite"):
            routed.weigh(Seen(views, np.zeros(1, bool)), RoutingParams(score=score))


def test_fixed_weights_follow_the_routers_order(routed):
    params = RoutingParams(rule="fixed", fixed={"code": 0.25, "math": 2.0})
    np.testing.assert_array_equal(routed.weights(["any", "text"], params), [[2, 0, 0.25]] * 2)
    np.testing.assert_array_equal(routed.trace(["any", " text"], 1, params), [[2, 0, 0.25]] * 2)
    np.testing.assert_array_equal(routed.weights(["any"], RoutingParams.base()), [[0, 0, 0]])
    np.testing.assert_array_equal(routed.weights(["any"], RoutingParams.one("science")), [[0, 1, 0]])
    np.testing.assert_allclose(routed.weights(["any"], RoutingParams.uniform(NAMES)), [[1 / 3] * 3])


def test_an_unknown_name_in_fixed_weights_is_named_with_the_nearest(routed):
    with pytest.raises(AdapterError, match=r"unknown adapter 'maths'\. Did you mean 'math'\? Allowed: math, science"):
        routed.weights(["any"], RoutingParams.one("maths"))
    with pytest.raises(AdapterError, match=r"(?s)'maths'.*'cod'"):
        routed.weights([], RoutingParams(rule="fixed", fixed={"maths": 1.0, "cod": 1.0}))


def test_a_router_refuses_another_embedder(routed):
    foreign = replace(routed.centroids, embedder_id="static:other")
    with pytest.raises(OptionError, match=r"made by the embedder 'static:other', not 'static:\w+'; fit them again"):
        Router(foreign, routed.embedder)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "needs sample texts of at least one adapter"),
        ({"math": "one text"}, "samples of 'math' are one text; give a list"),
        ({"math": ["one"], "code": []}, "adapter 'code' has no sample texts"),
    ],
)
def test_fit_refuses(embedder, samples, message):
    with pytest.raises(OptionError, match=message):
        fit(samples, embedder)


class Whole:
    """An embedder whose routers compare whole texts alone."""

    tails = ()

    def __init__(self, embedder):
        self._embedder = embedder

    def __getattr__(self, name):
        return getattr(self._embedder, name)


running = st.lists(
    st.sampled_from(["add ", "three", "cell", "atom", " def", "loop ", "é", "😀", "x", " ", ","]), min_size=3
)
routing = st.one_of(
    st.builds(RoutingParams, every=st.none() | every, window=st.none() | st.integers(1, 4)),
    st.builds(RoutingParams, every=every, prefill=st.just("causal"), window=st.none() | st.integers(1, 4)),
    st.builds(RoutingParams, every=every, lag=st.just(1), window=st.none() | st.integers(1, 4)),
    st.just(RoutingParams.paper()),
)


@given(words=running, params=routing, data=st.data())
@quick
def test_a_trace_is_routing_step_by_step(routed, tokenizer, words, params, data):
    text = Detokenizer(tokenizer)
    pieces = [text.push(token_id) for token_id in tokenizer("".join(words)).input_ids]  # characters span tokens
    prompt_tokens = data.draw(st.integers(1, len(pieces)))
    trace = routed.trace(pieces, prompt_tokens, params)
    assert trace.shape == (len(pieces), 3)

    seen = DecisionCursor(routed, params, pieces[:prompt_tokens], prompt_tokens)
    for position, weights in enumerate(trace):
        length = decision_length(position, prompt_tokens, params)
        if position >= prompt_tokens:
            seen.add([pieces[position]])  # what follows is not known yet
        for start, views in seen.decide(position + 1):
            assert start == position
            stepwise = routed.weigh(routed.finish([views]), params)[0]
        assert seen.decide(position + 1) == []
        np.testing.assert_allclose(weights, stepwise, atol=1e-5)
        if params.window is None:
            is_running = params.prefill == "causal" or length > prompt_tokens
            whole = routed.see(["".join(pieces[:length])], is_running=is_running)
            np.testing.assert_allclose(weights, routed.weigh(whole, params)[0], atol=1e-4)


def test_running_text_follows_a_change_sooner_than_whole_texts_alone(embedder):
    samples = {name: [" ".join([*texts, text]) for text in texts] for name, texts in SAMPLES.items()}
    math, code = ["add ", "three ", "plus ", "four "] * 6, ["def ", "loop ", "return ", "list "] * 3
    params = RoutingParams(every=1, fallback=False)
    views, whole = (
        fit(samples, each).trace([*math, *code], len(math), params)[:, NAMES.index("code")]
        for each in (embedder, Whole(embedder))
    )
    assert max(views[len(math) - 1], whole[len(math) - 1]) < 0.05
    assert views[-1] > 0.9
    assert whole[-1] < 0.5


def test_a_causal_prompt_is_running_text(routed):
    """So its weights do not depend on where it ends."""
    pieces = ["add ", "three ", "plus ", "four ", "def ", "loop ", "return ", "list "]
    params = RoutingParams(every=1, prefill="causal")
    one, other = routed.trace(pieces, 4, params), routed.trace(pieces, 1, params)
    np.testing.assert_allclose(one, other, atol=1e-6)
    expected = routed.weigh(routed.see(["".join(pieces)], is_running=True), params)[0]
    np.testing.assert_allclose(one[-1], expected, atol=1e-5)


def test_no_adapters_no_weights(routed):
    bare = replace(routed, centroids=routed.centroids.empty(routed.embedder.id, routed.embedder.dim))
    for score in ("cosine", "centred", "lda"):
        assert bare.weights(["any", "text"], RoutingParams(score=score)).shape == (2, 0)


@given(
    every=st.sampled_from([None, 1, 2, 3, 7]),
    lag=st.sampled_from([0, 1]),
    prefill=st.sampled_from(["prompt", "causal"]),
    prompt_tokens=st.integers(1, 12),
)
@quick
def test_between_two_decisions_the_length_stays(every, lag, prefill, prompt_tokens):
    if prefill == "causal" and (every is None or lag):
        return
    params = RoutingParams(every=every, lag=lag, prefill=prefill)
    lengths = [decision_length(position, prompt_tokens, params) for position in range(40)]
    position = 0
    while position < 40:
        after = next_decision(position, prompt_tokens, params)
        assert after > position
        assert len(set(lengths[position:after])) == 1
        if lag == 0 and after < 40:
            assert lengths[after] != lengths[position]
        position = after


@given(
    every=st.sampled_from([None, 1, 2, 3, 7]),
    lag=st.sampled_from([0, 1]),
    prefill=st.sampled_from(["prompt", "causal"]),
    prompt_tokens=st.integers(1, 12),
    start=st.integers(0, 30),
)
@quick
def test_the_walk_over_decisions_is_that_of_single_positions(every, lag, prefill, prompt_tokens, start):
    if prefill == "causal" and (every is None or lag):
        return
    params = RoutingParams(every=every, lag=lag, prefill=prefill)
    position = start
    for first, length, after in decisions_from(start, prompt_tokens, params):
        assert first == position
        if position >= 40:
            break
        assert length == decision_length(position, prompt_tokens, params)
        assert after == next_decision(position, prompt_tokens, params)
        position = after


def test_the_newest_decision_alone_is_that_of_all(routed):
    pieces = ["add ", "three ", "plus ", "four ", "def ", "loop ", "return ", "list "]
    for params in (RoutingParams(every=3), RoutingParams(every=2, prefill="causal"), RoutingParams(every=None)):
        each, last = (DecisionCursor(routed, params, pieces, 4) for _ in range(2))
        views = [views for _, views in each.decide(len(pieces))]
        newest = last.decide_last(len(pieces))
        assert newest is not None
        for one, other in zip(routed.finish([newest]), routed.finish(views[-1:]), strict=True):
            np.testing.assert_array_equal(one, other)
        assert last.decide_last(len(pieces)) is None
        assert last.decided == each.decided


def test_check_refuses_what_the_adapters_do_not_allow(routed):
    routed.check(RoutingParams())
    routed.check(RoutingParams.one("math"))
    with pytest.raises(AdapterError, match="maths"):
        routed.check(RoutingParams.one("maths"))
