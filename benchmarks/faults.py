"""Breaks the server on purpose, in a process of its own, and prints what happened.

    python benchmarks/faults.py [--bundle demo/bundle] [--parts random schema]

random: requests with random fields, bytes, routes and headers. schema: requests that schemathesis derives from the
served OpenAPI document. No request may get a 5xx or hang, and the server must not grow.
"""

import argparse
import asyncio
import json
import random
import re
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
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
    parts = ["random", "schema"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=200, help="of schemathesis, an operation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serving(options.bundle, *FLAGS) as (url, process):
        if "random" in options.parts:
            asyncio.run(send_random(url, process, options))
        if "schema" in options.parts:
            run_schemathesis(url, process, options)


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


if __name__ == "__main__":
    main()
