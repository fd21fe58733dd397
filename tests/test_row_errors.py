"""The law of a pass that fails: the row to blame ends with its own error, the others get what they get alone."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import treadle
from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.completion import Completion, GenerationError
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowLayer
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.runners.runner import Runner
from treadle.engine.scoring import score_greedy, score_ids
from treadle.engine.sequence import OutputOptions, SequenceError, TokenSequence
from treadle.lora.adapter import read_adapter
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.router import Router
from treadle.routing.running_sum import RunningSum, Tails

from conftest import SAMPLES, byte_tokenizer, tiny_llama
from failing import FailingSteps

POISON = 200
"""A token whose embedding is not a number: it spoils its row from there on, and no other."""
ROUTINGS = (
    RoutingParams(every=1),
    RoutingParams.base(),
    RoutingParams(every=2, past="recompute"),
    RoutingParams.one("code"),
)
PROMPTS = [[97 + (7 * place + step) % 26 for step in range(1 + 5 * place % 17)] for place in range(32)]
SAMPLINGS = [SamplingParams(0.8 * (place % 2), max_tokens=5, seed=place) for place in range(32)]
BAD = 13


@pytest.fixture(scope="module", params=[True, False], ids=["fast step", "own forward"])
def made_once(
    request: pytest.FixtureRequest, adapter_folders: dict[str, Path], embedder: object
) -> tuple[Engine, list[Completion]]:
    """An engine that knows the poison, and what it makes of each prompt alone."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = torch.nan
    adapters = [read_adapter(folder, name) for name, folder in adapter_folders.items()]
    engine = Engine(model, byte_tokenizer(), adapters, treadle.fit(SAMPLES, embedder), is_fast=request.param)
    routings = [ROUTINGS[place % 4] for place in range(32)]
    each = zip(PROMPTS, SAMPLINGS, routings, strict=True)
    return engine, [engine.generate_ids([p], sampling=s, routing=r)[0] for p, s, r in each]


@pytest.fixture
def poisoned(made_once: tuple[Engine, list[Completion]]) -> tuple[Engine, list[Completion]]:
    made_once[0].runner.layer_type = RowLayer
    return made_once


def rows_of(engine: Engine) -> list[TokenSequence]:
    return engine.new_rows(PROMPTS, sampling=SAMPLINGS, routing=[ROUTINGS[place % 4] for place in range(32)])


