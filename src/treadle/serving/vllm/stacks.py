"""The rank-stacked factors beside vLLM's linear layers, and the gates that all of them share.

A layer makes one product with A, gates it, and adds one product with B: no matter how many adapters there are. The
gates lie in tensors whose addresses never change, one row a token of the step. So compiled code and captured CUDA
graphs read new weights without being made again. `tests/test_vllm_stacks.py` compares a stack with the plain formula
(`treadle.lora.layer.lora_update`) and with the embedded blend. Nothing here imports vLLM.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.common.errors import AdapterError, problem_list
from treadle.lora.adapter import Adapter
from treadle.lora.compatibility import check_range
from treadle.routing.centroids import Floats
from treadle.serving.vllm.cpu import Product, WriteKernel
from treadle.serving.vllm.mixture import main_scale
from treadle.serving.vllm.shards import LayerShard, ShardPart, factors_here

MAX_KEPT_TOKENS = 64
"""Tokens of a step up to which packed layers keep the memory that they write to."""
MAX_ZERO_BYTES = 256 << 10
"""Bytes of zeros that one product for q, k and v together may read; beyond, one product each is cheaper."""


class GateBoard(nn.Module):
    """The gates of the tokens of a step, (T, R) for each layout of ranks, at addresses that never change."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.device, self.dtype = device, dtype
        self._layouts: dict[tuple[int, ...], int] = {}
        self._kept: dict[int, Tensor] = {}

    def kept(self, num_tokens: int, size: int) -> Tensor:
        """Return memory (T, size) that all layers share: each is done with it when it returns."""
        if size not in self._kept:
            self._kept[size] = torch.empty(MAX_KEPT_TOKENS * size, device=self.device, dtype=self.dtype)
        return self._kept[size][: num_tokens * size].view(num_tokens, size)

    def layout(self, owners: tuple[int, ...]) -> int:
        """Return the number of the layout whose columns belong to these slots, (R,)."""
        if owners not in self._layouts:
            index = self._layouts[owners] = len(self._layouts)
            self.register_buffer(f"owners_{index}", torch.tensor(owners, device=self.device), persistent=False)
            gates = torch.zeros(self.num_tokens, len(owners), device=self.device, dtype=self.dtype)
            self.register_buffer(f"gates_{index}", gates, persistent=False)
        return self._layouts[owners]

    def gates(self, layout: int) -> Tensor:
        """Return the gates (num_tokens, R) of a layout."""
        return self.get_buffer(f"gates_{layout}")

    @torch.inference_mode()
    def fill(self, rows: Floats, counts: Sequence[int]) -> None:
        """Set the gates of a step's tokens, from its runs.

        Args:
            rows: (S, slots), the gates of each run.
            counts: how many tokens each run has.
        """
        total = sum(counts)
        if total > self.num_tokens:
            raise RuntimeError(f"a step of {total} tokens; there are gates for {self.num_tokens}")
        step = torch.from_numpy(np.repeat(rows, counts, 0) if total != len(rows) else rows)  # (T, slots)
        if self.device.type == "cuda":
            step = step.pin_memory()  # a fresh one each step: the copy of the step before may still be running
        step = step.to(self.device, non_blocking=True).to(self.dtype)
        for layout in range(len(self._layouts)):
            chosen = step.index_select(1, self.get_buffer(f"owners_{layout}"))
            self.gates(layout)[:total].copy_(chosen)  # (T, R)


class StepBuffers(NamedTuple):
    """The kernels of a packed layer and their memory, for a step of T tokens."""

    into_hidden: WriteKernel
    hidden: Tensor  # (T, R)
    gates: Tensor  # (T, R)
    into_made: WriteKernel
    made: Tensor  # (T, out)


