"""The centroids of adapters, and how near a text is to each.

A score takes embeddings (..., D) to (..., N): in closed form, without a gradient.
"""

from collections.abc import Collection
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.common.errors import AdapterError, OptionError, problem_list, unknown_name
from treadle.common.params import Score

Floats = NDArray[np.float32]

MAX_LISTED_TEXTS = 10
"""The most texts that a message names."""
SHRINKAGE = 0.2
"""The share of a multiple of the identity in the covariance of `lda`; chosen on validation prompts."""
GROUP_SAMPLES, MAX_GROUPS = 500, 16
"""The samples of one group, and the most groups of an adapter; chosen on validation prompts."""
KMEANS_ROUNDS = 20
"""The most rounds of k-means."""
MIN_LIKELIHOOD = 1e-30
"""Added to likelihoods before their logarithm, so that 0 has one."""
MIN_EXPONENT = np.float32(-87)
"""The least exponent whose exponential is a normal number; subnormal ones take a processor seven times as long."""


@dataclass(frozen=True)
class Groups:
    """P groups of samples that lie together, in the order of the adapters; `lda` compares a text with each.

    A domain is seldom one cloud: passages on physics are not near to those on music, yet both are reading.

    Attributes:
        means: (P, D) float32.
        owners: (P,) the adapter of each, by index; rising.
        sizes: (P,) samples of each.
    """

    means: Floats = field(repr=False)
    owners: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def join(self, other: "Groups", num_adapters: int) -> "Groups":
        """Return these groups, of `num_adapters`, followed by those of further adapters."""
        return Groups(
            np.concatenate([self.means, other.means]),
            np.concatenate([self.owners, other.owners + num_adapters]),
            np.concatenate([self.sizes, other.sizes]),
        )

    def keep(self, adapters: list[int]) -> "Groups":
        """Return the groups of some adapters, by index; their new indices have no gaps."""
        kept = np.isin(self.owners, adapters)
        return Groups(self.means[kept], np.searchsorted(adapters, self.owners[kept]), self.sizes[kept])

    def problems(self, counts: NDArray[np.int64], dim: int) -> list[str]:
        """Return the problems of groups of adapters with `counts` (N,) samples in `dim` dimensions."""
        if self.means.ndim != 2 or self.means.shape[1] != dim or not np.isfinite(self.means).all():
            return [f"group_means has shape {self.means.shape}, expected (groups, {dim}) of finite numbers"]
        if self.owners.shape != self.sizes.shape or self.owners.shape != self.means.shape[:1]:
            return [f"group_owners and group_sizes need one entry for each of {len(self.means)} groups"]
        rising = (np.diff(self.owners) >= 0).all() and set(self.owners.tolist()) == set(range(len(counts)))
        if not rising or (self.sizes < 1).any() or (np.bincount(self.owners, self.sizes, len(counts)) != counts).any():
            return ["the groups are not those of the adapters: owners must rise, and sizes add up to counts"]
        return []


