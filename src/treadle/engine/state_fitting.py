"""Fits classes over the base model's own hidden states: each sample text runs once through the plain base.

A causal model's state at a token says the same whatever follows. So one pass over a prompt and its answer gives the
states of the prompt, of its beginnings, and of the answer as it grows.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.common.errors import ModelError, OptionError, problem_list
from treadle.engine.runners.blocks import blocks_of, outputs_of
from treadle.engine.tokenization import completion_ids, prompt_ids
from treadle.lora.adapter import Adapter
from treadle.lora.blend import Blend, attach
from treadle.routing.calibration import FitReport, calibrate
from treadle.routing.centroids import Centroids, Floats
from treadle.routing.fitting import draw_others
from treadle.routing.general_text import general_statistics, general_texts
from treadle.routing.samples import STAGES, TOPIC_GAP, Sample, SampleText, Stage
from treadle.routing.states import STATE_SPANS, StateClasses, unit
from treadle.routing.statistics import EmbeddedTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYER_SHARES = (1 / 3, 1 / 2, 2 / 3)
"""The depths of the layers that are tried."""
MAX_SAMPLES = 120
"""The most samples of an adapter that are read."""
DRIFT_SAMPLES = 8
"""The samples of an adapter that are read once more, under the adapter."""
MAX_GENERAL_TEXTS = 160
PROMPT_TOKENS, ANSWER_TOKENS, BEFORE_TOKENS = 160, 32, 48
"""The tokens that are read: a prompt's last, an answer's first, the last of another domain's text."""
AFTER_CHANGE_TOKENS = (2, 4, 8, 16)
"""A text is seen so many tokens after its domain has changed."""
PASS_TOKENS = 4096
"""Tokens of one pass, padding included."""


@dataclass(frozen=True)
class Place:
    """A place in a text at which its states are taken: after `count` tokens."""

    count: int
    stage: Stage
    kind: str
    owner: int


@dataclass(frozen=True)
class ReadText:
    """Tokens to be read, and the places at which states are taken."""

    ids: Sequence[int]
    places: Sequence[Place]


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
    names = [adapter.name for adapter in adapters]
    if missing := [name for name in names if not samples.get(name)]:
        raise OptionError(f"states need sample texts of every adapter; none of {', '.join(missing)}.")
    layers = layers or _layers(model)
    read = {name: list(_texts(tokenizer, _some(samples[name]), draw_others(samples, name))) for name in names}
    general = list(_general(tokenizer))
    moved: dict[str, list[ReadText]] = {name: _of_first(texts, DRIFT_SAMPLES) for name, texts in read.items()}
    blend = attach(model, adapters)
    try:
        with torch.inference_mode():
            with blend.using(None):
                views = {name: _views(model, texts, layers) for name, texts in read.items()}
                background = _views(model, general, layers)
            under = {name: _under(model, blend, index, moved[name], layers) for index, name in enumerate(names)}
    finally:
        blend.detach()
    found: dict[int, tuple[StateClasses, FitReport]] = {}
    for index, layer in enumerate(layers):
        embedded = {
            name: _embedded(texts, views[name][:, index], under[name][:, index]) for name, texts in read.items()
        }
        stages = [place.stage for text in general for place in text.places]
        about: dict[Stage, Floats] = {stage: background[[each == stage for each in stages], index] for stage in STAGES}
        report = calibrate(embedded, about)
        identity, size = _identity(model, layer), views[names[0]].shape[-1]
        centroids = Centroids.empty(identity, size, STATE_SPANS[1:], general_statistics(about))
        for name, own in embedded.items():
            centroids = centroids.join(_centroid(name, own, identity))
        found[layer] = StateClasses(replace(centroids, calibrations=report.calibrations), layer), report
    return min(found.values(), key=lambda each: each[1].loss)


def _of_first(texts: Sequence[ReadText], count: int) -> list[ReadText]:
    """Return the texts of the first samples."""
    return [text for text in texts if all(place.owner < count for place in text.places)]


