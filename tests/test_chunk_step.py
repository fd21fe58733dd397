"""A chunk of a prompt is read as the model's own forward reads it, for every architecture and combine."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from treadle.common.params import RoutingParams, SamplingParams
from treadle.common.transformers_names import cache_argument
from treadle.engine.batch import Batch
from treadle.engine.engine import Engine
from treadle.engine.runners.cpu.chunk import MAX_CHUNK_TOKENS, ChunkPass
from treadle.engine.runners.cpu.layouts import COLUMN_ROWS
from treadle.engine.runners.decoder import ARCHITECTURES
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.engine.sequence import Report, Row

from test_fast_step import build, folders, make_engine, step_of  # noqa: F401 - fixtures

IDS = [97 + index % 7 for index in range(150)]
ROUTINGS = {
    "causal": RoutingParams(every=2, prefill="causal", temperature=5.0),
    "base": RoutingParams.base(),
    "sum": RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.5}),
    "linear": RoutingParams(every=2, combine="linear", temperature=5.0),
    "paper": RoutingParams(every=2, combine="paper", temperature=5.0),
}


def read(engine: Engine, routing: RoutingParams, columns: int, report: Report | None = None) -> tuple[Row, Batch]:
    (row,) = engine.new_rows([IDS], sampling=SamplingParams(max_tokens=6), routing=routing, report=report)
    batch = engine.new_batch()
    reading = batch.begin([row])
    while not reading.is_finished:
        batch.read(reading, columns)
    while batch.rows:
        batch.step()
    return row, batch


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the chunks that our own pass reads."""
    seen: list[int] = []
    own = ChunkPass.run

    def noted(chunk: ChunkPass, given: PassInput) -> PassOutput:
        seen.append(given.ids.shape[1])
        return own(chunk, given)

    monkeypatch.setattr(ChunkPass, "run", noted)
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("columns", [7, 32, MAX_CHUNK_TOKENS])
def test_a_chunk_is_forward(
    make_engine: Callable[..., Engine],  # noqa: F811
    chunks: list[int],
    name: str,
    columns: int,
) -> None:
    options = {"sliding_window": None} if name.startswith("Mistral") else {}
    fast, plain = (make_engine(build(name, **options), is_fast=is_fast) for is_fast in (True, False))
    for routing in ROUTINGS.values():
        chunks.clear()
        (own, _), (wanted, _) = read(fast, routing, columns), read(plain, routing, columns)
        assert chunks == [columns] * (len(IDS) // columns - 1) + [len(IDS) % columns]  # the first is not ours
        assert [each.token_id for each in own.events] == [each.token_id for each in wanted.events]
        logprobs = [[each.logprob for each in row.events] for row in (own, wanted)]
        np.testing.assert_allclose(*logprobs, atol=5e-5)


@pytest.mark.parametrize("columns", [8, 40])
def test_in_bfloat16_a_chunk_is_as_close_as_forward(chunks: list[int], columns: int) -> None:
    from treadle.engine.kv_cache import RowCache
    from treadle.lora.blend import attach

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


def test_a_prompt_that_is_scored_is_read_by_the_model(
    make_engine: Callable[..., Engine],  # noqa: F811
    chunks: list[int],
) -> None:
    row, _ = read(make_engine(build("LlamaForCausalLM"), is_fast=True), ROUTINGS["sum"], 16, Report(prompt=True))
    assert chunks == []
    assert len(row.prompt_scores) == len(IDS) - 1


def test_padded_rows_are_read_by_the_model(make_engine: Callable[..., Engine], chunks: list[int]) -> None:  # noqa: F811
    engine = make_engine(build("LlamaForCausalLM"), is_fast=True)
    rows = engine.new_rows([IDS, IDS[:40]], sampling=SamplingParams(max_tokens=2), routing=ROUTINGS["sum"])
    batch = engine.new_batch()
    reading = batch.begin(rows)
    while not reading.is_finished:
        batch.read(reading, 16)
    assert chunks == []
