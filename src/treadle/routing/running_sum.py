"""The running sum of a text's word vectors: one more piece of text costs O(D)."""

import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
Spans = tuple[int | None, ...]
"""The number of last tokens that each of the K views of a text looks at; None = all."""

WORD = re.compile(r"\w{1,40}|[^\w\s]")
"""A run of letters and digits, or one other visible character: a text's vector is the sum over these."""
MAX_CACHED_PIECES = 20_000
MAX_PIECE_CHARS = 40
"""Longer pieces of text are not cached."""


def window_room(spans: Spans) -> int:
    """Return the number of last tokens whose earlier sums the views need; 0 = none."""
    return max((span for span in spans if span is not None), default=0)


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
        words: the words that the piece completes.
        closed: (D,) their sum.
        open: the last word, if the next piece may continue it, else "".
        opened: (D,) the open word's vector, or 0.
    """

    glues: bool
    words: list[str]
    closed: Sums
    open: str
    opened: Sums


class PieceEffects:
    """Finds the effects of pieces of text and caches them; any thread may call it."""

    def __init__(self, vectors: WordVectors) -> None:
        self._vectors = vectors
        self._cache: dict[str, PieceEffect] = {}
        self.nothing = np.zeros(vectors.dim)  # (D,)

    def append(self, before: str, opened: Sums, piece: str) -> tuple[Sums, PieceEffect]:
        """Append a piece to a text.

        Args:
            before: the open word that the text ends with, or "".
            opened: (D,) its vector.
            piece: the new text.

        Returns:
            the sum (D,) of the words that are complete now, and the effect that tells the new open word.
        """
        effect = self._cache.get(piece) or self._find(piece)
        if not before:
            return effect.closed, effect
        if effect.glues or not piece:
            text = before + piece
            effect = self._cache.get(text) or self._find(text)
            return effect.closed, effect
        if effect.words:
            return self._vectors.sum_words([before, *effect.words]), effect
        return opened, effect

    def _find(self, text: str) -> PieceEffect:
        words = WORD.findall(text)
        is_open = bool(words) and (text[-1].isalnum() or text[-1] == "_")
        last = words.pop() if is_open else ""
        sum_words = self._vectors.sum_words
        effect = PieceEffect(
            glues=text[:1].isalnum() or text[:1] == "_",
            words=words,
            closed=sum_words(words) if words else self.nothing,
            open=last,
            opened=sum_words([last]) if last else self.nothing,
        )
        if len(text) <= MAX_PIECE_CHARS:
            if len(self._cache) >= MAX_CACHED_PIECES:
                self._cache = {}  # not emptied: another thread may read it
            self._cache[text] = effect
        return effect


class RunningSum:
    """The running sum of one text; its last word stays open, because the next token may continue it.

    Attributes:
        closed: (D,) the sum of all complete words.
        open: the last word, or "".
        opened: (D,) its vector, or 0.
        sum: (D,) both together.
        before: the sums (D,) before each of the last tokens, the oldest first, as many as the views need.
    """

    def __init__(self, effects: PieceEffects, spans: Spans) -> None:
        self._effects = effects
        self._spans = spans
        self._room = window_room(spans)
        self.closed = self.opened = self.sum = effects.nothing
        self.open = ""
        self.before: deque[Sums] = deque(maxlen=self._room)

    def extend(self, pieces: Sequence[str]) -> None:
        """Append the text of some tokens, one piece a token."""
        if not self._room:
            pieces = ["".join(pieces)]
        for piece in pieces:
            self.before.append(self.sum)
            if piece:
                self._append(piece)

    def _append(self, piece: str) -> None:
        closing, effect = self._effects.append(self.open, self.opened, piece)
        if closing is not self._effects.nothing:
            self.closed = self.closed + closing
        self.open, self.opened = effect.open, effect.opened
        self.sum = self.closed + effect.opened if effect.open else self.closed

    def views(self) -> tuple[Sums, ...]:
        """Return the sum (D,) over the tokens of each of the K views."""
        return tuple(self.sum if span is None else self._newest(span) for span in self._spans)

    def _newest(self, span: int) -> Sums:
        """Return the part of the sum from the last `span` tokens, (D,)."""
        if not self.before:
            return self.sum
        return self.sum - self.before[max(len(self.before) - span, 0)]
