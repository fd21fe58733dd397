"""The rank-stacked factors beside vLLM's linear layers, and the gates that all of them share.

A layer makes one product with A, gates it, and adds one product with B: no matter how many adapters there are. The
gates lie in tensors whose addresses never change, one row a token of the step, so that compiled code and captured CUDA
graphs read new weights without being made again. Nothing here imports vLLM: a layer is described by a `Place`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.common.errors import AdapterError, problem_list
from treadle.lora.adapter import Adapter, LoraPair
from treadle.lora.compatibility import check_range
from treadle.serving.vllm.board import KEPT, GateBoard
from treadle.serving.vllm.mixture import largest_rank, main_scale
from treadle.serving.vllm.products import Into, Product


class Kept(NamedTuple):
    """What a packed layer needs for a step of T tokens: its kernels, and views of where they write and of the gates."""

    shrink: Into
    hidden: Tensor  # (T, R)
    gates: Tensor  # (T, R)
    expand: Into
    made: Tensor  # (T, out)


@dataclass(frozen=True)
class Part:
    """One linear layer of the checkpoint inside a fused one (q of q, k, v), as this process holds it.

    Attributes:
        path: as PEFT's files call it.
        shape: (in, out) in the checkpoint.
        columns: of the input that this process reads; a row-parallel layer's shard.
        rows: of the output that this process makes; a column-parallel layer's shard.
        start: the first of these rows in the fused layer's output.
    """

    path: str
    shape: tuple[int, int]
    columns: slice
    rows: slice
    start: int

    @property
    def size(self) -> int:
        """The number of rows that this process makes."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Place:
    """A linear layer of vLLM's: its parts, and the size of its input and output in this process."""

    parts: tuple[Part, ...]
    size_in: int
    size_out: int


