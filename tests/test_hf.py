"""Whatever calls the model inside `routed` gets what the engine computes; outside, nothing has happened."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TextStreamer, pipeline

import treadle
from treadle.bundle.bundle import Bundle, read_bundle, save_bundle
from treadle.common.errors import AdapterError, ModelError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.common.transformers_names import cache_argument, find_cache
from treadle.engine.engine import Engine
from treadle.engine.hf import Routed, routed
from treadle.engine.tokenization import Detokenizer
from treadle.lora.adapter import read_adapter
from treadle.routing.fitting import fit
from treadle.routing.router import Router

from conftest import BASE, SAMPLES, byte_tokenizer, tiny_llama

PROMPTS = ["add three plus four", "the planet", "def loop return list of the cell, and then some more text"]
STEPS = 14
GREEDY = SamplingParams(max_tokens=STEPS)
ROUTINGS = {
    "default": RoutingParams(),
    "every token": RoutingParams(every=1, temperature=5.0),
    "prompt only": RoutingParams(every=None),
    "causal": RoutingParams(every=3, prefill="causal", temperature=5.0),
    "window": RoutingParams(every=1, window=6, temperature=5.0),
    "causal window": RoutingParams(every=4, prefill="causal", window=5, temperature=5.0),
    "without the base": RoutingParams(every=2, temperature=5.0, fallback=False),
    "boosted": RoutingParams(score="cosine", rule="boosted", every=1),
    "fixed": RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.5}),
    "base": RoutingParams.base(),
}
CAUSAL = RoutingParams(every=1, prefill="causal", temperature=5.0)
EVERY = ROUTINGS["every token"]
every_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, adapter_folders, embedder) -> Path:
    target = tmp_path_factory.mktemp("hf") / "bundle"
    return save_bundle(target, base=BASE, adapters=adapter_folders, router=fit(SAMPLES, embedder))


@pytest.fixture
def bundle(adapter_folders, router) -> Bundle:
    adapters = tuple(read_adapter(path, name) for name, path in adapter_folders.items())
    return Bundle(Path(), BASE, adapters, router, {})


@pytest.fixture
def reference(tokenizer, bundle) -> Engine:
    """An engine on another copy of the same model."""
    return Engine(tiny_llama(), tokenizer, bundle.adapters, bundle.router)


@pytest.fixture
def plain(model, tokenizer) -> Iterator[Any]:
    """The model; after each test it must be as it was."""
    before = dict(model.named_modules())
    yield model
    assert dict(model.named_modules()) == before  # modules compare by identity
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


class Watch(LogitsProcessor):
    """Keeps the handle's weights at each step: those of the pass that gave the token."""

    def __init__(self, handle: Routed) -> None:
        self.handle = handle
        self.weights: list[np.ndarray] = []  # (B, N) a step

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.weights.append(self.handle.weights)
        return scores


def encode(tokenizer: Any, prompts: str | list[str]) -> Any:
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)


