"""The CPU pass for a chunk of a long prompt, for decoders built like Llama's.

A prompt that arrives while other rows run is read in chunks. For each chunk transformers copies the keys and values of
the whole text once for every query head, and converts its mask once a layer. On a small model and a long text this
takes half as long as the matrix products. This pass copies neither: heads that share keys become one head with more
queries, and the tokens are the columns of a product instead of its rows.

`tests/test_chunk_step.py` compares it, with its LoRA update, with the model's own forward.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.engine.kv_cache import RowCache, RowLayer
from treadle.engine.runners.cpu.layouts import COLUMN_ROWS, HAS_MKL
from treadle.engine.runners.decoder import Decoder, DecoderLayer, bases, describe, joined_bias
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.lora.blend import Blend
from treadle.lora.layer import BlendedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_CHUNK_TOKENS = 64
"""Longer chunks run through the model's own forward: products dominate there, and the mask would be large."""


class ChunkPass:
    """Reads several tokens of one row behind a cached text. The model must fit (`decoder.fits`) on a CPU."""

    def __init__(self, model: "PreTrainedModel", blend: Blend) -> None:
        self._model = model
        self._blend = blend

    def takes(self, given: PassInput) -> bool:
        """Return whether this is a chunk of one row behind cached tokens, and only its last logits are asked for."""
        is_chunk = given.cache.length > 0 and 1 < given.ids.shape[1] <= MAX_CHUNK_TOKENS
        return is_chunk and len(given.ids) == given.num_logits == 1

    @torch.inference_mode()
    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens; see `treadle.engine.runners.passes.ForwardPass`."""
        with self._blend.using(given.weights, given.combines, given.among):
            return _read(describe(self._model), given.ids, given.cache, given.layer)


def _read(decoder: Decoder, ids: Tensor, cache: RowCache, asked: int | None) -> PassOutput:
    """Return the logits (1, 1, V) after the tokens `ids` (1, T), and the hidden states of layer `asked`."""
    start, new, layers = cache.length, ids.shape[1], decoder.layers
    x = decoder.embed(ids)[0]  # (T, H)
    cos, sin = decoder.rotate(x, torch.arange(start, start + new)[None])  # (1, T, head)
    rotation = cos[0, :, None], sin[0, :, None]  # (T, 1, head)
    mask = torch.full((new, start + new), -torch.inf, dtype=x.dtype).triu(start + 1)  # (T, L), 0 where it may look
    mask = mask.repeat(decoder.num_heads // decoder.num_kv_heads, 1)  # (q / kv * T, L)
    hidden: Tensor | None = None
    for index, (layer, kept) in enumerate(zip(layers, cache.rows(len(layers)), strict=True)):
        hidden = x if index == asked else hidden
        (read,) = _results(layer.output, _attend(layer, layer.first_norm(x), rotation, mask, kept))
        x = x + read
        gate, up = _results(layer.gate_up, layer.second_norm(x))
        (made,) = _results(layer.down, functional.silu(gate) * up)
        x = x + made
    is_last = asked == len(layers)
    normed = decoder.last_norm(x if is_last else x[-1:])
    hidden = normed if is_last else hidden
    return PassOutput(decoder.head(normed[None, -1:]), None if hidden is None else hidden[None])


def _results(layers: tuple[nn.Module, ...], x: Tensor) -> list[Tensor]:
    """Return the results (T, out) of each linear layer, adapters included, for x (T, in)."""
    whole = x[None]  # layers that share A x recognise x by its identity
    if not HAS_MKL or len(x) > max(COLUMN_ROWS.get(x.dtype, (0,))):
        return [layer(whole)[0] for layer in layers]
    return [_column_product(layer, base, whole).t() for layer, base in zip(layers, bases(layers), strict=True)]


def _column_product(layer: nn.Module, base: nn.Linear, x: Tensor) -> Tensor:
    """Return the layer's results (out, T) for x (1, T, in)."""
    y = torch.mm(base.weight, x[0].t())
    bias = joined_bias([base])
    if bias is not None:
        y += bias[:, None]
    h = layer.gated(x) if isinstance(layer, BlendedLinear) else None  # (1, T, R)
    if not isinstance(layer, BlendedLinear) or h is None:
        return y
    return y.addmm_(layer.b_active, h[0].t()) if y.dtype == h.dtype else y.add_(torch.mm(layer.b_active, h[0].t()))


def _attend(layer: DecoderLayer, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, kept: RowLayer) -> Tensor:
    """Return the attention result (T, heads * head) for the layer's normed input x (T, H)."""
    cos, sin = rotation
    new, head = len(x), cos.shape[-1]
    q, k, v = (each.reshape(new, -1, head) for each in _results(layer.qkv, x))  # (T, heads, head)
    if layer.head_norms:
        q, k = layer.head_norms[0](q), layer.head_norms[1](k)
    q, k = (_rotated(each, cos, sin) for each in (q, k))
    keys, values = kept.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None])  # (1, kv, L, head)
    num_kv = keys.shape[1]
    # the queries of the heads that share keys, one head's after the other's: (1, kv, q / kv * T, head)
    queries = q.view(new, num_kv, -1, head).permute(1, 2, 0, 3).reshape(1, num_kv, -1, head)
    read = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=layer.scaling)
    return read.view(num_kv, -1, new, head).permute(2, 0, 1, 3).reshape(new, -1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads (T, heads, head) rotated by cos and sin (T, 1, head)."""
    first, second = heads.chunk(2, -1)
    return torch.addcmul(heads * cos, torch.cat((-second, first), -1), sin)
