"""Reads the bodies of requests while their clients are connected; one message lists all problems of a body."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import ValidationError
from starlette.requests import Request

from treadle.common.documents import check_surrogates
from treadle.common.errors import shown, unknown_name
from treadle.serving.openai.bodies import Body, BodyKind, Json, with_limits
from treadle.serving.openai.failures import CLIENT_GONE_STATUS, MAX_LISTED_PROBLEMS, Failure, Problem, Problems, cut
from treadle.serving.openai.middleware import RequestContext
from treadle.serving.openai.neutral import NEUTRAL
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.queues import Check
from treadle.serving.openai.state import ServerState

Result = TypeVar("Result")

MAX_OBJECT_FIELDS = 256
"""The most fields of a JSON object in a body."""
MAX_BODY_CONTAINERS = 20_000
"""The most lists and objects of a body; Python's garbage collector visits each of them many times."""
MAX_BODY_VALUES = 500_000
"""The most values of a body; reading them takes 50 ms, in which no other thread runs."""
GZIP = b"\x1f\x8b"


async def read(request: Request, kind: type[BodyKind]) -> tuple[BodyKind, Problems]:
    """Return a request's body and its problems."""
    state, encoding = ServerState.of(request), request.headers.get("content-encoding", "")
    return await in_queue(request, lambda raw, _: read_body(kind, read_object(raw, encoding), state.params))


async def in_queue(request: Request, function: Callable[[bytes, Check], Result]) -> Result:
    """Run a function on a request's body when its turn comes, then free the body."""
    state, context = ServerState.of(request), RequestContext.of(request)
    with context.body as raw:
        async with within(state.params.request_timeout):
            return await state.preparing.run(partial(function, raw), context.client, len(raw))


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`; if the request's client goes away, cancel it and raise a Failure."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Failure(CLIENT_GONE_STATUS, "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


@asynccontextmanager
async def within(seconds: float) -> AsyncGenerator[None]:
    """Cancel the block after this many seconds and raise a Failure."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Failure(504, f"the request took longer than {seconds} seconds", code="timeout") from error


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def read_object(raw: bytes, encoding: str = "") -> Json:
    """Return a body's JSON object; `encoding` is the client's Content-Encoding."""
    if encoding not in ("", "identity") or raw.startswith(GZIP):
        given = f"Content-Encoding: got {shown(encoding or 'gzip')}"
        raise Failure(415, f"{given}; allowed: none, send the body as it is", code="unsupported_encoding")
    inner, values = _count(raw)
    if inner > MAX_BODY_CONTAINERS:
        raise Failure(400, f"the body: got {inner} lists and objects; allowed: at most {MAX_BODY_CONTAINERS}")
    if values > MAX_BODY_VALUES:
        raise Failure(400, f"the body: got {values} values; allowed: at most {MAX_BODY_VALUES}")
    try:
        text = raw.decode("utf-8-sig")
        given = json.loads(text, object_pairs_hook=_small)
        check_surrogates(text, given)
    except (ValueError, RecursionError) as error:
        raise Failure(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(given, dict):
        raise Failure(400, f"the body: got {shown(given)}; allowed: a JSON object")
    return cast(Json, given)


def _count(raw: bytes) -> tuple[int, int]:
    """Return how many lists and objects a JSON text has, and how many values; 0 if both are surely few."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_BODY_CONTAINERS and raw.count(b",") < MAX_BODY_VALUES:
        return 0, 0
    # several short passes in linear time, between which other threads run
    text = np.frombuffer(raw.replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8)
    is_outside = np.cumsum(text == ord('"'), dtype=np.uint8) % 2 == 0  # of strings
    counts = np.bincount(text[is_outside], minlength=256)
    return int(counts[ord("[")] + counts[ord("{")]), int(counts[ord(",")]) + 1


def _small(pairs: list[tuple[str, Any]]) -> Json:
    """Return a JSON object, or raise a Failure if it has too many fields."""
    if len(pairs) > MAX_OBJECT_FIELDS:
        allowed = f"at most {MAX_OBJECT_FIELDS}"
        raise Failure(
            400, f"the body: got an object of {len(pairs)} fields; allowed: {allowed}", code="too_many_fields"
        )
    return dict(pairs)


def read_body(kind: type[BodyKind], given: Json, limits: ServeParams) -> tuple[BodyKind, Problems]:
    """Return the body and its problems; a wrong field is replaced by the example's.

    So the right fields can be checked further, and one message lists all problems.
    """
    try:
        return kind.model_validate(given, context=limits), []
    except ValidationError as error:
        entries = error.errors(include_url=False)
        right = given.keys() - {entry["loc"][0] for entry in entries}
        body = kind.model_validate({**kind.EXAMPLE, **{name: given[name] for name in right}}, context=limits)
        return body, _problems(kind, entries, limits)


def _problems(kind: type[Body], entries: Sequence[Mapping[str, Any]], limits: ServeParams) -> Problems:
    """Return the problems that pydantic found, one per place; only the first are worded, as that is slow."""
    schema = kind.model_json_schema()
    found = {entry["loc"]: entry for entry in reversed(entries)}
    worded = [_problem(entry, schema, limits) for entry in islice(reversed(found.values()), MAX_LISTED_PROBLEMS)]
    return [*worded, Problem.others(len(found) - len(worded))] if len(found) > len(worded) else worded


def _problem(entry: Mapping[str, Any], schema: Json, limits: ServeParams) -> Problem:
    loc, place = entry["loc"], _place(entry["loc"])
    description, known = _describe(schema, loc)
    allowed = with_limits(description, limits)
    if entry["type"] == "extra_forbidden":
        return Problem(place, f"{cut(place)}: {unknown_name('field', str(loc[-1]), known)}")
    if entry["type"] == "missing":
        return Problem(place, f"{place} is missing; give {allowed}")
    value = entry["input"]
    if isinstance(value, list) and entry["msg"].endswith("too many"):
        return Problem(place, f"{place}: got a list of {len(cast(list[Any], value))}; allowed: {allowed}")
    return Problem.of(place, value, allowed)


def _place(loc: tuple[int | str, ...]) -> str:
    """Return the place in a body as a path: messages[0].role."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _describe(schema: Json, loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """Return the description of a place in a body, and the fields of the object around it."""
    node, known, description = schema, list[str](), ""
    for part in loc:
        inner = _resolved(schema, node)
        if isinstance(part, int):
            node = inner.get("items", node)
        else:
            known = [name for name, each in inner.get("properties", {}).items() if NEUTRAL not in each]
            node = inner.get("properties", {}).get(part, node)
        description = node.get("description", description)
    return description, known


def _resolved(schema: Json, node: Json) -> Json:
    """Return a schema's own object or list, without references and null."""
    for choice in node.get("anyOf", ()):
        if choice.get("type") != "null":
            node = choice
            break
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
