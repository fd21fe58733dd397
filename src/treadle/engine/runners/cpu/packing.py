"""Weights of the base's as oneDNN packs them: a second copy, in the order in which its kernels read.

On AMD's CPUs products of few rows with such a copy take about half the time that MKL takes with the weights as they
lie (`benchmarks/products.py`). vLLM packs on every CPU and drops the plain weights; here the model's own `forward`
reads these, so both are kept, and models whose copy would take more than a GiB are packed only if they are asked to.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

CPU_FILE = Path("/proc/cpuinfo")
PACKED_BYTES = 1 << 30
"""The most bytes of weights of which a packed copy is made without being asked for."""
OPERATIONS = torch.ops.mkldnn  # inductor's own: PyTorch has no public name for them


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs weights of this dtype on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(OPERATIONS, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(OPERATIONS._is_mkldnn_bf16_supported()))


def packs_unasked(num_bytes: int, dtype: torch.dtype) -> bool:
    """Return whether so many bytes of weights are packed where nobody says: where it was measured to be faster."""
    is_faster = is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return is_faster and num_bytes <= PACKED_BYTES and can_pack(dtype)


def pack(weight: Tensor) -> Tensor:
    """Return the packed copy of W (out, in)."""
    return cast(Tensor, OPERATIONS._reorder_linear_weight(weight.detach().contiguous(), None))


def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """Return x W^T (B, out) for x (B, in) and a packed W."""
    return cast(Tensor, OPERATIONS._linear_pointwise.default(x, packed, None, "none", [], ""))


@cache
def is_amd() -> bool:
    """Return whether the system says that this is a CPU of AMD's."""
    return CPU_FILE.exists() and "AuthenticAMD" in CPU_FILE.read_text("utf-8")


class Packs:
    """The packed copies of a model's weights, each made when a step first needs it, kept while adapters come and go."""

    def __init__(self) -> None:
        self._made: dict[tuple[nn.Linear, ...], Tensor] = {}
        self._versions: dict[tuple[nn.Linear, ...], int] = {}

    def of(self, layers: tuple[nn.Linear, ...], weight: Tensor) -> Tensor:
        """Return the packed copy of the weights of some layers, which lie one below the other in `weight`."""
        if layers not in self._made:
            self._made[layers] = self.fresh(layers, weight)
        return self._made[layers]

    def fresh(self, layers: tuple[nn.Linear, ...], weight: Tensor) -> Tensor:
        """Return a copy of their weights and of what else lies in `weight`, for one who keeps it."""
        self._versions.setdefault(layers, _version(layers))
        return pack(weight)

    @property
    def are_stale(self) -> bool:
        """Whether somebody has written to weights since they were packed."""
        return any(_version(layers) != version for layers, version in self._versions.items())


def _version(layers: Sequence[nn.Linear]) -> int:
    return sum(0 if layer.weight.is_inference() else layer.weight._version for layer in layers)


class Weight:
    """A matrix W of the base's, (out, in), or one with adapters' A below it: as it lies, and packed once asked for."""

    def __init__(self, plain: Tensor, packs: Packs, layers: Sequence[nn.Linear], *, has_factors: bool) -> None:
        """Take the weights of some layers, in one piece with factors that come and go or not."""
        self.plain = plain
        self._packs, self._layers, self._has_factors = packs, tuple(layers), has_factors

    @cached_property
    def packed(self) -> Tensor:
        """The packed copy."""
        make = self._packs.fresh if self._has_factors else self._packs.of
        return make(self._layers, self.plain)
