# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# Triton has no types, is absent on a CPU, and what `jit` decorates is not Python.
"""The stages of a decode step as Triton kernels: what adapters add rides on the kernels that the base has anyway.

`treadle.kernels_plain` says what each computes. A launch inside a CUDA graph costs as much as reading four megabytes;
a layer has five of these kernels and four products, with adapters and without.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from treadle.step_parts import Factor, HeadNorms, Heads, Norm, Unfinished, Update, Window

PROGRAMS = 8 * 132
"""Programs that attention is split into if there are fewer heads and rows: eight on each multiprocessor of an H100."""
MAX_SPLITS = 32
RANK_BYTES, ROW_RANK_BYTES = 128, 512
"""Of each row of B, what is read at once for several rows of x, and for one."""
LOOSE = ["num_rows", "parts"]
"""Arguments for whose values nothing is compiled anew."""


@triton.jit
def _block_of_update(
    h, h_stride, gates, gates_stride, b, rank, first, rows, is_row, outs, is_out, M: tl.constexpr, R: tl.constexpr
):
    """Return gates * h (M, R) and B (N, R) of the ranks from `first` on."""
    ranks = first + tl.arange(0, R)
    is_rank = ranks < rank
    inside = is_row[:, None] & is_rank[None, :]
    factor = tl.load(b + outs[:, None] * rank + ranks[None, :], mask=is_out[:, None] & is_rank[None, :], other=0.0)
    gate = tl.load(gates + rows[:, None] * gates_stride + ranks[None, :], mask=inside, other=0.0)
    gated = gate * tl.load(h + rows[:, None] * h_stride + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
    return gated, factor


@triton.jit
def _updated(
    h, h_stride, gates, gates_stride, b, rank, rows, is_row, outs, is_out,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return B (gates * h), (M, N), of some rows and some outputs.

    For one row the blocks of ranks are written out, so that all of B is asked for at once.
    """
    total = tl.zeros([M, N], tl.float32)
    if M == 1:
        for block in tl.static_range(BLOCKS):
            gated, factor = _block_of_update(
                h, h_stride, gates, gates_stride, b, rank, block * R, rows, is_row, outs, is_out, M, R
            )
            total += tl.sum(factor.to(tl.float32) * gated, 1)[None, :]
    else:
        for first in range(0, rank, R):
            gated, factor = _block_of_update(
                h, h_stride, gates, gates_stride, b, rank, first, rows, is_row, outs, is_out, M, R
            )
            total = tl.dot(gated.to(factor.dtype), tl.trans(factor), total, input_precision="ieee")
    return total


@triton.jit
def _scale(squares, parts, size, epsilon, rows, is_row, P: tl.constexpr):
    """Return 1 / rms, (M,), of rows whose squares are summed in parts."""
    columns = tl.arange(0, P)
    inside = is_row[:, None] & (columns < parts)[None, :]
    total = tl.sum(tl.load(squares + rows[:, None] * parts + columns[None, :], mask=inside, other=0.0), 1)
    return tl.rsqrt(total / size + epsilon)


