import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import treadle
from treadle.common.errors import AdapterError, ModelError, OptionError, TreadleError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.completion import GenerationError
from treadle.engine.engine import Completion, Engine
from treadle.engine.scoring import score_ids, trace_weights
from treadle.engine.tokenization import prompt_ids
from treadle.lora.adapter import read_adapter
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import centroid_of

from conftest import SAMPLES, save_adapter, tiny_llama

PROMPTS = ["add three plus four", "the planet", "def loop return list of the cell, and then some more text"]
GREEDY = SamplingParams(max_tokens=20)
ROUTINGS = {
    "default": RoutingParams(),
    "every token": RoutingParams(every=1, temperature=5.0),
    "window": RoutingParams(every=1, window=6, temperature=5.0),
    "prompt only": RoutingParams(every=None),
    "causal": RoutingParams(every=3, prefill="causal", temperature=5.0),
    "causal window": RoutingParams(every=4, prefill="causal", window=5, temperature=5.0),
    "without the base": RoutingParams(every=2, temperature=5.0, fallback=False),
    "late": RoutingParams(every=2, lag=1, temperature=5.0),
    "late, every token": RoutingParams(every=1, lag=1, temperature=5.0),
    "recompute": RoutingParams(every=3, past="recompute", window=8, temperature=5.0),
    "boosted": RoutingParams(score="cosine", rule="boosted", every=1),
    "top_k": RoutingParams(rule="top_k", top_k=2, every=2),
    "one": RoutingParams.one("science"),
    "fixed": RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.5}),
    "base": RoutingParams.base(),
}
every_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())


def assert_same(a: Completion, b: Completion, tolerance: float = 2e-5) -> None:
    assert a.token_ids == b.token_ids
    assert a.text == b.text
    assert a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)
    np.testing.assert_allclose(a.weights, b.weights, atol=tolerance)


@torch.inference_mode()
def uncached(engine: Engine, prompt: str, done: Completion, weights: np.ndarray | None) -> np.ndarray:
    """Log-probabilities of the completion's tokens in one plain forward pass under given weights."""
    ids = prompt_ids(engine.tokenizer, prompt) + list(done.token_ids)
    with engine.blend.using(weights):
        logits = engine.model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return chosen[-len(done.token_ids) :].numpy()


@pytest.mark.parametrize("name", [name for name in ROUTINGS if name != "recompute"])
def test_cached_decoding_is_one_forward_with_weights_per_token(engine: Engine, name: str) -> None:
    for prompt in PROMPTS:
        done = engine.generate(prompt, sampling=GREEDY, routing=ROUTINGS[name])
        ids = prompt_ids(engine.tokenizer, prompt) + list(done.token_ids)
        weights = trace_weights(engine, ids[:-1], done.prompt_tokens, ROUTINGS[name])[None]  # (1, T, N)
        np.testing.assert_allclose(uncached(engine, prompt, done, weights), done.logprobs, atol=1e-4)
        np.testing.assert_allclose(weights[0, done.prompt_tokens - 1 :], done.weights, atol=1e-6)


def test_late_weights_are_those_of_the_decision_before(engine: Engine) -> None:
    late = engine.generate(PROMPTS[0], sampling=GREEDY, routing=ROUTINGS["late"])
    ids = [*prompt_ids(engine.tokenizer, PROMPTS[0]), *late.token_ids]
    at_once = trace_weights(engine, ids[:-1], late.prompt_tokens, replace(ROUTINGS["late"], lag=0))
    at_once = at_once[late.prompt_tokens - 1 :]  # (made, N)
    np.testing.assert_allclose(late.weights[2:], at_once[:-2], atol=1e-6)
    np.testing.assert_allclose(late.weights[:3], at_once[[0, 0, 0]], atol=1e-6)
    assert np.abs(late.weights - at_once).max() > 1e-3


