"""What the router knows of each adapter, and how near a text is to it.

A score takes embeddings (..., D) to (..., N): in closed form, without a gradient.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treadle.errors import AdapterError, OptionError, problem_list, unknown_name
from treadle.params import Score

Floats = NDArray[np.float32]

LISTED = 10
"""Texts that a message names at most."""
SHRINKAGE = 0.3
"""How far `lda` moves the pooled covariance towards a multiple of the identity; chosen on validation prompts."""


@dataclass(frozen=True)
class Centroids:
    """What the router knows of each adapter: the mean of its samples' embeddings, their number and their scatter.

    Attributes:
        names: (N), the order of every N axis.
        means: (N, D) float32; not normalised again, as in the paper.
        counts: (N,) samples of each adapter.
        scatter: (N, D, D) float32, sum over samples of (x - mean)(x - mean)^T.
        embedder_id: which embedder made them; another one's embeddings mean something else.
    """

    names: tuple[str, ...]
    means: Floats = field(repr=False)
    counts: NDArray[np.int64]
    scatter: Floats = field(repr=False)
    embedder_id: str

    def __post_init__(self) -> None:
        """Check shapes and values; one message lists all problems."""
        n, d = len(self.names), self.means.shape[-1]
        shapes = {"means": (n, d), "counts": (n,), "scatter": (n, d, d)}
        problems = [
            f"{name} has shape {getattr(self, name).shape}, expected {shape}"
            for name, shape in shapes.items()
            if getattr(self, name).shape != shape
        ]
        problems += [f"{name} holds NaN or infinity" for name in shapes if not np.isfinite(getattr(self, name)).all()]
        if len(set(self.names)) != n:
            problems.append(f"names repeat: {', '.join(self.names)}")
        if (self.counts < 1).any():
            problems.append("every adapter needs at least one sample")
        if problems:
            raise OptionError(problem_list("centroids:", problems))

    def add(self, name: str, embeddings: Floats) -> "Centroids":
        """Return centroids with one more adapter, from its samples' embeddings (samples, D)."""
        if name in self.names:
            raise AdapterError(f"adapter {name!r} has a centroid already.")
        if len(embeddings) == 0:
            raise OptionError(f"adapter {name!r} has no sample texts.")
        check_words(name, embeddings)
        mean = embeddings.mean(0, dtype=np.float64)
        spread = embeddings - mean
        return Centroids(
            names=(*self.names, name),
            means=np.concatenate([self.means, mean[None].astype(np.float32)]),
            counts=np.append(self.counts, len(embeddings)),
            scatter=np.concatenate([self.scatter, (spread.T @ spread)[None].astype(np.float32)]),
            embedder_id=self.embedder_id,
        )

    def join(self, other: "Centroids") -> "Centroids":
        """Return these centroids followed by others that the same embedder made."""
        if other.embedder_id != self.embedder_id:
            raise OptionError(
                f"the centroids of {', '.join(other.names)} were made by the embedder {other.embedder_id!r}, not "
                f"{self.embedder_id!r}: name that embedder, or give sample texts."
            )
        if both := sorted(set(self.names) & set(other.names)):
            raise AdapterError(f"adapter {', '.join(map(repr, both))} has a centroid already.")
        return Centroids(
            names=(*self.names, *other.names),
            means=np.concatenate([self.means, other.means]),
            counts=np.concatenate([self.counts, other.counts]),
            scatter=np.concatenate([self.scatter, other.scatter]),
            embedder_id=self.embedder_id,
        )

    def remove(self, name: str) -> "Centroids":
        """Return centroids without one adapter; the others' numbers do not change."""
        if name not in self.names:
            raise AdapterError(unknown_name("adapter", name, self.names))
        keep = [index for index, other in enumerate(self.names) if other != name]
        names = tuple(self.names[index] for index in keep)
        return replace(self, names=names, means=self.means[keep], counts=self.counts[keep], scatter=self.scatter[keep])

    @classmethod
    def empty(cls, embedder_id: str, dim: int) -> "Centroids":
        """Return centroids of no adapter, to `add` to."""
        return cls((), np.zeros((0, dim), np.float32), np.zeros(0, np.int64), np.zeros((0, dim, dim), np.float32),
                   embedder_id)  # fmt: skip

    def score(self, embeddings: Floats, score: Score) -> Floats:
        """Return the scores (..., N) of embeddings (..., D): cosines, or log-posteriors for `lda`."""
        if not self.names:
            return np.zeros((*embeddings.shape[:-1], 0), np.float32)
        if score == "cosine":
            return _cosine(embeddings, self.means)
        if score == "centred":
            middle = self.means.mean(0)
            return _cosine(embeddings - middle, self.means - middle)
        slopes, offsets = self._discriminant
        return log_softmax(embeddings @ slopes + offsets)

    @cached_property
    def _discriminant(self) -> tuple[Floats, Floats]:
        """The linear discriminant: slopes (D, N) and offsets (N,) of log p(adapter | embedding) with equal priors.

        Its covariance is pooled over the adapters and shrunk towards a multiple of the identity by SHRINKAGE.
        """
        freedom = int(self.counts.sum()) - len(self.names)
        if freedom < 1:
            raise OptionError("score lda needs an adapter with at least two samples; use cosine or centred.")
        pooled = self.scatter.sum(0, dtype=np.float64) / freedom  # (D, D)
        spherical = np.trace(pooled) / len(pooled) * np.eye(len(pooled))
        covariance = (1 - SHRINKAGE) * pooled + SHRINKAGE * spherical
        slopes = np.linalg.solve(covariance + 1e-12 * np.eye(len(pooled)), self.means.T.astype(np.float64))  # (D, N)
        offsets = -0.5 * np.einsum("nd,dn->n", self.means, slopes)
        return slopes.astype(np.float32), offsets.astype(np.float32)


def check_words(name: str, embeddings: Floats) -> None:
    """Raise an OptionError if texts of an adapter have the vector 0 in (samples, D): they would look near to anything.

    Of such a text the embedder knows no word, or it has none.
    """
    empty = np.flatnonzero(~embeddings.any(-1)).tolist()
    if empty:
        shown = ", ".join(map(str, empty[:LISTED])) + (" ..." if len(empty) > LISTED else "")
        raise OptionError(
            f"samples of {name!r}: {len(empty)} of {len(embeddings)} hold no word that the embedder knows (index "
            f"{shown}); leave them out, or give other texts."
        )


def _cosine(x: Floats, y: Floats) -> Floats:
    """Return the cosines (..., N) of x (..., D) and y (N, D); a zero vector has cosine 0 with everything."""
    return _unit(x) @ _unit(y).T


def _unit(x: Floats) -> Floats:
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.maximum(norms, 1e-12)).astype(np.float32)


def log_softmax(x: Floats) -> Floats:
    """Return the log-softmax over the last axis; -inf stays -inf."""
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
