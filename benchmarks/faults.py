"""Breaks the server on purpose, in a process of its own, and prints what happened.

    python benchmarks/faults.py [--bundle demo/bundle] [--parts random schema slow kill]

random: requests with random fields, bytes, routes and headers. schema: requests that schemathesis derives from the
served OpenAPI document. slow: a client that reads one byte a second. kill: kill -9 under load, and a restart.
No request may get a 5xx or hang, and the server must not grow.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from serve import serving

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
ROUTES = """/v1/completions /v1/chat/completions /v1/route /v1/adapters /v1/load_lora_adapter /v1/unload_lora_adapter
/v1/models /metrics /health /openapi.json / /v1/models/x""".split()
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "auto", "prompt": "add three", "max_tokens": 4},
    "/v1/chat/completions": {
        "model": "auto",
        "messages": [{"role": "user", "content": "add three"}],
        "max_tokens": 4,
    },
    "/v1/route": {"text": "add three"},
}
FIELDS = """model prompt messages max_tokens temperature top_p top_k n seed stop stream logprobs top_logprobs echo
treadle stream_options text user tools best_of""".split()
OPTIONS = (
    """every rule score boost temperature fixed window fallback prefill past combine top_k trace adapters""".split()
)
FLAGS = ["--max-tokens", 16, "--max-queue", 4096, "--admin-key", "root", "--adapter-dir", "/tmp", "--read-timeout", 5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parts = ["random", "schema", "slow", "kill"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=200, help="of schemathesis, an operation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if {"random", "schema", "slow"} & set(options.parts):
        with serving(options.bundle, *FLAGS) as (url, process):
            if "random" in options.parts:
                asyncio.run(send_random(url, process, options))
            if "schema" in options.parts:
                run_schemathesis(url, process, options)
            if "slow" in options.parts:
                asyncio.run(read_slowly(url))
    if "kill" in options.parts:
        kill(options.bundle)


async def send_random(url: str, process: psutil.Process, options: argparse.Namespace) -> None:
    """Print the statuses of random requests, the longest time, and how the server grew."""
    chooser = random.Random(options.seed)
    statuses: Counter[str] = Counter()
    longest = 0.0
    limit = asyncio.Semaphore(16)
    sizes = [process.memory_info().rss / 2**20]
    async with httpx.AsyncClient(timeout=120) as client:

        async def one() -> None:
            nonlocal longest
            request = random_request(chooser)
            async with limit:
                started = time.perf_counter()
                try:
                    answer = await client.request(url=url + request.pop("path"), **request)
                    statuses[str(answer.status_code)] += 1
                    if answer.status_code >= 500:
                        print(f"  {answer.status_code}: {answer.text[:300]}\n  {str(request)[:500]}")
                except httpx.LocalProtocolError:
                    statuses["not sent: no HTTP"] += 1
                longest = max(longest, time.perf_counter() - started)

        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(options.requests // 10)))
            sizes.append(process.memory_info().rss / 2**20)
    print(f"random: {options.requests} requests, statuses {dict(sorted(statuses.items()))}, longest {longest:.2f} s")
    print(f"  resident MiB: {', '.join(f'{size:.0f}' for size in sizes)}\n")


def random_request(chooser: random.Random) -> dict[str, Any]:
    path = chooser.choice([*VALID, *VALID, *VALID, *ROUTES])
    method = chooser.choice(["POST"] * 9 + ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
    headers = {"Authorization": "Bearer root"} if chooser.random() < 0.5 else {}
    if chooser.random() < 0.1:
        return {
            "method": method,
            "path": path,
            "headers": headers,
            "content": chooser.randbytes(chooser.randrange(200)),
        }
    body = dict(VALID.get(path, {}))
    for _ in range(chooser.randrange(4)):
        body[chooser.choice(FIELDS)] = random_value(chooser, 2)
    if chooser.random() < 0.3:
        body["treadle"] = {chooser.choice(OPTIONS): random_value(chooser, 1) for _ in range(chooser.randrange(3))}
    content = json.dumps(body).encode()
    if chooser.random() < 0.1:
        content = content[: chooser.randrange(len(content))]
    return {"method": method, "path": path, "headers": headers, "content": content}


def random_value(chooser: random.Random, depth: int) -> Any:
    plain = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        17,
        1e9,
        -0.5,
        0.3,
        1.0,
        10**30,
        "",
        "auto",
        "math",
        "base",
        "softmax",
        "\0",
    ]
    kind = chooser.randrange(6)
    if kind == 0 and depth:
        return [random_value(chooser, depth - 1) for _ in range(chooser.randrange(4))]
    if kind == 1 and depth:
        keys = [chooser.choice(["role", "content", "type", "text", "math", "include_usage", "x"]) for _ in range(2)]
        return {key: random_value(chooser, depth - 1) for key in keys}
    if kind == 2:
        letters = string.printable + "\u00e9\u4e2d\U0001f600\ud800\u202e"
        return "".join(chooser.choice(letters) for _ in range(chooser.randrange(300)))
    return chooser.choice(plain)


def run_schemathesis(url: str, process: psutil.Process, options: argparse.Namespace) -> None:
    """Print what schemathesis found; the requests are counted by the server itself."""
    before, size = count_requests(url), process.memory_info().rss / 2**20
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color",
               "--checks", "not_a_server_error", "--max-examples", str(options.examples), "--seed", str(options.seed),
               "-H", "Authorization: Bearer root", "--request-timeout", "60"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # for what it keeps between runs
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    statuses = count_requests(url) - before
    print(f"schema: {sum(statuses.values())} requests, statuses {dict(sorted(statuses.items()))}")
    print(f"  schemathesis ended with {done.returncode} (0 = no 5xx and no hang)")
    print(f"  resident MiB {size:.0f} -> {process.memory_info().rss / 2**20:.0f}\n")
    if done.returncode:
        print(done.stdout)


def count_requests(url: str) -> Counter[str]:
    """Return how many requests had each status, by the server's own figures."""
    found: Counter[str] = Counter()
    for status, count in re.findall(
        r'treadle_requests_total{outcome="(\d+)".*} (\S+)', httpx.get(f"{url}/metrics").text
    ):
        found[status] += int(float(count))
    return found


