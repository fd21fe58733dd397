"""The key-value cache of a batch whose rows join and leave: one buffer a layer, rows aligned at their right end."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

GROWTH = 256
"""Tokens by which a full buffer grows."""


class RowLayer(DynamicLayer):
    """Keys and values of one layer, (B, H, L, head) inside buffers with room to grow: a step copies one token."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None  # of keys and of values, (B, H, capacity, head)
        self._length = 0

    def get_seq_length(self) -> int:
        """Return L, the tokens of the longest row."""
        return self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values (B, H, T, head) of T new tokens; return those of all tokens."""
        start, end = self._length, self._length + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._buffers = self._grown(0, key_states, end), self._grown(1, value_states, end)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = self._buffers
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self._length = end
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold just these keys and values (B, H, L, head)."""
        self._buffers, self._length = None, 0
        self.update(keys, values)

    def _grown(self, which: int, new: Tensor, length: int) -> Tensor:
        buffer = new.new_zeros((*new.shape[:2], length + GROWTH, new.shape[-1]))
        if self._buffers is not None:
            buffer[..., : self._length, :] = self._buffers[which][..., : self._length, :]
        return buffer


class RowCache(Cache):
    """The cache that the model fills; rows are padded on the left, and the batch knows how much."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowLayer)

    @property
    def length(self) -> int:
        """L, the tokens of the longest row."""
        return int(self.get_seq_length())

    def rows(self, num_layers: int) -> list[RowLayer]:
        """Return the layers' caches, made where the model has not written yet."""
        while len(self.layers) < num_layers:
            self.layers.append(RowLayer())
        return cast(list[RowLayer], self.layers)

    def merge(self, other: "RowCache") -> None:
        """Append the rows of another cache; the shorter one is padded on the left."""
        length = max(self.length, other.length)
        for mine, theirs in zip(self._filled(), other._filled(), strict=True):
            keys = torch.cat([_pad_left(mine.keys, length), _pad_left(theirs.keys, length)])
            values = torch.cat([_pad_left(mine.values, length), _pad_left(theirs.values, length)])
            mine.replace(keys, values)

    def select(self, rows: list[int], drop: int) -> None:
        """Keep only some rows, in this order, and cut the first `drop` columns, which none of them needs."""
        for layer in self._filled():
            index = torch.tensor(rows, device=layer.device)
            keys, values = (cast(Tensor, states)[..., drop:, :] for states in (layer.keys, layer.values))
            layer.replace(keys.index_select(0, index), values.index_select(0, index))

    def _filled(self) -> list[RowLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowLayer) and layer.is_initialized]


def _pad_left(x: Tensor | None, length: int) -> Tensor:
    """(B, H, L, head) -> (B, H, length, head)."""
    states = cast(Tensor, x)
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))
