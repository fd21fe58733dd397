"""Continuous batching: sequences of many jobs share the steps of one engine, and join and leave between steps.

While sequences run, prompts are read in chunks (`treadle.serving.openai.pace`). Sequences of very different lengths run
in different batches: in one cache, the short ones would be padded to the longest. Everything here happens in the
engine's thread.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from treadle.common.errors import TreadleError
from treadle.engine.batch import Batch, Events, Reading
from treadle.engine.engine import Engine
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.sequence import SequenceError, TokenSequence
from treadle.routing.router import Router
from treadle.serving.openai.jobs import Job, Mail, News, NewTokens, Started
from treadle.serving.openai.kv_memory import KvMemory
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.pace import Pace, smoothed
from treadle.serving.openai.params import ServeParams

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

FREE_PADDING_TOKENS = 1024
"""A batch may have this much padding, or half as much as it has tokens."""


class EngineFailed(Exception):
    """A forward pass failed, and its sequences are lost."""


@dataclass(frozen=True)
class SequenceOwner:
    """The job of a row, the row's index in it, and when it came (seconds of the performance counter)."""

    job: Job
    index: int
    since: float = field(default_factory=time.perf_counter)


class Loop:
    """Holds the rows that wait, are read and run, and advances them by one step."""

    def __init__(
        self,
        engine: Engine,
        router_among: Callable[[frozenset[str] | None], Router],
        params: ServeParams,
        metrics: Metrics,
        pace: Pace | None = None,
    ) -> None:
        """Make a loop without rows.

        Args:
            engine: runs the rows.
            router_among: returns the router of some of the engine's adapters, by name; None = of all.
            params: the server's limits.
            metrics: count what happens.
            pace: sizes the chunks of prompts; None takes one that has measured nothing.
        """
        self._engine = engine
        self._router_among = router_among
        self._params = params
        self._metrics = metrics
        self._prefixes = PrefixCache(params.prefix_cache << 20) if params.prefix_cache else None
        self._memory = KvMemory(engine, params.kv_memory, params.prefix_cache)
        self._has_moved = False  # whether rows came or went since memory was shared out
        self._owners: dict[int, SequenceOwner] = {}  # by identity of a row
        self._waiting: deque[TokenSequence] = deque()
        self._reading: tuple[Batch, Reading] | None = None
        self._batches: list[Batch] = []
        self._mail: Mail = []
        self.post: Callable[[Mail], None] = deliver
        self.on_unused: Callable[[], None] = _do_nothing  # called when a removed adapter loses its last row
        self._pace = pace or Pace(params.prompt_chunk)
        self.sequence_seconds = 1.0  # running mean
        self.num_ended = 0  # sequences, ever

    @property
    def is_busy(self) -> bool:
        """Whether any row waits, is read or runs."""
        return bool(self._owners)

    def jobs(self) -> list[Job]:
        """Return the jobs that are not done."""
        return list({id(owner.job): owner.job for owner in self._owners.values()}.values())

    def accept(self, job: Job) -> None:
        """Make the job's rows, or tell the job why they cannot be made."""
        work = job.work
        if job.is_cancelled:
            self.num_ended += job.num_sequences
            return
        try:
            job.rows = self._engine.new_rows(
                work.prompts,
                sampling=work.sampling,
                routing=work.routing,
                report=work.report,
                router=self._router_among(work.adapters),
            )
            self._memory.check(job.rows)
        except Exception as error:  # no request may end the thread
            if not isinstance(error, TreadleError):
                logger.exception("a request could not be started")
                error = EngineFailed("the request could not be started; the server's log says why.")
            self.num_ended += job.num_sequences
            self._tell(job, error)
            return
        for index, row in enumerate(job.rows):
            row.owner = work.owner
            self._owners[id(row)] = SequenceOwner(job, index)
        self._engine.adapters.hold(job.rows)
        self._waiting += job.rows
        self._tell(job, Started())

    def give_up(self, job: Job) -> None:
        """Drop a job's rows, wherever they are."""
        rows = [row for row in job.rows if self._owners.pop(id(row), None)]
        for batch in self._batches:
            batch.leave(rows)
        self._batches = [batch for batch in self._batches if batch.rows]
        self._waiting = deque(row for row in self._waiting if row not in rows)
        if self._reading is not None and not any(id(row) in self._owners for row in self._reading[1].members):
            self._end_reading(self._reading[0], self._reading[1].members, None)
        # with others, they leave and let go of their adapters when all have been read
        still_read = self._reading[1].members if self._reading is not None else []
        self._release([row for row in rows if row not in still_read])
        self.num_ended += len(rows)
        self._has_moved = True

    def advance(self) -> None:
        """Give every running row its next token, and read the next chunk of a prompt."""
        if self._prefixes:
            self._prefixes.forget(self._engine.blend.adapters)
        events: Events = []
        num_running = self._num_running
        self._share_memory()
        started = time.perf_counter()
        for batch in list(self._batches):
            events += self._attempt(batch, batch.rows, batch.step, spoils=True) or []
        if num_running:
            seconds = time.perf_counter() - started
            self._pace.observe_step(seconds)
            self._metrics.observe_step(seconds, num_running)
        is_new = self._reading is None
        if is_new:
            self._begin()
        if self._reading is not None and not (is_new and self._reading[1].done):  # to copy a prefix took its time
            events += self._read_on(*self._reading)
        self._deliver(events)
        self._batches = [batch for batch in self._batches if batch.rows]
        kept = self._prefixes.num_bytes if self._prefixes else 0
        self._metrics.set_load(self._num_running, len(self._waiting), kept)
        self._metrics.set_kv_memory(self._memory.used(self._batches, self._reading), self._memory.total)
        self.flush()

    def _share_memory(self) -> None:
        if self._has_moved:
            self._memory.allow(self._batches, self._reading)
            self._has_moved = False

    def flush(self) -> None:
        """Post the news of all jobs at once: to wake another thread costs more than a token."""
        mail, self._mail = self._mail, []
        if mail:
            self.post(mail)

    def _tell(self, job: Job, news: News) -> None:
        self._mail.append((job, news))

    @property
    def _num_running(self) -> int:
        return sum(len(batch.rows) for batch in self._batches)

    def _begin(self) -> None:
        """Begin to read the prompts of the rows that wait longest: several, if one chunk holds them."""
        free = self._params.max_batch - self._num_running
        if not self._waiting or free < 1:
            return
        group = [self._waiting.popleft()]
        chunk = self._pace.chunk_tokens(num_running=self._num_running, num_waiting=1 + len(self._waiting))
        longest = len(group[0].ids)
        while self._waiting and len(group) < free and not group[0].report.prompt:
            longest = max(longest, len(self._waiting[0].ids))
            if longest * (len(group) + 1) > chunk or longest > self._params.prompt_chunk // 2:
                break  # a long one is read alone: its beginning may be known, and it would pad the others
            if self._waiting[0].report.prompt:
                break
            group.append(self._waiting.popleft())
        batch = self._batch_for(max(len(row.ids) for row in group))
        while group and not self._memory.has_room(self._batches, batch, group):
            self._waiting.appendleft(group.pop())
        if not group:
            return  # until rows that end make room
        reading = self._attempt(batch, group, lambda: batch.begin(group), spoils=False)
        self._reading = (batch, reading) if reading is not None else None
        self._has_moved = True
        self._share_memory()

    def _batch_for(self, length: int) -> Batch:
        """Return the batch that a row of `length` tokens pads least, or a new one."""
        best = min(self._batches, key=lambda batch: batch.padding_with(length)[1], default=None)
        if best is not None:
            tokens, padding = best.padding_with(length)
            if padding <= max(FREE_PADDING_TOKENS, tokens // 2):
                return best
        return self._engine.new_batch(prefixes=self._prefixes)

    def _read_on(self, batch: Batch, reading: Reading) -> Events:
        """Read one chunk of prompts; after the last chunk their rows run, but for those that are read again."""
        members, rows = reading.members, reading.rows
        # several prompts are only begun if a chunk holds them
        num_columns = reading.length if len(rows) > 1 else self._pace.chunk_tokens(num_running=self._num_running)
        before, length = reading.done, reading.length
        started = time.perf_counter()
        is_last = before + num_columns >= length
        events = self._attempt(batch, members, lambda: batch.read(reading, num_columns), spoils=is_last)
        if events is None:
            return []
        is_again = reading.rows is not rows  # it has begun anew with those that are read again
        seconds, num_columns = time.perf_counter() - started, (length if is_again else reading.done) - before
        self._pace.observe_chunk(num_columns * len(rows), seconds, num_running=self._num_running)
        if is_again or reading.is_finished:
            self._metrics.count_prompts([row for row in rows if not is_again or row not in reading.rows])
            self._end_reading(batch, members, reading if is_again else None)
        return events

    def _release(self, rows: Sequence[TokenSequence]) -> None:
        if self._engine.adapters.release(rows):
            self.on_unused()

    def _end_reading(self, batch: Batch, members: Sequence[TokenSequence], again: Reading | None) -> None:
        """Let the rows of a reading run, but for those that are read `again`, and drop those given up meanwhile."""
        self._reading = (batch, again) if again is not None else None
        self._has_moved = True
        ended = [row for row in members if again is None or row not in again.members]
        given_up = [row for row in ended if id(row) not in self._owners]
        batch.leave(given_up)
        self._release(given_up)
        if batch.rows and batch not in self._batches:
            self._batches.append(batch)

    def _attempt(
        self, batch: Batch, rows: Sequence[TokenSequence], run: Callable[[], Result], *, spoils: bool
    ) -> Result | None:
        """Run a part of a step. If it fails, its rows are lost; with `spoils`, the whole batch is lost."""
        lost = [*rows, *(batch.rows if spoils else ())]
        try:
            result = run()
        except Exception:  # out of memory, a damaged cache: whatever it is must not end the thread
            logger.exception("a forward pass failed; %d sequences are lost", len(lost))
        else:
            self._metrics.router.inc(batch.route_seconds)
            batch.route_seconds = 0.0
            return result
        if spoils:
            self._batches = [other for other in self._batches if other is not batch]
            if self._reading is not None and self._reading[0] is batch:
                self._reading = (self._engine.new_batch(prefixes=self._prefixes), self._reading[1])
        jobs = {id(owner.job): owner.job for row in lost if (owner := self._owners.get(id(row)))}
        for job in jobs.values():
            self._tell(job, EngineFailed("the forward pass failed; the server's log says why."))
            self.give_up(job)
        return None

    def _deliver(self, events: Events) -> None:
        """Tell each job its new tokens, and release finished rows."""
        news: dict[int, tuple[Job, NewTokens]] = {}
        finished: list[TokenSequence] = []
        for row, event in events:
            owner = self._owners.get(id(row))
            if owner is None:
                continue  # given up
            if isinstance(event, SequenceError):
                self._end(owner, event)
                continue
            news.setdefault(id(owner.job), (owner.job, []))[1].append((owner.index, event))
            if event.finish_reason:
                finished.append(row)
        finished = [row for row in finished if id(row) in self._owners]  # not given up since
        for row in finished:
            owner = self._owners.pop(id(row))
            self.sequence_seconds = smoothed(self.sequence_seconds, time.perf_counter() - owner.since)
            self._metrics.count_row(row)
        self._release(finished)
        self._has_moved = self._has_moved or bool(finished)
        self.num_ended += len(finished)
        for job, tokens in news.values():
            self._tell(job, tokens)

    def _end(self, owner: SequenceOwner, failure: SequenceError) -> None:
        """Tell a job which of its rows failed and why; the log has the whole error."""
        why = str(failure)
        if failure.__cause__ is not None:
            logger.error("a sequence cannot be computed", exc_info=failure.__cause__)
            why = "the forward pass failed; the server's log says why."
        named = f"choice {owner.index}: " if owner.job.num_sequences > 1 else ""
        self._tell(owner.job, EngineFailed(named + why))
        self.give_up(owner.job)


def deliver(mail: Mail) -> None:
    """Tell each job its news."""
    for job, news in mail:
        job.tell(news)


def _do_nothing() -> None:
    pass