def run(model: Any, handle: Routed, inputs: Any, **options: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Return the new tokens (B, T) and the weights (B, T, N) that gave them."""
    watch = Watch(handle)
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    ids = model.generate(**inputs, logits_processor=LogitsProcessorList([watch]), **options)
    return ids[:, inputs["input_ids"].shape[1] :], np.stack(watch.weights, 1)


def check(done: Any, tokens: torch.Tensor, weights: np.ndarray) -> None:
    """A row's tokens and weights are those of a completion; after its end there is padding only."""
    count = len(done.token_ids)
    assert tokens[:count].tolist() == list(done.token_ids)
    assert (tokens[count:] == 258).all()
    np.testing.assert_allclose(weights[:count], done.weights, atol=1e-6)


# generate is the engine


@every_routing
def test_greedy_generate_is_the_engine(plain, bundle, reference, tokenizer, routing) -> None:
    done = reference.generate(PROMPTS[2], sampling=GREEDY, routing=routing)
    with routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
        tokens, weights = run(plain, handle, encode(tokenizer, PROMPTS[2]))
    check(done, tokens[0], weights[0])


@every_routing
def test_a_left_padded_batch_is_the_engine(plain, bundle, reference, tokenizer, routing) -> None:
    together = reference.generate(PROMPTS, sampling=GREEDY, routing=routing)
    with routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
        tokens, weights = run(plain, handle, encode(tokenizer, PROMPTS))
    for index, done in enumerate(together):
        check(done, tokens[index], weights[index])


def test_routing_matters_and_moves(plain, bundle, tokenizer) -> None:
    inputs = encode(tokenizer, PROMPTS[0])
    base = plain.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        tokens, weights = run(plain, handle, inputs)
    assert tokens.tolist() != base.tolist()
    assert np.abs(np.diff(weights[0], axis=0)).max() > 0.01


def test_rows_that_have_ended_do_not_disturb_the_others(plain, bundle, reference, tokenizer) -> None:
    free = reference.generate(PROMPTS, sampling=GREEDY, routing=EVERY)
    ends = [257, free[0].token_ids[4]]
    reference.model.generation_config.eos_token_id = ends
    together = reference.generate(PROMPTS, sampling=GREEDY, routing=EVERY)
    assert len({len(done.token_ids) for done in together}) > 1
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        tokens, weights = run(plain, handle, encode(tokenizer, PROMPTS), eos_token_id=ends)
    for index, done in enumerate(together):
        check(done, tokens[index], weights[index])


def test_a_bundle_folder_and_its_routing_and_tokenizer_are_the_defaults(
    plain, folder, tokenizer, reference, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("TREADLE_HOME", str(tmp_path))  # where the bundle's base is found
    for part in (tokenizer, plain.config):
        part.save_pretrained(tmp_path / "models" / BASE)
    done = reference.generate(PROMPTS[0], sampling=GREEDY)
    with routed(plain, folder) as handle:
        assert handle.names == read_bundle(folder).router.names
        assert handle.weights.shape == (0, 3)
        tokens, weights = run(plain, handle, encode(tokenizer, PROMPTS[0]))
    check(done, tokens[0], weights[0])


def test_sampling_with_a_seed_is_reproducible(plain, bundle, tokenizer) -> None:
    inputs = encode(tokenizer, PROMPTS)
    texts = []
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            tokens, _ = run(plain, handle, inputs, do_sample=True, temperature=1.5, num_return_sequences=2)
            texts.append(tokens.tolist())
    assert len(texts[0]) == 6
    assert texts[0] == texts[1] != texts[2]


def test_sampled_rows_have_the_weights_of_their_own_text(plain, bundle, reference, tokenizer) -> None:
    inputs = encode(tokenizer, PROMPTS[0])
    prompt = inputs["input_ids"][0].tolist()
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        torch.manual_seed(0)
        tokens, weights = run(plain, handle, inputs, do_sample=True, temperature=1.5, num_return_sequences=3)
    assert len(set(map(tuple, tokens.tolist()))) == 3
    for row, found in zip(tokens.tolist(), weights, strict=True):
        ids = prompt + row[: row.index(257)] if 257 in row else prompt + row[:-1]
        expected = trace(reference, ids, len(prompt), EVERY)[len(prompt) - 1 :]
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-6)


def trace(engine: Engine, ids: list[int], prompt_tokens: int, routing: RoutingParams) -> np.ndarray:
    """Return the weights (T, N) of each token of a text."""
    text = Detokenizer(engine.tokenizer)
    return engine.router.trace([text.push(token_id) for token_id in ids], prompt_tokens, routing)


def test_a_streamer_and_a_pipeline_say_what_the_engine_says(plain, bundle, reference, tokenizer, capsys) -> None:
    done = reference.generate(PROMPTS[0], sampling=GREEDY)
    inputs = encode(tokenizer, PROMPTS[0])
    with routed(plain, bundle, tokenizer=tokenizer):
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        plain.generate(**inputs, max_new_tokens=STEPS, do_sample=False, streamer=streamer)
        assert capsys.readouterr().out.rstrip("\n") == done.text.rstrip("\n")
        pipe = pipeline("text-generation", model=plain, tokenizer=tokenizer, device="cpu")
        (said,) = pipe(PROMPTS[0], return_full_text=False, max_new_tokens=STEPS, do_sample=False)
    assert said["generated_text"] == done.text


CHAT = [{"role": "user", "content": "add three plus four"}]
CODED = "{% for m in messages %}<unused>{{ m.role }} def loop\n{{ m.content }}<end>\n{% endfor %}<unused>assistant\n"


@pytest.mark.parametrize("name", ["default", "every token", "causal", "window"])
def test_a_pipeline_of_messages_is_the_engines_chat(plain, bundle, reference, name) -> None:
    reference.tokenizer = tokenizer = byte_tokenizer()
    tokenizer.chat_template = CODED
    done = reference.generate(CHAT, sampling=GREEDY, routing=ROUTINGS[name])
    with routed(plain, bundle, tokenizer=tokenizer, routing=ROUTINGS[name]) as handle:
        pipe = pipeline("text-generation", model=plain, tokenizer=tokenizer, device="cpu")
        (said,) = pipe(CHAT, max_new_tokens=1, do_sample=False)
        np.testing.assert_allclose(handle.weights[0], done.weights[0], atol=1e-6)
        (said,) = pipe(CHAT, return_full_text=False, max_new_tokens=STEPS, do_sample=False)
        np.testing.assert_allclose(handle.weights[0], done.weights[-1], atol=1e-6)
    assert said["generated_text"] == done.text


def test_a_chat_that_goes_on_in_its_cache_says_what_its_messages_do(plain, bundle, reference) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CODED
    routing = RoutingParams(every=1)
    turns = [*CHAT, {"role": "assistant", "content": "heat"}, {"role": "user", "content": "the planet"}]
    first, both = (
        tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in (CHAT, turns)
    )
    with torch.inference_mode(), routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
        read = plain(torch.tensor([first]), use_cache=True)
        plain(torch.tensor([both[len(first) :]]), use_cache=True, **{cache_argument(plain): find_cache(read)})
    router = bundle.router
    text = "add three plus four\n\nheat\n\nthe planet"  # the first call's is the prompt
    expected = router.weigh(router.see([text], is_running=True), routing)[0]
    np.testing.assert_allclose(handle.weights[0], expected, atol=1e-5)


def test_beams_of_a_chat_are_followed(plain, bundle) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CODED
    inputs = tokenizer.apply_chat_template([CHAT], add_generation_prompt=True, return_tensors="pt")
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        ids = plain.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
    assert handle.weights.shape == (3, 3)


# Calls without a cache


@every_routing
def test_a_plain_forward_reads_the_whole_text_as_prompt(plain, bundle, reference, tokenizer, routing) -> None:
    inputs = encode(tokenizer, PROMPTS)
    with torch.inference_mode(), routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
        logits = plain(**inputs, use_cache=False).logits
        weights = handle.weights
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt).input_ids
        expected = trace(reference, ids, len(ids), routing)
        with torch.inference_mode(), reference.blend.using(expected[None]):
            alone = reference.model(torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(weights[index], expected[-1], atol=1e-6)
        np.testing.assert_allclose(logits[index, -len(ids) :], alone, atol=2e-4)


def test_generate_without_a_cache_takes_all_text_so_far_for_the_prompt(plain, bundle, reference, tokenizer) -> None:
    inputs = encode(tokenizer, PROMPTS[0])
    prompt = inputs["input_ids"][0].tolist()
    with routed(plain, bundle, tokenizer=tokenizer) as handle:
        tokens, weights = run(plain, handle, inputs, use_cache=False)
    for index in range(STEPS):
        ids = prompt + tokens[0, :index].tolist()
        np.testing.assert_allclose(weights[0, index], trace(reference, ids, len(ids), RoutingParams())[-1], atol=1e-6)


def test_causal_weights_are_the_same_with_and_without_a_cache(plain, bundle, tokenizer) -> None:
    with routed(plain, bundle, tokenizer=tokenizer, routing=CAUSAL) as handle:
        cached = run(plain, handle, encode(tokenizer, PROMPTS))
        whole = run(plain, handle, encode(tokenizer, PROMPTS), use_cache=False)
    assert torch.equal(cached[0], whole[0])
    np.testing.assert_allclose(cached[1], whole[1], atol=1e-6)


def test_right_padding_without_a_mask_is_no_text(plain, bundle, tokenizer) -> None:
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    longest = max(map(len, ids))
    routing = RoutingParams(window=5)  # zeros would fill it
    with routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
        alone = []
        for each in ids:
            plain(torch.tensor([each]))
            alone.append(handle.weights[0])
        plain(torch.tensor([each + [0] * (longest - len(each)) for each in ids]))
        np.testing.assert_allclose(handle.weights, alone, atol=1e-6)
        plain(torch.tensor([ids[0] + [0]]))  # a row alone has no padding
        assert np.abs(handle.weights - alone[0]).max() > 1e-4


def test_lm_eval_is_routed(plain, bundle, reference, tokenizer) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    pairs = [(prompt, " " + word) for prompt, word in zip(PROMPTS, ["planet", "add", "cell"], strict=True)]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    with routed(plain, bundle, tokenizer=tokenizer, routing=CAUSAL):
        lm = huggingface.HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=3, max_length=256)
        results = lm.loglikelihood(requests, disable_tqdm=True)
        until = Instance("generate_until", {}, (PROMPTS[0], {"until": ["\x00"], "max_gen_toks": STEPS}), 0)
        (text,) = lm.generate_until([until], disable_tqdm=True)
    expected = reference.score(*map(list, zip(*pairs, strict=True)), routing=CAUSAL)
    np.testing.assert_allclose([found for found, _ in results], [each.sum() for each in expected], atol=1e-3)
    assert text == reference.generate(PROMPTS[0], sampling=GREEDY, routing=CAUSAL).text


