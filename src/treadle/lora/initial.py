"""Takes the initial factors out of adapters whose training began from a part of the base's own weight.

PiSSA and OLoRA move a part of each weight into the factors: W becomes W - s B0 A0, and training goes on from B0 A0.
PEFT repeats that when it loads them. Here the base stays as it is: the update is s (B A - B0 A0), of twice the rank.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from treadle.common.errors import AdapterError
from treadle.lora.pair import LoraPair
from treadle.lora.vectors import weight_of

KNOWN_INITS = ("pissa", "olora")
"""Values of `init_lora_weights` whose initial factors follow from the base's weights alone."""


@torch.no_grad()
def without_initial(layer: nn.Module, pair: LoraPair, kind: str) -> LoraPair:
    """Return factors (2r, in) and (out, 2r) of the update to the base's own weight; `kind` is one of KNOWN_INITS.

    Raises:
        AdapterError: the initial factors cannot be computed from this layer.
    """
    if isinstance(layer, nn.Embedding):
        raise AdapterError(f"{kind} of an embedding cannot be blended")
    if pair.num_experts > 1:
        raise AdapterError(f"{kind} of fused experts cannot be blended")
    layer_: Any = layer
    if type(layer_.weight) not in (nn.Parameter, Tensor) or not layer_.weight.is_floating_point():
        raise AdapterError(f"{kind} needs the weight that training began with, and this one is quantised")
    if kind == "olora" and type(layer) is not nn.Linear:
        raise AdapterError("olora is known for Linear layers alone; PEFT's factors do not fit this one")
    b, a = (_olora if kind == "olora" else _pissa)(weight_of(layer), pair)
    return replace(pair, a=torch.cat([pair.a.to(a), a]), b=torch.cat([pair.b.to(b), -b], 1))


def _pissa(weight: Tensor, pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Return B0 and A0: their product, times the scale, is the best approximation of W (out, in) of that rank."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[: pair.rank] / pair.scale).sqrt()
    return left[:, : pair.rank] * roots, roots[:, None] * right[: pair.rank]


def _olora(weight: Tensor, pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Return B0 and A0: the first columns of Q and rows of R, where QR is W (out, in)."""
    q, r = torch.linalg.qr(weight)
    return q[:, : pair.rank], r[: pair.rank]
