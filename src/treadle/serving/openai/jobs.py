"""The sequences of one request, and the news that the engine's thread sends of them."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.chat import TokenPrompt
from treadle.engine.sequence import OutputOptions, TokenEvent, TokenSequence


@dataclass(frozen=True)
class Work:
    """The sequences to generate.

    Attributes:
        prompts: token ids (T) of each sequence; a chat's also hold the text to route on.
        sampling: the sampling of each sequence.
        routing: the routing of all sequences.
        report: what is told of a sequence beyond its tokens.
        adapters: names of the adapters that may take part; None = all.
        owner: sequences of one owner share the keys and values of common beginnings.
    """

    prompts: Sequence[Sequence[int] | TokenPrompt]
    sampling: Sequence[SamplingParams]
    routing: RoutingParams
    report: OutputOptions = OutputOptions()
    adapters: frozenset[str] | None = None
    owner: str = ""


@dataclass(frozen=True)
class Started:
    """The sequences have been accepted by the engine; they may still wait."""


NewTokens = list[tuple[int, TokenEvent]]
"""The tokens of one step, each with the index of its sequence in the job."""
News: TypeAlias = Started | NewTokens | Exception


Mail: TypeAlias = "list[tuple[Job, News]]"
"""News of several jobs."""


class Job:
    """One request's work; `tell` gets its news: Started, then tokens, or one error at the end.

    A job is done when each of its rows is finished, when an error was told, or when it was cancelled.
    """

    def __init__(self, work: Work, tell: Callable[[News], None]) -> None:
        self.work = work
        self.tell = tell
        self.rows: list[TokenSequence] = []
        self.is_cancelled = False

    @property
    def num_sequences(self) -> int:
        """How many sequences the job has."""
        return len(self.work.prompts)


class Mailbox:
    """Holds the news of one job for the task that waits for them; asyncio's queues are several times slower."""

    def __init__(self) -> None:
        self._news: deque[News] = deque()
        self._is_filled: asyncio.Future[None] | None = None  # while somebody waits

    def put(self, news: News) -> None:
        """Add news; call it in the event loop."""
        self._news.append(news)
        if self._is_filled is not None and not self._is_filled.done():
            self._is_filled.set_result(None)

    async def next(self) -> News:
        """Return the next news; tokens come with those of all steps since."""
        while not self._news:
            self._is_filled = asyncio.get_running_loop().create_future()
            await self._is_filled
        news = self._news.popleft()
        if not isinstance(news, list):
            return news
        tokens = list(news)
        while self._news and isinstance(more := self._news[0], list):
            tokens += more
            self._news.popleft()
        return tokens
