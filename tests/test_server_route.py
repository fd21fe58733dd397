"""POST /v1/route holds nobody up, and is held up by nobody."""

import asyncio
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.routing.embedder import StaticEmbedder
from treadle.routing.explain import MAX_COUNTED_WORDS, explain
from treadle.routing.router import Router
from treadle.routing.sentence_embedder import SentenceEmbedder
from treadle.serving.openai.queues import Client
from treadle.serving.openai.requests import MAX_TOKEN_CHARACTERS

from conftest import SAMPLES
from serving import Serving, serving

ROUTE = "/v1/route"


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, max_prompt_tokens=10, request_timeout=2.0) as each:
        yield each


def test_a_text_is_weighed_while_the_engine_is_busy(served: Serving) -> None:
    with served.paused():
        assert served.post(ROUTE, {"text": "def loop"}).json()["names"] == ["math", "science", "code"]


class Neural(SentenceEmbedder):
    """A sentence embedder without its model, under another's id."""

    def __init__(self, other: StaticEmbedder) -> None:
        self.id, self.dim = other.id, other.dim


def test_a_neural_embedder_stays_in_the_engines_thread(served: Serving, embedder: StaticEmbedder) -> None:
    def thread() -> str:
        name = asyncio.run(served.state.weigh(lambda _: threading.current_thread().name, Client(), 0))
        return name.partition("_")[0]

    assert thread() == "treadle-weigh"
    own = served.engine.router
    served.engine.router = replace(own, embedder=Neural(embedder))
    try:
        assert thread() == "treadle-engine"
    finally:
        served.engine.router = own


def test_a_text_has_as_many_characters_as_a_prompt_may_have(served: Serving) -> None:
    most = 10 * MAX_TOKEN_CHARACTERS
    assert served.post(ROUTE, {"text": "x" * most}).status_code == 200
    refused = served.post(ROUTE, {"text": "x" * (most + 1), "model": "math"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    assert f"text: got {most + 1} characters; allowed: at most {most}" in refused.json()["error"]["message"]


def test_a_text_that_takes_too_long_is_given_up(served: Serving) -> None:
    with served.blocked(served.state.weighing):
        answer = served.post(ROUTE, {"text": "loop"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_only_the_most_frequent_words_are_looked_at_one_by_one(router: Router, embedder: StaticEmbedder) -> None:
    looked_at: list[int] = []

    class Counting(StaticEmbedder):
        def finish(self, views: Sequence[Any]) -> Any:
            looked_at.append(len(views))
            return super().finish(views)

    router = replace(router, embedder=Counting(embedder.model))
    text = " ".join(f"x{number}" for number in range(MAX_COUNTED_WORDS + 500)) + " loop" * 9
    assert explain(router, text).words
    assert max(looked_at) == (MAX_COUNTED_WORDS + 1) * (1 + len(router.tails))


class InterruptedModel:
    """A model during whose third word another thread embeds other words."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.other: threading.Thread | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokenize(self, words: Sequence[str]) -> Iterator[Sequence[int]]:
        for number, ids in enumerate(self._model.tokenize(words)):
            if number == 2 and self.other is not None:  # some of the first text's words are there
                other, self.other = self.other, None
                other.start()
                other.join()
            yield ids


def test_an_embedder_whose_words_another_thread_drops_meanwhile_knows_its_own(embedder: StaticEmbedder) -> None:
    texts = [" ".join(samples) for samples in SAMPLES.values()]
    model = InterruptedModel(embedder.model)
    few = StaticEmbedder(model, max_cached_words=3)  # type: ignore[arg-type]
    model.other = other = threading.Thread(target=few.encode, args=[["atom heat cell"]])
    np.testing.assert_allclose(few.encode(texts), embedder.encode(texts), atol=1e-6)
    assert other.ident is not None  # it ran
