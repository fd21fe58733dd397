"""HTTP/1.1 connections whose heads are limited in bytes and seconds; uvicorn's own reads a head without an end."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from treadle.server.failures import Failure

HEADER_BYTES = 32 << 10
"""Of a request's line and all its headers."""
HEAD_SECONDS = 30.0
"""In which a head must have arrived, from the connection or from its own first byte on."""


class Protocol(HttpToolsProtocol):
    """Closes a connection whose head is too long or too slow; bodies are limited by the gate."""

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_head = True

    def connection_made(self, transport: Any) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head is too long."""
        if self._is_in_head:
            self._head_bytes += len(data)
            self._wait()
        super().data_received(data)
        if self._is_in_head and self._head_bytes > HEADER_BYTES:
            self.transport.close()

    def on_headers_complete(self) -> None:
        """Pass the request on."""
        self._stop()
        self._head_bytes, self._is_in_head = 0, False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect another head, which may come later: until then uvicorn's keep-alive counts."""
        self._is_in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Say what does not parse, in the shape of all other errors, and close the connection."""
        text = f"this is not an HTTP/1.1 request: {msg} Check the request line, the headers and Content-Length."
        response = Failure(400, text, code="invalid_http").response()
        head = [STATUS_LINE[400], *(name + b": " + value + b"\r\n" for name, value in response.raw_headers)]
        self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", response.body]))
        self.transport.close()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