@dataclass(frozen=True)
class Centroids:
    """The mean of each adapter's sample embeddings, their number and their scatter.

    Attributes:
        names: (N), the order of every N axis.
        means: (N, D) float32; not normalised again, as in the paper.
        counts: (N,) samples of each adapter.
        scatter: (N, D, D) float32, sum over samples of (x - mean)(x - mean)^T; the part of it within groups counts a
            sample by its words. Of chosen adapters (`among`) only their sum, (1, D, D) float64.
        embedder_id: which embedder made them; another one's embeddings mean something else.
        given_groups: the samples of each adapter in groups; None = one each.
        groups: the same, as it was read.
    """

    names: tuple[str, ...]
    means: Floats = field(repr=False)
    counts: NDArray[np.int64]
    scatter: Floats = field(repr=False)
    embedder_id: str
    given_groups: InitVar["Groups | None"] = None
    groups: Groups = field(init=False)

    def __post_init__(self, given_groups: Groups | None) -> None:
        """Check shapes and values; one message lists all problems."""
        n, d = len(self.names), self.means.shape[-1]
        is_pooled = self.scatter.dtype == np.float64 and len(self.scatter) == 1
        shapes = {"means": (n, d), "counts": (n,), "scatter": (1 if is_pooled else n, d, d)}
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
        if given_groups is not None and not problems:
            problems = given_groups.problems(self.counts, d)
        if problems:
            raise OptionError(problem_list("centroids:", problems))
        object.__setattr__(self, "groups", given_groups or Groups(self.means, np.arange(n), self.counts))

    def add(
        self,
        name: str,
        embeddings: Floats,
        num_words: NDArray[np.int64] | None = None,
        *,
        group_samples: int = GROUP_SAMPLES,
    ) -> "Centroids":
        """Return centroids with one more adapter, from its samples.

        A text's vector is the mean of its words' vectors, so its noise falls with their number. The covariance that
        `lda` divides by is of the texts that it will meet, which are longer than most parts of samples: with samples
        counted by their words, a fifth less weight goes astray on unseen subjects (`9fff023:benchmarks/scatter.py`).

        Args:
            name: of the adapter.
            embeddings: (samples, D).
            num_words: (samples,) at least 1 (`treadle.routing.embedder.num_words`); None counts every sample alike.
            group_samples: samples of one group, on average.
        """
        if name in self.names:
            raise AdapterError(f"adapter {name!r} has a centroid already.")
        if len(embeddings) == 0:
            raise OptionError(f"adapter {name!r} has no sample texts.")
        check_words(name, embeddings)
        groups, owners = group(embeddings, min(len(embeddings) // group_samples, MAX_GROUPS))
        mean = embeddings.mean(0, dtype=np.float64)
        weights = np.ones(len(embeddings)) if num_words is None else num_words / num_words.mean()
        within = embeddings - groups.means[owners].astype(np.float64)  # (samples, D)
        between = groups.means - mean  # (P, D)
        scatter = (within.T * weights) @ within + (between.T * groups.sizes) @ between
        return self.join(
            Centroids(
                names=(name,),
                means=mean[None].astype(np.float32),
                counts=np.array([len(embeddings)]),
                scatter=scatter[None].astype(np.float32),
                embedder_id=self.embedder_id,
                given_groups=groups,
            )
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
            given_groups=self.groups.join(other.groups, len(self.names)),
        )

    def among(self, names: Collection[str]) -> "Centroids":
        """Return centroids of some adapters, to score with and not to change: of their scatter they keep the sum."""
        keep = [index for index, name in enumerate(self.names) if name in names]
        chosen = np.isin(np.arange(len(self.names)), keep)[:, None, None]
        pooled = self.scatter.sum(0, dtype=np.float64, keepdims=True, where=chosen)  # (1, D, D)
        return self._of(keep, pooled)

    def _of(self, keep: list[int], scatter: Any) -> "Centroids":
        """Return the centroids of some adapters, by index, with their scatter."""
        return replace(
            self,
            names=tuple(self.names[index] for index in keep),
            means=self.means[keep],
            counts=self.counts[keep],
            scatter=scatter,
            given_groups=self.groups.keep(keep),
        )

    def remove(self, name: str) -> "Centroids":
        """Return centroids without one adapter; the others' numbers do not change."""
        if name not in self.names:
            raise AdapterError(unknown_name("adapter", name, self.names))
        keep = [index for index, other in enumerate(self.names) if other != name]
        return self._of(keep, self.scatter[keep])

    @classmethod
    def empty(cls, embedder_id: str, dim: int) -> "Centroids":
        """Return centroids of no adapter, to `add` to."""
        return cls((), np.zeros((0, dim), np.float32), np.zeros(0, np.int64), np.zeros((0, dim, dim), np.float32),
                   embedder_id)  # fmt: skip

    def score(self, embeddings: Floats, score: Score) -> Floats:
        """Return the scores (..., N) of embeddings (..., D): cosines, or log-posteriors for `lda`.

        The vector 0 is a text without a known word: it is no evidence for anybody, so all its scores are alike.
        """
        if not self.names:
            return np.zeros((*embeddings.shape[:-1], 0), np.float32)
        if score == "cosine":
            return _cosine(embeddings, self.means)
        if score == "centred":
            middle = self.means.mean(0)
            return _cosine(embeddings - middle, self.means - middle) * embeddings.any(-1, keepdims=True)
        return log_softmax(self.evidence(embeddings))

    def evidence(self, embeddings: Floats) -> Floats:
        """Return log p(embedding | adapter) (..., N) of embeddings (..., D), up to a term that all adapters share.

        It is 0 for the vector 0, a text without a known word.
        """
        slopes, offsets = self._discriminant
        each = embeddings @ slopes + offsets  # (..., P)
        if len(self.groups.owners) > len(self.names):
            beside = np.exp(np.maximum(each - each.max(-1, keepdims=True), MIN_EXPONENT))
            each = np.log(np.add.reduceat(beside, self._starts, -1) + MIN_LIKELIHOOD)
        return each * embeddings.any(-1, keepdims=True)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where each adapter's groups begin, (N,)."""
        return np.searchsorted(self.groups.owners, np.arange(len(self.names)))

    @cached_property
    def _discriminant(self) -> tuple[Floats, Floats]:
        """The linear discriminant: slopes (D, P) and offsets (P,) of log p(embedding in group | adapter), up to a term.

        Adapters have equal priors, groups of one their shares. The covariance is pooled over the groups and shrunk
        towards a multiple of the identity by SHRINKAGE.
        """
        groups = self.groups
        freedom = int(self.counts.sum()) - len(groups.sizes)
        if freedom < 1:
            raise OptionError("score lda needs an adapter with at least two samples; use cosine or centred.")
        apart = (groups.means - self.means[groups.owners]).astype(np.float64)  # (P, D)
        between = (apart * groups.sizes[:, None]).T @ apart
        pooled = (self.scatter.sum(0, dtype=np.float64) - between) / freedom  # (D, D), within groups
        spherical = np.trace(pooled) / len(pooled) * np.eye(len(pooled))
        covariance = (1 - SHRINKAGE) * pooled + SHRINKAGE * spherical
        covariance += 1e-12 * np.eye(len(pooled))
        try:
            slopes = np.linalg.solve(covariance, groups.means.T.astype(np.float64))  # (D, P)
        except np.linalg.LinAlgError as error:  # such a scatter is of no samples
            raise OptionError(f"score lda: the scatter of the centroids cannot be inverted: {error}") from error
        offsets = -0.5 * np.einsum("pd,dp->p", groups.means, slopes)
        offsets += np.log(groups.sizes / self.counts[groups.owners])
        reach = np.linalg.norm(slopes, axis=0) + abs(offsets)  # (P,) of embeddings, whose length is 1 at most
        if not (reach < np.finfo(np.float32).max / 4).all():
            raise OptionError("score lda: the scatter of the centroids gives no finite scores; use cosine or centred.")
        return slopes.astype(np.float32), offsets.astype(np.float32)


def group(embeddings: Floats, number: int) -> tuple[Groups, NDArray[np.int64]]:
    """Put (samples, D) of one adapter in at most `number` groups, by k-means from a fixed seed (k-means++).

    Returns:
        the groups, and which of them each sample is in (samples,).
    """
    x = embeddings.astype(np.float64)
    random = np.random.default_rng(0)
    centres = x[random.integers(len(x))][None]  # (1, D), then more
    far = ((x - centres[0]) ** 2).sum(1)  # (samples,) squared distance to the nearest centre
    for _ in range(number - 1):
        if not far.any():
            break  # all samples are centres
        centres = np.concatenate([centres, x[random.choice(len(x), p=far / far.sum())][None]])
        far = np.minimum(far, ((x - centres[-1]) ** 2).sum(1))
    owners, sizes = np.zeros(len(x), np.int64), np.array([len(x)])
    for _ in range(KMEANS_ROUNDS):
        nearest = (x @ centres.T - 0.5 * (centres**2).sum(1)).argmax(1)
        places, owners, sizes = np.unique(nearest, return_inverse=True, return_counts=True)
        centres = np.stack([x[owners == place].mean(0) for place in range(len(places))])
    return Groups(centres.astype(np.float32), np.zeros(len(centres), np.int64), sizes), owners


def check_words(name: str, embeddings: Floats) -> None:
    """Raise an OptionError if texts of an adapter have the vector 0 in (samples, D).

    Of such a text the embedder knows no word, or it has none.
    """
    empty = np.flatnonzero(~embeddings.any(-1)).tolist()
    if empty:
        shown = ", ".join(map(str, empty[:MAX_LISTED_TEXTS])) + (" ..." if len(empty) > MAX_LISTED_TEXTS else "")
        raise OptionError(
            f"samples of {name!r}: {len(empty)} of {len(embeddings)} hold no word that the embedder knows (index "
            f"{shown}); leave them out, or give other texts."
        )


def _cosine(x: Floats, y: Floats) -> Floats:
    """Return the cosines (..., N) of x (..., D) and y (N, D); 0 for a zero vector."""
    return _unit(x) @ _unit(y).T


def _unit(x: Floats) -> Floats:
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.maximum(norms, 1e-12)).astype(np.float32)


def log_softmax(x: Floats) -> Floats:
    """Return the log-softmax over the last axis; -inf stays -inf."""
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
