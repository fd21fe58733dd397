"""Queues of work that would block the event loop: bounded, fair between clients, cancelled with the client.

Each queue has its own threads. One of them takes only small work, so small work never waits for large work.
"""

import asyncio
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from treadle.serving.openai.failures import Failure, failure_of
from treadle.serving.openai.scheduler import ShuttingDown

Result = TypeVar("Result")
Check: TypeAlias = Callable[[], None]
"""Long work calls it now and then; it raises `WorkAbandoned` when nobody waits for the result any more."""

SMALL_WORK_BYTES = 32 << 10
"""The most bytes of small work, which has its own thread."""
MAX_QUEUED_WORK = 256
"""The most pieces of work that may wait in one queue."""
RETRY_SECONDS = 5


class WorkAbandoned(Exception):
    """Nobody waits for this work any more: its client has left, or the server ends."""


@dataclass(frozen=True)
class Client:
    """The sender of work: keys take turns, and so do the hosts with the same key."""

    key: str = ""
    host: str = ""


class Budget:
    """An amount that clients share; one client gets at most half of it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()  # by key or, without one, by host

    def take(self, client: Client, amount: int) -> bool:
        """Count an amount of a client; return False if there is no room."""
        group = client.key or client.host
        if self._held.total() + amount > self._most or self._held[group] + amount > self._most // 2:
            return False
        self._held[group] += amount
        return True

    def give_back(self, client: Client, amount: int) -> None:
        """Stop counting an amount of a client."""
        self._held[client.key or client.host] -= amount
        self._held += Counter[str]()  # without those that hold nothing


class QueuedWork(Generic[Result]):
    """A piece of work in a queue; `check` ends it when nobody waits for it."""

    def __init__(self, function: Callable[[Check], Result], client: Client) -> None:
        self.function = function
        self.client = client
        self.future: Future[Result] = Future()
        self.is_given_up = False

    def check(self) -> None:
        """Raise WorkAbandoned if nobody waits for the result."""
        if self.is_given_up:
            raise WorkAbandoned


class FairOrder:
    """Orders waiting work: keys take turns, then the hosts of a key; a host's work is first come, first served."""

    def __init__(self) -> None:
        self._keys: dict[str, dict[str, deque[QueuedWork[Any]]]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(self.num_of, self._keys))

    def num_of(self, key: str) -> int:
        """Return how many pieces of a key's work wait."""
        return sum(map(len, self._keys.get(key, {}).values()))

    def add(self, ticket: QueuedWork[Any]) -> None:
        """Add work behind the other work of its client."""
        self._keys.setdefault(ticket.client.key, {}).setdefault(ticket.client.host, deque()).append(ticket)

    def take(self) -> QueuedWork[Any] | None:
        """Return the next work, and move its key and host to the end."""
        if not self._keys:
            return None
        key, hosts = next(iter(self._keys.items()))
        host, tickets = next(iter(hosts.items()))
        del self._keys[key], hosts[host]
        ticket = tickets.popleft()
        if tickets:
            hosts[host] = tickets
        if hosts:
            self._keys[key] = hosts
        return ticket

    def remove(self, ticket: QueuedWork[Any]) -> None:
        """Remove work, if it still waits."""
        hosts = self._keys.get(ticket.client.key, {})
        tickets = hosts.get(ticket.client.host, deque())
        if ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del hosts[ticket.client.host]
            if not hosts:
                del self._keys[ticket.client.key]

    def longest(self) -> QueuedWork[Any] | None:
        """Return the newest work of the host with most work, in the key with most work."""
        if not self._keys:
            return None
        hosts = self._keys[max(self._keys, key=self.num_of)]
        return max(hosts.values(), key=len)[-1]


