"""The weights of a token are a function of options, text and position: however vLLM asks for them."""

import random
from pathlib import Path

import numpy as np
import pytest

from treadle.common.errors import OptionError, TreadleError
from treadle.common.params import RoutingParams
from treadle.engine.chat import contents_of, pieces_of, prompt_cursor, read_prompt
from treadle.serving.vllm.mixture import AUTO, Mixture, open_bundle, without_adapter
from treadle.serving.vllm.params import PluginParams, read_plugin_params
from treadle.serving.vllm.request_weights import RequestWeights
from treadle.serving.vllm.schedule import Schedule
from treadle.serving.vllm.text_pool import INITIAL_ROWS

TEXT = "add three plus four, the atom of a planet; def loop return list " * 3
MODES = {
    "every 1": {"every": 1},
    "every 3": {"every": 3},
    "once": {"every": None},
    "causal": {"every": 4, "prefill": "causal"},
    "window": {"every": 2, "window": 7},
    "long window": {"every": 2, "window": 70},
    "without the base": {"every": 2, "fallback": False},
    "late": {"every": 3, "lag": 1},
    "cosine": {"every": 2, "score": "cosine", "rule": "boosted"},
    "fixed": {"fixed": {"math": 0.7, "code": 2.0}},
    "base": "base",
}


@pytest.fixture(scope="session")
def mixture(bundle_folder: Path) -> Mixture:
    return open_bundle(PluginParams(bundle=str(bundle_folder)))[1]


@pytest.fixture
def schedule(mixture: Mixture, tokenizer) -> Schedule:
    return Schedule(mixture, tokenizer)


