# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# Triton has no types, is absent on a CPU, and what `jit` decorates is not Python.
"""The Triton kernels that `treadle.engine.runners.cuda.triton_launch` launches.

M, N and R are the rows, outputs and ranks in a program's tile; masks such as `is_row` and `is_out` mark those that
exist. Functions without `kernel` in their name are compiled into the kernels. `tests/test_kernels.py` compares the
kernels, with their LoRA update, with plain torch.
"""

import triton
import triton.language as tl

UNSPECIALIZED_ARGUMENTS = ["num_rows", "parts"]
"""Arguments whose values do not trigger another compilation."""


@triton.jit
def _update_tile(
    h, h_stride, gates, gates_stride, b, rank, first, rows, is_row, outs, is_out, M: tl.constexpr, R: tl.constexpr
):
    """Return gates * h (M, R) and B (N, R) for the ranks from `first` on."""
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
    """Return the update B (gates * h), (M, N), for a tile of rows and outputs.

    For one row the tiles of ranks are unrolled, so that all of B is loaded at once.
    """
    total = tl.zeros([M, N], tl.float32)
    if M == 1:
        for block in tl.static_range(BLOCKS):
            gated, factor = _update_tile(
                h, h_stride, gates, gates_stride, b, rank, block * R, rows, is_row, outs, is_out, M, R
            )
            total += tl.sum(factor.to(tl.float32) * gated, 1)[None, :]
    else:
        for first in range(0, rank, R):
            gated, factor = _update_tile(
                h, h_stride, gates, gates_stride, b, rank, first, rows, is_row, outs, is_out, M, R
            )
            total = tl.dot(gated.to(factor.dtype), tl.trans(factor), total, input_precision="ieee")
    return total


@triton.jit
def _scale(squares, parts, size, epsilon, rows, is_row, P: tl.constexpr):
    """Return 1 / rms (M,) of rows, from partial sums of their squares."""
    columns = tl.arange(0, P)
    inside = is_row[:, None] & (columns < parts)[None, :]
    total = tl.sum(tl.load(squares + rows[:, None] * parts + columns[None, :], mask=inside, other=0.0), 1)
    return tl.rsqrt(total / size + epsilon)


