"""The sequences that share a forward pass, and their key-value cache: the only place where the model is stepped.

Rows join and leave between steps. A prompt is read at once or in chunks: until it is read to its end it has a cache of
its own, and the rows that run do not notice.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from treadle.blend import Blend
from treadle.cache import RowCache
from treadle.centroids import Floats
from treadle.chunk_step import MOST_TOKENS, read_chunk
from treadle.fast_step import FastStep
from treadle.graph_step import GraphStep
from treadle.params import Combine
from treadle.prefixes import Copy, PrefixCache, Text
from treadle.rope import LengthRope
from treadle.rows import Row, TokenEvent, TokenScore, route
from treadle.sampling import likeliest, new_generator, sample, score_tokens
from treadle.transformers_names import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Events = list[tuple[Row, TokenEvent]]


class Reading:
    """Rows whose texts are being read into a cache of their own, padded on the left to the longest."""

    def __init__(self, rows: Sequence[Row], *, is_again: bool = False) -> None:
        """Start at the first column; the rows' weights must have been decided.

        `is_again` keeps the weights under which each token was read before.
        """
        self.rows = list(rows)
        self.length = max(len(row.ids) for row in rows)
        self.pads = [self.length - len(row.ids) for row in rows]
        # (T, N) or (1, N) for all T alike
        self.weights = [row.weights_again() if is_again else row.prompt_weights() for row in rows]
        self.done = 0  # columns that have been read; the cache does not tell once it is the batch's
        self.cache = RowCache()
        self.copy: Copy | None = None  # for the prefixes, of a single row
        for row, weights in zip(() if is_again else rows, self.weights, strict=False):
            row.read_under = weights

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


class Batch:
    """Rows that share a forward pass, and their key-value cache."""

    def __init__(
        self,
        model: "PreTrainedModel",
        blend: Blend,
        end_ids: frozenset[int],
        fast_step: FastStep | GraphStep | None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._blend = blend
        self._end_ids = end_ids
        self._cache = RowCache()
        self._fast_step = fast_step
        self._prefixes = prefixes
        self._cache_argument = cache_argument(model)
        self._rope = LengthRope.of(model)
        self.route_seconds = 0.0  # spent on weights so far

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> Events:
        """Read the prompts of new rows and give each its first token."""
        return self.read(self.begin(rows))

    @torch.inference_mode()
    def begin(self, rows: Sequence[Row]) -> Reading:
        """Start to read the prompts of new rows; `read` goes on. What is known of a single row's prompt is not read."""
        for row in rows:
            row.generator = new_generator(row.sampling, self._model.device)
        self._route(rows)
        for row in rows:
            row.read_after = row.prompt_comparison() if row.report.comparison else None
        reading = Reading(rows)
        if self._prefixes and len(rows) == 1:
            reading.copy = Copy(reading.length, self._prefixes.max_bytes)
            if not rows[0].report.prompt:
                reading.done = rows[0].reused = self._prefixes.fill(reading.cache, self._text(rows[0]))
        return reading

    @torch.inference_mode()
    def read(self, reading: Reading, num_columns: int | None = None) -> Events:
        """Read on, at most `num_columns` of each row; with the last the rows join and get their first tokens.

        A reading that is finished cannot go on.
        """
        assert not reading.is_finished
        logits = self._read_on(reading, num_columns or reading.length)
        if not reading.is_finished:
            if reading.copy:
                reading.copy.extend(reading.cache)
            return []
        for index, row in enumerate(reading.rows):
            self._remember(row, reading.cache, index, reading.copy)
        self._append(reading)
        return self._advance(reading.rows, logits)

    @torch.inference_mode()
    def step(self) -> Events:
        """Give every row its next token."""
        changed = self._route(self.rows)
        again = [row for row in changed if row.routing.past == "recompute"]
        grown = [row for row in self.rows if row not in again and self._has_grown(row)]
        if again or grown:
            self._keep([row for row in self.rows if row not in again and row not in grown])
        going = list(self.rows)
        logits = [self._read_newest()] if going else []
        for rows, is_again in ((again, False), (grown, True)):
            if rows:
                reading = Reading(rows, is_again=is_again)
                logits.append(self._read_on(reading, reading.length))
                self._append(reading)
        return self._advance([*going, *again, *grown], torch.cat(logits))

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Drop rows, finished or not; the others do not notice."""
        self._keep([row for row in self.rows if row not in rows])

    def padding_with(self, length: int) -> tuple[int, int]:
        """Return how many tokens, and how many columns of padding, there are if a row of `length` tokens joins."""
        lengths = [*(len(row.ids) for row in self.rows), length]
        return sum(lengths), len(lengths) * max(lengths) - sum(lengths)

    def _has_grown(self, row: Row) -> bool:
        """Whether the newest token makes the text so long that all of it is rotated otherwise, and read again."""
        return self._rope is not None and len(row.ids) == self._rope.limit + 1

    def _route(self, rows: Sequence[Row]) -> list[Row]:
        started = time.perf_counter()
        changed = route(rows)
        self.route_seconds += time.perf_counter() - started
        return changed

    def _advance(self, rows: Sequence[Row], logits: Tensor) -> Events:
        """Sample the next token of each row from logits (B, V); finished rows leave."""
        tokens, logprobs = sample(logits, [row.sampling for row in rows], [row.generator for row in rows])
        counts = [row.report.likeliest for row in rows]
        tops = likeliest(logits, counts) if any(counts) else [()] * len(rows)
        events = [
            (row, row.accept(token, logprob, token in self._end_ids, top))
            for row, token, logprob, top in zip(rows, tokens, logprobs, tops, strict=True)
        ]
        if any(row.is_finished for row in rows):
            for index, row in enumerate(self.rows):
                if row.is_finished:
                    self._remember(row, self._cache, index)
            self._keep([row for row in self.rows if not row.is_finished])
        return events

    def _read_on(self, reading: Reading, num_columns: int) -> Tensor:
        """Read the next columns of a reading; return the logits (B, V) after them."""
        first = reading.done
        end = min(first + num_columns, reading.length)
        is_scored = any(row.report.prompt and not row.events for row in reading.rows)
        logits = self._forward(
            reading.rows,
            reading.ids(first, end),
            reading.pads,
            reading.cache,
            reading.weights_of(first, end),
            end - first if is_scored else 1,
        )  # (B, T or 1, V)
        reading.done = end
        if is_scored:
            _score_prompts(reading, first, logits)
        return logits[:, -1]

    def _append(self, reading: Reading) -> None:
        """Add the rows of a finished reading to the running ones; its cache may be the batch's from then on."""
        if self.rows:
            self._cache.merge(reading.cache)
        else:
            self._cache = reading.cache
        self.rows = [*self.rows, *reading.rows]

    def _read_newest(self) -> Tensor:
        """Read the newest token of every row; return the logits (B, V)."""
        ids = torch.tensor([row.ids[-1:] for row in self.rows])
        pads = [self._cache.length + 1 - len(row.ids) for row in self.rows]
        return self._forward(self.rows, ids, pads, self._cache, [row.weights[None] for row in self.rows])[:, -1]

    def _forward(
        self,
        rows: Sequence[Row],
        ids: Tensor,
        pads: Sequence[int],
        cache: RowCache,
        weights: Sequence[Floats],
        num_logits: int = 1,
    ) -> Tensor:
        """Run the model on ids (B, T), whose rows have `pads` columns of padding before them in the whole text.

        Returns:
            the logits (B, K, V) of the last `num_logits` = K columns.
        """
        device = self._model.device
        start, new = cache.length, ids.shape[1]
        stacked = self._stacked(rows, weights, new)
        combines: list[Combine] = [row.routing.combine for row in rows]
        step = self._fast_step if start and new == 1 else None
        is_chunk = start and 1 < new <= MOST_TOKENS and len(rows) == num_logits == 1
        if isinstance(step, GraphStep) and step.knows(stacked, combines):
            return step(ids[:, 0], pads, stacked, cache)[:, None]
        left = torch.tensor(pads)[:, None]  # (B, 1)
        positions = (torch.arange(start, start + new) - left).clamp(min=0)  # (B, T)
        mask = (torch.arange(start + new) >= left).long().to(device) if any(pads) else None  # (B, L)
        among = [row.router.names for row in rows]
        rope = self._rope.using([len(row.ids) for row in rows]) if self._rope else nullcontext()
        with self._blend.using(stacked, combines, among), rope:
            if isinstance(step, FastStep):
                return step(ids, positions, mask, cache)[:, None]
            if isinstance(self._fast_step, FastStep) and is_chunk:
                return read_chunk(self._model, ids, cache)[:, None]
            output = self._model(
                input_ids=ids.to(device),
                attention_mask=mask,
                position_ids=positions.to(device),
                use_cache=True,
                logits_to_keep=num_logits,
                **{self._cache_argument: cache},
            )
        return output.logits[:, -num_logits:]  # (B, K, V)

    def _stacked(self, rows: Sequence[Row], weights: Sequence[Floats], num_tokens: int) -> Floats | None:
        """Return the rows' weights as (B, 1 or T, N of the blend); None where no adapter acts on any row."""
        if not any(each.any() for each in weights):
            return None
        length = num_tokens if any(len(each) > 1 for each in weights) else 1
        names = self._blend.names
        stacked = np.zeros((len(rows), length, len(names)), np.float32)
        for index, (row, each) in enumerate(zip(rows, weights, strict=True)):
            start = max(0, length - len(each)) if len(each) > 1 else 0
            stacked[index, start:, _columns(names, row.router.names)] = each.T
        return stacked

    def _keep(self, rows: Sequence[Row]) -> None:
        """Drop the other rows; of those that stay, the last ones move to where others were."""
        kept = [place for place, row in enumerate(self.rows) if row in rows]
        if not kept:
            self.rows, self._cache = [], RowCache()
        elif len(kept) < len(self.rows):
            behind = [place for place in kept if place >= len(kept)]
            order = [place if place in kept else behind.pop() for place in range(len(kept))]
            self.rows = [self.rows[place] for place in order]
            longest = max(len(row.ids) for row in self.rows) - 1  # the newest token is not in the cache yet
            self._cache.keep(order, self._cache.length - longest)

    def _text(self, row: Row) -> Text:
        """Return the tokens of a row that have been read, or are about to be, with their weights."""
        read = len(row.ids) - bool(row.events)
        return Text.of(row, self._blend, "long" if self._rope and self._rope.is_long(read) else "")

    def _remember(self, row: Row, cache: RowCache, index: int, copy: Copy | None = None) -> None:
        """Keep the keys and values of the row at `index` of a cache for rows that begin alike."""
        if self._prefixes and (not row.events or row.is_like_prompt):
            self._prefixes.store(self._text(row), cache, index, copy)


def _score_prompts(reading: Reading, first: int, logits: Tensor) -> None:
    """Score the tokens that follow the columns from `first` on, whose logits are (B, T, V), where rows ask for it."""
    for row, pad, each in zip(reading.rows, reading.pads, logits, strict=True):
        if row.report.prompt:
            begin = min(max(first, pad), first + len(each))  # the first column that is a token
            nexts = row.ids[begin - pad + 1 : first + len(each) - pad + 1] if begin >= pad else []
            followed = each[begin - first : begin - first + len(nexts)]  # (tokens, V)
            tops = likeliest(followed, [row.report.likeliest] * len(nexts))
            row.prompt_scores += map(TokenScore, score_tokens(followed, nexts), tops)


@lru_cache(maxsize=256)
def _columns(all_names: tuple[str, ...], names: tuple[str, ...]) -> list[int]:
    """Return where each of `names` is in `all_names`."""
    places = {name: index for index, name in enumerate(all_names)}
    return [places[name] for name in names]