async def read_slowly(url: str) -> None:
    """Print how long others' requests take while a client reads one byte a second."""

    async def ask(count: int) -> float:
        async with httpx.AsyncClient(timeout=120) as client:
            times: list[float] = []
            for _ in range(count):
                started = time.perf_counter()
                (await client.post(f"{url}/v1/completions", json=VALID["/v1/completions"])).raise_for_status()
                times.append(time.perf_counter() - started)
        return median(times)

    before = await ask(20)
    body = json.dumps({**VALID["/v1/completions"], "stream": True, "logprobs": 5, "n": 16, "max_tokens": 16}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((host, int(port)))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until = time.monotonic() + 10
        during = ask(20)
        task = asyncio.ensure_future(during)
        read = 0
        while time.monotonic() < until:
            read += len(slow.recv(1))
            await asyncio.sleep(1)
        with_slow = await task
    print(f"slow: {read} bytes read in 10 s; medians of 20 requests: {1000 * with_slow:.0f} ms beside it, "
          f"{1000 * before:.0f} ms alone\n")  # fmt: skip


def kill(bundle: Path) -> None:
    """Print what clients see when the server is killed under load, and how soon a new one serves."""
    with serving(bundle) as (url, process):
        seen = asyncio.run(kill_under_load(url, process))
    print(f"kill -9: the {sum(seen.values())} streams that ran ended with {dict(seen)}")
    started = time.perf_counter()
    with serving(bundle) as (url, _):
        httpx.post(f"{url}/v1/completions", json=VALID["/v1/completions"], timeout=120).raise_for_status()
        print(f"  a restart answered after {time.perf_counter() - started:.1f} s\n")


async def kill_under_load(url: str, process: psutil.Process) -> Counter[str]:
    seen: Counter[str] = Counter()

    async def one(client: httpx.AsyncClient) -> None:
        body = {**VALID["/v1/completions"], "stream": True, "max_tokens": 400}
        try:
            answer = await client.post(f"{url}/v1/completions", json=body)
            seen["done" if answer.text.endswith("[DONE]\n\n") else "cut off without an error"] += 1
        except httpx.TransportError as error:
            seen[type(error).__name__] += 1

    async with httpx.AsyncClient(timeout=120) as client:
        running = [asyncio.ensure_future(one(client)) for _ in range(16)]
        await asyncio.sleep(1)
        process.kill()
        await asyncio.gather(*running)
    return seen


if __name__ == "__main__":
    main()
