"""Texts that are followed together have the sums of texts that are followed one by one, bit for bit."""

import random

import numpy as np
import pytest

from treadle.common.params import RoutingParams
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.router import Router
from treadle.routing.schedule import DecisionCursor, spans_of
from treadle.serving.vllm.text_pool import INITIAL_ROWS, TextPool

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
    "all and recent": RoutingParams(every=1),
    "all": RoutingParams(every=1, recent=None),
    "window": RoutingParams(every=1, window=5, recent=None),
    "window and recent": RoutingParams(every=1, window=7, recent=3),
}


@pytest.mark.parametrize("views", VIEWS)
def test_together_is_one_by_one(embedder: StaticEmbedder, router: Router, views: str) -> None:
    chance = random.Random(0)
    params = VIEWS[views]
    prompts = [[chance.choice(PIECES) for _ in range(1 + index)] for index in range(INITIAL_ROWS + 3)]
    running = [DecisionCursor(router, params, pieces, len(pieces)) for pieces in prompts]
    texts = TextPool(embedder, spans_of(params))
    rows: list[int] = []
    for text in running:
        text.decide(text.num_tokens)
        assert text.sum is not None
        rows.append(texts.adopt(text.sum))
    for _ in range(60):
        chosen = [index for index in range(len(rows)) if chance.random() < 0.7]
        news = [[chance.choice(PIECES) for _ in range(chance.choice([1, 1, 3]))] for _ in chosen]
        texts.extend([rows[index] for index in chosen], news)
        expected = []
        for index, pieces in zip(chosen, news, strict=True):
            running[index].add(pieces)
            expected.append(running[index].decide_last(running[index].num_tokens))
        made = texts.embeddings([rows[index] for index in chosen])
        for index, views_of in enumerate(expected):
            np.testing.assert_array_equal(made[index], embedder.finish(views_of))


def test_a_row_is_given_back_and_taken_again(embedder: StaticEmbedder) -> None:
    texts = TextPool(embedder, (None, 4))
    text = embedder.follow((None, 4))
    text.extend(["add", " three"])
    first = texts.adopt(text)
    texts.extend([first], [[" planet"]])
    texts.release(first)
    again = texts.adopt(text)
    assert again == first
    texts.extend([again], [[" atom"]])
    text.extend([" atom"])
    np.testing.assert_array_equal(texts.embeddings([again])[0], embedder.finish(text.views()))
