"""What our own forward passes of one token a row share: which models they know, and how these are built."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from treadle.engine.runners.rope import LONGROPE
from treadle.lora.layer import BlendedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""The classes of transformers whose blocks are: norm, attention with rotary positions, norm, gated SiLU."""


def fits(model: "PreTrainedModel", device: str = "cpu") -> bool:
    """Whether a pass knows the model: architecture, full attention, plain layers, on one device of this kind."""
    kind, config = type(model), model.config
    if kind.__name__ not in ARCHITECTURES or not kind.__module__.startswith("transformers."):
        return False
    types = getattr(config, "layer_types", None)
    is_windowed = (
        any(each != "full_attention" for each in types) if types else bool(getattr(config, "sliding_window", 0))
    )
    attention = config._attn_implementation  # pyright: ignore[reportPrivateUsage] - transformers has no public name
    if is_windowed or config.hidden_act != "silu" or attention != "sdpa":
        return False
    linear = [module for module in model.modules() if hasattr(module, "in_features")]
    if any(getattr(module, "rope_type", None) == LONGROPE for module in model.modules()):
        return False
    is_plain = all(type(module) is nn.Linear and type(module.weight) is nn.Parameter for module in linear)
    places = {(parameter.device, parameter.dtype) for parameter in model.parameters()}
    return is_plain and len(places) == 1 and next(iter(places))[0].type == device


def is_hooked(model: nn.Module) -> bool:
    """Whether somebody listens to a module of the model, which only its own `forward` would call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")  # PyTorch has no public name
    return any(getattr(module, kind) for module in model.modules() for kind in kinds)


class DecoderLayer(NamedTuple):
    """One layer of a decoder: linear layers that read the same input are together."""

    first_norm: Any
    qkv: tuple[nn.Module, ...]
    head_norms: tuple[Any, Any] | None
    scaling: float
    output: tuple[nn.Module, ...]
    second_norm: Any
    gate_up: tuple[nn.Module, ...]
    down: tuple[nn.Module, ...]


def decoder_layers(model: Any) -> list[DecoderLayer]:
    """Return the layers of a model that `fits`."""
    return [_decoder_layer(layer, layer.self_attn, layer.mlp) for layer in model.model.layers]


def _decoder_layer(layer: Any, attention: Any, mlp: Any) -> DecoderLayer:
    return DecoderLayer(
        first_norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        scaling=attention.scaling,
        output=(attention.o_proj,),
        second_norm=layer.post_attention_layernorm,
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=(mlp.down_proj,),
    )


def bases(layers: Sequence[nn.Module]) -> list[nn.Linear]:
    """Return the base's own layers."""
    return [cast(nn.Linear, layer.base if isinstance(layer, BlendedLinear) else layer) for layer in layers]


def joined_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Return the biases side by side, zero where a layer has none; None where no layer has one."""
    given: list[Tensor | None] = [layer.bias for layer in layers]
    if all(bias is None for bias in given):
        return None
    pairs = zip(given, layers, strict=True)
    return torch.cat([layer.weight.new_zeros(layer.out_features) if bias is None else bias for bias, layer in pairs])


def in_one_piece(weights: Sequence[Tensor]) -> Tensor:
    """Return the weights stacked (sum of out, in); they keep their values and become views of it, held once."""
    first = weights[0].data
    sizes = [len(weight) for weight in weights]
    if _is_stacked(weights):
        return first.as_strided((sum(sizes), first.shape[1]), first.stride())
    whole = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, whole.split(sizes), strict=True):
        weight.data = part
    return whole


def _is_stacked(weights: Sequence[Tensor]) -> bool:
    """Whether the weights already lie behind one another in one storage."""
    end = weights[0].data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
        if not same or weight.data_ptr() != end or not weight.is_contiguous():
            return False
        end += weight.numel() * weight.element_size()
    return True
