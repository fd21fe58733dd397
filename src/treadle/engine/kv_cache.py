"""The key-value cache of a batch: one buffer a layer, rows aligned at their right end.

A buffer has room for more rows and more tokens, so only a row that joins or leaves is copied. Copying all rows would
cost running rows more than a step. On a CPU, memory that is not written to costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from treadle.common.memory import new_pages


class CacheSizes(NamedTuple):
    """Bytes that a row takes of a cache.

    Attributes:
        token_bytes: of one token's keys and values in all layers.
        state_bytes: of its recurrent states, however long it is.
        num_layers: that keep keys and values.
    """

    token_bytes: int
    state_bytes: int
    num_layers: int


@dataclass
class BufferLimits:
    """The size of a cache's buffers, and limits to their growth beyond what they need; None = no limit.

    Attributes:
        num_bytes: of all buffers.
        layer_bytes: limit of one layer's buffers.
        columns: limit of every row.
    """

    num_bytes: int = 0
    layer_bytes: int | None = None
    columns: int | None = None

    def size(self, like: tuple[Tensor, Tensor], rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of new buffers, given (needed, wanted) numbers of each."""
        num_rows, length = rows[1], columns[1]
        if self.columns is not None:
            length = min(length, max(self.columns, columns[0]))
        if self.layer_bytes is not None:
            one = sum(each.itemsize * each.shape[1] * each.shape[-1] for each in like)  # bytes of one column of a row
            num_rows = min(num_rows, max(rows[0], self.layer_bytes // (one * length)))
            length = min(length, max(columns[0], self.layer_bytes // (one * num_rows)))
        return num_rows, length


class RowLayer(DynamicLayer):
    """Keys and values of one layer (B, H, L, head): a window of buffers that can grow on three sides.

    Attributes:
        growth_tokens: tokens that a full buffer grows by, or a quarter if that is more; on a CPU it doubles.
        growth_rows: rows that a full buffer grows by when a row joins; four times as many on a CPU.
    """

    growth_tokens: ClassVar[int] = 256
    growth_rows: ClassVar[int] = 8

    def __init__(self, limits: BufferLimits | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._limits = limits or BufferLimits()
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
        """Add a column to the window for the caller to write; `keys` and `values` are updated by `show`."""
        self.make_room(1)
        self._end += 1

    def make_room(self, columns: int) -> None:
        """Make sure that this many more columns fit into the buffers; the window does not change."""
        keys, _ = self.buffers
        if self._end + columns > keys.shape[-2]:
            self._reserve(self.buffers, self._rows_of_buffers, 0, self.get_seq_length() + columns)
            self.show()  # the old views would keep the old buffers

    def cut(self, length: int) -> None:
        """Drop the columns after the first `length`, which a failed pass has written."""
        self._end = self._start + length
        self.show()

    def part(self, first: int, end: int) -> "RowLayer":
        """Return rows from `first` to before `end` as a separate layer in the same memory."""
        made = type(self)()
        keys, values = self.buffers
        made._buffers = keys[first:end], values[first:end]
        made._num_rows, made._start, made._end = end - first, self._start, self._end
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, True
        made.show()
        return made

    @property
    def _rows_of_buffers(self) -> tuple[int, int]:
        """The number of rows, and the rows that the buffers have room for."""
        return self._num_rows, len(self.buffers[0])

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The buffers of keys and of values, (rows, H, columns, head)."""
        assert self._buffers is not None
        return self._buffers

    @property
    def window(self) -> tuple[int, int]:
        """The first column in use, and the one after the last."""
        return self._start, self._end

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold just these keys and values (B, H, L, head)."""
        self._limits.num_bytes -= sum(each.nbytes for each in self._buffers or ())
        self._buffers, self._start, self._end = None, 0, 0
        self.update(keys, values)

    def append_rows(self, keys: Tensor, values: Tensor) -> None:
        """Add rows (B, H, L, head); shorter rows, old or new, are padded on the left with zeros.

        Old memory is not enough: a masked NaN from an earlier row is still NaN in the sum over the values.
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
        """Make sure that rows with these keys and values (B, H, L, head) fit; the window does not change."""
        assert self._buffers is not None
        length, num_rows = keys.shape[-2], self._num_rows + len(keys)
        missing = max(0, length - self.get_seq_length())  # columns on the left
        if num_rows > len(self._buffers[0]) or missing > self._start:
            growth = self.growth_rows * (4 if keys.device.type == "cpu" else 1)
            capacity = len(self._buffers[0]) if num_rows <= len(self._buffers[0]) else num_rows + growth
            self._reserve((keys, values), (num_rows, capacity), missing, max(self.get_seq_length(), length))
            self.show()

    def keep(self, rows: list[int], drop: int) -> None:
        """Keep the rows at these places, in this order, without the first `drop` columns, which none of them needs.

        A row that moves must come from behind all rows that stay.
        """
        for buffer in self._buffers or ():
            for place, source in enumerate(rows):
                if source != place:
                    buffer[place] = buffer[source]
        self._num_rows = len(rows)
        self._start += drop
        self.show()

    def _reserve(self, like: tuple[Tensor, Tensor], rows: tuple[int, int], left: int, columns: int) -> None:
        """Move to new buffers (rows, H, columns and more, head), with `left` free columns before those in use.

        Their memory is not filled, because columns are written before they are read. `rows` is (needed, wanted).
        """
        before, length = self._buffers, self.get_seq_length()
        spare = max(self.growth_tokens, columns if like[0].device.type == "cpu" else columns // 4)
        num_rows, num_columns = self._limits.size(like, rows, (columns, columns + spare))
        keys, values = (  # latent attention: values are shorter than keys
            self.new_buffer((num_rows, each.shape[1], num_columns, each.shape[-1]), each) for each in like
        )
        self._buffers = keys, values
        self._limits.num_bytes += sum(each.nbytes for each in self._buffers) - sum(each.nbytes for each in before or ())
        if before is not None:
            for old, new in zip(before, self._buffers, strict=True):
                new[: self._num_rows, :, left : left + length] = old[: self._num_rows, :, self._start : self._end]
        self._start, self._end = left, left + length

    def new_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return memory (rows, H, columns, head) with any values, of the dtype and on the device of `like`."""
        return new_pages(shape, like)

    def show(self) -> None:
        """Make `keys` and `values` views of the window."""
        keys, values = cast(tuple[Tensor, Tensor], self._buffers)
        window = (slice(self._num_rows), slice(None), slice(self._start, self._end))
        self.keys, self.values = keys[window], values[window]


class RowCache(Cache):
    """The cache that a model fills. Rows are padded on the left; the batch knows by how much."""

    def __init__(self, layer_type: type[RowLayer] = RowLayer) -> None:
        self.layer_type = layer_type
        self._limits = BufferLimits()
        super().__init__(layer_class_to_replicate=cast(type[RowLayer], partial(layer_type, self._limits)))

    @property
    def length(self) -> int:
        """L, the tokens of the longest row."""
        return int(self.get_seq_length())

    @property
    def has_keys(self) -> bool:
        """Whether a layer keeps keys and values."""
        return True

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent states: none in this cache."""
        return 0

    def begin_pass(self, num_columns: int) -> None:
        """Prepare for a pass that appends so many columns; keys and values need nothing."""

    def rows(self, num_layers: int) -> list[RowLayer]:
        """Return the layers; new ones where the model has not written yet."""
        while len(self.layers) < num_layers:
            self.layers.append(self.layer_type(self._limits))
        return cast(list[RowLayer], self.layers)

    def merge(self, other: "RowCache") -> None:
        """Append the rows of another cache; the shorter one is padded on the left.

        If memory runs out, this cache has not changed.
        """
        other.show()
        pairs = list(zip(self._filled(), other._filled(), strict=True))
        for mine, theirs in pairs:
            mine.make_room_for_rows(cast(Tensor, theirs.keys), cast(Tensor, theirs.values))
        for mine, theirs in pairs:
            mine.append_rows(cast(Tensor, theirs.keys), cast(Tensor, theirs.values))

    def make_room(self, columns: int) -> None:
        """Make sure that this many more columns fit into the buffers of all layers."""
        for layer in self._filled():
            layer.make_room(columns)

    def cut(self, length: int) -> None:
        """Drop the columns after the first `length`, which only some layers may have."""
        for layer in self._filled():
            layer.cut(length)

    def part(self, first: int, end: int) -> "RowCache":
        """Return rows from `first` to before `end` as a cache that writes into the same memory while it has room."""
        made = RowCache(self.layer_type)
        made.layers = [
            layer.part(first, end) if isinstance(layer, RowLayer) and layer.is_initialized else self.layer_type()
            for layer in self.layers
        ]
        return made

    def keep(self, rows: list[int], drop: int) -> None:
        """Keep the rows at these places, in this order, without the first `drop` columns; see `RowLayer.keep`."""
        for layer in self._filled():
            layer.keep(rows, drop)

    def extend(self, num_layers: int) -> tuple[int, int, int]:
        """Add a column for the caller to write; return (columns of a buffer, the new column, the first in use)."""
        layers = self.rows(num_layers)
        for layer in layers:
            layer.extend()
        start, end = layers[0].window
        return layers[0].buffers[0].shape[-2], end - 1, start

    def show(self) -> None:
        """Make each layer's `keys` and `values` views of its window."""
        for layer in self._filled():
            layer.show()

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers, including free room."""
        return self._limits.num_bytes

    def allow(self, layer_bytes: int) -> None:
        """Limit the bytes of a layer's buffers; they exceed it only for what they need."""
        self._limits.layer_bytes = layer_bytes

    def expect(self, columns: int) -> None:
        """Limit the columns to those that the longest row can ever have."""
        self._limits.columns = columns

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers of keys and values of each layer, (rows, H, columns, head)."""
        return [layer.buffers for layer in self._filled()]

    def _filled(self) -> list[RowLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowLayer) and layer.is_initialized]
