"""Prints what stands beside one linear layer of vLLM's on a CPU: the whole update, and one product by itself.

    OMP_NUM_THREADS=1 python benchmarks/vllm_layer.py [--tokens 1 8 32]

The layers are as large as SmolLM2-135M's, with four adapters in bfloat16. A second column has the product that vLLM's
own layers make. Figures are medians of the thread's own time, which other work on the machine disturbs less than the
clock on the wall. Run in the environment of `make test-vllm`.
"""

import argparse
import os
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import thread_time_ns
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from treadle.serving.vllm.cpu import Product, branch_of, cpu_product
from treadle.serving.vllm.shards import LayerShard, ShardPart
from treadle.serving.vllm.stacks import GateBoard, LayerStack

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
    board = GateBoard(max(options.tokens), torch.device("cpu"), torch.bfloat16)
    print(f"{processor()}; torch {torch.__version__}, vLLM {vllm.__version__}\n")
    print("| tokens | beside | us | with vLLM's own product | products with A, B |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for tokens in options.tokens:
            for name, (size_in, parts) in LAYERS.items():
                x = torch.randn(tokens, size_in, dtype=torch.bfloat16)
                stack, other = (stacked(board, size_in, parts, pack) for pack in (cpu_product, own_product))
                y = torch.randn(tokens, stack.shard.size_out, dtype=torch.bfloat16)
                taken = microseconds({"ours": partial(stack.update, y, x), "own": partial(other.update, y, x)})
                ways = ", ".join(dict.fromkeys(branch_of(weight) for weight in factors(stack)))
                print(f"| {tokens} | {name} | {taken['ours']:.1f} | {taken['own']:.1f} | {ways} |", flush=True)
        weight = torch.randn(128, HIDDEN, dtype=torch.bfloat16)
        print(f"\n| tokens | a product with {tuple(weight.shape)} | us |\n|---|---|---|")
        for tokens in options.tokens:
            x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
            taken = microseconds({name: partial(product, x) for name, product in products(weight).items()})
            for name, each in taken.items():
                print(f"| {tokens} | {name} | {each:.1f} |", flush=True)


def processor() -> str:
    """Return the name of the CPU, and those of its instructions that matter here."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    name = next((value.strip() for key, value in known.items() if key.strip() == "model name"), platform.processor())
    flags = next((value.split() for key, value in known.items() if key.strip() == "flags"), [])
    return f"{name} ({', '.join(flag for flag in ('avx512_bf16', 'amx_tile') if flag in flags) or 'neither'})"


def own_product(weight: torch.Tensor) -> Product:
    """Return the product that vLLM's linear layers make with such a weight."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(holder, remove_weight=False)
    own: Any = holder.cpu_linear
    return Product(lambda x: own(x, weight, None))


def factors(stack: LayerStack) -> list[torch.Tensor]:
    """Return the factors of a stack: A, and each B."""
    return [stack.a, *(each.t() for name, each in stack.named_buffers() if name.startswith("b_t"))]


def stacked(board: GateBoard, size_in: int, parts: list[tuple[int, int]], pack: Callable[..., Any]) -> LayerStack:
    """Return a packed stack of random factors."""
    made, start = [], 0
    for size, _ in parts:
        made.append(ShardPart(f"{start}", (size_in, size), slice(0, size_in), slice(0, size), start))
        start += size
    room = [dict.fromkeys(range(ADAPTERS), rank) if rank else {} for _, rank in parts]
    stack = LayerStack(LayerShard(tuple(made), size_in, start), board, room)
    stack.a.normal_()
    stack.gates.fill_(0.5)
    stack.pack(pack)
    return stack


def products(weight: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """Return the ways to multiply with a weight."""
    return {
        f"the plugin's ({branch_of(weight)})": cpu_product(weight),
        "vLLM's function": own_product(weight),
        "torch": lambda x: nn.functional.linear(x, weight),
    }


def microseconds(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median time of a call of each, measured in turn."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            started = thread_time_ns()
            for _ in range(CALLS):
                function()
            taken[name].append((thread_time_ns() - started) / CALLS / 1e3)
    return {name: median(each) for name, each in taken.items()}


if __name__ == "__main__":
    main()
