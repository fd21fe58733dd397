"""Prints what a pool of adapters costs in vLLM: memory, weight traffic and arithmetic against the base, router cores.

    python benchmarks/vllm_capacity.py [--decision 30] [--requests 10000]

Sizes are counted on the stacks themselves (`treadle.vllm_plugin.stacks`, made on torch's meta device, which stores
nothing); the router's two constants are measured here, on the demo's bundle. Needs no vLLM.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import thread_time

import torch

from treadle.models import load_tokenizer
from treadle.vllm_plugin.mixture import open_bundle
from treadle.vllm_plugin.params import PluginParams
from treadle.vllm_plugin.schedule import Schedule
from treadle.vllm_plugin.stacks import GateBoard, Part, Place, Stack

ROOT = Path(__file__).parents[1]
ATTENTION, ALL = ("q", "v"), ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Shape:
    """Of a Llama-like model."""

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
    parser.add_argument("--prompt", type=int, default=500)
    parser.add_argument("--answer", type=int, default=200)
    options = parser.parse_args()
    print(f"rank {options.rank}, 16-bit, {options.tokens} tokens a step; factors as they are stacked, gates beside\n")
    print(
        "| base | modules | adapters | factors, GiB | gates, GiB | of the base's weights |\n|---|---|---|---|---|---|"
    )
    for shape in SHAPES:
        for targets in (ATTENTION, ALL):
            for adapters in (4, 16, 64, 1000):
                factors, gates = size(shape, targets, adapters, options.rank, options.tokens)
                name = "q, v" if targets is ATTENTION else "all linear"
                share = factors / (2 * shape.parameters)
                sizes = f"{factors / 2**30:.2f} | {gates / 2**30:.2f}"
                print(f"| {shape.name} | {name} | {adapters} | {sizes} | {share:.1%} |")
    decision, token = router_constants()
    each = options.answer / 2
    print(f"\nrouter: {1e6 * decision:.0f} us a decision of a running stream, {1e6 * token:.1f} us a token of a prompt")
    prompts = options.requests * options.prompt * token
    answers = options.requests * each * decision
    print(
        f"{options.requests} requests a second x {options.prompt} prompt tokens x {1e6 * token:.1f} us = "
        f"{prompts:.0f} cores; x {options.answer} answer tokens / every 2 x {1e6 * decision:.0f} us = "
        f"{answers:.0f} cores"
    )


def size(shape: Shape, targets: tuple[str, ...], adapters: int, rank: int, tokens: int) -> tuple[int, int]:
    """Return the bytes of all layers' factors, and of the gates."""
    device, dtype = torch.device("meta"), torch.bfloat16
    board = GateBoard(tokens, adapters, 1, device, dtype)
    fused = {
        "qkv": (shape.hidden, {"q": shape.hidden, "k": shape.kv, "v": shape.kv}),
        "o": (shape.hidden, {"o": shape.hidden}),
        "gate_up": (shape.hidden, {"gate": shape.middle, "up": shape.middle}),
        "down": (shape.middle, {"down": shape.hidden}),
    }
    factors = 0
    for size_in, outputs in fused.values():
        place = _place(size_in, outputs)
        room = [dict.fromkeys(range(adapters), rank) if name in targets else {} for name in outputs]
        if any(room):
            stack = Stack(place, board, room)
            own = sum(each.nbytes for name, each in stack.named_buffers() if name != "gates")
            factors += shape.layers * own
    return factors, sum(each.nbytes for each in board.buffers())


def _place(size_in: int, outputs: dict[str, int]) -> Place:
    parts, start = [], 0
    for name, rows in outputs.items():
        parts.append(Part(name, (size_in, rows), slice(0, size_in), slice(0, rows), start))
        start += rows
    return Place(tuple(parts), size_in, start)


def router_constants() -> tuple[float, float]:
    """Return the seconds of a decision, and of a token of a prompt: 64 streams of the README, the demo's bundle."""
    bundle, mixture = open_bundle(PluginParams(bundle=str(ROOT / "demo" / "bundle")))
    tokenizer = load_tokenizer(bundle.base_model)
    ids = tokenizer((ROOT / "README.md").read_text("utf-8")).input_ids
    schedule = Schedule(mixture, tokenizer)
    streams = [(schedule.open({"every": 1}, 200), ids[9 * index : 9 * index + 400]) for index in range(64)]
    started = thread_time()
    for stream, text in streams:
        schedule.decide([(stream, text, 200)])
    token = (thread_time() - started) / (64 * 200)
    seconds = []
    for position in range(200, 400):
        started = thread_time()
        schedule.plan([(str(i), stream, text, position, position + 1) for i, (stream, text) in enumerate(streams)])
        seconds.append(thread_time() - started)
    return median(seconds) / 64, token


if __name__ == "__main__":
    main()
