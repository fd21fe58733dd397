"""Linear layers that read one input, as one product, and what the adapters add to it: the arithmetic of `fast_step`.

An operation of a small step costs more than its arithmetic. So the results of all layers lie in the same few buffers,
and every view of them is made once for a number of rows: what the adapters add is one product with A, one
multiplication by the gates, and one product with B for each layer that they target.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from treadle.forms import Form
from treadle.layers import BlendedLinear, Gates, Shrink
from treadle.packs import Packs, Weight, packed_product
from treadle.step_parts import bases, in_one_piece, joined_bias


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

    def __init__(self, layers: Sequence[nn.Module], packs: Packs, *, with_factors: bool) -> None:
        """Lay the weights out; `with_factors` the stacked A below them, where it has their dtype, acting or on disk.

        `packs` keeps what a form packs of the weights.
        """
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
        self.bare = Weight(self.weight, packs, plain, has_factors=False)
        self.with_a = Weight(self.whole, packs, plain, has_factors=True) if below else self.bare

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
        self._stack = stack
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

    @cached_property
    def _weight(self) -> Tensor:
        return self._form.base_matrix(self._stack.bare)

    @cached_property
    def _whole(self) -> Tensor:
        return self._form.base_matrix(self._stack.with_a)

    def __call__(self, x: Tensor, gates: StepGates) -> Tensor:
        """Return the results (B, sum of out) for x (B, in), side by side; the next stack may overwrite them."""
        form = self._form
        laid = form.lay(x)
        joined = gates.of(self._slots) if self._updates else None
        if joined is None and form.makes_anew:
            made = packed_product(laid, self._weight)
            return made if self._bias is None else made.add_(self._bias)
        if joined is not None and self._is_whole:
            form.multiply_base(self._whole, laid, self._all)
        else:
            form.multiply_base(self._weight, laid, self._y)
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
