"""The forward pass of one new token a row, for decoders built like Llama's, without a framework's price per operation.

On a small model a step of transformers spends about as long between its products as in them. This pass makes the same
computation with a quarter of the operations: q, k, v (and gate, up) are one product, heads are rotated together, and no
module is called. It reads the model's own weights; what it does not know (other architectures, hooks, quantised layers)
is left to the model's own `forward`, which stays the reference that the tests compare it with.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.blend import Blend
from treadle.cache import RowCache, RowLayer
from treadle.layers import BlendedLinear, Gates, Shrink
from treadle.step_parts import DecoderLayer, bases, decoder_layers, in_one_piece, joined_bias

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HAS_MKL = torch.backends.mkl.is_available()
TRANSPOSED_ROWS = {torch.float32: range(4, 33), torch.bfloat16: range(2, 17)}
"""Numbers of rows for which (W x^T)^T is faster than x W^T with MKL and oneDNN (benchmarks/products.py)."""
VECTOR_DTYPES = (torch.bfloat16,)
"""For one row of these, a matrix times a vector is faster than a product of matrices."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T: x (B, in), W (out, in) -> (B, out) in the form that is fastest; `out` may be the slow axis."""
    if HAS_MKL:
        if len(x) == 1 and x.dtype in VECTOR_DTYPES:
            return torch.mv(weight, x[0])[None]
        if len(x) in TRANSPOSED_ROWS.get(x.dtype, ()):
            return torch.mm(weight, x.t()).t()
    return functional.linear(x, weight)


