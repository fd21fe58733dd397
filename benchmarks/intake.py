"""Prints how soon /live and a small request are answered while others send the largest requests allowed.

    python benchmarks/intake.py [--bundle demo/bundle] [--seconds 20] [--parts alone prompts route values bodies unread]

prompts: texts of 4 MiB, most of them abandoned. route: texts of 1 MB. values: bodies of as many numbers, or lists and
escapes, as fit. bodies: 60 that never end. unread: clients that ask for long answers and read none. The target is an
answer of /live within 100 ms; `alone` says what the machine gives without any of this.
"""

import argparse
import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve import serving

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
SMALL = {"model": "base", "prompt": "2 + 2 =", "max_tokens": 1}
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with serving(options.bundle) as (url, process):
        host, port = url.removeprefix("http://").split(":")
        for name in options.parts:
            ends = threading.Event()
            attack = threading.Thread(target=repeat, args=[PARTS[name], (host, int(port)), ends])
            attack.start()
            time.sleep(1)
            live = sample((host, int(port)), "GET", "/live", None, options.seconds / 2, 0.01)
            small = sample((host, int(port)), "POST", "/v1/completions", SMALL, options.seconds / 2, 0.05)
            ends.set()
            attack.join()
            size = process.memory_info().rss / MIB
            print(
                f"{name}: /live {figures(live)}; a completion of one token {figures(small)}; {size:.0f} MiB", flush=True
            )


def repeat(
    attack: Callable[[tuple[str, int], threading.Event], None], at: tuple[str, int], ends: threading.Event
) -> None:
    while not ends.is_set():
        with contextlib.suppress(OSError):
            attack(at, ends)


def sample(at: tuple[str, int], method: str, path: str, body: Any, seconds: float, pause: float) -> list[float]:
    """Return how long each of many requests on one connection took, in milliseconds, sorted."""
    connection = http.client.HTTPConnection(*at, timeout=120)
    content = None if body is None else json.dumps(body)
    headers = {} if body is None else {"Content-Type": "application/json"}
    times: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.perf_counter()
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        times.append(1000 * (time.perf_counter() - started))
        time.sleep(pause)
    return sorted(times)


def figures(times: list[float]) -> str:
    middle, most = times[len(times) // 2], times[min(len(times) - 1, len(times) * 99 // 100)]
    return f"median {middle:.1f}, 99 % {most:.0f}, longest {times[-1]:.0f} ms of {len(times)}"


def send(at: tuple[str, int], path: str, body: bytes, length: int | None = None) -> socket.socket:
    client = socket.create_connection(at)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return client


def prompts(at: tuple[str, int], ends: threading.Event) -> None:
    for text in ("\U0001f600" * 1_000_000, " " * 600_000, "the cat sat on the mat " * 6000):
        body = json.dumps({**SMALL, "prompt": text}, ensure_ascii=False).encode()
        clients = [send(at, "/v1/completions", body) for _ in range(3)]
        ends.wait(0.2)
        for client in clients:
            client.close()


def route(at: tuple[str, int], ends: threading.Event) -> None:
    words = " ".join("".join(random.choices("abcdefghijklmnop", k=7)) for _ in range(131_000))
    clients = [send(at, "/v1/route", json.dumps({"text": words}).encode()) for _ in range(3)]
    ends.wait(2)
    for client in clients:
        client.close()


def values(at: tuple[str, int], ends: threading.Event) -> None:
    bodies = [json.dumps({**SMALL, "prompt": prompt}).encode() for prompt in ([1] * 499_000, ['"['] * 240_000)]
    bodies += [b'{"prompt": [' + b'"[{",' * 800_000, b'{"prompt": "' + b"\\" * 4_000_000, b'{"p":[' + b"1," * 2_000_000]
    for body in bodies:
        send(at, "/v1/completions", body).close()
        ends.wait(0.1)
        with send(at, "/v1/completions", body) as client:
            client.recv(100)


def bodies(at: tuple[str, int], ends: threading.Event) -> None:
    clients: list[socket.socket] = []
    for path in ["/live", "/v1/completions"] * 30:
        with contextlib.suppress(OSError):
            clients.append(send(at, path, b"x" * (4 * MIB - 1), 4 * MIB))
    ends.wait(15)
    for client in clients:
        client.close()


def unread(at: tuple[str, int], ends: threading.Event) -> None:
    body = {**SMALL, "prompt": "the cat " * 300, "n": 16, "echo": True, "logprobs": 20}
    clients = [send(at, "/v1/completions", json.dumps(body).encode()) for _ in range(2)]
    ends.wait(10)
    for client in clients:
        client.close()


def wait(_: tuple[str, int], ends: threading.Event) -> None:
    ends.wait()


PARTS: dict[str, Callable[[tuple[str, int], threading.Event], None]] = {
    "alone": wait,
    "prompts": prompts,
    "route": route,
    "values": values,
    "bodies": bodies,
    "unread": unread,
}

if __name__ == "__main__":
    main()
