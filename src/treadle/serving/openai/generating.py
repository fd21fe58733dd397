"""The endpoints that generate: they turn a request into a job, and its news into an answer or a stream."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from treadle.common.errors import TreadleError
from treadle.serving.openai.answers import DONE, Answer, event_line, json_pieces
from treadle.serving.openai.bodies import ChatBody, CompletionBody
from treadle.serving.openai.failures import Failure, failure_of
from treadle.serving.openai.jobs import Job, Mailbox, News, NewTokens, Started
from treadle.serving.openai.middleware import RequestContext
from treadle.serving.openai.queues import Check
from treadle.serving.openai.reading import in_queue, read_body, read_object, while_connected
from treadle.serving.openai.requests import ParsedRequest
from treadle.serving.openai.scheduler import TooManySequences
from treadle.serving.openai.state import ServerState

Result = TypeVar("Result")

MAX_INLINE_ENTRIES = 2048
"""The entries of the longest answer that the event loop writes itself: tokens times the values of each."""
VALUES_RETRY_SECONDS = 5
PING_SECONDS = 15.0
"""An idle stream sends a comment this often, so that its connection stays open."""


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await generate(request, ChatBody)


async def complete(request: Request) -> Response:
    """POST /v1/completions."""
    return await generate(request, CompletionBody)


async def generate(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    """Read a body, run its job, and answer as a whole or as a stream."""
    return await while_connected(request, _generate(request, kind))


async def _generate(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    state, context = ServerState.of(request), RequestContext.of(request)
    parsed = await _read_request(request, kind)
    context.notes |= {"model": parsed.model, "stream": parsed.is_streamed}
    run = RunningRequest(state, context, parsed)
    try:
        await run.start()
        if parsed.is_streamed:
            return EventStream(run)
        response = await run.whole()
    except BaseException:  # an error, or the client went away
        run.end()
        raise
    run.end()
    return response


async def _read_request(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> ParsedRequest:
    """Return a parsed request; long prompts take a while, so a thread reads them."""
    state, context = ServerState.of(request), RequestContext.of(request)

    def read(raw: bytes, check: Check) -> ParsedRequest:
        given = read_object(raw, request.headers.get("content-encoding", ""))
        check()
        body, problems = read_body(kind, given, state.params)
        check()
        parsed = state.reader.read(body, problems, context.caller, check)
        if state.params.log_prompts:
            context.notes["body"] = given
        return parsed

    return await in_queue(request, read)


class DeadlinePassed(Exception):
    """The request's time is over."""


