"""How well a router knows the domain, by itself: accuracy and confusion on held-out examples, without the base model.

Four kinds of text: the prompt as it is asked, the prompt without the template's words (a router must know the domain,
not the word `Context:`), and the running text with half of its reference answer and with all of it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.common.errors import OptionError, unknown_name
from treadle.common.params import RoutingParams
from treadle.experiments.tasks import Example
from treadle.routing.router import Router

TEXT_KINDS = ("template", "bare", "half", "answer")
"""Before generation: prompts with the template and without its words. During it: half of the answer, and all of it."""


RUNNING_KINDS = ("half", "answer")


@dataclass(frozen=True)
class Quality:
    """Decisions of a router on held-out examples of each adapter's domain.

    Attributes:
        names: (N) adapters.
        score: which score was read.
        confusion: kind -> (N, N) shares: row = the domain, column = the adapter that came nearest; rows sum to 1.
        accuracy: kind -> mean over the domains of the share that came nearest to their own.
        cosines: (N, N) cosines between the centroids, of the score's kind (centred ones for `centred`).
        separation: mean distance between the prompts of two adapters, in standard deviations within their groups;
            None for one adapter.
        distributions: domain -> cosines (examples, N) of its prompts to all centroids.
    """

    names: tuple[str, ...]
    score: str
    confusion: Mapping[str, list[list[float]]]
    accuracy: Mapping[str, float]
    cosines: list[list[float]]
    separation: float | None
    distributions: Mapping[str, list[list[float]]]


def route_quality(router: Router, examples: Mapping[str, Sequence[Example]], params: RoutingParams) -> Quality:
    """Route held-out examples of each adapter's domain and count which adapter came nearest.

    Args:
        router: centroids and embedder; adapters without samples are left out.
        examples: adapter -> examples that it was not fitted on; adapters without examples get rows of zeros.
        params: only the score is read.
    """
    router = router.among(router.centroids.names)  # adapters without samples are never the nearest
    unknown = [unknown_name("adapter", name, router.names) for name in examples if name not in router.names]
    if unknown or not examples:
        raise OptionError("; ".join(unknown) or "give examples of at least one adapter's domain")
    confusion: dict[str, Any] = {kind: np.zeros((len(router.names),) * 2) for kind in TEXT_KINDS}
    for name, rows in examples.items():
        for kind in TEXT_KINDS:
            texts = [text for text in (_text(row, kind) for row in rows) if text]
            if texts:
                nearest = router.scores(texts, params, is_running=kind in RUNNING_KINDS).argmax(-1)
                shares = np.bincount(nearest, minlength=len(router.names)) / len(texts)
                confusion[kind][router.names.index(name)] = shares
    accuracy = {
        kind: float(np.mean([table[i, i] for i in np.flatnonzero(table.any(1))]))  # over domains with such texts
        for kind, table in confusion.items()
        if table.any()
    }
    means = router.centroids.means
    return Quality(
        names=router.names,
        score=params.score,
        confusion={kind: table.tolist() for kind, table in confusion.items() if table.any()},
        accuracy=accuracy,
        cosines=router.centroids.cosines(means, "centred" if params.score == "centred" else "cosine").tolist(),
        separation=_separation(router),
        distributions={
            name: router.centroids.cosines(router.embedder.encode([each.prompt for each in rows])).tolist()
            for name, rows in examples.items()
        },
    )


def _text(example: Example, kind: str) -> str:
    """Return the text of an example that a kind is about."""
    words = re.findall(r"\s*\S+", example.completion)
    half = example.routed + "".join(words[: len(words) // 2])
    whole = example.routed + example.completion
    return {"template": example.routed, "bare": example.bare, "half": half, "answer": whole}[kind]


def _separation(router: Router) -> float | None:
    """Return the mean distance between the prompts of two adapters, in standard deviations within their groups."""
    if len(router.names) < 2:
        return None
    made, owners = router.centroids.discriminants["prompt"], router.centroids.stages["prompt"].owners
    middles = np.stack([made.means.T[owners == index].mean(0) for index in range(len(router.names))])  # (N, A)
    gaps = np.linalg.norm(middles[:, None] - middles, axis=-1)  # (N, N)
    return float(gaps[np.triu_indices(len(gaps), 1)].mean())
