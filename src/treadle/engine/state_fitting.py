"""Fits classes over the base model's own hidden states: each sample text runs once through the plain base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.common.errors import ModelError, OptionError, problem_list
from treadle.engine.state_reading import read_views
from treadle.engine.state_texts import ReadText, texts_of_nobody, texts_of_samples, texts_read_twice
from treadle.lora.adapter import Adapter
from treadle.lora.blend import attach
from treadle.routing.calibration import FitReport, calibrate
from treadle.routing.centroids import Centroids, Floats
from treadle.routing.fitting import draw_others
from treadle.routing.general_text import general_statistics
from treadle.routing.samples import STAGES, Sample, Stage
from treadle.routing.states import STATE_SPANS, StateClasses
from treadle.routing.statistics import EmbeddedTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYER_SHARES = (1 / 3, 1 / 2, 2 / 3)
"""The depths of the layers that are tried."""


@dataclass(frozen=True)
class _Readings:
    """Holds the views of all texts, at each layer.

    Attributes:
        texts: of each adapter.
        plain: views (places, layers, K, H) of each adapter's texts, by the plain base.
        under: the same of the texts that were read once more, under the adapter.
        general: views (places, layers, K, H) of general texts, by the plain base.
        stages: of the places in general texts.
    """

    texts: Mapping[str, Sequence[ReadText]]
    plain: Mapping[str, Floats]
    under: Mapping[str, Floats]
    general: Floats
    stages: Sequence[Stage]

    def embedded(self, index: int) -> dict[str, EmbeddedTexts]:
        """Return the texts of each adapter, with their views and drift at a layer, by its index."""
        return {
            name: _embedded(texts, self.plain[name][:, index], self.under[name][:, index])
            for name, texts in self.texts.items()
        }

    def background(self, index: int) -> dict[Stage, Floats]:
        """Return the views (texts, K, H) of general text at a layer, by its index."""
        return {stage: self.general[[each == stage for each in self.stages], index] for stage in STAGES}


def fit_base_states(
    base: str, samples: Mapping[str, Sequence[str | Sample]], adapters: Sequence[Adapter]
) -> tuple[StateClasses, FitReport]:
    """Load a base model, a folder or hub id, in bfloat16 and fit classes over its states (`fit_states`).

    Its states in float32 differ by far less than those of two texts, and take twice as long.
    """
    return fit_states(load_model(base, dtype="bfloat16"), load_tokenizer(base), samples, adapters)


def fit_states(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Mapping[str, Sequence[str | Sample]],
    adapters: Sequence[Adapter],
    layers: Sequence[int] | None = None,
) -> tuple[StateClasses, FitReport]:
    """Fit classes over the states of a base model without adapters.

    The layer is the one whose cross-validated log-loss is least. How an adapter moves the states of its own texts is
    measured, and counts as scatter: directions in which adapters move states tell little about a text.

    Args:
        model: the base.
        tokenizer: the base's.
        samples: of each adapter.
        adapters: in the order of every N axis; each needs samples. They are attached meanwhile.
        layers: that are tried; None = those at LAYER_SHARES of the depth.

    Raises:
        OptionError: an adapter has no samples.
        ModelError: the model has too few layers, or gives no hidden states.
    """
    if missing := [adapter.name for adapter in adapters if not samples.get(adapter.name)]:
        raise OptionError(f"states need sample texts of every adapter; none of {', '.join(missing)}.")
    layers = layers or _layers(model)
    readings = _read(model, tokenizer, samples, adapters, layers)
    found = [_fit_layer(readings, index, _identity(model, layer), layer) for index, layer in enumerate(layers)]
    return min(found, key=lambda each: each[1].loss)


def _read(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Mapping[str, Sequence[str | Sample]],
    adapters: Sequence[Adapter],
    layers: Sequence[int],
) -> _Readings:
    """Read all texts by the plain base, and some of each adapter's once more under it."""
    names = [adapter.name for adapter in adapters]
    texts = {name: texts_of_samples(tokenizer, samples[name], draw_others(samples, name)) for name in names}
    general, under = texts_of_nobody(tokenizer), dict[str, Floats]()
    blend = attach(model, adapters)
    try:
        with blend.using(None):
            plain = {name: read_views(model, own, layers) for name, own in texts.items()}
            background = read_views(model, general, layers)
        for name, weights in zip(names, np.eye(len(names), dtype=np.float32), strict=True):
            with blend.using(weights):
                under[name] = read_views(model, texts_read_twice(texts[name]), layers)
    finally:
        blend.detach()
    return _Readings(texts, plain, under, background, [place.stage for text in general for place in text.places])


