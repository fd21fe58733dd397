"""Keys and values of earlier texts, reused by rows that begin with the same text read in the same way.

The keys and values of a token depend on all tokens up to it, on the base model, and on the adapters and weights under
which each token was read. So an entry is reused as far as tokens and weights are equal. Adapters are compared by their
factors as well as their names: a new adapter under an old name shares nothing with the old one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from treadle.common.memory import new_pages
from treadle.engine.kv_cache import RowCache
from treadle.engine.sequence import TokenSequence
from treadle.lora.adapter import Adapter
from treadle.lora.blend import Blend
from treadle.routing.centroids import Floats

MIN_PREFIX_TOKENS = 16
"""Shorter prefixes are read again."""
MAX_ENTRIES = 128
"""With more entries, comparing takes longer than reading again on a small model."""
MAX_COPIED_TOKENS = 256
"""A pass copies at most this many of the tokens that were read."""
AdapterKey: TypeAlias = tuple[str, str]
"""An adapter's name and identity."""


def key_of(adapter: Adapter) -> AdapterKey:
    """Return the key that identifies an adapter."""
    return adapter.name, adapter.identity


@dataclass(frozen=True, eq=False)
class PrefixText:
    """Tokens and the way they are read. Equal ones have equal keys and values.

    Attributes:
        ids: (T,) tokens.
        weights: adapter -> (T,) its weights; only adapters with a weight above 0.
        present: the adapters that the combine uses at any weight.
        way: combine, owner, and the kind of rotary factors.
    """

    ids: NDArray[np.int64]
    weights: Mapping[AdapterKey, Floats]
    present: tuple[AdapterKey, ...]
    way: tuple[str, str, str]

    @cached_property
    def head(self) -> bytes:
        """The first tokens; texts that differ here share too little to keep."""
        return self.ids[:MIN_PREFIX_TOKENS].tobytes()

    @classmethod
    def of(cls, row: TokenSequence, blend: Blend, rope: str = "") -> "PrefixText":
        """Return a row's tokens without the newest generated one, which no pass has read yet."""
        ids = np.array(row.ids[: len(row.ids) - bool(row.events)])
        later = [event.weights for event in row.events[1:]]
        prompt = np.broadcast_to(row.read_under, (row.prompt_tokens, len(row.router.names)))
        weights = np.concatenate([prompt, *(each[None] for each in later)])  # (T, N)
        keys = {adapter.name: key_of(adapter) for adapter in blend.adapters}
        # `paper` adds the B of every adapter that the row knows, at any weight
        present = tuple(keys[name] for name in row.router.names) if row.routing.combine == "paper" else ()
        acting = {keys[name]: weights[:, i] for i, name in enumerate(row.router.names) if weights[:, i].any()}
        return cls(ids, acting, present, (row.routing.combine, row.owner, rope))

    def shared(self, other: "PrefixText") -> int:
        """Return the number of first tokens that both texts share, read in the same way; 0 if their heads differ."""
        if (self.head, self.way, self.present) != (other.head, other.way, other.present):
            return 0
        length = min(len(self.ids), len(other.ids))
        same = self.ids[:length] == other.ids[:length]
        nothing = np.zeros(length, np.float32)
        for key in {*self.weights, *other.weights}:
            same &= self.weights.get(key, nothing)[:length] == other.weights.get(key, nothing)[:length]
        return length if same.all() else int(same.argmin())


@dataclass(frozen=True, eq=False)
class PrefixEntry:
    """A text with its keys and values (H, T, head) of every layer, and their bytes."""

    text: PrefixText
    states: Sequence[tuple[Tensor, Tensor]]
    num_bytes: int


