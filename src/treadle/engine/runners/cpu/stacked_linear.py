"""Linear layers that read the same input as one product, and the adapters' update: the arithmetic of the CPU step.

A small operation costs more than its arithmetic. So all layers write their results to the same few buffers, and the
views of these buffers are made once for a number of rows. An update is one product with A, one multiplication by the
gates, and one product with B for each targeted layer. `tests/test_fast_step.py` compares it with the model's own
forward, whose layers compute the plain formula (`treadle.lora.layer.lora_update`).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from treadle.engine.runners.cpu.layouts import GemmLayout
from treadle.engine.runners.cpu.packing import BaseWeight, PackedWeights, packed_product
from treadle.engine.runners.decoder import StackedWeights
from treadle.lora.gates import Gates


class StepGates:
    """The gates of one step with the combine `sum`, side by side for layers that read the same input."""

    def __init__(self, gates: Mapping[int, Gates], layout: GemmLayout) -> None:
        self._gates = gates
        self._layout = layout
        self._joined: dict[tuple[int, ...], Tensor | None] = {}

    def join(self, slots: tuple[int, ...]) -> Tensor | None:
        """Return the gates of layers with these slots, in the step's layout; None if no adapter is active there."""
        if slots not in self._joined:
            gates = [self._gates[slot].gate for slot in slots if slot in self._gates]
            given = [each[:, 0] for each in gates if each is not None]  # of each (B|1, R)
            self._joined[slots] = self._layout.gates_to_layout(torch.cat(given, -1)) if given else None
        return self._joined[slots]


class ResultBuffers:
    """The buffers for a step's results. Layers run one after another, and each may overwrite the last one's."""

    def __init__(self, layout: GemmLayout) -> None:
        self.layout = layout
        self._made: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def take(self, role: str, size: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer for `size` results a row; equal role, size and dtype give the same one."""
        key = role, size, dtype
        if key not in self._made:
            self._made[key] = torch.empty(self.layout.shape(size), dtype=dtype)
        return self._made[key]


class StackedLinear(StackedWeights):
    """Stacked layers of the CPU step, whose weights may be packed."""

    def __init__(self, layers: Sequence[nn.Module], packs: PackedWeights, *, with_factors: bool) -> None:
        """Stack the weights; `packs` keeps their packed copies, `with_factors` puts A below them."""
        super().__init__(layers, with_factors=with_factors)
        self.bare = BaseWeight(self.weight, packs, self.plain, has_factors=False)
        self.with_a = BaseWeight(self.whole, packs, self.plain, has_factors=True) if self.has_factors else self.bare

    @property
    def is_whole(self) -> bool:
        """True if the active A lies below the weights."""
        factors = self.stacked_a.held_in(self.weight.dtype) if self.stacked_a else None
        return factors is not None and factors.data_ptr() == self.whole[self.num_out :].data_ptr() != 0


class StackedLinearStep:
    """A stack ready for a number of rows, with the adapters that are active now."""

    def __init__(self, stack: StackedLinear, buffers: ResultBuffers, role: str) -> None:
        """Take buffers that stacks of this role share; a stack's input must lie elsewhere."""
        self._layout = layout = buffers.layout
        dtype, size = stack.weight.dtype, stack.num_out
        rank = len(stack.stacked_a.a_active) if stack.stacked_a else 0
        self._stack = stack
        self._all = buffers.take(role, size + rank * stack.is_whole, dtype)
        self._y = layout.select(self._all, slice(size))
        self._result = layout.to_rows(self._y)  # (B, sum of out)
        self._bias = None if stack.bias is None else layout.to_layout(stack.bias[None])
        self._slots = stack.slots
        self._is_whole = stack.is_whole
        self._updates: list[tuple[Tensor, Tensor, Tensor]] = []  # B, its input, the columns it adds to
        if stack.stacked_a is None:
            return
        stacked_a = stack.stacked_a
        self._a = layout.operand(stacked_a.a_active)
        below = slice(size, size + rank)
        # A x, before and after the gates
        self._source = layout.select(self._all, below) if stack.is_whole else buffers.take("h", rank, stacked_a.dtype)
        is_same = self._source.dtype == stacked_a.dtype
        self._h = self._source if is_same else buffers.take("h", rank, stacked_a.dtype)
        self._sum = self._y
        if dtype != stacked_a.dtype:  # columns without adapters stay zero: the name is unique to these updates
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
        """Return the results (B, sum of out) of x (B, in), side by side; the next stack may overwrite them."""
        layout = self._layout
        inputs = layout.to_layout(x)
        joined = gates.join(self._slots) if self._updates else None
        if joined is None and layout.allocates_results:
            made = packed_product(inputs, self._weight)
            return made if self._bias is None else made.add_(self._bias)
        if joined is not None and self._is_whole:
            layout.multiply_base(self._whole, inputs, self._all)
        else:
            layout.multiply_base(self._weight, inputs, self._y)
        if self._bias is not None:
            self._y.add_(self._bias)
        if joined is not None:
            self._update(inputs, joined)
        return self._result

    def _update(self, inputs: Tensor, gates: Tensor) -> None:
        """Add the adapters' update to the results; `inputs` is x in the step's layout."""
        layout = self._layout
        if not self._is_whole:
            layout.multiply(self._a, inputs.to(self._h.dtype), self._source)
        torch.mul(self._source, gates, out=self._h)
        if self._sum is self._y:
            for b, h, y in self._updates:
                layout.add_product(y, b, h)
        else:
            for b, h, part in self._updates:
                layout.multiply(b, h, part)
            self._y.add_(self._sum)
