"""The key-value cache of a batch whose rows join and leave: one buffer a layer, rows aligned at their right end.

A buffer has room for more rows and more tokens, so that a row that joins or leaves is copied and the others stay:
moving all of them would cost running rows more than a step. In a CPU's memory, room that nobody writes to is free.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from treadle.common.memory import new_pages

GROWTH_TOKENS = 256
"""Tokens by which a full buffer grows, or by a quarter; in a CPU's memory it doubles."""
GROWTH_ROWS = 8
"""Rows by which a full buffer grows when a row joins, and four times as many in a CPU's memory."""


@dataclass
class Room:
    """What the buffers of a cache take, and how far they may grow ahead of what they need; None = as they like.

    Attributes:
        num_bytes: of all buffers.
        layer_bytes: of one layer's buffers at most.
        columns: that no row will ever have more of.
    """

    num_bytes: int = 0
    layer_bytes: int | None = None
    columns: int | None = None

    def size(self, like: tuple[Tensor, Tensor], rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of new buffers, given how many of each are needed and how many wanted."""
        num_rows, length = rows[1], columns[1]
        if self.columns is not None:
            length = min(length, max(self.columns, columns[0]))
        if self.layer_bytes is not None:
            one = sum(each.itemsize * each.shape[1] * each.shape[-1] for each in like)  # of a row's column
            num_rows = min(num_rows, max(rows[0], self.layer_bytes // (one * length)))
            length = min(length, max(columns[0], self.layer_bytes // (one * num_rows)))
        return num_rows, length


class RowLayer(DynamicLayer):
    """Keys and values of one layer, (B, H, L, head), a window of buffers with room to grow on three sides."""

    def __init__(self, room: Room | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._room = room or Room()
        self._buffers: tuple[Tensor, Tensor] | None = None  # of keys and of values, (rows, H, columns, head)
        self._num_rows = 0
        self._start = self._end = 0  # the columns in use

    def get_seq_length(self) -> int:
        """Return L, the tokens of the longest row."""
        return self._end - self._start

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values (B, H, T, head) of T new tokens; return those of all tokens."""
        start, end = self._end, self._end + key_states.shape[-2]
        new = key_states, value_states
        if self._buffers is None:
            self._num_rows = len(key_states)
            self._reserve(new, (self._num_rows, self._num_rows), 0, end)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        elif end > self._buffers[0].shape[-2]:
            length = self.get_seq_length()
            self._reserve(new, self._rows_of_buffers, 0, length + key_states.shape[-2])
            start, end = length, length + key_states.shape[-2]
        keys, values = cast(tuple[Tensor, Tensor], self._buffers)
        rows = self._num_rows
        keys[:rows, :, start:end], values[:rows, :, start:end] = key_states, value_states
        self._end = end
        self.keys, self.values = keys[:rows, :, self._start : end], values[:rows, :, self._start : end]
        return self.keys, self.values

    def extend(self) -> None:
        """Make one more column part of the window, for somebody else to write; `keys` and `values` lag behind."""
        self.make_room(1)
        self._end += 1

    def make_room(self, columns: int) -> None:
        """Let so many more columns fit into the buffers; the window stays as it is."""
        keys, _ = self.buffers
        if self._end + columns > keys.shape[-2]:
            self._reserve(self.buffers, self._rows_of_buffers, 0, self.get_seq_length() + columns)
            self.show()  # what it showed would keep the old buffers

    def cut(self, length: int) -> None:
        """Forget the columns behind the first `length`, which a pass that failed has written."""
        self._end = self._start + length
        self.show()

    def part(self, first: int, end: int) -> "RowLayer":
        """Return rows from `first` to before `end` as a layer of its own, in the same memory."""
        made = RowLayer()
        keys, values = self.buffers
        made._buffers = keys[first:end], values[first:end]
        made._num_rows, made._start, made._end = end - first, self._start, self._end
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, True
        made.show()
        return made

    @property
    def _rows_of_buffers(self) -> tuple[int, int]:
        """How many rows there are, and how many have room."""
        return self._num_rows, len(self.buffers[0])

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Of keys and of values, (rows, H, columns, head)."""
        assert self._buffers is not None
        return self._buffers

    @property
    def window(self) -> tuple[int, int]:
        """The first column in use, and the one behind the last."""
        return self._start, self._end

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold just these keys and values (B, H, L, head)."""
        self._room.num_bytes -= sum(each.nbytes for each in self._buffers or ())
        self._buffers, self._start, self._end = None, 0, 0
        self.update(keys, values)

    def append_rows(self, keys: Tensor, values: Tensor) -> None:
        """Add rows (B, H, L, head); whichever are shorter are padded on the left with zeros.

        Zeros, not what was there: a masked NaN that an earlier row has left is still NaN in the sum over the values.
        """
        self.make_room_for_rows(keys, values)
        assert self._buffers is not None
        length, num_rows = keys.shape[-2], self._num_rows + len(keys)
        missing = max(0, length - self.get_seq_length())  # columns on the left
        before, self._start = self._start, self._start - missing
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[: self._num_rows, :, self._start : before] = 0
            buffer[self._num_rows : num_rows, :, self._start : self._end - length] = 0
            buffer[self._num_rows : num_rows, :, self._end - length : self._end] = states
        self._num_rows = num_rows
        self.show()

    def make_room_for_rows(self, keys: Tensor, values: Tensor) -> None:
        """Let rows with such keys and values (B, H, L, head) fit into the buffers; the window stays as it is."""
        assert self._buffers is not None
        length, num_rows = keys.shape[-2], self._num_rows + len(keys)
        missing = max(0, length - self.get_seq_length())  # columns on the left
        if num_rows > len(self._buffers[0]) or missing > self._start:
            growth = GROWTH_ROWS * (4 if keys.device.type == "cpu" else 1)
            capacity = len(self._buffers[0]) if num_rows <= len(self._buffers[0]) else num_rows + growth
            self._reserve((keys, values), (num_rows, capacity), missing, max(self.get_seq_length(), length))
            self.show()

    def keep(self, rows: list[int], drop: int) -> None:
        """Keep the rows of these places, in this order, without the first `drop` columns, which none of them needs.

        A place that goes to another one must lie behind all that are kept.
        """
        for buffer in self._buffers or ():
            for place, source in enumerate(rows):
                if source != place:
                    buffer[place] = buffer[source]
        self._num_rows = len(rows)
        self._start += drop
        self.show()

    def _reserve(self, like: tuple[Tensor, Tensor], rows: tuple[int, int], left: int, columns: int) -> None:
        """Move to new buffers (rows, H, columns and more, head), the columns in use behind `left` free ones.

        They are not filled: what becomes visible later is written first. `rows` are those needed, and those wanted.
        """
        before, length = self._buffers, self.get_seq_length()
        spare = max(GROWTH_TOKENS, columns if like[0].device.type == "cpu" else columns // 4)
        num_rows, num_columns = self._room.size(like, rows, (columns, columns + spare))
        keys, values = (  # latent attention: values are shorter than keys
            new_pages((num_rows, each.shape[1], num_columns, each.shape[-1]), each) for each in like
        )
        self._buffers = keys, values
        self._room.num_bytes += sum(each.nbytes for each in self._buffers) - sum(each.nbytes for each in before or ())
        if before is not None:
            for old, new in zip(before, self._buffers, strict=True):
                new[: self._num_rows, :, left : left + length] = old[: self._num_rows, :, self._start : self._end]
        self._start, self._end = left, left + length

    def show(self) -> None:
        """Let `keys` and `values` be those of the window."""
        keys, values = cast(tuple[Tensor, Tensor], self._buffers)
        window = (slice(self._num_rows), slice(None), slice(self._start, self._end))
        self.keys, self.values = keys[window], values[window]


class RowCache(Cache):
    """The cache that the model fills; rows are padded on the left, and the batch knows how much."""

    def __init__(self) -> None:
        self._room = Room()
        super().__init__(layer_class_to_replicate=cast(type[RowLayer], partial(RowLayer, self._room)))

    @property
    def length(self) -> int:
        """L, the tokens of the longest row."""
        return int(self.get_seq_length())

    def rows(self, num_layers: int) -> list[RowLayer]:
        """Return the layers' caches, made where the model has not written yet."""
        while len(self.layers) < num_layers:
            self.layers.append(RowLayer(self._room))
        return cast(list[RowLayer], self.layers)

    def merge(self, other: "RowCache") -> None:
        """Append the rows of another cache; whichever is shorter is padded on the left.

        Where there is no memory for them, this one is as it was.
        """
        other.show()
        pairs = list(zip(self._filled(), other._filled(), strict=True))
        for mine, theirs in pairs:
            mine.make_room_for_rows(cast(Tensor, theirs.keys), cast(Tensor, theirs.values))
        for mine, theirs in pairs:
            mine.append_rows(cast(Tensor, theirs.keys), cast(Tensor, theirs.values))

    def make_room(self, columns: int) -> None:
        """Let so many more columns fit into the buffers of all layers."""
        for layer in self._filled():
            layer.make_room(columns)

    def cut(self, length: int) -> None:
        """Forget the columns behind the first `length`, though some layers have them and others do not."""
        for layer in self._filled():
            layer.cut(length)

    def part(self, first: int, end: int) -> "RowCache":
        """Return rows from `first` to before `end` as a cache that writes into the same memory, while that has room."""
        made = RowCache()
        made.layers = [
            layer.part(first, end) if isinstance(layer, RowLayer) and layer.is_initialized else RowLayer()
            for layer in self.layers
        ]
        return made

    def keep(self, rows: list[int], drop: int) -> None:
        """Keep the rows of these places, in this order, and cut the first `drop` columns; see `RowLayer.keep`."""
        for layer in self._filled():
            layer.keep(rows, drop)

    def extend(self, num_layers: int) -> tuple[int, int, int]:
        """Make room for a column that somebody else writes; return the columns there are, it, and the first in use."""
        layers = self.rows(num_layers)
        for layer in layers:
            layer.extend()
        start, end = layers[0].window
        return layers[0].buffers[0].shape[-2], end - 1, start

    def show(self) -> None:
        """Let each layer's `keys` and `values` be those of its window."""
        for layer in self._filled():
            layer.show()

    @property
    def num_bytes(self) -> int:
        """Of all buffers, with the room in them."""
        return self._room.num_bytes

    def allow(self, layer_bytes: int) -> None:
        """Say how many bytes a layer's buffers may take to grow ahead; what is needed they take all the same."""
        self._room.layer_bytes = layer_bytes

    def expect(self, columns: int) -> None:
        """Say how many columns the longest row can come to have."""
        self._room.columns = columns

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers of keys and values of each layer, (rows, H, columns, head)."""
        return [layer.buffers for layer in self._filled()]

    def _filled(self) -> list[RowLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowLayer) and layer.is_initialized]