class PrefixCache:
    """The latest texts, up to `max_bytes` bytes of keys and values; the least recently used is dropped first."""

    def __init__(self, max_bytes: int, max_entries: int = MAX_ENTRIES) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.entries: list[PrefixEntry] = []  # the newest last
        self._adapters: Sequence[Adapter] = ()  # at the last `forget`

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.num_bytes for entry in self.entries)

    def fill(self, cache: RowCache, text: PrefixText, num_unread: int = 1) -> int:
        """Copy the known beginning of a text into an empty cache of one row; return its number of tokens.

        The last `num_unread` tokens are always read again, because their logits or states are needed.
        """
        known = [min(entry.text.shared(text), max(0, len(text.ids) - num_unread)) for entry in self.entries]
        longest = max(known, default=0)
        if longest < MIN_PREFIX_TOKENS:
            return 0
        entry = self.entries.pop(known.index(longest))
        self.entries.append(entry)
        for layer, (keys, values) in zip(cache.rows(len(entry.states)), entry.states, strict=True):
            layer.replace(keys[None, :, :longest], values[None, :, :longest])
        return longest

    def store(self, text: PrefixText, cache: RowCache, index: int, copy: "PrefixCopy | None" = None) -> None:
        """Store the keys and values of the row at `index` of a cache that ends with this text.

        `copy` holds the first of them already if the text was read in chunks.
        """
        length = len(text.ids)
        copy = copy or PrefixCopy(length, self.max_bytes)
        num_bytes = copy.size(cache)
        if length < MIN_PREFIX_TOKENS or num_bytes > self.max_bytes:
            return
        shared = [entry.text.shared(text) for entry in self.entries]
        if length in shared:
            return  # a stored text begins with it
        copy.extend(cache, length, index)
        # drop texts that the new one continues
        kept = [e for e, same in zip(self.entries, shared, strict=True) if same < len(e.text.ids)]
        self.entries = [*kept[1 - self.max_entries :], PrefixEntry(text, copy.states, num_bytes)]
        while self.num_bytes > self.max_bytes:
            del self.entries[0]

    def forget(self, adapters: Sequence[Adapter]) -> None:
        """Drop entries that were read under adapters other than these."""
        if adapters is self._adapters:
            return
        self._adapters = adapters
        keys = set(map(key_of, adapters))
        self.entries = [entry for entry in self.entries if {*entry.text.weights, *entry.text.present} <= keys]


class PrefixCopy:
    """Keys and values of a row's first `length` tokens, copied in parts while the row is read.

    Copying a long text at once would delay running rows, because the system maps the new memory on first write. All
    layers are one allocation, which is returned to the system as a whole.
    """

    def __init__(self, length: int, max_bytes: int) -> None:
        """Copy nothing yet; copy nothing at all if the whole has more than `max_bytes` bytes."""
        self._length = length
        self._max_bytes = max_bytes
        self.num_columns = 0  # copied so far
        self.states: list[tuple[Tensor, Tensor]] = []  # of each layer (H, length, head)

    def size(self, cache: RowCache) -> int:
        """Return the bytes of a whole copy of a row of this cache."""
        buffers = [each for pair in cache.buffers() for each in pair]  # (rows, H, columns, head)
        return sum(each.itemsize * each.shape[1] * self._length * each.shape[3] for each in buffers)

    def extend(self, cache: RowCache, most: int = MAX_COPIED_TOKENS, index: int = 0) -> None:
        """Copy the next columns, at most `most`, of the row at `index`; its text ends where the cache ends."""
        if self.size(cache) > self._max_bytes:
            return
        cache.show()
        layers = cache.rows(len(cache.layers))
        shown = [cast(tuple[Tensor, Tensor], (layer.keys, layer.values)) for layer in layers]
        self.states = self.states or _new_states(shown, self._length)
        before = max(0, cache.length - self._length)  # columns of padding, once the whole text is cached
        done = min(self.num_columns + most, cache.length - before)
        for new, old in zip(chain(*self.states), chain(*shown), strict=True):
            new[:, self.num_columns : done] = old[index, :, before + self.num_columns : before + done]
        self.num_columns = done


def _new_states(like: Sequence[tuple[Tensor, Tensor]], length: int) -> list[tuple[Tensor, Tensor]]:
    """Return uninitialised keys and values (H, length, head) of each layer, in one allocation."""
    shapes = [(each.shape[1], length, each.shape[3]) for each in chain(*like)]
    sizes = [prod(shape) for shape in shapes]
    parts = new_pages([sum(sizes)], like[0][0]).split(sizes)
    states = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return list(zip(states[::2], states[1::2], strict=True))