def test_an_error_beside_the_model_is_an_error(engine: Engine, embedder: StaticEmbedder) -> None:
    calls: list[str] = []

    class Once(StaticEmbedder):
        def finish(self, views: Any) -> Any:
            calls.append(threading.current_thread().name)
            if len(calls) > 1:
                raise RuntimeError("the embedder broke")
            return super().finish(views)

    engine.router = replace(engine.router, embedder=Once(embedder.model))
    with pytest.raises(GenerationError, match="the embedder broke"):
        engine.generate(PROMPTS[0], sampling=GREEDY, routing=ROUTINGS["late"])
    assert calls[0] == "MainThread"
    assert calls[1].startswith("treadle-embedder")


def test_weights_do_change_while_text_runs(engine: Engine) -> None:
    done = engine.generate(PROMPTS[0], sampling=GREEDY, routing=ROUTINGS["every token"])
    assert np.abs(np.diff(done.weights, axis=0)).max() > 0.01
    once = engine.generate(PROMPTS[0], sampling=GREEDY, routing=ROUTINGS["prompt only"])
    assert (once.weights == once.weights[0]).all()


def test_recompute_is_an_uncached_forward_under_the_newest_weights(engine: Engine) -> None:
    routing = ROUTINGS["recompute"]
    done = engine.generate(PROMPTS[2], sampling=GREEDY, routing=routing)
    for index in range(len(done.token_ids)):
        newest = uncached(engine, PROMPTS[2], done, done.weights[index])
        np.testing.assert_allclose(newest[index], done.logprobs[index], atol=1e-4)
    kept = engine.generate(PROMPTS[2], sampling=GREEDY, routing=RoutingParams(every=3, window=8, temperature=5.0))
    assert kept.token_ids != done.token_ids or np.abs(kept.logprobs - done.logprobs).max() > 1e-3


@every_routing
def test_score_of_generated_text_is_its_logprobs(engine: Engine, routing: RoutingParams) -> None:
    ids = prompt_ids(engine.tokenizer, PROMPTS[1])
    done = engine.generate(PROMPTS[1], sampling=GREEDY, routing=routing)
    (scores,) = score_ids(engine, [(ids, list(done.token_ids))], routing)
    np.testing.assert_allclose(scores, done.logprobs, atol=1e-4)


