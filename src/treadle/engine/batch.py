"""The sequences that share a forward pass, and their key-value cache: the only place where the model is stepped.

Rows join and leave between steps. A prompt is read at once or in chunks: until it is read to its end it has a cache of
its own, and the rows that run do not notice. A pass that fails, or that gives a row no finite logits, is run again in
halves until the row to blame is found: this row ends with its own error, and the others get their tokens.
"""

import time
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from treadle.engine.decisions import is_to_reread, put_states, update_weights
from treadle.engine.draws import Draw, Draws, are_whole, drawn, failure_of
from treadle.engine.kv_cache import CacheSizes, RowCache
from treadle.engine.prefix_cache import PrefixCache, PrefixCopy, PrefixText
from treadle.engine.readings import Reading, score_prompts
from treadle.engine.runners.passes import PassInput
from treadle.engine.runners.runner import Runner
from treadle.engine.sampling import new_generator
from treadle.engine.sequence import SequenceError, TokenEvent, TokenSequence
from treadle.lora.blend import Blend
from treadle.routing.centroids import Floats

Events = list[tuple[TokenSequence, TokenEvent | SequenceError]]
"""Results of a step: each row has one more token, or an error that ended it."""


class Batch:
    """Rows that share a forward pass, and their key-value cache."""

    def __init__(
        self,
        runner: Runner,
        blend: Blend,
        end_ids: frozenset[int],
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.rows: list[TokenSequence] = []
        self._runner = runner
        self._blend = blend
        self._end_ids = end_ids
        self.cache = runner.new_cache()
        self._prefixes = None if runner.is_recurrent else prefixes
        self.route_seconds = 0.0  # spent on weights so far

    @torch.inference_mode()
    def join(self, rows: Sequence[TokenSequence]) -> Events:
        """Read the prompts of new rows and give each its first token."""
        reading = self.begin(rows)
        events = self.read(reading)
        while not reading.is_finished:  # some prompts are read again
            events += self.read(reading)
        return events

    @torch.inference_mode()
    def begin(self, rows: Sequence[TokenSequence]) -> Reading:
        """Start to read the prompts of new rows; `read` goes on. What is known of a single row's prompt is not read."""
        for row in rows:
            row.generator = new_generator(row.sampling, self._runner.device)
        _, lost = self._route(rows)
        reading = Reading([row for row in rows if row not in lost], self._runner.new_cache(), lost=lost)
        if self._prefixes and len(reading.rows) == 1:
            (row,) = reading.rows
            reading.copy = PrefixCopy(reading.length, self._prefixes.max_bytes)
            if not row.report.prompt:
                num_unread = max(row.router.states.spans) if row.trail and row.router.states else 1
                reading.done = row.reused = self._prefixes.fill(reading.cache, self._text(row), num_unread)
        return reading

    @torch.inference_mode()
    def read(self, reading: Reading, num_columns: int | None = None) -> Events:
        """Read on, at most `num_columns` of each row; with the last the rows join and get their first tokens.

        Rows whose states move their weights far do not join yet: the reading begins anew with them. A reading that is
        finished cannot go on.
        """
        assert not reading.is_finished
        if not self._runner.reads_in_parts or (self._runner.is_recurrent and any(reading.pads)):
            num_columns = None  # some models leave padding out of their states in the first pass alone
        num_columns = num_columns or reading.length
        if reading.done + num_columns >= reading.length:
            return self._advance(self._finish(reading, num_columns))
        failure = failure_of(lambda: self._read_chunk(reading, num_columns))
        return self._advance(self._settle(reading, dict.fromkeys(reading.rows, failure))) if failure else []

    @torch.inference_mode()
    def step(self) -> Events:
        """Give every row its next token."""
        changed, lost = self._route(self.rows)
        if lost:
            self._keep([row for row in self.rows if row not in lost])
        again = [row for row in changed if row.routing.past == "recompute"]
        grown = [row for row in self.rows if row not in again and self._has_grown(row)]
        if again or grown:
            self._keep([row for row in self.rows if row not in again and row not in grown])
        found = self._read_newest() | lost
        if again:
            found |= self._read_whole(again)
        if grown:
            found |= self._read_whole(grown, is_again=True)
        return self._advance(found)

    @torch.inference_mode()
    def leave(self, rows: Sequence[TokenSequence]) -> None:
        """Drop rows, finished or not; the others do not notice."""
        self._keep([row for row in self.rows if row not in rows])

    @torch.inference_mode()
    def measure(self) -> CacheSizes:
        """Measure what a row takes of a cache, by reading one token."""
        cache = self._runner.new_cache()
        self._forward([], torch.zeros(1, 1, dtype=torch.long), [0], cache, [])
        num_bytes = sum(each[:1, :, :1].nbytes for pair in cache.buffers() for each in pair)
        return CacheSizes(num_bytes, cache.state_bytes, len(cache.buffers()))

    def padding_with(self, length: int) -> tuple[int, int]:
        """Return how many tokens, and how many columns of padding, there are if a row of `length` tokens joins."""
        lengths = [*(len(row.ids) for row in self.rows), length]
        return sum(lengths), len(lengths) * max(lengths) - sum(lengths)

    def is_reread(self, row: TokenSequence) -> bool:
        """Whether the row's text will be read anew while it is generated."""
        if row.routing.past == "recompute":
            return row.routing.every is not None
        return self._runner.rope is not None and row.prompt_tokens <= self._runner.rope.limit < row.most_tokens

    def _has_grown(self, row: TokenSequence) -> bool:
        """Whether the newest token makes the text so long that all of it is rotated otherwise, and read again."""
        return self._runner.rope is not None and len(row.ids) == self._runner.rope.limit + 1

    def _route(self, rows: Sequence[TokenSequence]) -> tuple[list[TokenSequence], dict[TokenSequence, SequenceError]]:
        started = time.perf_counter()
        routed = update_weights(rows)
        self.route_seconds += time.perf_counter() - started
        return routed

    def _advance(self, found: Draws) -> Events:
        """Give each row the token that was found for it; rows that have ended leave."""
        events: Events = []
        for row, draw in found.items():
            if isinstance(draw, SequenceError):
                row.failure = draw
                events.append((row, draw))
            else:
                event = row.accept(draw.token_id, draw.logprob, draw.token_id in self._end_ids, draw.likeliest)
                events.append((row, event))
        if any(row.is_finished for row in found):
            for index, row in enumerate(self.rows):
                if row.is_finished and row.failure is None:
                    self._remember(row, self.cache, index)
            self._keep([row for row in self.rows if not row.is_finished])
        return events

    def _finish(self, reading: Reading, num_columns: int) -> Draws:
        """Read the last columns of a reading and let its rows join the running ones; in halves where that fails."""

        def run() -> Tensor:
            logits = self._read_on(reading, num_columns)
            self._append(reading)
            return logits

        found = self._settle(reading, drawn(reading.rows, run) if reading.rows else {})
        again = [row for row in reading.rows if isinstance(found[row], Draw) and is_to_reread(row)]
        if again:
            self._keep([row for row in self.rows if row not in again])
            for row in again:
                row.generator = new_generator(row.sampling, self._runner.device)  # nothing has been drawn
                row.prompt_scores.clear()
                row.reused = 0
                del found[row]
            reading.start(again, self._runner.new_cache())
            if self._prefixes and len(reading.rows) == 1:
                reading.copy = PrefixCopy(reading.length, self._prefixes.max_bytes)
        return found

    def _settle(self, reading: Reading, found: Draws) -> Draws:
        """Let rows of a reading without a token leave; read them again where others may be to blame."""
        reading.done = reading.length
        found |= reading.lost
        bad = [row for row in reading.rows if isinstance(found[row], SequenceError)]
        for index, row in enumerate(reading.rows):
            if row not in bad and not row.events:
                self._remember(row, reading.cache, index, reading.copy)
        if not bad:
            return found
        self._keep([row for row in self.rows if row not in bad])
        if len(reading.rows) > 1:
            halves = [bad] if len(bad) < len(reading.rows) else [bad[: len(bad) // 2], bad[len(bad) // 2 :]]
            for half in halves:
                found |= self._read_whole(half, is_again=reading.is_again)
        return found

    def _read_whole(self, rows: Sequence[TokenSequence], *, is_again: bool = False) -> Draws:
        """Read the texts of rows from their beginning, and let the rows join; `is_again` as `Reading` takes it."""
        for row in rows:
            if not row.events:
                row.prompt_scores.clear()
        reading = Reading(rows, self._runner.new_cache(), is_again=is_again)
        found = self._finish(reading, reading.length)
        while not reading.is_finished:  # some prompts are read again
            found |= self._finish(reading, reading.length)
        return found

    def _read_newest(self) -> Draws:
        """Read the newest token of every row; where that fails, find out whose fault it is."""
        if not self.rows:
            return {}
        length = self.cache.length
        found = drawn(self.rows, lambda: self._read_newest_of(self.rows, self.cache))
        if len(self.rows) > 1 and not are_whole(found):
            if self._runner.is_recurrent:
                return found | self._read_anew([row for row in self.rows if isinstance(found[row], SequenceError)])
            self.cache.cut(length)
            found |= self._shed()
            length = self.cache.length
            found |= self._halve(0, len(self.rows), found)
            self.cache.cut(length + 1)
        for row in self.rows:
            row.num_read += 1
        return found

    def _read_anew(self, bad: Sequence[TokenSequence]) -> Draws:
        """Read the whole texts of rows without a token again, because a failed pass over states cannot be undone."""
        for row in self.rows:
            row.num_read += 1
        self._keep([row for row in self.rows if row not in bad])
        return self._read_whole(bad, is_again=True)

    def _halve(self, first: int, end: int, found: Draws) -> Draws:
        """Read the newest token of each half of the rows from `first` to before `end`, and of halves of these.

        They write into the batch's own cache, one column behind those that it shows. Where all rows of a half were
        `found`, nothing is read.
        """
        middle = (first + end) // 2
        for start, stop in ((first, middle), (middle, end)):
            rows = self.rows[start:stop]
            if are_whole({row: found[row] for row in rows}):
                continue
            part = self.cache.part(start, stop)
            found = found | drawn(rows, partial(self._read_newest_of, rows, part), found)
            if len(rows) > 1 and not are_whole({row: found[row] for row in rows}):
                found = self._halve(start, stop, found)
        return found

    def _shed(self) -> Draws:
        """Let the longest rows go until there is memory for one more column of the others; return their errors."""
        lost: Draws = {}
        while failure := failure_of(lambda: self.cache.make_room(1)):
            longest = max(self.rows, key=lambda row: len(row.ids))
            lost[longest] = failure
            self._keep([row for row in self.rows if row is not longest])
        return lost

    def _read_chunk(self, reading: Reading, num_columns: int) -> None:
        """Read columns of a reading that are not its last."""
        self._read_on(reading, num_columns)
        if reading.copy:
            reading.copy.extend(reading.cache)

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
            score_prompts(reading, first, logits)
        return logits[:, -1]

    def _append(self, reading: Reading) -> None:
        """Add the rows of a finished reading to the running ones; its cache may be the batch's from then on."""
        if self.rows:
            self.cache.expect(max(row.most_tokens for row in [*self.rows, *reading.rows]))
            self.cache.merge(reading.cache)
        else:
            self.cache = reading.cache
        self.rows = [*self.rows, *reading.rows]
        for row in reading.rows:
            row.num_read = len(row.ids)

    def _read_newest_of(self, rows: Sequence[TokenSequence], cache: RowCache) -> Tensor:
        """Read the newest token of rows into their cache; return the logits (B, V)."""
        ids = torch.tensor([row.ids[-1:] for row in rows])
        pads = [cache.length - row.num_read for row in rows]
        return self._forward(rows, ids, pads, cache, [row.weights[None] for row in rows])[:, -1]

    def _forward(
        self,
        rows: Sequence[TokenSequence],
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
        given = PassInput(
            ids=ids,
            pads=pads,
            weights=self._stacked(rows, weights, ids.shape[1]),
            combines=[row.routing.combine for row in rows],
            cache=cache,
            among=[row.router.names for row in rows],
            lengths=[len(row.ids) for row in rows] or [1],
            num_logits=num_logits,
            layer=next((row.router.states.layer for row in rows if row.trail and row.router.states), None),
        )
        logits, hidden = self._runner.run(given)
        if hidden is not None:
            put_states(rows, pads, cache.length, hidden)
        return logits

    def _stacked(self, rows: Sequence[TokenSequence], weights: Sequence[Floats], num_tokens: int) -> Floats | None:
        """Return the rows' weights (B, 1 or T, N of the blend); None where no adapter acts."""
        if not any(each.any() for each in weights):
            return None
        length = num_tokens if any(len(each) > 1 for each in weights) else 1
        names = self._blend.names
        stacked = np.zeros((len(rows), length, len(names)), np.float32)
        for index, (row, each) in enumerate(zip(rows, weights, strict=True)):
            start = max(0, length - len(each)) if len(each) > 1 else 0
            stacked[index, start:, _columns(names, row.router.names)] = each.T
        return stacked

    def _keep(self, rows: Sequence[TokenSequence]) -> None:
        """Drop the other rows; of those that stay, the last ones move to where others were."""
        kept = [place for place, row in enumerate(self.rows) if row in rows]
        if not kept:
            self.rows, self.cache = [], self._runner.new_cache()
        elif len(kept) < len(self.rows):
            behind = [place for place in kept if place >= len(kept)]
            order = [place if place in kept else behind.pop() for place in range(len(kept))]
            self.rows = [self.rows[place] for place in order]
            longest = max(row.num_read for row in self.rows)
            self.cache.keep(order, self.cache.length - longest)

    def _text(self, row: TokenSequence) -> PrefixText:
        """Return the tokens of a row that have been read, or are about to be, with their weights."""
        read = len(row.ids) - bool(row.events)
        return PrefixText.of(row, self._blend, "long" if self._runner.rope and self._runner.rope.is_long(read) else "")

    def _remember(self, row: TokenSequence, cache: RowCache, index: int, copy: PrefixCopy | None = None) -> None:
        """Keep the keys and values of the row at `index` of a cache for rows that begin alike."""
        if self._prefixes and (not row.events or row.is_like_prompt):
            self._prefixes.store(self._text(row), cache, index, copy)


@lru_cache(maxsize=256)
def _columns(all_names: tuple[str, ...], names: tuple[str, ...]) -> list[int]:
    """Return where each of `names` is in `all_names`."""
    places = {name: index for index, name in enumerate(all_names)}
    return [places[name] for name in names]