# Rows that move


def test_beam_search_is_followed(plain, bundle, tokenizer, monkeypatch) -> None:
    moves = []
    reorder = DynamicCache.reorder_cache
    monkeypatch.setattr(
        DynamicCache, "reorder_cache", lambda cache, index: (moves.append(index.tolist()), reorder(cache, index))
    )
    inputs = encode(tokenizer, PROMPTS[:2])
    with routed(plain, bundle, tokenizer=tokenizer, routing=CAUSAL):
        options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
        cached = plain.generate(**inputs, **options)
        whole = plain.generate(**inputs, **options, use_cache=False)
    assert any(sorted(move) != move for move in moves)  # moved
    assert any(len(set(move[:3])) < 3 for move in moves[1:])  # repeated
    assert torch.equal(cached, whole)


@torch.inference_mode()
def step(model: Any, cache: Any, ids: list[int], past: int) -> None:
    mask = torch.ones(len(ids), past + 1, dtype=torch.long)
    model(torch.tensor(ids)[:, None], attention_mask=mask, use_cache=True, **{cache_argument(model): cache})


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [2, 0], [0, 0, 1, 1, 2, 2]])
@torch.inference_mode()
def test_rows_keep_their_text_wherever_they_go(plain, bundle, reference, tokenizer, order) -> None:
    texts = [tokenizer(text).input_ids for text in ("add three four", "the planet cel", "def loop retur")]
    news = [tokenizer("abcdefgh"[: len(order)]).input_ids, tokenizer("zyxwvuts"[: len(order)]).input_ids]
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        cache = find_cache(plain(torch.tensor(texts), use_cache=True))
        step(plain, cache, [65, 66, 67], len(texts[0]))
        cache.batch_select_indices(torch.tensor(order))
        for index, new in enumerate(news):
            step(plain, cache, new, len(texts[0]) + 1 + index)
            for place, row in enumerate(order):
                ids = texts[row] + [65 + row] + [each[place] for each in news[: index + 1]]
                expected = trace(reference, ids, len(texts[row]), EVERY)[-1]
                np.testing.assert_allclose(handle.weights[place], expected, atol=1e-6)