def test_score_of_the_base_is_a_plain_forward(engine: Engine) -> None:
    plain = tiny_llama()
    ids = engine.tokenizer(PROMPTS[0] + " five", return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = plain(ids).logits[0].log_softmax(-1)
    count = len(" five")
    expected = logprobs[torch.arange(ids.shape[1] - 1 - count, ids.shape[1] - 1), ids[0, -count:]]
    (scores,) = engine.score([PROMPTS[0]], [" five"], routing=RoutingParams.base())
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


@every_routing
def test_a_batch_is_its_rows_alone(engine: Engine, routing: RoutingParams) -> None:
    together = engine.generate(PROMPTS, sampling=GREEDY, routing=routing)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert_same(engine.generate(prompt, sampling=GREEDY, routing=routing), row)


def test_a_batch_of_mixed_rows_is_each_row_alone(engine: Engine) -> None:
    engine.max_batch = 5  # rows join while others run
    routings = list(ROUTINGS.values())
    prompts = [PROMPTS[index % 3] + " " * index for index in range(len(routings))]
    samplings = [
        SamplingParams(max_tokens=3 + 2 * (index % 5), temperature=(index % 3) * 0.7, seed=index, top_k=index)
        for index in range(len(routings))
    ]
    together = engine.generate(prompts, sampling=samplings, routing=routings)
    for prompt, sampling, routing, row in zip(prompts, samplings, routings, together, strict=True):
        assert_same(engine.generate(prompt, sampling=sampling, routing=routing), row)
        assert len(row.token_ids) == sampling.max_tokens or row.finish_reason == "stop"


def test_rows_with_different_combines_share_a_batch(
    tokenizer: object, equal_folders: dict[str, Path], router: object
) -> None:
    from treadle.lora.adapter import read_adapter

    engine = Engine(tiny_llama(), tokenizer, [read_adapter(f, n) for n, f in equal_folders.items()], router)
    routings = [RoutingParams(combine=combine, every=1) for combine in ("sum", "linear", "paper")]
    together = engine.generate([PROMPTS[0]] * 3, sampling=GREEDY, routing=routings)
    for routing, row in zip(routings, together, strict=True):
        assert_same(engine.generate(PROMPTS[0], sampling=GREEDY, routing=routing), row)
    assert len({row.token_ids for row in together}) == 3


@pytest.mark.parametrize("combine", ["sum", "linear", "paper"])
def test_an_adapter_that_only_running_rows_hold_does_not_act_on_new_ones(
    tokenizer: object, equal_folders: dict[str, Path], router: object, combine: str
) -> None:
    from treadle.lora.adapter import read_adapter

    engine = Engine(tiny_llama(), tokenizer, [read_adapter(f, n) for n, f in equal_folders.items()], router)
    routing = RoutingParams(rule="fixed", fixed={"math": 0.5, "science": 0.5}, combine=combine)
    running = engine.new_rows([[97]])
    engine.adapters.hold(running)
    engine.remove_adapter("code")
    assert "code" in engine.blend.names
    beside = engine.generate(PROMPTS[0], sampling=GREEDY, routing=routing)
    (scored,) = engine.score([PROMPTS[0]], [" plus"], routing=routing)
    assert engine.adapters.release(running)
    engine.adapters.drop_retired()
    assert engine.blend.names == ("math", "science")
    assert_same(engine.generate(PROMPTS[0], sampling=GREEDY, routing=routing), beside)
    np.testing.assert_allclose(engine.score([PROMPTS[0]], [" plus"], routing=routing)[0], scored, atol=1e-4)


@every_routing
def test_streaming_is_not_streaming(engine: Engine, routing: RoutingParams) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    done = engine.generate(PROMPTS[0], sampling=sampling, routing=routing)
    events = list(engine.stream(PROMPTS[0], sampling=sampling, routing=routing))
    assert "".join(event.text for event in events) == done.text
    assert tuple(event.token_id for event in events) == done.token_ids
    assert [event.index for event in events] == list(range(len(events)))
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [done.finish_reason]


def test_two_streams_of_one_engine_do_not_disturb_each_other(engine: Engine) -> None:
    alone = [engine.generate(prompt, sampling=GREEDY).token_ids for prompt in PROMPTS[:2]]
    streams = [engine.stream(prompt, sampling=GREEDY) for prompt in PROMPTS[:2]]
    events = list(zip(*streams, strict=True))
    assert [tuple(pair[index].token_id for pair in events) for index in range(2)] == alone


def test_two_engines_live_in_one_process(engine: Engine, tokenizer: object, equal_folders: dict[str, Path]) -> None:
    from treadle.lora.adapter import read_adapter
    from treadle.routing.fitting import fit

    before = engine.generate(PROMPTS[0], sampling=GREEDY)
    names = ["math", "code"]
    samples = {name: SAMPLES[name] for name in names}
    other = Engine(
        tiny_llama(),
        tokenizer,
        [read_adapter(equal_folders[name], name) for name in names],
        fit(samples, engine.router.embedder),
    )
    assert other.generate(PROMPTS[0], sampling=GREEDY).weights.shape[1] == 2
    assert_same(engine.generate(PROMPTS[0], sampling=GREEDY), before, tolerance=0)


def test_the_same_seed_gives_the_same_text_and_another_a_different_one(engine: Engine) -> None:
    texts = [
        engine.generate(PROMPTS[0], sampling=SamplingParams(max_tokens=20, temperature=1.5, seed=seed)).token_ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_base_routing_is_the_model_alone_bit_for_bit(engine: Engine) -> None:
    done = engine.generate(PROMPTS[0], sampling=GREEDY, routing=RoutingParams.base())
    ids = engine.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    generated = tiny_llama().generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert done.token_ids == tuple(generated.tolist())
    assert not done.weights.any()


def test_one_adapter_generates_as_in_peft(
    engine: Engine, peft_model: Callable[..., torch.nn.Module], adapter_folders: dict[str, Path]
) -> None:
    reference = peft_model(adapter_folders)
    ids = engine.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    for name in adapter_folders:
        reference.set_adapter(name)
        expected = reference.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        done = engine.generate(PROMPTS[0], sampling=GREEDY, routing=RoutingParams.one(name))
        assert done.token_ids == tuple(expected.tolist())


def test_end_of_text_ends_a_row_and_is_no_text(engine: Engine) -> None:
    free = engine.generate(PROMPTS[0], sampling=GREEDY)
    engine.model.generation_config.eos_token_id = [257, free.token_ids[7]]
    done = engine.generate([PROMPTS[0], PROMPTS[1]], sampling=GREEDY)[0]
    first = free.token_ids.index(free.token_ids[7])
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: first + 1]
    expected = engine.tokenizer.decode(done.token_ids[:-1], skip_special_tokens=True)
    assert done.text == expected


def test_a_stop_string_across_tokens_ends_the_text_before_it(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=60)
    free = engine.generate(PROMPTS[0], sampling=sampling)
    stop = next(free.text[i : i + 3] for i in range(10, 50) if "\ufffd" not in free.text[i : i + 3])
    for stops in ((stop,), (stop, "never to be seen"), (stop + "\x00no", stop)):
        stopped = SamplingParams(max_tokens=60, stop=stops)
        done = engine.generate(PROMPTS[0], sampling=stopped)
        assert done.finish_reason == "stop"
        assert done.text == free.text[: free.text.index(stop)]
        assert "".join(event.text for event in engine.stream(PROMPTS[0], sampling=stopped)) == done.text


def test_a_stop_token_ends_the_text_and_is_no_part_of_it(engine: Engine) -> None:
    free = engine.generate(PROMPTS[0], sampling=SamplingParams(max_tokens=30))
    token = free.token_ids[12]
    first = free.token_ids.index(token)
    sampling = SamplingParams(max_tokens=30, stop_token_ids=(token, 3 if token != 3 else 4))
    done = engine.generate(PROMPTS[0], sampling=sampling)
    assert (done.finish_reason, done.token_ids) == ("stop", free.token_ids[: first + 1])
    assert done.text == engine.tokenizer.decode(free.token_ids[:first], skip_special_tokens=True)
    both = engine.generate([PROMPTS[0]] * 2, sampling=[sampling, SamplingParams(max_tokens=30)])
    assert [each.token_ids for each in both] == [done.token_ids, free.token_ids]  # of the row, not of the batch


def test_a_special_token_as_a_stop_string_ends_the_text(engine: Engine) -> None:
    special = engine.tokenizer.convert_tokens_to_ids("<unused>")
    for seed in range(100):
        options = {"max_tokens": 60, "temperature": 2.0, "seed": seed}
        free = engine.generate(PROMPTS[0], sampling=SamplingParams(**options))
        if special in free.token_ids[:-1]:
            break
    done = engine.generate(PROMPTS[0], sampling=SamplingParams(**options, stop=("never seen", "<unused>")))
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: free.token_ids.index(special) + 1]


