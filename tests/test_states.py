"""The base model's own states decide the weights: one text has one answer, however it is read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from treadle.common.errors import ModelError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.batch import Batch
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.prefix_cache import PrefixCache, PrefixText
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.engine.runners.runner import Runner
from treadle.engine.scoring import score_ids
from treadle.engine.sequence import TokenSequence
from treadle.engine.state_fitting import fit_states
from treadle.engine.tokenization import prompt_ids
from treadle.experiments.pools import random_adapters
from treadle.lora.adapter import Adapter, read_adapter
from treadle.routing.centroids import Floats
from treadle.routing.router import Router
from treadle.routing.schedule import Seen
from treadle.routing.states import REREAD_BOUND, StateClasses, StateTrail, unit

from conftest import SAMPLES, TINY, save_adapter, tiny_llama

PROMPTS = ["add three plus four and the sum of the atom heat", "def loop", "the planet heat cell, return list " * 4,
           "a", "sum add three", "What is it?"]  # fmt: skip
ROUTINGS = {
    "default": RoutingParams(),
    "sure": RoutingParams(temperature=5.0),
    "every token": RoutingParams(temperature=5.0, every=1),
    "once": RoutingParams(temperature=5.0, every=None),
    "two": RoutingParams(temperature=5.0, rule="top_k", top_k=2, every=3),
    "adapters alone": RoutingParams(temperature=5.0, fallback=False),
}
SURE = ROUTINGS["sure"]
GREEDY = SamplingParams(max_tokens=12)
every_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())


@pytest.fixture
def make(tokenizer, adapter_folders: dict[str, Path], router: Router, classes: StateClasses) -> Callable[..., Engine]:
    def build(states: StateClasses | None = classes, *, is_fast: bool = True) -> Engine:
        adapters = [read_adapter(folder, name) for name, folder in adapter_folders.items()]
        return Engine(tiny_llama(), tokenizer, adapters, replace(router, states=states), is_fast=is_fast)

    return build


@pytest.fixture
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


def ids_of(engine: Engine, prompt: str) -> list[int]:
    return prompt_ids(engine.tokenizer, prompt)


def run_row(
    engine: Engine,
    prompt: str,
    routing: RoutingParams = SURE,
    *,
    columns: int | None = None,
    prefixes: PrefixCache | None = None,
) -> TokenSequence:
    """Generate from one prompt and return the row."""
    (row,) = engine.new_rows([ids_of(engine, prompt)], sampling=GREEDY, routing=routing)
    batch: Batch = engine.new_batch(prefixes=prefixes)
    reading = batch.begin([row])
    while not reading.is_finished:
        batch.read(reading, columns)
    while batch.rows:
        batch.step()
    return row


def weights_of(row: TokenSequence) -> Floats:
    return np.stack([event.weights for event in row.events])


def logprobs_of(row: TokenSequence) -> list[float]:
    return [event.logprob for event in row.events]


def assert_same(row: TokenSequence, other: TokenSequence) -> None:
    assert row.ids == other.ids
    assert row.is_reread == other.is_reread
    np.testing.assert_allclose(weights_of(row), weights_of(other), atol=2e-4)
    np.testing.assert_allclose(logprobs_of(row), logprobs_of(other), atol=1e-3)


@torch.inference_mode()
def uncached(engine: Engine, ids: Sequence[int], weights: Floats | None) -> tuple[Floats, Floats]:
    """Return the log-probabilities (T, V) and the states (T, H) of one plain pass under weights (T, N)."""
    classes = cast(StateClasses, engine.router.states)
    given = None if weights is None else weights[None]
    with engine.blend.using(given):
        output = engine.model(input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
    return output.logits[0].log_softmax(-1).numpy(), output.hidden_states[classes.layer][0].numpy()


def decided_by(engine: Engine, states: Floats, prompt_tokens: int, routing: RoutingParams) -> Floats:
    """Return the weights (N,) that the states (T, H) of a text give, by the definition."""
    classes = cast(StateClasses, engine.router.states)
    first = states[1:]
    views = unit(np.stack([first[-span:].mean(0, dtype=np.float64) for span in classes.spans]))
    seen = Seen(views[None], np.array([len(states) > prompt_tokens]))
    return engine.router.weigh_states(seen, routing)[0]


# The laws


def test_these_prompts_are_of_both_kinds(engine: Engine) -> None:
    assert {run_row(engine, prompt).is_reread for prompt in PROMPTS} == {True, False}


@every_routing
def test_a_batch_is_its_rows_alone(engine: Engine, routing: RoutingParams) -> None:
    together = engine.generate(PROMPTS, sampling=GREEDY, routing=routing)
    for prompt, other in zip(PROMPTS, together, strict=True):
        alone = engine.generate(prompt, sampling=GREEDY, routing=routing)
        assert alone.token_ids == other.token_ids
        np.testing.assert_allclose(alone.weights, other.weights, atol=2e-4)
        np.testing.assert_allclose(alone.logprobs, other.logprobs, atol=1e-3)


@every_routing
@pytest.mark.parametrize("columns", [1, 7, 40])
def test_reading_in_chunks_is_reading_at_once(engine: Engine, routing: RoutingParams, columns: int) -> None:
    for prompt in PROMPTS:
        assert_same(run_row(engine, prompt, routing, columns=columns), run_row(engine, prompt, routing))


@pytest.mark.parametrize("columns", [None, 9])
def test_a_beginning_that_is_known_changes_nothing(engine: Engine, columns: int | None) -> None:
    class Counted(PrefixCache):
        found = 0

        def fill(self, cache: RowCache, text: PrefixText, num_unread: int = 1) -> int:
            self.found = super().fill(cache, text, num_unread)
            return self.found

    prefixes, reused, again = Counted(1 << 28), 0, 0
    for prompt in [*PROMPTS, "sum add three " * 6, "def loop return " * 6]:
        alone = run_row(engine, prompt)
        for _ in range(2):
            row = run_row(engine, prompt, columns=columns, prefixes=prefixes)
            assert_same(row, alone)
            assert row.reused == (0 if row.is_reread else prefixes.found)  # what is read again is not reused
            reused += row.reused
            again += prefixes.found > 0 and row.is_reread
    assert reused
    assert again


@every_routing
def test_our_own_passes_and_the_models_forward_agree(make: Callable[..., Engine], routing: RoutingParams) -> None:
    fast, slow = make(), make(is_fast=False)
    assert fast.is_fast
    assert not slow.is_fast
    for prompt in PROMPTS:
        assert_same(run_row(fast, prompt, routing), run_row(slow, prompt, routing))


@every_routing
def test_a_score_is_what_generation_had(engine: Engine, routing: RoutingParams) -> None:
    done = engine.generate(PROMPTS, sampling=GREEDY, routing=routing)
    pairs = [(ids_of(engine, prompt), list(each.token_ids)) for prompt, each in zip(PROMPTS, done, strict=True)]
    for scored, each in zip(score_ids(engine, pairs, routing), done, strict=True):
        np.testing.assert_allclose(scored, each.logprobs, atol=1e-3)


@every_routing
def test_a_stream_is_the_whole_answer(engine: Engine, routing: RoutingParams) -> None:
    for prompt in PROMPTS:
        events = list(engine.stream(prompt, sampling=GREEDY, routing=routing))
        whole = engine.generate(prompt, sampling=GREEDY, routing=routing)
        assert "".join(event.text for event in events) == whole.text
        np.testing.assert_array_equal(np.stack([event.weights for event in events]), whole.weights)


@every_routing
def test_recorded_weights_are_those_that_were_used(engine: Engine, routing: RoutingParams) -> None:
    for prompt in PROMPTS:
        row = run_row(engine, prompt, routing)
        before = np.broadcast_to(row.read_under, (row.prompt_tokens, 3))
        used = np.concatenate([before, weights_of(row)[1:]])
        np.testing.assert_array_equal(row.read_under[0], row.events[0].weights)
        logprobs, _ = uncached(engine, row.ids[:-1], used)
        expected = [logprobs[row.prompt_tokens - 1 + index, event.token_id] for index, event in enumerate(row.events)]
        np.testing.assert_allclose(logprobs_of(row), expected, atol=1e-3)


def test_weights_are_what_the_states_so_far_give(engine: Engine) -> None:
    routing = ROUTINGS["every token"]
    for prompt in PROMPTS[:3]:
        row = run_row(engine, prompt, routing)
        used = np.concatenate([np.broadcast_to(row.read_under, (row.prompt_tokens, 3)), weights_of(row)[1:]])
        _, states = uncached(engine, row.ids[:-1], used)
        for index, event in enumerate(row.events[1:]):
            expected = decided_by(engine, states[: row.prompt_tokens + index], row.prompt_tokens, routing)
            np.testing.assert_allclose(event.weights, expected, atol=2e-3)


def test_a_decision_is_made_once_where_every_is_none(engine: Engine) -> None:
    for prompt in PROMPTS[:3]:
        row = run_row(engine, prompt, ROUTINGS["once"])
        _, states = uncached(engine, row.ids[: row.prompt_tokens], np.repeat(row.read_under, row.prompt_tokens, 0))
        expected = decided_by(engine, states, row.prompt_tokens, ROUTINGS["once"])
        np.testing.assert_allclose(weights_of(row)[1:], np.tile(expected, (len(row.events) - 1, 1)), atol=2e-3)


# The second reading of a prompt


def test_a_prompt_is_read_again_where_its_states_differ_and_only_once(engine: Engine) -> None:
    passes: list[int] = []

    class Counted(Runner):
        def run(self, given: PassInput) -> PassOutput:
            passes.append(given.ids.shape[1])
            return super().run(given)

        def unhooked(self) -> Runner:
            return self  # the hidden states that `uncached` asks of transformers leave hooks behind

    engine.runner = Counted(engine.model, engine.blend, engine.runner.own)
    for prompt in PROMPTS:
        ids = ids_of(engine, prompt)
        by_text = engine.router.weights([prompt], SURE)
        passes.clear()
        row = run_row(engine, prompt)
        read = passes.count(len(ids)) if len(ids) > 1 else 1
        if len(ids) == 1:  # the first token's state says nothing: the text decides
            assert not row.is_reread
            continue
        _, states = uncached(engine, ids, np.repeat(by_text, len(ids), 0))
        by_states = decided_by(engine, states, len(ids), SURE)
        assert row.is_reread == bool((abs(by_states - by_text[0]) > REREAD_BOUND).any())
        assert read == 1 + row.is_reread
        np.testing.assert_allclose(row.events[0].weights, by_states if row.is_reread else by_text[0], atol=2e-3)


def test_a_seed_draws_the_same_after_a_second_reading(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    together = engine.generate(PROMPTS, sampling=sampling, routing=SURE)
    for prompt, other in zip(PROMPTS, together, strict=True):
        assert engine.generate(prompt, sampling=sampling, routing=SURE).token_ids == other.token_ids
    again = next(prompt for prompt in PROMPTS if run_row(engine, prompt).is_reread)
    (row,) = engine.new_rows([ids_of(engine, again)], sampling=sampling, routing=SURE)
    batch = engine.new_batch()
    batch.join([row])
    fixed = RoutingParams(rule="fixed", fixed=dict(zip(SAMPLES, row.events[0].weights.tolist(), strict=True)))
    assert row.is_reread
    assert engine.generate(again, sampling=sampling, routing=fixed).token_ids[0] == row.events[0].token_id


def test_stop_strings_end_the_text(engine: Engine) -> None:
    ended = 0
    for prompt in PROMPTS:
        whole = engine.generate(prompt, sampling=GREEDY, routing=SURE).text
        stop = whole[len(whole) // 2 :][:2]
        if stop:
            done = engine.generate(prompt, sampling=replace(GREEDY, stop=(stop,)), routing=SURE)
            assert done.text == whole.partition(stop)[0]
            assert done.finish_reason == "stop"
            ended += 1
    assert ended > 2


# Options, hooks


@pytest.mark.parametrize(
    "options", [{"prefill": "causal"}, {"past": "recompute"}, {"lag": 1}], ids=["causal", "recompute", "lag"]
)
def test_options_that_need_weights_before_the_states_are_refused(engine: Engine, options: dict[str, object]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(OptionError, match=f"{name} = {value}: not possible .* states = false"):
        engine.generate("add", sampling=GREEDY, routing=RoutingParams(**options))  # type: ignore[arg-type]
    engine.generate("add", sampling=GREEDY, routing=RoutingParams(**options, states=False))  # type: ignore[arg-type]


def test_without_states_the_text_decides_as_in_a_bundle_that_has_none(make: Callable[..., Engine]) -> None:
    engine, plain = make(), make(None)
    for params in (replace(SURE, states=False), RoutingParams.one("code"), RoutingParams(score="cosine")):
        one, other = (each.generate(PROMPTS, sampling=GREEDY, routing=params) for each in (engine, plain))
        for ours, theirs in zip(one, other, strict=True):
            assert ours.token_ids == theirs.token_ids
            np.testing.assert_array_equal(ours.weights, theirs.weights)


@pytest.mark.parametrize("is_fast", [True, False])
def test_no_hook_is_left_behind(make: Callable[..., Engine], is_fast: bool) -> None:
    engine = make(is_fast=is_fast)
    before = run_row(engine, PROMPTS[0])
    assert engine.runner.unhooked() is engine.runner
    assert not any(module._forward_hooks for module in engine.model.modules())
    assert_same(run_row(engine, PROMPTS[0]), before)


# Adapters that come and go


def test_an_adapter_that_joins_changes_no_others_numbers(engine: Engine, tmp_path: Path) -> None:
    samples = ["poem rose moon", "the moon rose", "rose poem the moon", "moon moon poem"]
    before = engine.router
    engine.add_adapter("poetry", save_adapter(tmp_path / "poetry", seed=9), samples)
    states, old = engine.router.states, before.states
    assert states is not None
    assert old is not None
    assert states.centroids.names == engine.router.names == ("math", "science", "code", "poetry")
    np.testing.assert_array_equal(states.centroids.means[:3], old.centroids.means)
    some = engine.router.among(before.names)
    views = np.random.default_rng(0).normal(size=(5, 2, 32)).astype(np.float32)
    seen = Seen(views, np.array([False, True, False, True, True]))
    np.testing.assert_array_equal(some.weigh_states(seen, SURE), before.weigh_states(seen, SURE))
    done = engine.generate(PROMPTS, sampling=GREEDY, routing=SURE)
    assert all(each.weights.shape[1] == 4 for each in done)
    engine.remove_adapter("poetry")
    assert engine.router.states is not None
    assert engine.router.states.centroids.names == before.names
    np.testing.assert_array_equal(engine.router.weigh_states(seen, SURE), before.weigh_states(seen, SURE))


def test_a_newcomer_is_read_by_the_plain_base(make: Callable[..., Engine], tmp_path: Path) -> None:
    means: list[Floats] = []
    for fixed in (None, RoutingParams.one("code")):
        engine = make()
        if fixed:
            engine.blend.set_weights(engine.router.fixed_weights(fixed))
        engine.add_adapter("poetry", save_adapter(tmp_path / "poetry", seed=9), ["poem rose", "moon rose"])
        assert engine.router.states is not None
        means.append(engine.router.states.centroids.means[3])
    np.testing.assert_array_equal(*means)


def test_what_a_newcomer_does_to_states_is_scatter(make: Callable[..., Engine], tmp_path: Path) -> None:
    traces: list[float] = []
    for size in (1e-4, 1.0):  # of what the adapter changes
        folder = save_adapter(tmp_path / str(size), seed=9)
        weights = load_file(folder / "adapter_model.safetensors")
        scaled = {name: each * (size if ".lora_B." in name else 1.0) for name, each in weights.items()}
        save_file(scaled, folder / "adapter_model.safetensors", {"format": "pt"})
        engine = make()
        engine.add_adapter("poetry", folder, ["poem rose", "moon rose", "the moon"])
        assert engine.router.states is not None
        traces.append(float(np.trace(engine.router.states.centroids.stages["prompt"].keep([3]).scatter())))
    assert traces[0] < traces[1]


def test_a_newcomer_whose_samples_cannot_be_read_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    before = engine.router
    folder = save_adapter(tmp_path / "poetry", seed=9)
    hook = engine.model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.add_adapter("poetry", folder, ["poem rose"])
    hook.remove()
    assert engine.router is before
    assert engine.blend.names == before.names
    engine.add_adapter("poetry", folder, ["poem rose"])


def test_a_newcomer_without_states_is_refused_where_states_decide(
    engine: Engine, tmp_path: Path, router: Router
) -> None:
    adapter = read_adapter(save_adapter(tmp_path / "poetry", seed=9), "poetry")
    own = replace(router.centroids.among(["math"]), names=("poetry",))
    before = engine.router
    with pytest.raises(Exception, match="states are unknown for poetry: fit the bundle again, or give states = false"):
        engine.adapters.join(adapter, own)
    assert engine.router is before
    engine.router = replace(before, params=RoutingParams(states=False))
    engine.adapters.join(adapter, own)
    engine.generate("add", sampling=GREEDY)
    with pytest.raises(OptionError, match="unknown for poetry"):
        engine.generate("add", sampling=GREEDY, routing=SURE)
    engine.remove_adapter("poetry")
    engine.generate("add", sampling=GREEDY, routing=SURE)


# Fitting


def deep_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {**TINY, "num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=512, initializer_range=0.3)).eval()


def deep_adapters(model: LlamaForCausalLM) -> list[Adapter]:
    made = random_adapters(model, "", len(SAMPLES), rank=2, targets=["q_proj"])
    return [replace(adapter, name=name) for adapter, name in zip(made, SAMPLES, strict=True)]


def test_the_layer_with_the_least_loss_is_kept(tokenizer) -> None:
    model = deep_llama()
    adapters = deep_adapters(model)
    each = {layer: fit_states(model, tokenizer, SAMPLES, adapters, [layer])[1].loss for layer in (2, 3, 4)}
    classes, report = fit_states(model, tokenizer, SAMPLES, adapters)
    assert len(set(each.values())) == 3
    assert report.loss == min(each.values())
    assert classes.layer == min(each, key=lambda layer: each[layer])
    assert classes.centroids.embedder_id == f"states:llama-6x32:{classes.layer}"


def test_a_fit_is_the_same_every_time(tokenizer, adapters: list[Adapter], classes: StateClasses) -> None:
    again = fit_states(tiny_llama(), tokenizer, SAMPLES, adapters)[0]
    np.testing.assert_array_equal(again.centroids.means, classes.centroids.means)
    assert again.centroids.calibrations == classes.centroids.calibrations


def test_a_fit_leaves_the_model_as_it_was(tokenizer, adapters: list[Adapter]) -> None:
    model = tiny_llama()
    before = list(map(id, model.modules()))
    fit_states(model, tokenizer, SAMPLES, adapters)
    assert list(map(id, model.modules())) == before


def test_what_an_adapter_does_to_states_is_scatter(tokenizer, adapters: list[Adapter]) -> None:
    silent = [
        replace(each, pairs={path: replace(pair, b=torch.zeros_like(pair.b)) for path, pair in each.pairs.items()})
        for each in adapters
    ]
    without = fit_states(tiny_llama(), tokenizer, SAMPLES, silent, [1])[0]
    under = fit_states(tiny_llama(), tokenizer, SAMPLES, adapters, [1])[0]
    for index in range(len(adapters)):
        more = under.centroids.stages["prompt"].keep([index]).scatter()
        less = without.centroids.stages["prompt"].keep([index]).scatter()
        assert np.trace(more) > np.trace(less)


def test_every_adapter_needs_samples(tokenizer, adapters: list[Adapter]) -> None:
    with pytest.raises(OptionError, match="none of art"):
        fit_states(tiny_llama(), tokenizer, SAMPLES, [*adapters, replace(adapters[0], name="art")])


def test_states_of_another_model_are_refused(make: Callable[..., Engine], tokenizer, classes: StateClasses) -> None:
    model = deep_llama()
    other = fit_states(model, tokenizer, SAMPLES, deep_adapters(model))[0]
    with pytest.raises(ModelError, match=r"states:llama-6x32:.*would be states:llama-2x32"):
        make(other)
    renamed = replace(classes.centroids, embedder_id=other.centroids.embedder_id)
    with pytest.raises(ModelError, match="Fit the bundle again"):
        make(replace(classes, centroids=renamed))
    with pytest.raises(ModelError, match="layer 5; this model has 2"):
        make(replace(classes, layer=5))


# The trail of one text


def trail_of(*parts: tuple[int, int, int]) -> StateTrail:
    """Return a trail with two views that took states: start, end and version of each part."""
    trail = StateTrail((4, 2))
    for start, end, version in parts:
        trail.put(start, np.array([[index + 1, version] for index in range(start, end)], np.float32))
    return trail


def expected(*states: tuple[int, int]) -> Floats:
    rows = np.array(states, np.float64)
    return unit(np.stack([rows[-4:].mean(0), rows[-2:].mean(0)]))


@pytest.mark.parametrize(
    ("parts", "states"),
    [
        ([(0, 3, 1)], [(2, 1), (3, 1)]),  # without the first token
        ([(0, 3, 1), (3, 8, 1)], [(5, 1), (6, 1), (7, 1), (8, 1)]),  # grows, the newest four stay
        ([(0, 1, 1), (1, 2, 1)], [(2, 1)]),
        ([(0, 6, 1), (0, 6, 2)], [(3, 2), (4, 2), (5, 2), (6, 2)]),  # read again
        ([(0, 6, 1), (5, 7, 2)], [(4, 1), (5, 1), (6, 2), (7, 2)]),  # the last is replaced
        ([(0, 3, 1), (5, 7, 1)], [(6, 1), (7, 1)]),  # a hole: what was before says nothing
        ([(0, 9, 1), (2, 3, 2)], [(3, 2)]),  # what was known behind is gone, and before is no longer kept
    ],
)
def test_a_trail_holds_the_newest_states(parts: list[tuple[int, int, int]], states: list[tuple[int, int]]) -> None:
    views = trail_of(*parts).views()
    assert views is not None
    np.testing.assert_allclose(views, expected(*states), rtol=1e-6)


def test_a_trail_of_one_token_says_nothing() -> None:
    assert trail_of().is_empty
    assert trail_of((0, 1, 1)).is_empty
    assert trail_of((0, 1, 1)).end == 1
