"""Measures the server against the engine itself, with this process as the load generator and the server as another.

    python benchmarks/serve.py [--bundle demo/bundle] [--parts throughput gap memory]

throughput: tokens per second of 32 concurrent streams, in turn with `Engine.generate` on one batch of the same prompts.
It prints what the server adds to a token, with 32 streams and with one. The same follows for clients that take whole
answers, so that nothing is sent or read between two steps. Beside each arm stand the shares of the cores that the host
took (steal) and that other processes had. gap: the longest time between two tokens of a running stream while a prompt
of 2,000 tokens arrives, in step times. memory: the server's resident set over 2,000 requests.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import psutil
import torch

import treadle
from treadle.bundle.base_model import quiet_libraries
from treadle.common.params import SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.tokenization import prompt_ids
from treadle.experiments import workbench

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
PROMPT = "Question: A farmer has {} fields with 12 rows of corn each. How many rows are there?\n\nAnswer:"
COUNTING = "The farmer counted the {} fields of his land, and then he counted on: 1, 2, 3, 4, 5, 6,"
"""A prompt whose answer seldom ends before it must: the streams stay as many as they are."""
TOPIC = "The planet is heated by its sun and cools at night. "


@dataclass(frozen=True)
class ClientStream:
    """What one stream took: when each piece of text came (seconds), and how many tokens it had."""

    times: list[float]
    tokens: int

    def gaps(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Return the seconds between pieces, of gaps that reach into a span of time."""
        return [later - earlier for earlier, later in pairwise(self.times) if since <= later and earlier <= until]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--parts", nargs="+", choices=["throughput", "gap", "memory"],
                        default=["throughput", "gap", "memory"])  # fmt: skip
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--different", type=int, default=10**9, help="numbers that prompts of the memory part hold")
    options = parser.parse_args()
    quiet_libraries()
    engine = treadle.load(options.bundle)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.bundle}\n")
    with serving(options.bundle) as (url, process):
        if "throughput" in options.parts:
            throughput(engine, url, process, options)
        if "gap" in options.parts:
            for running in (1, 8):
                asyncio.run(gap(engine, url, running, options))
        if "memory" in options.parts:
            asyncio.run(memory(url, process, options))


