"""The forward pass of one new token a row on a GPU: captured once as a CUDA graph, replayed at every step.

What changes between steps is data: tokens, positions, where each row's columns begin, where the cache's buffers lie,
and the weights of the adapters, from which the graph computes the gates once for all layers. A graph is captured anew
only for another number of rows (in buckets), and when adapters come or go. The first products of the adapters, A x, are
rows below W, so that they are part of the base's product; the second ones ride on the stages in between.

It is for models that `fits` and for the combine `sum`; anything else is left to the model's own `forward`.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.engine.runners import decoder
from treadle.engine.runners.cuda.interface import (
    CacheWindow,
    HeadNorms,
    Heads,
    Kernels,
    LayerB,
    PendingNorm,
    PendingProduct,
    PendingUpdate,
)
from treadle.engine.runners.decoder import DecoderLayer, bases, decoder_layers, in_one_piece, joined_bias
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.lora.blend import Blend
from treadle.lora.layer import BlendedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replay = Callable[[], PassOutput]
SUPPORTED_DTYPES = (torch.bfloat16, torch.float32)
"""The norm is multiplied in behind a product: float16 could overflow before it."""
LENGTH_ROPE_TYPES = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on the longest row, which a graph does not look at."""
MIN_COMPUTE_CAPABILITY = (8, 0)
"""Of the oldest GPU whose tensor cores know bfloat16."""


def fits(model: "PreTrainedModel") -> bool:
    """Whether the pass knows the model: what `decoder` knows, on a GPU by NVIDIA for which Triton is there."""
    if not decoder.fits(model, "cuda") or torch.version.cuda is None or not has_triton():
        return False
    inner: Any = cast(Any, model).model
    is_aligned = inner.layers[0].self_attn.head_dim % 8 == 0  # the kernels read 16 bytes at once
    is_known = (
        model.dtype in SUPPORTED_DTYPES and torch.cuda.get_device_capability(model.device) >= MIN_COMPUTE_CAPABILITY
    )
    return is_aligned and is_known and inner.rotary_emb.rope_type not in LENGTH_ROPE_TYPES


def has_triton() -> bool:
    """Whether Triton is there, and what it builds its launcher with: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    return bool(find_spec("triton") and compiler) and header.exists()


class CudaGraphs:
    """Captures what runs on a GPU; the graphs share their memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Replay) -> Replay:
        """Return a function that replays `run` and returns the same tensors each time, with what they now hold."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles kernels and makes workspaces, which a capture cannot
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def replay() -> PassOutput:
            graph.replay()
            return result

        return replay


class FusedLinear:
    """Linear layers that read the same input, and the adapters of all of them: W above A, in one piece."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        plain = bases(layers)
        blended = [layer for layer in layers if isinstance(layer, BlendedLinear)]
        stacked_a = blended[0].stacked_a if blended else None
        self.bias = joined_bias(plain)  # (sum of out,)
        self.num_out = sum(layer.out_features for layer in plain)
        self.whole = in_one_piece([*(layer.weight for layer in plain), *([stacked_a.a_active] if stacked_a else [])])
        if stacked_a:
            stacked_a.share(self.whole[self.num_out :])
        self.slots = tuple(layer.slot for layer in sorted(blended, key=lambda layer: layer.index))
        self.factors = tuple(
            LayerB(layer.b_active, layer.stacked_a.rows[layer.index].start)
            if isinstance(layer, BlendedLinear)
            else None
            for layer in layers
        )

    @property
    def weight(self) -> Tensor:
        """W of all layers, (sum of out, in)."""
        return self.whole[: self.num_out]


class GraphLayer(NamedTuple):
    """What one decoder layer computes with."""

    qkv: FusedLinear
    head_norms: HeadNorms | None
    scaling: float
    output: FusedLinear
    second_norm: Any
    gate_up: FusedLinear
    down: FusedLinear
    next_norm: Any
    """What reads the layer's result: the first norm of the next one, or the last norm."""


