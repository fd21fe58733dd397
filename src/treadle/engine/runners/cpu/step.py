"""The forward pass of one new token a row, for decoders built like Llama's, without a framework's price per operation.

On a small model a step of transformers spends about as long between its products as in them. This pass makes the same
computation with fewer and larger operations: q, k, v (and gate, up) are one product, heads are rotated together, and no
module is called (`stacked_linear` has the products, and what the adapters add to them). It reads the model's own
weights; what it does not know (other architectures, hooks, quantised layers) is left to the model's own `forward`,
which stays the reference that the tests compare it with.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from treadle.common.memory import trim
from treadle.engine.kv_cache import RowLayer
from treadle.engine.runners.cpu.layouts import GemmLayout, fastest_layout
from treadle.engine.runners.cpu.packing import PackedWeights, packs_by_default
from treadle.engine.runners.cpu.stacked_linear import ResultBuffers, StackedLinear, StackedLinearStep, StepGates
from treadle.engine.runners.decoder import DecoderLayer, decoder_layers
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.lora.blend import Blend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_STEP_PLANS = 4
"""For how many numbers of rows a step keeps its buffers and views: rows join and leave one by one."""


class RmsNorm:
    """An RMS norm in half the operations that `functional.rms_norm` is on a CPU, and without rounding in between."""

    def __init__(self, module: Any) -> None:
        self._weight: Tensor = module.weight
        self._epsilon = torch.tensor(module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (..., H) over its root mean square, times the weight."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale * self._weight).to(x.dtype)


class CpuLayer(NamedTuple):
    """One decoder layer, its linear layers as stacks."""

    first_norm: RmsNorm
    qkv: StackedLinear
    head_norms: tuple[RmsNorm, RmsNorm] | None
    scaling: float
    output: StackedLinear
    second_norm: RmsNorm
    gate_up: StackedLinear
    down: StackedLinear

    @classmethod
    def of(cls, layer: DecoderLayer, packs: PackedWeights, *, with_factors: bool) -> "CpuLayer":
        """Collect what a layer computes with; `packs` and `with_factors` as `StackedLinear` takes them."""
        stack = partial(StackedLinear, packs=packs, with_factors=with_factors)
        return cls(
            first_norm=RmsNorm(layer.first_norm),
            qkv=stack(layer.qkv),
            head_norms=layer.head_norms and (RmsNorm(layer.head_norms[0]), RmsNorm(layer.head_norms[1])),
            scaling=layer.scaling,
            output=stack(layer.output),
            second_norm=RmsNorm(layer.second_norm),
            gate_up=stack(layer.gate_up),
            down=stack(layer.down),
        )

    def block(self, buffers: ResultBuffers) -> "LayerStep":
        """Return the layer at work on a number of rows."""
        roles = {"qkv": self.qkv, "output": self.output, "gate up": self.gate_up, "down": self.down}
        return LayerStep(self, *(StackedLinearStep(stack, buffers, role) for role, stack in roles.items()))


class LayerStep(NamedTuple):
    """A layer at work on a number of rows."""

    layer: CpuLayer
    qkv: StackedLinearStep
    output: StackedLinearStep
    gate_up: StackedLinearStep
    down: StackedLinearStep


class StepPlan(NamedTuple):
    """All that a step of a number of rows computes with."""

    layout: GemmLayout
    layers: tuple[LayerStep, ...]
    last_norm: RmsNorm
    head: StackedLinearStep


class FastStep:
    """Reads one new token of every row of a batch."""

    def __init__(self, model: "PreTrainedModel", blend: Blend, *, pack: bool | None = None) -> None:
        """Take a model that `fits`; its stacked weights come to lie in one piece, with the values they have.

        `pack` keeps a second copy of them as oneDNN packs them; None = where that is faster and not large.
        """
        self._model: Any = model
        self._blend = blend
        size = sum(parameter.nbytes for parameter in model.parameters())
        self.has_packs = packs_by_default(size, model.dtype) if pack is None else pack
        self._packs = PackedWeights()
        config = model.config
        self._num_kv: int = config.num_key_value_heads
        self._num_rotated: int = config.num_attention_heads + config.num_key_value_heads
        self._head_dim: int = self._model.model.layers[0].self_attn.head_dim
        self._gather()

    @torch.inference_mode(mode=False)  # nobody could write to weights that moved during a step's inference mode
    @torch.no_grad()
    def _gather(self) -> None:
        """Collect what each layer computes with; once more when adapters come or go."""
        every = self._blend.has_few
        self._plans: dict[int, StepPlan] = {}
        self._layers: list[CpuLayer] = []  # what it held before would keep weights that move from being freed
        self._head = StackedLinear([self._model.lm_head], self._packs, with_factors=every)
        self._last_norm = RmsNorm(self._model.model.norm)
        layers = decoder_layers(self._model)
        self._layers = [CpuLayer.of(layer, self._packs, with_factors=every) for layer in layers]
        self._blend.renew()
        self._adapters = self._blend.adapters
        self._laid_out: object = None
        trim()  # weights and factors that moved have left what the allocator would keep

    def _plan_for(self, num_rows: int) -> StepPlan:
        """Return what a step of so many rows computes with, the adapters as they are laid out now."""
        if self._packs.are_stale:  # somebody has written to the base's weights
            self._packs = PackedWeights()
            self._gather()
        if self._adapters is not self._blend.adapters:
            self._gather()
        if self._laid_out is not self._blend.arrangement:
            self._laid_out = self._blend.arrangement
            self._plans.clear()
        if num_rows not in self._plans:
            while len(self._plans) >= MAX_STEP_PLANS:
                del self._plans[next(iter(self._plans))]
            buffers = ResultBuffers(fastest_layout(num_rows, self._head.weight.dtype, has_packs=self.has_packs))
            layers = tuple(layer.block(buffers) for layer in self._layers)
            self._plans[num_rows] = StepPlan(
                buffers.layout, layers, self._last_norm, StackedLinearStep(self._head, buffers, "head")
            )
        return self._plans[num_rows]

    def takes(self, given: PassInput) -> bool:
        """Whether each row has one new token, and weights that are summed."""
        return given.is_step and given.is_sum

    @torch.inference_mode()
    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens; see `treadle.engine.runners.passes.ForwardPass`."""
        with self._blend.using(given.weights):
            return self._read(given)

    def _read(self, given: PassInput) -> PassOutput:
        ids, mask = given.ids, given.mask()
        layout, layers, last_norm, head = self._plan_for(len(ids))
        inner = self._model.model
        gates = StepGates(self._blend.gates, layout)
        x = inner.embed_tokens(ids)[:, 0]  # (B, H)
        cos, sin = inner.rotary_emb(x, given.positions())  # (B, 1, head)
        half = self._head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # the sign of rotate_half, taken into the sine
        allowed = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, L)
        hidden: Tensor | None = None
        for index, (block, kept) in enumerate(zip(layers, given.cache.rows(len(layers)), strict=True)):
            hidden = x.clone() if index == given.layer else hidden
            heads = block.qkv(block.layer.first_norm(x), gates)
            x += block.output(self._attend(block.layer, heads, (cos, sin), allowed, kept), gates)
            gate, up = block.gate_up(block.layer.second_norm(x), gates).chunk(2, -1)
            x += block.down(functional.silu(gate, inplace=True).mul_(up), gates)
        x = last_norm(x)
        hidden = x if given.layer == len(layers) else hidden
        return PassOutput(head(x, gates)[:, None], None if hidden is None else hidden[:, None])

    def _attend(
        self, layer: CpuLayer, heads: Tensor, rotation: tuple[Tensor, Tensor], allowed: Tensor | None, kept: RowLayer
    ) -> Tensor:
        """Return what the heads read (B, heads * head), given their q, k and v (B, (q + k + v) * head)."""
        cos, sin = rotation
        heads = heads.contiguous().view(len(heads), -1, self._head_dim)  # (B, q + k + v, head)
        turned, values = heads[:, : self._num_rotated], heads[:, self._num_rotated :]
        if layer.head_norms:
            num_q = self._num_rotated - self._num_kv
            q_norm, k_norm = layer.head_norms
            turned = torch.cat((q_norm(turned[:, :num_q]), k_norm(turned[:, num_q:])), 1)
        turned = torch.addcmul(turned * cos, turned.roll(self._head_dim // 2, -1), sin)
        q, k = turned[:, : -self._num_kv], turned[:, -self._num_kv :]
        keys, values = kept.update(k.unsqueeze(2), values.unsqueeze(2))  # (B, kv, L, head)
        queries = q.unflatten(1, (self._num_kv, -1))  # (B, kv, q / kv, head): a group of heads as one's queries
        read = functional.scaled_dot_product_attention(queries, keys, values, allowed, scale=layer.scaling)
        return read.reshape(len(heads), -1)
