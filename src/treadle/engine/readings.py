"""Texts on their way into a cache: which columns have been read, under which weights, and what the prompts scored."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from treadle.engine.draws import failure_of
from treadle.engine.kv_cache import RowCache
from treadle.engine.prefix_cache import PrefixCopy
from treadle.engine.sampling import likeliest, score_tokens
from treadle.engine.sequence import NOT_ROUTED, SequenceError, TokenScore, TokenSequence
from treadle.routing.centroids import Floats


class Reading:
    """Rows whose texts are being read into a cache of their own, padded on the left to the longest."""

    def __init__(
        self,
        rows: Sequence[TokenSequence],
        cache: RowCache,
        *,
        is_again: bool = False,
        lost: Mapping[TokenSequence, SequenceError] | None = None,
    ) -> None:
        """Start at the first column; the rows' weights must have been decided.

        Args:
            rows: to read.
            cache: an empty one.
            is_again: keep the weights under which each token was read before.
            lost: rows that came with the others and cannot be weighed.
        """
        self.is_again = is_again
        self.start(rows, cache, lost)

    def start(
        self,
        rows: Sequence[TokenSequence],
        cache: RowCache,
        lost: Mapping[TokenSequence, SequenceError] | None = None,
    ) -> None:
        """Start at the first column with these rows and no others; arguments as above."""
        self.rows: list[TokenSequence] = []  # those that are read
        self.lost = dict(lost or {})  # those that cannot be, as the end of the reading will tell
        self.weights: list[Floats] = []  # of each row (T, N), or (1, N) for all T alike
        for row in rows:
            if failure := failure_of(partial(self._take, row), NOT_ROUTED):
                self.lost[row] = failure
        self.length = max((len(row.ids) for row in self.rows), default=1)
        self.pads = [self.length - len(row.ids) for row in self.rows]
        self.done = 0  # columns that have been read; the cache does not tell once it is the batch's
        self.cache = cache
        self.cache.expect(max((row.most_tokens for row in self.rows), default=1))
        self.copy: PrefixCopy | None = None  # for the prefixes, of a single row

    def _take(self, row: TokenSequence) -> None:
        """Read a row with the others, under weights that `prefill="causal"` makes here."""
        if self.is_again:
            weights = row.weights_again()
        else:
            weights = row.read_under = row.prompt_weights()
            row.read_after = row.prompt_comparison() if row.report.comparison else None
        self.weights.append(weights)
        self.rows.append(row)

    @property
    def members(self) -> list[TokenSequence]:
        """All rows of the reading, read or lost: each is told what has become of it."""
        return [*self.rows, *self.lost]

    @property
    def is_finished(self) -> bool:
        """Whether all columns have been read."""
        return self.done == self.length

    def ids(self, first: int, end: int) -> Tensor:
        """Return the token ids of some columns, (B, end - first)."""
        return torch.tensor([([0] * pad + row.ids)[first:end] for pad, row in zip(self.pads, self.rows, strict=True)])

    def weights_of(self, first: int, end: int) -> list[Floats]:
        """Return the weights of some columns, for each row (T, N), or (1, N) for all alike; padding has none."""
        return [
            each if len(each) == 1 else each[max(first - pad, 0) : max(end - pad, 1)]
            for pad, each in zip(self.pads, self.weights, strict=True)
        ]


def score_prompts(reading: Reading, first: int, logits: Tensor) -> None:
    """Score the tokens behind the columns from `first` on, given logits (B, T, V), for rows that ask.

    A SequenceError says that the model overflows.
    """
    for row, pad, each in zip(reading.rows, reading.pads, logits, strict=True):
        if row.report.prompt:
            begin = min(max(first, pad), first + len(each))  # the first column that is a token
            nexts = row.ids[begin - pad + 1 : first + len(each) - pad + 1] if begin >= pad else []
            followed = each[begin - first : begin - first + len(nexts)]  # (tokens, V)
            tops = likeliest(followed, [row.report.likeliest] * len(nexts))
            logprobs = score_tokens(followed, nexts)
            if not all(map(isfinite, logprobs)):
                raise SequenceError("the model overflows under these weights: its prompt has no log-probabilities.")
            row.prompt_scores += map(TokenScore, logprobs, tops)
