"""A chunk of a prompt is read as the model's own forward reads it, for every architecture and combine."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from treadle.common.params import RoutingParams, SamplingParams
from treadle.common.transformers_names import cache_argument
from treadle.engine.batch import Batch
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cpu.chunk import MAX_CHUNK_TOKENS, ChunkPass
from treadle.engine.runners.cpu.layouts import COLUMN_ROWS
from treadle.engine.runners.cpu.step import FastStep
from treadle.engine.runners.decoder import ARCHITECTURES
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.engine.runners.runner import Runner
from treadle.engine.sequence import OutputOptions, TokenSequence
from treadle.lora.blend import Blend, attach

from test_fast_step import MakeEngine, build, build_known, folders, make_engine, step_of  # noqa: F401 - fixtures

IDS = [97 + index % 7 for index in range(150)]
ROUTINGS = {
    "causal": RoutingParams(every=2, prefill="causal", temperature=5.0),
    "base": RoutingParams.base(),
    "sum": RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.5}),
    "linear": RoutingParams(every=2, combine="linear", temperature=5.0),
    "paper": RoutingParams(every=2, combine="paper", temperature=5.0),
}


def read(
    engine: Engine, routing: RoutingParams, columns: int, report: OutputOptions | None = None
) -> tuple[TokenSequence, Batch]:
    (row,) = engine.new_rows([IDS], sampling=SamplingParams(max_tokens=6), routing=routing, report=report)
    batch = engine.new_batch()
    reading = batch.begin([row])
    while not reading.is_finished:
        batch.read(reading, columns)
    while batch.rows:
        batch.step()
    return row, batch


class NotedChunks:
    """The chunk pass, which notes the sizes of the chunks that it reads."""

    def __init__(self, model: PreTrainedModel, blend: Blend) -> None:
        self.own = ChunkPass(model, blend)
        self.sizes: list[int] = []

    def takes(self, given: PassInput) -> bool:
        return self.own.takes(given)

    def run(self, given: PassInput) -> PassOutput:
        self.sizes.append(given.ids.shape[1])
        return self.own.run(given)


def fast_engine(make_engine: MakeEngine, name: str) -> tuple[Engine, list[int]]:  # noqa: F811
    """Return an engine with passes of our own, and the list that grows by the size of each chunk."""
    engine = make_engine(build_known(name), is_fast=True)
    chunks = NotedChunks(engine.model, engine.blend)
    engine.runner = Runner(engine.model, engine.blend, [FastStep(engine.model, engine.blend), chunks])
    return engine, chunks.sizes


@pytest.fixture(scope="module")
def plain_rows(make_engine: MakeEngine) -> Callable[[str], list[TokenSequence]]:  # noqa: F811
    """The rows of each routing as a model's own forward reads and continues them; made once a module."""

    @cache
    def rows(name: str) -> list[TokenSequence]:
        engine = make_engine(build_known(name), is_fast=False)
        return [read(engine, routing, MAX_CHUNK_TOKENS)[0] for routing in ROUTINGS.values()]

    return rows


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("columns", [7, 32, MAX_CHUNK_TOKENS])
def test_a_chunk_is_forward(
    make_engine: MakeEngine,  # noqa: F811
    plain_rows: Callable[[str], list[TokenSequence]],
    name: str,
    columns: int,
) -> None:
    engine, chunks = fast_engine(make_engine, name)
    for routing, wanted in zip(ROUTINGS.values(), plain_rows(name), strict=True):
        chunks.clear()
        own, _ = read(engine, routing, columns)
        assert chunks == [columns] * (len(IDS) // columns - 1) + [len(IDS) % columns]  # the first is not ours
        assert [each.token_id for each in own.events] == [each.token_id for each in wanted.events]
        logprobs = [[each.logprob for each in row.events] for row in (own, wanted)]
        np.testing.assert_allclose(*logprobs, atol=5e-5)


@pytest.mark.parametrize("columns", [8, 40])
def test_in_bfloat16_a_chunk_is_as_close_as_forward(columns: int) -> None:
    exact, rounded = build("LlamaForCausalLM"), build("LlamaForCausalLM", torch.bfloat16)
    ids = torch.tensor([IDS[: 30 + columns]])
    attached = {model: attach(model, []) for model in (exact, rounded)}
    caches = [RowCache(), RowCache()]
    with torch.inference_mode():
        wanted = exact(input_ids=ids, logits_to_keep=1).logits[:, -1]
        plain = rounded(input_ids=ids, logits_to_keep=1).logits[:, -1]
        for model, cache in ((rounded, caches[0]), (exact, caches[1])):
            model(input_ids=ids[:, :30], use_cache=True, **{cache_argument(model): cache})
        fast, equal = (
            ChunkPass(model, attached[model]).run(step_of(ids[:, 30:], cache)).logits[:, 0]
            for model, cache in zip((rounded, exact), caches, strict=True)
        )
    torch.testing.assert_close(equal, wanted, atol=1e-5, rtol=1e-5)
    assert columns not in COLUMN_ROWS[torch.bfloat16] or columns == 8  # both ways are tried
    assert (fast - wanted).abs().mean() < 1.5 * (plain - wanted).abs().mean()


def test_a_prompt_that_is_scored_is_read_by_the_model(make_engine: MakeEngine) -> None:  # noqa: F811
    engine, chunks = fast_engine(make_engine, "LlamaForCausalLM")
    row, _ = read(engine, ROUTINGS["sum"], 16, OutputOptions(prompt=True))
    assert chunks == []
    assert len(row.prompt_scores) == len(IDS) - 1


def test_padded_rows_are_read_by_the_model(make_engine: MakeEngine) -> None:  # noqa: F811
    engine, chunks = fast_engine(make_engine, "LlamaForCausalLM")
    rows = engine.new_rows([IDS, IDS[:40]], sampling=SamplingParams(max_tokens=2), routing=ROUTINGS["sum"])
    batch = engine.new_batch()
    reading = batch.begin(rows)
    while not reading.is_finished:
        batch.read(reading, 16)
    assert chunks == []
