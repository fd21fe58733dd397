"""The CPU pass for one new token a row, for decoders built like Llama's.

On a small model a step of transformers spends about as much time between its matrix products as in them. This pass
computes the same with fewer and larger operations: q, k and v (and gate, up) are one product, all heads rotate
together, and no module is called. `stacked_linear` holds the products and the adapters' updates.

The pass reads the model's own weights. Other architectures, hooks and quantised layers run through the model's own
`forward`, and `tests/test_fast_step.py` compares the pass with it.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from treadle.common.memory import trim
from treadle.engine.kv_cache import RowLayer
from treadle.engine.runners.cpu.layouts import GemmLayout, fastest_layout
from treadle.engine.runners.cpu.packing import PackedWeights, packs_by_default
from treadle.engine.runners.cpu.stacked_linear import ResultBuffers, StackedLinear, StackedLinearStep, StepGates
from treadle.engine.runners.decoder import DecoderLayer, describe
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.lora.blend import Blend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_STEP_PLANS = 4
"""Numbers of rows whose buffers and views are kept: rows join and leave one by one."""


class StackedLayer(NamedTuple):
    """One decoder layer with its linear layers stacked."""

    norms: DecoderLayer
    """Its norms, and how its attention is scaled."""
    qkv: StackedLinear
    output: StackedLinear
    gate_up: StackedLinear
    down: StackedLinear

    @classmethod
    def of(cls, layer: DecoderLayer, packs: PackedWeights, *, with_factors: bool) -> "StackedLayer":
        """Stack the linear layers; `packs` and `with_factors` as in `StackedLinear`."""
        stack = partial(StackedLinear, packs=packs, with_factors=with_factors)
        return cls(layer, stack(layer.qkv), stack(layer.output), stack(layer.gate_up), stack(layer.down))

    def step(self, buffers: ResultBuffers) -> "LayerStep":
        """Return the layer ready for a number of rows."""
        roles = {"qkv": self.qkv, "output": self.output, "gate up": self.gate_up, "down": self.down}
        return LayerStep(self.norms, *(StackedLinearStep(stack, buffers, role) for role, stack in roles.items()))


class LayerStep(NamedTuple):
    """A layer ready for a number of rows."""

    layer: DecoderLayer
    qkv: StackedLinearStep
    output: StackedLinearStep
    gate_up: StackedLinearStep
    down: StackedLinearStep


class StepPlan(NamedTuple):
    """Everything that a step of a number of rows computes with."""

    layout: GemmLayout
    layers: tuple[LayerStep, ...]
    head: StackedLinearStep


class FastStep:
    """Reads one new token of every row of a batch."""

    def __init__(
        self, model: "PreTrainedModel", blend: Blend, *, pack: bool | None = None, on_amd: bool | None = None
    ) -> None:
        """Stack the weights of a model that fits (`decoder.fits`); their values stay the same.

        Args:
            model: the base.
            blend: of its adapters.
            pack: keep a second copy of the weights, packed by oneDNN; None = where that is faster and small.
            on_amd: the CPU is AMD's, which decides the memory layouts; None asks the system.
        """
        self._model = model
        self._blend = blend
        self._on_amd = on_amd
        size = sum(parameter.nbytes for parameter in model.parameters())
        self.has_packs = packs_by_default(size, model.dtype) if pack is None else pack
        self.packs = PackedWeights()
        self._gather()

    @torch.inference_mode(mode=False)  # weights that move during a step's inference mode could never be written to
    @torch.no_grad()
    def _gather(self) -> None:
        """Stack the layers that the model has now; once more when adapters come or go."""
        with_factors = self._blend.has_all_active
        self._plans: dict[int, StepPlan] = {}
        self._layers: list[StackedLayer] = []  # old stacks would keep moved weights from being freed
        self._decoder = describe(self._model)
        self._head = StackedLinear([self._decoder.head], self.packs, with_factors=with_factors)
        self._layers = [StackedLayer.of(each, self.packs, with_factors=with_factors) for each in self._decoder.layers]
        self._blend.refresh_views()
        self._adapters = self._blend.adapters
        self._active_stacks: object = None
        trim()  # return the memory of moved weights and factors to the system

    def _plan_for(self, num_rows: int) -> StepPlan:
        """Return the plan of a step of `num_rows` rows, for the adapters that are active now."""
        if self.packs.are_stale:  # a base weight was written to
            self.packs = PackedWeights()
            self._gather()
        if self._adapters is not self._blend.adapters:
            self._gather()
        if self._active_stacks is not self._blend.active_stacks:
            self._active_stacks = self._blend.active_stacks
            self._plans.clear()
        if num_rows not in self._plans:
            while len(self._plans) >= MAX_STEP_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[num_rows] = self._new_plan(num_rows)
        return self._plans[num_rows]

    def _new_plan(self, num_rows: int) -> StepPlan:
        dtype = self._head.weight.dtype
        layout = fastest_layout(num_rows, dtype, has_packs=self.has_packs, on_amd=self._on_amd)
        buffers = ResultBuffers(layout)
        layers = tuple(layer.step(buffers) for layer in self._layers)
        return StepPlan(layout, layers, StackedLinearStep(self._head, buffers, "head"))

    def takes(self, given: PassInput) -> bool:
        """Return whether each row has one new token, and all rows combine by `sum`."""
        return given.is_step and given.is_sum

    @torch.inference_mode()
    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens; see `treadle.engine.runners.passes.ForwardPass`."""
        with self._blend.using(given.weights):
            return self._read(given)

    def _read(self, given: PassInput) -> PassOutput:
        ids, mask = given.ids, given.mask()
        layout, layers, head = self._plan_for(len(ids))
        decoder = self._decoder
        gates = StepGates(self._blend.gates, layout)
        x = decoder.embed(ids)[:, 0]  # (B, H)
        cos, sin = decoder.rotate(x, given.positions())  # (B, 1, head)
        half = decoder.head_size // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # rotate_half's sign, moved into the sine
        allowed = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, L)
        hidden: Tensor | None = None
        for index, (block, kept) in enumerate(zip(layers, given.cache.rows(len(layers)), strict=True)):
            hidden = x.clone() if index == given.layer else hidden
            heads = block.qkv(block.layer.first_norm(x), gates)
            x += block.output(self._attend(block.layer, heads, (cos, sin), allowed, kept), gates)
            gate, up = block.gate_up(block.layer.second_norm(x), gates).chunk(2, -1)
            x += block.down(functional.silu(gate, inplace=True).mul_(up), gates)
        x = decoder.last_norm(x)
        hidden = x if given.layer == len(layers) else hidden
        return PassOutput(head(x, gates)[:, None], None if hidden is None else hidden[:, None])

    def _attend(
        self,
        layer: DecoderLayer,
        heads: Tensor,
        rotation: tuple[Tensor, Tensor],
        allowed: Tensor | None,
        kept: RowLayer,
    ) -> Tensor:
        """Return the attention result (B, heads * head) for q, k, v side by side."""
        cos, sin = rotation
        num_q, num_kv, size = self._decoder.num_heads, self._decoder.num_kv_heads, self._decoder.head_size
        heads = heads.contiguous().view(len(heads), -1, size)  # (B, q + k + v, head)
        rotated, values = heads[:, : num_q + num_kv], heads[:, num_q + num_kv :]
        if layer.head_norms:
            q_norm, k_norm = layer.head_norms
            rotated = torch.cat((q_norm(rotated[:, :num_q]), k_norm(rotated[:, num_q:])), 1)
        rotated = torch.addcmul(rotated * cos, rotated.roll(size // 2, -1), sin)
        q, k = rotated[:, :num_q], rotated[:, num_q:]
        keys, values = kept.update(k.unsqueeze(2), values.unsqueeze(2))  # (B, kv, L, head)
        queries = q.unflatten(1, (num_kv, -1))  # (B, kv, q / kv, head): heads that share keys are one head's queries
        read = functional.scaled_dot_product_attention(queries, keys, values, allowed, scale=layer.scaling)
        return read.reshape(len(heads), -1)
