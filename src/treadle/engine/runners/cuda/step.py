"""The GPU pass for one new token a row: captured once as a CUDA graph, replayed at every step.

Everything that changes between steps is data: tokens, positions, the first column of each row, the addresses of the
cache's buffers, and the adapters' weights. From the weights the graph computes the gates once for all layers. A graph
is captured again only for another bucket of row numbers, and when adapters come or go. The adapters' A lie below W, so
A x is part of the base's product; the products with B are fused into the stages that follow.

It takes models that fit (`fits`) and the combine `sum`; everything else runs through the model's own `forward`.
`tests/test_graph_step.py` compares the pass, with its LoRA update, with that `forward`.
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
from treadle.engine.runners.cuda.graphs import CudaGraphs, Replay, StepInputs
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
from treadle.engine.runners.decoder import DecoderLayer, RmsNorm, StackedWeights, describe
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.lora.blend import Blend
from treadle.lora.layer import BlendedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED_DTYPES = (torch.bfloat16, torch.float32)
"""The norm's scale is applied after a product, where float16 could already have overflowed."""
LENGTH_ROPE_TYPES = ("dynamic", "longrope")
"""Rotary positions that depend on the longest row, which a graph cannot look at."""
MIN_COMPUTE_CAPABILITY = (8, 0)
"""The oldest GPUs whose tensor cores compute in bfloat16."""


class Gpu(NamedTuple):
    """The abilities of a GPU and its software."""

    has_cuda: bool
    """PyTorch was built for CUDA, rather than ROCm."""
    has_triton: bool
    capability: tuple[int, int]
    """Its compute capability."""

    @classmethod
    def of(cls, device: torch.device) -> "Gpu":
        """Ask PyTorch and the system."""
        return cls(torch.version.cuda is not None, has_triton(), torch.cuda.get_device_capability(device))


def fits(model: "PreTrainedModel", device: str = "cuda", gpu: Gpu | None = None) -> bool:
    """Return whether the pass can run the model: one that `decoder.fits`, on a GPU that can (None asks the model's)."""
    if not decoder.fits(model, device):
        return False
    gpu = gpu or Gpu.of(model.device)
    inner: Any = cast(Any, model).model
    is_aligned = inner.layers[0].self_attn.head_dim % 8 == 0  # the kernels read 16 bytes at once
    is_known = model.dtype in SUPPORTED_DTYPES and inner.rotary_emb.rope_type not in LENGTH_ROPE_TYPES
    return is_aligned and is_known and gpu.has_cuda and gpu.has_triton and gpu.capability >= MIN_COMPUTE_CAPABILITY


def has_triton() -> bool:
    """Return whether Triton is installed and can build its launchers."""
    return find_spec("triton") is not None and can_build_launchers(Path(sysconfig.get_path("include", "posix_prefix")))


def can_build_launchers(include: Path) -> bool:
    """Return whether there is a C compiler, and Python's headers in the folder `include`."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and (include / "Python.h").exists()


class FusedLinear(StackedWeights):
    """Stacked layers of the GPU step, whose products with B are fused into later stages."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__(layers)
        self.layer_bs = tuple(
            LayerB(each.b_active, each.stacked_a.rows[each.index].start) if isinstance(each, BlendedLinear) else None
            for each in layers
        )


class GraphLayer(NamedTuple):
    """One decoder layer with its linear layers fused."""

    qkv: FusedLinear
    head_norms: HeadNorms | None
    scaling: float
    output: FusedLinear
    second_norm: RmsNorm
    gate_up: FusedLinear
    down: FusedLinear
    next_norm: RmsNorm
    """The first norm of the next layer, or the last norm."""


