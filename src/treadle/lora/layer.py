"""A linear layer of the base with the stacked factors of all adapters beside it.

The LoRA update of a layer is `lora_update`: two matrix products with small gates between them, however many adapters
there are. Only the gates change between steps; they are computed once a step and shared by layers of one layout. Base
weights are never written to. Faster versions of the update are in `treadle.engine.runners` (`cpu.stacked_linear`,
`cpu.chunk`, `cuda.step`) and `treadle.serving.vllm.stacks`; each names the test that compares it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.common.errors import OptionError
from treadle.lora.gates import Gates


def lora_update(a_x: Tensor, gates: Gates, b: Tensor) -> Tensor:
    """Return the update that adapters add to a layer: B (gates of A x).

    Args:
        a_x: A x (B, T, R), A being the stacked A of all adapters.
        gates: weights times scales (B|1, T|1, R), and more for the combines that cross adapters.
        b: (out, R), the stacked B.
    """
    return functional.linear(gates.apply(a_x), b)


class StackedA(nn.Module):
    """The stacked A of layers that read the same input, such as q, k and v.

    Attributes:
        a_all: (sum of R, in) of all adapters, as stored on disk.
        a_active: (sum of active R, in) of the active adapters, in `dtype`; `activate` chooses them.
    """

    a_active: Tensor
    a_all: Tensor

    def __init__(self, factors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Stack the A (R, in) of each layer; call `activate` before a pass."""
        super().__init__()
        self.register_buffer("a_all", torch.cat(list(factors)).to(device), persistent=False)  # (sum of R, in)
        self.dtype = dtype
        self._starts = [0, *accumulate(len(each) for each in factors)]
        self._x: Tensor | None = None
        self._products: list[Tensor | None] = []

    def start_of(self, index: int) -> int:
        """Return the row of `a_all` where the A of layer `index` begin."""
        return self._starts[index]

    def activate(self, rows: Sequence[Tensor] | None) -> None:
        """Activate only these rows of each layer's A; None = all of them."""
        if rows is None:
            chosen, self.sizes = self.a_all, [end - start for start, end in pairwise(self._starts)]
        else:
            index = torch.cat([start + each for start, each in zip(self._starts, rows, strict=False)])
            chosen, self.sizes = self.a_all.index_select(0, index.to(self.a_all.device)), list(map(len, rows))
        self.register_buffer("a_active", chosen.to(self.dtype), persistent=False)  # (sum of active R, in)
        starts = [0, *accumulate(self.sizes)]
        self.rows = [slice(start, end) for start, end in pairwise(starts)]

    def held_in(self, dtype: torch.dtype) -> Tensor | None:
        """Return the active A if they exist in this dtype: as computed with, or as stored if all are active."""
        if dtype == self.dtype:
            return self.a_active
        return self.a_all if dtype == self.a_all.dtype and len(self.a_active) == len(self.a_all) else None

    def share(self, a: Tensor) -> None:
        """Use this tensor, which has the same values, for `a_all`, `a_active` or both, by its dtype."""
        if a.dtype == self.a_all.dtype:
            self.register_buffer("a_all", a, persistent=False)
        if a.dtype == self.dtype:
            self.register_buffer("a_active", a, persistent=False)

    def product(self, x: Tensor, index: int) -> Tensor:
        """Return A x (B, T, R) of layer `index`; layers with the same input object share one product."""
        if len(self.sizes) == 1:
            return functional.linear(x.to(self.dtype), self.a_active)
        if x is not self._x or self._products[index] is None:
            self._x = x
            self._products = list(functional.linear(x.to(self.dtype), self.a_active).split(self.sizes, -1))
        product, self._products[index] = self._products[index], None
        if not any(each is not None for each in self._products):
            self._x = None  # keep no activations between passes
        return cast(Tensor, product)


