"""Many running texts at once: their sums of word vectors lie in arrays with a row a text.

The same as `treadle.routing.running_sum.RunningSum`, for all texts that a step continues. The numbers are equal bit for
bit, because each row is summed in the same order. Nothing here imports vLLM.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.routing.embedder import Floats, StaticEmbedder
from treadle.routing.running_sum import RunningSum, Sums, Tails

INITIAL_ROWS = 16


class TextPool:
    """Running texts with the same tails; one thread at a time."""

    def __init__(self, embedder: StaticEmbedder, tails: Tails) -> None:
        """Make room for a few texts, seen as a whole and in `tails`."""
        self._embedder = embedder
        self._effects = embedder.effects
        self._tails = tails
        self._room = max(tails, default=0)
        self._free = list(range(INITIAL_ROWS))
        self._open = [""] * INITIAL_ROWS
        self._opened = [self._effects.nothing] * INITIAL_ROWS  # (D,) the open word's vector
        self._words = np.zeros(INITIAL_ROWS, np.int64)  # complete words since the oldest mark
        self._closed = np.zeros((INITIAL_ROWS, embedder.dim))  # of all complete words
        self._sum = np.zeros((INITIAL_ROWS, embedder.dim))  # with the open word
        self._marks = np.zeros((INITIAL_ROWS, self._room, embedder.dim))  # before each of the last words, a ring

    def adopt(self, text: RunningSum) -> int:
        """Return the row that continues a text."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._closed[row], self._sum[row] = text.closed, text.sum
        self._open[row], self._opened[row] = text.open, text.opened
        self._words[row] = len(text.marks)
        for index, mark in enumerate(text.marks):
            self._marks[row, index] = mark
        return row

    def release(self, row: int) -> None:
        """Give a row back; any thread may."""
        self._free.append(row)

    def _grow(self) -> None:
        count = len(self._open)
        self._free += range(count, 2 * count)
        self._open += [""] * count
        self._opened += [self._effects.nothing] * count
        arrays = self._words, self._closed, self._sum, self._marks
        self._words, self._closed, self._sum, self._marks = (
            np.concatenate([array, np.zeros_like(array)]) for array in arrays
        )

    def extend(self, rows: Sequence[int], pieces: Sequence[Sequence[str]]) -> None:
        """Append the text of some tokens to some rows (S,)."""
        closing: list[tuple[Sums, ...]] = []
        for row, each in zip(rows, pieces, strict=True):
            closed, self._open[row], self._opened[row] = self._effects.append(
                self._open[row], self._opened[row], "".join(each)
            )
            closing.append(closed)
        for index in range(max(map(len, closing), default=0)):
            closes = [place for place, each in enumerate(closing) if index < len(each)]
            self._close(np.array([rows[place] for place in closes]), [closing[place][index] for place in closes])
        at = np.array(rows)
        self._sum[at] = self._closed[at] + self._stacked([self._opened[row] for row in rows])

    def _close(self, rows: NDArray[np.int64], words: Sequence[Sums]) -> None:
        """Append one complete word to each of some rows (S,)."""
        if self._room:
            self._marks[rows, self._words[rows] % self._room] = self._closed[rows]
            self._words[rows] += 1
        self._closed[rows] += self._stacked(words)

    def _stacked(self, sums: Sequence[Sums]) -> Sums:
        return np.concatenate(sums).reshape(-1, self._embedder.dim)  # half the time of np.stack

    def embeddings(self, rows: Sequence[int]) -> Floats:
        """Return the embeddings (S, K, D) of the views of some rows (S,)."""
        at = np.array(rows)
        whole, words = self._sum[at], self._words[at]
        is_open = np.array([bool(self._open[row]) for row in rows])
        seen = np.empty((len(at), 1 + len(self._tails), whole.shape[1]))
        seen[:, 0] = whole
        for index, tail in enumerate(self._tails, 1):
            complete = tail - is_open  # (S,)
            marks = self._marks[at, np.maximum(words - complete, 0) % self._room]
            is_whole = (words < complete)[:, None]
            before = np.where(is_whole, 0.0, np.where((complete == 0)[:, None], self._closed[at], marks))
            np.subtract(whole, before, out=seen[:, index])
        return self._embedder.unit(seen.reshape(-1, self._embedder.dim)).reshape(seen.shape)