def test_stops_that_cannot_be_found_are_refused(engine: Engine) -> None:
    for options, message in (
        ({"stop": ("\n<end>", "plain <pad>")}, r"'\\n<end>' holds the special token '<end>'[\s\S]*'plain <pad>'"),
        ({"stop_token_ids": (5, 10**9)}, "stop_token_ids: got 1000000000; allowed: 0 to 258"),
    ):
        with pytest.raises(OptionError, match=message):
            engine.generate(PROMPTS[0], sampling=SamplingParams(**options))


def test_text_joins_to_the_decoded_tokens(engine: Engine) -> None:
    for seed in range(5):
        done = engine.generate(PROMPTS[0], sampling=SamplingParams(max_tokens=50, temperature=2.0, seed=seed))
        assert done.text == engine.tokenizer.decode(done.token_ids, skip_special_tokens=True)


def test_chat_messages_go_through_the_chat_template(engine: Engine) -> None:
    fixed = RoutingParams(rule="fixed", fixed={"math": 1.0})
    done = engine.generate([{"role": "user", "content": "add three"}], sampling=GREEDY, routing=fixed)
    assert_same(done, engine.generate("user: add three\nassistant:", sampling=GREEDY, routing=fixed))
    done = engine.generate([{"role": "user", "content": "add three"}], sampling=GREEDY)
    many = engine.generate([[{"role": "user", "content": "add three"}]] * 2, sampling=GREEDY)
    assert [each.token_ids for each in many] == [done.token_ids] * 2


