"""Requests as clients on the wire write them: offers of HTTP/2, HTTP/1.0, HEAD, whole addresses, two lengths."""

import json
import re
import socket
from collections.abc import Generator
from pathlib import Path

import pytest

from serving import Serving, serving

TEXTS = "/v1/completions"
BODY = json.dumps({"model": "auto", "prompt": "add", "max_tokens": 3, "temperature": 0}).encode()
STREAMED = BODY.removesuffix(b"}") + b', "stream": true}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    "h2c and websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket, h2c\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AA\r\n",
    "TLS": b"Connection: Upgrade\r\nUpgrade: TLS/1.0, HTTP/1.1\r\n",
}
LIVE, END = b"GET /live HTTP/1.1\r\nHost: localhost\r\n", b"Connection: close\r\n\r\n"
"""A request and the headers that end it, with its connection."""


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, admin_key="root", adapter_dir=str(bundle_folder.parent)) as each:
        yield each


def post(body: bytes = BODY, extra: bytes = b"", version: bytes = b"1.1") -> bytes:
    head = b"POST %s HTTP/%s\r\nHost: localhost\r\n" % (TEXTS.encode(), version)
    length = b"" if b"Transfer-Encoding" in extra else b"Content-Length: %d\r\n" % len(body)
    return head + length + extra + b"\r\n" + body


def exchange(served: Serving, *parts: bytes) -> bytes:
    """Send parts and return everything that comes until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", served.server.port)) as client:
        client.settimeout(60)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        try:
            for part in parts:
                client.sendall(part)
            while part := client.recv(65536):
                received += part
        except ConnectionError:  # the server has closed on what follows a refusal
            pass
        return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", received)]


@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_of_another_protocol_is_answered_in_this_one(served: Serving, offer: str) -> None:
    plain = served.request("POST", TEXTS, content=BODY).json()["choices"]
    asked = OFFERS[offer]
    chunked = post(CHUNKED, asked + b"Transfer-Encoding: chunked\r\n")
    for whole in (post(extra=asked), chunked):
        received = exchange(served, whole, LIVE + END)  # the connection goes on
        assert statuses(received) == [200, 200]
        answer = received.split(b"\r\n\r\n", 1)[1]
        assert json.JSONDecoder().raw_decode(answer.decode())[0]["choices"] == plain
    assert b"101" not in received.split(b"\r\n")[0]


def test_an_offer_in_pieces_and_many_in_one_piece(served: Serving) -> None:
    whole = post(extra=OFFERS["h2c"])
    parts = [whole[start : start + 50] for start in range(0, len(whole), 50)]
    assert statuses(exchange(served, *parts, LIVE + END)) == [200, 200]
    many = (LIVE + OFFERS["h2c"] + b"\r\n") * 20 + LIVE + END
    assert statuses(exchange(served, many)) == [200] * 21


def test_an_answer_to_http_1_0_ends_with_its_connection(served: Serving) -> None:
    whole = exchange(served, post(version=b"1.0"))
    head, _, body = whole.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert f"content-length: {len(body)}".encode() in head
    head, _, body = exchange(served, post(STREAMED, version=b"1.0")).partition(b"\r\n\r\n")
    assert b"200" in head.splitlines()[0]
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert "".join(texts) == json.loads(whole.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
    bare = exchange(served, b"GET /live HTTP/1.0\r\n\r\n")
    assert statuses(bare) == [200]
    modern = exchange(served, post(STREAMED, END[:-2]))
    assert b"transfer-encoding: chunked" in modern


@pytest.mark.parametrize("path", ["/", "/live", "/v1/models", "/page/app.js", "/nowhere", TEXTS])
def test_head_is_get_without_a_body(served: Serving, path: str) -> None:
    got = served.request("GET", path)
    head = served.request("HEAD", path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET http://localhost:1234/live HTTP/1.1", 200),
        (b"GET http://LOCALHOST/live?x#y HTTP/1.1", 200),
        (b"GET http://evil.example/live HTTP/1.1", 403),
        (b"GET http://user@localhost/live HTTP/1.1", 400),
        (b"CONNECT localhost:80 HTTP/1.1", 400),
        (b"PRI * HTTP/2.0", 400),
        (b"GET /live HTTP/3.1", 400),
        (b"OPTIONS * HTTP/1.1", 404),
    ],
)
def test_what_a_request_line_may_say(served: Serving, line: bytes, status: int) -> None:
    assert statuses(exchange(served, line + b"\r\nHost: localhost\r\n" + END)) == [status]


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 2\r\nContent-Length: 2\r\n",
        b"Content-Length: 2\r\nContent-Length: 3\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Content-Length: +2\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Content-Length : 2\r\n",
    ],
)
def test_a_length_that_can_be_read_in_two_ways_is_refused(served: Serving, headers: bytes) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % TEXTS.encode()
    received = exchange(served, head + headers + b"\r\n{}GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert statuses(received) == [400]
    assert b"invalid_http" in received


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "%2e%2e%2fmath", "../math", "%2fetc%2fpasswd", "math%00", "a%0d%0ab", "%ff", "%zz"]
)
def test_a_name_in_a_path_is_a_name_and_no_path(served: Serving, name: str) -> None:
    names = served.engine.adapter_names
    key = b"Authorization: Bearer root\r\n"
    for method, path in ((b"DELETE", "/v1/adapters/"), (b"GET", "/v1/models/"), (b"GET", "/page/")):
        line = b"%s %s HTTP/1.1\r\nHost: localhost\r\n" % (method, (path + name).encode())
        received = exchange(served, line + key + END)
        assert statuses(received) == [404], received
        assert b"\r\nb\r\n" not in received
    assert served.engine.adapter_names == names
