"""The vectors of one module: an adapter may scale its inputs or outputs, or change its bias, besides adding factors.

DoRA, IA3, `lora_bias` and trained biases all come down to them. Some are stored relative to the base's own weights; for
these `resolve` asks the layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from treadle.common.errors import AdapterError
from treadle.lora.pair import LoraPair


@dataclass(frozen=True)
class LayerVectors:
    """The vectors of one module; with them it gives `out_scale * base(in_scale * x) + bias`. None changes nothing.

    Attributes:
        in_scale: (in,), multiplies the input.
        out_scale: (out,), multiplies the output, the base's bias included.
        bias: (out,), is added.
        magnitude: (out,), DoRA's lengths of the rows of the adapted weight, as stored.
        whole_bias: (out,), replaces the base's bias.
    """

    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    whole_bias: Tensor | None = None

    @property
    def given(self) -> dict[str, Tensor]:
        """The vectors that are there, by name."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: vector for name, vector in named.items() if vector is not None}

    @property
    def has_effect(self) -> bool:
        """False if nothing would change: scales of 1 and biases of 0."""
        neutral = {"in_scale": 1, "out_scale": 1, "bias": 0}
        return any(name not in neutral or bool((each != neutral[name]).any()) for name, each in self.given.items())

    def misfits(self, size_in: int | None, size_out: int) -> Iterator[str]:
        """Yield a problem for each vector of another size than the layer's; a norm's `size_in` is None."""
        for name, vector in self.given.items():
            size = size_in if name == "in_scale" else size_out
            if tuple(vector.shape) != (size,):
                yield f"its {name} is {tuple(vector.shape)}, the layer needs {(size,)}"


def resolve(layer: nn.Module, pair: LoraPair | None, vectors: LayerVectors) -> tuple[LoraPair | None, LayerVectors]:
    """Return factors and vectors that no longer depend on the base's weights.

    DoRA gives `c * (W x + s B A x)` and the base's bias, where c is the magnitude over the row norms of `W + s B A`.
    So c goes into B, and becomes a scale of the output from which the base's bias is taken out again.

    Raises:
        AdapterError: a row of the adapted weight is zero, or a bias is replaced that the layer does not have.
    """
    if isinstance(layer, nn.Embedding):
        raise AdapterError("DoRA and other vectors of an embedding cannot be blended")
    bias = _bias_of(layer)
    if vectors.whole_bias is not None:
        if bias is None:
            raise AdapterError("it replaces the bias, and the layer has none")
        vectors = replace(vectors, whole_bias=None, bias=vectors.whole_bias.to(bias) - bias)
    if vectors.magnitude is None:
        return pair, vectors
    weight = weight_of(layer)  # (out, in)
    if pair is not None:
        b, a = pair.b.to(weight), pair.a.to(weight)
        weight = weight.addmm(b, a, alpha=pair.scale)
    scale = vectors.magnitude.to(weight) / torch.linalg.vector_norm(weight, dim=1)  # (out,)
    if not torch.isfinite(scale).all():
        raise AdapterError("a row of W + s B A is zero, so DoRA cannot give it a length")
    added = vectors.bias
    if bias is not None:
        added = (1 - scale) * bias + (0 if added is None else added)
    pair = pair and replace(pair, b=pair.b.to(weight) * scale[:, None])
    return pair, LayerVectors(out_scale=scale, bias=added)


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """Return W (out, in) of a linear layer, float32 on the CPU; a quantised layer is asked for it."""
    layer_: Any = layer
    weight = layer_.weight
    if type(layer) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point():
        return weight.detach().float().cpu()
    size = layer_.nx if hasattr(layer, "nx") else layer_.in_features
    parameter = next(each for each in (*layer.parameters(), *layer.buffers()))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    columns = layer(torch.eye(size, device=parameter.device, dtype=dtype)).float().cpu()  # (in, out)
    bias = _bias_of(layer)
    return (columns if bias is None else columns - bias).t()


def _bias_of(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias.detach().float().cpu() if isinstance(bias, Tensor) else None
