"""Linear layers that read one input, as one product, and what the adapters add to it: the arithmetic of `step`.

An operation of a small step costs more than its arithmetic. So the results of all layers lie in the same few buffers,
and every view of them is made once for a number of rows: what the adapters add is one product with A, one
multiplication by the gates, and one product with B for each layer that they target.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from treadle.engine.runners.cpu.layouts import GemmLayout
from treadle.engine.runners.cpu.packing import BaseWeight, PackedWeights, packed_product
from treadle.engine.runners.decoder import bases, in_one_piece, joined_bias
from treadle.lora.layer import BlendedLinear, Gates, StackedA


class StepGates:
    """The gates of one step, whose combine is `sum`: side by side for layers that read the same input."""

    def __init__(self, gates: Mapping[int, Gates], layout: GemmLayout) -> None:
        self._gates = gates
        self._layout = layout
        self._joined: dict[tuple[int, ...], Tensor | None] = {}

    def of(self, slots: tuple[int, ...]) -> Tensor | None:
        """Return what multiplies A x of layers with these slots, as results lie; None where no adapter acts."""
        if slots not in self._joined:
            acting = [self._gates[slot].gate for slot in slots if slot in self._gates]
            given = [each[:, 0] for each in acting if each is not None]  # of each (B|1, R)
            self._joined[slots] = self._layout.gates_to_layout(torch.cat(given, -1)) if given else None
        return self._joined[slots]


class ResultBuffers:
    """Where the results of a step lie: the layers follow one another, and each may overwrite what the last one left."""

    def __init__(self, layout: GemmLayout) -> None:
        self.layout = layout
        self._made: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def take(self, role: str, size: int, dtype: torch.dtype) -> Tensor:
        """Return room for `size` results a row, the same for the same role, size and dtype."""
        key = role, size, dtype
        if key not in self._made:
            self._made[key] = torch.empty(self.layout.shape(size), dtype=dtype)
        return self._made[key]


class StackedLinear:
    """Linear layers that read the same input, their weights in one piece, and the adapters of each."""

    def __init__(self, layers: Sequence[nn.Module], packs: PackedWeights, *, with_factors: bool) -> None:
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
        self.stacked_a: StackedA | None = blended[0][0].stacked_a if blended else None  # of all of them
        factors = self.stacked_a.held(plain[0].weight.dtype) if self.stacked_a and with_factors else None
        below = [] if factors is None else [factors]
        self.whole = in_one_piece([*(layer.weight for layer in plain), *below])  # (sum of out, and R, in)
        self.weight = self.whole[: sum(sizes)]  # (sum of out, in)
        if self.stacked_a and below:
            self.stacked_a.share(self.whole[sum(sizes) :])
        self.bare = BaseWeight(self.weight, packs, plain, has_factors=False)
        self.with_a = BaseWeight(self.whole, packs, plain, has_factors=True) if below else self.bare

    @property
    def is_whole(self) -> bool:
        """Whether the A of the adapters that act lie below the weights."""
        factors = self.stacked_a.held(self.weight.dtype) if self.stacked_a else None
        return factors is not None and factors.data_ptr() == self.whole[len(self.weight) :].data_ptr() != 0


class StackedLinearStep:
    """A stack at work on a number of rows, with the adapters that are laid out now."""

    def __init__(self, stack: StackedLinear, buffers: ResultBuffers, role: str) -> None:
        """Take room that stacks of this role share; what a stack reads must lie elsewhere."""
        self._layout = layout = buffers.layout
        dtype, size = stack.weight.dtype, len(stack.weight)
        rank = len(stack.stacked_a.a_active) if stack.stacked_a else 0
        self._stack = stack
        self._all = buffers.take(role, size + rank * stack.is_whole, dtype)
        self._y = layout.select(self._all, slice(size))
        self._result = layout.to_rows(self._y)  # (B, sum of out)
        self._bias = None if stack.bias is None else layout.to_layout(stack.bias[None])
        self._slots = stack.slots
        self._is_whole = stack.is_whole
        self._updates: list[tuple[Tensor, Tensor, Tensor]] = []  # B, what it multiplies, where the product goes
        if stack.stacked_a is None:
            return
        stacked_a = stack.stacked_a
        self._a = layout.operand(stacked_a.a_active)
        below = slice(size, size + rank)
        # A x: where it is made, and where the gates leave it
        self._source = layout.select(self._all, below) if stack.is_whole else buffers.take("h", rank, stacked_a.dtype)
        is_same = self._source.dtype == stacked_a.dtype
        self._h = self._source if is_same else buffers.take("h", rank, stacked_a.dtype)
        self._sum = self._y
        if dtype != stacked_a.dtype:  # columns that no adapter has stay zero: nobody else has room of this name
            name = f"sum of {[columns for _, columns in stack.updates]}"
            self._sum = buffers.take(name, size, stacked_a.dtype).zero_()
        for (layer, columns), rows in zip(stack.updates, stacked_a.rows, strict=True):
            parts = layout.select(self._h, rows), layout.select(self._sum, columns)
            self._updates.append((layout.operand(layer.b_active), *parts))

    @cached_property
    def _weight(self) -> Tensor:
        return self._layout.base_operand(self._stack.bare)

    @cached_property
    def _whole(self) -> Tensor:
        return self._layout.base_operand(self._stack.with_a)

    def __call__(self, x: Tensor, gates: StepGates) -> Tensor:
        """Return the results (B, sum of out) for x (B, in), side by side; the next stack may overwrite them."""
        layout = self._layout
        laid = layout.to_layout(x)
        joined = gates.of(self._slots) if self._updates else None
        if joined is None and layout.allocates_results:
            made = packed_product(laid, self._weight)
            return made if self._bias is None else made.add_(self._bias)
        if joined is not None and self._is_whole:
            layout.multiply_base(self._whole, laid, self._all)
        else:
            layout.multiply_base(self._weight, laid, self._y)
        if self._bias is not None:
            self._y.add_(self._bias)
        if joined is not None:
            self._update(laid, joined)
        return self._result

    def _update(self, laid: Tensor, gates: Tensor) -> None:
        """Add to the results what the adapters do with the input, which lies as results do."""
        layout = self._layout
        if not self._is_whole:
            layout.multiply(self._a, laid.to(self._h.dtype), self._source)
        torch.mul(self._source, gates, out=self._h)
        if self._sum is self._y:
            for b, h, y in self._updates:
                layout.add_product(y, b, h)
        else:
            for b, h, part in self._updates:
                layout.multiply(b, h, part)
            self._y.add_(self._sum)
