"""One thread owns the engine: it takes jobs from any thread between two steps, and posts their news.

Jobs are first come, first served. `treadle.serving.openai.loop` says what a step does and which rows share it.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from treadle.common.errors import TreadleError
from treadle.serving.openai.jobs import Job, Mail
from treadle.serving.openai.loop import Loop
from treadle.serving.openai.params import ServeParams

Result = TypeVar("Result")
Call: TypeAlias = "tuple[Callable[[], Any], Future[Any]]"
"""A function to run between two steps, and the future of its result."""

MAX_RETRY_SECONDS = 60
"""The most seconds that Retry-After says."""


class QueueFull(TreadleError):
    """The queue has no room for a job now; trying again is useful after `seconds`."""

    def __init__(self, job: Job, waiting: int, seconds: int) -> None:
        more = job.num_sequences
        wanted = "" if more == 1 else f", and the request brings {more} more"
        super().__init__(f"the queue is full: {waiting} sequences are waiting{wanted}. Try again in {seconds} s.")
        self.seconds = seconds


class TooManySequences(TreadleError):
    """A job has more sequences than may run and wait together, so it would never fit."""

    def __init__(self, job: Job, most: int) -> None:
        super().__init__(
            f"n: got {job.num_sequences} sequences (prompts times n); allowed: at most {most} at once. Send several "
            "requests."
        )


class ShuttingDown(TreadleError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: send the request to another one, or later.")


class Scheduler:
    """Runs jobs on a loop, in its own thread."""

    def __init__(self, loop: Loop, params: ServeParams) -> None:
        self._loop = loop
        self._params = params
        self._changed = threading.Condition()  # guards what follows
        self._inbox: list[Job] = []
        self._calls: deque[Call] = deque()
        self._has_cancelled = False
        self._is_draining = False
        self._is_stopped = False
        self._num_accepted = 0  # sequences, ever
        self._thread = threading.Thread(target=self._run, name="treadle-engine", daemon=True)

    def start(self, post: Callable[[Mail], None], on_unused: Callable[[], None]) -> None:
        """Start the engine's thread; it posts the jobs' news and says when a removed adapter is unused."""
        self._loop.post = post
        self._loop.on_unused = on_unused
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether jobs are accepted and the engine's thread lives."""
        return self._thread.is_alive() and not self._is_draining

    @property
    def has_ended(self) -> bool:
        """Whether the engine's thread has ended."""
        return not self._thread.is_alive()

    @property
    def is_cancelling(self) -> bool:
        """Whether a job was cancelled whose rows leave before the next step."""
        return self._has_cancelled

    @property
    def num_unfinished(self) -> int:
        """How many sequences run or wait."""
        return self._num_accepted - self._loop.num_ended

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFull: more sequences than may would wait.
            TooManySequences: it has more sequences than the batch and the queue hold.
            ShuttingDown: the server is shutting down.
        """
        most = self._params.max_batch + self._params.max_queue
        if job.num_sequences > most:
            raise TooManySequences(job, most)
        with self._changed:
            if self._is_draining:
                raise ShuttingDown
            if self.num_unfinished + job.num_sequences > most:
                waiting = max(self.num_unfinished - self._params.max_batch, 0)
                seconds = 1 + int(max(waiting, 1) / self._params.max_batch * self._loop.sequence_seconds)
                raise QueueFull(job, waiting, min(MAX_RETRY_SECONDS, seconds))
            self._num_accepted += job.num_sequences
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a job; its rows leave before the next step."""
        with self._changed:
            job.is_cancelled = self._has_cancelled = True
            self._changed.notify()

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function between two steps, in the engine's thread; the future has its result or its error."""
        future: Future[Any] = Future()
        with self._changed:
            if self._is_stopped:
                raise ShuttingDown
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def drain(self) -> None:
        """Accept no more jobs; accepted ones go on."""
        with self._changed:
            self._is_draining = True

    def stop(self) -> None:
        """End the thread, and tell the remaining jobs."""
        with self._changed:
            self._is_draining = self._is_stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        """Take jobs and advance the loop until `stop`; the engine's thread runs this."""
        while self._take():
            self._loop.advance()
        self._loop.post([(job, ShuttingDown()) for job in [*self._loop.jobs(), *self._inbox]])
        for _, future in self._calls:
            future.set_exception(ShuttingDown())

    def _take(self) -> bool:
        """Wait for work and take in what has arrived; return False when the thread must end."""
        with self._changed:
            while not (self._inbox or self._calls or self._loop.is_busy or self._has_cancelled or self._is_stopped):
                self._changed.wait()
            if self._is_stopped:
                return False
            inbox, self._inbox = self._inbox, []
            calls, self._calls = self._calls, deque()
            is_cancelling, self._has_cancelled = self._has_cancelled, False
        while calls:
            _answer(calls)
        for job in inbox:
            self._loop.accept(job)
        if is_cancelling:
            for job in self._loop.jobs():
                if job.is_cancelled:
                    self._loop.give_up(job)
        return True


def _answer(calls: deque[Call]) -> None:
    """Run the first function, and put its result or error into its future."""
    function, future = calls.popleft()
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:  # the caller that waits for the future gets it
        future.set_exception(error)
    else:
        del function  # so that the caller that waits frees its data: freeing a large adapter takes a while
        future.set_result(result)