def test_generation_ends_where_the_context_ends(engine: Engine) -> None:
    prompt = "x" * 505
    done = engine.generate(prompt, sampling=SamplingParams(max_tokens=100))
    assert done.finish_reason in ("length", "stop")
    assert len(done.token_ids) <= 7
    with pytest.raises(OptionError, match=r"prompt 1 has 600 tokens; the model reads at most 512"):
        engine.generate(["x", "x" * 600])


def test_an_adapter_that_joins_leaves_the_others_as_they_were(engine: Engine, tmp_path: Path) -> None:
    params = RoutingParams(rule="fixed", fixed={"math": 0.7, "science": 0.4})
    before = engine.generate(PROMPTS[0], sampling=GREEDY, routing=params)
    running = engine.stream(PROMPTS[0], sampling=GREEDY)
    expected = engine.generate(PROMPTS[0], sampling=GREEDY)
    first = next(running)
    engine.add_adapter("poetry", save_adapter(tmp_path / "poetry", seed=9, r=5), ["heat the loop", "the loop"])
    assert engine.adapter_names == ("math", "science", "code", "poetry")
    rest = list(running)
    assert (first.token_id, *(event.token_id for event in rest)) == expected.token_ids
    assert rest[-1].weights.shape == (3,)
    after = engine.generate(PROMPTS[0], sampling=GREEDY, routing=params)
    assert after.token_ids == before.token_ids
    assert engine.generate(PROMPTS[0], sampling=GREEDY).weights.shape[1] == 4


def test_running_rows_finish_with_an_adapter_that_is_removed(engine: Engine) -> None:
    expected = engine.generate(PROMPTS[0], sampling=GREEDY)
    running = engine.stream(PROMPTS[0], sampling=GREEDY)
    tokens = [next(running).token_id]
    engine.remove_adapter("math")
    assert engine.adapter_names == ("science", "code")
    with pytest.raises(OptionError, match="unknown adapter 'math'"):
        engine.generate(PROMPTS[0], routing=RoutingParams.one("math"))
    with pytest.raises(AdapterError, match="still used by running rows"):
        engine.add_adapter("math", "anywhere", ["add"])
    assert engine.generate(PROMPTS[0], sampling=GREEDY).weights.shape[1] == 2
    tokens += [event.token_id for event in running]
    assert tuple(tokens) == expected.token_ids
    assert engine.blend.names == ("science", "code")


def test_an_abandoned_stream_lets_go_of_its_adapters(engine: Engine) -> None:
    running = engine.stream(PROMPTS[0], sampling=GREEDY)
    next(running)
    engine.remove_adapter("math")
    assert "math" in engine.blend.names
    running.close()
    assert "math" not in engine.blend.names


