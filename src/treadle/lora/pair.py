"""The two LoRA factors of one module, and a check that what they compute stays finite in a dtype.

An infinite product times a weight of 0 is NaN, so one adapter's overflow would reach rows that do not use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.linalg import vector_norm

HEADROOM_POWER = 0.75
"""A bound must stay below the dtype's largest number to this power: inputs and base weights need the rest."""


@dataclass(frozen=True)
class LoraPair:
    """The factors of one module. They add `scale * b @ a @ x` to `W x`.

    Attributes:
        a: (r, in), as stored on disk.
        b: (out, r), as stored on disk.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        num_experts: of the fused experts whose weight is changed, each by its own rows of `a` and columns of `b`, one
            expert after the other. 1 = the module is a layer.
    """

    a: Tensor
    b: Tensor
    scale: float
    num_experts: int = 1

    @classmethod
    def empty(cls, size_in: int, size_out: int) -> "LoraPair":
        """Return factors of rank 0, which add nothing."""
        return cls(torch.zeros(0, size_in), torch.zeros(size_out, 0), 1.0)

    def joined(self, other: "LoraPair") -> "LoraPair":
        """Return factors that add what both add."""
        b = torch.cat([self.b.float(), other.b.float() * (other.scale / self.scale)], 1)
        return LoraPair(torch.cat([self.a.float(), other.a.float()]), b, self.scale)

    @property
    def rank(self) -> int:
        """The number of rows of `a`, of all experts together."""
        return self.a.shape[0]

    def norm(self) -> float:
        """Return the Frobenius norm of the whole update, scale included, without making its (out, in) product."""
        a = self.a.float().view(self.num_experts, -1, self.a.shape[1])  # (E, r, in)
        b = self.b.float().view(len(self.b), self.num_experts, -1).permute(1, 2, 0)  # (E, r, out)
        return self.scale * float(((b @ b.mT) * (a @ a.mT)).sum()) ** 0.5

    def bound(self) -> float:
        """Return an upper bound of scale, B, A x and scale B A for |x| <= 1; inf beyond float32."""
        rows_a, columns_a = _largest_norm(self.a, 1), _largest_norm(self.a, 0)
        rows_b = _largest_norm(self.b, 1)
        return max(self.scale, rows_b, rows_a * sqrt(self.a.shape[1]), self.scale * rows_b * columns_a)


def range_problems(pairs: Mapping[str, LoraPair], dtype: torch.dtype) -> list[str]:
    """Return a problem for each module whose update may overflow in `dtype`."""
    limit = torch.finfo(dtype).max ** HEADROOM_POWER
    bounds = {module: pair.bound() for module, pair in pairs.items()}
    name = str(dtype).removeprefix("torch.")
    return [
        f"{module}: its scale and factors reach {bound:.3g}, too large for {name} (allowed: {limit:.3g})"
        for module, bound in bounds.items()
        if not bound <= limit
    ]


def number_problem(key: str, tensor: Tensor) -> str | None:
    """Return why the numbers of a tensor cannot be used; None if they can."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"{key} is {tensor.dtype}; factors are float32, float16 or bfloat16; save it as one of these"
    return None if torch.isfinite(tensor).all() else f"{key} holds NaN or infinite values; take an earlier checkpoint"


def _largest_norm(factor: Tensor, axis: int) -> float:
    """Return the largest norm of a factor's vectors along an axis."""
    return float(vector_norm(factor, dim=axis, dtype=torch.promote_types(factor.dtype, torch.float32)).max())
