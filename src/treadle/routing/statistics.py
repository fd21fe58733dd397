"""Statistics of the embeddings of sample texts: the mean of each group, and each adapter's scatter around them.

Adapters can join and leave without the texts of the others, because each one's numbers stand for themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treadle.routing.samples import SampleText, Stage

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MAX_FACTORS = 128
"""The axes of an adapter's scatter that are kept one by one; all others share their mean."""


@dataclass(frozen=True)
class Statistics:
    """Means and scatter of the texts of N adapters, whose texts are in P groups. F numbers describe a text.

    Attributes:
        means: (P, F) float32, of the texts of each group.
        owners: (P,) the adapter of each group, by index; rising.
        sizes: (P,) the texts of each group.
        factors: (N, R, F); an adapter's scatter within its groups is factors^T factors + rest * identity.
        rest: (N,) float32.
    """

    means: Floats = field(repr=False)
    owners: Ints
    sizes: Ints
    factors: Floats = field(repr=False)
    rest: Floats

    @classmethod
    def of(
        cls, texts: Floats, kinds: Sequence[str], max_factors: int = MAX_FACTORS, drift: Floats | None = None
    ) -> "Statistics":
        """Return the statistics of one adapter from its texts (texts, F); texts of a kind are a group.

        `drift` (pairs, F) are differences that do not matter; they widen the scatter.
        """
        x = texts.astype(np.float64)
        _, groups, sizes = np.unique(np.array(kinds), return_inverse=True, return_counts=True)
        sums = np.zeros((len(sizes), x.shape[1]))
        np.add.at(sums, groups, x)
        means = sums / sizes[:, None]
        residuals = x - means[groups]
        if drift is not None and len(drift):
            residuals = np.concatenate([residuals, drift.astype(np.float64) * np.sqrt(len(x) / len(drift))])
        factors, rest = _factors(residuals, max_factors)
        return cls(
            means.astype(np.float32), np.zeros(len(sizes), np.int64), sizes.astype(np.int64), factors[None], rest[None]
        )

    @property
    def num_adapters(self) -> int:
        """N."""
        return len(self.rest)

    def join(self, other: "Statistics") -> "Statistics":
        """Return these statistics followed by those of further adapters."""
        count = max(self.factors.shape[1], other.factors.shape[1])
        return Statistics(
            np.concatenate([self.means, other.means]),
            np.concatenate([self.owners, other.owners + self.num_adapters]),
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([_with_rows(self.factors, count), _with_rows(other.factors, count)]),
            np.concatenate([self.rest, other.rest]),
        )

    def keep(self, adapters: Sequence[int]) -> "Statistics":
        """Return the statistics of some adapters, by rising index; their new indices have no gaps."""
        chosen = list(adapters)
        kept = np.isin(self.owners, chosen)
        owners = np.searchsorted(chosen, self.owners[kept])
        return Statistics(self.means[kept], owners, self.sizes[kept], self.factors[chosen], self.rest[chosen])

    def scatter(self) -> NDArray[np.float64]:
        """Return the scatter (F, F) within the groups of all adapters."""
        rows = self.factors.reshape(-1, self.means.shape[1]).astype(np.float64)
        return rows.T @ rows + float(self.rest.sum(dtype=np.float64)) * np.eye(rows.shape[1])

    def problems(self, what: str, num_adapters: int, size: int) -> list[str]:
        """Return the problems of what should be statistics of `num_adapters` adapters, with F = `size`."""
        groups = self.owners.size  # a damaged file may hold a single number
        shapes = {
            "means": (groups, size),
            "owners": (groups,),
            "sizes": (groups,),
            "factors": (num_adapters, self.factors.shape[1] if self.factors.ndim == 3 else -1, size),
            "rest": (num_adapters,),
        }
        problems = [
            f"{what} {name} has shape {getattr(self, name).shape}, expected {shape}"
            for name, shape in shapes.items()
            if getattr(self, name).shape != shape
        ]
        numbers = (self.means, self.factors, self.rest)
        problems += [f"{what} holds NaN or infinity"] * (not all(np.isfinite(each).all() for each in numbers))
        if problems:
            return problems
        rising = (np.diff(self.owners) >= 0).all() and set(self.owners.tolist()) == set(range(num_adapters))
        if not rising or (self.sizes < 1).any() or (self.rest < 0).any():
            return [f"{what}: owners must rise from 0 to {num_adapters - 1}, sizes be at least 1, rest at least 0"]
        return []


def _with_rows(factors: Floats, count: int) -> Floats:
    """Return factors (N, R, F) with rows of zeros up to `count`."""
    return np.pad(factors, ((0, 0), (0, count - factors.shape[1]), (0, 0)))


def _factors(residuals: NDArray[np.float64], count: int) -> tuple[Floats, Floats]:
    """Return factors (R, F) and the rest () of the scatter of residuals (texts, F).

    The factors have values of float16, as in a bundle: what is fitted weighs as what is read again, bit for bit.
    """
    factors, rest = residuals, np.zeros((), np.float32)
    if len(residuals) > count:
        factors, rest = factors_of(residuals.T @ residuals, min(count, residuals.shape[1]))
    return factors.astype(np.float16).astype(np.float32), rest


def factors_of(scatter: NDArray[np.float64], count: int) -> tuple[Floats, Floats]:
    """Return the largest axes (count, F) of a scatter (F, F), and the mean () of the others."""
    values, axes = np.linalg.eigh(scatter)  # rising
    values = np.maximum(values, 0)
    kept, size = axes[:, -count:] * np.sqrt(values[-count:]), len(scatter)
    rest = values[: size - count].sum() / size
    return np.ascontiguousarray(kept.T).astype(np.float32), np.asarray(rest, np.float32)


@dataclass(frozen=True)
class EmbeddedTexts:
    """The texts of one adapter and their views (texts, K, D).

    Attributes:
        texts: what was embedded.
        views: of each text.
        drift: of each stage, differences (pairs, K, D) that do not matter; they widen the scatter as if every text had
            one. Such is the difference between a text's states under an adapter and without.
    """

    texts: Sequence[SampleText]
    views: Floats
    drift: Mapping[Stage, Floats] = field(default_factory=dict[Stage, Floats])

    def keep(self, is_kept: Sequence[bool]) -> "EmbeddedTexts":
        """Return some of the texts."""
        places = np.flatnonzero(np.array(is_kept, bool))
        return replace(self, texts=[self.texts[place] for place in places.tolist()], views=self.views[places])

    def statistics(self, stage: Stage, max_factors: int | None = None) -> Statistics:
        """Return the statistics of the texts of one stage."""
        own = self.keep([text.stage == stage for text in self.texts])
        kinds = [text.kind for text in own.texts]
        drift = self.drift.get(stage, own.views[:0])
        size = own.views.shape[1] * own.views.shape[2]
        flat, apart = own.views.reshape(len(kinds), size), drift.reshape(len(drift), size)
        return Statistics.of(flat, kinds, MAX_FACTORS if max_factors is None else max_factors + len(apart), apart)