class StepInputs:
    """What changes between the steps of a number of rows: on the device, and the memory on the host it is copied from.

    Attributes:
        ids: (B,) tokens.
        positions: (B, 1).
        first: (B,) the first column of each row.
        place: (3,) columns of a buffer, the column to write to, and how many rows are real.
        weights: (B, N) of the adapters.
        pointers: (layers, 2) addresses of the cache's buffers.
    """

    def __init__(self, rows: int, num_adapters: int, num_layers: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        sizes = [rows, rows, rows, 3, 2 * num_layers]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=is_cuda)
        self._host_weights = torch.zeros(rows, num_adapters, pin_memory=is_cuda)
        self._numbers = self._host.to(device)
        self.weights = self._host_weights.to(device)
        self.ids, positions, self.first, self.place, pointers = self._numbers.split(sizes)
        self.positions, self.pointers = positions[:, None], pointers.view(num_layers, 2)
        self._parts = self._host.split(sizes)
        self._copied = torch.cuda.Event() if is_cuda else None

    def set(
        self, ids: Tensor, pads: Sequence[int], weights: Tensor | None, place: tuple[int, int, int], pointers: list[int]
    ) -> None:
        """Copy what a step of `ids` (B,) needs; rows with `pads` columns before them; (columns, column, start)."""
        if self._copied:
            self._copied.synchronize()  # the last step's copies still read the host's memory
        rows, (columns, column, start) = len(ids), place
        left = torch.tensor(pads)  # (B,)
        host_ids, positions, first, where, addresses = self._parts
        host_ids[:rows], positions[:rows], first[:rows] = ids, column - start - left, start + left
        where[0], where[1], where[2] = columns, column, rows
        addresses.copy_(torch.tensor(pointers))
        self._numbers.copy_(self._host, non_blocking=True)
        if weights is not None:
            self._host_weights[:rows] = weights
            self.weights.copy_(self._host_weights, non_blocking=True)
        if self._copied:
            self._copied.record()


