"""Explains the weights of a text: scores, cosines, and the words that count most for the nearest adapter."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from treadle.common.params import RoutingParams
from treadle.routing.embedder import WORD, StaticEmbedder
from treadle.routing.router import Router

MAX_LISTED_WORDS = 6
MAX_COUNTED_WORDS = 2000
"""The most different words that are looked at, the most frequent first: each costs a score."""


@dataclass(frozen=True)
class Explanation:
    """The weights of one text, and what they are made from.

    Attributes:
        names: (N) of the adapters.
        cosines: (N) of the text with each centroid.
        scores: (N) by the params' score; empty under fixed weights.
        weights: (N).
        begin: where the last topic of the text begins, as an index of characters (`RoutingParams.change`).
        words: the words that raised the nearest adapter's score most over the second's, with how much: in the score's
            units for `lda`, relative to each other for cosines. Static embedder only.
    """

    names: tuple[str, ...]
    cosines: tuple[float, ...]
    scores: tuple[float, ...]
    weights: tuple[float, ...]
    begin: int = 0
    words: tuple[tuple[str, float], ...] = ()


def explain(router: Router, text: str, params: RoutingParams | None = None) -> Explanation:
    """Explain the weights of one text."""
    params = params or router.params
    begin = router.topic_start(text, params)
    text = text[begin:]
    embedding = router.embedder.encode([text])[0]  # (D,)
    is_fixed = params.rule == "fixed"
    scores = router.centroids.score(embedding, params.score)  # (N,)
    return Explanation(
        names=router.names,
        cosines=tuple(router.centroids.score(embedding, "cosine").tolist()),
        scores=() if is_fixed else tuple(scores.tolist()),
        weights=tuple(router.weights([text], replace(params, change=None))[0].tolist()),
        begin=begin,
        words=() if is_fixed or len(router.names) < 2 else _words(router, text, params),
    )


def _words(router: Router, text: str, params: RoutingParams) -> tuple[tuple[str, float], ...]:
    """Return the words whose removal costs the nearest adapter most of its lead over the second."""
    embedder = router.embedder
    if not isinstance(embedder, StaticEmbedder):
        return ()
    counts = Counter(WORD.findall(text))
    words = sorted(word for word, _ in counts.most_common(MAX_COUNTED_WORDS))
    if not words:
        return ()
    everything = embedder.sum_words([*counts.elements()])  # (D,)
    without = [everything - counts[word] * embedder.sum_words([word]) for word in words]
    scores = router.centroids.score(embedder.finish([everything, *without]), params.score)  # (1 + words, N)
    second, first = np.argsort(scores[0])[-2:]
    lead = scores[:, first] - scores[:, second]
    order = np.argsort(lead[1:] - lead[0])[:MAX_LISTED_WORDS]
    return tuple((words[index], float(lead[0] - lead[1 + index])) for index in order if lead[0] > lead[1 + index])
