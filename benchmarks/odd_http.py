"""Sends requests that are almost HTTP through raw sockets, and says how the server answered.

    python benchmarks/odd_http.py [--bundle demo/bundle] [--requests 500] [--seed 0]

Each request is a good one with a few changes: lines doubled, cut, swapped, filled with random bytes, other lengths and
encodings, upgrade offers. Some connections end in the middle, and some are silent. Meanwhile a good client asks for the
same answer again and again. Exits with 1 if a request got a 5xx or never ended, or if the good client got another
answer.
"""

import argparse
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from serve import serving

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
BODY = {"model": "auto", "prompt": "add three", "max_tokens": 2, "temperature": 0}
TARGETS = """/live /health /v1/models /v1/completions /v1/chat/completions /v1/route /v1/adapters/x / /page/app.js
http://localhost/live http://evil.example/live //evil.example/%2e%2e /page/%2e%2e/app.py /v1/models/%00%ff *
localhost:80""".split()
HEADERS = [
    b"Host: evil.example", b"Host:", b"Host: [::1", b"Host: localhost", b"Origin: http://evil.example", b"Origin: null",
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 0x10",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, identity",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk", b"Connection: close",
    b"Connection: Upgrade\r\nUpgrade: websocket", b"Expect: 100-continue", b"Expect: nothing",
    b"Content-Type: text/plain", b"Content-Encoding: gzip", b"Authorization: Bearer \xff\xfe", b"X-Request-Id: \xff",
    b"X: a\r\n b", b"X : y", b": x", b"traceparent: 00-zz-zz-00", b"Range: bytes=0-", b"Cookie: " + b"x" * 40_000,
    b"Sec-Fetch-Site: cross-site",
]  # fmt: skip
SECONDS = 60.0
"""After which a request has no end; the server gives the head of a request 30."""
CLIENTS = 32
"""Requests at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serving(options.bundle, "--keep-alive", 1, "--read-timeout", 2) as (url, process):
        port, size, neighbour = urlsplit(url).port or 0, process.memory_info().rss / 2**20, Neighbour(url)

        def one(number: int) -> str:
            chooser = random.Random(f"{options.seed} {number}")
            sent = odd_request(chooser)
            end = send(port, sent, chooser)
            if end.startswith("5") or end == "no end":
                print(f"  request {number}: {end}: {sent[:300]!r}")
            return end

        with neighbour, ThreadPoolExecutor(CLIENTS) as pool:
            ends = Counter(pool.map(one, range(options.requests)))
        print(f"{options.requests} requests, answers {dict(sorted(ends.items()))}")
        print(f"neighbour: {neighbour.right} right, {neighbour.wrong} wrong, longest {neighbour.longest:.2f} s")
        print(f"resident MiB {size:.0f} -> {process.memory_info().rss / 2**20:.0f}")
        is_wrong = neighbour.wrong or not neighbour.right or any(end.startswith("5") or end == "no end" for end in ends)
    sys.exit(1 if is_wrong else 0)


class Neighbour:
    """A good client that asks for one answer all the time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._expected = self._ask()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.right, self.wrong, self.longest = 0, 0, 0.0

    def __enter__(self) -> "Neighbour":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _ask(self) -> Any:
        answer = httpx.post(f"{self._url}/v1/completions", json=BODY, timeout=60)
        return answer.json().get("choices")

    def _run(self) -> None:
        while not self._is_over.wait(0.02):
            started = time.perf_counter()
            is_right = self._ask() == self._expected
            self.longest = max(self.longest, time.perf_counter() - started)
            self.right, self.wrong = self.right + is_right, self.wrong + (not is_right)


def odd_request(chooser: random.Random) -> bytes:
    """Return the bytes of a good request with a few changes."""
    body = json.dumps({**BODY, "stream": chooser.random() < 0.3}).encode()
    method = chooser.choice(
        [b"POST"] * 20 + [b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"CONNECT", b"PRI", b"post", b"\xff"]
    )
    version = chooser.choice([b"HTTP/1.1"] * 30 + [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.12", b"HTTP", b""])
    target = chooser.choice(["/v1/completions"] * 20 + TARGETS).encode()
    lines = [b" ".join([method, target, version]), b"Host: localhost", b"Content-Length: %d" % len(body)]
    for _ in range(chooser.randrange(3)):
        lines.insert(chooser.randrange(1, len(lines) + 1), chooser.choice(HEADERS))
    if chooser.random() < 0.1:
        del lines[chooser.randrange(len(lines))]
    if chooser.random() < 0.1:
        lines.append(chooser.choice(lines))
    whole = chooser.choice([b"\r\n"] * 30 + [b"\n", b"\r"]).join([*lines, b"", body])
    if chooser.random() < 0.1:
        place = chooser.randrange(len(whole))
        whole = whole[:place] + chooser.randbytes(chooser.randrange(1, 30)) + whole[place + chooser.randrange(10) :]
    if chooser.random() < 0.1:
        whole = whole[: chooser.randrange(len(whole))]
    return whole * chooser.choice([1] * 9 + [3])


def send(port: int, sent: bytes, chooser: random.Random) -> str:
    """Send a request in pieces; return its first status, or how else it ended."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(SECONDS)
        try:
            step = chooser.choice([1 << 20, 1 << 20, 64])
            for start in range(0, len(sent), step):
                client.sendall(sent[start : start + step])
            if chooser.random() < 0.1:
                return "left"
            received = b"".join(iter(lambda: client.recv(65536), b""))
        except TimeoutError:
            return "no end"
        except ConnectionError:
            return "closed"
    return received[9:12].decode("latin-1") if received.startswith(b"HTTP/1.1 ") else "closed"


if __name__ == "__main__":
    main()
