"""Continuous batching: one thread owns the engine, and requests join and leave between its steps.

First come, first served. While rows run, prompts are read in chunks whose time is a small multiple of a step's, so that
running streams do not stall. Rows of very different lengths are kept in batches of their own: in one cache, the short
ones would be padded to the longest.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from treadle.batch import Batch, Events, Reading
from treadle.errors import TreadleError
from treadle.generate import Engine
from treadle.prefixes import PrefixCache
from treadle.rows import Row
from treadle.server.jobs import Job, Started, Tokens
from treadle.server.metrics import Metrics
from treadle.server.params import ServeParams
from treadle.server.routers import Routers

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

STEPS_A_CHUNK = 2.5
"""A chunk of a prompt may take this many step times while rows run."""
SMALLEST_CHUNK = 8
"""Tokens; a prompt gets on whatever a step costs."""
FREE_PADDING = 4096
"""Tokens of padding in a batch that are cheaper than another batch."""
SMOOTHING = 0.3
"""Weight of the newest measurement in a running mean."""


class Busy(TreadleError):
    """The queue is full; `seconds` is when it is worth trying again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"the queue is full: {waiting} sequences are waiting. Try again in {seconds} s.")
        self.seconds = seconds


class Stopping(TreadleError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: send the request to another one, or later.")


class EngineFailed(Exception):
    """A forward pass failed; the rows that it ran are lost."""


@dataclass(frozen=True)
class Seat:
    """Whose a row is, which of its sequences, and since when (seconds of the performance counter)."""

    job: Job
    index: int
    since: float = field(default_factory=time.perf_counter)


class Scheduler:
    """Runs jobs on an engine in a thread of its own."""

    def __init__(self, engine: Engine, routers: Routers, params: ServeParams, metrics: Metrics) -> None:
        self.engine = engine
        self._routers = routers
        self._params = params
        self._metrics = metrics
        self._changed = threading.Condition()
        self._inbox: list[Job] = []  # guarded by _changed, like the five below
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._num_unfinished = 0  # sequences
        self._has_cancelled = False
        self._is_draining = False
        self._is_stopped = False
        self._seats: dict[int, Seat] = {}  # by identity of a row; from here on of the engine's thread alone
        self._waiting: deque[Row] = deque()
        self._reading: tuple[Batch, Reading] | None = None
        self._batches: list[Batch] = []
        self._prefixes = PrefixCache(params.prefix_cache << 20) if params.prefix_cache else None
        self._step_seconds = 0.0  # running means
        self._token_seconds = 0.0  # of a prompt that is read
        self._sequence_seconds = 1.0  # of a sequence, from its first token to its last
        self._thread = threading.Thread(target=self._run, name="treadle-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether jobs are accepted and the engine's thread lives."""
        return self._thread.is_alive() and not self._is_draining

    @property
    def num_unfinished(self) -> int:
        """How many sequences run or wait."""
        return self._num_unfinished

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Busy: as many sequences wait already as may.
            Stopping: the server is shutting down.
        """
        with self._changed:
            if self._is_draining:
                raise Stopping
            waiting = self._num_unfinished - self._params.max_batch
            if waiting >= self._params.max_queue:
                share = max(waiting, 1) / self._params.max_batch
                raise Busy(max(waiting, 0), min(60, 1 + int(share * self._sequence_seconds)))
            self._num_unfinished += job.num_sequences
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give a job up; its rows leave before the next step."""
        with self._changed:
            job.is_cancelled = self._has_cancelled = True
            self._changed.notify()

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function between two steps, in the engine's thread; the future has its result or its error."""
        future: Future[Any] = Future()
        with self._changed:
            if self._is_stopped:
                raise Stopping
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def drain(self) -> None:
        """Accept no more jobs; those that are there go on."""
        with self._changed:
            self._is_draining = True

    def stop(self) -> None:
        """End the thread; jobs that are left are told so."""
        with self._changed:
            self._is_draining = self._is_stopped = True
            self._changed.notify()
        self._thread.join()

    # from here on: the engine's thread

    def _run(self) -> None:
        while self._take():
            self._advance()
        for job in {id(job): job for job in [*(seat.job for seat in self._seats.values()), *self._inbox]}.values():
            job.tell(Stopping())
        for _, future in self._calls:
            future.set_exception(Stopping())

    def _take(self) -> bool:
        """Wait for something to do and take in what has arrived; return False when the thread shall end."""
        with self._changed:
            while not (self._inbox or self._calls or self._seats or self._has_cancelled or self._is_stopped):
                self._changed.wait()
            if self._is_stopped:
                return False
            inbox, self._inbox = self._inbox, []
            calls, self._calls = self._calls, []
            is_cancelling, self._has_cancelled = self._has_cancelled, False
        for function, future in calls:
            _answer(function, future)
        if calls and self._prefixes:
            self._prefixes.forget(self.engine.blend.adapters)
        for job in inbox:
            self._accept(job)
        if is_cancelling:
            for job in _distinct(seat.job for seat in self._seats.values() if seat.job.is_cancelled):
                self._give_up(job)
        return True

    def _accept(self, job: Job) -> None:
        """Make the job's rows, or tell why they cannot be."""
        work = job.work
        if job.is_cancelled:
            self._finish(job.num_sequences)
            return
        try:
            job.rows = self.engine.new_rows(
                work.prompts,
                sampling=work.sampling,
                routing=work.routing,
                report=work.report,
                router=self._routers.among(work.adapters),
            )
        except TreadleError as error:
            self._finish(job.num_sequences)
            job.tell(error)
            return
        for index, row in enumerate(job.rows):
            row.owner = work.owner
            self._seats[id(row)] = Seat(job, index)
        self.engine.hold(job.rows)
        self._waiting += job.rows
        job.tell(Started())

    def _advance(self) -> None:
        """Give every running row its next token, and read on in a prompt."""
        events: Events = []
        num_running = self._num_running
        started = time.perf_counter()
        for batch in list(self._batches):
            events += self._attempt(batch, [], batch.step) or []
        if num_running:
            seconds = time.perf_counter() - started
            self._step_seconds = _smoothed(self._step_seconds, seconds)
            self._metrics.observe_step(seconds, num_running)
        if self._reading is None:
            self._begin()
        if self._reading is not None:
            events += self._read_on(*self._reading)
        self._deliver(events)
        self._batches = [batch for batch in self._batches if batch.rows]
        self._metrics.set_load(self._num_running, len(self._waiting))

    @property
    def _num_running(self) -> int:
        return sum(len(batch.rows) for batch in self._batches)

    def _begin(self) -> None:
        """Start to read the prompts of the rows that wait longest, several if a chunk holds them."""
        free = self._params.max_batch - self._num_running
        if not self._waiting or free < 1:
            return
        chunk = self._chunk()
        group = [self._waiting.popleft()]
        longest = len(group[0].ids)
        while self._waiting and len(group) < free and not group[0].report.prompt:
            longest = max(longest, len(self._waiting[0].ids))
            if longest * (len(group) + 1) > chunk or self._waiting[0].report.prompt:
                break
            group.append(self._waiting.popleft())
        batch = self._batch_for(max(len(row.ids) for row in group))
        reading = self._attempt(batch, group, lambda: batch.begin(group))
        self._reading = (batch, reading) if reading is not None else None

    def _batch_for(self, length: int) -> Batch:
        """Return the batch that a row of `length` tokens pads least, or a new one where it would pad too much."""
        best = min(self._batches, key=lambda batch: batch.padding_with(length)[1], default=None)
        if best is not None:
            tokens, padding = best.padding_with(length)
            if padding <= max(FREE_PADDING, tokens):
                return best
        return self.engine.new_batch(prefixes=self._prefixes)

    def _chunk(self) -> int:
        """Return how many tokens of a prompt may be read before the next step."""
        if not self._num_running:
            return self._params.prompt_chunk
        if not self._token_seconds:
            return SMALLEST_CHUNK
        tokens = int(STEPS_A_CHUNK * self._step_seconds / self._token_seconds)
        return min(self._params.prompt_chunk, max(SMALLEST_CHUNK, tokens))

    def _read_on(self, batch: Batch, reading: Reading) -> Events:
        """Read one chunk of prompts; with the last, their rows run."""
        num_columns = max(1, self._chunk() // len(reading.rows))
        before = reading.done
        started = time.perf_counter()
        events = self._attempt(batch, reading.rows, lambda: batch.read(reading, num_columns))
        if events is None:
            return []
        seconds = (time.perf_counter() - started) / ((reading.done - before) * len(reading.rows))
        if self._num_running or not self._token_seconds:
            self._token_seconds = _smoothed(self._token_seconds, seconds)
        if reading.is_finished:
            self._reading = None
            given_up = [row for row in reading.rows if id(row) not in self._seats]
            batch.leave(given_up)
            self.engine.release(given_up)
            if batch not in self._batches:
                self._batches.append(batch)
            self._metrics.count_prompts(reading.rows)
        return events

    def _attempt(self, batch: Batch, rows: Sequence[Row], run: Callable[[], Result]) -> Result | None:
        """Run a part of a step; where it fails, the rows that it ran are lost and the others go on."""
        involved = [*batch.rows, *rows]
        try:
            return run()
        except Exception:  # out of memory, a damaged cache: whatever it is must not end the thread
            logger.exception("a forward pass failed; %d sequences are lost", len(involved))
        self._batches = [other for other in self._batches if other is not batch]
        if self._reading is not None and self._reading[0] is batch:
            self._reading = (self.engine.new_batch(prefixes=self._prefixes), self._reading[1])
        for job in _distinct(seat.job for row in involved if (seat := self._seats.get(id(row)))):
            job.tell(EngineFailed("the forward pass failed; the server's log says why."))
            self._give_up(job)
        return None

    def _deliver(self, events: Events) -> None:
        """Tell each job what its rows generated, and let finished rows go."""
        news: dict[int, tuple[Job, Tokens]] = {}
        finished: list[Row] = []
        for row, event in events:
            seat = self._seats.get(id(row))
            if seat is None:
                continue  # given up
            news.setdefault(id(seat.job), (seat.job, []))[1].append((seat.index, event))
            if event.finish_reason:
                finished.append(row)
        for row in finished:
            seat = self._seats.pop(id(row))
            self._sequence_seconds = _smoothed(self._sequence_seconds, time.perf_counter() - seat.since)
            self._metrics.count_row(row)
        if finished:
            self.engine.release(finished)
            self._finish(len(finished))
        for job, tokens in news.values():
            job.tell(tokens)

    def _give_up(self, job: Job) -> None:
        """Take a job's rows out of whatever they are in."""
        rows = [row for row in job.rows if self._seats.pop(id(row), None)]
        for batch in self._batches:
            batch.leave(rows)
        self._waiting = deque(row for row in self._waiting if row not in rows)
        still_read: list[Row] = []  # with others: they leave, and let go of their adapters, when they have been read
        if self._reading is not None:
            read = self._reading[1].rows
            if any(id(row) in self._seats for row in read):
                still_read = [row for row in read if row in rows]
            else:
                self._reading = None
                rows += [row for row in read if row not in rows]
        self.engine.release([row for row in rows if row not in still_read])
        self._finish(len([row for row in rows if row in job.rows]))

    def _finish(self, num_sequences: int) -> None:
        with self._changed:
            self._num_unfinished -= num_sequences


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    return list({id(job): job for job in jobs}.values())


def _answer(function: Callable[[], Any], future: "Future[Any]") -> None:
    """Run a function and put what it returns or raises into the future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # whoever waits for the future gets it
        future.set_exception(error)


def _smoothed(mean: float, value: float) -> float:
    return value if not mean else (1 - SMOOTHING) * mean + SMOOTHING * value
