"""Turns the weights of adapters into gates: the numbers between the two products of a LoRA update.

`GateMaker` is the one place that says what the combines `sum`, `linear` and `paper` mean.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from treadle.common.params import Combine


@dataclass(frozen=True)
class StackLayout:
    """The owners of a stack's rows: (adapter index, rank, scale) of each adapter that has factors there."""

    parts: tuple[tuple[int, int, float], ...]

    def restrict(self, adapters: Collection[int]) -> "StackLayout":
        """Return the layout of a stack with only these adapters, by index."""
        return StackLayout(tuple(part for part in self.parts if part[0] in adapters))

    def rows_of(self, adapters: Collection[int]) -> Tensor:
        """Return the indices of the rows that belong to these adapters."""
        ends = accumulate(rank for _, rank, _ in self.parts)
        spans = [
            torch.arange(end - rank, end)
            for (index, rank, _), end in zip(self.parts, ends, strict=True)
            if index in adapters
        ]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def fold(self) -> Tensor | None:
        """Return the (R, r) matrix that adds up the adapters' blocks row by row; None if all ranks are equal."""
        ranks = [rank for _, rank, _ in self.parts]
        return None if len(set(ranks)) == 1 else torch.cat([torch.eye(rank, max(ranks)) for rank in ranks])

    def gate_matrix(self, num_adapters: int, power: float) -> Tensor:
        """Return the (N, R) matrix from weights to gates, in which each row's scale is raised to `power`."""
        columns: list[Tensor] = []
        for index, rank, scale in self.parts:
            block = torch.zeros(num_adapters, rank)
            block[index] = scale**power
            columns.append(block)
        return torch.cat(columns, 1)


@dataclass(frozen=True)
class Gates:
    """The map between the two products of a layer: h -> gate * h + cross_out * tile(fold(cross_in * h)).

    Folding adds up the adapters' blocks of r rows; tiling repeats the sum for each of them. Each gate is (B|1, T|1, R)
    or None. `gate` alone is the combine `sum`; `cross_in` and `cross_out` are `linear` and `paper`. `fold` (R, r) is
    given if blocks differ in length: blocks that fold together never do, but others may lie between them.
    """

    gate: Tensor | None
    cross_in: Tensor | None = None
    cross_out: Tensor | None = None
    num_blocks: int = 1
    fold: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of each gate, (B|1, T|1, R)."""
        gate = self.cross_in if self.gate is None else self.gate
        assert gate is not None
        num_rows, num_tokens, size = gate.shape
        return num_rows, num_tokens, size

    def last(self, num_tokens: int) -> "Gates":
        """Return the gates of the last tokens; gates that all tokens share stay the same."""
        if self.shape[1] <= num_tokens:
            return self

        def cut(gate: Tensor | None) -> Tensor | None:
            return None if gate is None else gate[:, -num_tokens:]

        return replace(self, gate=cut(self.gate), cross_in=cut(self.cross_in), cross_out=cut(self.cross_out))

    def apply(self, h: Tensor) -> Tensor:
        """Return the gated `h` (B, T, R)."""
        if self.cross_in is None or self.cross_out is None:
            return h if self.gate is None else h * self.gate
        if self.fold is None:
            folded = (h * self.cross_in).unflatten(-1, (self.num_blocks, -1)).sum(-2)  # (B, T, r)
            crossed = self.cross_out * folded.tile(self.num_blocks)  # (B, T, R)
        else:
            crossed = self.cross_out * ((h * self.cross_in) @ self.fold @ self.fold.t())
        return crossed if self.gate is None else torch.addcmul(crossed, h, self.gate)


class GateMaker:
    """Makes the gates of all stacks of one layout.

    `sum` adds the adapters' updates: B_n A_n times weight and scale. `linear` adds up the A and the B, each times the
    root of weight and scale, and multiplies the sums. `paper` multiplies the sum of the weighted A by the sum of all B.
    """

    def __init__(self, layout: StackLayout, num_adapters: int, dtype: torch.dtype) -> None:
        """Make gates in `dtype`."""
        self.layout = layout
        self._num_adapters = num_adapters
        self._dtype = dtype
        self._matrices: dict[tuple[float, torch.device], Tensor] = {}
        self._folds: dict[torch.device, Tensor | None] = {}

    def make(self, w: Tensor, combines: Sequence[Combine], present: Tensor | None) -> Gates:
        """Return the gates for some rows, which may combine in different ways.

        Args:
            w: (B|1, T|1, N) weights.
            combines: one, or one a row.
            present: (B|1, 1, N) 1 for each adapter that a row knows; only `paper` needs it.
        """
        kinds, dtype, device = set(combines), self._dtype, w.device

        def rows(name: Combine) -> Tensor | float:
            if len(kinds) == 1:
                return 1.0
            return torch.tensor([float(kind == name) for kind in combines], device=device).view(-1, 1, 1)

        scaled = w @ self.matrix(1.0, device) if kinds & {"sum", "paper"} else None  # (B|1, T|1, R)
        if scaled is not None and kinds == {"sum"}:
            return Gates(scaled.to(dtype))
        gate = (scaled * rows("sum")).to(dtype) if scaled is not None and "sum" in kinds else None
        cross_in: Tensor | float = 0.0
        cross_out: Tensor | float = 0.0
        if "linear" in kinds:
            root = w.sqrt() @ self.matrix(0.5, device)
            cross_in, cross_out = root * rows("linear"), root * rows("linear")
        if present is not None and scaled is not None:
            cross_in = cross_in + scaled * rows("paper")
            cross_out = cross_out + present @ self.matrix(0.0, device) * rows("paper")
        crosses = torch.as_tensor(cross_in).to(dtype), torch.as_tensor(cross_out).to(dtype)
        return Gates(gate, *crosses, len(self.layout.parts), self._fold(device))

    def matrix(self, power: float, device: torch.device) -> Tensor:
        """Return the (N, R) matrix from weights to gates, in which scales are raised to `power`."""
        key = power, device
        if key not in self._matrices:
            self._matrices[key] = self.layout.gate_matrix(self._num_adapters, power).to(device)
        return self._matrices[key]

    def _fold(self, device: torch.device) -> Tensor | None:
        if device not in self._folds:
            fold = self.layout.fold()
            self._folds[device] = None if fold is None else fold.to(device, self._dtype)
        return self._folds[device]
