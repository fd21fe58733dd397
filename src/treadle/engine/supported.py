"""Checks that the engine can run a model: it can follow the model's state, and padding is masked.

The checks ask transformers and the model itself, because no list of model names would stay complete.
"""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from treadle.common.errors import ModelError, problem_list, reason_of
from treadle.common.transformers_names import CACHE_NAMES, cache_argument
from treadle.engine.recurrent_cache import is_recurrent, new_cache, states_of
from treadle.engine.runners.decoder import ARCHITECTURES
from treadle.lora.compatibility import linear_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED_CACHE_LAYERS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Layers of transformers' caches that the engine's own can replace."""
STATEFUL_LAYER_TYPES = ("conv", "linear_attention", "mamba", "recurrent")
"""Layer types of a configuration that keep a state; caches of older releases do not show it."""
PADDING_TOKENS = 3
"""Padding that the probe puts before a text."""


def check_supported(model: "PreTrainedModel") -> None:
    """Raise a ModelError that lists all reasons why the engine cannot run the model."""
    problems = list(_state_problems(model))
    if not problems and type(model).__name__ not in ARCHITECTURES:  # tests hold the laws of these
        problems = list(_cache_problems(model)) or list(_padding_problems(model))
    if problems:
        head = f"the engine cannot run {type(model).__name__}; treadle.attach can blend its adapters:"
        raise ModelError(problem_list(head, problems))


def _state_problems(model: "PreTrainedModel") -> Iterator[str]:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        yield "it has an encoder; the engine needs a decoder alone"
    if not any(name in inspect.signature(model.forward).parameters for name in CACHE_NAMES):
        yield "it takes no cache of keys and values, so each token would read the whole text again"
        return
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - set(SUPPORTED_CACHE_LAYERS)
    types = set(getattr(config, "layer_types", None) or ()) & set(STATEFUL_LAYER_TYPES)
    if kinds:
        yield f"it keeps {', '.join(sorted(kinds))}; the engine's cache has no such layer"
    elif (types or getattr(model, "_is_stateful", False)) and not is_recurrent(model):
        yield "it keeps a recurrent state where this release of transformers has no layer of the cache for it"


@torch.inference_mode()
def _padding_problems(model: "PreTrainedModel") -> Iterator[str]:
    """Test whether padding on the left, masked and with positions where the model takes them, changes the logits."""
    ids = torch.arange(1, 5, device=model.device)[None]  # (1, T)
    padded = torch.nn.functional.pad(ids, (PADDING_TOKENS, 0))  # (1, PADDING_TOKENS + T)
    places = torch.arange(padded.shape[1], device=model.device)[None] - PADDING_TOKENS
    last = 0 if is_recurrent(model) else 1  # tokens read behind the others: states have no mask there
    try:
        alone, _ = _read(model, ids, [4 - last, last], places[:, PADDING_TOKENS:], torch.ones_like(ids))
        beside, _ = _read(model, padded, [PADDING_TOKENS + 4 - last, last], places.clamp(min=0), (places >= 0).long())
    except Exception as error:  # whatever it is: the engine would meet it too
        yield f"it cannot read padding: {reason_of(error)}"
    else:
        if _differ(model, alone, beside):
            why = "" if is_recurrent(model) or _at(model, places) else "takes no position_ids and "
            yield f"it {why}counts padding as tokens, so rows of unequal length would not be what they are alone"


def _cache_problems(model: "PreTrainedModel") -> Iterator[str]:
    """Test whether the model goes on from the engine's cache, one token a pass."""
    try:
        goes_on = _goes_on(model, (7, 1))
    except Exception as error:  # whatever it is: the model has a cache of its own
        yield f"it does not take the engine's cache: {reason_of(error)}"
    else:
        if not goes_on:
            yield "with a cache it gives other logits or states than without, in this release of transformers"


def reads_in_parts(model: "PreTrainedModel") -> bool:
    """Return whether a model goes on from its states where a pass reads several tokens: some do not."""
    return not is_recurrent(model) or _goes_on(model, (4, 3, 1))


@torch.inference_mode()
def _goes_on(model: "PreTrainedModel", parts: Sequence[int]) -> bool:
    """Return whether a text in parts of so many tokens has the logits and states of the text at once.

    Logits alone would not tell: a state that is forgotten may move them by little.
    """
    ids = torch.arange(1, 1 + sum(parts), device=model.device)[None]  # (1, T)
    whole, states = _read(model, ids, [sum(parts)], ids - 1)
    pieces, others = _read(model, ids, parts, ids - 1)
    pairs = zip(states, others, strict=True)
    return not _differ(model, whole, pieces) and not any(
        _differ(model, one.float(), each.float()) for one, each in pairs
    )


def _read(
    model: "PreTrainedModel", ids: Tensor, sizes: Sequence[int], positions: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Read tokens (1, T) in parts of these sizes; return the last one's logits (V,) and the states behind it."""
    cache, logits, end = new_cache(model), ids.new_empty(0), 0
    for size in filter(None, sizes):
        part, end = slice(end, end + size), end + size
        given = _at(model, positions[:, part]) | ({} if mask is None else {"attention_mask": mask[:, :end]})
        cache.begin_pass(size)
        logits = model(input_ids=ids[:, part], use_cache=True, **{cache_argument(model): cache}, **given).logits[0, -1]
    return logits.float(), states_of(cache)


def _at(model: "PreTrainedModel", positions: Tensor) -> dict[str, Tensor]:
    """Return the argument that places tokens, where the model takes one."""
    return {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}


def _differ(model: "PreTrainedModel", one: Tensor, other: Tensor) -> bool:
    """Return whether two logits or states, of one shape, differ by more than rounding.

    In half precision rounding moves logits by 3 % of their deviation, padding that is read by 30 % and more.
    """
    apart = one - other
    if model.dtype == torch.float32:
        return bool(apart.abs().max() > one.std() * 0.01)
    return bool(apart.square().mean().sqrt() > one.std() * 0.15)


@torch.inference_mode()
def rereading_layers(model: "PreTrainedModel") -> frozenset[str]:
    """Return the linear layers that read all cached tokens again in each step.

    Latent attention caches one small vector a token, and computes all keys and values from them in each pass.
    """
    seen: dict[str, int] = {}

    def note(path: str, size: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and torch.is_tensor(args[0]):
            seen[path] = args[0].numel() // size  # tokens

    linear = [(path, module, shape) for path, module in model.named_modules() if (shape := linear_shape(module))]
    hooks = [module.register_forward_pre_hook(partial(note, path, shape[0])) for path, module, shape in linear]
    cache, ids = new_cache(model), torch.arange(1, 5, device=model.device)[None]
    try:
        for part in (ids[:, :-1], ids[:, -1:]):  # the last pass reads one token
            seen.clear()
            cache.begin_pass(part.shape[1])
            model(input_ids=part, use_cache=True, **{cache_argument(model): cache})
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(path for path, tokens in seen.items() if tokens == ids.shape[1])
