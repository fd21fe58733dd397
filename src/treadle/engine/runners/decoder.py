"""Describes the decoders that our own forward passes run: which models they are, and what each layer computes with.

An architecture, or another norm, is added here; the passes read nothing else of a model.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from treadle.engine.runners.rope import LONGROPE
from treadle.lora.layer import BlendedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Classes of transformers. Each layer is: norm, attention with rotary positions, norm, MLP with gated SiLU."""


def fits(model: "PreTrainedModel", device: str = "cpu") -> bool:
    """Return whether our passes can run the model: architecture, attention and layers are known, on one device."""
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
    """Return whether a module of the model has a hook, which only the model's own `forward` would call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")  # PyTorch has no public name
    return any(getattr(module, kind) for module in model.modules() for kind in kinds)


class RmsNorm:
    """An RMS norm: x / rms(x) * weight. All passes compute it from this weight and epsilon.

    A norm that stores its weight in another way, such as its offset from 1, is read in the constructor.
    """

    def __init__(self, module: Any) -> None:
        self.weight: Tensor = module.weight
        self.epsilon: float = module.variance_epsilon
        self._epsilon = torch.tensor(self.epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x (..., H), in half the operations of `functional.rms_norm` on a CPU, rounded once."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale * self.weight).to(x.dtype)


class DecoderLayer(NamedTuple):
    """One layer of a decoder. Linear layers that read the same input are together."""

    first_norm: RmsNorm
    qkv: tuple[nn.Module, ...]
    head_norms: tuple[RmsNorm, RmsNorm] | None
    """For each head's queries and keys."""
    scaling: float
    """A factor for attention scores."""
    output: tuple[nn.Module, ...]
    second_norm: RmsNorm
    gate_up: tuple[nn.Module, ...]
    down: tuple[nn.Module, ...]


class Decoder(NamedTuple):
    """A model that `fits`, with the blended layers that it has now."""

    embed: Callable[[Tensor], Tensor]
    """Tokens -> their vectors (..., H)."""
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Vectors, for their dtype, and positions (B, T) -> cosines and sines (B, T, head)."""
    layers: list[DecoderLayer]
    last_norm: RmsNorm
    head: nn.Module
    num_heads: int
    num_kv_heads: int
    head_size: int


def describe(model: "PreTrainedModel") -> Decoder:
    """Describe a model that `fits`; once more after adapters came or went."""
    outer: Any = model
    inner = outer.model
    layers = [_describe_layer(layer, layer.self_attn, layer.mlp) for layer in inner.layers]
    return Decoder(
        embed=inner.embed_tokens,
        rotate=inner.rotary_emb,
        layers=layers,
        last_norm=RmsNorm(inner.norm),
        head=outer.lm_head,
        num_heads=model.config.num_attention_heads,
        num_kv_heads=model.config.num_key_value_heads,
        head_size=inner.layers[0].self_attn.head_dim,
    )


def _describe_layer(layer: Any, attention: Any, mlp: Any) -> DecoderLayer:
    has_head_norms = hasattr(attention, "q_norm")
    return DecoderLayer(
        first_norm=RmsNorm(layer.input_layernorm),
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=(RmsNorm(attention.q_norm), RmsNorm(attention.k_norm)) if has_head_norms else None,
        scaling=attention.scaling,
        output=(attention.o_proj,),
        second_norm=RmsNorm(layer.post_attention_layernorm),
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=(mlp.down_proj,),
    )


def bases(layers: Sequence[nn.Module]) -> list[nn.Linear]:
    """Return the base layers, without the adapters around them."""
    return [cast(nn.Linear, layer.base if isinstance(layer, BlendedLinear) else layer) for layer in layers]


class StackedWeights:
    """Linear layers that read the same input: their weights in one tensor, and if possible the adapters' A below them.

    Attributes:
        plain: the base layers.
        bias: (sum of out,); None if no layer has one.
        num_out: sum of out.
        whole: (num_out, and sum of R, in).
        has_factors: A lies below the weights.
        updates: each blended layer and its columns of the results, in the order of their A.
        slots: of their gates.
        stacked_a: the A of all layers; None without adapters.
    """

    def __init__(self, layers: Sequence[nn.Module], *, with_factors: bool = True) -> None:
        """Stack the weights, with A below them if the active or the stored A has their dtype."""
        self.plain = bases(layers)
        self.bias = joined_bias(self.plain)
        ends = list(accumulate(layer.out_features for layer in self.plain))
        columns = [slice(end - layer.out_features, end) for end, layer in zip(ends, self.plain, strict=True)]
        blended = [
            (layer, each) for layer, each in zip(layers, columns, strict=True) if isinstance(layer, BlendedLinear)
        ]
        self.num_out = ends[-1]
        self.updates = sorted(blended, key=lambda update: update[0].index)
        self.slots = tuple(layer.slot for layer, _ in self.updates)
        self.stacked_a = blended[0][0].stacked_a if blended else None
        factors = self.stacked_a.held_in(self.plain[0].weight.dtype) if self.stacked_a and with_factors else None
        self.has_factors = factors is not None
        below = [] if factors is None else [factors]
        self.whole = stack_weights([*(layer.weight for layer in self.plain), *below])
        if self.stacked_a and self.has_factors:
            self.stacked_a.share(self.whole[self.num_out :])

    @property
    def weight(self) -> Tensor:
        """W of all layers, (num_out, in)."""
        return self.whole[: self.num_out]


def joined_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Return the biases (sum of out,), zero for a layer without one; None if no layer has one."""
    given: list[Tensor | None] = [layer.bias for layer in layers]
    if all(bias is None for bias in given):
        return None
    pairs = zip(given, layers, strict=True)
    return torch.cat([layer.weight.new_zeros(layer.out_features) if bias is None else bias for bias, layer in pairs])


def stack_weights(weights: Sequence[Tensor]) -> Tensor:
    """Stack weights in one tensor (sum of out, in) and turn each into a view of it."""
    first = weights[0].data
    sizes = [len(weight) for weight in weights]
    if _is_stacked(weights):
        return first.as_strided((sum(sizes), first.shape[1]), first.stride())
    whole = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, whole.split(sizes), strict=True):
        weight.data = part
    return whole


def _is_stacked(weights: Sequence[Tensor]) -> bool:
    """Return whether the weights already follow one another in one storage."""
    end = weights[0].data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
        if not same or weight.data_ptr() != end or not weight.is_contiguous():
            return False
        end += weight.numel() * weight.element_size()
    return True