@dataclass(frozen=True)
class LayerRole:
    """A layer's place in its model, which decides the shape of the tokens it reads.

    Attributes:
        path: the layer's module path.
        is_head: it computes the logits, and may read the last tokens only.
        is_routed: it belongs to an expert, which reads only the tokens sent to it, in any order.
    """

    path: str
    is_head: bool = False
    is_routed: bool = False

    def apply(self, gates: Gates, h: Tensor) -> Tensor:
        """Return the gated `h` (..., R) of a layer whose input is not (B, T, in).

        A model may flatten rows and tokens into one axis (B * T), and the gates follow.

        Raises:
            OptionError: the gates cannot follow.
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
    """A linear layer of the base, and the stacked factors of all adapters that target it.

    Attributes:
        b_all: (out, R) of all adapters, as stored on disk.
        b_active: (out, active R) of the active adapters, in `dtype`; `activate` chooses them.
    """

    b_active: Tensor
    b_all: Tensor

    def __init__(self, base: nn.Module, dtype: torch.dtype, gates: dict[int, Gates], role: LayerRole) -> None:
        super().__init__()
        self.base = base
        self.role = role
        self.gates = gates  # shared with the blend, which changes them between passes
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """The base layer's device; some quantised layers have only buffers."""
        return next(chain(self.base.parameters(), self.base.buffers())).device

    def stack(self, b_all: Tensor, stacked_a: StackedA, index: int, slot: int) -> None:
        """Take the factors of all adapters; call `activate` before a pass.

        Args:
            b_all: (out, R), the stacked B.
            stacked_a: holds the A.
            index: this layer's number in `stacked_a`.
            slot: key of its gates.
        """
        self.register_buffer("b_all", b_all, persistent=False)
        self.stacked_a, self.index, self.slot = stacked_a, index, slot

    @property
    def slots(self) -> tuple[int, ...]:
        """The keys of all its gates."""
        return (self.slot,)

    def activate(self, rows: Sequence[Tensor | None]) -> None:
        """Activate the columns of B for some rows of A, which `stacked_a` activates too; they are listed by slot.

        None = all of them.
        """
        chosen, some = self.b_all, rows[self.slot]
        if some is not None:
            chosen = chosen.t().index_select(0, some.to(self.device)).t().contiguous()
        self.register_buffer("b_active", chosen.to(self.dtype), persistent=False)  # (out, active R)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) + `lora_update`, (B, T, out), for x (B, T, in)."""
        y = self.base(x, *args, **kwargs)
        h = self.gated(x)
        if h is None:
            return y
        if y.dtype != self.dtype or not y.is_contiguous():
            return y.add_(functional.linear(h, self.b_active))
        # the same in place: y is new memory from the base layer
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), self.b_active.t())
        return y

    def gated(self, x: Tensor) -> Tensor | None:
        """Return the gated A x (B, T, R) of x (B, T, in); None if no adapter is active."""
        gates = self.gates.get(self.slot)
        if gates is None:
            return None
        # (B, T, R), or with the model's own shape of tokens
        return self.apply_gates(gates, self.product(x))

    def product(self, x: Tensor) -> Tensor:
        """Return A x (B, T, R) of x (B, T, in)."""
        return self.stacked_a.product(x, self.index)

    def apply_gates(self, gates: Gates, h: Tensor) -> Tensor:
        """Return the gated `h` (B, T, R), or (..., R) where the model has its own shape of tokens."""
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


class VectorLinear(BlendedLinear):
    """A blended layer for which some adapters also hold vectors (`treadle.lora.vectors`).

    It adds up what each adapter changes: y = base(i * x) + s * base(x) + b + the update of x. Here i is 1 plus the
    weighted sum of each adapter's (scale of inputs - 1), s that sum of (scale of outputs - 1), b that of the biases.

    Attributes:
        vectors: by the name of the field: scales less 1 and biases (K, size) of the K adapters that hold vectors here.
        vector_slot: key of the gates with these adapters' weights.
    """

    def stack_vectors(self, vectors: Mapping[str, Tensor], slot: int) -> None:
        """Take the vectors of all adapters; call `activate` before a pass."""
        for name, each in vectors.items():
            self.register_buffer(f"{name}_all", each.to(self.device, self.dtype), persistent=False)
        self.names = tuple(vectors)
        self.vector_slot = slot

    @property
    def slots(self) -> tuple[int, ...]:
        """The keys of all its gates."""
        return self.slot, self.vector_slot

    def activate(self, rows: Sequence[Tensor | None]) -> None:
        """Activate some rows of A and of the vectors, listed by slot; None = all of them."""
        super().activate(rows)
        some = rows[self.vector_slot]
        whole = {name: self.get_buffer(f"{name}_all") for name in self.names}
        self.vectors = {
            name: each if some is None else each.index_select(0, some.to(self.device)) for name, each in whole.items()
        }

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (B, T, out) for x (B, T, in)."""
        gates = self.gates.get(self.vector_slot)
        if gates is None:
            return super().forward(x, *args, **kwargs)
        num_vectors = gates.shape[-1]
        w = self.apply_gates(gates, torch.ones(*x.shape[:-1], num_vectors, device=x.device, dtype=self.dtype))

        def mixed(name: str) -> Tensor | None:
            """Return the weighted sum (B, T, size) of the adapters' vectors."""
            return w @ self.vectors[name] if name in self.vectors else None

        in_scale, out_scale, bias, h = mixed("in_scale"), mixed("out_scale"), mixed("bias"), self.gated(x)
        y = made = self.base(x, *args, **kwargs)
        if in_scale is not None:
            made = self.base((x * (1 + in_scale)).to(x.dtype), *args, **kwargs)
        dtype, made = made.dtype, made.to(self.dtype)
        if out_scale is not None:
            made = made + out_scale * y
        if bias is not None:
            made = made + bias
        return (made if h is None else made + functional.linear(h, self.b_active)).to(dtype)