@dataclass(frozen=True)
class Group:
    """What one product with B covers: rows of the stack, columns of the fused layer's output."""

    rows: slice
    columns: slice

    @property
    def size(self) -> int:
        """The number of entries of its B."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


MOST_ZEROS = 256 << 10
"""Bytes of zeros that a product for q, k and v together may read; beyond, one product each is cheaper."""


class Stack(nn.Module):
    """The factors of all adapters beside one linear layer of vLLM's."""

    a: Tensor
    b_t_0: Tensor
    gates: Tensor

    def __init__(self, place: Place, board: GateBoard, ranks: Sequence[Mapping[int, int]]) -> None:
        """Make room, filled with zeros.

        Args:
            place: the layer.
            board: has the gates.
            ranks: of each part: slot -> how many ranks it has room for.
        """
        super().__init__()
        self.place = place
        self._shrink: Product | None = None
        self._expand: list[Product] = []
        self._most = 0  # tokens up to which nothing is made anew
        self._kept: dict[int, Kept] = {}
        self._keep = board.kept
        self._room: dict[tuple[int, int], slice] = {}  # (part, slot) -> rows of the stack
        owners: list[int] = []
        edges = [0]
        for index, each in enumerate(ranks):
            for slot, rank in each.items():
                self._room[index, slot] = slice(len(owners), len(owners) + rank)
                owners += [slot] * rank
            edges.append(len(owners))
        self._spans = [slice(start, end) for start, end in pairwise(edges)]  # rows of each part
        self.register_buffer("gates", board.gates(board.layout(tuple(owners))), persistent=False)  # the board's own
        self.register_buffer("a", self._zeros(board, len(owners), place.size_in), persistent=False)  # (R, in)
        self._groups = self._grouped(board.dtype.itemsize)
        whole = Group(slice(0, len(owners)), slice(0, place.size_out))
        self._is_whole = self._groups == [whole]  # then nothing is cut out of the output
        for index, group in enumerate(self._groups):
            rows, columns = group.rows.stop - group.rows.start, group.columns.stop - group.columns.start
            self.register_buffer(f"b_t_{index}", self._zeros(board, rows, columns), persistent=False)

    @staticmethod
    def _zeros(board: GateBoard, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, device=board.device, dtype=board.dtype)

    def _grouped(self, itemsize: int) -> list["Group"]:
        """Return what gets a product with B of its own: all parts together, unless too many zeros would be read."""
        parts = [
            Group(span, slice(part.start, part.start + part.size))
            for span, part in zip(self._spans, self.place.parts, strict=True)
            if span.stop > span.start
        ]
        if not parts:
            return []
        whole = Group(slice(0, parts[-1].rows.stop), slice(parts[0].columns.start, parts[-1].columns.stop))
        zeros = whole.size - sum(part.size for part in parts)
        return parts if zeros * itemsize > MOST_ZEROS else [whole]

    def has_room(self, part: int) -> bool:
        """Return whether adapters can have factors for a part, by its number."""
        return self._spans[part].stop > self._spans[part].start

    @torch.inference_mode()
    def put(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter's factors into a slot, in place; what was there is gone."""
        main = main_scale(adapter)
        for index, part in enumerate(self.place.parts):
            room = self._room.get((index, slot))
            if room is None:
                continue
            self.a[room].zero_()
            b_t = self._expansion(room, part)  # (room, out)
            b_t.zero_()
            pair = adapter.pairs.get(part.path)
            if pair is not None:
                self.a[room.start : room.start + pair.rank].copy_(pair.a[:, part.columns].float() * (pair.scale / main))
                b_t[: pair.rank].copy_(pair.b[part.rows].float().t())

    def _expansion(self, room: slice, part: Part) -> Tensor:
        """Return the piece of B, transposed, of some rows of the stack and one part: a view."""
        index = next(i for i, group in enumerate(self._groups) if group.rows.start <= room.start < group.rows.stop)
        rows, columns = self._groups[index].rows.start, self._groups[index].columns.start
        b_t = self.get_buffer(f"b_t_{index}")
        return b_t[room.start - rows : room.stop - rows, part.start - columns : part.start - columns + part.size]

    def pack(self, make: Callable[[Tensor], Product]) -> None:
        """Make all products by functions of packed weights from now on; adapters can no longer be put in."""
        self._shrink = make(self.a)
        self._expand = [make(self.get_buffer(f"b_t_{i}").t().contiguous()) for i in range(len(self._groups))]
        if self._is_whole:
            self._most = min(KEPT, self._shrink.most, self._expand[0].most)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (T, out) with the gated update of x (T, in) added in place."""
        if self._most and not torch.compiler.is_compiling() and x.shape[0] <= self._most:
            shrink, hidden, gates, expand, made = self._kept.get(x.shape[0]) or self._keep_for(x.shape[0])
            shrink(hidden, x)
            expand(made, hidden.mul_(gates))
            return y.add_(made)
        if self._shrink is not None:
            h = self._shrink(x).mul_(self.gates[: x.shape[0]])
            if self._is_whole:
                return y.add_(self._expand[0](h))
            for group, expand in zip(self._groups, self._expand, strict=True):
                y[:, group.columns].add_(expand(h[:, group.rows].contiguous()))
            return y
        h = functional.linear(x.to(self.a.dtype), self.a).mul_(self.gates[: x.shape[0]])
        if self._is_whole and y.dtype == h.dtype:
            return y.addmm_(h, self.b_t_0)
        for index, group in enumerate(self._groups):
            rows, b_t = h[:, group.rows], getattr(self, f"b_t_{index}")
            piece = y[:, group.columns]
            piece.addmm_(rows, b_t) if y.dtype == h.dtype else piece.add_(rows @ b_t)
        return y

    def _keep_for(self, num_tokens: int) -> Kept:
        """Return the views for steps of so many tokens: a small step's time is the number of torch's calls."""
        shrink, expand = cast(Product, self._shrink).into, self._expand[0].into
        if shrink is None or expand is None:
            raise RuntimeError("products that only return what they make have nothing to keep")
        hidden, made = (self._keep(num_tokens, size) for size in (self.a.shape[0], self.place.size_out))
        kept = self._kept[num_tokens] = Kept(shrink, hidden, self.gates[:num_tokens], expand, made)
        return kept


class Stacks:
    """All stacks of one model in one process."""

    def __init__(
        self, board: GateBoard, stacks: Mapping[str, Stack], num_layers: int, absent: Sequence[str] = ()
    ) -> None:
        self.board = board
        self.stacks = dict(stacks)
        self.num_layers = num_layers
        self.absent = tuple(absent)  # prefixes of the modules that other pipeline stages hold

    def put(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter into a slot of every layer."""
        for stack in self.stacks.values():
            stack.put(slot, adapter)

    def num_bytes(self) -> int:
        """Return the size of all factors and gates in bytes."""
        modules: list[nn.Module] = [self.board, *self.stacks.values()]
        return sum(buffer.nbytes for module in modules for buffer in module.buffers())


def room_for(place: Place, adapters: Sequence[Adapter]) -> list[dict[int, int]]:
    """Return the ranks of each part's slots where the adapters are fixed: as many as each has there."""
    return [
        {slot: adapter.pairs[part.path].rank for slot, adapter in enumerate(adapters) if part.path in adapter.pairs}
        for part in place.parts
    ]


def equal_room(place: Place, targets: frozenset[str], num_slots: int, rank: int) -> list[dict[int, int]]:
    """Return the ranks of each part's slots where adapters come and go: the same for all, in the targeted modules."""
    each = dict.fromkeys(range(num_slots), rank)
    return [each if part.path.rpartition(".")[2] in targets else {} for part in place.parts]


def largest_room(adapters: Sequence[Adapter]) -> int:
    """Return the largest rank of any adapter."""
    return max(largest_rank(adapter) for adapter in adapters)


def held_here(adapter: Adapter, absent: Sequence[str]) -> dict[str, LoraPair]:
    """Return the factors for the modules that this pipeline stage holds; `absent` are prefixes of those of others."""
    return {
        path: pair for path, pair in adapter.pairs.items() if not path.startswith(tuple(f"{each}." for each in absent))
    }


def check_targets(adapter: Adapter, stacks: Stacks) -> None:
    """Raise an AdapterError where an adapter that joins has factors that find no room here, or may overflow."""
    parts = {
        part.path: part.shape
        for stack in stacks.stacks.values()
        for index, part in enumerate(stack.place.parts)
        if stack.has_room(index)
    }
    here = held_here(adapter, stacks.absent)
    problems = [f"{path}: there is no room for it" for path in here if path not in parts]
    problems += [
        f"{path} is {parts[path]} (in, out), the factors are {(pair.a.shape[1], pair.b.shape[0])}"
        for path, pair in here.items()
        if path in parts and parts[path] != (pair.a.shape[1], pair.b.shape[0])
    ]
    if problems:
        raise AdapterError(problem_list(f"adapter {adapter.name!r} does not fit:", problems))
    check_range([replace(adapter, pairs=here)], stacks.board.dtype)
