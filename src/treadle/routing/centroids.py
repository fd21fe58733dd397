"""Knows the statistics of each adapter's sample texts, and how near a text is to each adapter.

A score takes embeddings (..., K, D) of a text's K views to (..., N): in closed form, without a gradient.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treadle.common.errors import AdapterError, OptionError, problem_list, unknown_name
from treadle.common.params import Score
from treadle.routing.discriminant import Discriminant
from treadle.routing.running_sum import Tails
from treadle.routing.samples import STAGES, Stage
from treadle.routing.statistics import Statistics

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

SURE_NATS = 1e4
"""By so much general text explains a text without a known word better than any adapter does."""


@dataclass(frozen=True)
class Calibration:
    """How far log-likelihoods are to be trusted, found by cross-validation on the samples.

    Attributes:
        temperature: divides them; texts of one sample are alike, so that they claim too much.
        base_bias: nats added to the log-likelihood of general text before it is divided.
    """

    temperature: float = 1.6
    base_bias: float = 0.0


@dataclass(frozen=True)
class Centroids:
    """Statistics of each adapter's sample texts, and of general text.

    Attributes:
        names: (N), the order of every N axis.
        means: (N, D) float32, of the embeddings of whole texts; not normalised again, as in the paper.
        counts: (N,) samples of each adapter.
        stages: of each stage, statistics of the K views side by side, F = K * D.
        embedder_id: which embedder made them; another one's embeddings mean something else.
        tails: words of each view but the first, which is the whole text.
        general: of each stage, statistics of general text as of one adapter; None = unknown, as in bundles of
            treadle 0.1: then the adapters share all weight.
        calibrations: of each stage.
        shrinkage: share of the sphere in the covariance of `lda`; None = as the samples say (`oas`).
    """

    names: tuple[str, ...]
    means: Floats = field(repr=False)
    counts: NDArray[np.int64]
    stages: Mapping[Stage, Statistics] = field(repr=False)
    embedder_id: str
    tails: Tails = ()
    general: Mapping[Stage, Statistics] | None = field(default=None, repr=False)
    calibrations: Mapping[Stage, Calibration] = field(default_factory=lambda: dict.fromkeys(STAGES, Calibration()))
    shrinkage: float | None = None

    def __post_init__(self) -> None:
        """Check shapes and values; one message lists all problems."""
        count, dim = len(self.names), self.means.shape[-1]
        size = dim * (1 + len(self.tails))
        shapes = {"means": (count, dim), "counts": (count,)}
        problems = [
            f"{name} has shape {getattr(self, name).shape}, expected {shape}"
            for name, shape in shapes.items()
            if getattr(self, name).shape != shape
        ]
        if not np.isfinite(self.means).all():
            problems.append("means holds NaN or infinity")
        if len(set(self.names)) != count:
            problems.append(f"names repeat: {', '.join(self.names)}")
        if (self.counts < 1).any():
            problems.append("every adapter needs at least one sample")
        for stage in STAGES:
            problems += self.stages[stage].problems(stage, count, size)
            problems += self.general[stage].problems(f"general {stage}", 1, size) if self.general else []
        if problems:
            raise OptionError(problem_list("centroids:", problems))

    @classmethod
    def empty(
        cls, embedder_id: str, dim: int, tails: Tails = (), general: Mapping[Stage, Statistics] | None = None
    ) -> "Centroids":
        """Return centroids of no adapter, to `join` others to."""
        size = dim * (1 + len(tails))
        no_floats, no_ints = np.zeros((0, dim), np.float32), np.zeros(0, np.int64)
        nothing = Statistics(
            np.zeros((0, size), np.float32),
            no_ints,
            no_ints,
            np.zeros((0, 0, size), np.float32),
            np.zeros(0, np.float32),
        )
        return cls((), no_floats, no_ints, dict.fromkeys(STAGES, nothing), embedder_id, tails, general)

    def join(self, other: "Centroids") -> "Centroids":
        """Return these centroids followed by others that the same embedder made."""
        if (other.embedder_id, other.tails) != (self.embedder_id, self.tails):
            raise OptionError(
                f"the centroids of {', '.join(other.names)} were made by the embedder {other.embedder_id!r} with tails "
                f"{other.tails}, not by {self.embedder_id!r} with {self.tails}: name that embedder, or give sample "
                "texts."
            )
        if both := sorted(set(self.names) & set(other.names)):
            raise AdapterError(f"adapter {', '.join(map(repr, both))} has a centroid already.")
        return replace(
            self,
            names=(*self.names, *other.names),
            means=np.concatenate([self.means, other.means]),
            counts=np.concatenate([self.counts, other.counts]),
            stages={stage: self.stages[stage].join(other.stages[stage]) for stage in STAGES},
        )

    def among(self, names: Collection[str]) -> "Centroids":
        """Return the centroids of some adapters; the others' numbers do not matter to them."""
        return self._of([index for index, name in enumerate(self.names) if name in names])

    def remove(self, name: str) -> "Centroids":
        """Return centroids without one adapter; the others' numbers do not change."""
        if name not in self.names:
            raise AdapterError(unknown_name("adapter", name, self.names))
        return self._of([index for index, other in enumerate(self.names) if other != name])

    def _of(self, keep: Sequence[int]) -> "Centroids":
        """Return the centroids of some adapters, by index."""
        return replace(
            self,
            names=tuple(self.names[index] for index in keep),
            means=self.means[list(keep)],
            counts=self.counts[list(keep)],
            stages={stage: self.stages[stage].keep(keep) for stage in STAGES},
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        stages = self.stages.values()
        return self.means.nbytes + sum(each.means.nbytes + each.factors.nbytes for each in stages)

    def cosines(self, embeddings: Floats, score: Score = "cosine") -> Floats:
        """Return cosines (..., N) of embeddings (..., D) with the means; `centred`: from the middle of all means.

        The vector 0 is a text without a known word: it is no evidence for anybody, so all its scores are alike.
        """
        if not self.names:
            return np.zeros((*embeddings.shape[:-1], 0), np.float32)
        if score == "cosine":
            return _cosine(embeddings, self.means)
        middle = self.means.mean(0)
        return _cosine(embeddings - middle, self.means - middle) * embeddings.any(-1, keepdims=True)

    def evidence(self, views: Floats, is_running: Bools) -> Floats:
        """Return log p(text | adapter) (..., N) of views (..., K, D), up to a term that all adapters share.

        Where general text is known, one more column is log p(text | general text), its bias included. A text without
        a known word is no evidence for any adapter: its columns are 0, and that of general text is SURE_NATS.

        Args:
            views: of each text, the whole first.
            is_running: (...) the stage of each text.
        """
        texts = views.reshape(*views.shape[:-2], views.shape[-2] * views.shape[-1])  # (..., F)
        if is_running.all():
            each = self._evidence_of(texts, "running")
        elif not is_running.any():
            each = self._evidence_of(texts, "prompt")
        else:
            both = self._evidence_of(texts, "running"), self._evidence_of(texts, "prompt")
            each = np.where(is_running[..., None], *both)
        is_silent = ~views[..., 0, :].any(-1)  # (...)
        if is_silent.any():
            each[is_silent] = 0
            each[is_silent, len(self.names) :] = SURE_NATS
        return each

    def _evidence_of(self, texts: Floats, stage: Stage) -> Floats:
        each = self.discriminants[stage].evidence(texts)
        each[..., len(self.names) :] += self.calibrations[stage].base_bias
        return each

    def temperatures(self, is_running: Bools) -> Floats:
        """Return the temperature (..., 1) of each text's log-likelihoods."""
        prompt, running = (self.calibrations[stage].temperature for stage in STAGES)
        return np.where(is_running, running, prompt)[..., None].astype(np.float32)

    @cached_property
    def discriminants(self) -> Mapping[Stage, Discriminant]:
        """The classes of each stage."""
        samples = int(self.counts.sum())
        return {
            stage: Discriminant.fit(
                self.stages[stage], samples, None if self.general is None else self.general[stage], self.shrinkage
            )
            for stage in STAGES
        }


def _cosine(a: Floats, b: Floats) -> Floats:
    """Return cosines (..., N) of a (..., D) with b (N, D); those of a zero vector are 0."""
    lengths = np.linalg.norm(a, axis=-1)[..., None] * np.linalg.norm(b, axis=-1)
    products = (a[..., None, :] @ b.T)[..., 0, :]  # one for each text: its bits do not depend on the others
    return products / np.maximum(lengths, 1e-12)


def log_softmax(scores: Floats) -> Floats:
    """Return the log of the softmax over the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
