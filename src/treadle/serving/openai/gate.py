"""What every request passes: its id, its origin, its key, the size and time of its body, and its line in the log."""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treadle.serving.openai import tracing
from treadle.serving.openai.failures import GONE, Failure
from treadle.serving.openai.keys import Caller, Keyring
from treadle.serving.openai.lines import Client
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.origins import PagePolicy
from treadle.serving.openai.page import is_page
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.protocol import HEADER_BYTES
from treadle.serving.openai.uploads import Upload, Uploads

logger = logging.getLogger("treadle.serving.openai")

WRONG_KEY = "invalid_api_key"
OPEN = ("/live", "/health")
"""Paths that need no key, besides the page's files."""
PIECE_BYTES = 64 << 10
"""Of a long answer, what is given to the connection at a time."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass
class Visit:
    """One request: who sent it, and what is logged of it."""

    id: str
    body: Upload
    client: Client = Client()
    caller: Caller = Caller()
    started: float = field(default_factory=time.perf_counter)  # seconds of the performance counter
    status: int = 0
    notes: dict[str, Any] = field(default_factory=dict[str, Any])  # model, tokens, weights ...

    @classmethod
    def of(cls, request: Request) -> "Visit":
        """Return the visit that a request is."""
        return request.scope["visit"]


class Gate:
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
        visit = Visit(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, self._uploads.start(Client()))
        scope["visit"] = visit

        async def send_on(message: Message) -> None:
            body = message.get("body", b"")
            done = 0
            while len(body) - done > PIECE_BYTES:  # what a client has not read lies here, not in the connection
                await send({**message, "body": body[done : done + PIECE_BYTES], "more_body": True})
                done += PIECE_BYTES
            if done:
                message = {**message, "body": body[done:]}
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = visit.id
            await send(message)

        with tracing.span(headers, lambda: self._line(scope, visit)):
            await self._answer(scope, receive, send_on, headers)
        self._record(scope, visit)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Answer a request, whatever happens."""
        visit: Visit = scope["visit"]
        try:
            await self._pass(scope, receive, send, headers)
        except Failure as failure:
            visit.notes["error"] = failure.code
            await failure.response()(scope, receive, send)
        except TimeoutError:
            visit.notes["error"] = "client_too_slow"  # in the middle of a stream: nothing more can be said to it
        except Exception:  # a defect: the client gets a request id, the log gets the reason
            logger.exception("request %s failed", visit.id)
            visit.notes["error"] = "internal_error"
            if not visit.status:
                failure = Failure(500, f"internal error; request id {visit.id}", code="internal_error")
                await failure.response()(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        visit: Visit = scope["visit"]
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise Failure(431, f"the headers are longer than {HEADER_BYTES} bytes", code="headers_too_long")
        self._pages.check(scope["method"], scope["http_version"], headers)
        is_open = self._is_open(scope["path"])
        if not is_open:
            caller = self._keys.caller(headers.get("authorization"))
            if caller is None:
                raise Failure(401, "send Authorization: Bearer KEY; the key is missing or wrong", code=WRONG_KEY)
            visit.caller = caller
            if scope["method"] == "POST" and not self._is_ready():
                raise Failure(503, "the server is shutting down or has failed", code="not_ready", retry=5)
            visit.client = Client(caller.id, (scope.get("client") or ("",))[0])
            visit.body = self._uploads.start(visit.client)
        try:
            # nothing else has a body; one that comes all the same is left unread
            if scope["method"] == "POST" and not is_open:
                await self._uploads.receive(visit.body, headers, receive)
            await self._app(scope, receive, send)
        finally:
            visit.body.drop()

    def _is_open(self, path: str) -> bool:
        return path in OPEN or (self._params.page and is_page(path))

    def _line(self, scope: Scope, visit: Visit) -> dict[str, Any]:
        """Return what there is to say about a request; texts are in it only if the server was asked to log them."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": visit.id,
            "key": visit.caller.id or None,
            "method": scope["method"],
            "path": self._paths.get(scope.get("endpoint"), "unknown"),  # what was asked for may be anything
            "status": visit.status or GONE,
            "ms": round(1000 * (time.perf_counter() - visit.started), 1),
            **visit.notes,
        }

    def _record(self, scope: Scope, visit: Visit) -> None:
        """Count the request and log one line."""
        line = self._line(scope, visit)
        self._metrics.count_request(line["path"], str(line["status"]), visit.started)
        if self._params.log_format == "json":
            logger.info(json.dumps(line, ensure_ascii=False))
        else:
            logger.info(
                " ".join(f"{key}={value}" for key, value in line.items() if value is not None and key != "time")
            )
