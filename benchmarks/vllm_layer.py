"""Prints what stands beside one linear layer of vLLM's on a CPU: the whole update, and one product by itself.

    OMP_NUM_THREADS=1 python benchmarks/vllm_layer.py [--tokens 1 8 32]

Layers as large as SmolLM2-135M's, four adapters, bfloat16. Medians of the thread's own time (one thread), which other
work on the machine disturbs less than the clock on the wall. Run in the environment of `make test-vllm`.
"""

import argparse
import os
from collections.abc import Callable
from statistics import median
from time import thread_time_ns
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from treadle.vllm_plugin.hooks import _cpu_product as cpu_product
from treadle.vllm_plugin.stacks import GateBoard, Part, Place, Stack

HIDDEN, KEYS, INNER = 576, 192, 1536
LAYERS = {
    "q, k, v; rank 16 on q and v": (HIDDEN, [(HIDDEN, 16), (KEYS, 0), (KEYS, 16)]),
    "q, k, v; rank 8": (HIDDEN, [(HIDDEN, 8), (KEYS, 8), (KEYS, 8)]),
    "o; rank 8": (HIDDEN, [(HIDDEN, 8)]),
    "gate, up; rank 8": (HIDDEN, [(INNER, 8), (INNER, 8)]),
    "down; rank 8": (INNER, [(HIDDEN, 8)]),
}
"""Input size, and (output size, rank) of each part."""
ADAPTERS, CALLS, ROUNDS = 4, 20, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    board = GateBoard(max(options.tokens), ADAPTERS, 1, torch.device("cpu"), torch.bfloat16)
    print("| tokens | beside | us |\n|---|---|---|")
    with torch.inference_mode():
        for tokens in options.tokens:
            for name, (size_in, parts) in LAYERS.items():
                stack, x = stacked(board, size_in, parts), torch.randn(tokens, size_in, dtype=torch.bfloat16)
                y = torch.randn(tokens, stack.place.size_out, dtype=torch.bfloat16)
                print(f"| {tokens} | {name} | {microseconds(stack.update, y, x):.1f} |", flush=True)
        weight, x = torch.randn(128, HIDDEN, dtype=torch.bfloat16), torch.randn(1, HIDDEN, dtype=torch.bfloat16)
        print(f"\n| a product of (1, {HIDDEN}) with {tuple(weight.shape)} | us |\n|---|---|")
        for name, product in products(weight).items():
            print(f"| {name} | {microseconds(product, x):.1f} |")


def stacked(board: GateBoard, size_in: int, parts: list[tuple[int, int]]) -> Stack:
    """Return a packed stack of random factors."""
    made, start = [], 0
    for size, _ in parts:
        made.append(Part(f"{start}", (size_in, size), slice(0, size_in), slice(0, size), start))
        start += size
    room = [dict.fromkeys(range(ADAPTERS), rank) if rank else {} for _, rank in parts]
    stack = Stack(Place(tuple(made), size_in, start), board, room)
    stack.a.normal_()
    stack.gates.fill_(0.5)
    stack.pack(cpu_product)
    return stack


def products(weight: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """Return the ways to multiply with a weight."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(holder, remove_weight=False)
    own: Any = holder.cpu_linear
    return {
        "the plugin's": cpu_product(weight),
        "vLLM's function": lambda x: own(x, weight, None),
        "torch": lambda x: nn.functional.linear(x, weight),
    }


def microseconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the median time of a call."""
    taken: list[float] = []
    for _ in range(ROUNDS):
        started = thread_time_ns()
        for _ in range(CALLS):
            function(*arguments)
        taken.append((thread_time_ns() - started) / CALLS / 1e3)
    return median(taken)


if __name__ == "__main__":
    main()
