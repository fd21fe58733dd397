"""The routes that generate: from a request to a job, and from its news to an answer or a stream."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from treadle.errors import TreadleError
from treadle.server.answers import DONE, Answer, event_line
from treadle.server.bodies import BodyKind, ChatBody, CompletionBody, Json
from treadle.server.failures import Failure, Problems, failure_of
from treadle.server.gate import Visit
from treadle.server.jobs import Box, Job, News, Started, Tokens
from treadle.server.reading import read_body, read_object
from treadle.server.requests import Asked
from treadle.server.scheduler import TooMany
from treadle.server.state import State

PING_SECONDS = 15.0
"""A stream that has nothing to say says that it lives."""


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await generate(request, ChatBody)


async def complete(request: Request) -> Response:
    """POST /v1/completions."""
    return await generate(request, CompletionBody)


async def generate(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    """Read a body, run its job, and answer whole or as a stream."""
    state, visit = State.of(request), Visit.of(request)
    raw = await request.body()

    def read() -> tuple[Json, Asked]:
        given = read_object(raw, request.headers.get("content-encoding", ""))
        body, problems = read_body(kind, given, state.params)
        return given, state.reader.read(body, problems, visit.caller)

    given, asked = await state.prepare(read)  # not in the event loop: of long prompts, it takes a while
    run = Run(state, visit, asked)
    visit.notes |= {"model": asked.model, "stream": asked.is_streamed}
    if state.params.log_prompts:
        visit.notes["body"] = given
    try:
        await run.start()
        if asked.is_streamed:
            return EventStream(run)
        document = await run.whole(request)
    except BaseException:  # an error, or the client went away
        run.end()
        raise
    run.end()
    return JSONResponse(document)


async def read(request: Request, kind: type[BodyKind]) -> tuple[BodyKind, Problems]:
    """Return a request's body and what is wrong with it."""
    state, raw = State.of(request), await request.body()
    encoding = request.headers.get("content-encoding", "")
    return await state.prepare(lambda: read_body(kind, read_object(raw, encoding), state.params))


class Late(Exception):
    """The request has taken too long."""


class Run:
    """One request while it is generated; lives in the event loop."""

    def __init__(self, state: State, visit: Visit, asked: Asked) -> None:
        self._state = state
        self._visit = visit
        self._news = Box()
        self._answer = Answer(asked, state.tokens)
        loop = asyncio.get_running_loop()
        self._job = Job(asked.work, self._news.put)
        self._left = self._job.num_sequences
        self.deadline = loop.time() + state.params.request_timeout
        # timers rather than asyncio.timeout around each wait, which would cost more than a token's JSON
        self._timer = loop.call_at(self.deadline, self._news.put, Late())
        self._ping = loop.call_later(PING_SECONDS, self._say_ping)
        self._last: dict[int, float] = {}  # when each sequence's last token came, seconds of the performance counter

    async def start(self) -> None:
        """Queue the job and wait until the engine has accepted it; raise a Failure where it does not."""
        try:
            self._state.scheduler.submit(self._job)
        except TooMany as error:
            raise Failure(400, str(error), param="n") from error
        except TreadleError as error:
            raise failure_of(error) from error
        while not isinstance(await self._next(), Started):
            pass

    def end(self) -> None:
        """End: give the job up, if it is not done."""
        self._timer.cancel()
        self._ping.cancel()
        if self._left:
            self._state.scheduler.cancel(self._job)

    async def whole(self, request: Request) -> Json:
        """Return the answer when all sequences are finished; raise a Failure when the client goes away."""
        tokens = asyncio.ensure_future(self._finish())
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({tokens, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not tokens.done():
                raise Failure(499, "the client went away")
            tokens.result()
        finally:
            tokens.cancel()
            gone.cancel()
        return self._answer.whole(self._job.rows)

    async def lines(self) -> AsyncGenerator[bytes]:
        """Yield the answer as server-sent events; an error ends it as one."""
        answer, rows = self._answer, self._job.rows
        try:
            for chunk in answer.opening():
                yield event_line(chunk)
            while self._left:
                if lines := self._lines_of(await self._next_tokens()):
                    yield lines
            if answer.asked.has_usage:
                yield event_line(answer.closing(rows))
            yield DONE
        except Failure as failure:
            self._visit.notes["error"] = failure.code
            yield event_line(failure.document())

    def _lines_of(self, tokens: Tokens) -> bytes:
        """Return the events of tokens; a comment where there are none."""
        chunks = [self._answer.chunk(index, self._job.rows[index], event) for index, event in tokens]
        lines = [event_line(chunk) for chunk in chunks if chunk is not None]
        return b"".join(lines) if tokens else b": still there\n\n"

    def _say_ping(self) -> None:
        self._news.put([])
        self._ping = asyncio.get_running_loop().call_later(PING_SECONDS, self._say_ping)

    async def _finish(self) -> None:
        while self._left:
            await self._next_tokens()

    async def _next_tokens(self) -> Tokens:
        """Return the tokens of the next step, and of those that came meanwhile; none to say that the stream lives."""
        tokens = await self._next()
        assert isinstance(tokens, list)
        self._observe(tokens)
        self._left -= sum(event.finish_reason is not None for _, event in tokens)
        if not self._left:
            self._note()
        return tokens

    async def _next(self) -> News:
        """Return the job's next news; errors are raised as a Failure."""
        news = await self._news.next()
        if isinstance(news, Late):
            seconds = self._state.params.request_timeout
            raise Failure(504, f"the request took longer than {seconds} seconds", code="timeout")
        if isinstance(news, Exception):
            self._left = 0
            raise failure_of(news)
        return news

    def _observe(self, tokens: Tokens) -> None:
        """Measure the time to the first token and between tokens."""
        now, metrics = time.perf_counter(), self._state.metrics
        for index, _ in tokens:
            if index in self._last:
                metrics.token.observe(now - self._last[index])
            else:
                metrics.first_token.observe(now - self._visit.started)
            self._last[index] = now

    def _note(self) -> None:
        """Leave for the log what was read and generated, and how much each adapter weighed."""
        rows = self._job.rows
        usage: dict[str, Any] = self._answer.usage(rows)
        self._visit.notes |= {"prompt_tokens": usage["prompt_tokens"], "tokens": usage["completion_tokens"]}
        means = np.mean([event.weights for row in rows for event in row.events], axis=0)
        self._visit.notes["weights"] = {
            name: round(float(mean), 3) for name, mean in zip(rows[0].router.names, means, strict=True)
        }
        if self._state.params.log_prompts:
            self._visit.notes["texts"] = ["".join(event.text for event in row.events) for row in rows]


class EventStream(StreamingResponse):
    """Server-sent events of a run, which is given up when the client is gone or too slow."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            async with asyncio.timeout_at(self._run.deadline + PING_SECONDS):
                await super().__call__(scope, receive, send)
        finally:
            self._run.end()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