@triton.jit(do_not_specialize=LOOSE)
def _add(
    x, y, y_stride, bias, weight, total_out, weighted_out, squares, num_rows, size,
    h, h_stride, gates, gates_stride, b, rank,
    HAS_BIAS: tl.constexpr, HAS_UPDATE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    block = tl.program_id(1)
    columns = block * N + tl.arange(0, N)
    is_row, is_column = rows < num_rows, columns < size
    inside = is_row[:, None] & is_column[None, :]
    places = rows[:, None] * size + columns[None, :]
    total = tl.load(y + rows[:, None] * y_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        total += _updated(h, h_stride, gates, gates_stride, b, rank, rows, is_row, columns, is_column, M, N, R, BLOCKS)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    total += tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(total_out.dtype.element_ty)
    tl.store(total_out + places, rounded, mask=inside)
    exact = rounded.to(tl.float32)
    scale = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(weighted_out + places, (exact * scale[None, :]).to(weighted_out.dtype.element_ty), mask=inside)
    tl.store(squares + rows * tl.num_programs(1) + block, tl.sum(exact * exact, 1), mask=is_row)


@triton.jit(do_not_specialize=LOOSE)
def _activate(
    y, y_stride, bias, squares, parts, norm_size, epsilon, out, num_rows, size,
    h, h_stride, gates, gates_stride, gate_b, gate_rank, gate_start, up_b, up_rank, up_start,
    HAS_BIAS: tl.constexpr, HAS_UPDATE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    is_row, is_column = rows < num_rows, columns < size
    inside = is_row[:, None] & is_column[None, :]
    places = rows[:, None] * y_stride + columns[None, :]
    gate = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y + size + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        gate += _updated(
            h + gate_start, h_stride, gates + gate_start, gates_stride, gate_b, gate_rank,
            rows, is_row, columns, is_column, M, N, R, BLOCKS,
        )  # fmt: skip
        up += _updated(
            h + up_start, h_stride, gates + up_start, gates_stride, up_b, up_rank,
            rows, is_row, columns, is_column, M, N, R, BLOCKS,
        )  # fmt: skip
    scale = _scale(squares, parts, norm_size, epsilon, rows, is_row, P)[:, None]
    gate *= scale
    up *= scale
    if HAS_BIAS:
        gate += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + size + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + rows[:, None] * size + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=LOOSE)
def _store(
    y, y_stride, bias, squares, parts, norm_size, epsilon, cos, sin, q_norm, k_norm, head_epsilon,
    queries, pointers, first, place, num_rows,
    h, h_stride, gates, gates_stride, q_b, q_rank, q_start, k_b, k_rank, k_start, v_b, v_rank, v_start,
    Q: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_NORMS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One head of some rows: its two halves are turned against each other."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1)
    HALF: tl.constexpr = HEAD // 2
    low = tl.arange(0, N)
    high = low + HALF
    is_row, is_column = rows < num_rows, low < HALF
    inside = is_row[:, None] & is_column[None, :]
    places = rows[:, None] * y_stride + head * HEAD + low[None, :]
    one = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(y + HALF + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        if head < Q:
            shift, outs = q_start, head * HEAD
            one += _updated(
                h + shift, h_stride, gates + shift, gates_stride, q_b, q_rank,
                rows, is_row, outs + low, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
            two += _updated(
                h + shift, h_stride, gates + shift, gates_stride, q_b, q_rank,
                rows, is_row, outs + high, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
        elif head < Q + KV:
            shift, outs = k_start, (head - Q) * HEAD
            one += _updated(
                h + shift, h_stride, gates + shift, gates_stride, k_b, k_rank,
                rows, is_row, outs + low, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
            two += _updated(
                h + shift, h_stride, gates + shift, gates_stride, k_b, k_rank,
                rows, is_row, outs + high, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
        else:
            shift, outs = v_start, (head - Q - KV) * HEAD
            one += _updated(
                h + shift, h_stride, gates + shift, gates_stride, v_b, v_rank,
                rows, is_row, outs + low, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
            two += _updated(
                h + shift, h_stride, gates + shift, gates_stride, v_b, v_rank,
                rows, is_row, outs + high, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
    scale = _scale(squares, parts, norm_size, epsilon, rows, is_row, P)[:, None]
    one *= scale
    two *= scale
    if HAS_BIAS:
        one += tl.load(bias + head * HEAD + low, mask=is_column, other=0.0).to(tl.float32)[None, :]
        two += tl.load(bias + head * HEAD + high, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if head < Q + KV:
        if HAS_NORMS:
            inverse = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / HEAD + head_epsilon)[:, None]
            norm = k_norm
            if head < Q:
                norm = q_norm
            one *= inverse * tl.load(norm + low, mask=is_column, other=0.0).to(tl.float32)[None, :]
            two *= inverse * tl.load(norm + high, mask=is_column, other=0.0).to(tl.float32)[None, :]
        angles = rows[:, None] * HEAD + low[None, :]
        before = one
        one = before * tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
        one -= two * tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
        two = two * tl.load(cos + HALF + angles, mask=inside, other=0.0).to(tl.float32)
        two += before * tl.load(sin + HALF + angles, mask=inside, other=0.0).to(tl.float32)
    dtype = queries.dtype.element_ty
    if head < Q:
        target = queries + (rows[:, None] * Q + head) * HEAD + low[None, :]
        tl.store(target, one.to(dtype), mask=inside)
        tl.store(target + HALF, two.to(dtype), mask=inside)
    else:
        is_value = (head >= Q + KV).to(tl.int32)
        kv_head = head - Q - is_value * KV
        columns = tl.load(place)  # of a buffer
        buffer = tl.load(pointers + is_value).to(tl.pointer_type(dtype))
        target = (
            buffer + ((rows.to(tl.int64)[:, None] * KV + kv_head) * columns + tl.load(place + 1)) * HEAD + low[None, :]
        )
        inside = inside & (rows < tl.load(place + 2))[:, None]  # the others have no place in the cache
        tl.store(target, one.to(dtype), mask=inside)
        tl.store(target + HALF, two.to(dtype), mask=inside)


@triton.jit
def _attend(
    queries, pointers, first, place, scaling, out, partial, sums, tickets,
    KV: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One split of one row's columns for one group of heads; the last of a group to finish joins the splits.

    With one head a group there is nothing for a tensor core to do: G = 1, and products are sums.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, dims, splits = tl.arange(0, G), tl.arange(0, D), tl.arange(0, S)
    is_head, is_dim = heads < GROUP, dims < HEAD
    inside = is_head[:, None] & is_dim[None, :]
    dtype = queries.dtype.element_ty
    query_places = (row * KV + kv_head) * GROUP * HEAD + heads[:, None] * HEAD + dims[None, :]
    q = tl.load(queries + query_places, mask=inside, other=0.0)  # (G, D)

    is_real = row < tl.load(place + 2)
    start = tl.load(first + row).to(tl.int32)
    end = tl.where(is_real, tl.load(place + 1).to(tl.int32) + 1, start)
    chunk = tl.cdiv(tl.cdiv(end - start, SPLITS), N) * N
    start += split * chunk
    end = tl.minimum(start + chunk, end)

    shift = (row.to(tl.int64) * KV + kv_head) * tl.load(place) * HEAD
    # what is known of an address as a number is forgotten of the pointer: only behind the addition does a hint reach it
    keys = tl.multiple_of(tl.load(pointers).to(tl.pointer_type(dtype)) + shift, 16)
    values = tl.multiple_of(tl.load(pointers + 1).to(tl.pointer_type(dtype)) + shift, 16)
    largest = tl.full([G], float("-inf"), tl.float32)
    weight = tl.zeros([G], tl.float32)
    total = tl.zeros([G, D], tl.float32)
    for begin in range(start, end, N):
        columns = begin + tl.arange(0, N)
        is_column = columns < end
        places = columns[:, None] * HEAD + dims[None, :]
        seen = is_column[:, None] & is_dim[None, :]
        k = tl.load(keys + places, mask=seen, other=0.0)  # (N, D)
        v = tl.load(values + places, mask=seen, other=0.0)
        if G == 1:
            scores = tl.sum(k.to(tl.float32) * q.to(tl.float32), 1)[None, :]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(is_column[None, :], scores * scaling, float("-inf"))  # (G, N)
        larger = tl.maximum(largest, tl.max(scores, 1))
        fade = tl.exp(largest - larger)
        chances = tl.exp(scores - larger[:, None])
        weight = weight * fade + tl.sum(chances, 1)
        if G == 1:
            total = total * fade[:, None] + tl.sum(v.to(tl.float32) * tl.trans(chances), 0)[None, :]
        else:
            total = tl.dot(chances.to(dtype), v, total * fade[:, None], input_precision="ieee")
        largest = larger

    if SPLITS == 1:
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(out + query_places, total.to(dtype), mask=inside)
    else:
        group = row * KV + kv_head
        mine = (group * SPLITS + split) * GROUP
        tl.store(partial + (mine + heads)[:, None] * HEAD + dims[None, :], total, mask=inside)
        tl.store(sums + (mine + heads) * 2, largest, mask=is_head)
        tl.store(sums + (mine + heads) * 2 + 1, weight, mask=is_head)
        tl.debug_barrier()  # all of the program's stores come before its ticket
        if tl.atomic_add(tickets + group, 1) == SPLITS - 1:
            tl.debug_barrier()
            is_split = splits < SPLITS
            for head in tl.static_range(GROUP):
                each = (group * SPLITS + splits) * GROUP + head
                tops = tl.load(sums + each * 2, mask=is_split, other=float("-inf"), cache_modifier=".cg")
                weights = tl.load(sums + each * 2 + 1, mask=is_split, other=0.0, cache_modifier=".cg")
                top = tl.maximum(tl.max(tops, 0), -1e30)  # finite, where there is nothing to see too
                fades = tl.where(weights > 0, tl.exp(tops - top), 0.0)
                parts = tl.load(
                    partial + each[:, None] * HEAD + dims[None, :],
                    mask=is_split[:, None] & is_dim[None, :], other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                whole = tl.sum(weights * fades, 0)
                joined = tl.sum(parts * fades[:, None], 0) / tl.where(whole > 0, whole, 1.0)
                tl.store(out + (group * GROUP + head) * HEAD + dims, joined.to(dtype), mask=is_dim)
            tl.store(tickets + group, 0)  # for the next layer


@triton.jit
def _vector_product(x, weight, out, num_out, size, N: tl.constexpr, K: tl.constexpr):
    """One row: W x, some outputs a program, each read from end to end."""
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
    """Compute x W^T of a few rows: all rows and some outputs a program."""
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


def torch_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T as torch computes it."""
    return functional.linear(x, weight)


def vector_product(x: Tensor, weight: Tensor, outs: int, columns: int, warps: int) -> Tensor:
    """Return x W^T (1, out) of one row, `outs` of them a program, `columns` of W at a time."""
    (num_out, size), out = weight.shape, x.new_empty(1, len(weight))
    _vector_product[(triton.cdiv(num_out, outs),)](x, weight, out, num_out, size, N=outs, K=columns, num_warps=warps)
    return out


def thin_product(x: Tensor, weight: Tensor, outs: int, columns: int, warps: int, stages: int) -> Tensor:
    """Return x W^T (B, out), `outs` of them a program, `columns` of W at a time, `stages` of these on their way."""
    (num_out, size), num_rows = weight.shape, len(x)
    out = x.new_empty(num_rows, num_out)
    rows = min(128, max(16, triton.next_power_of_2(num_rows)))
    grid = (triton.cdiv(num_out, outs), triton.cdiv(num_rows, rows))
    _thin_product[grid](
        x, weight, out, num_rows, num_out, size, M=rows, N=outs, K=columns, STAGES=stages, num_warps=warps
    )
    return out


class TritonKernels:
    """See `treadle.step_parts.Kernels`."""

    def __init__(self) -> None:
        self._tickets: dict[torch.device, Tensor] = {}

    def bucket(self, num_rows: int) -> int:
        """Return a power of two up to 8, a multiple of 8 up to 64, of 32 behind that."""
        if num_rows <= 8:
            return triton.next_power_of_2(num_rows)
        step = 8 if num_rows <= 64 else 32
        return triton.cdiv(num_rows, step) * step

    def binds(self, buffers: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        """Return nothing: where the buffers lie is data."""
        return ()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T (B, out) for x (B, in)."""
        return vector_product(x, weight, 8, 512, 4) if len(x) == 1 else torch_product(x, weight)

    def add(self, x: Tensor, product: Unfinished, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + product (B, H), the same times `weight` (H,), and its sums of squares (B, parts)."""
        y, update, bias, _ = product
        num_rows, size = x.shape
        [factor] = update.factors if update else [None]
        block = _row_block(num_rows) if factor else 1
        columns = 32 if factor else min(1024, triton.next_power_of_2(size))
        parts = triton.cdiv(size, columns)
        total, weighted = torch.empty_like(x), torch.empty_like(x)
        squares = x.new_empty(num_rows, parts, dtype=torch.float32)
        _add[(triton.cdiv(num_rows, block), parts)](
            x, y, y.stride(0), _or(bias, x), weight, total, weighted, squares, num_rows, size,
            *_sources(update, x), *_factor(factor, x)[:2],
            HAS_BIAS=bias is not None, HAS_UPDATE=factor is not None,
            M=block, N=columns, **_ranks(update, block), num_warps=_warps(block, update),
        )  # fmt: skip
        return total, weighted, squares

    def store(
        self,
        product: Unfinished,
        shape: Heads,
        rotation: tuple[Tensor, Tensor],
        head_norms: HeadNorms | None,
        window: Window,
    ) -> Tensor:
        """Write k and v to the cache, return q (B, q, head)."""
        heads, update, bias, norm = product
        num_rows = len(heads)
        queries = heads.new_empty(num_rows, shape.q, shape.size)
        block = _row_block(num_rows) if update else 1 if num_rows <= 8 else 4
        factors = update.factors if update else (None, None, None)
        q_norm, k_norm, epsilon = head_norms or (heads, heads, 0.0)
        half = triton.next_power_of_2(shape.size // 2)
        _store[(triton.cdiv(num_rows, block), shape.q + 2 * shape.kv)](
            heads, heads.stride(0), _or(bias, heads), *_norm(norm), *rotation, q_norm, k_norm, epsilon,
            queries, window.pointers, window.first, window.place, num_rows,
            *_sources(update, heads), *(each for factor in factors for each in _factor(factor, heads)),
            Q=shape.q, KV=shape.kv, HEAD=shape.size,
            HAS_BIAS=bias is not None, HAS_UPDATE=update is not None, HAS_NORMS=head_norms is not None,
            M=block, N=max(16, half), **_ranks(update, block), P=_parts_block(norm),
            num_warps=_warps(block, update) if update else 1,
        )  # fmt: skip
        return queries

    def attend(self, queries: Tensor, num_kv: int, scaling: float, window: Window) -> Tensor:
        """Return what queries (B, q, head) read from the cache: (B, q * head)."""
        num_rows, num_q, size = queries.shape
        group = num_q // num_kv
        splits = max(1, min(MAX_SPLITS, triton.cdiv(PROGRAMS, num_rows * num_kv)))
        out = queries.new_empty(num_rows, num_q * size)
        partial = queries.new_empty(num_rows, num_q, splits, size, dtype=torch.float32)
        sums = queries.new_empty(num_rows, num_q, splits, 2, dtype=torch.float32)
        _attend[(num_rows, num_kv, splits)](
            queries, window.pointers, window.first, window.place, scaling, out, partial, sums,
            self._tickets_of(queries.device, num_rows * num_kv),
            KV=num_kv, GROUP=group, HEAD=size, SPLITS=splits,
            G=1 if group == 1 else max(16, triton.next_power_of_2(group)), D=max(16, triton.next_power_of_2(size)),
            N=32 if group == 1 or queries.dtype == torch.float32 else 64, S=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
        return out

    def activate(self, product: Unfinished, size: int) -> Tensor:
        """Return silu(gate) * up (B, size) of gate and up side by side (B, 2 * size)."""
        gate_up, update, bias, norm = product
        num_rows = len(gate_up)
        out = gate_up.new_empty(num_rows, size)
        block, columns = (_row_block(num_rows), 64) if update else (1, 256)
        factors = update.factors if update else (None, None)
        _activate[(triton.cdiv(num_rows, block), triton.cdiv(size, columns))](
            gate_up, gate_up.stride(0), _or(bias, gate_up), *_norm(norm), out, num_rows, size,
            *_sources(update, gate_up), *(each for factor in factors for each in _factor(factor, gate_up)),
            HAS_BIAS=bias is not None, HAS_UPDATE=update is not None,
            M=block, N=columns, **_ranks(update, block), P=_parts_block(norm),
            num_warps=_warps(block, update),
        )  # fmt: skip
        return out

    def _tickets_of(self, device: torch.device, count: int) -> Tensor:
        """Return zeros (count,) that kernels leave as zeros: made before a capture, whose memory another may use."""
        if device not in self._tickets or len(self._tickets[device]) < count:
            self._tickets[device] = torch.zeros(max(count, 1 << 14), dtype=torch.int32, device=device)
        return self._tickets[device]


def _row_block(num_rows: int) -> int:
    """Return how many rows a program takes whose adapters' factors are read for all of them at once."""
    return 1 if num_rows == 1 else min(64, max(16, triton.next_power_of_2(num_rows)))


def _widest(update: Update | None) -> int:
    """Return the rank of the widest layer."""
    return max((factor.b.shape[1] for factor in update.factors if factor), default=1) if update else 1


def _ranks(update: Update | None, block: int) -> dict[str, int]:
    """Return how many ranks are read at once, 16 at least, and in how many turns."""
    size = update.h.element_size() if update else 1
    most = (ROW_RANK_BYTES if block == 1 else RANK_BYTES) // size
    ranks = min(most, max(16, triton.next_power_of_2(_widest(update))))
    return {"R": ranks, "BLOCKS": triton.cdiv(_widest(update), ranks) if block == 1 else 0, "num_stages": 2}


def _warps(block: int, update: Update | None) -> int:
    return 8 if block >= 64 or (block == 1 and _widest(update) > 64) else 4


def _parts_block(norm: Norm | None) -> int:
    assert norm is not None
    return triton.next_power_of_2(norm.squares.shape[1])


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return the tensor, or another one in its place that the kernel will not read."""
    return other if tensor is None else tensor


def _norm(norm: Norm | None) -> tuple[Tensor, int, int, float]:
    assert norm is not None
    return norm.squares, norm.squares.shape[1], norm.size, norm.epsilon


def _sources(update: Update | None, other: Tensor) -> tuple[Tensor, int, Tensor, int]:
    if update is None:
        return other, 0, other, 0
    return update.h, update.h.stride(0), update.gates, update.gates.stride(0)


def _factor(factor: Factor | None, other: Tensor) -> tuple[Tensor, int, int]:
    """Return b, its rank and where its h begins; no rank where there is none."""
    return (other, 0, 0) if factor is None else (factor.b, factor.b.shape[1], factor.start)
