"""A product with a factor that never changes, by the kernel that is fastest for so many tokens; see `cpu`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Into = Callable[[Tensor, Tensor], object]
"""(made, x) -> writes x W^T (T, out) into `made`, which is contiguous."""


@dataclass(frozen=True)
class Product:
    """x (T, in) -> x W^T (T, out), for a W that is packed.

    Attributes:
        many: makes it for any number of tokens.
        into: (made, x) writes it into `made`, which is contiguous; None = there is no kernel that does.
        most: tokens up to which `into` is the faster one.
        size_out: the number of outputs, for `into`.
    """

    many: Callable[[Tensor], Tensor]
    into: Into | None = None
    most: int = 0
    size_out: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T; compiled code must not ask for T, and has the one for many."""
        if self.into is None or torch.compiler.is_compiling() or x.shape[0] > self.most:
            return self.many(x)
        return made_anew(self.into, self.size_out, x)


def made_anew(into: Into, size_out: int, x: Tensor) -> Tensor:
    """Return what `into` makes of x (T, in), in memory of its own: (T, out)."""
    made = x.new_empty(x.shape[0], size_out)
    into(made, x)
    return made