class GraphStep:
    """Reads one new token of every row of a batch."""

    def __init__(
        self,
        model: "PreTrainedModel",
        blend: Blend,
        kernels: Kernels | None = None,
        capture: Callable[[Replay], Replay] | None = None,
    ) -> None:
        """Stack the weights of a model that `fits` with the adapters' A; their values stay the same.

        Args:
            model: the base.
            blend: of its adapters.
            kernels: the stages; None = Triton's.
            capture: makes a run repeatable; None = as a CUDA graph. Tests on a CPU pass one that calls it again.
        """
        self._model = model
        self._blend = blend
        self._kernels = kernels or _triton_kernels()
        self._capture = capture or CudaGraphs()
        self.num_captures = 0  # so far
        self._gather()

    def takes(self, given: PassInput) -> bool:
        """Return whether each row has one new token, and all rows combine by `sum`."""
        return given.is_step and given.is_sum

    @torch.inference_mode()
    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens; see `treadle.engine.runners.passes.ForwardPass`."""
        ids, weights, cache = given.ids[:, 0], given.weights, given.cache
        if self._adapters is not self._blend.adapters:
            self._gather()
        w = None if weights is None else self._blend.check_weights(weights)[:, 0]  # (B, N)
        rows = self._kernels.bucket(len(ids))
        if rows not in self._inputs:
            self._inputs[rows] = StepInputs(rows, len(self._adapters), len(self._layers), self._model.device)
        inputs = self._inputs[rows]
        place = cache.extend(len(self._layers))
        buffers = cache.buffers()
        inputs.set(ids, given.pads, w, place, [buffer.data_ptr() for pair in buffers for buffer in pair])
        key = (rows, w is not None, given.layer, *self._kernels.binds(buffers[0]))
        if key not in self._runs:
            self._runs[key] = self._capture(lambda: self._run(inputs, w is not None, buffers, given.layer))
            self.num_captures += 1
        logits, hidden = self._runs[key]()
        return PassOutput(logits[: len(ids)], None if hidden is None else hidden[: len(ids)])

    def weights(self) -> dict[str, list[Tensor]]:
        """Return the matrices (out, in) of all products of a step by name, with and without A below W."""
        found: dict[str, list[Tensor]] = {}
        for name, groups in self._groups.items():
            found[name] = [group.weight for group in groups]
            if any(group.slots for group in groups):
                found[f"{name} + A"] = [group.whole for group in groups if group.slots]
        return found

    def _gather(self) -> None:
        """Stack the layers that the model has now; once more when adapters come or go."""
        with torch.inference_mode(False), torch.no_grad():
            self._runs: dict[tuple[int | None, ...], Replay] = {}
            self._inputs: dict[int, StepInputs] = {}
            self._decoder = decoder = describe(self._model)
            self._heads = Heads(decoder.num_heads, decoder.num_kv_heads, decoder.head_size)
            norms = [*(layer.first_norm for layer in decoder.layers[1:]), decoder.last_norm]
            self._layers = [_graph_layer(layer, norm) for layer, norm in zip(decoder.layers, norms, strict=True)]
            self._head = FusedLinear([decoder.head])
            self._groups = {
                "qkv": [each.qkv for each in self._layers],
                "o": [each.output for each in self._layers],
                "gate up": [each.gate_up for each in self._layers],
                "down": [each.down for each in self._layers],
                "head": [self._head],
            }
            self._blend.refresh_views()
            self._adapters = self._blend.adapters
            self._gate_matrix, self._gate_columns = self._gates(list(chain(*self._groups.values())))

    def _gates(self, groups: Sequence[FusedLinear]) -> tuple[Tensor | None, dict[tuple[int, ...], slice]]:
        """Return the matrix (N, sum of R) from weights to gates, and its columns for each set of slots."""
        parts: list[Tensor] = []
        columns: dict[tuple[int, ...], slice] = {}
        end = 0
        for slots in {group.slots: None for group in groups if group.slots}:
            parts.append(torch.cat([self._blend.gate_matrix(slot) for slot in slots], 1))
            columns[slots] = slice(end, end := end + parts[-1].shape[1])
        return (torch.cat(parts, 1) if parts else None), columns

    def _run(
        self, inputs: StepInputs, is_blended: bool, buffers: Sequence[tuple[Tensor, Tensor]], asked: int | None
    ) -> PassOutput:
        """Compute a step, and the hidden states of the layer `asked` for; everything here is captured."""
        decoder, kernels = self._decoder, self._kernels
        gates = (
            inputs.weights @ self._gate_matrix if is_blended and self._gate_matrix is not None else None
        )  # (B, sum of R)
        x = decoder.embed(inputs.ids)  # (B, H)
        cos, sin = (each[:, 0].contiguous() for each in decoder.rotate(x, inputs.positions))  # (B, head)
        first = decoder.layers[0].first_norm
        x, weighted, squares = kernels.add(x, PendingProduct(torch.zeros_like(x)), first.weight)
        epsilon = first.epsilon
        hidden: Tensor | None = None
        for index, (layer, pair, pointers) in enumerate(zip(self._layers, buffers, inputs.pointers, strict=True)):
            hidden = x if index == asked else hidden  # stages return new tensors, so x keeps its values
            window = CacheWindow(pair, pointers, inputs.first, inputs.place)
            norm = PendingNorm(squares, x.shape[1], epsilon)
            heads = self._products(layer.qkv, weighted, gates, norm)
            q = kernels.store(heads, self._heads, (cos, sin), layer.head_norms, window)  # (B, q, head)
            read = kernels.attend(q, self._heads.kv, layer.scaling, window)
            product = self._products(layer.output, read, gates)
            x, weighted, squares = kernels.add(x, product, layer.second_norm.weight)
            norm = PendingNorm(squares, x.shape[1], layer.second_norm.epsilon)
            gate_up = self._products(layer.gate_up, weighted, gates, norm)
            active = kernels.activate(gate_up, layer.gate_up.num_out // 2)
            product = self._products(layer.down, active, gates)
            x, weighted, squares = kernels.add(x, product, layer.next_norm.weight)
            epsilon = layer.next_norm.epsilon
        x = functional.rms_norm(x, x.shape[1:], decoder.last_norm.weight, epsilon)
        hidden = x if asked == len(self._layers) else hidden
        return PassOutput(self._logits(x, gates)[:, None], None if hidden is None else hidden[:, None])

    def _products(
        self, linear: FusedLinear, x: Tensor, gates: Tensor | None, norm: PendingNorm | None = None
    ) -> PendingProduct:
        """Return W x (B, sum of out and more), with the update, bias and norm that are pending."""
        if gates is None or not linear.slots:
            return PendingProduct(self._kernels.product(x, linear.weight), None, linear.bias, norm)
        y = self._kernels.product(x, linear.whole)
        update = PendingUpdate(y[:, linear.num_out :], gates[:, self._gate_columns[linear.slots]], linear.layer_bs)
        return PendingProduct(y, update, linear.bias, norm)

    def _logits(self, x: Tensor, gates: Tensor | None) -> Tensor:
        """Return the logits (B, V) of x (B, H). No stage follows the head, so its update is added here."""
        y, update, bias, _ = self._products(self._head, x, gates)
        y = y[:, : self._head.num_out]
        if update is not None:
            [layer_b] = update.layers
            if layer_b is not None:
                y.addmm_((update.h * update.gates).to(y.dtype), layer_b.b.t())
        return y if bias is None else y + bias


def _triton_kernels() -> Kernels:
    from treadle.engine.runners.cuda.triton_launch import TritonKernels

    return TritonKernels()


def _graph_layer(layer: DecoderLayer, next_norm: RmsNorm) -> GraphLayer:
    head_norms = None
    if layer.head_norms:
        q_norm, k_norm = layer.head_norms
        head_norms = HeadNorms(q_norm.weight, k_norm.weight, q_norm.epsilon)
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