def _under(
    model: "PreTrainedModel", blend: Blend, index: int, texts: Sequence[ReadText], layers: Sequence[int]
) -> Floats:
    """Return the views (places, layers, K, H) of texts that are read under one adapter alone."""
    weights = np.zeros(len(blend.names), np.float32)
    weights[index] = 1
    with blend.using(weights):
        return _views(model, texts, layers)


def _embedded(texts: Sequence[ReadText], views: Floats, under: Floats) -> EmbeddedTexts:
    """Return texts with their views (places, K, H), and the drift of the first of them under their adapter."""
    places = [place for text in texts for place in text.places]
    apart = under - views[: len(under)]
    drift: dict[Stage, Floats] = {
        stage: apart[[place.stage == stage for place in places[: len(under)]]] for stage in STAGES
    }
    return EmbeddedTexts([_sample_text(place) for place in places], views, drift)


def state_centroid(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    samples: Sequence[str | Sample],
    classes: StateClasses,
) -> Centroids:
    """Return the class of one more adapter over a base's states; general text stands for the other adapters' texts.

    Args:
        model: the base, with no adapter acting.
        tokenizer: the base's.
        name: of the adapter.
        samples: of the adapter.
        classes: what it will join.
    """
    texts = list(_texts(tokenizer, _some(samples), ()))
    with torch.inference_mode():
        views = _views(model, texts, [classes.layer], classes.spans)[:, 0]
    own = EmbeddedTexts([_sample_text(place) for text in texts for place in text.places], views)
    return _centroid(name, own, classes.centroids.embedder_id, classes.spans)


def check_states_fit(model: "PreTrainedModel", classes: StateClasses) -> None:
    """Raise a ModelError if classes of states were fitted on another model, or on a layer that this one lacks."""
    config = model.config.get_text_config()
    identity, size = _identity(model, classes.layer), classes.centroids.means.shape[-1]
    problems: list[str] = []
    if classes.centroids.embedder_id != identity:
        problems.append(f"they are {classes.centroids.embedder_id}, this model's would be {identity}")
    if not classes.layer <= config.num_hidden_layers:
        problems.append(f"they are of layer {classes.layer}; this model has {config.num_hidden_layers}")
    if size != config.hidden_size:
        problems.append(f"they have {size} numbers, this model's have {config.hidden_size}")
    if problems:
        told = problem_list("the bundle's states are not those of this base model:", problems)
        raise ModelError(f"{told}\nFit the bundle again on it.")


def _identity(model: "PreTrainedModel", layer: int) -> str:
    """Return the name of the states of a layer, as centroids keep it."""
    config = model.config.get_text_config()
    return f"states:{config.model_type}-{config.num_hidden_layers}x{config.hidden_size}:{layer}"


