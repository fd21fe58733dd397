"""Whether what an adapter's factors make of an input stays finite in the dtype that it is computed in.

An infinite product times a weight of 0 is NaN, so one adapter's overflow would reach rows that do not even use it.
"""

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch.linalg import vector_norm

if TYPE_CHECKING:
    from treadle.lora.adapter import LoraPair

HEADROOM = 0.75
"""Power of the largest number: below it, inputs and base weights have the rest of the dtype's range to themselves."""


def range_problems(pairs: Mapping[str, "LoraPair"], dtype: torch.dtype) -> list[str]:
    """Return which modules have an update that may overflow in `dtype`."""
    most = torch.finfo(dtype).max ** HEADROOM
    reaches = {module: _reach(pair) for module, pair in pairs.items()}
    name = str(dtype).removeprefix("torch.")
    return [
        f"{module}: its scale and factors reach {reach:.3g}, too large for {name} (allowed: {most:.3g})"
        for module, reach in reaches.items()
        if not reach <= most
    ]


def _reach(pair: "LoraPair") -> float:
    """Return an upper bound of scale, B, A x (entries of x at most 1), and scale B A; inf where float32 ends."""
    rows_a, columns_a = _longest(pair.a, 1), _longest(pair.a, 0)
    rows_b = _longest(pair.b, 1)
    return max(pair.scale, rows_b, rows_a * sqrt(pair.a.shape[1]), pair.scale * rows_b * columns_a)


def _longest(factor: torch.Tensor, axis: int) -> float:
    """Return the largest norm of a factor's vectors along an axis."""
    return float(vector_norm(factor, dim=axis, dtype=torch.promote_types(factor.dtype, torch.float32)).max())
