"""Measures the forms of a product of few rows with the base's weights: which one `stacked_linear` should take.

    python benchmarks/products.py [--dtype float32 bfloat16] [--rows 1 2 4 8 16 32 64]

For every number of rows: the median milliseconds of all products of one step (q k v, o, gate up, down of each layer,
and the head), by form: `x W^T`, `(W x^T)^T`, for one row `W x`, and `x W^T` of weights that oneDNN has packed. The
forms are run in turn. Weights are those of the demo's base.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from treadle.bundle.base_model import load_model, quiet_libraries
from treadle.engine.runners.cpu.layouts import Columns, Form, Packed, Vector, fastest_form
from treadle.engine.runners.cpu.packing import Packs, Weight, can_pack, packs_unasked
from treadle.engine.runners.cpu.stacked_linear import Stack
from treadle.engine.runners.cpu.step import FastStep
from treadle.experiments.timing import interleave
from treadle.lora.blend import attach

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
FORMS: dict[str, Callable[[int, torch.dtype], Form]] = {
    "x W^T": lambda rows, dtype: Form(rows),
    "(W x^T)^T": lambda rows, dtype: Columns(rows),
    "W x": lambda rows, dtype: Vector(rows),
    "packed": lambda rows, dtype: Packed(rows),
    "as treadle": lambda rows, dtype: fastest_form(rows, dtype, has_packs=packs_unasked(0, dtype)),
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    quiet_libraries()
    print(f"| dtype | rows | {' | '.join(f'{form}, ms' for form in FORMS)} |\n|---|---|{'---|' * len(FORMS)}")
    for dtype in options.dtype:
        weights = step_weights(dtype)
        for rows in options.rows:
            dtype_of = weights[0].plain.dtype
            able = [name for name in FORMS if (name != "W x" or rows == 1) and (name != "packed" or can_pack(dtype_of))]
            forms = {name: FORMS[name](rows, dtype_of) for name in able}
            times = measure(forms, weights, rows, options.rounds)
            cells = (f"{times[name]:.1f}" if name in times else "" for name in FORMS)
            print(f"| {dtype} | {rows} | {' | '.join(cells)} |", flush=True)


def step_weights(dtype: str) -> list[Weight]:
    """Return the stacked weights (out, in) of one step, in the order in which it reads them."""
    model = load_model(BASE, dtype=dtype)
    FastStep(model, attach(model, []))  # lays them out
    weights: list[Weight] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
        weights += [
            Stack(group, Packs(), with_factors=False).bare
            for group in (*groups, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
        ]
    return [*weights, Stack([model.lm_head], Packs(), with_factors=False).bare]


def measure(forms: dict[str, Form], weights: list[Weight], rows: int, rounds: int) -> dict[str, float]:
    dtype, shapes = weights[0].plain.dtype, {weight.plain.shape for weight in weights}
    inputs = {size: torch.randn(rows, size, dtype=dtype) for _, size in shapes}

    def all_products(form: Form, results: dict[int, Tensor]) -> None:
        for weight in weights:
            size_out, size_in = weight.plain.shape
            form.multiply_base(form.base_matrix(weight), form.lay(inputs[size_in]), results[size_out])

    units = {
        name: partial(all_products, form, {size: torch.empty(form.shape(size), dtype=dtype) for size, _ in shapes})
        for name, form in forms.items()
    }
    return {name: 1000 * median(values) for name, values in interleave(units, rounds).items()}


if __name__ == "__main__":
    main()
