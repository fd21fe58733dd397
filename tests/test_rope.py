"""Longrope: a text's factors follow its own length, in any batch and in any chunks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from treadle.bundle.bundle import Bundle
from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.hf import routed
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.scoring import score_ids
from treadle.lora.adapter import read_adapter
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit

from conftest import SAMPLES, TINY, save_adapter

LIMIT = 24
LENGTHS = {"short": 5, "grows": 18, "at the limit": LIMIT, "just over": LIMIT + 1, "long": 40}
CHANGING = RoutingParams(every=1, window=4, temperature=5.0)
SAMPLING = SamplingParams(max_tokens=12)


def phi() -> transformers.Phi3ForCausalLM:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0], "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LIMIT, **factors}
    sizes = TINY | {"initializer_range": 0.2, "max_position_embeddings": 96}
    config = transformers.Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=LIMIT)
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def phi_engine(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, embedder: StaticEmbedder
) -> Engine:
    root = tmp_path_factory.mktemp("phi")
    targets = ["qkv_proj", "o_proj"]
    adapters = [
        read_adapter(save_adapter(root / name, phi(), seed=seed, target_modules=targets), name)
        for seed, name in enumerate(("one", "two"), 1)
    ]
    router = fit({"one": SAMPLES["math"], "two": SAMPLES["code"]}, embedder)
    return Engine(phi(), tokenizer, adapters, router)


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    generator = np.random.default_rng(0)
    return {name: generator.integers(97, 122, length).tolist() for name, length in LENGTHS.items()}


def tokens_in_chunks(engine: Engine, ids: Sequence[int], known: PrefixCache | None = None) -> tuple[int, ...]:
    """Generate from a prompt that is read seven tokens at a time."""
    (row,) = engine.new_rows([ids], sampling=SAMPLING, routing=CHANGING)
    batch = engine.new_batch(prefixes=known)
    reading = batch.begin([row])
    while not reading.is_finished:
        batch.read(reading, 7)
    while not row.is_finished:
        batch.step()
    return tuple(event.token_id for event in row.events)


def test_greedy_text_is_that_of_transformers_before_across_and_beyond_the_limit(
    phi_engine: Engine, prompts: dict[str, list[int]]
) -> None:
    plain = phi()
    for ids in prompts.values():
        expected = plain.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
        )[0, len(ids) :].tolist()
        (done,) = phi_engine.generate_ids([ids], sampling=SAMPLING, routing=RoutingParams.base())
        assert list(done.token_ids) == expected


def test_a_batch_is_its_rows_alone_and_a_text_scores_as_it_was_generated(
    phi_engine: Engine, prompts: dict[str, list[int]]
) -> None:
    together = phi_engine.generate_ids(list(prompts.values()), sampling=SAMPLING, routing=CHANGING)
    assert any(len(np.unique(done.weights.round(4), axis=0)) > 1 for done in together), "the weights never change"
    for ids, done in zip(prompts.values(), together, strict=True):
        (alone,) = phi_engine.generate_ids([ids], sampling=SAMPLING, routing=CHANGING)
        assert alone.token_ids == done.token_ids
        (scores,) = score_ids(phi_engine, [(ids, list(done.token_ids))], CHANGING)
        np.testing.assert_allclose(done.logprobs, scores, atol=1e-4)


def test_a_prompt_in_chunks_or_behind_a_known_beginning_reads_as_at_once(
    phi_engine: Engine, prompts: dict[str, list[int]]
) -> None:
    known = PrefixCache(10**7)
    for ids in prompts.values():
        (alone,) = phi_engine.generate_ids([ids], sampling=SAMPLING, routing=CHANGING)
        assert tokens_in_chunks(phi_engine, ids) == alone.token_ids
    for name in ("long", "at the limit"):  # keys of a long text are not those of a short one that begins alike
        beginning = prompts["long"][: LENGTHS[name]]
        (alone,) = phi_engine.generate_ids([beginning], sampling=SAMPLING, routing=CHANGING)
        assert tokens_in_chunks(phi_engine, beginning, known) == alone.token_ids


# The same model, called by code of transformers


def routed_tokens(engine: Engine, bundle: Bundle, ids: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    model = phi()
    width = max(map(len, ids))
    tokens = torch.tensor([[258] * (width - len(row)) + list(row) for row in ids])
    mask = (tokens != 258).long()
    with routed(model, bundle, tokenizer=engine.tokenizer, routing=CHANGING):
        made = model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return made[:, width:].tolist()


@pytest.fixture(scope="module")
def phi_bundle(phi_engine: Engine) -> Bundle:
    return Bundle(Path(), "phi", phi_engine.blend.adapters, phi_engine.router, {})


@pytest.mark.parametrize(("name", "count"), [("short", 12), ("grows", 7), ("just over", 12), ("long", 12)])
def test_transformers_generate_on_one_side_is_the_engine(
    phi_engine: Engine, phi_bundle: Bundle, prompts: dict[str, list[int]], name: str, count: int
) -> None:
    (expected,) = phi_engine.generate_ids([prompts[name]], sampling=SamplingParams(max_tokens=count), routing=CHANGING)
    assert routed_tokens(phi_engine, phi_bundle, [prompts[name]], count) == [list(expected.token_ids)]


@pytest.mark.parametrize("names", [["grows"], ["at the limit"], ["grows", "grows"], ["short", "long"]])
def test_transformers_generate_on_both_sides_is_refused_by_name(
    phi_engine: Engine, phi_bundle: Bundle, prompts: dict[str, list[int]], names: list[str]
) -> None:
    with pytest.raises(OptionError, match=rf"longrope.* more than {LIMIT} tokens"):
        routed_tokens(phi_engine, phi_bundle, [prompts[name] for name in names], 12)
