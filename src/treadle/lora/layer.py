"""A linear layer with the stacked factors of all adapters beside it: two matrix products, however many adapters.

A step then needs two matrix products a module; what changes between steps is one small tensor of gates, (B|1, T|1, R),
computed once a step and shared by all modules of the same layout. Base weights are never written to.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.common.errors import OptionError


@dataclass(frozen=True)
class StackLayout:
    """Who owns which rows of a stack: (adapter index, rank, scale) of each adapter that has factors there."""

    parts: tuple[tuple[int, int, float], ...]

    def only(self, adapters: Collection[int]) -> "StackLayout":
        """Return the layout of the stack that holds only some adapters, by index."""
        return StackLayout(tuple(part for part in self.parts if part[0] in adapters))

    def rows(self, adapters: Collection[int]) -> Tensor:
        """Return which rows of this stack belong to some adapters, (R of these,)."""
        ends = accumulate(rank for _, rank, _ in self.parts)
        spans = [
            torch.arange(end - rank, end)
            for (index, rank, _), end in zip(self.parts, ends, strict=True)
            if index in adapters
        ]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def fold(self) -> Tensor | None:
        """Return the (R, r) matrix that adds up the adapters' blocks row by row; None where all have the same rank."""
        ranks = [rank for _, rank, _ in self.parts]
        return None if len(set(ranks)) == 1 else torch.cat([torch.eye(rank, max(ranks)) for rank in ranks])

    def spread(self, num_adapters: int, power: float) -> Tensor:
        """Return the (N, R) matrix that takes weights to gates, each row of the stack times its scale ** power."""
        columns: list[Tensor] = []
        for index, rank, scale in self.parts:
            block = torch.zeros(num_adapters, rank)
            block[index] = scale**power
            columns.append(block)
        return torch.cat(columns, 1)


@dataclass(frozen=True)
class Gates:
    """What stands between the two products of a module: h -> gate * h + cross_out * tile(fold(cross_in * h)).

    Folding adds up the adapters' blocks of r rows and tiling repeats the result for each of them. Each gate is
    (B|1, T|1, R) or None: `gate` alone is the combine `sum`; `cross_in` and `cross_out` are `linear` and `paper`.
    `fold` (R, r) is there where blocks differ in length: those that are folded together never do, but others may lie
    between them.
    """

    gate: Tensor | None
    cross_in: Tensor | None
    cross_out: Tensor | None
    num_blocks: int
    fold: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of each gate, (B|1, T|1, R)."""
        gate = self.cross_in if self.gate is None else self.gate
        assert gate is not None
        num_rows, num_tokens, size = gate.shape
        return num_rows, num_tokens, size

    @property
    def size(self) -> int:
        """How many rows of a stack the gates are for: R."""
        return self.shape[-1]

    def last(self, num_tokens: int) -> "Gates":
        """Return the gates of the last tokens; gates that all tokens share stay as they are."""
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


class StackedA(nn.Module):
    """The first product, A x, of all layers of a block that read the same input (q, k and v, say): made once a pass.

    It holds every adapter's A as stored on disk, and multiplies by those that act (`choose`), in `dtype`.
    """

    a_active: Tensor
    a_all: Tensor

    def __init__(self, factors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Stack the A (R, in) of each layer; `choose` before a pass."""
        super().__init__()
        self.register_buffer("a_all", torch.cat(list(factors)).to(device), persistent=False)  # (sum of R, in)
        self.dtype = dtype
        self._starts = [0, *accumulate(len(each) for each in factors)]
        self._x: Tensor | None = None
        self._products: list[Tensor | None] = []

    def start_of(self, index: int) -> int:
        """Return the row of `a_all` where the stack of the layer `index` begins."""
        return self._starts[index]

    def choose(self, rows: Sequence[Tensor] | None) -> None:
        """Let only these rows of each layer's stack act; None = all of them."""
        if rows is None:
            chosen, self.sizes = self.a_all, [end - start for start, end in pairwise(self._starts)]
        else:
            index = torch.cat([start + each for start, each in zip(self._starts, rows, strict=False)])
            chosen, self.sizes = self.a_all.index_select(0, index.to(self.a_all.device)), list(map(len, rows))
        self.register_buffer("a_active", chosen.to(self.dtype), persistent=False)  # (sum of acting R, in)
        starts = [0, *accumulate(self.sizes)]
        self.rows = [slice(start, end) for start, end in pairwise(starts)]

    def held(self, dtype: torch.dtype) -> Tensor | None:
        """Return the A of the layers that act, in this dtype, if they are held so; as stored on disk if all act."""
        if dtype == self.dtype:
            return self.a_active
        return self.a_all if dtype == self.a_all.dtype and len(self.a_active) == len(self.a_all) else None

    def share(self, a: Tensor) -> None:
        """Hold all A in this tensor, which has the values: those that act, those as stored on disk, or both."""
        if a.dtype == self.a_all.dtype:
            self.register_buffer("a_all", a, persistent=False)
        if a.dtype == self.dtype:
            self.register_buffer("a_active", a, persistent=False)

    def product(self, x: Tensor, index: int) -> Tensor:
        """Return A x (B, T, R) of the layer `index`; an input is known again by being the same object."""
        if len(self.sizes) == 1:
            return functional.linear(x.to(self.dtype), self.a_active)
        if x is not self._x or self._products[index] is None:
            self._x = x
            self._products = list(functional.linear(x.to(self.dtype), self.a_active).split(self.sizes, -1))
        product, self._products[index] = self._products[index], None
        if not any(each is not None for each in self._products):
            self._x = None  # hold no activations between passes
        return cast(Tensor, product)


