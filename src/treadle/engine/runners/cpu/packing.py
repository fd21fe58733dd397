"""Base weights packed by oneDNN: a second copy, in the order in which its kernels read.

On AMD's CPUs a product of few rows with a packed copy takes about half the time of MKL's with the plain weights
(`9fff023:benchmarks/products.py`). vLLM packs on every CPU and drops the plain weights. Treadle keeps both, because the
model's own `forward` reads the plain ones; models whose copy takes more than 1 GiB are packed only on request.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

CPU_FILE = Path("/proc/cpuinfo")
DEFAULT_PACK_BYTES = 1 << 30
"""Models up to this many bytes of weights are packed without being asked."""
OPERATIONS = torch.ops.mkldnn  # inductor's own: PyTorch has no public name for them


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs weights of this dtype on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(OPERATIONS, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(OPERATIONS._is_mkldnn_bf16_supported()))


def packs_by_default(
    num_bytes: int, dtype: torch.dtype, *, on_amd: bool | None = None, capability: str | None = None
) -> bool:
    """Return whether weights of `num_bytes` bytes are packed unasked, which is where packing was measured to be faster.

    Args:
        num_bytes: of all weights.
        dtype: of the weights.
        on_amd: the CPU is AMD's; None asks the system.
        capability: the CPU's vector instructions as PyTorch names them; None asks PyTorch.
    """
    on_amd = is_amd() if on_amd is None else on_amd
    is_faster = on_amd and (capability or torch.backends.cpu.get_cpu_capability()) == "AVX512"
    return is_faster and num_bytes <= DEFAULT_PACK_BYTES and can_pack(dtype)


def pack(weight: Tensor) -> Tensor:
    """Return the packed copy of W (out, in)."""
    return cast(Tensor, OPERATIONS._reorder_linear_weight(weight.detach().contiguous(), None))


def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """Return x W^T (B, out) for x (B, in) and a packed W."""
    return cast(Tensor, OPERATIONS._linear_pointwise.default(x, packed, None, "none", [], ""))


@cache
def is_amd() -> bool:
    """Return whether the system reports a CPU made by AMD."""
    return CPU_FILE.exists() and "AuthenticAMD" in CPU_FILE.read_text("utf-8")


class PackedWeights:
    """The packed copies of a model's weights. Each is made on first use and kept while adapters come and go."""

    def __init__(self) -> None:
        self._made: dict[tuple[nn.Linear, ...], Tensor] = {}
        self._versions: dict[tuple[nn.Linear, ...], int] = {}
        self.num_packed = 0  # so far

    def get(self, layers: tuple[nn.Linear, ...], weight: Tensor) -> Tensor:
        """Return the packed copy of the weights of some layers, which are stacked in `weight`."""
        if layers not in self._made:
            self._made[layers] = self.pack(layers, weight)
        return self._made[layers]

    def pack(self, layers: tuple[nn.Linear, ...], weight: Tensor) -> Tensor:
        """Return a new packed copy of `weight`, which the caller keeps; watch the layers for later writes."""
        self._versions.setdefault(layers, _version(layers))
        self.num_packed += 1
        return pack(weight)

    @property
    def are_stale(self) -> bool:
        """True if a weight has been written to since it was packed."""
        return any(_version(layers) != version for layers, version in self._versions.items())


def _version(layers: Sequence[nn.Linear]) -> int:
    return sum(0 if layer.weight.is_inference() else layer.weight._version for layer in layers)


class BaseWeight:
    """A base matrix W (out, in), or W with adapters' A below it: plain, packed on first use."""

    def __init__(self, plain: Tensor, packs: PackedWeights, layers: Sequence[nn.Linear], *, has_factors: bool) -> None:
        """Take the stacked weights of some layers; `has_factors` says that A rows, which come and go, lie below."""
        self.plain = plain
        self._packs, self._layers, self._has_factors = packs, tuple(layers), has_factors

    @cached_property
    def packed(self) -> Tensor:
        """The packed copy."""
        make = self._packs.pack if self._has_factors else self._packs.get
        return make(self._layers, self.plain)
