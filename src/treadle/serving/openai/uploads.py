"""Bodies of requests: received within a size, a time and a budget that all of them share, and dropped once read."""

import asyncio
from collections import Counter
from types import TracebackType

from starlette.datastructures import Headers
from starlette.types import Receive

from treadle.serving.openai.failures import GONE, Failure
from treadle.serving.openai.lines import Client
from treadle.serving.openai.params import ServeParams

TOO_LONG = "body_too_long"
FREE_BYTES = 64 << 10
"""Of each body, which do not count: small requests are taken whatever others send."""
BUDGET_BYTES = 128 << 20
"""Of all bodies that are held at a time, beyond the free ones; at least four of the longest."""
RETRY_SECONDS = 5


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
        more = max(0, num_bytes - FREE_BYTES) - self._held
        if more > 0:
            self._uploads.take(self._group, more)
            self._held += more


class Uploads:
    """The budget of one server; no client has more than half of it."""

    def __init__(self, params: ServeParams) -> None:
        self._params = params
        self._most = max(BUDGET_BYTES, 4 * params.max_body)
        self._held: Counter[str] = Counter()  # bytes, by key or, without one, by host

    def take(self, group: str, num_bytes: int) -> None:
        """Count bytes of a client, or raise a Failure where there is no room for them."""
        is_full = self._held.total() + num_bytes > self._most
        if is_full or self._held[group] + num_bytes > self._most // 2:
            message = "too many long bodies are being received; send this one again later"
            raise Failure(429, message, code="bodies_full", retry=RETRY_SECONDS)
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
                        raise Failure(GONE, "the client went away")
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