def _some(samples: Sequence[str | Sample]) -> list[Sample]:
    """Return at most MAX_SAMPLES samples, spread evenly."""
    step = -(-len(samples) // MAX_SAMPLES)
    return [each if isinstance(each, Sample) else Sample(each) for each in samples[::step]]


def _texts(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence[Sample], others: Sequence[str]
) -> Iterator[ReadText]:
    """Yield the readings of each sample: its forms with the answer, and one after another domain's text."""
    choose = random.Random(0)
    befores = others or general_texts()
    for owner, sample in enumerate(samples):
        answer = completion_ids(tokenizer, sample.completion)[:ANSWER_TOKENS] if sample.completion else []
        forms = [("", prompt_ids(tokenizer, sample.prompt))] if sample.prompt else []
        if sample.bare:
            forms.append(("bare-", prompt_ids(tokenizer, sample.bare)))
        with suppress(ModelError, OptionError):  # no chat template, or one that refuses a single message
            forms.append(("chat-", prompt_ids(tokenizer, [{"role": "user", "content": sample.bare or sample.prompt}])))
        if not forms:  # nothing but an answer
            continue
        for prefix, prompt in forms:
            kept = prompt[-PROMPT_TOKENS:]
            yield ReadText([*kept, *answer], list(_places(len(kept), len(answer), prefix, owner, choose)))
        before = prompt_ids(tokenizer, choose.choice(befores) + TOPIC_GAP)[-BEFORE_TOKENS:]
        own = choose.choice(forms)[1][: PROMPT_TOKENS // 2]
        start, end = len(before), len(before) + len(own)
        places = [Place(end, "prompt", "join", owner), Place(end + len(answer), "running", "join-grow", owner)]
        after = [count for count in AFTER_CHANGE_TOKENS if count <= len(own)]
        places += [Place(start + choose.choice(after), "running", "join-begin", owner)] if after else []
        yield ReadText([*before, *own, *answer], places)


def _places(prompt: int, answer: int, prefix: str, owner: int, choose: random.Random) -> Iterator[Place]:
    """Yield the places in a prompt of so many tokens and its answer."""
    yield Place(prompt, "prompt", f"{prefix}prompt", owner)
    yield Place(choose.randint(min(4, prompt), prompt), "prompt", f"{prefix}begin", owner)
    yield Place(prompt + answer, "running", f"{prefix}whole", owner)
    if answer:
        yield Place(prompt + choose.randint(1, answer), "running", f"{prefix}grow", owner)


def _general(tokenizer: "PreTrainedTokenizerBase") -> Iterator[ReadText]:
    """Yield general texts, seen as prompts and as running text of any length."""
    choose = random.Random(0)
    for owner, text in enumerate(general_texts()[:MAX_GENERAL_TEXTS]):
        ids = prompt_ids(tokenizer, text)[:PROMPT_TOKENS]
        if len(ids) > 1:
            yield ReadText(ids, [Place(len(ids), "prompt", "general", owner),
                                 Place(choose.randint(2, len(ids)), "running", "general", owner)])  # fmt: skip


def _sample_text(place: Place) -> SampleText:
    return SampleText("", place.stage, place.kind, place.owner)


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


def _views(
    model: "PreTrainedModel", texts: Sequence[ReadText], layers: Sequence[int], spans: Sequence[int] = STATE_SPANS
) -> Floats:
    """Return the views (places, layers, K, H) of the states at all places."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].ids))
    made: dict[int, list[Floats]] = {}
    while order:
        longest = len(texts[order[-1]].ids)
        chosen = [order.pop() for _ in range(min(len(order), max(1, PASS_TOKENS // longest)))]
        states = _states(model, [texts[index].ids for index in chosen], layers)  # (texts, layers, T, H)
        for index, own in zip(chosen, states, strict=True):
            made[index] = [_views_at(own, place.count, spans) for place in texts[index].places]
    return np.stack([view for index in range(len(texts)) for view in made[index]])


def _views_at(states: Tensor, count: int, spans: Sequence[int]) -> Floats:
    """Return the views (layers, K, H) of the first `count` tokens of a text from its states (layers, T, H)."""
    first = 1 if count > 1 else 0
    means = [states[:, max(first, count - span) : count].double().mean(1) for span in spans]
    return unit(torch.stack(means, 1).cpu().numpy())


class _Enough(Exception):
    """Ends a pass whose later layers nobody needs."""


def _states(model: "PreTrainedModel", ids: Sequence[Sequence[int]], layers: Sequence[int]) -> Tensor:
    """Return the states (B, layers, T, H) of texts, padded on the right."""
    length = max(map(len, ids))
    padded = torch.tensor([[*row, *([0] * (length - len(row)))] for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=model.device)
    blocks = blocks_of(model)
    if blocks is None:
        raise ModelError(f"{type(model).__name__}: its layers are not where states can be taken from them.")
    with outputs_of(blocks, layers) as found:
        enough = blocks[max(layers) - 1].register_forward_hook(_stop)  # behind the hook that collects
        try:
            with suppress(_Enough):
                model.get_decoder()(input_ids=padded, attention_mask=mask, use_cache=False)
        finally:
            enough.remove()
    return torch.stack([found[layer].float() for layer in layers], 1)


def _stop(*_: Any) -> None:
    raise _Enough
