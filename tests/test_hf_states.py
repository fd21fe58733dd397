"""Inside `routed` the base model's states decide what they decide in the engine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hf import STEPS, encode, run
from test_states import PROMPTS, SURE, every_routing
from transformers import DynamicCache

from treadle.bundle.bundle import Bundle
from treadle.common.errors import ModelError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.common.transformers_names import cache_argument, find_cache
from treadle.engine.engine import Engine
from treadle.engine.hf import routed
from treadle.engine.scoring import score_ids
from treadle.lora.adapter import Adapter
from treadle.routing.router import Router
from treadle.routing.states import StateClasses

from conftest import BASE, tiny_llama

GREEDY = SamplingParams(max_tokens=STEPS)
TEXTS = [*PROMPTS, "add three plus " * 8]


@pytest.fixture
def bundle(adapters: list[Adapter], router: Router, classes: StateClasses) -> Bundle:
    return Bundle(Path(), BASE, tuple(adapters), replace(router, states=classes), {})


@pytest.fixture
def reference(tokenizer, bundle: Bundle) -> Engine:
    return Engine(tiny_llama(), tokenizer, bundle.adapters, bundle.router)


@pytest.fixture
def plain() -> Iterator[Any]:
    """The model; after each test it must be as it was."""
    model = tiny_llama()
    before = dict(model.named_modules())
    yield model
    assert dict(model.named_modules()) == before
    hooks = [each for module in model.modules() for each in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks


def check(done: Any, tokens: torch.Tensor, weights: np.ndarray) -> None:
    count = len(done.token_ids)
    assert tokens[:count].tolist() == list(done.token_ids)
    np.testing.assert_allclose(weights[:count], done.weights, atol=2e-4)


@every_routing
def test_greedy_generate_is_the_engine(plain, bundle, reference, tokenizer, routing: RoutingParams) -> None:
    for text in TEXTS:
        done = reference.generate(text, sampling=GREEDY, routing=routing)
        with routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
            tokens, weights = run(plain, handle, encode(tokenizer, text))
        check(done, tokens[0], weights[0])


@every_routing
def test_a_left_padded_batch_is_the_engine(plain, bundle, reference, tokenizer, routing: RoutingParams) -> None:
    together = reference.generate(TEXTS, sampling=GREEDY, routing=routing)
    with routed(plain, bundle, tokenizer=tokenizer, routing=routing) as handle:
        tokens, weights = run(plain, handle, encode(tokenizer, TEXTS))
    for index, done in enumerate(together):
        check(done, tokens[index], weights[index])


def test_these_texts_are_of_both_kinds(reference) -> None:
    """Some prompts are read again by the engine, others not."""
    by_text = reference.generate(TEXTS, sampling=GREEDY, routing=replace(SURE, states=False))
    by_states = reference.generate(TEXTS, sampling=GREEDY, routing=SURE)
    pairs = zip(by_text, by_states, strict=True)
    assert {bool((one.weights[0] == other.weights[0]).all()) for one, other in pairs} == {True, False}


def test_a_plain_forward_has_the_prompts_weights(plain, bundle, reference, tokenizer) -> None:
    for text in TEXTS:
        done = reference.generate(text, sampling=GREEDY, routing=SURE)
        with routed(plain, bundle, tokenizer=tokenizer, routing=SURE) as handle:
            logits = plain(encode(tokenizer, text)["input_ids"], use_cache=False).logits
            np.testing.assert_allclose(handle.weights[0], done.weights[0], atol=2e-4)
        assert logits[0, -1].argmax() == done.token_ids[0]
        logits.sum().backward()  # gradients flow as without routed


def weights_in_engine(engine: Engine, ids: list[int], prompt_tokens: int) -> np.ndarray:
    """Return the weights (N,) under which the engine reads the last of the tokens."""
    sampling = SamplingParams(max_tokens=len(ids) - prompt_tokens + 1)
    (row,) = engine.new_rows([ids[:prompt_tokens]], sampling=sampling, routing=SURE)
    row.forced = [*ids[prompt_tokens:], 0]
    batch = engine.new_batch(frozenset())
    batch.join([row])
    while batch.rows:
        batch.step()
    return row.events[-1].weights


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [2, 0], [0, 0, 1, 1, 2, 2]])
@torch.inference_mode()
def test_rows_keep_their_states_wherever_they_go(plain, bundle, reference, tokenizer, order) -> None:
    texts = [tokenizer(text).input_ids for text in ("add three four", "the planet cel", "def loop retur")]
    length, followed = len(texts[0]), [[65, 66, 67], list(range(70, 70 + len(order))), list(range(90, 90 + len(order)))]
    with routed(plain, bundle, tokenizer=tokenizer, routing=SURE) as handle:
        cache = find_cache(plain(torch.tensor(texts), use_cache=True))
        for index, ids in enumerate(followed):
            mask = torch.ones(len(ids), length + index + 1, dtype=torch.long)
            plain(torch.tensor(ids)[:, None], attention_mask=mask, use_cache=True, **{cache_argument(plain): cache})
            if not index:
                cache.batch_select_indices(torch.tensor(order))
                continue
            for place, row in enumerate(order):
                own = [*texts[row], followed[0][row], *(each[place] for each in followed[1 : index + 1])]
                expected = weights_in_engine(reference, own, length)
                np.testing.assert_allclose(handle.weights[place], expected, atol=2e-4)


def test_a_beams_score_is_the_engines(plain, bundle, reference, tokenizer) -> None:
    inputs = encode(tokenizer, PROMPTS[:2])
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False}
    with routed(plain, bundle, tokenizer=tokenizer, routing=SURE):
        found = plain.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    width = inputs["input_ids"].shape[1]
    for index, sequence in enumerate(found.sequences):
        prompt = tokenizer(PROMPTS[index // 3]).input_ids
        answer = [token for token in sequence[width:].tolist() if token != tokenizer.pad_token_id]
        (scored,) = score_ids(reference, [(prompt, answer)], SURE)
        np.testing.assert_allclose(found.sequences_scores[index] * len(answer), scored.sum(), atol=5e-3)


def in_chunks(model: Any, ids: torch.Tensor) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, prefill_chunk_size=5)


def with_candidates(model: Any, ids: torch.Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=3, **{cache_argument(model): DynamicCache()})


def two_at_once(model: Any, ids: torch.Tensor) -> None:
    cache = find_cache(model(ids, use_cache=True))
    model(ids[:, :2], use_cache=True, **{cache_argument(model): cache})


def cropped(model: Any, ids: torch.Tensor) -> None:
    cache = find_cache(model(ids, use_cache=True))
    cache.crop(-3)
    model(ids[:, :1], use_cache=True, **{cache_argument(model): cache})


@pytest.mark.parametrize("way", [in_chunks, with_candidates, two_at_once, cropped])
@torch.inference_mode()
def test_what_would_need_a_later_decision_is_refused(plain, bundle, tokenizer, way: Any) -> None:
    ids = torch.tensor([tokenizer("add three plus four").input_ids])
    with routed(plain, bundle, tokenizer=tokenizer, routing=SURE), pytest.raises(OptionError, match="states=False"):
        way(plain, ids)


def test_states_of_another_model_are_refused(plain, bundle, tokenizer, classes: StateClasses) -> None:
    other = replace(classes, centroids=replace(classes.centroids, embedder_id="states:llama-9x32:1"))
    wrong = replace(bundle, router=replace(bundle.router, states=other))
    with pytest.raises(ModelError, match="Fit the bundle again"), routed(plain, wrong, tokenizer=tokenizer):
        pass
