"""What every request passes: its id, its origin, its key, the size and time of its body, and its line in the log."""

import asyncio
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treadle.serving.openai.failures import CLIENT_GONE_STATUS, Failure
from treadle.serving.openai.keys import Caller, Keyring
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.origins import PagePolicy
from treadle.serving.openai.page import is_page
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.protocol import HEADER_BYTES
from treadle.serving.openai.queues import Client

logger = logging.getLogger("treadle.serving.openai")

WRONG_KEY = "invalid_api_key"
OPEN = ("/live", "/health")
"""Paths that need no key, besides the page's files."""
PIECE_BYTES = 64 << 10
"""Of a long answer, what is given to the connection at a time."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TOO_LONG = "body_too_long"
FREE_BODY_BYTES = 64 << 10
"""Of each body, which do not count: small requests are taken whatever others send."""
BODY_BUDGET_BYTES = 128 << 20
"""Of all bodies that are held at a time, beyond the free ones; at least four of the longest."""
BODY_RETRY_SECONDS = 5
HAS_PACKAGE = find_spec("opentelemetry") is not None
ATTRIBUTES = {
    "id": "treadle.request_id",
    "path": "http.route",
    "status": "http.response.status_code",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "tokens": "gen_ai.usage.output_tokens",
    "error": "error.type",
}
"""What of a request's log line goes into its span; no texts."""


