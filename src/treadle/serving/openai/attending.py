"""Ends what is done for a client when the client goes away, or when it takes too long."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from treadle.serving.openai.failures import GONE, Failure

Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns; it is cancelled when the client of a request goes away, which is a Failure."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Failure(GONE, "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


@asynccontextmanager
async def within(seconds: float) -> AsyncGenerator[None]:
    """Give up what happens inside after so many seconds; a Failure says so."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Failure(504, f"the request took longer than {seconds} seconds", code="timeout") from error


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