def whole(schedule: Schedule, given, ids: list[int], prompt: int) -> RequestWeights:
    request = schedule.open(given, prompt)
    schedule.decide([(request, ids, len(ids))])
    return request


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_of_the_router(schedule: Schedule, tokenizer, mode: str) -> None:
    ids = tokenizer(TEXT).input_ids
    request = whole(schedule, MODES[mode], ids, 20)
    pieces = [tokenizer.decode([token]) for token in ids]  # each byte of this text is a character
    expected = schedule.mixture.router.trace(pieces, 20, request.group.params)
    np.testing.assert_array_equal(request.weights(0, len(ids)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_weights_token_by_token_are_those_of_the_router(schedule: Schedule, tokenizer, mode: str) -> None:
    ids = tokenizer(TEXT).input_ids
    request = schedule.open(MODES[mode], 20)
    for end in range(20, len(ids) + 1):
        schedule.decide([(request, ids[:end], end)])
    pieces = [tokenizer.decode([token]) for token in ids]
    expected = schedule.mixture.router.trace(pieces, 20, request.group.params)
    np.testing.assert_array_equal(request.weights(0, len(ids)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_weights_do_not_depend_on_how_they_are_asked_for(schedule: Schedule, tokenizer, mode: str) -> None:
    ids = tokenizer(TEXT).input_ids
    expected = whole(schedule, MODES[mode], ids, 20)
    chance = random.Random(0)
    requests = [(schedule.open(MODES[each], 20), each) for each in [mode, mode, *MODES]]
    known = dict.fromkeys(range(len(requests)), 20)
    while min(known.values()) < len(ids):  # texts that grow unequally, decided together, in chunks, some twice
        chosen = [index for index in known if chance.random() < 0.6]
        for index in chosen:
            known[index] = min(known[index] + chance.choice([0, 1, 1, 1, 5, 30]), len(ids))
        schedule.decide([(requests[index][0], ids[: known[index]], known[index]) for index in chosen])
    for request, each in requests:
        if each == mode:
            assert request.weights(0, len(ids)).tobytes() == expected.weights(0, len(ids)).tobytes()
            assert [request.key(at, at + 16) for at in range(0, 96, 16)] == [
                expected.key(at, at + 16) for at in range(0, 96, 16)
            ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_at_once", [True, False], ids=["at once", "token by token"])
def test_a_chats_weights_are_those_of_the_engines_row(
    schedule: Schedule, tokenizer, mode: str, is_at_once: bool
) -> None:
    messages = [{"role": "user", "content": "the atom"}, {"role": "assistant", "content": "heat"},
                {"role": "user", "content": "def loop return"}]  # fmt: skip
    prompt = read_prompt(tokenizer, messages)
    ids = [*prompt.ids, *tokenizer("list of the planet four plus").input_ids]
    request = schedule.open(MODES[mode], len(prompt.ids), contents_of(messages))
    for end in [len(ids)] if is_at_once else range(len(prompt.ids), len(ids) + 1):
        schedule.decide([(request, ids[:end], end)])
    params = request.group.params
    router = schedule.mixture.router
    text = prompt_cursor(router, params, pieces_of(tokenizer, prompt.ids), prompt.chat)
    text.add(pieces_of(tokenizer, ids[len(prompt.ids) :]))
    expected = router.trace(text.pieces, len(prompt.ids), params, ends=text.ends)
    np.testing.assert_array_equal(request.weights(0, len(ids)), expected)


def test_a_chat_of_one_message_is_weighed_as_its_text(schedule: Schedule, tokenizer) -> None:
    messages = [{"role": "user", "content": "def loop return"}]
    chat, text = read_prompt(tokenizer, messages).ids, tokenizer("def loop return").input_ids
    for given in (None, {"window": 5}):
        requests = [schedule.open(given, len(chat), contents_of(messages)), schedule.open(given, len(text))]
        for request, ids in zip(requests, (chat, text), strict=True):
            schedule.decide([(request, ids, len(ids))])
        assert requests[0].newest_key == requests[1].newest_key


def test_weights_of_tokens_that_are_not_known_are_never_guessed(schedule: Schedule, tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    request = schedule.open({"every": 1}, 20)
    with pytest.raises(RuntimeError, match="only 25 tokens are known"):
        schedule.decide([(request, ids[:25], 26)])


def test_later_tokens_do_not_change_earlier_weights(schedule: Schedule, tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    for given in (MODES["every 1"], MODES["causal"]):
        short, long = whole(schedule, given, ids[:60], 20), whole(schedule, given, ids, 20)
        assert short.weights(0, 60).tobytes() == long.weights(0, 60).tobytes()


def test_a_prompts_beginning_keeps_its_weights_only_with_causal(schedule: Schedule, tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    same = [whole(schedule, MODES["causal"], ids, prompt).key(0, 16) for prompt in (20, 40)]
    other = [whole(schedule, MODES["every 1"], ids, prompt).key(0, 16) for prompt in (20, 40)]
    assert same[0] == same[1]
    assert other[0] != other[1]


def test_a_block_is_known_by_its_weights(schedule: Schedule, tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    given = ["base", "math", "code", {"math": 1.0, "code": 0.5}, {"every": 1}, {"every": 2}, {"fixed": {"math": 0.0}}]
    keys = [whole(schedule, each, ids, 20).key(16, 32) for each in given]
    assert keys[0] is keys[6] is None  # no adapter acts: the base's own blocks
    assert len(set(keys)) == len(given) - 1
    smaller = Schedule(without_adapter(schedule.mixture, "code"), tokenizer)
    assert whole(smaller, "math", ids, 20).key(16, 32) != keys[1]


def test_a_plan_follows_the_order_of_the_batch(schedule: Schedule, tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    requests = {"a": schedule.open({"every": 1}, 20), "b": schedule.open("code", 20), "c": schedule.open("base", 20)}
    entries = [("a", requests["a"], ids, 18, 23), ("b", requests["b"], ids, 0, 16), ("c", requests["c"], ids, 40, 41)]
    plan = schedule.plan(entries)
    rows, counts = plan.in_order(["c", "a", "b"])
    gates = np.repeat(rows, counts, 0)  # (T, slots)
    assert counts[0] == 1
    assert sum(counts) == len(gates) == 22
    scales = np.array(schedule.mixture.scales)
    np.testing.assert_allclose(gates[1:6], requests["a"].weights(18, 23) * scales)
    assert not gates[0].any()
    np.testing.assert_allclose(gates[6:], [[0, 0, scales[2]]] * 16)


def test_what_is_generated_is_counted(schedule: Schedule, tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    requests = {"a": schedule.open({"every": 1}, 20), "b": schedule.open("code", 20), "c": schedule.open("base", 20)}
    for end in range(20, 25):
        schedule.plan([(name, request, ids[:end], end - 1, end) for name, request in requests.items()])
    schedule.plan([("a", requests["a"], ids[:25], 0, 16)])  # computed again after a preemption: nothing is generated
    counts = schedule.counts
    expected = requests["a"].weights(19, 24).sum(0) + np.array([0, 0, 5])
    assert (counts.tokens, counts.base_tokens, counts.decisions) == (15, 5, 5)
    np.testing.assert_allclose([counts.weights[name] for name in schedule.mixture.names], expected, rtol=1e-6)
    schedule.mixture = without_adapter(schedule.mixture, "code")
    schedule.plan([("b", requests["b"], ids[:25], 24, 25)])
    assert counts.tokens == 16
    assert set(counts.weights) == {"math", "science"}


def test_rows_are_given_back(schedule: Schedule, tokenizer) -> None:
    ids = tokenizer(TEXT).input_ids
    for _ in range(3 * INITIAL_ROWS):
        request = schedule.open({"every": 1}, 20)
        for end in (20, 21, 22):
            schedule.decide([(request, ids[:end], end)])
        assert request.row in range(INITIAL_ROWS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, RoutingParams()),
        (AUTO, RoutingParams()),
        ("base", RoutingParams.base()),
        ("math", RoutingParams.one("math")),
        ({"math": 0.7, "code": 0.3}, RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.3}, every=None)),
        ('{"every": 8, "temperature": 2}', RoutingParams(every=8, temperature=2.0)),
        ({"fixed": {"math": 1}}, RoutingParams(rule="fixed", fixed={"math": 1.0})),
        ({}, RoutingParams()),
    ],
)
def test_what_a_request_may_ask_for(mixture: Mixture, given, expected: RoutingParams) -> None:
    assert mixture.read_request(given) == expected


@pytest.mark.parametrize("given", ["maths", 3, [], {"evry": 1}, "{", {"math": -1}, {"past": "recompute"}, {"math": 1e9},
                                   {"combine": "linear"}, {"fixed": {"maths": 1}}])  # fmt: skip
def test_what_a_request_may_not_ask_for(mixture: Mixture, given) -> None:
    with pytest.raises(OptionError, match=r"^treadle:"):
        mixture.read_request(given)


def test_options_come_from_the_configuration_or_the_environment() -> None:
    assert read_plugin_params({}, {}) is None
    assert read_plugin_params(object(), {}) is None
    assert read_plugin_params({"treadle": "b"}, {}) == PluginParams(bundle="b")
    assert read_plugin_params({}, {"TREADLE_VLLM": "b"}) == PluginParams(bundle="b")
    given = {"TREADLE_VLLM": '{"bundle": "b", "max_adapters": 8}'}
    assert read_plugin_params({}, given) == PluginParams(bundle="b", max_adapters=8)
    assert read_plugin_params({"treadle": PluginParams(bundle="b").document()}, given) == PluginParams(bundle="b")


@pytest.mark.parametrize(
    "given",
    [
        3,
        {"bundel": "b"},
        {},
        {"bundle": "b", "combines": ["sum"]},
        {"bundle": "b", "max_rank": 4},
        {"bundle": "b", "max_adapters": 0},
    ],
)
def test_options_that_are_wrong_are_refused(given) -> None:
    with pytest.raises(TreadleError):
        read_plugin_params({"treadle": given}, {})
    with pytest.raises(TreadleError):
        read_plugin_params({}, {"TREADLE_VLLM": "{bundle"})


def test_the_option_that_went_is_refused_with_the_way_out() -> None:
    with pytest.raises(TreadleError, match=r"combines is no longer an option.*use sum, or the embedded engine"):
        read_plugin_params({"treadle": {"bundle": "b", "combines": ["linear"]}}, {})