@torch.inference_mode()
def test_a_row_forgets_what_was_cropped(plain, bundle, reference, tokenizer) -> None:
    ids = tokenizer("the planet").input_ids
    padded, mask = [258] * 3 + ids, [0] * 3 + [1] * len(ids)
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        cache = find_cache(plain(torch.tensor([padded]), attention_mask=torch.tensor([mask]), use_cache=True))
        step(plain, cache, [70], len(padded))
        step(plain, cache, [71], len(padded) + 1)
        cache.crop(-2)
        cache.batch_repeat_interleave(2)
        step(plain, cache, [72, 73], len(padded))
        for weights, new in zip(handle.weights, (72, 73), strict=True):
            np.testing.assert_allclose(weights, trace(reference, [*ids, new], len(ids), EVERY)[-1], atol=1e-6)


@torch.inference_mode()
def test_rows_that_cannot_be_told_apart_are_refused(plain, bundle, tokenizer) -> None:
    ids = torch.tensor([tokenizer(text).input_ids for text in ("add three", "the plane")])
    outside = find_cache(plain(ids, use_cache=True))
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        for spoil in (
            lambda cache: cache.layers[-1].keys.add_(1),
            lambda cache: cache.crop(-1),
            lambda cache: plain.model(ids, **{cache_argument(plain.model): cache}),  # read behind the hooks' back
        ):
            cache = find_cache(plain(ids, use_cache=True))
            spoil(cache)
            for _ in range(2):  # a refusal does not make them known
                with pytest.raises(OptionError, match="Beam search"):
                    step(plain, cache, [1, 2], int(cache.get_seq_length()))
        for unknown in (outside, copy.deepcopy(find_cache(plain(ids, use_cache=True)))):
            with pytest.raises(OptionError, match="a copied cache, one filled outside"):
                step(plain, unknown, [1, 2], ids.shape[1])
        cache = find_cache(plain(ids, use_cache=True))  # all is well afterwards
        step(plain, cache, [1, 2], ids.shape[1])
        assert handle.weights.shape == (2, 3)