class Upload:
    """One body; inside a `with` its bytes, then dropped."""

    def __init__(self, uploads: "Uploads", group: str) -> None:
        self._uploads = uploads
        self._group = group
        self._held = 0  # bytes of the budget
        self.data = bytearray()

    def __enter__(self) -> bytes:
        """Hand the bytes over, once."""
        data, self.data = bytes(self.data), bytearray()
        return data

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Drop the bytes and give the budget back."""
        self.drop()

    def drop(self) -> None:
        """Give the budget back; it may be called again."""
        self.data = bytearray()
        self._uploads.give_back(self._group, self._held)
        self._held = 0

    def hold(self, num_bytes: int) -> None:
        """Take what a body of `num_bytes` needs of the budget; a Failure where there is no room."""
        more = max(0, num_bytes - FREE_BODY_BYTES) - self._held
        if more > 0:
            self._uploads.take(self._group, more)
            self._held += more


class Uploads:
    """The budget of one server; no client has more than half of it."""

    def __init__(self, params: ServeParams) -> None:
        self._params = params
        self._most = max(BODY_BUDGET_BYTES, 4 * params.max_body)
        self._held: Counter[str] = Counter()  # bytes, by key or, without one, by host

    def take(self, group: str, num_bytes: int) -> None:
        """Count bytes of a client, or raise a Failure where there is no room for them."""
        is_full = self._held.total() + num_bytes > self._most
        if is_full or self._held[group] + num_bytes > self._most // 2:
            message = "too many long bodies are being received; send this one again later"
            raise Failure(429, message, code="bodies_full", retry=BODY_RETRY_SECONDS)
        self._held[group] += num_bytes

    def give_back(self, group: str, num_bytes: int) -> None:
        """Count bytes no more."""
        self._held[group] -= num_bytes
        self._held += Counter[str]()  # without those that hold nothing

    async def receive(self, upload: Upload, headers: Headers, receive: Receive) -> None:
        """Receive a whole body, or raise a Failure where it is too long or too slow, or there is no room for it."""
        length = headers.get("content-length", "0")
        if length.isdigit():
            self._check(int(length))
            upload.hold(int(length))
        seconds = self._params.read_timeout
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Failure(CLIENT_GONE_STATUS, "the client went away")
                    upload.data += message.get("body", b"")
                    self._check(len(upload.data))
                    upload.hold(len(upload.data))
                    if not message.get("more_body"):
                        return
        except TimeoutError as error:
            raise Failure(408, f"the body did not arrive within {seconds} seconds", code="body_too_slow") from error

    def start(self, client: Client) -> Upload:
        """Return an empty body of a client."""
        return Upload(self, client.key or client.host)

    def _check(self, num_bytes: int) -> None:
        limit = self._params.max_body
        if num_bytes > limit:
            raise Failure(413, f"the body is longer than {limit} bytes, the most that is allowed", code=TOO_LONG)


@dataclass
class RequestContext:
    """One request: who sent it, and what is logged of it."""

    id: str
    body: Upload
    client: Client = Client()
    caller: Caller = Caller()
    started: float = field(default_factory=time.perf_counter)  # seconds of the performance counter
    status: int = 0
    notes: dict[str, Any] = field(default_factory=dict[str, Any])  # model, tokens, weights ...

    @classmethod
    def of(cls, request: Request) -> "RequestContext":
        """Return the context that a request is."""
        return request.scope["context"]


class Middleware:
    """The outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        params: ServeParams,
        keys: Keyring,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        paths: Mapping[Any, str],
    ) -> None:
        """Guard an application; `paths` has the path of each of its endpoints."""
        self._app = app
        self._paths = paths
        self._params = params
        self._keys = keys
        self._metrics = metrics
        self._is_ready = is_ready
        self._pages = PagePolicy.of(params, is_open=keys.is_open)
        self._uploads = Uploads(params)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        context = RequestContext(
            given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, self._uploads.start(Client())
        )
        scope["context"] = context

        async def send_on(message: Message) -> None:
            body = message.get("body", b"")
            done = 0
            while len(body) - done > PIECE_BYTES:  # what a client has not read lies here, not in the connection
                await send({**message, "body": body[done : done + PIECE_BYTES], "more_body": True})
                done += PIECE_BYTES
            if done:
                message = {**message, "body": body[done:]}
            if message["type"] == "http.response.start":
                context.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = context.id
            await send(message)

        with _span(headers, lambda: self._line(scope, context)):
            await self._answer(scope, receive, send_on, headers)
        self._record(scope, context)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Answer a request, whatever happens."""
        context: RequestContext = scope["context"]
        try:
            await self._pass(scope, receive, send, headers)
        except Failure as failure:
            context.notes["error"] = failure.code
            await failure.response()(scope, receive, send)
        except TimeoutError:
            context.notes["error"] = "client_too_slow"  # in the middle of a stream: nothing more can be said to it
        except Exception:  # a defect: the client gets a request id, the log gets the reason
            logger.exception("request %s failed", context.id)
            context.notes["error"] = "internal_error"
            if not context.status:
                failure = Failure(500, f"internal error; request id {context.id}", code="internal_error")
                await failure.response()(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        context: RequestContext = scope["context"]
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise Failure(431, f"the headers are longer than {HEADER_BYTES} bytes", code="headers_too_long")
        self._pages.check(scope["method"], scope["http_version"], headers)
        is_open = self._is_open(scope["path"])
        if not is_open:
            caller = self._keys.caller(headers.get("authorization"))
            if caller is None:
                raise Failure(401, "send Authorization: Bearer KEY; the key is missing or wrong", code=WRONG_KEY)
            context.caller = caller
            if scope["method"] == "POST" and not self._is_ready():
                raise Failure(503, "the server is shutting down or has failed", code="not_ready", retry=5)
            context.client = Client(caller.id, (scope.get("client") or ("",))[0])
            context.body = self._uploads.start(context.client)
        try:
            # nothing else has a body; one that comes all the same is left unread
            if scope["method"] == "POST" and not is_open:
                await self._uploads.receive(context.body, headers, receive)
            await self._app(scope, receive, send)
        finally:
            context.body.drop()

    def _is_open(self, path: str) -> bool:
        return path in OPEN or (self._params.page and is_page(path))

    def _line(self, scope: Scope, context: RequestContext) -> dict[str, Any]:
        """Return what there is to say about a request; texts are in it only if the server is asked to log them."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": context.id,
            "key": context.caller.id or None,
            "method": scope["method"],
            "path": self._paths.get(scope.get("endpoint"), "unknown"),  # the given path may be anything
            "status": context.status or CLIENT_GONE_STATUS,
            "ms": round(1000 * (time.perf_counter() - context.started), 1),
            **context.notes,
        }

    def _record(self, scope: Scope, context: RequestContext) -> None:
        """Count the request and log one line."""
        line = self._line(scope, context)
        self._metrics.count_request(line["path"], str(line["status"]), context.started)
        if self._params.log_format == "json":
            logger.info(json.dumps(line, ensure_ascii=False))
        else:
            logger.info(
                " ".join(f"{key}={value}" for key, value in line.items() if value is not None and key != "time")
            )


@contextmanager
def _span(headers: Mapping[str, str], line: Callable[[], Mapping[str, Any]]) -> Generator[None]:
    """Trace what happens inside, as a part of the trace that the headers name; `line` tells at the end what it was."""
    if not HAS_PACKAGE:
        yield
        return
    from opentelemetry import propagate, trace

    kind = trace.SpanKind.SERVER
    tracer = trace.get_tracer("treadle")
    with tracer.start_as_current_span("request", context=propagate.extract(headers), kind=kind) as current:
        yield
        if current.is_recording():
            known = line()
            current.update_name(f"{known['method']} {known['path']}")
            for name, attribute in ATTRIBUTES.items():
                if known.get(name) is not None:
                    current.set_attribute(attribute, known[name])
