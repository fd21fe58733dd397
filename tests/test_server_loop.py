"""The loop without a web: chunks of prompts between steps, batches by length, rows that are given up."""

from itertools import pairwise
from pathlib import Path

import pytest

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.batch import Batch, Reading
from treadle.engine.engine import Engine
from treadle.lora.adapter import read_adapter
from treadle.routing.router import Router
from treadle.serving.openai import loop as loops
from treadle.serving.openai.jobs import Job, News, Started, Work
from treadle.serving.openai.loop import MIN_CHUNK_TOKENS, Loop
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.targets import Routers

from conftest import TINY, byte_tokenizer


@pytest.fixture
def engine(adapter_folders: dict[str, Path], router: Router) -> Engine:
    """As the tests' engine, with room for long prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=4096, initializer_range=0.3)).eval()
    return Engine(model, byte_tokenizer(), [read_adapter(f, n) for n, f in adapter_folders.items()], router)


class Case:
    """A loop, and jobs whose news are kept."""

    def __init__(self, engine: Engine, **params: int) -> None:
        self.engine = engine
        self.loop = Loop(engine, Routers(engine).among, ServeParams(**{"prefix_cache": 0, **params}), Metrics())

    def submit(
        self, *lengths: int, max_tokens: int = 400, routing: RoutingParams | None = None
    ) -> tuple[Job, list[News]]:
        news: list[News] = []
        sampling = [SamplingParams(max_tokens=max_tokens)] * len(lengths)
        prompts = [[97 + place % 20 for place in range(length)] for length in lengths]
        job = Job(Work(prompts, sampling, routing or RoutingParams()), news.append)
        self.loop.accept(job)
        self.loop.flush()
        assert isinstance(news.pop(0), Started)
        return job, news


def test_a_long_prompt_is_read_in_chunks_between_the_steps_of_running_rows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[int] = []  # 0 = a step, else the columns that were read
    step, read = Batch.step, Batch.read
    monkeypatch.setattr(Batch, "step", lambda batch: (happened.append(0), step(batch))[1])

    def noted(batch: Batch, reading: Reading, columns: int) -> object:
        happened.append(min(columns, reading.length - reading.done))
        return read(batch, reading, columns)

    monkeypatch.setattr(Batch, "read", noted)
    case = Case(engine, prompt_chunk=64)
    running, tokens = case.submit(5)
    for _ in range(3):
        case.loop.advance()
    happened.clear()
    late, its_tokens = case.submit(2000, max_tokens=5)
    rounds = 0
    while not its_tokens:
        before = len(tokens)
        case.loop.advance()
        assert len(tokens) == before + 1  # the running row gets a token in every round
        rounds += 1
    assert sum(happened) == 2000
    assert max(happened) <= 64
    assert all(second == 0 for first, second in pairwise(happened) if first)
    assert rounds >= 2000 / 64
    assert not running.rows[0].is_finished
    assert late.rows[0].reused == 0


def test_a_prefix_that_was_found_is_copied_in_a_pass_of_its_own(engine: Engine) -> None:
    case = Case(engine, prefix_cache=64)
    _, tokens = case.submit(5)
    _, first = case.submit(600, max_tokens=1, routing=RoutingParams.one("math"))
    while not first:
        case.loop.advance()
    _, second = case.submit(600, max_tokens=1, routing=RoutingParams.one("math"))
    tokens.clear()
    case.loop.advance()
    assert (len(tokens), len(second)) == (1, 0)  # the running row got its token; the other one's keys were copied
    case.loop.advance()
    assert (len(tokens), len(second)) == (2, 1)


def test_a_chunk_takes_as_long_as_some_steps(engine: Engine) -> None:
    case = Case(engine, prompt_chunk=256)
    assert case.loop._chunk() == 256  # nobody waits for a step
    case.submit(5)
    case.loop.advance()
    cases = (
        (0.1, 0.002, 100),
        (0.1, 0.0001, 256),
        (0.02, 0.001, 40),
        (0.01, 0.1, MIN_CHUNK_TOKENS),
        (0.1, 0.0, MIN_CHUNK_TOKENS),
    )
    for step, token, chunk in cases:
        case.loop._step_seconds, case.loop._token_seconds = step, token
        assert case.loop._chunk() == chunk


def test_a_short_prompt_says_nothing_about_what_a_token_costs(engine: Engine) -> None:
    case = Case(engine)
    case.submit(2)
    case.loop.advance()
    assert case.loop._token_seconds == 0
    case.submit(MIN_CHUNK_TOKENS)
    case.loop.advance()
    assert case.loop._token_seconds > 0


def test_a_burst_is_read_together(engine: Engine) -> None:
    case = Case(engine, prompt_chunk=512)
    case.submit(5)
    case.loop.advance()
    case.loop._step_seconds, case.loop._token_seconds = 0.01, 0.001
    assert case.loop._chunk(num_waiting=1) == 20  # of one prompt, two steps
    assert (
        case.loop._chunk(num_waiting=3) == 480
    )  # eight times as many for each of three that wait for the one that runs
    job, _ = case.submit(*[40] * 6)
    case.loop.advance()
    assert [len(row.events) for row in job.rows] == [1] * 6  # 240 tokens at once


def test_the_last_of_a_burst_do_not_wait_for_steps_of_the_first(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treadle.serving.openai.loop.SMOOTHING", 0.0)  # what a step takes here does not matter
    case = Case(engine, prompt_chunk=256)
    case.submit(*[5] * 8)
    case.loop.advance()
    case.loop._step_seconds, case.loop._token_seconds = 0.01, 0.001
    job, _ = case.submit(*[40] * 3)
    case.loop.advance()
    assert [len(row.events) for row in job.rows] == [1, 1, 1]  # 120 tokens, though fewer rows wait than run


def test_a_burst_has_at_most_the_tokens_of_two_chunks(engine: Engine) -> None:
    case = Case(engine, prompt_chunk=64)
    case.submit(5)
    case.loop.advance()
    case.loop._step_seconds, case.loop._token_seconds = 1.0, 0.001
    job, _ = case.submit(*[30] * 6)
    case.loop.advance()
    assert [len(row.events) for row in job.rows] == [1, 1, 1, 1, 0, 0]


def test_a_long_prompt_is_not_read_like_a_burst(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(engine, prompt_chunk=256)
    case.submit(5)
    case.loop.advance()
    monkeypatch.setattr("treadle.serving.openai.loop.SMOOTHING", 0.0)
    case.loop._step_seconds, case.loop._token_seconds = 0.01, 0.001
    case.submit(200, 5, 5, 5)
    case.loop.advance()
    assert case.loop._reading is not None
    assert case.loop._reading[1].done == 20


def test_short_prompts_are_read_together_as_far_as_two_chunks_go(engine: Engine) -> None:
    case = Case(engine, prompt_chunk=32)
    job, _ = case.submit(16, 16, 16, 16, 16, 40)
    case.loop.advance()
    assert [len(row.events) for row in job.rows] == [1, 1, 1, 1, 0, 0]


def test_rows_of_very_different_lengths_do_not_pad_each_other(engine: Engine) -> None:
    case = Case(engine, prompt_chunk=2000)
    case.submit(*[10] * 8)
    long, _ = case.submit(2000)
    short, _ = case.submit(20)
    while not short.rows[0].events:
        case.loop.advance()
    assert [len(batch.rows) for batch in case.loop._batches] == [9, 1]
    assert case.loop._batches[1].rows == long.rows


def test_prompts_that_are_read_together_end_each_on_its_own(engine: Engine) -> None:
    case = Case(engine)
    sampling = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=4), SamplingParams(max_tokens=2)]
    prompts = [[97] * 30, [98] * 4, [99] * 11]  # the longest ends first, and its columns go with it
    news: list[News] = []
    job = Job(Work(prompts, sampling, RoutingParams.base()), news.append)
    case.loop.accept(job)
    while case.loop.is_busy:
        case.loop.advance()
    assert not any(isinstance(each, Exception) for each in news)
    alone = [
        engine.generate_ids([p], sampling=s, routing=RoutingParams.base())[0]
        for p, s in zip(prompts, sampling, strict=True)
    ]
    assert [tuple(event.token_id for event in row.events) for row in job.rows] == [done.token_ids for done in alone]


def test_a_batch_takes_no_more_rows_than_it_may(engine: Engine) -> None:
    case = Case(engine, max_batch=3)
    job, _ = case.submit(*[5] * 7, max_tokens=4)
    most = 0
    while case.loop.is_busy:
        case.loop.advance()
        most = max(most, case.loop._num_running)
    assert most == 3
    assert all(row.is_finished for row in job.rows)
    assert case.loop.num_ended == 7
    assert engine._running == []


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_a_job_that_is_given_up_leaves_nothing_behind(engine: Engine, rounds: int) -> None:
    case = Case(engine, prompt_chunk=20)
    other, _ = case.submit(6, max_tokens=12, routing=RoutingParams.one("code"))
    job, news = case.submit(6, 6, 50, routing=RoutingParams.one("math"))
    for _ in range(rounds):
        case.loop.advance()
    case.loop.give_up(job)
    told = len(news)
    engine.remove_adapter("math")
    while case.loop.is_busy:
        case.loop.advance()
    assert len(news) == told
    assert "math" not in engine.blend.names
    assert engine._running == []
    assert case.loop.num_ended == 4
    (expected,) = engine.generate_ids(other.work.prompts, sampling=other.work.sampling, routing=other.work.routing)
    assert tuple(event.token_id for event in other.rows[0].events) == expected.token_ids


def test_when_the_only_running_job_is_given_up_those_that_wait_go_on(engine: Engine) -> None:
    case = Case(engine, max_batch=1)
    job, _ = case.submit(5)
    other, news = case.submit(5, max_tokens=3)
    case.loop.advance()
    case.loop.give_up(job)
    while case.loop.is_busy:
        case.loop.advance()
    assert other.rows[0].is_finished
    assert not any(isinstance(each, Exception) for each in news)


def test_a_row_that_overflows_costs_its_job_only(engine: Engine) -> None:
    case = Case(engine)
    other, _ = case.submit(5, max_tokens=6)
    overflowing = RoutingParams(rule="fixed", fixed={"math": 1e38})
    for temperature in (0.0, 1.0):
        job, news = case.submit(5, routing=overflowing)
        job.rows[0].sampling = SamplingParams(temperature=temperature)
        for _ in range(3):
            case.loop.advance()
        assert "overflows under these weights" in str(news[-1])
    while case.loop.is_busy:
        case.loop.advance()
    assert other.rows[0].is_finished
    assert engine._running == []


def test_what_cannot_be_started_costs_its_job_only(engine: Engine) -> None:
    case = Case(engine)
    news: list[News] = []
    case.loop.accept(Job(Work([[97]], [SamplingParams()], RoutingParams(window=10**30)), news.append))
    case.loop.flush()
    assert "could not be started" in str(news[-1])
    assert case.loop.num_ended == 1


def test_an_adapter_that_went_before_its_job_came_is_told(engine: Engine) -> None:
    case = Case(engine)
    engine.remove_adapter("math")
    news: list[News] = []
    case.loop.accept(Job(Work([[97]], [SamplingParams()], RoutingParams.one("math")), news.append))
    case.loop.flush()
    assert "unknown adapter 'math'" in str(news[0])
    assert not case.loop.is_busy


@pytest.mark.parametrize("part", ["begin", "_read_on", "_append", "_read_newest_of", "step"])
def test_a_failure_costs_the_rows_that_it_concerns_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    case = Case(engine, prompt_chunk=16)
    running, its_news = case.submit(10, max_tokens=20)
    case.loop.advance()
    late, news = case.submit(40 if part == "_read_on" else 4)
    with monkeypatch.context() as patch:
        patch.setattr(Batch, part, lambda *_: 1 / 0)
        case.loop.advance()
    lost = running if "newest" in part or part == "step" else late
    for job, told in ((running, its_news), (late, news)):
        assert isinstance(told[-1], loops.EngineFailed) == (job is lost)
    while case.loop.is_busy:
        case.loop.advance()
    for job in (running, late):
        assert bool(job.rows[0].events and job.rows[0].events[-1].finish_reason) == (job is not lost)
    assert case.loop.num_ended == 2
    assert engine._running == []
