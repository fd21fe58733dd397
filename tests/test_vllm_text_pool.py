"""Texts that are followed together have the sums of texts that are followed one by one, bit for bit."""

import random
from dataclasses import replace

import numpy as np
import pytest

from treadle.common.params import RoutingParams
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.router import Router
from treadle.routing.running_sum import MAX_TAIL_WORDS, Tails
from treadle.routing.schedule import DecisionCursor
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
TAILS = [(), (24, 8), (1,), (3, 1, MAX_TAIL_WORDS)]


@pytest.mark.parametrize("tails", TAILS)
def test_together_is_one_by_one(embedder: StaticEmbedder, router: Router, tails: Tails) -> None:
    chance = random.Random(0)
    params = RoutingParams(every=1)
    followed = replace(router, centroids=Centroids.empty(embedder.id, embedder.dim, tails))
    prompts = [[chance.choice(PIECES) for _ in range(1 + index)] for index in range(INITIAL_ROWS + 3)]
    running = [DecisionCursor(followed, params, pieces, len(pieces)) for pieces in prompts]
    texts = TextPool(embedder, tails)
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
        for index, views in enumerate(expected):
            assert views is not None
            alone = embedder.finish(views.parts)
            exact = [0, *(1 + place for place, tail in enumerate(tails) if tail > 1)]
            np.testing.assert_array_equal(made[index][exact], alone[exact])
            np.testing.assert_allclose(made[index], alone, atol=1e-6)  # an open word alone is a difference here


def test_a_row_is_given_back_and_taken_again(embedder: StaticEmbedder) -> None:
    texts = TextPool(embedder, (4,))
    text = embedder.follow((4,))
    text.extend(["add", " three"])
    first = texts.adopt(text)
    texts.extend([first], [[" planet"]])
    texts.release(first)
    again = texts.adopt(text)
    assert again == first
    texts.extend([again], [[" atom"]])
    text.extend([" atom"])
    np.testing.assert_array_equal(texts.embeddings([again])[0], embedder.finish(text.views()))
