# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# Triton has no types, is absent on a CPU, and what `jit` decorates is not Python.
"""Products of few rows on a GPU: Triton kernels that read W faster than cuBLAS."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

VECTOR_TILE = (2, 2048, 8)
"""For one row: outputs a program, columns of W at a time, warps. Fastest for every product of both models."""
THIN_TILES = ((8, 4608, (32, 128, 4, 4)), (32, 16384, (64, 128, 4, 3)))
"""(maximum rows, minimum outputs, (outputs a program, columns of W at a time, warps, stages)); the last that fits wins.

Both were measured by `9fff023:benchmarks/gpu_products.py` on an H100, in bfloat16. With up to 32 rows the
head, gate and up, and with up to 8 q, k and v, were faster than by cuBLAS for Llama-2-7B and Llama-3-8B, with adapters
of either kind and without; o was so only without adapters, and down only in Llama-3-8B.
"""


@triton.jit
def _vector_product(x, weight, out, num_out, size, N: tl.constexpr, K: tl.constexpr):
    """Compute W x for one row; a program reads whole rows of W."""
    outs = tl.program_id(0) * N + tl.arange(0, N)
    is_out = outs < num_out
    total = tl.zeros([N, K], tl.float32)
    starts = weight + outs.to(tl.int64)[:, None] * size
    for first in range(0, size, K):
        columns = first + tl.arange(0, K)
        is_column = columns < size
        w = tl.load(starts + columns[None, :], mask=is_out[:, None] & is_column[None, :], other=0.0)
        total += w.to(tl.float32) * tl.load(x + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(out + outs, tl.sum(total, 1).to(out.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["num_rows"])
def _thin_product(
    x, weight, out, num_rows, num_out, size, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr
):
    """Compute x W^T for a few rows; a program takes all rows and some outputs."""
    rows, outs = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    is_row, is_out = rows < num_rows, outs < num_out
    total = tl.zeros([M, N], tl.float32)
    starts = weight + outs.to(tl.int64)[:, None] * size
    for first in tl.range(0, size, K, num_stages=STAGES):
        columns = first + tl.arange(0, K)
        is_column = columns < size
        w = tl.load(starts + columns[None, :], mask=is_out[:, None] & is_column[None, :], other=0.0)
        part = tl.load(
            x + rows[:, None] * size + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
        )
        total = tl.dot(part, tl.trans(w), total, input_precision="ieee")
    places = rows.to(tl.int64)[:, None] * num_out + outs[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_out[None, :])


def vector_product(x: Tensor, weight: Tensor, outs: int, columns: int, warps: int) -> Tensor:
    """Return x W^T (1, out) for one row; a program computes `outs` outputs, `columns` columns of W at a time."""
    (num_out, size), out = weight.shape, x.new_empty(1, len(weight))
    _vector_product[(triton.cdiv(num_out, outs),)](x, weight, out, num_out, size, N=outs, K=columns, num_warps=warps)
    return out


def thin_product(x: Tensor, weight: Tensor, outs: int, columns: int, warps: int, stages: int) -> Tensor:
    """Return x W^T (B, out); a program computes `outs` outputs and prefetches `stages` tiles of `columns` columns."""
    (num_out, size), num_rows = weight.shape, len(x)
    out = x.new_empty(num_rows, num_out)
    rows = min(128, max(16, triton.next_power_of_2(num_rows)))
    grid = (triton.cdiv(num_out, outs), triton.cdiv(num_rows, rows))
    _thin_product[grid](
        x, weight, out, num_rows, num_out, size, M=rows, N=outs, K=columns, STAGES=stages, num_warps=warps
    )
    return out


def fastest_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (B, out) for x (B, in), W (out, in), by the kernel measured as fastest; cuBLAS otherwise."""
    num_rows, num_out = len(x), len(weight)
    if num_rows == 1:
        return vector_product(x, weight, *VECTOR_TILE)
    fitting = [how for rows, outs, how in THIN_TILES if num_rows <= rows and num_out >= outs]
    if fitting and x.dtype == torch.bfloat16:
        return thin_product(x, weight, *fitting[-1])
    return functional.linear(x, weight)
