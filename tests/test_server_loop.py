"""The loop without a web: chunks of prompts between steps, batches by length, rows that are given up."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.batch import Batch, Events, Reading
from treadle.engine.engine import Engine
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.sequence import TokenSequence
from treadle.lora.adapter import Adapter, read_adapter
from treadle.routing.router import Router
from treadle.serving.openai.jobs import Job, News, Started, Work
from treadle.serving.openai.loop import EngineFailed, Loop
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.pace import MIN_CHUNK_TOKENS, Pace
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
    return Engine(model, byte_tokenizer(), read_all(adapter_folders), router)


def read_all(folders: dict[str, Path]) -> list[Adapter]:
    return [read_adapter(folder, name) for name, folder in folders.items()]


class FixedPace(Pace):
    """A pace that keeps its measurements, and notes what happened: 0 = a step, else the tokens that were read."""

    def __init__(self, prompt_chunk: int, step_seconds: float = 0.0, token_seconds: float = 0.0) -> None:
        super().__init__(prompt_chunk, step_seconds, token_seconds)
        self.happened: list[int] = []

    def observe_step(self, seconds: float) -> None:
        self.happened.append(0)

    def observe_chunk(self, num_tokens: int, seconds: float, *, num_running: int) -> None:
        self.happened.append(num_tokens)


class Case:
    """A loop, and jobs whose news are kept."""

    def __init__(self, engine: Engine, pace: Pace | None = None, **params: int) -> None:
        self.engine = engine
        self.metrics = Metrics()
        options = ServeParams(**{"prefix_cache": 0, **params})
        self.loop = Loop(engine, Routers(engine).among, options, self.metrics, pace)

    def figure(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"treadle_{name}")
        assert value is not None
        return value

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


def test_first_come_first_served(engine: Engine) -> None:
    case = Case(engine, max_batch=2)
    jobs = [case.submit(length, max_tokens=2)[0] for length in (9, 4, 7, 5)]
    ended: list[Job] = []
    while case.loop.is_busy:
        case.loop.advance()
        ended += [job for job in jobs if job not in ended and job.rows[0].is_finished]
        assert ended == jobs[: len(ended)]
        assert case.figure("sequences_running") <= 2
    assert ended == jobs


def test_a_long_prompt_is_read_in_chunks_between_the_steps_of_running_rows(engine: Engine) -> None:
    pace = FixedPace(64, step_seconds=1.0, token_seconds=0.001)
    case = Case(engine, pace)
    running, tokens = case.submit(5)
    for _ in range(3):
        case.loop.advance()
    pace.happened.clear()
    late, its_tokens = case.submit(2000, max_tokens=5)
    rounds = 0
    while not its_tokens:
        before = len(tokens)
        case.loop.advance()
        assert len(tokens) == before + 1  # the running row gets a token in every round
        rounds += 1
    assert sum(pace.happened) == 2000
    assert max(pace.happened) <= 64
    assert all(second == 0 for first, second in pairwise(pace.happened) if first)
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


@pytest.mark.parametrize(
    ("step_seconds", "token_seconds", "num_waiting", "num_tokens"),
    [
        (0.1, 0.002, 1, 100),  # two steps
        (0.1, 0.0001, 1, 256),  # the most that is allowed
        (0.02, 0.001, 1, 40),
        (0.01, 0.1, 1, MIN_CHUNK_TOKENS),
        (0.1, 0.0, 1, MIN_CHUNK_TOKENS),  # nothing has been measured
        (0.01, 0.001, 3, 480),  # eight times as many for each of three that wait for the one that runs
        (1.0, 0.001, 3, 512),  # at most two chunks
    ],
)
def test_a_chunk_takes_as_long_as_some_steps(
    step_seconds: float, token_seconds: float, num_waiting: int, num_tokens: int
) -> None:
    pace = Pace(256, step_seconds, token_seconds)
    assert pace.chunk_tokens(num_running=1, num_waiting=num_waiting) == num_tokens
    assert pace.chunk_tokens(num_running=0) == 256  # nobody waits for a step


def test_a_short_prompt_says_nothing_about_what_a_token_costs() -> None:
    pace = Pace(256)
    pace.observe_chunk(MIN_CHUNK_TOKENS - 1, 1.0, num_running=1)
    assert pace.token_seconds == 0
    pace.observe_chunk(MIN_CHUNK_TOKENS, 1.0, num_running=0)
    assert pace.token_seconds == 1 / MIN_CHUNK_TOKENS
    pace.observe_chunk(MIN_CHUNK_TOKENS, 9.0, num_running=0)  # beside no steps a token costs less
    assert pace.token_seconds == 1 / MIN_CHUNK_TOKENS
    pace.observe_chunk(MIN_CHUNK_TOKENS, 2.0, num_running=1)
    assert pace.token_seconds == pytest.approx(1.3 / MIN_CHUNK_TOKENS)


def test_the_loop_measures_its_steps_and_chunks(engine: Engine) -> None:
    pace = Pace(256)
    case = Case(engine, pace)
    case.submit(MIN_CHUNK_TOKENS)
    case.loop.advance()
    assert (pace.step_seconds, pace.token_seconds > 0) == (0, True)
    case.loop.advance()
    assert pace.step_seconds > 0


def first_tokens(engine: Engine, pace: Pace, num_running: int, lengths: list[int]) -> list[int]:
    """Return how many tokens each of several late prompts has after one round beside running rows."""
    case = Case(engine, pace)
    case.submit(*[5] * num_running)
    case.loop.advance()
    job, _ = case.submit(*lengths)
    case.loop.advance()
    return [len(row.events) for row in job.rows]


def test_a_burst_is_read_together(engine: Engine) -> None:
    pace = FixedPace(512, step_seconds=0.01, token_seconds=0.001)
    assert first_tokens(engine, pace, 1, [40] * 6) == [1] * 6  # 240 tokens at once, where one prompt gets 20


def test_the_last_of_a_burst_do_not_wait_for_steps_of_the_first(engine: Engine) -> None:
    pace = FixedPace(256, step_seconds=0.01, token_seconds=0.001)
    assert first_tokens(engine, pace, 8, [40] * 3) == [1] * 3  # 120 tokens, though fewer rows wait than run


def test_a_burst_has_at_most_the_tokens_of_two_chunks(engine: Engine) -> None:
    pace = FixedPace(64, step_seconds=1.0, token_seconds=0.001)
    assert first_tokens(engine, pace, 1, [30] * 6) == [1, 1, 1, 1, 0, 0]


def test_a_long_prompt_is_not_read_like_a_burst(engine: Engine) -> None:
    pace = FixedPace(256, step_seconds=0.01, token_seconds=0.001)
    assert first_tokens(engine, pace, 1, [200, 5, 5, 5]) == [0] * 4
    assert pace.happened[-2:] == [0, 20]  # a step, and two steps' time of the long one


def test_short_prompts_are_read_together_as_far_as_two_chunks_go(engine: Engine) -> None:
    case = Case(engine, prompt_chunk=32)
    job, _ = case.submit(16, 16, 16, 16, 16, 40)
    case.loop.advance()
    assert [len(row.events) for row in job.rows] == [1, 1, 1, 1, 0, 0]


def test_rows_of_very_different_lengths_do_not_pad_each_other(engine: Engine) -> None:
    case = Case(engine, prompt_chunk=2000, kv_memory=64)
    case.submit(2000, max_tokens=40)
    while not case.figure("sequences_running"):
        case.loop.advance()
    alone = case.figure("kv_bytes")
    short, _ = case.submit(*[10] * 9, max_tokens=40)
    while not all(row.events for row in short.rows):
        case.loop.advance()
    assert case.figure("sequences_running") == 10
    assert case.figure("kv_bytes") < 2 * alone  # padded to the longest, ten times as much


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
        most = max(most, case.figure("sequences_running"))
    assert most == 3
    assert all(row.is_finished for row in job.rows)
    assert case.loop.num_ended == 7
    assert engine.running == ()


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
    engine.adapters.drop_retired()
    assert "math" not in engine.blend.names
    assert engine.running == ()
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
    assert engine.running == ()


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


class FailingBatch(Batch):
    """A batch of which one part fails."""

    part = ""

    def begin(self, rows: Sequence[TokenSequence]) -> Reading:
        self._fail("begin")
        return super().begin(rows)

    def read(self, reading: Reading, num_columns: int | None = None) -> Events:
        self._fail("read")
        return super().read(reading, num_columns)

    def step(self) -> Events:
        self._fail("step")
        return super().step()

    def _fail(self, part: str) -> None:
        if part == FailingBatch.part:
            raise MemoryError("no room")


class FailingEngine(Engine):
    def new_batch(self, end_ids: frozenset[int] | None = None, prefixes: PrefixCache | None = None) -> Batch:
        return FailingBatch(self.runner.unhooked(), self.blend, end_ids or frozenset([257]), prefixes)


def fail_in_passes_of(num_tokens: int, engine: Engine) -> Callable[[], None]:
    """Let the model's passes fail that have so many columns; return the function that ends it."""

    def check(_: object, given: tuple[Any, ...]) -> None:
        if given[0].shape[1] == num_tokens:
            raise MemoryError("no room")

    return engine.model.get_input_embeddings().register_forward_pre_hook(check).remove


