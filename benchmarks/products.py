"""Measures a product of few rows with the base's weights in each memory layout that `stacked_linear` may take.

    python benchmarks/products.py [--dtype float32 bfloat16] [--rows 1 2 4 8 16 32 64]

For every number of rows: the median milliseconds of all products of one step (q k v, o, gate up, down of each layer,
and the head), by layout: `x W^T`, `(W x^T)^T`, for one row `W x`, and `x W^T` of weights that oneDNN has packed. The
layouts are run in turn. Weights are those of the demo's base.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from treadle.bundle.base_model import load_model, quiet_libraries
from treadle.engine.runners.cpu.layouts import ColumnMajor, GemmLayout, PackedRowMajor, VectorLayout, fastest_layout
from treadle.engine.runners.cpu.packing import BaseWeight, PackedWeights, can_pack, packs_by_default
from treadle.engine.runners.cpu.stacked_linear import StackedLinear
from treadle.engine.runners.cpu.step import FastStep
from treadle.experiments.timing import interleave
from treadle.lora.blend import attach

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYOUTS: dict[str, Callable[[int, torch.dtype], GemmLayout]] = {
    "x W^T": lambda rows, dtype: GemmLayout(rows),
    "(W x^T)^T": lambda rows, dtype: ColumnMajor(rows),
    "W x": lambda rows, dtype: VectorLayout(rows),
    "packed": lambda rows, dtype: PackedRowMajor(rows),
    "as treadle": lambda rows, dtype: fastest_layout(rows, dtype, has_packs=packs_by_default(0, dtype)),
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    quiet_libraries()
    print(f"| dtype | rows | {' | '.join(f'{name}, ms' for name in LAYOUTS)} |\n|---|---|{'---|' * len(LAYOUTS)}")
    for dtype in options.dtype:
        weights = step_weights(dtype)
        for rows in options.rows:
            dtype_of = weights[0].plain.dtype
            able = [
                name for name in LAYOUTS if (name != "W x" or rows == 1) and (name != "packed" or can_pack(dtype_of))
            ]
            layouts = {name: LAYOUTS[name](rows, dtype_of) for name in able}
            times = measure(layouts, weights, rows, options.rounds)
            cells = (f"{times[name]:.1f}" if name in times else "" for name in LAYOUTS)
            print(f"| {dtype} | {rows} | {' | '.join(cells)} |", flush=True)


def step_weights(dtype: str) -> list[BaseWeight]:
    """Return the stacked weights (out, in) of one step, in the order in which it reads them."""
    model = load_model(BASE, dtype=dtype)
    FastStep(model, attach(model, []))  # lays them out
    weights: list[BaseWeight] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
        weights += [
            StackedLinear(group, PackedWeights(), with_factors=False).bare
            for group in (*groups, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
        ]
    return [*weights, StackedLinear([model.lm_head], PackedWeights(), with_factors=False).bare]


def measure(layouts: dict[str, GemmLayout], weights: list[BaseWeight], rows: int, rounds: int) -> dict[str, float]:
    dtype, shapes = weights[0].plain.dtype, {weight.plain.shape for weight in weights}
    inputs = {size: torch.randn(rows, size, dtype=dtype) for _, size in shapes}

    def all_products(layout: GemmLayout, results: dict[int, Tensor]) -> None:
        for weight in weights:
            size_out, size_in = weight.plain.shape
            layout.multiply_base(layout.base_operand(weight), layout.to_layout(inputs[size_in]), results[size_out])

    units = {
        name: partial(all_products, layout, {size: torch.empty(layout.shape(size), dtype=dtype) for size, _ in shapes})
        for name, layout in layouts.items()
    }
    return {name: 1000 * median(values) for name, values in interleave(units, rounds).items()}


if __name__ == "__main__":
    main()