@contextmanager
def serving(bundle: Path, *flags: object) -> Generator[tuple[str, psutil.Process]]:
    """Run `treadle serve` in a process of its own; yield its address and the process."""
    command = [sys.executable, "-m", "treadle", "serve", str(bundle), "--port", "0", *map(str, flags)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = None
        while found is None:
            line = process.stderr.readline()
            if not line:
                raise SystemExit("the server did not start")
            found = re.search(r"serving on (\S+)", line)
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        try:
            yield found[1], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()
            drain.wait()


async def stream(
    url: str, prompt: str | list[int], tokens: int, *, is_streamed: bool = True, **more: int
) -> ClientStream:
    """Ask for one stream, over a bare socket: an HTTP client's work for 32 streams would slow the server."""
    address = urlsplit(url)
    body = {"model": "auto", "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
    data = json.dumps(
        body | ({"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {})
    ).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(data)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data)
    answer = b""
    times: list[float] = []
    try:
        while piece := await reader.read(1 << 16):
            answer += piece
            times += [time.perf_counter()] * piece.count(b"data: {")  # the server sends an event in one piece
    finally:
        writer.close()
    if not answer.startswith(b"HTTP/1.1 200") or (is_streamed and b"data: [DONE]" not in answer):
        raise SystemExit(f"the server answered {answer[:500]!r}")
    return ClientStream(times[:-1], int(answer.rpartition(b'"completion_tokens":')[2].partition(b",")[0]))


async def streams(
    url: str, prompts: list[str], tokens: int, *, is_streamed: bool = True, **more: int
) -> list[ClientStream]:
    return await asyncio.gather(*(stream(url, prompt, tokens, is_streamed=is_streamed, **more) for prompt in prompts))


@dataclass
class ServerArm:
    """What one way to generate took, a number for each round.

    Attributes:
        rates: tokens per second of all sequences.
        steps: seconds a token of the longest sequence.
        between: seconds between two tokens of a sequence.
        steal: share of the cores that the host took.
        others: share of the cores that processes had which do not belong to this.
    """

    rates: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    steal: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self, server: psutil.Process) -> Generator[list[int]]:
        """Time a block, which puts in how many tokens each sequence had."""
        tokens: list[int] = []
        started, own, before = time.perf_counter(), seconds_of(server), psutil.cpu_times()
        yield tokens
        seconds, after = time.perf_counter() - started, psutil.cpu_times()
        self.rates.append(sum(tokens) / seconds)
        self.steps.append(seconds / max(tokens))
        cores = seconds * psutil.cpu_count()
        self.steal.append((after.steal - before.steal) / cores)
        busy = sum(getattr(after, kind) - getattr(before, kind) for kind in ("user", "nice", "system", "softirq"))
        self.others.append((busy - seconds_of(server) + own) / cores)


def seconds_of(server: psutil.Process) -> float:
    """Return the processor's seconds of this process and of the server's."""
    return sum(times.user + times.system for times in (psutil.Process().cpu_times(), server.cpu_times()))


def throughput(engine: Engine, url: str, server: psutil.Process, options: argparse.Namespace) -> None:
    """Print all rates; the prompts of each arm of a round are new to the server, so that no cached prefix helps."""
    asyncio.run(streams(url, [COUNTING.format("many")], 8))
    engine.generate(COUNTING.format("many"), sampling=SamplingParams(max_tokens=8))
    counts = options.streams, 1
    arms = {
        (count, name): ServerArm()
        for count in counts
        for name in ("Engine.generate", "server", "server, whole answers")
    }
    for number in range(options.rounds):
        for count in counts:
            prompts, others = (
                [COUNTING.format(1 + index + 1000 * number + 100 * (count == 1) + more) for index in range(count)]
                for more in (0, 500)
            )
            own, served, whole = (arms[count, name] for name in ("Engine.generate", "server", "server, whole answers"))
            with own.timed(server) as tokens:
                done = engine.generate(prompts, sampling=SamplingParams(max_tokens=options.tokens))
                tokens += [len(each.token_ids) for each in done]
            with served.timed(server) as tokens:
                answers = asyncio.run(streams(url, prompts, options.tokens))
                tokens += [each.tokens for each in answers]
            with whole.timed(server) as tokens:
                tokens += [each.tokens for each in asyncio.run(streams(url, others, options.tokens, is_streamed=False))]
            served.between += [each for one in answers for each in one.gaps()]
            own.between += steps_of(engine, prompts, options.tokens)
    print_arms(arms, counts)


def print_arms(arms: dict[tuple[int, str], ServerArm], counts: Sequence[int]) -> None:
    print("| sequences | arm | tokens/s | ms a token of a sequence | against the engine | steal | others |")
    print("|---|---|---|---|---|---|---|")
    for (count, name), arm in arms.items():
        base = arms[count, "Engine.generate"]
        rate, step = median(arm.rates), median(arm.steps)
        added = f"{rate / median(base.rates):.3f}, {1000 * (step - median(base.steps)):+.2f} ms a token"
        noise = " | ".join(f"{100 * median(share):.1f} %" for share in (arm.steal, arm.others))
        print(f"| {count} | {name} | {rate:.1f} | {1000 * step:.2f} | {added} | {noise} |")
    print()
    for count in counts:
        own, served = (1000 * median(arms[count, arm].between) for arm in ("Engine.generate", "server"))
        print(f"{count} sequences, median time between two tokens: engine {own:.2f} ms, server {served:.2f} ms, "
              f"{served - own:+.2f} ms")  # fmt: skip
    print()


def steps_of(engine: Engine, prompts: Sequence[str], tokens: int) -> list[float]:
    """Return the seconds of each step of one batch of prompts, once they are read."""
    ids = [prompt_ids(engine.tokenizer, prompt) for prompt in prompts]
    batch = workbench.start_batch(engine, ids, tokens, engine.router.params)
    seconds: list[float] = []
    while batch.rows:
        before = time.perf_counter()
        batch.step()
        seconds.append(time.perf_counter() - before)
    return seconds


async def gap(engine: Engine, url: str, running: int, options: argparse.Namespace) -> None:
    """Print the longest gap of running streams while a long prompt arrives, and without one."""
    ids = engine.tokenizer(f"{running} running: " + TOPIC * options.prompt_tokens).input_ids[: options.prompt_tokens]
    prompts = [PROMPT.format(7000 + index + 100 * running) for index in range(running)]
    each_token = {"logprobs": 0}  # a piece for every token, also for those without text
    quiet = await streams(url, prompts, options.tokens, **each_token)
    steps = [each for one in quiet for each in one.gaps()]
    step = median(steps)
    asked = [stream(url, "Again: " + prompt, 8 * options.tokens, **each_token) for prompt in prompts]
    going = [asyncio.ensure_future(each) for each in asked]
    await asyncio.sleep(20 * step)
    started = time.perf_counter()
    late = await stream(url, ids, 1, **each_token)
    until = time.perf_counter()
    done = await asyncio.gather(*going)
    during = [each for one in done for each in one.gaps(started, until)]
    lasted = sum(one.times[-1] > until for one in done)
    print(f"{running} running: step {1000 * step:.1f} ms, longest gap {1000 * max(steps):.1f} ms")
    print(
        f"  while {len(ids)} tokens arrive: longest gap {1000 * max(during):.1f} ms = {max(during) / step:.2f} steps, "
    )
    print(
        f"  median gap {1000 * median(during):.1f} ms; the late one's first token after {late.times[0] - started:.2f} s"
    )
    print(f"  {lasted} of {running} streams ran until then\n")


async def memory(url: str, process: psutil.Process, options: argparse.Namespace) -> None:
    """Print the server's resident set as requests go by; the first tenth fills caches."""
    print("| requests | resident MiB |\n|---|---|")
    sizes: dict[int, float] = {}
    marks = [options.requests * tenth // 10 for tenth in range(11)]
    limit = asyncio.Semaphore(options.streams)

    async def one(number: int) -> None:
        async with limit:
            await stream(url, PROMPT.format(number % options.different) * (1 + number % 4), 4 + number % 13)

    for first, end in pairwise(marks):
        await asyncio.gather(*(one(number) for number in range(first, end)))
        sizes[end] = process.memory_info().rss / 2**20
        print(f"| {end} | {sizes[end]:.1f} |", flush=True)
    half = sizes[marks[5]]
    print(f"\nfrom request {marks[5]} to {marks[10]}: {sizes[marks[10]] - half:+.1f} MiB\n")


if __name__ == "__main__":
    main()
