"""The law of the loop under load: whatever comes, whenever it comes or goes, each answer is the one alone.

`TREADLE_LOAD=2000 python -m pytest tests/test_random_load.py` runs as many requests.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from random import Random

import numpy as np
import pytest

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.completion import Completion
from treadle.engine.engine import Engine
from treadle.engine.sequence import OutputOptions, TokenSequence
from treadle.serving.openai.jobs import Job, News, Started, Work
from treadle.serving.openai.loop import Loop
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.targets import Routers

NUM_REQUESTS = int(os.environ.get("TREADLE_LOAD", "40"))
ROUTINGS = (
    RoutingParams(),
    RoutingParams(every=1, temperature=5.0),
    RoutingParams(every=None),
    RoutingParams(every=2, prefill="causal", temperature=5.0),
    RoutingParams(every=3, past="recompute", temperature=4.0),
    RoutingParams(rule="top_k", top_k=1),
    RoutingParams.one("math"),
    RoutingParams.one("code"),
    RoutingParams.base(),
)
REPORTS = (
    OutputOptions(),
    OutputOptions(),
    OutputOptions(likeliest=3),
    OutputOptions(likeliest=2, prompt=True),
    OutputOptions(comparison=True),
)


@dataclass
class Request:
    """A job, its news, and when it is given up: after so many rounds, None = never."""

    job: Job
    patience: int | None
    news: list[News] = field(default_factory=list)


def requests(random: Random, count: int) -> Iterator[Request]:
    """Yield requests of every kind; some begin like others, so that prefixes are found."""
    beginnings = [[random.randrange(256) for _ in range(60)] for _ in range(3)]
    for number in range(count):
        prompts: list[list[int]] = []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            length = random.choice((1, 2, random.randint(3, 20), random.randint(20, 90)))
            fresh = [random.randrange(256) for _ in range(length)]
            prompt = [*random.choice(beginnings)[: random.randint(20, 60)], *fresh] if random.random() < 0.3 else fresh
            prompts += [prompt] * random.choice((1, 1, 2, 4))
        stop = tuple(random.sample("etaoins rhld3", random.choice((0, 0, 1, 3))))
        temperature, max_tokens = random.choice((0.0, 0.0, 0.7)), random.randint(1, 8)
        sampling = [
            SamplingParams(temperature, random.choice((1.0, 0.5)), random.choice((0, 5)), max_tokens, stop, seed)
            for seed in range(number, number + len(prompts))
        ]
        work = Work(prompts, sampling, random.choice(ROUTINGS), random.choice(REPORTS), None, random.choice("ab"))
        patience = random.choice((None, None, None, None, random.randrange(6)))
        request = Request(Job(work, lambda _: None), patience)
        request.job.tell = request.news.append
        yield request


def run(loop: Loop, random: Random, coming: Iterator[Request]) -> list[Request]:
    """Let requests come at random until all have ended; return them."""
    taken: list[Request] = []
    there = next(coming, None)
    while there or loop.is_busy:
        while there and (not loop.is_busy or random.random() < 0.5):  # a few at once, then some rounds of none
            taken.append(there)
            loop.accept(there.job)
            there = next(coming, None)
        for request in taken[-40:]:
            if request.patience is not None:
                request.patience -= 1
                if request.patience < 0:
                    loop.give_up(request.job)
        loop.advance()
    return taken


def assert_alone(row: TokenSequence, alone: Completion) -> None:
    assert tuple(event.token_id for event in row.events) == alone.token_ids
    assert "".join(event.text for event in row.events) == alone.text
    assert row.events[-1].finish_reason == alone.finish_reason
    np.testing.assert_allclose([event.logprob for event in row.events], alone.logprobs, atol=2e-4)
    np.testing.assert_allclose([event.weights for event in row.events], alone.weights, atol=1e-5)
    assert all(len(event.likeliest) == row.report.likeliest for event in row.events)
    assert len(row.prompt_scores) == (row.prompt_tokens - 1 if row.report.prompt else 0)


@pytest.mark.parametrize("options", [{}, {"prompt_chunk": 24, "max_batch": 5, "prefix_cache": 0}])
def test_each_answer_under_random_load_is_the_one_alone(engine: Engine, options: dict[str, int]) -> None:
    @cache
    def alone(prompt: tuple[int, ...], sampling: SamplingParams, routing: int) -> Completion:
        return engine.generate_ids([prompt], sampling=sampling, routing=ROUTINGS[routing])[0]

    random = Random(NUM_REQUESTS + len(options))
    loop = Loop(engine, Routers(engine).among, ServeParams(**options), Metrics())
    taken = run(loop, random, requests(random, NUM_REQUESTS // 2))
    num_whole = 0
    for request in taken:
        work, rows = request.job.work, request.job.rows
        assert not [each for each in request.news if isinstance(each, Exception)]
        assert isinstance(request.news[0], Started)
        if request.patience is not None and not all(row.is_finished for row in rows):
            continue  # given up
        num_whole += 1
        for row, prompt, sampling in zip(rows, work.prompts, work.sampling, strict=True):
            assert_alone(row, alone(tuple(prompt), sampling, ROUTINGS.index(work.routing)))
    assert num_whole > len(taken) / 2
    assert loop.num_ended == sum(request.job.num_sequences for request in taken)
    assert engine.running == ()
