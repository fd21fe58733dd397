"""An embedding of the base with the factors of all adapters beside it: columns of A are looked up."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from treadle.lora.layer import BlendedLinear


class BlendedEmbedding(BlendedLinear):
    """An embedding of the base, and the stacked A (R, vocabulary) and B (H, R) of its adapters."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) and the update, (B, T, H), for tokens x (B, T)."""
        y = self.base(x, *args, **kwargs)
        h = self.gated(x)
        if h is None:
            return y
        update = functional.linear(h, self.b_active)
        scale = getattr(self.base, "embed_scale", None)  # Gemma multiplies its vectors, and PEFT the update too
        return (y + (update if scale is None else update * scale)).to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return the columns of A (B, T, R) for tokens x (B, T)."""
        return self.stacked_a.a_active.index_select(1, x.flatten()).t().view(*x.shape, -1)
