# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# Triton has no types, is absent on a CPU, and what `jit` decorates is not Python.
"""Launches the stages of a decode step as Triton kernels. The LoRA update is fused into kernels that the base needs.

`tests/test_kernels.py` compares each stage, with its LoRA update, with `tests/reference_kernels.py`. A launch inside a
CUDA graph costs as much time as reading 4 MB. A layer has five kernels and four products, with or without adapters.
"""

import torch
import triton
from torch import Tensor

from treadle.engine.runners.cuda.gemv import fastest_product
from treadle.engine.runners.cuda.interface import (
    CacheWindow,
    HeadNorms,
    Heads,
    LayerB,
    PendingNorm,
    PendingProduct,
    PendingUpdate,
)
from treadle.engine.runners.cuda.triton_kernels import activate_kernel, add_kernel, attend_kernel, store_kernel

ATTENTION_PROGRAMS = 8 * 132
"""Attention is split into this many programs if heads and rows are fewer: eight on each multiprocessor of an H100."""
MAX_SPLITS = 32
TILE_BYTES, ROW_TILE_BYTES = 128, 512
"""Bytes of each row of B that are read at once: for several rows of x, and for one."""
MAX_ROW_TILES = 4
"""Unrolled tiles of ranks for a single row; a kernel with eight took minutes to compile."""


