"""Gaussian classes on the axes that tell them apart: closed form, fitted once, a small product for each text.

Each group of an adapter's sample texts is a class with a mean of its own. All classes share one covariance, shrunk by
OAS (Chen, Wiesel, Eldar and Hero 2010). General text is one more class, wide as general text is: what it explains best
is of no adapter's kind. Its covariance is its own, as in two-covariance PLDA (Ioffe 2006).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.common.errors import OptionError
from treadle.routing.statistics import Statistics

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

MIN_EXPONENT = np.float32(-87)
"""The least exponent whose exponential is a normal number; subnormal ones take a processor seven times as long."""
MIN_LIKELIHOOD = 1e-30
"""Added to likelihoods before their logarithm, so that 0 has one."""
MIN_VARIANCE_SHARE = 0.05
"""The least variance within groups, as a share of that of all sample texts: few texts may be alike."""
MIN_VARIANCE = 0.01
"""The least variance of all sample texts, which are unit vectors: a single text has none."""
MIN_AXIS_SHARE = 1e-4
"""Axes on which the means lie closer together than this share of the widest are left out."""


@dataclass(frozen=True)
class Discriminant:
    """Log-likelihoods of texts under each adapter and under general text, all up to one term that they share.

    Attributes:
        axes: (F, A) float32; on them, all classes of adapters have covariance 1.
        origin: (A,) where the mean of general text lies.
        means: (A, P) of the groups, from the origin.
        offsets: (P,) what a group's log-likelihood has beside the product with its mean.
        starts: (N,) the first group of each adapter.
        general: (A, A + 1) directions and an offset; None = nothing is known of general text.
    """

    axes: Floats
    origin: Floats
    means: Floats
    offsets: Floats
    starts: NDArray[np.int64]
    general: tuple[Floats, float] | None

    @classmethod
    def fit(
        cls, texts: Statistics, num_samples: int, general: Statistics | None, shrinkage: float | None = None
    ) -> "Discriminant":
        """Fit the classes.

        Args:
            texts: of the adapters.
            num_samples: the samples that all texts were made of; texts of one sample are alike.
            general: of general text, as one adapter with one group; None = unknown.
            shrinkage: share of the sphere in the covariance; None = OAS.
        """
        means = texts.means.astype(np.float64)  # (P, F)
        middle = means.mean(0) if general is None else general.means[0].astype(np.float64)
        covariance = _covariance(texts, means, num_samples, shrinkage)
        try:
            whitener = np.linalg.inv(np.linalg.cholesky(covariance))  # (F, F), lower
        except np.linalg.LinAlgError as error:  # such statistics are of no texts
            raise OptionError(f"score lda: the scatter of the samples cannot be inverted: {error}") from error
        apart = (means - middle) @ whitener.T  # (P, F)
        _, widths, directions = np.linalg.svd(apart, full_matrices=False)
        kept = max(1, int((widths > MIN_AXIS_SHARE * widths.max(initial=0)).sum()))
        axes = np.asarray(whitener.T @ directions[:kept].T, np.float64)  # (F, A)
        places = apart @ directions[:kept].T  # (P, A)
        shares = texts.sizes / np.bincount(texts.owners, texts.sizes)[texts.owners]
        offsets = np.log(shares) - 0.5 * (places**2).sum(1)
        if not np.isfinite(axes).all() or not (abs(offsets) < np.finfo(np.float32).max / 4).all():
            raise OptionError("score lda: the scatter of the samples gives no finite scores; use cosine or centred.")
        return cls(
            axes=axes.astype(np.float32),
            origin=(middle @ axes).astype(np.float32),
            means=np.ascontiguousarray(places.T.astype(np.float32)),
            offsets=offsets.astype(np.float32),
            starts=np.searchsorted(texts.owners, np.arange(texts.num_adapters)),
            general=None if general is None else _general(axes, general),
        )

    def evidence(self, texts: Floats) -> Floats:
        """Return the log-likelihoods (..., N + 1) of texts (..., F) under each adapter and general text.

        Without knowledge of general text there is no last column: (..., N).
        """
        # a product of its own for each text: its bits do not depend on what else is decided with it
        places = texts[..., None, :] @ self.axes - self.origin  # (..., 1, A)
        each = places @ self.means + self.offsets  # (..., 1, P)
        if len(self.offsets) > len(self.starts):
            beside = np.exp(np.maximum(each - (top := each.max(-1, keepdims=True)), MIN_EXPONENT))
            each = np.log(np.add.reduceat(beside, self.starts, -1) + MIN_LIKELIHOOD) + top
        if self.general is None:
            return np.asarray(each, np.float32)[..., 0, :]
        directions, offset = self.general
        base = 0.5 * ((places @ directions) ** 2).sum(-1, keepdims=True) + offset
        return np.concatenate([each, base], -1, dtype=np.float32)[..., 0, :]


def oas(covariance: Doubles, count: int) -> float:
    """Return the share of the sphere in a covariance (F, F) from `count` samples, by OAS."""
    size, trace, square = len(covariance), np.trace(covariance), (covariance**2).sum()
    apart = square - trace**2 / size
    if apart <= 0:
        return 1.0
    return float(min(1.0, ((1 - 2 / size) * square + trace**2) / ((count + 1 - 2 / size) * apart)))


def _covariance(texts: Statistics, means: Doubles, num_samples: int, shrinkage: float | None) -> Doubles:
    """Return the covariance (F, F) within groups, shrunk; within adapters where no group has two texts."""
    scatter, num_texts, size = texts.scatter(), int(texts.sizes.sum()), means.shape[1]
    weights = texts.sizes[:, None].astype(np.float64)
    centres = np.zeros((texts.num_adapters, size))
    np.add.at(centres, texts.owners, means * weights)
    centres /= np.bincount(texts.owners, texts.sizes)[:, None]
    among = means - centres[texts.owners]  # (P, F) from the middle of their adapter
    freedom = num_texts - len(texts.sizes)
    if freedom < texts.num_adapters:
        scatter, freedom = scatter + (among * weights).T @ among, num_texts - texts.num_adapters
    around = means - (means * weights).sum(0) / num_texts
    total = max(MIN_VARIANCE, (np.trace(texts.scatter()) + (around**2 * weights).sum()) / num_texts)  # of all texts
    if freedom < 1:
        return np.eye(size) * total / size
    covariance = scatter / freedom
    share = oas(covariance, num_samples) if shrinkage is None else shrinkage
    sphere = max(np.trace(covariance), MIN_VARIANCE_SHARE * total) / size
    return (1 - share) * covariance + (share * sphere + 1e-9 * total / size) * np.eye(size)


def _general(axes: Doubles, general: Statistics) -> tuple[Floats, float]:
    """Return directions (A, A) and the offset of general text, which is nowhere narrower than an adapter's class.

    With z on the axes, log p(z | general) is offset + half of the squared length of z @ directions, up to -z^2 / 2.
    """
    spread = axes.T @ (general.scatter() / int(general.sizes[0])) @ axes  # (A, A)
    variances, turned = np.linalg.eigh(spread)
    variances = np.maximum(variances, 1.0)
    directions = turned * np.sqrt(1 - 1 / variances)
    return directions.astype(np.float32), float(-0.5 * np.log(variances).sum())
