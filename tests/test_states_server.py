"""The server where the base model's states decide: prompts that are read again, and adapters that come."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_server_loop import Case, FixedPace
from test_states import GREEDY, PROMPTS, SURE, ids_of, make, run_row  # noqa: F401 - a fixture

from treadle.bundle.bundle import save_bundle
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.routing.router import Router
from treadle.routing.samples import STAGES
from treadle.routing.states import StateClasses
from treadle.serving.openai.jobs import Job, News, Work

from conftest import BASE, byte_tokenizer, save_adapter, tiny_llama
from serving import Serving, serving

ADMIN = {"Authorization": "Bearer root"}
POETRY = ["poem rose moon", "the moon rose", "rose poem the moon", "moon moon poem"]
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


# Adapters that come and go


@pytest.fixture
def serve(
    tmp_path: Path, adapter_folders: dict[str, Path], router: Router, classes: StateClasses
) -> Callable[[RoutingParams], AbstractContextManager[Serving]]:
    """Serve a bundle with states and the routing that is given, beside a shelf with one more adapter."""
    save_adapter(tmp_path / "shelf" / "poetry", seed=9)
    tiny_llama().save_pretrained(tmp_path / BASE)
    byte_tokenizer().save_pretrained(tmp_path / BASE)

    def start(params: RoutingParams) -> AbstractContextManager[Serving]:
        given = replace(router, params=params, states=classes)
        folder = save_bundle(
            tmp_path / "bundle", base=str(tmp_path / BASE), adapters=adapter_folders, router=given, overwrite=True
        )
        return serving(folder, admin_key="root", adapter_dir=str(tmp_path / "shelf"))

    return start


def add(served: Serving, **changes: Any) -> Any:
    body = {"name": "poetry", "path": "poetry", "samples": POETRY, **changes}
    return served.post("/v1/adapters", body, headers=ADMIN)


@pytest.mark.parametrize("params", [RoutingParams(), RoutingParams(states=False)], ids=["states", "text"])
def test_an_adapter_joins_with_its_states(
    serve: Callable[..., Any], engine: Engine, tmp_path: Path, params: RoutingParams
) -> None:
    engine.add_adapter("poetry", tmp_path / "shelf" / "poetry", POETRY)
    assert engine.router.states is not None
    with serve(params) as served:
        running = served.client().completions.create(model="auto", prompt="add", max_tokens=300, stream=True)
        next(iter(running))
        assert add(served).status_code == 200
        states = served.engine.router.states
        assert states is not None
        np.testing.assert_allclose(states.centroids.means, engine.router.states.centroids.means, atol=1e-5)
        for stage in STAGES:
            one, other = (each.centroids.stages[stage].scatter() for each in (states, engine.router.states))
            np.testing.assert_allclose(one, other, atol=1e-3)
        asked = {"prompt": "the moon", "max_tokens": 4, "temperature": 0, "model": "auto", "treadle": {"states": True}}
        assert served.post("/v1/completions", asked).status_code == 200
        assert served.request("DELETE", "/v1/adapters/poetry", headers=ADMIN).status_code == 200
        assert served.post("/v1/completions", asked).status_code == 200
        running.close()


def test_a_newcomer_without_samples_is_refused_where_states_decide(serve: Callable[..., Any]) -> None:
    with serve(RoutingParams()) as served:
        answer = add(served, samples=None)
        assert answer.status_code == 400
        assert "samples: missing" in answer.json()["error"]["message"]
        assert served.engine.blend.names == ("math", "science", "code")


def test_an_adapter_whose_states_cannot_be_read_leaves_nothing_behind(serve: Callable[..., Any]) -> None:
    with serve(RoutingParams()) as served:
        layer = served.engine.model.model.layers[0].self_attn
        hook = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        assert add(served).status_code == 500
        hook.remove()
        served.wait_until(lambda: served.engine.blend.names == ("math", "science", "code"))
        assert add(served).status_code == 200
