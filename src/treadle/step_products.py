"""Linear layers that read one input, as one product, and what the adapters add to it: the arithmetic of `fast_step`.

An operation of a small step costs more than its arithmetic. So the results of all layers lie in the same few buffers,
and every view of them is made once for a number of rows: what the adapters add is one product with A, one
multiplication by the gates, and one product with B for each layer that they target.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from treadle.layers import BlendedLinear, Gates, Shrink
from treadle.step_parts import bases, in_one_piece, joined_bias

CPU_FILE = Path("/proc/cpuinfo")
HAS_MKL = torch.backends.mkl.is_available()
COLUMN_ROWS = {torch.float32: range(4, 33), torch.bfloat16: range(2, 17)}
"""Numbers of rows for which W x^T is faster than x W^T with MKL and oneDNN (benchmarks/products.py)."""
AMD_COLUMN_ROWS = {torch.float32: range(2, 33), torch.bfloat16: range(8, 33)}
"""The same on AMD's CPUs, where MKL multiplies a matrix by one vector, or x W^T of a few rows, with one thread."""


class Form:
    """How the results of a step lie: a row for each row of the batch, (B, n), made as x W^T."""

    block_axis = -2

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of `size` results a row."""
        return self.num_rows, size

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the view of W (out, in) that `multiply` takes."""
        return weight.t()

    def lay(self, rows: Tensor) -> Tensor:
        """Return the view of (B|1, n) that lies as results do."""
        return rows

    def lay_gates(self, gates: Tensor) -> Tensor:
        """Return gates (B|1, n) as what multiplies results."""
        return self.lay(gates).contiguous()

    def rows(self, laid: Tensor) -> Tensor:
        """Return the view (B, n) of what lies as results do."""
        return laid

    def part(self, laid: Tensor, columns: slice) -> Tensor:
        """Return the view of some of n."""
        return laid[:, columns]

    def blocks(self, laid: Tensor, num_layers: int, num_blocks: int) -> Tensor:
        """Return the view of n as (layers, blocks, rank), blocks being `block_axis`."""
        return laid.unflatten(-1, (num_layers, num_blocks, -1))

    def multiply(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """Put W x into `out`."""
        torch.mm(x, matrix, out=out)

    def add_product(self, y: Tensor, matrix: Tensor, x: Tensor) -> None:
        """Add W x to y."""
        y.addmm_(x, matrix)


class Columns(Form):
    """A column for each row of the batch, (n, B), made as W x^T."""

    block_axis = 1

    def shape(self, size: int) -> tuple[int, ...]:
        """(n, B)."""
        return size, self.num_rows

    def matrix(self, weight: Tensor) -> Tensor:
        """W itself."""
        return weight

    def lay(self, rows: Tensor) -> Tensor:
        """(B|1, n) as (n, B|1)."""
        return rows.t()

    def rows(self, laid: Tensor) -> Tensor:
        """(n, B) as (B, n)."""
        return laid.t()

    def part(self, laid: Tensor, columns: slice) -> Tensor:
        """Rows of (n, B)."""
        return laid[columns]

    def blocks(self, laid: Tensor, num_layers: int, num_blocks: int) -> Tensor:
        """(layers, blocks, rank, B)."""
        return laid.unflatten(0, (num_layers, num_blocks, -1))

    def multiply(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """W x^T."""
        torch.mm(matrix, x, out=out)

    def add_product(self, y: Tensor, matrix: Tensor, x: Tensor) -> None:
        """Y + W x^T."""
        y.addmm_(matrix, x)


class Vector(Columns):
    """One row as a vector, (n,)."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n,)."""
        return (size,)

    def lay(self, rows: Tensor) -> Tensor:
        """(1, n) as (n,)."""
        return rows[0]

    def rows(self, laid: Tensor) -> Tensor:
        """(n,) as (1, n)."""
        return laid[None]

    def multiply(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """W x."""
        torch.mv(matrix, x, out=out)

    def add_product(self, y: Tensor, matrix: Tensor, x: Tensor) -> None:
        """Y + W x."""
        y.addmv_(matrix, x)


class Twice(Columns):
    """One row as two equal columns, (n, 2): a product that MKL makes with all threads."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n, 2)."""
        return size, 2

    def lay(self, rows: Tensor) -> Tensor:
        """(1, n) as (n, 2), a copy."""
        return rows.expand(2, -1).contiguous().t()

    def lay_gates(self, gates: Tensor) -> Tensor:
        """(1, n) as (n, 1), for both columns."""
        return gates.t()

    def rows(self, laid: Tensor) -> Tensor:
        """(n, 2) as (1, n), the first column."""
        return laid[:, :1].t()


def fastest_form(num_rows: int, dtype: torch.dtype) -> Form:
    """Return the form of a step of so many rows; on one machine always the same, because forms round differently."""
    on_amd = HAS_MKL and is_amd()
    if num_rows == 1 and not on_amd:
        return Vector(1)
    if num_rows == 1 and dtype == torch.float32:
        return Twice(1)
    many = (AMD_COLUMN_ROWS if on_amd else COLUMN_ROWS).get(dtype, ()) if HAS_MKL else ()
    return Columns(num_rows) if num_rows in many else Form(num_rows)


@cache
def is_amd() -> bool:
    """Return whether the system says that this is a CPU of AMD's."""
    return CPU_FILE.exists() and "AuthenticAMD" in CPU_FILE.read_text("utf-8")


class StepGates:
    """The gates of one step, side by side for layers that read the same input."""

    def __init__(self, gates: Mapping[int, Gates], form: Form) -> None:
        self._gates = gates
        self._form = form
        self._joined: dict[tuple[int, ...], Joined | None] = {}

    def of(self, slots: tuple[int, ...]) -> "Joined | None":
        """Return the gates of layers with these slots; None where no adapter acts on them."""
        if slots not in self._joined:
            acting = [self._gates[slot] for slot in slots if slot in self._gates]
            self._joined[slots] = Joined(acting, self._form, are_alike=len(set(slots)) == 1) if acting else None
        return self._joined[slots]


class Joined:
    """What multiplies A x of layers that read the same input, in place; see `treadle.layers.Gates`."""

    def __init__(self, gates: Sequence[Gates], form: Form, *, are_alike: bool) -> None:
        self._gates = gates
        self._form = form
        self._direct = self._side_by_side([each.direct for each in gates])
        self._alone = self._direct if all(each.inner is None for each in gates) else None
        inner = self._side_by_side([each.inner for each in gates])
        outer = self._side_by_side([each.outer for each in gates])
        self._shape = len(gates), gates[0].num_blocks
        self._crossed = None
        if inner is not None and outer is not None and are_alike and gates[0].fold is None:
            self._crossed = inner, form.blocks(outer, *self._shape)

    def apply(self, shrunk: "Shrunk") -> None:
        """Multiply `shrunk.source` into `shrunk.h`."""
        h = shrunk.h
        if self._alone is not None:
            torch.mul(shrunk.source, self._alone, out=h)
            return
        if shrunk.source is not h:
            h.copy_(shrunk.source)
        if self._crossed is not None:
            self._cross(shrunk, *self._crossed)
        else:  # blocks of different lengths, or layers that differ
            parts = self._form.rows(h)[:, None].split([gates.size for gates in self._gates], -1)
            mixed = [gates.apply(part) for gates, part in zip(self._gates, parts, strict=True)]
            h.copy_(self._form.lay(torch.cat(mixed, -1)[:, 0]))

    def _cross(self, shrunk: "Shrunk", inner: Tensor, outer: Tensor) -> None:
        blocks, spare_blocks = shrunk.blocks(self._shape)
        torch.mul(shrunk.h, inner, out=shrunk.spare)
        folded = spare_blocks.sum(self._form.block_axis, keepdim=True)
        if self._direct is None:
            torch.mul(outer, folded, out=blocks)
        else:
            shrunk.h.mul_(self._direct)
            blocks.addcmul_(outer, folded)

    def _side_by_side(self, gates: Sequence[Tensor | None]) -> Tensor | None:
        """Return gates (B|1, 1, R) of the layers as one, as results lie; None where one has none."""
        given = [each[:, 0] for each in gates if each is not None]
        return self._form.lay_gates(torch.cat(given, -1)) if len(given) == len(gates) else None


class Shrunk:
    """A x of layers that read the same input: where it is made, `source`, where gates leave it, `h`; `spare` room."""

    def __init__(self, form: Form, source: Tensor, h: Tensor, spare: Tensor) -> None:
        self._form = form
        self.source, self.h, self.spare = source, h, spare
        self._blocks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def blocks(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return views of both as so many layers and blocks."""
        if shape not in self._blocks:
            self._blocks[shape] = self._form.blocks(self.h, *shape), self._form.blocks(self.spare, *shape)
        return self._blocks[shape]


class Buffers:
    """Where the results of a step lie: the layers follow one another, and each may overwrite what the last one left."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._made: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def take(self, role: str, size: int, dtype: torch.dtype) -> Tensor:
        """Return room for `size` results a row, the same for the same role, size and dtype."""
        key = role, size, dtype
        if key not in self._made:
            self._made[key] = torch.empty(self.form.shape(size), dtype=dtype)
        return self._made[key]


class Stack:
    """Linear layers that read the same input, their weights in one piece, and the adapters of each."""

    def __init__(self, layers: Sequence[nn.Module], *, with_factors: bool) -> None:
        """Lay the weights out; `with_factors` the stacked A below them, where it has their dtype, acting or on disk."""
        plain = bases(layers)
        sizes = [layer.out_features for layer in plain]
        self.bias = joined_bias(plain)  # (sum of out,)
        ends = accumulate(sizes)
        blended = [
            (layer, slice(end - size, end))
            for layer, size, end in zip(layers, sizes, ends, strict=True)
            if isinstance(layer, BlendedLinear)
        ]
        self.updates = sorted(blended, key=lambda update: update[0].index)  # who adds to which columns of the results
        self.slots = tuple(layer.slot for layer, _ in self.updates)
        self.shrink: Shrink | None = blended[0][0].shrink if blended else None  # of all of them
        factors = self.shrink.held(plain[0].weight.dtype) if self.shrink and with_factors else None
        below = [] if factors is None else [factors]
        self.whole = in_one_piece([*(layer.weight for layer in plain), *below])  # (sum of out, and R, in)
        self.weight = self.whole[: sum(sizes)]  # (sum of out, in)
        if self.shrink and below:
            self.shrink.share(self.whole[sum(sizes) :])

    @property
    def is_whole(self) -> bool:
        """Whether the A of the adapters that act lie below the weights."""
        factors = self.shrink.held(self.weight.dtype) if self.shrink else None
        return factors is not None and factors.data_ptr() == self.whole[len(self.weight) :].data_ptr() != 0


class StackStep:
    """A stack at work on a number of rows, with the adapters that are laid out now."""

    def __init__(self, stack: Stack, buffers: Buffers, role: str) -> None:
        """Take room that stacks of this role share; what a stack reads must lie elsewhere."""
        self._form = form = buffers.form
        dtype, size = stack.weight.dtype, len(stack.weight)
        rank = len(stack.shrink.a) if stack.shrink else 0
        self._weight, self._whole = form.matrix(stack.weight), form.matrix(stack.whole)
        self._all = buffers.take(role, size + rank * stack.is_whole, dtype)
        self._y = form.part(self._all, slice(size))
        self._result = form.rows(self._y)  # (B, sum of out)
        self._bias = None if stack.bias is None else form.lay(stack.bias[None])
        self._slots = stack.slots
        self._is_whole = stack.is_whole
        self._updates: list[tuple[Tensor, Tensor, Tensor]] = []  # B, what it multiplies, where the product goes
        if stack.shrink is None:
            return
        shrink = stack.shrink
        self._a = form.matrix(shrink.a)
        below = slice(size, size + rank)
        source = form.part(self._all, below) if stack.is_whole else buffers.take("h", rank, shrink.dtype)
        h = source if source.dtype == shrink.dtype else buffers.take("h", rank, shrink.dtype)
        self._shrunk = Shrunk(form, source, h, buffers.take("spare", rank, shrink.dtype))
        self._sum = self._y
        if dtype != shrink.dtype:  # columns that no adapter has stay zero: nobody else has room of this name
            name = f"sum of {[columns for _, columns in stack.updates]}"
            self._sum = buffers.take(name, size, shrink.dtype).zero_()
        for (layer, columns), rows in zip(stack.updates, shrink.rows, strict=True):
            parts = form.part(h, rows), form.part(self._sum, columns)
            self._updates.append((form.matrix(layer.b), *parts))

    def __call__(self, x: Tensor, gates: StepGates) -> Tensor:
        """Return the results (B, sum of out) for x (B, in), side by side; the next stack may overwrite them."""
        form = self._form
        laid = form.lay(x)
        joined = gates.of(self._slots) if self._updates else None
        if joined is not None and self._is_whole:
            form.multiply(self._whole, laid, self._all)
        else:
            form.multiply(self._weight, laid, self._y)
        if self._bias is not None:
            self._y.add_(self._bias)
        if joined is not None:
            self._update(laid, joined)
        return self._result

    def _update(self, laid: Tensor, gates: Joined) -> None:
        """Add to the results what the adapters do with the input, which lies as results do."""
        form = self._form
        if not self._is_whole:
            form.multiply(self._a, laid.to(self._shrunk.h.dtype), self._shrunk.h)
        gates.apply(self._shrunk)
        if self._sum is self._y:
            for b, h, y in self._updates:
                form.add_product(y, b, h)
        else:
            for b, h, part in self._updates:
                form.multiply(b, h, part)
            self._y.add_(self._sum)
