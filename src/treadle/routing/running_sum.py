"""Running sums of the vectors of all words of a text, and of its last ones. One more piece costs O(D)."""

import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
Tails = tuple[int, ...]
"""The words of each view of a text but the first: its last so many. The first view is the whole text."""
MAX_TAIL_WORDS = 64
"""The longest tail."""

WORD = re.compile(r"\w{1,40}|[^\w\s]")
"""A run of letters and digits, or one other visible character: a text's vector is the sum over these."""
MAX_CACHED_PIECES = 20_000
MAX_PIECE_CHARS = 40
"""Longer pieces of text are not cached."""


class WordVectors(Protocol):
    """Vectors of words, as an embedder gives them."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    def sum_words(self, words: Sequence[str]) -> Sums:
        """Return the sum (D,) of the vectors of some words; the caller does not write to it."""
        ...


class PieceEffect(NamedTuple):
    """The effect of a piece of text on a running sum.

    Attributes:
        glues: the piece begins with a letter or digit, which continues an open word.
        closed: (D,) of each word that the piece completes; the first may be the sum of many (`vectors_of`).
        open: the last word, if the next piece may continue it, else "".
        opened: (D,) the open word's vector, or 0.
    """

    glues: bool
    closed: tuple[Sums, ...]
    open: str
    opened: Sums


class PieceEffects:
    """Finds the effects of pieces of text and caches them; any thread may call it."""

    def __init__(self, vectors: WordVectors) -> None:
        self._vectors = vectors
        self._cache: dict[str, PieceEffect] = {}
        self.nothing = np.zeros(vectors.dim)  # (D,)

    def append(self, before: str, opened: Sums, piece: str) -> tuple[tuple[Sums, ...], str, Sums]:
        """Append a piece to a text.

        Args:
            before: the open word that the text ends with, or "".
            opened: (D,) its vector.
            piece: the new text.

        Returns:
            the vectors of the words that are complete now, as in `PieceEffect`; the new open word; its vector.
        """
        if not piece:
            return (), before, opened
        effect = self._cache.get(piece) or self._find(piece)
        if before and effect.glues:
            text = before + piece
            effect = self._cache.get(text) or self._find(text)
        elif before:
            return (opened, *effect.closed), effect.open, effect.opened
        return effect.closed, effect.open, effect.opened

    def _find(self, text: str) -> PieceEffect:
        words = WORD.findall(text)
        is_open = bool(words) and (text[-1].isalnum() or text[-1] == "_")
        last = words.pop() if is_open else ""
        effect = PieceEffect(
            glues=text[:1].isalnum() or text[:1] == "_",
            closed=vectors_of(words, self._vectors),
            open=last,
            opened=self._vectors.sum_words([last]) if last else self.nothing,
        )
        if len(text) <= MAX_PIECE_CHARS:
            if len(self._cache) >= MAX_CACHED_PIECES:
                self._cache = {}  # not emptied: another thread may read it
            self._cache[text] = effect
        return effect


def vectors_of(words: Sequence[str], vectors: WordVectors) -> tuple[Sums, ...]:
    """Return the vector (D,) of each word; of many words, all but the last are one sum."""
    if len(words) <= MAX_TAIL_WORDS:
        return tuple(vectors.sum_words([word]) for word in words)
    last = vectors_of(words[-MAX_TAIL_WORDS:], vectors)
    return (vectors.sum_words(words[:-MAX_TAIL_WORDS]), *last)


class RunningSum:
    """The running sums of one text; its last word stays open, because the next token may continue it.

    Attributes:
        closed: (D,) the sum of all complete words.
        marks: `closed` (D,) before each of the last complete words, the oldest first, as many as the tails need.
        open: the last word, or "".
        opened: (D,) its vector, or 0.
        sum: (D,) of all words.
        before: the sums (D,) before each of the last `window` tokens, the oldest first.
    """

    def __init__(self, effects: PieceEffects, tails: Tails = (), window: int | None = None) -> None:
        self._effects = effects
        self._tails = tails
        self._window = window
        self.closed = self.opened = self.sum = effects.nothing
        self.open = ""
        self.marks: deque[Sums] = deque(maxlen=max(tails, default=0))
        self.before: deque[Sums] = deque(maxlen=window or 0)

    def extend(self, pieces: Sequence[str]) -> None:
        """Append the text of some tokens, one piece a token."""
        if not self._window:
            pieces = ["".join(pieces)]
        for piece in pieces:
            self.before.append(self.sum)
            if piece:
                self._append(piece)

    def _append(self, piece: str) -> None:
        closing, self.open, self.opened = self._effects.append(self.open, self.opened, piece)
        for vector in closing:
            self.marks.append(self.closed)
            self.closed = self.closed + vector
        self.sum = self.closed + self.opened if self.open else self.closed

    def views(self) -> tuple[Sums, ...]:
        """Return the sum (D,) of the words of each of the K views."""
        whole = self.sum - self.before[0] if self.before else self.sum
        return (whole, *(self._last(words) for words in self._tails))

    def _last(self, words: int) -> Sums:
        """Return the sum (D,) of the last words."""
        complete = words - 1 if self.open else words
        if len(self.marks) < complete:
            return self.sum
        return self.sum - self.marks[-complete] if complete else self.opened