def _fit_layer(readings: _Readings, index: int, identity: str, layer: int) -> tuple[StateClasses, FitReport]:
    """Fit the classes over one layer's states, by its index."""
    embedded, background = readings.embedded(index), readings.background(index)
    report = calibrate(embedded, background)
    size = readings.general.shape[-1]
    centroids = Centroids.empty(identity, size, STATE_SPANS[1:], general_statistics(background))
    for name, own in embedded.items():
        centroids = centroids.join(_centroid(name, own, identity))
    return StateClasses(replace(centroids, calibrations=report.calibrations), layer), report


def _embedded(texts: Sequence[ReadText], views: Floats, under: Floats) -> EmbeddedTexts:
    """Return texts with their views (places, K, H), and the drift of the first of them under their adapter."""
    places = [place for text in texts for place in text.places]
    apart = under - views[: len(under)]
    drift: dict[Stage, Floats] = {
        stage: apart[[place.stage == stage for place in places[: len(under)]]] for stage in STAGES
    }
    return EmbeddedTexts([each for text in texts for each in text.sample_texts], views, drift)


def state_centroid(
    name: str, texts: Sequence[ReadText], plain: Floats, under: Floats, classes: StateClasses
) -> Centroids:
    """Return the class of one more adapter over a base's states.

    Args:
        name: of the adapter.
        texts: of its samples (`texts_of_samples`).
        plain: their views (places, K, H) by the plain base.
        under: views (places, K, H) of `texts_read_twice`, under the adapter.
        classes: what it will join.
    """
    return _centroid(name, _embedded(texts, plain, under), classes.centroids.embedder_id, classes.spans)


def check_states_fit(model: "PreTrainedModel", classes: StateClasses) -> None:
    """Raise a ModelError if classes of states were fitted on another model, or on a layer that this one lacks."""
    config = model.config.get_text_config()
    identity, size = _identity(model, classes.layer), classes.centroids.means.shape[-1]
    problems: list[str] = []
    if classes.centroids.embedder_id != identity:
        problems.append(f"they are {classes.centroids.embedder_id}, this model's would be {identity}")
    if not classes.layer < config.num_hidden_layers:
        has = f"this model has {config.num_hidden_layers}, and the last gives none"
        problems.append(f"they are of layer {classes.layer}; {has}")
    if size != config.hidden_size:
        problems.append(f"they have {size} numbers, this model's have {config.hidden_size}")
    if problems:
        told = problem_list("the bundle's states are not those of this base model:", problems)
        raise ModelError(f"{told}\nFit the bundle again on it.")


def _identity(model: "PreTrainedModel", layer: int) -> str:
    """Return the name of the states of a layer, as centroids keep it."""
    config = model.config.get_text_config()
    return f"states:{config.model_type}-{config.num_hidden_layers}x{config.hidden_size}:{layer}"


def _centroid(name: str, given: EmbeddedTexts, identity: str, spans: tuple[int, ...] = STATE_SPANS) -> Centroids:
    """Return the centroid of one adapter from the views (texts, K, H) of its states."""
    return Centroids(
        names=(name,),
        means=given.views[:, 0].mean(0, dtype=np.float64)[None].astype(np.float32),
        counts=np.array([len({text.owner for text in given.texts})]),
        stages={stage: given.statistics(stage) for stage in STAGES},
        embedder_id=identity,
        tails=spans[1:],
    )


def _layers(model: "PreTrainedModel") -> list[int]:
    """Return the layers that are tried."""
    count = int(model.config.get_text_config().num_hidden_layers)
    return sorted({max(1, round(share * count)) for share in LAYER_SHARES})