class StepGates:
    """The gates of one step, side by side for layers that read the same input: one product for all of them."""

    def __init__(self, gates: Mapping[int, Gates]) -> None:
        self.gates = gates
        self._joined: dict[tuple[int, ...], Tensor | None] = {}
        self._acting: dict[tuple[int, ...], bool] = {}

    def act_on(self, slots: tuple[int, ...]) -> bool:
        """Whether an adapter that acts targets a layer with one of these slots."""
        if slots not in self._acting:
            self._acting[slots] = any(slot in self.gates for slot in slots)
        return self._acting[slots]

    def apply(self, h: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Return the gated A x (B, sum of R) of layers with these slots."""
        if slots not in self._joined:
            self._joined[slots] = self._join(slots)
        joined = self._joined[slots]
        if joined is not None:
            return h * joined
        acting = [self.gates[slot] for slot in slots if slot in self.gates]
        if len(set(slots)) == 1:  # alike: the layers are the T axis
            return acting[0].apply(h.unflatten(-1, (len(slots), -1))).flatten(1)
        parts = h[:, None].split([gates.size for gates in acting], -1)
        return torch.cat([gates.apply(part) for gates, part in zip(acting, parts, strict=True)], -1)[:, 0]

    def _join(self, slots: tuple[int, ...]) -> Tensor | None:
        """Return the gates side by side, (B|1, sum of R); None where they are more than a factor."""
        acting = [self.gates[slot] for slot in slots if slot in self.gates]
        direct = [gates.direct[:, 0] for gates in acting if gates.direct is not None and gates.inner is None]
        return torch.cat(direct, -1) if len(direct) == len(acting) else None


class Stack:
    """Linear layers that read the same input, as one product, and what the adapters add to it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        plain = bases(layers)
        sizes = [layer.out_features for layer in plain]
        self.weight = in_one_piece([layer.weight for layer in plain])  # (sum of out, in)
        self.bias = joined_bias(plain)  # (sum of out,)
        ends = accumulate(sizes)
        blended = [
            (layer, slice(end - size, end))
            for layer, size, end in zip(layers, sizes, ends, strict=True)
            if isinstance(layer, BlendedLinear)
        ]
        self.updates = sorted(blended, key=lambda update: update[0].index)  # who adds to which columns of the results
        self.slots = tuple(layer.slot for layer, _ in self.updates)
        self.shrink: Shrink | None = blended[0][0].shrink if blended else None  # of all of them

    def __call__(self, x: Tensor, gates: StepGates) -> Tensor:
        """Return the results (B, sum of out) for x (B, in), side by side."""
        y = product(x, self.weight)
        if self.bias is not None:
            y = y + self.bias
        if self.shrink is not None and gates.act_on(self.slots):
            self._add_updates(y, x.to(self.shrink.dtype), self.shrink, gates)
        return y

    def _add_updates(self, y: Tensor, x: Tensor, shrink: Shrink, gates: StepGates) -> None:
        """Add to y (B, sum of out), in place; one row is read as a vector, which takes fewer and faster operations."""
        if len(x) == 1:
            h, y = gates.apply(torch.mv(shrink.a, x[0])[None], self.slots)[0], y[0]
            for (layer, columns), rows in zip(self.updates, shrink.rows, strict=True):
                if y.dtype == h.dtype:
                    y[columns].addmv_(layer.b, h[rows])
                else:
                    y[columns].add_(torch.mv(layer.b, h[rows]))
            return
        h = gates.apply(product(x, shrink.a), self.slots)  # (B, sum of R)
        for (layer, columns), rows in zip(self.updates, shrink.rows, strict=True):
            part = h[:, rows]
            if y.dtype == part.dtype:
                y[:, columns].addmm_(part, layer.b.t())
            else:  # in the layout of y and in its dtype: another one would be added element by element
                update = torch.mm(layer.b, part.t()).t() if y.stride(0) == 1 else functional.linear(part, layer.b)
                y[:, columns].add_(update.to(y.dtype))


class Block(NamedTuple):
    """What one decoder layer computes with."""

    first_norm: Any
    qkv: Stack
    head_norms: tuple[Any, Any] | None
    scaling: float
    output: Stack
    second_norm: Any
    gate_up: Stack
    down: Stack


class FastStep:
    """Reads one new token of every row of a batch."""

    def __init__(self, model: "PreTrainedModel", blend: Blend) -> None:
        """Take a model that `fits`; its stacked weights come to lie in one piece, with the values they have."""
        self._model: Any = model
        self._blend = blend
        config = model.config
        self._num_kv: int = config.num_key_value_heads
        self._num_rotated: int = config.num_attention_heads + config.num_key_value_heads
        self._head_dim: int = self._model.model.layers[0].self_attn.head_dim
        self._gather()

    def _gather(self) -> None:
        """Collect what each layer computes with; once more when adapters come or go."""
        self._adapters = self._blend.adapters
        self._head = Stack([self._model.lm_head])
        self._blocks = [_block(layer) for layer in decoder_layers(self._model)]

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: RowCache) -> Tensor:
        """Return the logits (B, V) of the tokens `ids` (B, 1) at `positions` (B, 1), and append to the cache.

        `mask` (B, L) is zero where a row has padding, L counting the new token.
        """
        if self._adapters is not self._blend.adapters:
            self._gather()
        inner = self._model.model
        gates = StepGates(self._blend.gates)
        x = inner.embed_tokens(ids)[:, 0]  # (B, H)
        cos, sin = inner.rotary_emb(x, positions)  # (B, 1, head)
        half = self._head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # the sign of rotate_half, taken into the sine
        allowed = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, L)
        for block, layer in zip(self._blocks, cache.rows(len(self._blocks)), strict=True):
            heads = block.qkv(_normed(x, block.first_norm), gates)
            x = x + block.output(self._attend(block, heads, (cos, sin), allowed, layer), gates)
            gate, up = block.gate_up(_normed(x, block.second_norm), gates).chunk(2, -1)
            x = x + block.down(functional.silu(gate) * up, gates)
        return self._head(_normed(x, inner.norm), gates)

    def _attend(
        self, block: Block, heads: Tensor, rotation: tuple[Tensor, Tensor], allowed: Tensor | None, layer: RowLayer
    ) -> Tensor:
        """Return what the heads read (B, heads * head), given their q, k and v (B, (q + k + v) * head)."""
        cos, sin = rotation
        heads = heads.contiguous().view(len(heads), -1, self._head_dim)  # (B, q + k + v, head)
        turned, values = heads[:, : self._num_rotated], heads[:, self._num_rotated :]
        if block.head_norms:
            num_q = self._num_rotated - self._num_kv
            q_norm, k_norm = block.head_norms
            turned = torch.cat((_normed(turned[:, :num_q], q_norm), _normed(turned[:, num_q:], k_norm)), 1)
        turned = torch.addcmul(turned * cos, turned.roll(self._head_dim // 2, -1), sin)
        q, k = turned[:, : -self._num_kv], turned[:, -self._num_kv :]
        keys, values = layer.update(k.unsqueeze(2), values.unsqueeze(2))  # (B, kv, L, head)
        queries = q.unflatten(1, (self._num_kv, -1))  # (B, kv, q / kv, head): a group of heads as one's queries
        read = functional.scaled_dot_product_attention(queries, keys, values, allowed, scale=block.scaling)
        return read.reshape(len(heads), -1)


def _block(layer: DecoderLayer) -> Block:
    return Block(
        first_norm=layer.first_norm,
        qkv=Stack(layer.qkv),
        head_norms=layer.head_norms,
        scaling=layer.scaling,
        output=Stack(layer.output),
        second_norm=layer.second_norm,
        gate_up=Stack(layer.gate_up),
        down=Stack(layer.down),
    )


def _normed(x: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