@torch.inference_mode()
def test_two_caches_may_take_turns(plain, bundle, reference, tokenizer) -> None:
    texts = [tokenizer(text).input_ids for text in PROMPTS[:2]]
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        caches = [find_cache(plain(torch.tensor([ids]), use_cache=True)) for ids in texts]
        for added in range(1, 4):
            for ids, cache in zip(texts, caches, strict=True):
                step(plain, cache, [70], len(ids) + added - 1)
                expected = trace(reference, ids + [70] * added, len(ids), EVERY)[-1]
                np.testing.assert_allclose(handle.weights[0], expected, atol=1e-6)


# Several new tokens at once


@every_routing
@torch.inference_mode()
def test_several_tokens_on_a_cache_are_running_text(plain, bundle, reference, tokenizer, routing) -> None:
    texts = [tokenizer(text).input_ids for text in ("add three four", "def loop retur")]
    more = [tokenizer(text).input_ids for text in ("the planet", "return add")]
    with routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
        cache = find_cache(plain(torch.tensor(texts), use_cache=True))
        logits = plain(torch.tensor(more), use_cache=True, **{cache_argument(plain): cache}).logits
        weights = handle.weights
    for index in range(2):
        ids = texts[index] + more[index]
        expected = trace(reference, ids, len(texts[index]), routing)
        with reference.blend.using(expected[None]):
            whole = reference.model(torch.tensor([ids])).logits[0, len(texts[index]) :]
        np.testing.assert_allclose(weights[index], expected[-1], atol=1e-6)
        np.testing.assert_allclose(logits[index], whole, atol=2e-4)


@pytest.mark.parametrize("name", ["default", "causal", "window"])
@pytest.mark.parametrize("assistant", [True, False], ids=["assistant", "prompt lookup"])
def test_assisted_decoding_says_what_greedy_decoding_says(plain, bundle, reference, tokenizer, assistant, name) -> None:
    prompt = "the planet and the planet and the pla"  # a look-up finds candidates at once
    done = reference.generate(prompt, sampling=GREEDY, routing=ROUTINGS[name])
    helper = {"assistant_model": tiny_llama()} if assistant else {"prompt_lookup_num_tokens": 4}
    sizes: list[int] = []
    watch = plain.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    inputs = encode(tokenizer, prompt)
    with routed(plain, bundle, tokenizer=tokenizer, routing=ROUTINGS[name]):
        ids = plain.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **helper)[
            0, inputs["input_ids"].shape[1] :
        ]
    watch.remove()
    assert sizes[0] > inputs["input_ids"].shape[1]
    assert ids.tolist() == list(done.token_ids)


def test_a_chat_may_go_on_from_its_cache(plain, bundle, reference, tokenizer) -> None:
    inputs = encode(tokenizer, PROMPTS[0])
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
        first = plain.generate(**inputs, **options)
        ids = torch.cat([first.sequences, torch.tensor([tokenizer(" the atom").input_ids])], 1)
        mask = torch.ones_like(ids)
        second = plain.generate(ids, attention_mask=mask, **options, **{cache_argument(plain): find_cache(first)})
    expected = trace(reference, second.sequences[0, :-1].tolist(), inputs["input_ids"].shape[1], EVERY)[-1]
    np.testing.assert_allclose(handle.weights[0], expected, atol=1e-6)


# What is refused, and what is left


