"""Cross-validates a router on its own samples: how often it is right, and how far to trust it.

Each adapter is left out once: its samples are then texts of no adapter's kind, and the base should answer them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from treadle.routing.centroids import Calibration, Floats
from treadle.routing.discriminant import Discriminant
from treadle.routing.general_text import general_statistics
from treadle.routing.samples import STAGES, Stage
from treadle.routing.statistics import EmbeddedTexts, Statistics

FOLDS = 3
MAX_SAMPLES = 150
"""The most samples of an adapter that take part."""
MAX_LEFT_OUT = 8
"""The most adapters that are left out, one at a time."""
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
BASE_BIASES = tuple(range(-60, 61, 2))
UNSEEN_WEIGHT = 0.1
"""The weight of texts of no adapter's kind against the adapters' own."""
FLOOR = 0.01
"""Added to probabilities before their logarithm, so that no single text decides."""
LOW_ACCURACY = 0.9
PROMPT_KINDS = ("prompt", "bare", "bare-prompt", "chat-prompt")
"""The kinds of text that the accuracy counts: whole prompts."""
DEFAULT = Calibration(temperature=3.0)


@dataclass(frozen=True)
class FitReport:
    """Cross-validation of a router on its samples.

    Attributes:
        names: (N) of the adapters that have samples.
        calibrations: of each stage.
        accuracy: mean over the adapters of the share of their prompts whose nearest adapter is their own; None where
            an adapter has one sample only.
        confusion: (N, N + 1) of prompts; row = the adapter, column = what came nearest, last the base.
        accuracy_of_half: the accuracy with half of the samples.
        loss: the log-loss of held-out texts and of texts of no adapter's kind, in nats.
    """

    names: tuple[str, ...]
    calibrations: Mapping[Stage, Calibration]
    accuracy: float | None = None
    confusion: tuple[tuple[float, ...], ...] = ()
    accuracy_of_half: float | None = None
    loss: float = 0.0

    def warnings(self) -> list[str]:
        """Return the messages that a user should read."""
        if self.accuracy is None:
            return ["each adapter needs 2 samples at least for a cross-validation; give tens of each."]
        if self.accuracy >= LOW_ACCURACY:
            return []
        told = f"the router knows {self.accuracy:.0%} of the samples' prompts by cross-validation, which is low."
        if self.accuracy_of_half is not None and self.accuracy - self.accuracy_of_half > 0.02:
            told += f" With half of the samples it knew {self.accuracy_of_half:.0%}: twice as many samples would help."
        rows = [(share, name, other) for name, row in zip(self.names, self.confusion, strict=True)
                for share, other in zip(row, (*self.names, "the base"), strict=True) if other != name]  # fmt: skip
        share, name, other = max(rows)
        return [f"{told} Most often {name!r} is taken for {other!r} ({share:.0%})."]


@dataclass(frozen=True)
class _Held:
    """Log-likelihoods (texts, N + 1) of held-out texts, and the column (texts,) that is right; prompts alone count."""

    evidence: Floats
    right: NDArray[np.int64]
    is_counted: NDArray[np.bool_]


Background = Mapping[Stage, Floats] | None
"""The views (texts, K, D) of general text at each stage."""


def calibrate(embedded: Mapping[str, EmbeddedTexts], general: Background) -> FitReport:
    """Cross-validate a router on the texts of its samples.

    Args:
        embedded: the texts of each adapter.
        general: views of general text; None = there is no class for it.
    """
    names = tuple(embedded)
    texts = [_some(each) for each in embedded.values()]
    if not texts or any(len(_owners(each, stage)) < 2 for each in texts for stage in STAGES):
        return FitReport(names, dict.fromkeys(STAGES, Calibration() if general is None else DEFAULT))
    background = None if general is None else general_statistics(general)
    calibrations: dict[Stage, Calibration] = {}
    held: dict[Stage, _Held] = {}
    loss = 0.0
    for stage in STAGES:
        about = None if background is None else background[stage]
        held[stage] = _held_out(texts, stage, about)
        unseen = [] if general is None else _unseen(texts, stage, about, general[stage])
        calibrations[stage], least = _best(held[stage], unseen)
        loss += least
    prompt = calibrations["prompt"]
    confusion = _confusion(held["prompt"], prompt, len(names))
    half, of_half = [_halved(each) for each in texts], None
    about = None if background is None else background["prompt"]
    if all(len(_owners(each, "prompt")) >= 2 for each in half):
        of_half = _accuracy(_held_out(half, "prompt", about), len(names))
    accuracy = _accuracy(held["prompt"], len(names))
    return FitReport(names, calibrations, accuracy, tuple(map(tuple, confusion.tolist())), of_half, loss)


def _accuracy(held: _Held, count: int) -> float | None:
    """Return the mean over the adapters of the share of held-out prompts whose nearest adapter is their own.

    An adapter whose prompts hold no known word does not count; None = there is no other.
    """
    is_right = held.evidence[:, :count].argmax(-1) == held.right
    each = [is_right[(held.right == index) & held.is_counted] for index in range(count)]
    shares = [float(own.mean()) for own in each if len(own)]
    return float(np.mean(shares)) if shares else None


def _owners(given: EmbeddedTexts, stage: Stage) -> list[int]:
    """Return the samples that have texts of a stage."""
    return sorted({text.owner for text in given.texts if text.stage == stage})


def _some(given: EmbeddedTexts) -> EmbeddedTexts:
    """Return the texts of at most MAX_SAMPLES samples, spread evenly."""
    owners = sorted({text.owner for text in given.texts})
    kept = set(owners[:: max(1, -(-len(owners) // MAX_SAMPLES))])
    return given.keep([text.owner in kept for text in given.texts])


def _halved(given: EmbeddedTexts) -> EmbeddedTexts:
    kept = set(sorted({text.owner for text in given.texts})[::2])
    return given.keep([text.owner in kept for text in given.texts])


def _fold(given: EmbeddedTexts, stage: Stage, fold: int) -> NDArray[np.bool_]:
    """Return which texts are held out in a fold of a stage; texts of one sample stay together."""
    held = set(_owners(given, stage)[fold::FOLDS])
    return np.array([text.owner in held for text in given.texts], bool)


def _statistics(texts: Sequence[EmbeddedTexts], stage: Stage, fold: int | None) -> tuple[Statistics, int]:
    """Return the joined statistics of adapters without a fold, and the number of their samples."""
    joined, samples = None, 0
    for each in texts:
        kept = each if fold is None else each.keep((~_fold(each, stage, fold)).tolist())
        own = kept.statistics(stage, max_factors=len(kept.texts))
        joined = own if joined is None else joined.join(own)
        samples += len({text.owner for text in kept.texts})
    assert joined is not None
    return joined, samples


def _discriminant(
    texts: Sequence[EmbeddedTexts], stage: Stage, fold: int | None, background: Statistics | None
) -> Discriminant:
    return Discriminant.fit(*_statistics(texts, stage, fold), background)


def _held_out(texts: Sequence[EmbeddedTexts], stage: Stage, background: Statistics | None) -> _Held:
    """Return the log-likelihoods of each text under a router that was fitted without its sample."""
    evidence: list[Floats] = []
    right: list[int] = []
    counted: list[bool] = []
    for fold in range(FOLDS):
        found = [each.keep((_fold(each, stage, fold) & _is_of(each, stage)).tolist()) for each in texts]
        if not any(each.texts for each in found):
            continue
        made = _discriminant(texts, stage, fold, background)
        for index, each in enumerate(found):
            if each.texts:
                evidence.append(_evidence(made, each.views))
                right += [index] * len(each.texts)
                counted += [text.kind in PROMPT_KINDS for text in each.texts]
    return _Held(np.concatenate(evidence), np.array(right), np.array(counted))


def _unseen(
    texts: Sequence[EmbeddedTexts], stage: Stage, background: Statistics | None, general: Floats
) -> list[Floats]:
    """Return log-likelihoods of texts of no adapter's kind: general text, and each adapter's under the others alone."""
    found = [_evidence(_discriminant(texts, stage, None, background), general)]
    for index in range(0, len(texts), -(-len(texts) // MAX_LEFT_OUT)) if len(texts) > 1 else ():
        others = [each for place, each in enumerate(texts) if place != index]
        own = texts[index].keep(_is_of(texts[index], stage).tolist())
        found.append(_evidence(_discriminant(others, stage, None, background), own.views))
    return found


def _evidence(made: Discriminant, views: Floats) -> Floats:
    return made.evidence(views.reshape(len(views), -1))


def _is_of(given: EmbeddedTexts, stage: Stage) -> NDArray[np.bool_]:
    return np.array([text.stage == stage for text in given.texts])


def _best(own: _Held, unseen: Sequence[Floats]) -> tuple[Calibration, float]:
    """Return the calibration with the least log-loss, and that loss."""
    biases = BASE_BIASES if unseen else (0,)
    losses = {
        (temperature, bias): _loss(own, unseen, temperature, bias)
        for temperature, bias in product(TEMPERATURES, biases)
    }
    temperature, bias = min(losses, key=lambda each: losses[each])
    return Calibration(temperature, float(bias)), losses[temperature, bias]


def _loss(own: _Held, unseen: Sequence[Floats], temperature: float, bias: float) -> float:
    chances = _chances(own.evidence, temperature, bias)[np.arange(len(own.right)), own.right]
    loss = float(np.mean([-np.log(chances[own.right == index] + FLOOR).mean() for index in np.unique(own.right)]))
    if unseen:
        base = [-np.log(_chances(each, temperature, bias)[:, -1] + FLOOR).mean() for each in unseen]
        loss += UNSEEN_WEIGHT * float(np.mean(base))
    return loss


def _chances(evidence: Floats, temperature: float, bias: float) -> Floats:
    """Return the posterior (texts, N + 1) of log-likelihoods whose last column is general text's."""
    shifted = evidence.copy()
    if bias:
        shifted[:, -1] += bias
    shifted = (shifted - shifted.max(-1, keepdims=True)) / temperature
    raised = np.exp(shifted)
    return raised / raised.sum(-1, keepdims=True)


def _confusion(held: _Held, calibration: Calibration, count: int) -> Floats:
    """Return the shares (N, N + 1) of each adapter's held-out prompts that came nearest to each column."""
    nearest = _chances(held.evidence, calibration.temperature, calibration.base_bias).argmax(-1)
    table = np.zeros((count, count + 1), np.float32)
    for index in range(count):
        of_own = (held.right == index) & held.is_counted
        table[index] = np.bincount(nearest[of_own], minlength=count + 1) / max(1, of_own.sum())
    return table
