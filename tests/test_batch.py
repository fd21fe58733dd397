"""Prompts that are read in chunks, what a row reports, and what rows that begin alike share."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.batch import Batch
from treadle.engine.engine import Engine
from treadle.engine.prefix_cache import PrefixCache, PrefixCopy
from treadle.engine.sequence import OutputOptions, TokenSequence
from treadle.engine.tokenization import prompt_ids

from conftest import SAMPLES, save_adapter

PROMPTS = ["add three plus four and the sum of the atom heat", "def loop", "the planet heat cell, return list " * 4]
ROUTINGS = {
    "routed": RoutingParams(every=2, temperature=5.0),
    "causal": RoutingParams(every=2, prefill="causal", temperature=5.0),
    "adapters alone": RoutingParams(every=3, prefill="causal", temperature=5.0, fallback=False),
    "fixed": RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.4}),
    "one": RoutingParams.one("science"),
    "base": RoutingParams.base(),
    "recompute": RoutingParams(every=3, past="recompute", temperature=4.0),
}
SAMPLING = SamplingParams(max_tokens=12)
every_routing = pytest.mark.parametrize("name", ROUTINGS)


def make_row(engine: Engine, text: str, routing: RoutingParams, report: OutputOptions | None = None) -> TokenSequence:
    ids = prompt_ids(engine.tokenizer, text)
    (row,) = engine.new_rows([ids], sampling=SAMPLING, routing=routing, report=report)
    return row


def finish(batch: Batch) -> None:
    while batch.rows:
        batch.step()


def read(batch: Batch, rows: Sequence[TokenSequence], num_columns: int | None = None) -> None:
    reading = batch.begin(rows)
    while not reading.is_finished:
        batch.read(reading, num_columns)


def assert_same(row: TokenSequence, other: TokenSequence) -> None:
    assert row.ids == other.ids
    logprobs = [[event.logprob for event in each.events] for each in (row, other)]
    np.testing.assert_allclose(*logprobs, atol=1e-4)
    for ours, theirs in zip(row.events, other.events, strict=True):
        np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-6)


@every_routing
@pytest.mark.parametrize("num_columns", [1, 7, 1000])
def test_reading_in_chunks_is_reading_at_once(engine: Engine, name: str, num_columns: int) -> None:
    whole = [make_row(engine, prompt, ROUTINGS[name]) for prompt in PROMPTS]
    parts = [make_row(engine, prompt, ROUTINGS[name]) for prompt in PROMPTS]
    for rows, columns in ((whole, None), (parts, num_columns)):
        batch = engine.new_batch()
        read(batch, rows, columns)
        finish(batch)
    for row, other in zip(parts, whole, strict=True):
        assert_same(row, other)


def test_running_rows_do_not_notice_a_prompt_that_is_read_between_their_steps(engine: Engine) -> None:
    alone = make_row(engine, PROMPTS[0], ROUTINGS["routed"])
    batch = engine.new_batch()
    batch.join([alone])
    finish(batch)
    running, late = (make_row(engine, prompt, ROUTINGS["routed"]) for prompt in (PROMPTS[0], PROMPTS[2]))
    batch.join([running])
    reading = batch.begin([late])
    steps = 0
    while not reading.is_finished:
        assert batch.read(reading, 16) == [] or reading.is_finished
        batch.step()
        steps += 1
    finish(batch)
    assert steps == -(-len(PROMPTS[2]) // 16)
    assert_same(running, alone)
    assert late.is_finished


def uncached_logprobs(engine: Engine, row: TokenSequence) -> torch.Tensor:
    """(T - 1, V) under the weights of a row that never change."""
    weights = np.zeros(len(engine.blend.names), np.float32)
    weights[:] = row.weights
    with engine.blend.using(weights if weights.any() else None), torch.inference_mode():
        return engine.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", ["fixed", "one", "base"])
@pytest.mark.parametrize("num_columns", [5, None])
def test_a_report_is_what_an_uncached_forward_says(engine: Engine, name: str, num_columns: int | None) -> None:
    rows = [make_row(engine, prompt, ROUTINGS[name], OutputOptions(likeliest=3, prompt=True)) for prompt in PROMPTS[:2]]
    batch = engine.new_batch()
    read(batch, rows, num_columns)
    finish(batch)
    for row in rows:
        logprobs = uncached_logprobs(engine, row)
        expected = logprobs[torch.arange(len(row.ids) - 1), torch.tensor(row.ids[1:])]
        scores = [*(score.logprob for score in row.prompt_scores), *(event.logprob for event in row.events)]
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)
        tops = [*(score.likeliest for score in row.prompt_scores), *(event.likeliest for event in row.events)]
        values, tokens = logprobs[:-1].topk(3)
        assert [[token for token, _ in top] for top in tops] == tokens.tolist()
        np.testing.assert_allclose([[value for _, value in top] for top in tops], values.numpy(), atol=1e-4)


def test_nothing_is_reported_unasked(engine: Engine) -> None:
    asked, unasked = (
        make_row(engine, PROMPTS[0], ROUTINGS["base"], report) for report in (OutputOptions(likeliest=2), None)
    )
    batch = engine.new_batch()
    batch.join([asked, unasked])
    finish(batch)
    assert {len(event.likeliest) for event in asked.events} == {2}
    assert {len(event.likeliest) for event in unasked.events} == {0}
    assert unasked.prompt_scores == []


def run(
    engine: Engine, text: str, routing: RoutingParams, prefixes: PrefixCache | None, owner: str = ""
) -> TokenSequence:
    row = make_row(engine, text, routing)
    row.owner = owner
    batch = engine.new_batch(prefixes=prefixes)
    read(batch, [row], 16)
    finish(batch)
    return row


def test_output_with_reuse_is_output_without(engine: Engine) -> None:
    """Conversations with a common beginning, routed, fixed and base mixed, each turn continuing the one before."""
    prefixes = PrefixCache(1 << 24)
    system = "you add three plus four and return the list of planets. "
    reused: dict[str, int] = {name: 0 for name in ROUTINGS}
    texts = {name: system for name in ROUTINGS}
    for turn in ("add the sum", "what is an atom?", "def loop"):
        for name, routing in ROUTINGS.items():
            texts[name] += turn
            cached, plain = run(engine, texts[name], routing, prefixes), run(engine, texts[name], routing, None)
            assert_same(cached, plain)
            reused[name] += cached.reused
            texts[name] += "".join(event.text for event in cached.events if "\ufffd" not in event.text) + "\n"
    assert all(reused[name] > 2 * len(system) for name in ("causal", "adapters alone", "fixed", "one", "base"))
    assert reused["recompute"] == reused["routed"] == 0  # the weights of the whole prompt change with the prompt


def test_the_same_prompt_is_read_once_whatever_its_routing(engine: Engine) -> None:
    prefixes = PrefixCache(1 << 24)
    for name, routing in ROUTINGS.items():
        first, second = (run(engine, PROMPTS[2], routing, prefixes) for _ in range(2))
        assert_same(first, second)
        assert second.reused == len(PROMPTS[2]) - 1, name


def test_an_answer_is_kept_where_a_prompt_can_begin_with_it(engine: Engine) -> None:
    """A prompt that is weighed whole is read under one weight; an answer whose weights changed begins none."""
    for name, routing in ROUTINGS.items():
        prefixes = PrefixCache(1 << 24)
        row = run(engine, PROMPTS[2], routing, prefixes)
        (entry,) = prefixes.entries
        is_kept = name not in ("routed", "recompute")
        assert len(entry.text.ids) == (len(row.ids) - 1 if is_kept else row.prompt_tokens), name


def test_nothing_is_shared_between_adapters_weights_combines_or_owners(engine: Engine) -> None:
    prefixes = PrefixCache(1 << 24)
    run(engine, PROMPTS[2], RoutingParams.one("math"), prefixes, owner="a")
    for other in (
        RoutingParams.one("code"),
        RoutingParams.base(),
        RoutingParams(rule="fixed", fixed={"math": 0.999}),
        RoutingParams(rule="fixed", fixed={"math": 1.0, "code": 0.001}),
    ):
        assert run(engine, PROMPTS[2], other, prefixes, owner="a").reused == 0
    assert run(engine, PROMPTS[2], RoutingParams.one("math"), prefixes, owner="b").reused == 0
    assert run(engine, PROMPTS[2], RoutingParams.one("math"), prefixes, owner="a").reused == len(PROMPTS[2]) - 1


def test_the_texts_kept_are_so_many_and_each_is_one_piece_of_memory(engine: Engine) -> None:
    prefixes = PrefixCache(1 << 24, max_entries=3)
    texts = [f"{number} and so the list of planets" for number in range(5)]
    for text in texts:
        run(engine, text, RoutingParams.base(), prefixes)
    assert len(prefixes.entries) == 3
    reused = [run(engine, text, RoutingParams.base(), prefixes).reused for text in reversed(texts)]
    assert [bool(each) for each in reused] == [True, True, True, False, False]  # the newest are kept
    for entry in prefixes.entries:
        pieces = {each.untyped_storage().data_ptr() for pair in entry.states for each in pair}
        assert len(pieces) == 1
        assert entry.states[0][0].untyped_storage().nbytes() == entry.num_bytes


def test_a_text_that_is_read_in_chunks_is_copied_in_pieces(engine: Engine) -> None:
    """What a pass leaves uncopied comes with the next ones, and the last takes what is left."""
    batch = engine.new_batch()
    reading = batch.begin([make_row(engine, "a" * 47, RoutingParams.one("math"))])
    lagging, whole = PrefixCopy(47, 1 << 24), PrefixCopy(47, 1 << 24)
    for done in (5, 10, 47):
        batch.read(reading, 16)
        lagging.extend(reading.cache, 5 if done < 47 else 47)
        assert lagging.num_columns == done
    whole.extend(reading.cache)
    for copied, read_ in zip(chain(*lagging.states), chain(*whole.states), strict=True):
        assert torch.equal(copied, read_)
    for (copied, _), layer in zip(lagging.states, reading.cache.layers, strict=True):
        assert torch.equal(copied, cast(Tensor, layer.keys)[0])


@pytest.mark.parametrize(("max_bytes", "columns"), [(1 << 24, 16), (1 << 10, 0)])
def test_a_text_is_copied_as_it_is_read_if_it_can_be_kept(engine: Engine, max_bytes: int, columns: int) -> None:
    prefixes = PrefixCache(max_bytes)
    batch = engine.new_batch(prefixes=prefixes)
    reading = batch.begin([make_row(engine, "a" * 47, RoutingParams.one("math"))])
    batch.read(reading, 16)
    assert reading.copy is not None
    assert reading.copy.num_columns == columns
    batch.read(reading, 999)
    assert bool(prefixes.num_bytes) == bool(columns)


def test_an_adapter_replaced_under_its_name_is_another_one(engine: Engine, tmp_path: Path) -> None:
    prefixes = PrefixCache(1 << 24)
    params = {name: RoutingParams.one(name) for name in ("math", "code")} | {"base": RoutingParams.base()}
    for routing in params.values():
        run(engine, PROMPTS[2], routing, prefixes)
    engine.remove_adapter("code")
    engine.add_adapter("code", save_adapter(tmp_path / "other", seed=77), SAMPLES["code"])
    cached = run(engine, PROMPTS[2], params["code"], prefixes)
    assert cached.reused == 0
    assert_same(cached, run(engine, PROMPTS[2], params["code"], None))
    for name in ("math", "base"):
        assert run(engine, PROMPTS[2], params[name], prefixes).reused == len(PROMPTS[2]) - 1
    held = prefixes.num_bytes
    prefixes.forget(engine.blend.adapters)
    assert 0 < prefixes.num_bytes < held


def test_the_papers_combine_shares_only_among_the_same_adapters(equal_folders: dict[str, Path], engine: Engine) -> None:
    from treadle.lora.adapter import read_adapter

    from conftest import byte_tokenizer, tiny_llama

    equal = Engine(
        tiny_llama(), byte_tokenizer(), [read_adapter(f, n) for n, f in equal_folders.items()], engine.router
    )
    prefixes = PrefixCache(1 << 24)
    for combine, reused in (("paper", 0), ("linear", len(PROMPTS[2]) - 1)):
        routing = RoutingParams(rule="fixed", fixed={"math": 0.5, "science": 0.5}, combine=combine)
        run(equal, PROMPTS[2], routing, prefixes)
        assert run(equal, PROMPTS[2], routing, prefixes).reused == len(PROMPTS[2]) - 1
        if combine == "paper":
            removed = equal.router.centroids
            equal.remove_adapter("code")
            assert run(equal, PROMPTS[2], routing, prefixes).reused == reused
            own = removed.remove("math").remove("science")
            equal.adapters.join(read_adapter(equal_folders["code"], "code"), own)
            assert run(equal, PROMPTS[2], routing, prefixes).reused == len(PROMPTS[2]) - 1  # the same as before


def test_the_oldest_texts_go_when_there_is_no_room(engine: Engine) -> None:
    one = PrefixCache(1 << 24)
    run(engine, PROMPTS[2], ROUTINGS["base"], one)
    prefixes = PrefixCache(3 * one.num_bytes)
    for number in range(8):
        run(engine, f"{number} {PROMPTS[2]}"[: len(PROMPTS[2])], ROUTINGS["base"], prefixes)
        assert prefixes.num_bytes <= prefixes.max_bytes
    assert run(engine, f"7 {PROMPTS[2]}"[: len(PROMPTS[2])], ROUTINGS["base"], prefixes).reused
    assert not run(engine, f"0 {PROMPTS[2]}"[: len(PROMPTS[2])], ROUTINGS["base"], prefixes).reused


def test_padding_with_a_longer_row(engine: Engine) -> None:
    batch = engine.new_batch()
    assert batch.padding_with(100) == (100, 0)
    row = make_row(engine, "x" * 49, ROUTINGS["base"])
    batch.join([row])
    assert batch.padding_with(100) == (150, 50)


@pytest.mark.parametrize("name", ["routed", "causal"])
def test_a_reading_is_finished_though_its_longest_row_ends_with_its_first_token(engine: Engine, name: str) -> None:
    rows = [make_row(engine, prompt, ROUTINGS[name]) for prompt in PROMPTS[:2]]
    rows[0].sampling = SamplingParams(max_tokens=1)
    batch = engine.new_batch()
    reading = batch.begin(rows)
    assert len(batch.read(reading)) == 2
    assert reading.is_finished
    assert (reading.done, reading.length) == (len(PROMPTS[0]),) * 2  # whatever has become of the cache
    assert batch.rows == rows[1:]
    with pytest.raises(AssertionError):
        batch.read(reading)
    finish(batch)
    alone = make_row(engine, PROMPTS[1], ROUTINGS[name])
    other = engine.new_batch()
    other.join([alone])
    finish(other)
    assert_same(rows[1], alone)