@dataclass(frozen=True)
class LayerRole:
    """A layer's part in its model, which decides how the tokens that it reads are laid out.

    Attributes:
        path: of the layer.
        is_head: it makes the logits, and may read the last tokens only.
        is_routed: it belongs to an expert, which reads the tokens that are sent to it, in any order.
    """

    path: str
    is_head: bool = False
    is_routed: bool = False

    def apply(self, gates: Gates, h: Tensor) -> Tensor:
        """Return the gated `h` (..., R) of a layer whose input has not the shape (B, T, in).

        A model may flatten rows and tokens into one axis (B * T); the gates follow. An error where they cannot.
        """
        lead = h.shape[:-1]
        if self.is_head:
            gates = gates.last(lead[-1])
        num_rows, num_tokens, size = gates.shape
        if (num_rows, num_tokens) == (1, 1):
            return gates.apply(h.reshape(1, -1, size)).view(h.shape)
        if self.is_head and len(lead) > 1:
            return gates.apply(h)
        row = num_tokens if num_tokens > 1 else lead[0] // num_rows  # tokens of a row
        if self.is_routed or len(lead) > 1 or lead[0] != row * (num_rows if num_rows > 1 else lead[0] // max(row, 1)):
            raise OptionError(
                f"{self.path} reads tokens in the shape {tuple(lead)}; weights of {num_rows} rows and {num_tokens} "
                "tokens cannot follow them there. Give all the same weights, or take adapters without this layer."
            )
        return gates.apply(h.view(-1, row, size)).view(h.shape)


class BlendedLinear(nn.Module):
    """A linear layer of the base model and, beside it, the stacked factors of all adapters that target it."""

    b_active: Tensor
    b_all: Tensor

    def __init__(self, base: nn.Module, dtype: torch.dtype, gates: dict[int, Gates], role: LayerRole) -> None:
        super().__init__()
        self.base = base
        self.role = role
        self.gates = gates  # the blend's own: what it puts there acts on the next forward pass
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the base layer is; some quantised layers have buffers only."""
        return next(chain(self.base.parameters(), self.base.buffers())).device

    def stack(self, every: Tensor, stacked_a: StackedA, index: int, slot: int) -> None:
        """Take the stacked B (out, R) of all adapters; `shrink` holds their A as its layer number `index`.

        Then `choose`; `slot` is the key of the gates.
        """
        self.register_buffer("b_all", every, persistent=False)  # (out, R)
        self.stacked_a, self.index, self.slot = stacked_a, index, slot

    def choose(self, rows: Tensor | None) -> None:
        """Let only the columns of B act that belong to the rows of A that `shrink` chooses too; None = all of them."""
        chosen = self.b_all
        if rows is not None:
            chosen = chosen.t().index_select(0, rows.to(self.device)).t().contiguous()
        self.register_buffer("b_active", chosen.to(self.dtype), persistent=False)  # (out, acting R)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) + the gated update: (B, T, in) -> (B, T, out)."""
        y = self.base(x, *args, **kwargs)
        h = self.gated(x)
        if h is None:
            return y
        if y.dtype != self.dtype or not y.is_contiguous():
            return y.add_(functional.linear(h, self.b_active))
        # in place: y is ours, fresh from the base
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), self.b_active.t())
        return y

    def gated(self, x: Tensor) -> Tensor | None:
        """Return the gated A x (B, T, R) of x (B, T, in), which B takes to the update; None where no adapter acts."""
        gates = self.gates.get(self.slot)
        if gates is None:
            return None
        h = self.stacked_a.product(x, self.index)  # (B, T, R), or as the model shapes its tokens
        num_rows, num_tokens, _ = gates.shape
        if h.dim() == 3 and num_rows in (1, h.shape[0]) and num_tokens in (1, h.shape[1]) and not self.role.is_routed:
            return gates.apply(h)
        return self.role.apply(gates, h)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for model code that reads it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, for model code that reads it."""
        return self.base.bias  # type: ignore[return-value]
