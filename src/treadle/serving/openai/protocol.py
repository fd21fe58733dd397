"""HTTP/1.1 connections with limits: on their number, and on time and size of each.

uvicorn's own protocol reads endless heads, waits for ever for a client that does not read, and has no limit on
connections but descriptors. If there are too many, the oldest one closes on which no request runs.
Offers of other protocols (HTTP/2, WebSocket) are ignored, and clients of HTTP/1.0 get no chunks.
"""

import asyncio
import re
import time
from typing import Any, ClassVar

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from treadle.serving.openai.failures import Failure

HEADER_BYTES = 32 << 10
"""The most bytes of a request's line with all its headers."""
AUTHORITY = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
"""The host in a request's line, as clients of a proxy write it."""


class HttpProtocol(HttpToolsProtocol):
    """Closes a connection whose client is slow, sends too long a head, or does not read; `Middleware` limits bodies.

    Attributes:
        head_seconds: a head must arrive in this time after the connection or its own first byte.
        write_seconds: a client must empty its connection's full buffer (64 KiB) in this time.
        unread_body_seconds: the unread rest of a body must arrive in this time after the answer.
        max_connections: with more, the oldest one closes on which no request runs; systems often allow 1,024
            descriptors.
    """

    head_seconds: ClassVar[float] = 30.0
    write_seconds: ClassVar[float] = 30.0
    unread_body_seconds: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = 768
    parser: Any  # None once the connection is lost, when nothing comes any more
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_head = True
    # when the connection was made or its last request answered; a loop's own clock may stand still for an iteration
    _since: float = 0.0

    def connection_made(self, transport: Any) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._since = time.monotonic()
        self._wait()
        if len(self.connections) > self.max_connections:
            others = [
                each
                for each in self.connections
                if isinstance(each, HttpProtocol) and each is not self and each.is_waiting
            ]
            min(others, key=HttpProtocol.idle_since, default=self).drop()

    def idle_since(self) -> float:
        """Return when the connection was last busy, in seconds of a clock that never stands still."""
        return self._since

    @property
    def is_waiting(self) -> bool:
        """Whether the server only waits for this connection's client."""
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    def drop(self) -> None:
        """End the connection at once, with all unread data."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._stop()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop writing, and wait some time for the client to read."""
        super().pause_writing()
        self._write_timer = self._write_timer or self.loop.call_later(self.write_seconds, self.drop)

    def resume_writing(self) -> None:
        """Write again, as the client has read."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        """Wait some time for the rest of a body that the answer did not need."""
        super().on_response_complete()
        self._since = time.monotonic()
        if not self._is_in_head and not self.transport.is_closing():
            self._timer = self._timer or self.loop.call_later(self.unread_body_seconds, self.drop)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head is too long."""
        if self._is_in_head:
            self._head_bytes += len(data)
            self._wait()
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except HttpParserError as error:
            self.send_400_response(f"{str(error).rstrip('.')}.")
            return
        if self._is_in_head and self._head_bytes > HEADER_BYTES:
            self.transport.close()

    def _parse(self, data: bytes) -> None:
        """Read requests; if the parser stops at an offer of another protocol, repeat the head without the offer."""
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except HttpParserUpgrade as offer:
                if self.scope["method"] == "CONNECT":
                    raise HttpParserError("CONNECT is for proxies.") from offer
                rest = rest[offer.args[0] :]
                self.parser.feed_data(self._head_without_offer())

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, version)]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        """Pass the request on."""
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode()
            return  # the same head comes again, without the offer
        self._stop()
        self._head_bytes, self._is_in_head = 0, False
        if found := AUTHORITY.match(self.url):  # counts for more than Host (RFC 9112, section 3.2.2)
            self.headers[:] = [(b"host", found[1]), *(each for each in self.headers if each[0] != b"host")]
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            _end_with_connection(self.cycle)

    def on_message_complete(self) -> None:
        """Expect another head; until it comes, uvicorn's keep-alive counts."""
        if self.parser.should_upgrade():
            return
        self._stop()
        self._is_in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Send the error of a request that cannot be parsed, in the shape of all errors, and close the connection."""
        text = f"this is not an HTTP/1.1 request: {msg} Check the request line, the headers and Content-Length."
        response = Failure(400, text, code="invalid_http").response()
        head = [STATUS_LINE[400], *(name + b": " + value + b"\r\n" for name, value in response.raw_headers)]
        self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", response.body]))
        self.transport.close()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _end_with_connection(cycle: RequestResponseCycle) -> None:
    """End an answer of unknown length with its connection, for a client without chunks."""
    send, has_length = cycle.send, False

    async def send_unchunked(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = None if has_length else False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_unchunked