@pytest.mark.parametrize(
    ("part", "is_running_lost"),
    [("begin", False), ("read", False), ("step", True), ("the prompt's pass", False), ("the step's pass", True)],
)
def test_a_failure_costs_the_rows_that_it_concerns_and_no_others(
    engine: Engine, adapter_folders: dict[str, Path], part: str, is_running_lost: bool
) -> None:
    engine.detach()
    engine = FailingEngine(engine.model, engine.tokenizer, read_all(adapter_folders), engine.router)
    engine.model.register_forward_hook(lambda *_: None)  # all passes go through the model's own modules
    case = Case(engine, prompt_chunk=16)
    running, its_news = case.submit(10, max_tokens=20)
    case.loop.advance()
    late, news = case.submit(40 if part == "read" else 4)
    FailingBatch.part = part
    end = fail_in_passes_of(4 if "prompt" in part else 1, engine) if part.endswith("pass") else None
    case.loop.advance()
    FailingBatch.part = ""
    if end is not None:
        end()
    lost = running if is_running_lost else late
    for job, told in ((running, its_news), (late, news)):
        assert isinstance(told[-1], EngineFailed) == (job is lost)
    while case.loop.is_busy:
        case.loop.advance()
    for job in (running, late):
        assert bool(job.rows[0].events and job.rows[0].events[-1].finish_reason) == (job is not lost)
    assert case.loop.num_ended == 2
    assert engine.running == ()