class TritonKernels:
    """See `treadle.engine.runners.cuda.interface.Kernels`."""

    def __init__(self, attention_programs: int = ATTENTION_PROGRAMS) -> None:
        self._attention_programs = attention_programs
        self._tickets: dict[torch.device, Tensor] = {}

    def bucket(self, num_rows: int) -> int:
        """Round up to a power of two up to 8, a multiple of 8 up to 64, then of 32."""
        if num_rows <= 8:
            return triton.next_power_of_2(num_rows)
        step = 8 if num_rows <= 64 else 32
        return triton.cdiv(num_rows, step) * step

    def binds(self, buffers: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        """Return nothing: the buffers' addresses are data."""
        return ()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T (B, out) for x (B, in) by the fastest kernel."""
        return fastest_product(x, weight)

    def add(self, x: Tensor, product: PendingProduct, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + product (B, H), the same times `weight` (H,), and its sums of squares (B, parts)."""
        y, update, bias, _ = product
        num_rows, size = x.shape
        [layer_b] = update.layers if update else [None]
        block = _row_block(num_rows, update) if layer_b else 1
        columns = 32 if layer_b else min(1024, triton.next_power_of_2(size))
        parts = triton.cdiv(size, columns)
        total, weighted = torch.empty_like(x), torch.empty_like(x)
        squares = x.new_empty(num_rows, parts, dtype=torch.float32)
        add_kernel[(triton.cdiv(num_rows, block), parts)](
            x, y, y.stride(0), _or(bias, x), weight, total, weighted, squares, num_rows, size,
            *_sources(update, x), *_layer_b(layer_b, x)[:2],
            HAS_BIAS=bias is not None, HAS_UPDATE=layer_b is not None,
            M=block, N=columns, **_ranks(update, block), num_warps=_warps(block, update),
        )  # fmt: skip
        return total, weighted, squares

    def store(
        self,
        product: PendingProduct,
        shape: Heads,
        rotation: tuple[Tensor, Tensor],
        head_norms: HeadNorms | None,
        window: CacheWindow,
    ) -> Tensor:
        """Write k and v to the cache, return q (B, q, head)."""
        heads, update, bias, norm = product
        num_rows = len(heads)
        queries = heads.new_empty(num_rows, shape.q, shape.size)
        block = _row_block(num_rows, update) if update else 1 if num_rows <= 8 else 4
        layers = update.layers if update else (None, None, None)
        q_norm, k_norm, epsilon = head_norms or (heads, heads, 0.0)
        half = triton.next_power_of_2(shape.size // 2)
        store_kernel[(triton.cdiv(num_rows, block), shape.q + 2 * shape.kv)](
            heads, heads.stride(0), _or(bias, heads), *_norm(norm), *rotation, q_norm, k_norm, epsilon,
            queries, window.pointers, window.first, window.place, num_rows,
            *_sources(update, heads), *(each for layer_b in layers for each in _layer_b(layer_b, heads)),
            Q=shape.q, KV=shape.kv, HEAD=shape.size,
            HAS_BIAS=bias is not None, HAS_UPDATE=update is not None, HAS_NORMS=head_norms is not None,
            M=block, N=max(16, half), **_ranks(update, block), P=_parts_block(norm),
            num_warps=_warps(block, update) if update else 1,
        )  # fmt: skip
        return queries

    def attend(self, queries: Tensor, num_kv: int, scaling: float, window: CacheWindow) -> Tensor:
        """Return the attention result (B, q * head) of queries (B, q, head) over the cache."""
        num_rows, num_q, size = queries.shape
        group = num_q // num_kv
        splits = max(1, min(MAX_SPLITS, triton.cdiv(self._attention_programs, num_rows * num_kv)))
        out = queries.new_empty(num_rows, num_q * size)
        partial = queries.new_empty(num_rows, num_q, splits, size, dtype=torch.float32)
        sums = queries.new_empty(num_rows, num_q, splits, 2, dtype=torch.float32)
        attend_kernel[(num_rows, num_kv, splits)](
            queries, window.pointers, window.first, window.place, scaling, out, partial, sums,
            self._tickets_of(queries.device, num_rows * num_kv),
            KV=num_kv, GROUP=group, HEAD=size, SPLITS=splits,
            G=1 if group == 1 else max(16, triton.next_power_of_2(group)), D=max(16, triton.next_power_of_2(size)),
            N=32 if group == 1 or queries.dtype == torch.float32 else 64, S=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
        return out

    def activate(self, product: PendingProduct, size: int) -> Tensor:
        """Return silu(gate) * up (B, size) of gate and up side by side (B, 2 * size)."""
        gate_up, update, bias, norm = product
        num_rows = len(gate_up)
        out = gate_up.new_empty(num_rows, size)
        block, columns = (_row_block(num_rows, update), 64) if update else (1, 256)
        layers = update.layers if update else (None, None)
        activate_kernel[(triton.cdiv(num_rows, block), triton.cdiv(size, columns))](
            gate_up, gate_up.stride(0), _or(bias, gate_up), *_norm(norm), out, num_rows, size,
            *_sources(update, gate_up), *(each for layer_b in layers for each in _layer_b(layer_b, gate_up)),
            HAS_BIAS=bias is not None, HAS_UPDATE=update is not None,
            M=block, N=columns, **_ranks(update, block), P=_parts_block(norm),
            num_warps=_warps(block, update),
        )  # fmt: skip
        return out

    def _tickets_of(self, device: torch.device, count: int) -> Tensor:
        """Return zeros (count,) that kernels reset to zeros; made before a capture, because graphs share memory."""
        if device not in self._tickets or len(self._tickets[device]) < count:
            self._tickets[device] = torch.zeros(max(count, 1 << 14), dtype=torch.int32, device=device)
        return self._tickets[device]


def _row_block(num_rows: int, update: PendingUpdate | None) -> int:
    """Return the rows that a program takes; it reads B once for all of them."""
    size = update.h.element_size() if update else 1
    if num_rows == 1 and _widest(update) * size <= MAX_ROW_TILES * ROW_TILE_BYTES:
        return 1
    return min(64, max(16, triton.next_power_of_2(num_rows)))


def _widest(update: PendingUpdate | None) -> int:
    """Return the rank of the widest layer."""
    return max((layer_b.b.shape[1] for layer_b in update.layers if layer_b), default=1) if update else 1


def _ranks(update: PendingUpdate | None, block: int) -> dict[str, int]:
    """Return the ranks in a tile, at least 16, and the number of unrolled tiles."""
    size = update.h.element_size() if update else 1
    most = (ROW_TILE_BYTES if block == 1 else TILE_BYTES) // size
    ranks = min(most, max(16, triton.next_power_of_2(_widest(update))))
    return {"R": ranks, "BLOCKS": triton.cdiv(_widest(update), ranks) if block == 1 else 0, "num_stages": 2}


def _warps(block: int, update: PendingUpdate | None) -> int:
    return 8 if block >= 64 or (block == 1 and _widest(update) > 64) else 4


def _parts_block(norm: PendingNorm | None) -> int:
    assert norm is not None
    return triton.next_power_of_2(norm.squares.shape[1])


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return the tensor; if None, `other` as a placeholder that the kernel does not read."""
    return other if tensor is None else tensor


def _norm(norm: PendingNorm | None) -> tuple[Tensor, int, int, float]:
    assert norm is not None
    return norm.squares, norm.squares.shape[1], norm.size, norm.epsilon


def _sources(update: PendingUpdate | None, other: Tensor) -> tuple[Tensor, int, Tensor, int]:
    if update is None:
        return other, 0, other, 0
    return update.h, update.h.stride(0), update.gates, update.gates.stride(0)


def _layer_b(layer_b: LayerB | None, other: Tensor) -> tuple[Tensor, int, int]:
    """Return b, its rank and its first column of h; rank 0 if there is none."""
    return (other, 0, 0) if layer_b is None else (layer_b.b, layer_b.b.shape[1], layer_b.start)