class RunningRequest:
    """Runs one request in the event loop, from its job to its answer."""

    def __init__(self, state: ServerState, context: RequestContext, parsed: ParsedRequest) -> None:
        self._state = state
        self._context = context
        self._news = Mailbox()
        self._answer = Answer(parsed, state.tokens)
        loop = asyncio.get_running_loop()
        self._job = Job(parsed.work, self._news.put)
        self._left = self._job.num_sequences
        self._held = 0  # values of the server's budget
        self.deadline = loop.time() + state.params.request_timeout
        # timers rather than asyncio.timeout around each wait, which would cost more than a token's JSON
        self._timer = loop.call_at(self.deadline, self._news.put, DeadlinePassed())
        self._ping = loop.call_later(PING_SECONDS, self._say_ping)
        self._last: dict[int, float] = {}  # when each sequence's last token came, seconds of the performance counter

    async def start(self) -> None:
        """Queue the job and wait until the engine accepts it; raise a Failure if it does not."""
        wanted = self._answer.parsed.num_values
        if not self._state.values.take(self._context.client, wanted):
            message = (
                "the log-probabilities and weights of unfinished answers are too many; send this request again later"
            )
            raise Failure(429, message, code="values_full", retry=VALUES_RETRY_SECONDS)
        self._held = wanted
        try:
            self._state.scheduler.submit(self._job)
        except TooManySequences as error:
            raise Failure(400, str(error), param="n") from error
        except TreadleError as error:
            raise failure_of(error) from error
        while not isinstance(await self._next(), Started):
            pass

    def end(self) -> None:
        """Stop the timers, give the budget back, and cancel the job if it is not done."""
        self._state.values.give_back(self._context.client, self._held)
        self._held = 0
        self._timer.cancel()
        self._ping.cancel()
        if self._left:
            self._state.scheduler.cancel(self._job)

    async def whole(self) -> Response:
        """Return the answer when all sequences are finished."""
        while self._left:
            await self._next_tokens()
        rows = self._job.rows

        def write() -> bytes:
            self._note()
            return b"".join(json_pieces(self._answer.whole(rows)))

        size = sum(row.prompt_tokens + len(row.events) for row in rows) * self._answer.parsed.width
        return Response(await self._aside(write, size), media_type="application/json")

    async def _aside(self, function: Callable[[], Result], num_entries: int) -> Result:
        """Run a function that writes `num_entries` entries, in a thread where they are many."""
        if num_entries <= MAX_INLINE_ENTRIES:
            return function()
        return await self._state.writing.run(lambda _: function(), self._context.client, num_entries)

    async def lines(self) -> AsyncGenerator[bytes]:
        """Yield the answer as server-sent events; an error is the last event."""
        answer, rows = self._answer, self._job.rows
        try:
            for chunk in answer.opening():
                yield event_line(chunk)
            while self._left:
                tokens = await self._next_tokens()
                size = sum(rows[index].prompt_tokens for index, event in tokens if event.index == 0)
                if lines := await self._aside(partial(self._lines_of, tokens), size * answer.parsed.width):
                    yield lines
            await self._aside(self._note, sum(len(row.events) for row in rows))
            if answer.parsed.has_usage:
                yield event_line(answer.closing(rows))
            yield DONE
        except Failure as failure:
            self._context.notes["error"] = failure.code
            yield event_line(failure.document())

    def _lines_of(self, tokens: NewTokens) -> bytes:
        """Return the events of tokens, or a comment if there are none."""
        chunks = [self._answer.chunk(index, self._job.rows[index], event) for index, event in tokens]
        lines = [event_line(chunk) for chunk in chunks if chunk is not None]
        return b"".join(lines) if tokens else b": still there\n\n"

    def _say_ping(self) -> None:
        self._news.put([])
        self._ping = asyncio.get_running_loop().call_later(PING_SECONDS, self._say_ping)

    async def _next_tokens(self) -> NewTokens:
        """Return the tokens of all steps since the last call; none = it is time for a ping."""
        tokens = await self._next()
        assert isinstance(tokens, list)
        self._observe(tokens)
        self._left -= sum(event.finish_reason is not None for _, event in tokens)
        return tokens

    async def _next(self) -> News:
        """Return the job's next news; errors are raised as a Failure."""
        news = await self._news.next()
        if isinstance(news, DeadlinePassed):
            seconds = self._state.params.request_timeout
            raise Failure(504, f"the request took longer than {seconds} seconds", code="timeout")
        if isinstance(news, Exception):
            self._left = 0
            raise failure_of(news)
        return news

    def _observe(self, tokens: NewTokens) -> None:
        """Measure the time to the first token and between tokens."""
        now, metrics = time.perf_counter(), self._state.metrics
        for index, _ in tokens:
            if index in self._last:
                metrics.token.observe(now - self._last[index])
            else:
                metrics.first_token.observe(now - self._context.started)
            self._last[index] = now

    def _note(self) -> None:
        """Note token counts and mean weights for the log."""
        rows = self._job.rows
        usage: dict[str, Any] = self._answer.usage(rows)
        self._context.notes |= {"prompt_tokens": usage["prompt_tokens"], "tokens": usage["completion_tokens"]}
        means = np.mean([event.weights for row in rows for event in row.events], axis=0)
        self._context.notes["weights"] = {
            name: round(float(mean), 3) for name, mean in zip(rows[0].router.names, means, strict=True)
        }
        if self._state.params.log_prompts:
            self._context.notes["texts"] = ["".join(event.text for event in row.events) for row in rows]


class EventStream(StreamingResponse):
    """Server-sent events of a request; it is cancelled when the client leaves or is too slow."""

    def __init__(self, run: RunningRequest) -> None:
        super().__init__(run.lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            async with asyncio.timeout_at(self._run.deadline + PING_SECONDS):
                await super().__call__(scope, receive, send)
        finally:
            self._run.end()