@triton.jit(do_not_specialize=UNSPECIALIZED_ARGUMENTS)
def add_kernel(
    x, y, y_stride, bias, weight, total_out, weighted_out, squares, num_rows, size,
    h, h_stride, gates, gates_stride, b, rank,
    HAS_BIAS: tl.constexpr, HAS_UPDATE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add product, update and bias to x, for a tile of rows and columns; sum the squares."""
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


@triton.jit(do_not_specialize=UNSPECIALIZED_ARGUMENTS)
def activate_kernel(
    y, y_stride, bias, squares, parts, norm_size, epsilon, out, num_rows, size,
    h, h_stride, gates, gates_stride, gate_b, gate_rank, gate_start, up_b, up_rank, up_start,
    HAS_BIAS: tl.constexpr, HAS_UPDATE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute silu(gate) * up for a tile of rows and columns."""
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


@triton.jit
def _updated_halves(
    h, h_stride, gates, gates_stride, b, rank, start, rows, is_row, outs, low, high, is_column,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the updates (M, N) of the two halves of a head whose outputs begin at `outs`."""
    one = _updated(
        h + start, h_stride, gates + start, gates_stride, b, rank,
        rows, is_row, outs + low, is_column, M, N, R, BLOCKS,
    )  # fmt: skip
    two = _updated(
        h + start, h_stride, gates + start, gates_stride, b, rank,
        rows, is_row, outs + high, is_column, M, N, R, BLOCKS,
    )  # fmt: skip
    return one, two


@triton.jit
def _rotated(one, two, cos, sin, angles, inside, HALF: tl.constexpr):
    """Return the halves of a head, rotated by the angles of their rows' positions."""
    rotated = one * tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
    rotated -= two * tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
    two = two * tl.load(cos + HALF + angles, mask=inside, other=0.0).to(tl.float32)
    two += one * tl.load(sin + HALF + angles, mask=inside, other=0.0).to(tl.float32)
    return rotated, two


@triton.jit
def _write_head(
    one, two, head, queries, pointers, place, rows, low, inside, Q: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr
):
    """Write the halves of a head: queries to `queries`, keys and values to the cache."""
    dtype = queries.dtype.element_ty
    if head < Q:
        target = queries + (rows[:, None] * Q + head) * HEAD + low[None, :]
        tl.store(target, one.to(dtype), mask=inside)
        tl.store(target + HEAD // 2, two.to(dtype), mask=inside)
    else:
        is_value = (head >= Q + KV).to(tl.int32)
        kv_head = head - Q - is_value * KV
        columns = tl.load(place)  # of a buffer
        buffer = tl.load(pointers + is_value).to(tl.pointer_type(dtype))
        target = (
            buffer + ((rows.to(tl.int64)[:, None] * KV + kv_head) * columns + tl.load(place + 1)) * HEAD + low[None, :]
        )
        inside = inside & (rows < tl.load(place + 2))[:, None]  # padding rows have no place in the cache
        tl.store(target, one.to(dtype), mask=inside)
        tl.store(target + HEAD // 2, two.to(dtype), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED_ARGUMENTS)
def store_kernel(
    y, y_stride, bias, squares, parts, norm_size, epsilon, cos, sin, q_norm, k_norm, head_epsilon,
    queries, pointers, first, place, num_rows,
    h, h_stride, gates, gates_stride, q_b, q_rank, q_start, k_b, k_rank, k_start, v_b, v_rank, v_start,
    Q: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_NORMS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Finish one head for a tile of rows; rotate queries and keys by halves."""
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
            more, also = _updated_halves(
                h, h_stride, gates, gates_stride, q_b, q_rank, q_start,
                rows, is_row, head * HEAD, low, high, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
        elif head < Q + KV:
            more, also = _updated_halves(
                h, h_stride, gates, gates_stride, k_b, k_rank, k_start,
                rows, is_row, (head - Q) * HEAD, low, high, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
        else:
            more, also = _updated_halves(
                h, h_stride, gates, gates_stride, v_b, v_rank, v_start,
                rows, is_row, (head - Q - KV) * HEAD, low, high, is_column, M, N, R, BLOCKS,
            )  # fmt: skip
        one += more
        two += also
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
        one, two = _rotated(one, two, cos, sin, rows[:, None] * HEAD + low[None, :], inside, HALF)
    _write_head(one, two, head, queries, pointers, place, rows, low, inside, Q, KV, HEAD)


@triton.jit
def _read(
    q, keys, values, start, end, scaling, dims, is_dim,
    HEAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attend with q (G, D): return the largest score (G,), sum of weights (G,), sum of values (G, D).

    For one head a group (G = 1) products are plain sums, because tensor cores need more rows.
    """
    dtype = q.dtype
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
    return largest, weight, total


@triton.jit
def _join(
    partial, sums, out, group, dims, is_dim,
    GROUP: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Join the splits in `partial` and `sums`, and write the result of each head of a group."""
    dtype = out.dtype.element_ty
    splits = tl.arange(0, S)
    is_split = splits < SPLITS
    for head in tl.static_range(GROUP):
        each = (group * SPLITS + splits) * GROUP + head
        tops = tl.load(sums + each * 2, mask=is_split, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(sums + each * 2 + 1, mask=is_split, other=0.0, cache_modifier=".cg")
        top = tl.maximum(tl.max(tops, 0), -1e30)  # finite even if no column is visible
        fades = tl.where(weights > 0, tl.exp(tops - top), 0.0)
        parts = tl.load(
            partial + each[:, None] * HEAD + dims[None, :],
            mask=is_split[:, None] & is_dim[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        whole = tl.sum(weights * fades, 0)
        joined = tl.sum(parts * fades[:, None], 0) / tl.where(whole > 0, whole, 1.0)
        tl.store(out + (group * GROUP + head) * HEAD + dims, joined.to(dtype), mask=is_dim)


@triton.jit
def attend_kernel(
    queries, pointers, first, place, scaling, out, partial, sums, tickets,
    KV: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Attend to one split of a row's columns; the last program of a head group joins the splits."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, dims = tl.arange(0, G), tl.arange(0, D)
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
    # a hint on the number is lost in the cast to a pointer: give it after the addition
    keys = tl.multiple_of(tl.load(pointers).to(tl.pointer_type(dtype)) + shift, 16)
    values = tl.multiple_of(tl.load(pointers + 1).to(tl.pointer_type(dtype)) + shift, 16)
    largest, weight, total = _read(q, keys, values, start, end, scaling, dims, is_dim, HEAD, G, D, N)
    if SPLITS == 1:
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(out + query_places, total.to(dtype), mask=inside)
    else:
        group = row * KV + kv_head
        mine = (group * SPLITS + split) * GROUP
        tl.store(partial + (mine + heads)[:, None] * HEAD + dims[None, :], total, mask=inside)
        tl.store(sums + (mine + heads) * 2, largest, mask=is_head)
        tl.store(sums + (mine + heads) * 2 + 1, weight, mask=is_head)
        tl.debug_barrier()  # the program's stores come before its ticket
        if tl.atomic_add(tickets + group, 1) == SPLITS - 1:
            tl.debug_barrier()
            _join(partial, sums, out, group, dims, is_dim, GROUP, HEAD, SPLITS, S)
            tl.store(tickets + group, 0)  # for the next layer