def test_an_error_inside_leaves_the_model_as_it_was(plain, bundle, tokenizer) -> None:
    with pytest.raises(ZeroDivisionError), routed(plain, bundle, tokenizer=tokenizer) as handle:
        assert plain(torch.tensor([[1, 2, 3]])).logits.shape[0] / (len(handle.weights) - 1)
    with pytest.raises(IndexError), routed(plain, bundle, tokenizer=tokenizer):
        plain(torch.tensor([[1, 2, 999]]))  # the model itself fails


def test_a_failed_pass_leaves_no_gates(plain, bundle, tokenizer) -> None:
    with torch.inference_mode(), routed(plain, bundle, tokenizer=tokenizer):
        for ids in ([[1, 2, 3]], [[1, 2, 999]]):
            try:
                plain(torch.tensor(ids))
            except IndexError:
                assert ids[0][-1] == 999
            inner = plain.lm_head(plain.model(torch.tensor([[1, 2, 3]])).last_hidden_state)
            assert torch.equal(inner, tiny_llama()(torch.tensor([[1, 2, 3]])).logits)


def test_a_second_context_on_the_same_model_is_refused(plain, bundle, tokenizer, reference) -> None:
    with routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        with pytest.raises(AdapterError, match="attached already"), routed(plain, bundle, tokenizer=tokenizer):
            pass
        tokens, weights = run(plain, handle, encode(tokenizer, PROMPTS[0]))
    check(reference.generate(PROMPTS[0], sampling=GREEDY, routing=EVERY), tokens[0], weights[0])


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (RoutingParams(past="recompute"), "past='recompute'"),
        (RoutingParams.one("physics"), "unknown adapter 'physics'"),
        (RoutingParams(combine="linear"), "equal ranks and target modules"),
    ],
)
def test_routings_that_do_not_fit_are_refused(plain, bundle, tokenizer, routing, message) -> None:
    bundle = replace(bundle, router=Router(bundle.router.centroids, bundle.router.embedder, routing))
    with pytest.raises(treadle.TreadleError, match=message), routed(plain, bundle, tokenizer=tokenizer):
        pytest.fail("the context was entered")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(inputs_embeds=torch.zeros(1, 3, 32)), "needs input_ids"),
        (lambda m: m.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2), "needs input_ids"),
        (lambda m: m(torch.ones(1, 3).long(), torch.ones(1, 1, 3, 3).bool()), "attention masks of shape"),
        (
            lambda m: m.generate(torch.ones(1, 3).long(), max_new_tokens=2, cache_implementation="static"),
            "static cache_implementation",
        ),
    ],
)
def test_calls_whose_text_cannot_be_read_are_refused(plain, bundle, tokenizer, call, message) -> None:
    with routed(plain, bundle, tokenizer=tokenizer), pytest.raises(OptionError, match=message):
        call(plain)


def test_positions_that_count_tokens_change_nothing_and_others_are_refused(plain, bundle, tokenizer) -> None:
    ids, mask = torch.tensor([[258, 97, 98, 99], [97, 98, 99, 100]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with routed(plain, bundle, tokenizer=tokenizer) as handle, torch.no_grad():
        plain(ids, attention_mask=mask)
        expected = handle.weights
        plain(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        np.testing.assert_array_equal(handle.weights, expected)
        with pytest.raises(OptionError, match="position_ids jump inside a row"):
            plain(ids[1:], position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_a_model_without_a_key_value_cache_is_refused(plain, bundle, tokenizer) -> None:
    plain._is_stateful = True  # as transformers marks such models
    with pytest.raises(ModelError, match="recurrent state"), routed(plain, bundle, tokenizer=tokenizer):
        pass


def test_weights_are_a_copy(plain, bundle, tokenizer) -> None:
    with routed(plain, bundle, tokenizer=tokenizer) as handle:
        plain(torch.tensor([[1, 2, 3]]))
        handle.weights[:] = 7
        assert handle.weights.max() <= 1
        with pytest.raises(AttributeError):
            handle.weights = np.zeros((1, 3))


def test_a_tuple_as_output_is_followed(plain, bundle, reference, tokenizer) -> None:
    ids = tokenizer(PROMPTS[0]).input_ids
    with torch.inference_mode(), routed(plain, bundle, tokenizer=tokenizer, routing=EVERY) as handle:
        _, cache = plain(torch.tensor([ids]), use_cache=True, return_dict=False)
        step(plain, cache, [70], len(ids))
        np.testing.assert_allclose(handle.weights[0], trace(reference, [*ids, 70], len(ids), EVERY)[-1], atol=1e-6)
