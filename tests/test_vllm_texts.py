"""Texts that are followed together have the sums of texts that are followed one by one, bit for bit."""

import random

import numpy as np
import pytest

from treadle.common.params import RoutingParams
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.router import Router, RunningText
from treadle.serving.vllm.texts import FIRST_ROWS, Texts, Words

PIECES = [
    "add",
    " three",
    "ing",
    ".",
    ", ",
    "",
    " ",
    "_x",
    " planet;",
    "\n\n",
    "9",
    " (loop",
    "é",
    "🙂",
    "a" * 45,
    "atom atom",
]
VIEWS = {
    "all and recent": RoutingParams(),
    "all": RoutingParams(recent=None),
    "window": RoutingParams(window=5, recent=None),
    "window and recent": RoutingParams(window=7, recent=3),
}


@pytest.mark.parametrize("views", VIEWS)
def test_together_is_one_by_one(embedder: StaticEmbedder, router: Router, views: str) -> None:
    chance = random.Random(0)
    params = VIEWS[views]
    running = [RunningText(router, params) for _ in range(FIRST_ROWS + 3)]
    read: list[list[str]] = [[chance.choice(PIECES) for _ in range(1 + index)] for index in range(len(running))]
    prompts = [len(each) for each in read]
    for text, pieces in zip(running, read, strict=True):
        text.decide(pieces, len(pieces), len(pieces))
    texts = Texts(Words(embedder), running[0].spans)
    rows = [texts.adopt(text.longest.state()) for text in running]  # type: ignore[attr-defined]
    for _ in range(60):
        chosen = [index for index in range(len(rows)) if chance.random() < 0.7]
        news = [[chance.choice(PIECES) for _ in range(chance.choice([1, 1, 3]))] for _ in chosen]
        texts.extend([rows[index] for index in chosen], news)
        expected = []
        for index, pieces in zip(chosen, news, strict=True):
            read[index] += pieces
            expected.append(running[index].decide(read[index], len(read[index]), prompts[index]))
        made = texts.embeddings([rows[index] for index in chosen])
        for index, views_of in enumerate(expected):
            np.testing.assert_array_equal(made[index], embedder.finish(views_of))


def test_a_row_is_given_back_and_taken_again(embedder: StaticEmbedder) -> None:
    texts = Texts(Words(embedder), (None, 4))
    track = embedder.track(4)
    track.extend(["add", " three"])
    first = texts.adopt(track.state())
    texts.extend([first], [[" planet"]])
    texts.release(first)
    again = texts.adopt(track.state())
    assert again == first
    texts.extend([again], [[" atom"]])
    track.extend([" atom"])
    np.testing.assert_array_equal(texts.embeddings([again])[0], embedder.finish([track.whole(), track.snapshot()]))
