"""Checks that the engine can run a model: its only state is keys and values, and padding is masked.

The checks ask transformers and the model itself, because no list of model names would stay complete.
"""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from treadle.common.errors import ModelError, problem_list
from treadle.common.transformers_names import CACHE_NAMES, cache_argument
from treadle.engine.kv_cache import RowCache
from treadle.lora.compatibility import linear_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED_CACHE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Layers of transformers' caches that `kv_cache` can replace: keys and values of each token, or nothing."""
STATEFUL_LAYER_TYPES = ("conv", "linear_attention", "mamba", "recurrent")
"""Layer types of a configuration that keep a state; caches of older releases do not show it."""
PADDING_TOKENS = 3
"""Padding that the probe puts before a text."""


def check_supported(model: "PreTrainedModel") -> None:
    """Raise a ModelError that lists all reasons why the engine cannot run the model."""
    problems = list(_state_problems(model)) or list(_padding_problems(model))
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
    if kinds or types:
        yield (
            f"it keeps {', '.join(sorted(kinds or types))}; the engine holds keys and values of each token, and no "
            "convolution, recurrent or indexed states"
        )
    elif getattr(model, "_is_stateful", False):
        yield "it keeps a recurrent state; the engine holds keys and values of each token"


@torch.inference_mode()
def _padding_problems(model: "PreTrainedModel") -> Iterator[str]:
    """Test whether left padding changes the logits of a model that takes no positions."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        return
    ids = torch.arange(1, 5, device=model.device)[None]  # (1, T)
    padded = torch.nn.functional.pad(ids, (PADDING_TOKENS, 0))  # (1, PADDING_TOKENS + T)
    mask = (torch.arange(padded.shape[1], device=model.device) >= PADDING_TOKENS).long()[None]
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()  # (V,)
    beside = model(input_ids=padded, attention_mask=mask).logits[0, -1].float()
    if (alone - beside).abs().max() > alone.std() * (0.01 if model.dtype == torch.float32 else 0.1):
        yield (
            "it takes no position_ids and counts padding as tokens, so rows of unequal length in one pass would not "
            "be what they are alone"
        )


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
    cache, ids = RowCache(), torch.arange(1, 5, device=model.device)[None]
    try:
        for part in (ids[:, :-1], ids[:, -1:]):  # the last pass reads one token
            seen.clear()
            model(input_ids=part, use_cache=True, **{cache_argument(model): cache})
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(path for path, tokens in seen.items() if tokens == ids.shape[1])