class WorkQueue:
    """A queue and its threads; they start with the first work and never keep the process alive."""

    def __init__(self, name: str, num_threads: int = 2, most: int = MAX_QUEUED_WORK) -> None:
        self._name = name
        self._most = most
        self._changed = threading.Condition()  # guards what follows
        self._small, self._large = FairOrder(), FairOrder()
        self._running: set[QueuedWork[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._num_threads = num_threads
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """How many pieces of work wait."""
        with self._changed:
            return len(self._small) + len(self._large)

    async def run(self, function: Callable[[Check], Result], client: Client, num_bytes: int = 0) -> Result:
        """Run a function in a thread when its turn comes; cancelling the waiting task abandons it.

        Args:
            function: gets a `Check` to call between its stages.
            client: the sender, whose turn it takes.
            num_bytes: size of its input; small work does not wait for large work.

        Raises:
            Failure: 429 if too much work waits, 503 if the server ends.
        """
        ticket = self.queue(function, client, num_bytes)
        try:
            return await asyncio.wrap_future(ticket.future)
        except WorkAbandoned as error:
            raise failure_of(ShuttingDown()) from error
        finally:
            self._give_up(ticket)

    def queue(self, function: Callable[[Check], Result], client: Client, num_bytes: int = 0) -> QueuedWork[Result]:
        """Run a function in a thread when its turn comes, without waiting for it.

        Raises:
            Failure: 503 if the server ends.
        """
        ticket = QueuedWork(function, client)
        self._join(ticket, self._small if num_bytes <= SMALL_WORK_BYTES else self._large)
        return ticket

    def close(self) -> None:
        """End the threads, abandon their work, and tell all callers that wait that the server ends."""
        with self._changed:
            self._is_closed = True
            waiting = [ticket for turns in (self._small, self._large) for ticket in iter(turns.take, None)]
            for ticket in self._running:
                ticket.is_given_up = True
            self._changed.notify_all()
        for ticket in waiting:
            _fail(ticket, failure_of(ShuttingDown()))

    def has_ended(self, seconds: float) -> bool:
        """Wait at most so long for the threads of a closed queue; return whether all have ended."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _join(self, ticket: QueuedWork[Any], turns: FairOrder) -> None:
        """Add work; if the queue is full, drop the newest work of the client with most in it."""
        leaves: QueuedWork[Any] | None = None
        with self._changed:
            if self._is_closed:
                raise failure_of(ShuttingDown())
            turns.add(ticket)
            if len(self._small) + len(self._large) > self._most:
                longest = max(self._small, self._large, key=len)
                leaves = longest.longest() or ticket
                longest.remove(leaves)
            if not self._threads:
                self._start()
            self._changed.notify_all()
        if leaves is not None:
            _fail(leaves, Failure(429, "too many requests wait to be read", code="queue_full", retry=RETRY_SECONDS))

    def _start(self) -> None:
        """Start the threads; the first of several takes only small work."""
        for number in range(self._num_threads):
            takes_large = self._num_threads == 1 or number > 0
            name = f"{self._name}_{number}"
            thread = threading.Thread(target=self._work, args=[takes_large], name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _give_up(self, ticket: QueuedWork[Any]) -> None:
        with self._changed:
            ticket.is_given_up = True
            self._small.remove(ticket)
            self._large.remove(ticket)

    def _work(self, takes_large: bool) -> None:
        """Do work until the queue is closed; each thread runs this."""
        while (ticket := self._next(takes_large)) is not None:
            if ticket.future.set_running_or_notify_cancel():
                try:
                    ticket.future.set_result(ticket.function(ticket.check))
                except BaseException as error:  # the caller that waits gets the error, without the work's own variables
                    traceback.clear_frames(error.__traceback__)
                    ticket.future.set_exception(error)
            with self._changed:
                self._running.discard(ticket)
            del ticket  # frees its data while the thread waits

    def _next(self, takes_large: bool) -> QueuedWork[Any] | None:
        """Wait for the next work; None = the queue is closed."""
        with self._changed:
            while not self._is_closed:
                ticket = (self._large.take() if takes_large else None) or self._small.take()
                if ticket is not None:
                    self._running.add(ticket)
                    return ticket
                self._changed.wait()
        return None


def _fail(ticket: QueuedWork[Any], error: Failure) -> None:
    """Raise an error for the caller that waits for the work."""
    if ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
