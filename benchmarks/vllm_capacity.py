"""Prints what a pool of adapters costs in vLLM: memory, weight traffic and arithmetic against the base, router cores.

    OMP_NUM_THREADS=1 python benchmarks/vllm_capacity.py [--every 2] [--requests 10000] [--replica-rate 50]

Sizes are counted on the stacks themselves (`treadle.serving.vllm.stacks`, made on torch's meta device, which stores
nothing); the router's two constants are measured here, on the demo's bundle: medians of the thread's own time. Needs no
vLLM.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import thread_time

import torch

from treadle.bundle.base_model import load_tokenizer
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.schedule import Schedule
from treadle.serving.vllm.shards import LayerShard, ShardPart
from treadle.serving.vllm.stacks import GateBoard, LayerStack

ROOT = Path(__file__).parents[1]
GROUP, MANY = 64, 1000
ATTENTION, ALL = ("q", "v"), ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model."""

    name: str
    layers: int
    hidden: int
    kv: int
    middle: int
    parameters: float


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 192, 1536, 135e6),
    Shape("Llama-3.1-8B", 32, 4096, 1024, 14336, 8.0e9),
    Shape("Llama-3.1-70B", 80, 8192, 1024, 28672, 70.6e9),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step (--max-num-batched-tokens)")
    parser.add_argument("--requests", type=int, default=10_000, help="a second, of all replicas together")
    parser.add_argument("--replica-rate", type=int, default=50, help="requests a second and replica")
    parser.add_argument("--prompt", type=int, default=500, help="tokens")
    parser.add_argument("--answer", type=int, default=200, help="tokens")
    parser.add_argument("--every", type=int, default=2, help="tokens of an answer between two decisions")
    parser.add_argument("--streams", type=int, default=64, help="that a replica answers at once")
    options = parser.parse_args()
    print(f"rank {options.rank}, 16-bit, {options.tokens} tokens a step; factors as they are stacked, gates beside\n")
    print("| base | modules | adapters | factors, GiB | gates, GiB | of the base's weights |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        for targets in (ATTENTION, ALL):
            for adapters in (4, 16, GROUP, MANY):
                factors, gates = size(shape, targets, adapters, options.rank, options.tokens)
                name = "q, v" if targets is ATTENTION else "all linear"
                share = factors / (2 * shape.parameters)
                sizes = f"{factors / 2**30:.2f} | {gates / 2**30:.2f}"
                print(f"| {shape.name} | {name} | {adapters} | {sizes} | {share:.1%} |")
    groups(options)
    router(options)


def groups(options: argparse.Namespace) -> None:
    """Print what a thousand adapters cost, in one engine and in groups."""
    shape = next(each for each in SHAPES if each.name == "Llama-3.1-8B")
    for adapters in (MANY, GROUP):
        factors, _ = size(shape, ATTENTION, adapters, options.rank, options.tokens)
        times = 1 + factors / (2 * shape.parameters)
        more = f"{factors / 2**30:.1f} GiB more ({times - 1:.1%}), {times:.2f} times the base's bytes a step"
        print(f"\n{adapters} adapters on q and v of {shape.name}: {more}", end="")
    print(f"; {math.ceil(MANY / GROUP)} groups of {GROUP} hold {MANY}")


def router(options: argparse.Namespace) -> None:
    """Print what the router costs, and the arithmetic from its two constants."""
    decision, token = router_constants()
    due = options.answer / options.every  # decisions of an answer
    prompts = options.requests * options.prompt * token
    answers = options.requests * due * decision
    replicas = options.requests / options.replica_rate
    step = options.streams / options.every * decision
    each, own = f"{1e6 * decision:.1f} us", f"{1e6 * token:.1f} us"
    print(f"\nrouter, a thread's own time: {each} a decision of a running stream, {own} a token of a prompt")
    print(f"{options.requests} x {options.prompt} x {own} = {prompts:.0f} cores for the prompts")
    print(
        f"{options.requests} x {options.answer} / every {options.every} x {each} = {answers:.0f} cores for the answers"
    )
    print(f"at {options.replica_rate} requests a second and replica: {replicas:.0f} replicas, each with "
          f"{prompts / replicas:.2f} + {answers / replicas:.2f} of a core")  # fmt: skip
    print(f"{options.streams} streams, every {options.every}: {options.streams / options.every:.0f} x {each} = "
          f"{1e3 * step:.2f} ms a step")  # fmt: skip


def size(shape: Shape, targets: tuple[str, ...], adapters: int, rank: int, tokens: int) -> tuple[int, int]:
    """Return the bytes of all layers' factors, and of the gates."""
    device, dtype = torch.device("meta"), torch.bfloat16
    board = GateBoard(tokens, device, dtype)
    fused = {
        "qkv": (shape.hidden, {"q": shape.hidden, "k": shape.kv, "v": shape.kv}),
        "o": (shape.hidden, {"o": shape.hidden}),
        "gate_up": (shape.hidden, {"gate": shape.middle, "up": shape.middle}),
        "down": (shape.middle, {"down": shape.hidden}),
    }
    factors = 0
    for size_in, outputs in fused.values():
        shard = _shard(size_in, outputs)
        room = [dict.fromkeys(range(adapters), rank) if name in targets else {} for name in outputs]
        if any(room):
            stack = LayerStack(shard, board, room)
            own = sum(each.nbytes for name, each in stack.named_buffers() if name != "gates")
            factors += shape.layers * own
    return factors, sum(each.nbytes for each in board.buffers())


def _shard(size_in: int, outputs: dict[str, int]) -> LayerShard:
    parts, start = [], 0
    for name, rows in outputs.items():
        parts.append(ShardPart(name, (size_in, rows), slice(0, size_in), slice(0, rows), start))
        start += rows
    return LayerShard(tuple(parts), size_in, start)


def router_constants() -> tuple[float, float]:
    """Return the seconds of a decision, and of a token of a prompt: 64 streams of the README, the demo's bundle."""
    bundle, mixture = open_bundle(PluginParams(bundle=str(ROOT / "demo" / "bundle")))
    tokenizer = load_tokenizer(bundle.base_model)
    ids = tokenizer((ROOT / "README.md").read_text("utf-8")).input_ids
    schedule = Schedule(mixture, tokenizer)
    streams = [(schedule.open({"every": 1}, 200), ids[9 * index : 9 * index + 400]) for index in range(64)]
    # words are looked up once: a server that has answered for a while has met almost all
    schedule.decide([(schedule.open({"every": 1}, 400), text, 400) for _, text in streams])
    prompts: list[float] = []
    for stream, text in streams:
        started = thread_time()
        schedule.decide([(stream, text[:200], 200)])
        prompts.append(thread_time() - started)
    seconds: list[float] = []
    for end in range(201, 401):
        entries = [(str(i), stream, text[:end], end - 1, end) for i, (stream, text) in enumerate(streams)]
        started = thread_time()
        schedule.plan(entries)
        seconds.append(thread_time() - started)
    return median(seconds) / len(streams), median(prompts) / 200


if __name__ == "__main__":
    main()