class GraphStep:
    """Reads one new token of every row of a batch."""

    def __init__(
        self,
        model: "PreTrainedModel",
        blend: Blend,
        kernels: Kernels | None = None,
        capture: Callable[[Replay], Replay] | None = None,
    ) -> None:
        """Take a model that `fits`; its weights come to lie in one piece with the adapters', with the values they have.

        Args:
            model: the base.
            blend: of its adapters.
            kernels: the stages; None = Triton's.
            capture: makes a run repeatable, None = as a CUDA graph; tests on a CPU give one that just calls it.
        """
        self._model: Any = model
        self._blend = blend
        self._kernels = kernels or _triton_kernels()
        self._capture = capture or CudaGraphs()
        self.num_captures = 0  # so far
        config = model.config
        size: int = self._model.model.layers[0].self_attn.head_dim
        self._heads = Heads(config.num_attention_heads, config.num_key_value_heads, size)
        self._gather()

    def takes(self, given: PassInput) -> bool:
        """Whether each row has one new token, and weights that are summed."""
        return given.is_step and given.is_sum

    @torch.inference_mode()
    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens; see `treadle.engine.runners.passes.ForwardPass`."""
        ids, weights, cache = given.ids[:, 0], given.weights, given.cache
        if self._adapters is not self._blend.adapters:
            self._gather()
        w = None if weights is None else self._blend.checked(weights)[:, 0]  # (B, N)
        rows = self._kernels.bucket(len(ids))
        if rows not in self._inputs:
            device = self._model.device
            self._inputs[rows] = StepInputs(rows, len(self._adapters), len(self._blocks), device)
        inputs = self._inputs[rows]
        place = cache.extend(len(self._blocks))
        buffers = cache.buffers()
        inputs.set(ids, given.pads, w, place, [buffer.data_ptr() for pair in buffers for buffer in pair])
        key = (rows, w is not None, given.layer, *self._kernels.binds(buffers[0]))
        if key not in self._runs:
            self._runs[key] = self._capture(lambda: self._run(inputs, w is not None, buffers, given.layer))
            self.num_captures += 1
        logits, hidden = self._runs[key]()
        return PassOutput(logits[: len(ids)], None if hidden is None else hidden[: len(ids)])

    def weights(self) -> dict[str, list[Tensor]]:
        """Return the matrices (out, in) of the step's products, of all layers, by name; those with A below W too."""
        found: dict[str, list[Tensor]] = {}
        for name, groups in self._groups.items():
            found[name] = [group.weight for group in groups]
            if any(group.slots for group in groups):
                found[f"{name} + A"] = [group.whole for group in groups if group.slots]
        return found

    def _gather(self) -> None:
        """Collect what each layer computes with; once more when adapters come or go."""
        with torch.inference_mode(False), torch.no_grad():
            self._runs: dict[tuple[int | None, ...], Replay] = {}
            self._inputs: dict[int, StepInputs] = {}
            layers = decoder_layers(self._model)
            norms = [*(layer.first_norm for layer in layers[1:]), self._model.model.norm]
            self._blocks = [_graph_layer(layer, norm) for layer, norm in zip(layers, norms, strict=True)]
            self._head = FusedLinear([self._model.lm_head])
            self._groups = {
                "qkv": [block.qkv for block in self._blocks],
                "o": [block.output for block in self._blocks],
                "gate up": [block.gate_up for block in self._blocks],
                "down": [block.down for block in self._blocks],
                "head": [self._head],
            }
            self._blend.renew()
            self._adapters = self._blend.adapters
            self._spread, self._gate_columns = self._gates(list(chain(*self._groups.values())))

    def _gates(self, groups: Sequence[FusedLinear]) -> tuple[Tensor | None, dict[tuple[int, ...], slice]]:
        """Return the matrix (N, sum of R) from weights to the gates of each kind of group, and the columns of each."""
        parts: list[Tensor] = []
        columns: dict[tuple[int, ...], slice] = {}
        end = 0
        for slots in {group.slots: None for group in groups if group.slots}:
            parts.append(torch.cat([self._blend.spread(slot) for slot in slots], 1))
            columns[slots] = slice(end, end := end + parts[-1].shape[1])
        return (torch.cat(parts, 1) if parts else None), columns

    def _run(
        self, inputs: StepInputs, is_blended: bool, buffers: Sequence[tuple[Tensor, Tensor]], asked: int | None
    ) -> PassOutput:
        """Compute a step, with the hidden states of the layer `asked` for: all of it is captured."""
        inner, kernels = self._model.model, self._kernels
        gates = inputs.weights @ self._spread if is_blended and self._spread is not None else None  # (B, sum of R)
        x = inner.embed_tokens(inputs.ids)  # (B, H)
        cos, sin = (each[:, 0].contiguous() for each in inner.rotary_emb(x, inputs.positions))  # (B, head)
        first = inner.layers[0].input_layernorm
        x, weighted, squares = kernels.add(x, PendingProduct(torch.zeros_like(x)), first.weight)
        epsilon = first.variance_epsilon
        hidden: Tensor | None = None
        for index, (block, pair, pointers) in enumerate(zip(self._blocks, buffers, inputs.pointers, strict=True)):
            hidden = x if index == asked else hidden  # stages return new tensors: nobody writes to it
            window = CacheWindow(pair, pointers, inputs.first, inputs.place)
            norm = PendingNorm(squares, x.shape[1], epsilon)
            heads = self._products(block.qkv, weighted, gates, norm)
            q = kernels.store(heads, self._heads, (cos, sin), block.head_norms, window)  # (B, q, head)
            read = kernels.attend(q, self._heads.kv, block.scaling, window)
            product = self._products(block.output, read, gates)
            x, weighted, squares = kernels.add(x, product, block.second_norm.weight)
            norm = PendingNorm(squares, x.shape[1], block.second_norm.variance_epsilon)
            gate_up = self._products(block.gate_up, weighted, gates, norm)
            active = kernels.activate(gate_up, block.gate_up.num_out // 2)
            product = self._products(block.down, active, gates)
            x, weighted, squares = kernels.add(x, product, block.next_norm.weight)
            epsilon = block.next_norm.variance_epsilon
        x = functional.rms_norm(x, x.shape[1:], inner.norm.weight, epsilon)
        hidden = x if asked == len(self._blocks) else hidden
        return PassOutput(self._logits(x, gates)[:, None], None if hidden is None else hidden[:, None])

    def _products(
        self, group: FusedLinear, x: Tensor, gates: Tensor | None, norm: PendingNorm | None = None
    ) -> PendingProduct:
        """Return W x (B, sum of out and more) of a group and what is still to come; `norm` is that of x."""
        if gates is None or not group.slots:
            return PendingProduct(self._kernels.product(x, group.weight), None, group.bias, norm)
        y = self._kernels.product(x, group.whole)
        update = PendingUpdate(y[:, group.num_out :], gates[:, self._gate_columns[group.slots]], group.factors)
        return PendingProduct(y, update, group.bias, norm)

    def _logits(self, x: Tensor, gates: Tensor | None) -> Tensor:
        """Return the logits (B, V) of x (B, H); no stage is behind the head, for its adapters to ride on."""
        y, update, bias, _ = self._products(self._head, x, gates)
        y = y[:, : self._head.num_out]
        if update is not None:
            [factor] = update.factors
            if factor is not None:
                y.addmm_((update.h * update.gates).to(y.dtype), factor.b.t())
        return y if bias is None else y + bias


def _triton_kernels() -> Kernels:
    from treadle.engine.runners.cuda.triton_launch import TritonKernels

    return TritonKernels()


def _graph_layer(layer: DecoderLayer, next_norm: Any) -> GraphLayer:
    head_norms = None
    if layer.head_norms:
        q_norm, k_norm = layer.head_norms
        head_norms = HeadNorms(q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
    return GraphLayer(
        qkv=FusedLinear(layer.qkv),
        head_norms=head_norms,
        scaling=layer.scaling,
        output=FusedLinear(layer.output),
        second_norm=layer.second_norm,
        gate_up=FusedLinear(layer.gate_up),
        down=FusedLinear(layer.down),
        next_norm=next_norm,
    )