def failing_half_way() -> type[RowLayer]:
    """Let a pass with a poisoned row fail when its first layers have been written, and its others not."""
    written: list[int] = []

    class HalfWritten(RowLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> object:
            if key_states.isnan().any() and written:
                written.clear()
                raise MemoryError("there is no room")
            written[:] = [1] if key_states.isnan().any() else []
            return super().update(key_states, value_states, *args, **kwargs)

    return HalfWritten


@pytest.mark.parametrize("where", ["prompt", "step"])
@pytest.mark.parametrize("is_raising", [False, True], ids=["not finite", "raises"])
def test_one_bad_row_of_32_costs_no_other(
    poisoned: tuple[Engine, list[Completion]], where: str, is_raising: bool
) -> None:
    engine, alone = poisoned
    if is_raising:
        engine.runner.layer_type = failing_half_way()
    rows = rows_of(engine)
    if where == "prompt":
        rows[BAD].ids[-1] = POISON
    batch = engine.new_batch(prefixes=PrefixCache(1 << 24))
    told = batch.join(rows)
    if where == "step":
        told += batch.step()
        rows[BAD].ids[-1] = POISON
    while batch.rows:
        told += batch.step()
    failures = [(row, event) for row, event in told if isinstance(event, SequenceError)]
    assert failures == [(rows[BAD], rows[BAD].failure)]
    assert ("no room" if is_raising else "overflows") in str(rows[BAD].failure)
    for place, (row, expected) in enumerate(zip(rows, alone, strict=True)):
        if place != BAD:
            assert tuple(event.token_id for event in row.events) == expected.token_ids
            np.testing.assert_allclose([event.logprob for event in row.events], expected.logprobs, atol=2e-4)


ROUTED = (
    RoutingParams(every=1),
    RoutingParams(every=1, lag=1),
    RoutingParams(every=2, past="recompute"),
    RoutingParams(every=2, prefill="causal"),
)


class BrokenSum(RunningSum):
    """The running sum of a text that may break."""

    how = ""

    def views(self) -> tuple[np.ndarray, ...]:
        if self.how == "text raises":
            raise RuntimeError("no such word")
        return tuple(view * np.nan if self.how else view for view in super().views())


class BrokenEmbedder(StaticEmbedder):
    """An embedder of texts that may break: those that it follows are in `made`, in their order."""

    how = ""

    def __init__(self, model: object) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.made: list[BrokenSum] = []

    def follow(self, tails: Tails, window: int | None = None) -> RunningSum:
        self.made.append(BrokenSum(self.effects, tails, window))
        return self.made[-1]

    def finish(self, views: Sequence[np.ndarray]) -> np.ndarray:
        if self.how == "embedder raises" and np.isnan(views).any():
            raise RuntimeError("no such vector")
        return super().finish(views)

    def break_text(self, place: int, how: str) -> None:
        """Break the running text that was followed as the `place`-th."""
        self.how = self.made[place].how = how

    def mend(self) -> None:
        """Forget the texts that have been followed."""
        self.how = ""
        self.made.clear()


@pytest.fixture(scope="module")
def routed(
    adapter_folders: dict[str, Path], embedder: StaticEmbedder
) -> tuple[Engine, BrokenEmbedder, list[Completion]]:
    """An engine, its embedder, and what it makes of each prompt alone when all are routed."""
    adapters = [read_adapter(folder, name) for name, folder in adapter_folders.items()]
    breaking = BrokenEmbedder(embedder.model)
    engine = Engine(tiny_llama(), byte_tokenizer(), adapters, treadle.fit(SAMPLES, breaking))
    each = zip(PROMPTS, SAMPLINGS, ROUTED * 8, strict=True)
    return engine, breaking, [engine.generate_ids([p], sampling=s, routing=r)[0] for p, s, r in each]


@pytest.mark.parametrize("bad", range(12, 16))
@pytest.mark.parametrize("where", ["prompt", "step"])
@pytest.mark.parametrize(
    ("how", "message"),
    [("text raises", "no such word"), ("embedder raises", "no such vector"), ("not finite", "scores of a text")],
)
def test_one_text_of_32_that_cannot_be_routed_costs_no_other(
    routed: tuple[Engine, BrokenEmbedder, list[Completion]], bad: int, where: str, how: str, message: str
) -> None:
    engine, embedder, alone = routed
    embedder.mend()
    rows = engine.new_rows(PROMPTS, sampling=SAMPLINGS, routing=ROUTED * 8)
    batch = engine.new_batch(prefixes=PrefixCache(1 << 24))
    if where == "prompt":
        embedder.break_text(bad, how)
        told = batch.join(rows)
    else:
        told = batch.join(rows)
        embedder.break_text(bad, how)
    while batch.rows:
        told += batch.step()
    failures = [(row, event) for row, event in told if isinstance(event, SequenceError)]
    assert failures == [(rows[bad], rows[bad].failure)]
    assert "cannot be routed: " in str(rows[bad].failure)
    assert message in str(rows[bad].failure)
    for place, (row, expected) in enumerate(zip(rows, alone, strict=True)):
        if place != bad:
            assert tuple(event.token_id for event in row.events) == expected.token_ids
            np.testing.assert_allclose([event.weights for event in row.events], expected.weights, atol=1e-5)


def test_a_text_that_cannot_be_routed_alone_ends_in_its_error(engine: Engine, embedder: StaticEmbedder) -> None:
    breaking = BrokenEmbedder(embedder.model)
    engine.router = replace(engine.router, embedder=breaking)
    (row,) = engine.new_rows([b"add"], sampling=SamplingParams(max_tokens=3))
    breaking.break_text(0, "not finite")
    batch = engine.new_batch()
    reading = batch.begin([row])
    assert reading.members == [row]
    assert [type(event) for _, event in batch.read(reading, 1)] == [SequenceError]
    assert reading.is_finished
    assert not batch.rows


def test_generate_tells_the_bad_row_when_all_others_are_done(poisoned: tuple[Engine, list[Completion]]) -> None:
    engine, alone = poisoned
    routings = [ROUTINGS[place % 4] for place in range(4)]
    prompts = [*PROMPTS[:3], [*PROMPTS[3], POISON]]
    with pytest.raises(GenerationError, match="prompt 3: the model overflows") as caught:
        engine.generate_ids(prompts, sampling=SAMPLINGS[:4], routing=routings)
    assert [done and done.token_ids for done in caught.value.completions] == [*(a.token_ids for a in alone[:3]), None]
    assert list(caught.value.failures) == [3]
    assert engine.running == ()


@pytest.mark.parametrize("past", ["keep", "recompute"])
def test_scores_that_are_no_numbers_are_an_error_that_names_their_rows(
    poisoned: tuple[Engine, list[Completion]], past: str
) -> None:
    engine, _ = poisoned
    params = RoutingParams(every=2, past=past)
    good, bad = (PROMPTS[3], PROMPTS[4]), (PROMPTS[3], [97, POISON, 98])
    for run in (score_ids, score_greedy):
        assert len(run(engine, [good, good], params)) == 2
        with pytest.raises(SequenceError, match=r"overflows under these weights: no log-probabilities of row 1, 3\."):
            run(engine, [good, bad, good, bad], params)


@pytest.mark.parametrize("columns", [None, 2], ids=["at once", "in chunks"])
def test_a_prompt_whose_scores_are_no_numbers_ends_alone(engine: Engine, columns: int | None) -> None:
    """Its last token, which gives the next one, is fine; the head overflows on a token before it alone."""
    head = engine.model.lm_head.forward

    def overflowing(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        if logits.shape[1] > 1:
            logits[-1, -2] = torch.inf
        return logits

    rows = engine.new_rows([[97, 98, 99, 100]] * 2, routing=RoutingParams.base(), report=OutputOptions(prompt=True))
    engine.model.lm_head.forward = overflowing
    batch = engine.new_batch()
    for row in rows if columns else ():
        reading = batch.begin([row])
        while not reading.is_finished:
            batch.read(reading, columns)
    if columns is None:
        batch.join(rows)
    assert "its prompt has no log-probabilities" in str(rows[-1].failure)
    assert not rows[-1].prompt_scores


def test_a_stream_that_cannot_go_on_ends_with_its_error(engine: Engine) -> None:
    engine.runner = Runner(engine.model, engine.blend, [FailingSteps(ZeroDivisionError("nothing to divide"))])
    events = engine.stream("add", sampling=SamplingParams(max_tokens=9))
    next(events)
    with pytest.raises(GenerationError, match="ZeroDivisionError") as caught:
        next(events)
    assert isinstance(caught.value.__cause__, SequenceError)


def test_a_bad_prompt_is_not_kept_for_others(poisoned: tuple[Engine, list[Completion]]) -> None:
    engine, _ = poisoned
    prefixes = PrefixCache(1 << 24)
    for _ in range(2):
        (row,) = engine.new_rows([[*range(97, 117), POISON]], routing=RoutingParams.base())
        engine.new_batch(prefixes=prefixes).join([row])
        assert row.failure is not None
        assert prefixes.num_bytes == 0


class Scarce(RowLayer):
    """A layer whose buffers may have so many columns; None = any number."""

    growth_tokens = 4
    most: int | None = None

    def new_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        if self.most is not None and shape[2] > self.most:
            raise MemoryError("no memory")
        return super().new_buffer(shape, like)


@pytest.fixture
def memory(engine: Engine) -> Generator[Callable[[int], None]]:
    """Say how many columns a buffer may have."""
    engine.runner.layer_type = Scarce

    def limit(columns: int | None) -> None:
        Scarce.most = columns

    yield limit
    limit(None)


def test_without_memory_the_longest_rows_end_and_the_others_go_on(
    engine: Engine, memory: Callable[[int], None]
) -> None:
    base, sampling = RoutingParams.base(), SamplingParams(max_tokens=30)
    prompts = [[97] * 40, [98] * 3, [99] * 8]
    alone = [engine.generate_ids([p], sampling=sampling, routing=base)[0].token_ids for p in prompts]
    memory(90)
    with pytest.raises(GenerationError, match=r"prompt 0: .*no memory") as caught:
        engine.generate_ids([[97] * 75, *prompts[1:]], sampling=sampling, routing=base)
    assert [done and done.token_ids for done in caught.value.completions] == [None, *alone[1:]]


def test_rows_that_cannot_join_for_want_of_memory_leave_the_running_ones_alone(
    engine: Engine, memory: Callable[[int], None]
) -> None:
    sampling, base = SamplingParams(max_tokens=8), RoutingParams.base()
    (expected,) = engine.generate_ids([[97] * 10], sampling=sampling, routing=base)
    running, late = engine.new_rows([[97] * 10, [98] * 60], sampling=sampling, routing=base)
    batch = engine.new_batch()
    batch.join([running])
    reading = batch.begin([late])
    memory(50)
    ((row, event),) = batch.read(reading)
    assert row is late
    assert "no memory" in str(event)
    while batch.rows:
        batch.step()
    assert tuple(event.token_id for event in running.events) == expected.token_ids


# Token ids that the model does not know


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, 260], "got token id 260; allowed: 0 to 259"),
        ([-1, 5, 999, -1], "got token id -1, 999; allowed"),
        ([10**30], "allowed: 0 to 259"),
        ([True], "got token id true; allowed: whole numbers"),
        ([1.0], "got token id 1.0; allowed: whole numbers"),
        (["a"], "got token id 'a'; allowed: whole numbers"),
        ([None], "allowed: whole numbers"),
        ([], "the prompt is empty"),
        ("abc", "allowed: a list of token ids"),
        (7, "allowed: a list of token ids"),
    ],
)
def test_a_prompt_has_ids_that_the_model_knows(engine: Engine, prompt: object, message: str) -> None:
    for call in (engine.generate_ids, engine.new_rows):
        with pytest.raises(OptionError) as caught:
            call([[5], prompt])  # type: ignore[list-item]
        assert "prompt 1: " in str(caught.value)
        assert message in str(caught.value)


def test_numbers_of_numpy_and_torch_are_ids(engine: Engine) -> None:
    expected = engine.new_rows([[5, 7]])[0].ids
    for prompt in (np.array([5, 7]), torch.tensor([5, 7]), (np.int64(5), 7)):
        assert engine.new_rows([prompt])[0].ids == expected  # type: ignore[list-item]


def test_a_token_that_was_added_to_the_tokenizer_alone_is_refused_everywhere(engine: Engine, router: Router) -> None:
    engine.tokenizer = byte_tokenizer()
    engine.tokenizer.add_tokens(["<known>", "<tool>", "<more>"], special_tokens=True)
    assert engine.generate("a <known>").token_ids
    calls: tuple[Callable[[], object], ...] = (
        lambda: engine.generate(["a", "<tool> <more>"]),
        lambda: engine.generate([{"role": "user", "content": "<tool> <more>"}]),
        lambda: engine.stream("<tool> <more>"),
        lambda: engine.score(["<tool>"], [" <more>"]),
        lambda: engine.score(["a"], ["<tool> <more>"]),
    )
    for call in calls:
        with pytest.raises(OptionError, match=r"260 \('<tool>'\), 261 \('<more>'\); allowed: 0 to 259"):
            call()