@dataclass(frozen=True)
class OutputBlock:
    """One product with B: the stack's rows it reads, and the output's columns it adds to."""

    rows: slice
    columns: slice

    @property
    def size(self) -> int:
        """The number of entries of its B."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


class LayerStack(nn.Module):
    """The factors of all adapters beside one linear layer of vLLM."""

    a: Tensor
    b_t_0: Tensor
    gates: Tensor

    def __init__(
        self,
        shard: LayerShard,
        board: GateBoard,
        ranks: Sequence[Mapping[int, int]],
        max_zero_bytes: int = MAX_ZERO_BYTES,
    ) -> None:
        """Make room, filled with zeros.

        Args:
            shard: the layer.
            board: has the gates.
            ranks: for each part: slot -> how many ranks it has room for.
            max_zero_bytes: zeros that one product with B for all parts may read.
        """
        super().__init__()
        self.shard = shard
        self._product_a: Product | None = None
        self._products_b: list[Product] = []
        self._max_kept = 0  # tokens up to which no memory is made anew
        self._buffers_of: dict[int, StepBuffers] = {}
        self._memory = board.kept
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
        self.register_buffer("a", self._zeros(board, len(owners), shard.size_in), persistent=False)  # (R, in)
        self._blocks = self._output_blocks(max_zero_bytes // board.dtype.itemsize)
        whole = OutputBlock(slice(0, len(owners)), slice(0, shard.size_out))
        self._is_whole = self._blocks == [whole]  # then nothing is cut out of the output
        for index, block in enumerate(self._blocks):
            rows, columns = block.rows.stop - block.rows.start, block.columns.stop - block.columns.start
            self.register_buffer(f"b_t_{index}", self._zeros(board, rows, columns), persistent=False)

    @staticmethod
    def _zeros(board: GateBoard, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, device=board.device, dtype=board.dtype)

    def _output_blocks(self, max_zeros: int) -> list[OutputBlock]:
        """Return the products with B: one for all parts, or one each where that one would read too many zeros."""
        parts = [
            OutputBlock(span, slice(part.start, part.start + part.size))
            for span, part in zip(self._spans, self.shard.parts, strict=True)
            if span.stop > span.start
        ]
        if not parts:
            return []
        whole = OutputBlock(slice(0, parts[-1].rows.stop), slice(parts[0].columns.start, parts[-1].columns.stop))
        zeros = whole.size - sum(part.size for part in parts)
        return parts if zeros > max_zeros else [whole]

    def has_room(self, part: int) -> bool:
        """Return whether adapters can have factors for a part, by its number."""
        return self._spans[part].stop > self._spans[part].start

    @torch.inference_mode()
    def put(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter's factors into a slot, in place; what was there is gone."""
        main = main_scale(adapter)
        for index, part in enumerate(self.shard.parts):
            room = self._room.get((index, slot))
            if room is None:
                continue
            self.a[room].zero_()
            b_t = self._b_t_of(room, part)  # (room, out)
            b_t.zero_()
            pair = adapter.pairs.get(part.path)
            if pair is not None:
                self.a[room.start : room.start + pair.rank].copy_(pair.a[:, part.columns].float() * (pair.scale / main))
                b_t[: pair.rank].copy_(pair.b[part.rows].float().t())

    def _b_t_of(self, room: slice, part: ShardPart) -> Tensor:
        """Return the piece of B, transposed, of some rows of the stack and one part: a view."""
        index = next(i for i, block in enumerate(self._blocks) if block.rows.start <= room.start < block.rows.stop)
        rows, columns = self._blocks[index].rows.start, self._blocks[index].columns.start
        b_t = self.get_buffer(f"b_t_{index}")
        return b_t[room.start - rows : room.stop - rows, part.start - columns : part.start - columns + part.size]

    def pack(self, make: Callable[[Tensor], Product]) -> None:
        """Make all products by functions of packed weights from now on; adapters can no longer be put in."""
        self._product_a = make(self.a)
        self._products_b = [make(self.get_buffer(f"b_t_{i}").t().contiguous()) for i in range(len(self._blocks))]
        if self._is_whole:
            self._max_kept = min(MAX_KEPT_TOKENS, self._product_a.max_tokens, self._products_b[0].max_tokens)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (T, out) with the gated update of x (T, in) added in place."""
        if self._max_kept and not torch.compiler.is_compiling() and x.shape[0] <= self._max_kept:
            buffers = self._buffers_of.get(x.shape[0]) or self._keep_buffers(x.shape[0])
            into_hidden, hidden, gates, into_made, made = buffers
            into_hidden(hidden, x)
            into_made(made, hidden.mul_(gates))
            return y.add_(made)
        if self._product_a is not None:
            h = self._product_a(x).mul_(self.gates[: x.shape[0]])
            if self._is_whole:
                return y.add_(self._products_b[0](h))
            for block, product in zip(self._blocks, self._products_b, strict=True):
                y[:, block.columns].add_(product(h[:, block.rows].contiguous()))
            return y
        h = functional.linear(x.to(self.a.dtype), self.a).mul_(self.gates[: x.shape[0]])
        if self._is_whole and y.dtype == h.dtype:
            return y.addmm_(h, self.b_t_0)
        for index, block in enumerate(self._blocks):
            rows, b_t = h[:, block.rows], getattr(self, f"b_t_{index}")
            piece = y[:, block.columns]
            piece.addmm_(rows, b_t) if y.dtype == h.dtype else piece.add_(rows @ b_t)
        return y

    def _keep_buffers(self, num_tokens: int) -> StepBuffers:
        """Return the views for steps of `num_tokens`, because a small step takes as long as its calls of torch."""
        into_hidden, into_made = cast(Product, self._product_a).into, self._products_b[0].into
        if into_hidden is None or into_made is None:
            raise RuntimeError("these products write into no buffer, so there is none to keep")
        hidden, made = (self._memory(num_tokens, size) for size in (self.a.shape[0], self.shard.size_out))
        buffers = StepBuffers(into_hidden, hidden, self.gates[:num_tokens], into_made, made)
        self._buffers_of[num_tokens] = buffers
        return buffers


class ModelStacks:
    """All stacks of one model in one process."""

    def __init__(
        self, board: GateBoard, stacks: Mapping[str, LayerStack], num_layers: int, absent: Sequence[str] = ()
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

    def check_room(self, adapter: Adapter) -> None:
        """Raise an AdapterError where an adapter that joins finds no room here, or may overflow."""
        parts = {
            part.path: part.shape
            for stack in self.stacks.values()
            for index, part in enumerate(stack.shard.parts)
            if stack.has_room(index)
        }
        here = factors_here(adapter, self.absent)
        problems = [f"{path}: there is no room for it" for path in here if path not in parts]
        problems += [
            f"{path} is {parts[path]} (in, out), the factors are {(pair.a.shape[1], pair.b.shape[0])}"
            for path, pair in here.items()
            if path in parts and parts[path] != (pair.a.shape[1], pair.b.shape[0])
        ]
        if problems:
            raise AdapterError(problem_list(f"adapter {adapter.name!r} does not fit:", problems))
        check_range([replace(adapter, pairs=here)], self.board.dtype)
