"""The stages of a decode step in plain torch: the reference of `treadle.engine.runners.cuda.triton_launch`."""

import torch
from torch import Tensor
from torch.nn import functional

from treadle.engine.runners.cuda.interface import CacheWindow, HeadNorms, Heads, LayerB, PendingProduct, PendingUpdate
from treadle.lora.gates import Gates
from treadle.lora.layer import lora_update


class PlainKernels:
    """See `treadle.engine.runners.cuda.interface.Kernels`."""

    def bucket(self, num_rows: int) -> int:
        """Return the number itself: padding rows would have no place in the cache."""
        return num_rows

    def binds(self, buffers: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        """Return the buffers' address and shape."""
        return buffers[0].data_ptr(), *buffers[0].shape

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T (B, out) for x (B, in)."""
        return functional.linear(x, weight)

    def add(self, x: Tensor, product: PendingProduct, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + product (B, H), the same times `weight` (H,), and its sums of squares (B, 1)."""
        total = (x.float() + finished(product, [x.shape[1]])).to(x.dtype)
        return total, total * weight, total.float().square().sum(-1, keepdim=True)

    def store(
        self,
        product: PendingProduct,
        shape: Heads,
        rotation: tuple[Tensor, Tensor],
        head_norms: HeadNorms | None,
        window: CacheWindow,
    ) -> Tensor:
        """Write k and v to the cache, return q (B, q, head)."""
        sizes = [shape.q * shape.size, shape.kv * shape.size, shape.kv * shape.size]
        heads = finished(product, sizes).unflatten(1, (-1, shape.size))  # (B, q + k + v, head)
        q, k, v = heads.split([shape.q, shape.kv, shape.kv], 1)
        if head_norms:
            q = functional.rms_norm(q, (shape.size,), head_norms.q.float(), head_norms.epsilon)
            k = functional.rms_norm(k, (shape.size,), head_norms.k.float(), head_norms.epsilon)
        cos, sin = (each.float()[:, None] for each in rotation)  # (B, 1, head)
        q, k = (each * cos + _half_turned(each) * sin for each in (q, k))
        rows = torch.arange(len(heads), device=heads.device)[:, None]
        places = (rows, torch.arange(shape.kv, device=heads.device), window.place[1])
        for buffer, states in zip(window.buffers, (k, v), strict=True):
            buffer.index_put_(places, states.to(buffer.dtype))
        return q.to(product.y.dtype)

    def attend(self, queries: Tensor, num_kv: int, scaling: float, window: CacheWindow) -> Tensor:
        """Return the attention result (B, q * head) of queries (B, q, head) over the cache."""
        rows = len(queries)
        columns = torch.arange(window.buffers[0].shape[2], device=queries.device)
        seen = (columns >= window.first[:, None]) & (columns <= window.place[1])  # (B, columns)
        keys, values = (
            buffer[:rows].masked_fill(~seen[:, None, :, None], 0)  # a masked NaN would be NaN in the sum
            for buffer in window.buffers
        )
        grouped = queries.unflatten(1, (num_kv, -1))  # (B, kv, q / kv, head)
        mask = seen[:, None, None]
        return functional.scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling).reshape(rows, -1)

    def activate(self, product: PendingProduct, size: int) -> Tensor:
        """Return silu(gate) * up (B, size) of gate and up side by side (B, 2 * size)."""
        gate, up = finished(product, [size, size]).chunk(2, -1)
        return (functional.silu(gate) * up).to(product.y.dtype)


def finished(product: PendingProduct, sizes: list[int]) -> Tensor:
    """Return (y + update) / rms + bias (B, sum of sizes) of layers with these `sizes`, in float32."""
    y, update, bias, norm = product
    total = y[:, : sum(sizes)].float()
    if update is not None:
        parts = [_layer_update(update, each, size) for each, size in zip(update.layers, sizes, strict=True)]
        total = total + torch.cat(parts, 1)
    if norm is not None:
        total = total * torch.rsqrt(norm.squares.sum(-1, keepdim=True) / norm.size + norm.epsilon)
    return total if bias is None else total + bias


def _layer_update(update: PendingUpdate, layer: LayerB | None, size: int) -> Tensor:
    """Return one layer's update (B, size) by the plain formula, gates and products in float32."""
    h = update.h.float()
    if layer is None:
        return h.new_zeros((len(h), size))
    columns = slice(layer.start, layer.start + layer.b.shape[1])
    return lora_update(h[:, columns], Gates(update.gates[:, columns]), layer.b.float())


def _half_turned(x: Tensor) -> Tensor:
    """Return (-second half, first half) of each head."""
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)
