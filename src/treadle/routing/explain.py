"""Explains the weights of a text: scores, cosines, and the words that count most for the nearest adapter."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from treadle.common.params import RoutingParams
from treadle.routing.centroids import Floats
from treadle.routing.embedder import WORD, StaticEmbedder
from treadle.routing.router import Router
from treadle.routing.schedule import Seen
from treadle.routing.states import uses_states

MAX_LISTED_WORDS = 6
MAX_COUNTED_WORDS = 2000
"""The most different words that are looked at, the most frequent first: each costs a score."""


@dataclass(frozen=True)
class Explanation:
    """The weights of one text, and what they are made from.

    Attributes:
        names: (N) of the adapters.
        cosines: (N) of the text with each centroid; None where an adapter has no samples.
        scores: (N) by the params' score, None there, too; empty under fixed weights.
        weights: (N).
        base: the base's share.
        words: the words that raised the nearest adapter's score most over the second's, with how much: in the score's
            units for `lda`, relative to each other for cosines. Static embedder only.
        provisional: the base model's own states decide finally, once it has read the text.
    """

    names: tuple[str, ...]
    cosines: tuple[float | None, ...]
    scores: tuple[float | None, ...]
    weights: tuple[float, ...]
    base: float = 0.0
    words: tuple[tuple[str, float], ...] = ()
    provisional: bool = False


def explain(router: Router, text: str, params: RoutingParams | None = None) -> Explanation:
    """Explain the weights of one text."""
    params = params or router.params
    seen = router.see([text], is_running=params.prefill == "causal")
    is_fixed = params.rule == "fixed"
    compared = router.compare(seen, params)
    weights = router.weights([text], params)[0]  # (N,)
    return Explanation(
        names=router.names,
        cosines=_known(compared.cosines[0]),
        scores=() if is_fixed else _known(compared.scores[0]),
        weights=tuple(weights.tolist()),
        base=max(0.0, 1.0 - float(weights.sum())),
        words=() if is_fixed or len(router.centroids.names) < 2 else _words(router, text, params),
        provisional=uses_states(router.states, params),
    )


def _known(numbers: Floats) -> tuple[float | None, ...]:
    """Return numbers (N,), with None for NaN."""
    return tuple(None if np.isnan(number) else number for number in numbers.tolist())


def _words(router: Router, text: str, params: RoutingParams) -> tuple[tuple[str, float], ...]:
    """Return the words whose removal costs the nearest adapter most of its lead over the second."""
    embedder = router.embedder
    if not isinstance(embedder, StaticEmbedder):
        return ()
    everything = WORD.findall(text)
    counts = Counter(everything)
    words = sorted(word for word, _ in counts.most_common(MAX_COUNTED_WORDS))
    if not words:
        return ()
    whole = embedder.sum_words(everything)  # (D,)
    sums = [*embedder.views(text, router.tails)]
    for word in words:
        sums.append(whole - counts[word] * embedder.sum_words([word]))
        sums += [embedder.sum_words(_last_without(everything, word, tail)) for tail in router.tails]
    views = embedder.finish(sums).reshape(1 + len(words), -1, embedder.dim)
    is_running = np.full(len(views), params.prefill == "causal")
    routed = len(router.centroids.names)
    scores = router.compare(Seen(views, is_running), params).scores[:, :routed]  # (1 + words, adapters with samples)
    second, first = np.argsort(scores[0])[-2:]
    lead = scores[:, first] - scores[:, second]
    order = np.argsort(lead[1:] - lead[0])[:MAX_LISTED_WORDS]
    return tuple((words[index], float(lead[0] - lead[1 + index])) for index in order if lead[0] > lead[1 + index])


def _last_without(words: Sequence[str], left_out: str, count: int) -> list[str]:
    """Return the last words of a text without one of them."""
    return list(islice((word for word in reversed(words) if word != left_out), count))
