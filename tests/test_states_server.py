"""The server where the base model's states decide: prompts that are read again, and adapters that come."""

from collections.abc import Callable

import pytest
from test_server_loop import Case, FixedPace
from test_states import GREEDY, PROMPTS, SURE, adapters, classes, ids_of, make, run_row  # noqa: F401 - fixtures

from treadle.common.params import SamplingParams
from treadle.engine.engine import Engine
from treadle.serving.openai.jobs import Job, News, Work

LONG = "add three plus " * 20
"""A prompt of 300 tokens that is read again."""


@pytest.fixture
def engine(make: Callable[..., Engine]) -> Engine:  # noqa: F811
    return make()


def submit(case: Case, engine: Engine, *prompts: str, sampling: SamplingParams = GREEDY) -> tuple[Job, list[News]]:
    news: list[News] = []
    ids = [ids_of(engine, prompt) for prompt in prompts]
    job = Job(Work(ids, [sampling] * len(ids), SURE), news.append)
    case.loop.accept(job)
    return job, news


def run_to_the_end(case: Case) -> None:
    while case.loop.is_busy:
        case.loop.advance()


def tokens_of(job: Job) -> list[list[int]]:
    return [row.ids[row.prompt_tokens :] for row in job.rows]


def test_other_rows_get_tokens_between_the_chunks_of_a_second_reading(engine: Engine) -> None:
    pace = FixedPace(32, step_seconds=1.0, token_seconds=0.001)
    case = Case(engine, pace)
    running, _ = submit(case, engine, "a", sampling=SamplingParams(max_tokens=200))
    case.loop.advance()
    pace.happened.clear()
    late, _ = submit(case, engine, LONG)
    (row,) = late.rows
    while not row.events:
        before = len(running.rows[0].events)
        case.loop.advance()
        assert len(running.rows[0].events) == before + 1
    assert row.is_reread
    assert sum(pace.happened) == 2 * row.prompt_tokens
    assert max(pace.happened) == 32
    assert all(0 in pair for pair in zip(pace.happened, pace.happened[1:], strict=False))
    assert case.figure("prompt_tokens_total") == row.prompt_tokens + 1
    run_to_the_end(case)
    assert tokens_of(late) == [run_row(engine, LONG).ids[row.prompt_tokens :]]


@pytest.mark.parametrize("prefix_cache", [0, 64])
def test_prompts_that_are_read_together_and_again_are_as_alone(engine: Engine, prefix_cache: int) -> None:
    case = Case(engine, prefix_cache=prefix_cache)
    for _ in range(2):
        job, news = submit(case, engine, *PROMPTS)
        run_to_the_end(case)
        assert not any(isinstance(each, Exception) for each in news)
        assert {row.is_reread for row in job.rows} == {True, False}
        alone = [run_row(engine, prompt) for prompt in PROMPTS]
        assert tokens_of(job) == [row.ids[row.prompt_tokens :] for row in alone]
    assert case.loop.num_ended == 2 * len(PROMPTS)
    assert engine.running == ()


@pytest.mark.parametrize("rounds", range(1, 9))
def test_a_job_that_is_given_up_while_it_is_read_again_leaves_nothing_behind(engine: Engine, rounds: int) -> None:
    case = Case(engine, FixedPace(64, step_seconds=1.0, token_seconds=0.001))
    other, _ = submit(case, engine, "a")
    job, _ = submit(case, engine, LONG)
    third, _ = submit(case, engine, *PROMPTS)
    for _ in range(rounds):
        case.loop.advance()
    case.loop.give_up(job)
    run_to_the_end(case)
    assert engine.running == ()
    assert case.loop.num_ended == 2 + len(PROMPTS)
    for each, prompts in ((other, ["a"]), (third, PROMPTS)):
        alone = [run_row(engine, prompt) for prompt in prompts]
        assert tokens_of(each) == [row.ids[row.prompt_tokens :] for row in alone]


def test_one_of_several_prompts_is_given_up_while_all_are_read(engine: Engine) -> None:
    case = Case(engine, FixedPace(512, step_seconds=1.0, token_seconds=0.001))
    jobs = [submit(case, engine, prompt)[0] for prompt in PROMPTS]
    case.loop.advance()
    again = [job for job in jobs if job.rows[0].is_reread]
    assert again  # the first pass has been made, the second not
    assert not any(job.rows[0].events for job in again)
    gone = [again[0], next(job for job in jobs if job not in again)]
    for job in gone:
        case.loop.give_up(job)
    run_to_the_end(case)
    assert engine.running == ()
    assert case.loop.num_ended == len(PROMPTS)
    for job, prompt in zip(jobs, PROMPTS, strict=True):
        if job not in gone:
            row = run_row(engine, prompt)
            assert tokens_of(job) == [row.ids[row.prompt_tokens :]]
