"""Many running texts at once: their sums of word vectors lie in arrays with a row a text.

What `treadle.routing.embedder.StaticTrack` does for one text, for all texts that a step continues: the same numbers bit
for bit, because each row's sums are made in the same order. Nothing here imports vLLM.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treadle.routing.embedder import MAX_CACHED_WORDS, WORD, Floats, StaticEmbedder, TrackState

Sums = NDArray[np.float64]

MOST_ROOM = 64
"""Tokens that the sums before are kept of; texts with a longer window stay tracks of their own, because a row has all
of its room from the start."""
FIRST_ROWS = 16
LONGEST = 40
"""Characters of a text that is remembered."""


class Cut(NamedTuple):
    """What a piece of text, by itself, does to a running text.

    Attributes:
        glues: it begins with a letter or digit, which may continue an open word.
        words: that it completes.
        closed: (D,) their sum.
        open: the word that it leaves open, or "".
        opened: (D,) that word's vector, or 0.
    """

    glues: bool
    words: list[str]
    closed: Sums
    open: str
    opened: Sums


class Words:
    """What pieces of text do to a running text, remembered for all texts of one embedder."""

    def __init__(self, embedder: StaticEmbedder) -> None:
        self.embedder = embedder
        self.nothing = np.zeros(embedder.dim)
        self.cuts: dict[str, Cut] = {}

    def cut(self, text: str) -> Cut:
        """Return what a text does, and remember it unless it is long."""
        words = WORD.findall(text)
        is_open = bool(words) and (text[-1].isalnum() or text[-1] == "_")
        last = words.pop() if is_open else ""
        sum_words = self.embedder.sum_words
        made = Cut(
            glues=text[:1].isalnum() or text[:1] == "_",
            words=words,
            closed=sum_words(words) if words else self.nothing,
            open=last,
            opened=sum_words([last]) if last else self.nothing,
        )
        if len(text) <= LONGEST:
            if len(self.cuts) >= MAX_CACHED_WORDS:
                self.cuts.clear()
            self.cuts[text] = made
        return made


class Texts:
    """Running texts whose weights are made from the same views; one thread at a time."""

    def __init__(self, words: Words, spans: tuple[int | None, ...]) -> None:
        """Make room for a few texts.

        Args:
            words: what pieces of text do.
            spans: how many of the last tokens each of the K views looks at; None = all.
        """
        self._words = words
        self._embedder = embedder = words.embedder
        self._spans = spans
        self._room = self.room_of(spans)
        self._free = list(range(FIRST_ROWS))
        self._open = [""] * FIRST_ROWS
        self._opened = [words.nothing] * FIRST_ROWS  # (D,) the open word's vector
        self._tokens = np.zeros(FIRST_ROWS, np.int64)  # since the oldest that is remembered
        self._closed = np.zeros((FIRST_ROWS, embedder.dim))  # of all words that are complete
        self._sum = np.zeros((FIRST_ROWS, embedder.dim))  # with the open word
        self._before = np.zeros((FIRST_ROWS, self._room, embedder.dim))  # before each of the last tokens, a ring

    @staticmethod
    def room_of(spans: Sequence[int | None]) -> int:
        """Return how many tokens the sums before are kept of."""
        return max((span for span in spans if span is not None), default=0)

    def adopt(self, state: TrackState) -> int:
        """Return the row that goes on with a text; where there are views of its last tokens, it has tokens."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        before = state.before[-self._room :] if self._room else ()
        self._closed[row], self._sum[row], self._open[row] = state.closed, state.sum, state.open
        self._opened[row] = self._embedder.sum_words([state.open]) if state.open else self._words.nothing
        self._tokens[row] = len(before)
        for index, sums in enumerate(before):
            self._before[row, index] = sums
        return row

    def release(self, row: int) -> None:
        """Give a row back; any thread may."""
        self._free.append(row)

    def _grow(self) -> None:
        count = len(self._open)
        self._free += range(count, 2 * count)
        self._open += [""] * count
        self._opened += [self._words.nothing] * count
        arrays = self._tokens, self._closed, self._sum, self._before
        self._tokens, self._closed, self._sum, self._before = (
            np.concatenate([array, np.zeros_like(array)]) for array in arrays
        )

    def extend(self, rows: Sequence[int], pieces: Sequence[Sequence[str]]) -> None:
        """Append the text of some tokens to some rows (S,), one piece a token."""
        if not self._room:  # as a track without a window does
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
        words, opens, openeds = self._words, self._open, self._opened
        cuts = words.cuts
        closing: list[Sums] = []
        opened: list[Sums] = []
        for row, piece in zip(rows, pieces, strict=True):
            before = opens[row]
            cut = cuts.get(piece) or words.cut(piece)
            if before and (cut.glues or not piece):
                text = before + piece
                cut, before = cuts.get(text) or words.cut(text), ""
            if not before:
                closing.append(cut.closed)
            elif cut.words:
                closing.append(self._embedder.sum_words([before, *cut.words]))
            else:
                closing.append(openeds[row])
            opens[row] = cut.open
            openeds[row] = cut.opened
            opened.append(cut.opened)
        self._add(np.array(rows), self._stacked(closing), self._stacked(opened))

    def _add(self, rows: NDArray[np.int64], closing: Sums, opened: Sums) -> None:
        """Add to rows (S,) the sums of words that are complete now, and of those that are open, each (S, D)."""
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
