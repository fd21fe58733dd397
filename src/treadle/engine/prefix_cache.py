"""Keys and values of texts that have been read, used again by rows that begin with the same text in the same way.

What a token's keys and values are depends on the tokens up to it, on the base model, and on the adapters and weights
under which each of them was read. So an entry fits as far as tokens and weights are the same, and no further. Weights
count by what an adapter holds, not by its name alone: another one that takes a name shares nothing with the first.
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
from treadle.engine.sequence import Row
from treadle.lora.adapter import Adapter
from treadle.lora.blend import Blend
from treadle.routing.centroids import Floats

MIN_PREFIX_TOKENS = 16
"""Tokens; a shorter prefix is read again."""
MAX_ENTRIES = 128
"""Entries; with more, on a small model, to compare would take longer than to read again."""
MAX_COPIED_TOKENS = 256
"""Columns; of what has been read, a pass copies so many."""
Key: TypeAlias = tuple[str, str]
"""An adapter's name and identity."""


def key_of(adapter: Adapter) -> Key:
    """Return what tells an adapter from others."""
    return adapter.name, adapter.identity


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens and how they are read: what has to be the same for keys and values to be the same.

    Attributes:
        ids: (T,) tokens.
        weights: adapter -> (T,) its weights; only of adapters that act somewhere.
        present: the adapters that the combine brings in whatever their weights.
        way: combine, owner, and which rotary factors.
    """

    ids: NDArray[np.int64]
    weights: Mapping[Key, Floats]
    present: tuple[Key, ...]
    way: tuple[str, str, str]

    @cached_property
    def head(self) -> bytes:
        """The first tokens; texts that differ in these have nothing in common that is worth keeping."""
        return self.ids[:MIN_PREFIX_TOKENS].tobytes()

    @classmethod
    def of(cls, row: Row, blend: Blend, rope: str = "") -> "Text":
        """Return the tokens of a row but the newest generated one, which no pass has read yet."""
        ids = np.array(row.ids[: len(row.ids) - bool(row.events)])
        later = [event.weights for event in row.events[1:]]
        prompt = np.broadcast_to(row.read_under, (row.prompt_tokens, len(row.router.names)))
        weights = np.concatenate([prompt, *(each[None] for each in later)])  # (T, N)
        keys = {adapter.name: key_of(adapter) for adapter in blend.adapters}
        # the paper's combine adds the B of every adapter that the row knows of, whatever its weight
        present = tuple(keys[name] for name in row.router.names) if row.routing.combine == "paper" else ()
        acting = {keys[name]: weights[:, i] for i, name in enumerate(row.router.names) if weights[:, i].any()}
        return cls(ids, acting, present, (row.routing.combine, row.owner, rope))

    def shared(self, other: "Text") -> int:
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
class Entry:
    """A text with its keys and values, each (H, T, head), of every layer, and how many bytes these are."""

    text: Text
    states: Sequence[tuple[Tensor, Tensor]]
    num_bytes: int


class PrefixCache:
    """Texts that were read lately, up to so many bytes of keys and values; the one unused longest goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: list[Entry] = []  # the newest last
        self._adapters: Sequence[Adapter] = ()  # of the last `forget`

    @property
    def num_bytes(self) -> int:
        """Of all entries."""
        return sum(entry.num_bytes for entry in self._entries)

    def fill(self, cache: RowCache, text: Text) -> int:
        """Put what is known of a text's beginning into an empty cache of one row; return how many tokens that is.

        The last token is never among them: its logits are wanted.
        """
        known = [min(entry.text.shared(text), len(text.ids) - 1) for entry in self._entries]
        longest = max(known, default=0)
        if longest < MIN_PREFIX_TOKENS:
            return 0
        entry = self._entries.pop(known.index(longest))
        self._entries.append(entry)
        for layer, (keys, values) in zip(cache.rows(len(entry.states)), entry.states, strict=True):
            layer.replace(keys[None, :, :longest], values[None, :, :longest])
        return longest

    def store(self, text: Text, cache: RowCache, index: int, copy: "Copy | None" = None) -> None:
        """Keep the keys and values of the row at `index` of a cache whose last columns are this text's.

        `copy` has the first of them already, where the text was read in chunks.
        """
        length = len(text.ids)
        copy = copy or Copy(length, self.max_bytes)
        num_bytes = copy.size(cache)
        if length < MIN_PREFIX_TOKENS or num_bytes > self.max_bytes:
            return
        shared = [entry.text.shared(text) for entry in self._entries]
        if length in shared:
            return  # it is the beginning of a text that is there
        copy.extend(cache, length, index)
        # a text that the new one continues is in it
        kept = [e for e, same in zip(self._entries, shared, strict=True) if same < len(e.text.ids)]
        self._entries = [*kept[1 - MAX_ENTRIES :], Entry(text, copy.states, num_bytes)]
        while self.num_bytes > self.max_bytes:
            del self._entries[0]

    def forget(self, adapters: Sequence[Adapter]) -> None:
        """Drop what was read under adapters other than these."""
        if adapters is self._adapters:
            return
        self._adapters = adapters
        keys = set(map(key_of, adapters))
        self._entries = [entry for entry in self._entries if {*entry.text.weights, *entry.text.present} <= keys]


class Copy:
    """Keys and values of one row's first `length` tokens, copied a few columns at a time while the row is read.

    All at once, a long text would hold up the rows that run: the copy goes into memory that the system has yet to give.
    The layers lie in one piece, which goes back to the system with them.
    """

    def __init__(self, length: int, max_bytes: int) -> None:
        """Copy nothing yet, and never more than `max_bytes`."""
        self._length = length
        self._max_bytes = max_bytes
        self.num_columns = 0  # that have been copied
        self.states: list[tuple[Tensor, Tensor]] = []  # of each layer (H, length, head)

    def size(self, cache: RowCache) -> int:
        """Return how many bytes the whole copy of a row of this cache has."""
        buffers = [each for pair in cache.buffers() for each in pair]  # (rows, H, columns, head)
        return sum(each.itemsize * each.shape[1] * self._length * each.shape[3] for each in buffers)

    def extend(self, cache: RowCache, most: int = MAX_COPIED_TOKENS, index: int = 0) -> None:
        """Copy the next columns, at most so many, of the row at `index`; its text ends where the cache does."""
        if self.size(cache) > self._max_bytes:
            return
        cache.show()
        layers = cache.rows(len(cache.layers))
        shown = [cast(tuple[Tensor, Tensor], (layer.keys, layer.values)) for layer in layers]
        self.states = self.states or _new_states(shown, self._length)
        before = max(0, cache.length - self._length)  # columns of padding, once all of the text is there
        done = min(self.num_columns + most, cache.length - before)
        for new, old in zip(chain(*self.states), chain(*shown), strict=True):
            new[:, self.num_columns : done] = old[index, :, before + self.num_columns : before + done]
        self.num_columns = done


def _new_states(like: Sequence[tuple[Tensor, Tensor]], length: int) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values (H, length, head) of each layer, with any values, in one piece of memory."""
    shapes = [(each.shape[1], length, each.shape[3]) for each in chain(*like)]
    sizes = [prod(shape) for shape in shapes]
    parts = new_pages([sum(sizes)], like[0][0]).split(sizes)
    states = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return list(zip(states[::2], states[1::2], strict=True))
