"""Many running texts at once: their sums of word vectors lie in arrays with a row a text.

The same as `treadle.routing.running_sum.RunningSum`, for all texts that a step continues. The numbers are equal bit for
bit, because each row is summed in the same order. Nothing here imports vLLM.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.routing.embedder import Floats, StaticEmbedder
from treadle.routing.running_sum import RunningSum, Spans, Sums, window_room

MAX_WINDOW_TOKENS = 64
"""The longest window of a text in a pool. A row has all of its room from the start, so longer ones stay outside."""
INITIAL_ROWS = 16


class TextPool:
    """Running texts with the same views; one thread at a time."""

    def __init__(self, embedder: StaticEmbedder, spans: Spans) -> None:
        """Make room for a few texts, seen in `spans`."""
        self._embedder = embedder
        self._effects = embedder.effects
        self._spans = spans
        self._room = window_room(spans)
        self._free = list(range(INITIAL_ROWS))
        self._open = [""] * INITIAL_ROWS
        self._opened = [self._effects.nothing] * INITIAL_ROWS  # (D,) the open word's vector
        self._tokens = np.zeros(INITIAL_ROWS, np.int64)  # since the oldest sum
        self._closed = np.zeros((INITIAL_ROWS, embedder.dim))  # of all complete words
        self._sum = np.zeros((INITIAL_ROWS, embedder.dim))  # with the open word
        self._before = np.zeros((INITIAL_ROWS, self._room, embedder.dim))  # before each of the last tokens, a ring

    def adopt(self, text: RunningSum) -> int:
        """Return the row that continues a text; if a view has a window, the text has tokens."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._closed[row], self._sum[row] = text.closed, text.sum
        self._open[row], self._opened[row] = text.open, text.opened
        self._tokens[row] = len(text.before)
        for index, sums in enumerate(text.before):
            self._before[row, index] = sums
        return row

    def release(self, row: int) -> None:
        """Give a row back; any thread may."""
        self._free.append(row)

    def _grow(self) -> None:
        count = len(self._open)
        self._free += range(count, 2 * count)
        self._open += [""] * count
        self._opened += [self._effects.nothing] * count
        arrays = self._tokens, self._closed, self._sum, self._before
        self._tokens, self._closed, self._sum, self._before = (
            np.concatenate([array, np.zeros_like(array)]) for array in arrays
        )

    def extend(self, rows: Sequence[int], pieces: Sequence[Sequence[str]]) -> None:
        """Append the text of some tokens to some rows (S,), one piece a token."""
        if not self._room:  # as a running sum without a window does
            self._append(rows, ["".join(each) for each in pieces])
            return
        if all(len(each) == 1 for each in pieces):
            self._append(rows, [each[0] for each in pieces])
            return
        for index in range(max(map(len, pieces), default=0)):
            longer = [which for which, each in enumerate(pieces) if index < len(each)]
            self._append([rows[which] for which in longer], [pieces[which][index] for which in longer])

    def _append(self, rows: Sequence[int], pieces: Sequence[str]) -> None:
        """Append one piece to each of some rows (S,)."""
        opens, openeds, append = self._open, self._opened, self._effects.append
        closing: list[Sums] = []
        opened: list[Sums] = []
        for row, piece in zip(rows, pieces, strict=True):
            closed, effect = append(opens[row], openeds[row], piece)
            closing.append(closed)
            opened.append(effect.opened)
            opens[row], openeds[row] = effect.open, effect.opened
        self._add(np.array(rows), self._stacked(closing), self._stacked(opened))

    def _add(self, rows: NDArray[np.int64], closing: Sums, opened: Sums) -> None:
        """Add to rows (S,) the sums of complete words and of open words, each (S, D)."""
        if self._room:
            self._before[rows, self._tokens[rows] % self._room] = self._sum[rows]
        closing += self._closed[rows]
        self._closed[rows] = closing
        closing += opened
        self._sum[rows] = closing
        self._tokens[rows] += 1

    def _stacked(self, sums: Sequence[Sums]) -> Sums:
        return np.concatenate(sums).reshape(-1, self._embedder.dim)  # half the time of np.stack

    def embeddings(self, rows: Sequence[int]) -> Floats:
        """Return the embeddings (S, K, D) of the views of some rows (S,)."""
        at = np.array(rows)
        whole, tokens = self._sum[at], self._tokens[at]
        seen = np.empty((len(at), len(self._spans), whole.shape[1]))
        for index, span in enumerate(self._spans):
            if span is None:
                seen[:, index] = whole
            else:
                oldest = np.maximum(tokens - span, 0) % self._room
                np.subtract(whole, self._before[at, oldest], out=seen[:, index])
        return self._embedder.unit(seen.reshape(-1, self._embedder.dim)).reshape(seen.shape)
