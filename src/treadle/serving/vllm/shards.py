"""Says which part of the checkpoint's layers one process of vLLM holds, and what the adapters add there.

vLLM fuses layers (q, k and v in one) and shards them over processes. A `LayerShard` describes one such layer.
`plain_update` applies the plain formula to it, `treadle.lora.layer.lora_update`; `attach` compares every kind of layer
with it at the start. Nothing here imports vLLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treadle.common.errors import ModelError
from treadle.lora.adapter import Adapter, LoraPair
from treadle.lora.gates import Gates
from treadle.lora.layer import lora_update


@dataclass(frozen=True)
class ShardPart:
    """One linear layer of the checkpoint inside a fused one (q of q, k, v), as this process holds it.

    Attributes:
        path: its name in PEFT's files.
        shape: (in, out) in the checkpoint.
        columns: the inputs that this process reads; a row-parallel layer is cut along them.
        rows: the outputs that this process makes; a column-parallel layer is cut along them.
        start: where these rows begin in the fused layer's output.
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
class LayerShard:
    """A linear layer of vLLM: its parts, and the size of its input and output in this process."""

    parts: tuple[ShardPart, ...]
    size_in: int
    size_out: int


def find_shards(model: nn.Module, linear: type) -> dict[str, tuple[Any, LayerShard]]:
    """Return vLLM's linear layers by name, each with what it holds of the checkpoint's layers."""
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", None) or {}
    return {
        name: (module, shard_of(name, module, packed))
        for name, module in model.named_modules()
        if isinstance(module, linear)
    }


def shard_of(name: str, layer: Any, packed: Mapping[str, Sequence[str]]) -> LayerShard:
    """Describe which parts of the checkpoint's layers a linear layer of vLLM holds.

    Args:
        name: the layer's name in vLLM's model.
        layer: the layer.
        packed: fused child -> the checkpoint's children inside it.
    """
    parent, _, child = name.rpartition(".")
    children = packed.get(child, [child])
    paths = [f"{parent}.{each}" if parent else each for each in children]
    is_row = hasattr(layer, "input_size_per_partition") and layer.input_size_per_partition != layer.input_size
    sizes = [int(size) for size in layer.output_partition_sizes]
    size_in = int(getattr(layer, "input_size_per_partition", layer.input_size))
    if len(sizes) != len(paths):
        raise ModelError(f"{name} makes {len(sizes)} outputs, but stands for {', '.join(paths)}: this model is unknown")
    first = layer.tp_rank * size_in if is_row else 0
    parts: list[ShardPart] = []
    start = 0
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        replicas = getattr(layer, "num_kv_head_replicas", 1) if len(paths) == 3 and index > 0 else 1
        whole, shard = _output_shard(layer, size, replicas, is_row)
        rows = slice(shard * size, (shard + 1) * size)
        parts.append(ShardPart(path, (int(layer.input_size), whole), slice(first, first + size_in), rows, start))
        start += size
    return LayerShard(tuple(parts), size_in, start)


def _output_shard(layer: Any, size: int, replicas: int, is_row: bool) -> tuple[int, int]:
    """Return the rows of a whole part, and which shard of `size` rows this process holds."""
    is_split = not is_row and hasattr(layer, "output_size_per_partition")
    if not is_split:
        return size, 0
    return size * layer.tp_size // replicas, layer.tp_rank // replicas


def own_ranks(shard: LayerShard, adapters: Sequence[Adapter]) -> list[dict[int, int]]:
    """Return slot -> ranks of each part where the adapters are fixed: as many as each adapter has there."""
    return [
        {slot: adapter.pairs[part.path].rank for slot, adapter in enumerate(adapters) if part.path in adapter.pairs}
        for part in shard.parts
    ]


def equal_ranks(shard: LayerShard, targets: frozenset[str], num_slots: int, rank: int) -> list[dict[int, int]]:
    """Return slot -> ranks of each part where adapters come and go: the same for all, in the targeted modules."""
    each = dict.fromkeys(range(num_slots), rank)
    return [each if part.path.rpartition(".")[2] in targets else {} for part in shard.parts]


def factors_here(adapter: Adapter, absent: Sequence[str]) -> dict[str, LoraPair]:
    """Return the factors for the modules that this pipeline stage holds; `absent` are prefixes of the others."""
    return {
        path: pair for path, pair in adapter.pairs.items() if not path.startswith(tuple(f"{each}." for each in absent))
    }


def plain_update(shard: LayerShard, adapters: Sequence[Adapter], weights: Tensor, x: Tensor) -> Tensor:
    """Return the sum of all `lora_update`s, (T, out), adapter by adapter in float64: sum_i w_i s_i B_i A_i x.

    Args:
        shard: the layer.
        adapters: N adapters.
        weights: (T, N).
        x: (T, in), the layer's input.
    """
    inputs = x.double().cpu()
    expected = torch.zeros(len(x), shard.size_out, dtype=torch.float64)
    for part in shard.parts:
        for index, adapter in enumerate(adapters):
            if (pair := adapter.pairs.get(part.path)) is not None:
                a, b = pair.a.double()[:, part.columns], pair.b.double()[part.rows]
                gate = weights[None, :, index : index + 1].double() * pair.scale  # (1, T, 1)
                made = lora_update(inputs[None] @ a.t(), Gates(gate), b)  # (1, T, out)
                expected[:, part.start : part.start + part.size] += made[0]
    return expected
