"""Does what every request needs: id, origin, key, limits of its body, log line and trace."""

import asyncio
import json
import logging
import re
import time
import uuid
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
from treadle.serving.openai.queues import Budget, Client

logger = logging.getLogger("treadle.serving.openai")

WRONG_KEY = "invalid_api_key"
OPEN = ("/live", "/health")
"""Paths that need no key, besides the page's files."""
PIECE_BYTES = 64 << 10
"""A long answer goes to the connection in pieces of this size."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TOO_LONG = "body_too_long"
FREE_BODY_BYTES = 64 << 10
"""Bytes of each body that do not count: small requests are taken whatever others send."""
BODY_BUDGET_BYTES = 128 << 20
"""All bodies together may hold this much beyond the free bytes; at least four bodies of the longest kind."""
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
"""Entries of a request's log line that go into its span, and their names there; no texts."""


class Upload:
    """One body; a `with` block hands out its bytes, then frees them."""

    def __init__(self, budget: Budget, client: Client) -> None:
        self._budget = budget
        self._client = client
        self._held = 0  # bytes of the budget
        self.data = bytearray()

    def __enter__(self) -> bytes:
        """Return the bytes; only the first call does."""
        data, self.data = bytes(self.data), bytearray()
        return data

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Free the bytes and give the budget back."""
        self.drop()

    def drop(self) -> None:
        """Free the bytes and give the budget back; a second call does nothing."""
        self.data = bytearray()
        self._budget.give_back(self._client, self._held)
        self._held = 0

    def hold(self, num_bytes: int) -> None:
        """Take the budget of a body of `num_bytes`; a Failure says that there is no room."""
        more = max(0, num_bytes - FREE_BODY_BYTES) - self._held
        if more > 0:
            if not self._budget.take(self._client, more):
                message = "too many long bodies are being received; send this one again later"
                raise Failure(429, message, code="bodies_full", retry=BODY_RETRY_SECONDS)
            self._held += more


class Uploads:
    """Receives the bodies of one server, which share a budget of bytes."""

    def __init__(self, params: ServeParams) -> None:
        self._params = params
        self._budget = Budget(max(BODY_BUDGET_BYTES, 4 * params.max_body))

    async def receive(self, upload: Upload, headers: Headers, receive: Receive) -> None:
        """Receive a whole body; a Failure says that it is too long, too slow or without room."""
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
        """Return a client's body, still empty."""
        return Upload(self._budget, client)

    def _check(self, num_bytes: int) -> None:
        limit = self._params.max_body
        if num_bytes > limit:
            raise Failure(413, f"the body is longer than {limit} bytes, the most that is allowed", code=TOO_LONG)


@dataclass
class RequestContext:
    """One request: its caller, and the entries of its log line."""

    id: str
    body: Upload
    client: Client = Client()
    caller: Caller = Caller()
    started: float = field(default_factory=time.perf_counter)  # seconds of the performance counter
    status: int = 0
    notes: dict[str, Any] = field(default_factory=dict[str, Any])  # model, tokens, weights ...

    @classmethod
    def of(cls, request: Request) -> "RequestContext":
        """Return the context of a request."""
        return request.scope["context"]


class Middleware:
    """The outermost layer of the application, with all checks that need no route."""

    def __init__(
        self,
        app: ASGIApp,
        params: ServeParams,
        keys: Keyring,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        paths: Mapping[Any, str],
    ) -> None:
        """Guard an application; `paths` maps its handlers to their paths."""
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
            while len(body) - done > PIECE_BYTES:  # unread pieces wait here, not in the connection
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
        """Answer a request, even after an error."""
        context: RequestContext = scope["context"]
        try:
            await self._pass(scope, receive, send, headers)
        except Failure as failure:
            context.notes["error"] = failure.code
            await failure.response()(scope, receive, send)
        except TimeoutError:
            context.notes["error"] = "client_too_slow"  # in the middle of a stream: it gets no error any more
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
            # other methods have no body; if one comes, it stays unread
            if scope["method"] == "POST" and not is_open:
                await self._uploads.receive(context.body, headers, receive)
            await self._app(scope, receive, send)
        finally:
            context.body.drop()

    def _is_open(self, path: str) -> bool:
        return path in OPEN or (self._params.page and is_page(path))

    def _line(self, scope: Scope, context: RequestContext) -> dict[str, Any]:
        """Return the log line of a request; it has texts only under --log-prompts."""
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
    """Trace the block as a part of the headers' trace; `line` returns the request's log line at the end."""
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