def test_added_then_removed_is_as_before(engine: Engine, tmp_path: Path) -> None:
    before = engine.generate(PROMPTS[0], sampling=GREEDY)
    engine.add_adapter("poetry", save_adapter(tmp_path / "poetry", seed=9), SAMPLES["math"])
    engine.remove_adapter("poetry")
    assert_same(engine.generate(PROMPTS[0], sampling=GREEDY), before, tolerance=0)


def test_a_bad_adapter_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    before = engine.generate(PROMPTS[0], sampling=GREEDY)
    with pytest.raises(AdapterError, match="exists already"):
        engine.add_adapter("math", tmp_path, ["add"])
    with pytest.raises(OptionError, match="no sample texts"):
        engine.add_adapter("new", save_adapter(tmp_path / "new"), [])
    with pytest.raises(AdapterError, match="not a PEFT folder"):
        engine.add_adapter("new", tmp_path, ["add"])
    with pytest.raises(AdapterError, match=r"unknown adapter 'maths'\. Did you mean 'math'"):
        engine.remove_adapter("maths")
    assert engine.adapter_names == engine.blend.names == ("math", "science", "code")
    assert_same(engine.generate(PROMPTS[0], sampling=GREEDY), before, tolerance=0)


def test_detach_gives_the_base_back(engine: Engine) -> None:
    ids = engine.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    engine.generate(PROMPTS[0], sampling=GREEDY)
    engine.detach()
    with torch.inference_mode():
        assert torch.equal(engine.model(ids).logits, tiny_llama()(ids).logits)
    assert engine.model.state_dict().keys() == tiny_llama().state_dict().keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate(""), "prompt 0: the prompt is empty"),
        (lambda e: e.generate(["a", "", ""]), "prompt 2: the prompt is empty"),
        (lambda e: e.generate([]), "give a text, a list of texts, or chat messages"),
        (lambda e: e.generate(7), "give a text, a list of texts, or chat messages"),
        (lambda e: e.generate("a", routing=RoutingParams.one("physics")), "unknown adapter 'physics'"),
        (lambda e: e.generate("a", routing=RoutingParams(combine="linear")), "combine=.sum., which takes any."),
        (lambda e: e.generate(["a", "b"], sampling=[GREEDY]), "a list of 2, one a prompt"),
        (lambda e: e.stream("a", routing=RoutingParams.one("physics")), "unknown adapter 'physics'"),
        (lambda e: e.score(["a"], ["b", "c"]), "1 prompts but 2 completions"),
        (lambda e: e.score(["a", "b"], ["", "c"]), "completions without a token: 0"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(
    engine: Engine, call: Callable[[Engine], object], message: str
) -> None:
    engine.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(TreadleError, match=message):
        call(engine)


def test_a_model_without_a_key_value_cache_is_refused(engine: Engine) -> None:
    engine.detach()
    engine.model._is_stateful = True  # as transformers marks such models
    with pytest.raises(ModelError, match=r"cannot run LlamaForCausalLM;.*\n  - it keeps a recurrent state"):
        Engine(engine.model, engine.tokenizer, [], engine.router)


class Torn(torch.Tensor):
    """A factor that cannot be read while it is torn."""

    is_torn = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if cls.is_torn:
            raise OSError("the factor is torn")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_stacks_that_cannot_be_built_change_nothing(engine: Engine, tmp_path: Path) -> None:
    folder, texts = save_adapter(tmp_path / "late", seed=9, r=5), ["add the loop", "the loop"]
    modules, before = dict(engine.model.named_modules()), engine.generate("add", sampling=GREEDY)
    whole = read_adapter(folder, "late")
    last = max(whole.pairs)  # others are stacked before it
    torn = replace(whole.pairs[last], b=whole.pairs[last].b.as_subclass(Torn))
    late = replace(whole, pairs={**whole.pairs, last: torn})
    own = centroid_of("late", texts, engine.router.embedder)
    stacks = engine.adapters.plan_join(late)
    Torn.is_torn = True
    try:
        with pytest.raises(OSError, match="torn"):
            engine.adapters.join(late, own, stacks)
    finally:
        Torn.is_torn = False
    assert engine.adapter_names == engine.blend.names == ("math", "science", "code")
    assert all(module is modules[path] for path, module in engine.model.named_modules())
    assert_same(engine.generate("add", sampling=GREEDY), before, tolerance=0)
    engine.add_adapter("late", folder, texts)
    assert engine.adapter_names == engine.blend.names == ("math", "science", "code", "late")


def test_a_plan_that_others_have_made_stale_is_made_anew(engine: Engine, tmp_path: Path) -> None:
    late = read_adapter(save_adapter(tmp_path / "late", seed=9, r=5), "late")
    own = centroid_of("late", ["add the loop", "the loop"], engine.router.embedder)
    stacks = engine.adapters.plan_join(late)
    stacks.build()
    engine.remove_adapter("math")
    engine.adapters.join(late, own, stacks)
    assert engine.blend.names == ("science", "code", "late")
    alone = engine.generate("add", sampling=GREEDY, routing=RoutingParams.one("late"))
    engine.remove_adapter("science")
    assert engine.generate("add", sampling=GREEDY, routing=RoutingParams.one("late")).token_ids == alone.token_ids


def test_stacks_without_a_removed_adapter_are_built_beside_the_steps(engine: Engine, tmp_path: Path) -> None:
    routing = RoutingParams.one("code")
    before = engine.generate("add", sampling=GREEDY, routing=routing)
    running = engine.new_rows([[97]])
    engine.adapters.hold(running)
    engine.adapters.retire("math")
    assert engine.adapter_names == ("science", "code")
    assert engine.adapters.plan_drop() is None  # a running row uses it
    engine.adapters.drop_retired()
    assert "math" in engine.blend.names
    with pytest.raises(AdapterError, match="still used by running rows"):
        engine.add_adapter("math", "anywhere", ["add"])
    assert engine.adapters.release(running)
    assert not engine.adapters.release(running)
    stacks = engine.adapters.plan_drop()
    assert stacks is not None
    stacks.build()
    assert engine.generate("add", sampling=GREEDY, routing=routing).token_ids == before.token_ids
    engine.adapters.drop_retired(stacks)
    assert engine.blend.names == ("science", "code")
    assert engine.adapters.plan_drop() is None
    assert engine.generate("add", sampling=GREEDY, routing=routing).token_ids == before.token_ids


def test_an_adapter_takes_the_place_of_a_retired_one_of_its_name(engine: Engine, tmp_path: Path) -> None:
    other = read_adapter(save_adapter(tmp_path / "other", seed=77), "math")
    own = centroid_of("math", ["add the loop", "the loop"], engine.router.embedder)
    engine.adapters.retire("math")
    stale = engine.adapters.plan_drop()
    engine.adapters.join(other, own)
    assert engine.blend.names == engine.adapter_names == ("science", "code", "math")
    engine.adapters.drop_retired(stale)
    assert engine.blend.names == ("science", "code", "math")


def test_adapters_with_which_the_default_routing_cannot_decide_neither_come_nor_go(
    engine: Engine, equal_folders: dict[str, Path], embedder: object, tmp_path: Path
) -> None:
    params = RoutingParams(combine="linear")
    equal = [read_adapter(folder, name) for name, folder in equal_folders.items()]
    other = Engine(tiny_llama(), engine.tokenizer, equal, treadle.fit(SAMPLES, embedder, params))
    with pytest.raises(AdapterError, match=r"not possible with the adapters math, science, code, late: .*'linear'"):
        other.add_adapter("late", save_adapter(tmp_path / "late", r=7), ["add the loop", "the loop"])
    assert other.blend.names == other.adapter_names == tuple(SAMPLES)
