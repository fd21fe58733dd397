"""Measures the forms of a product of few rows with the base's weights: which one `treadle.step_products` should take.

    python benchmarks/products.py [--dtype float32 bfloat16] [--rows 1 2 4 8 16 32 64]

For every number of rows: the median milliseconds of all products of one step (q k v, o, gate up, down of each layer,
and the head), by form: `x W^T`, `(W x^T)^T`, and for one row `W x`. The forms
are run in turn. Weights are those of the demo's base.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from treadle.blend import attach
from treadle.fast_step import FastStep
from treadle.forms import Columns, Form, Vector, fastest_form
from treadle.models import load_model, quiet_libraries
from treadle.step_products import Stack
from treadle.timing import interleave

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
FORMS: dict[str, Callable[[int, torch.dtype], Form]] = {
    "x W^T": lambda rows, dtype: Form(rows),
    "(W x^T)^T": lambda rows, dtype: Columns(rows),
    "W x": lambda rows, dtype: Vector(rows),
    "as treadle": fastest_form,
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
            forms = {name: form(rows, weights[0].dtype) for name, form in FORMS.items() if rows == 1 or name != "W x"}
            times = measure(forms, weights, rows, options.rounds)
            cells = (f"{times[name]:.1f}" if name in times else "" for name in FORMS)
            print(f"| {dtype} | {rows} | {' | '.join(cells)} |", flush=True)


def step_weights(dtype: str) -> list[Tensor]:
    """Return the stacked weights (out, in) of one step, in the order in which it reads them."""
    model = load_model(BASE, dtype=dtype)
    FastStep(model, attach(model, []))  # lays them out
    weights: list[Tensor] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
        weights += [
            Stack(group, with_factors=False).weight
            for group in (*groups, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
        ]
    return [*weights, model.lm_head.weight]


def measure(forms: dict[str, Form], weights: list[Tensor], rows: int, rounds: int) -> dict[str, float]:
    dtype = weights[0].dtype
    inputs = {size: torch.randn(rows, size, dtype=dtype) for size in {weight.shape[1] for weight in weights}}

    def all_products(form: Form, results: dict[int, Tensor]) -> None:
        for weight in weights:
            form.multiply(form.matrix(weight), form.lay(inputs[weight.shape[1]]), results[len(weight)])

    units = {
        name: partial(
            all_products, form, {size: torch.empty(form.shape(size), dtype=dtype) for size in map(len, weights)}
        )
        for name, form in forms.items()
    }
    return {name: 1000 * median(values) for name, values in interleave(units, rounds).items()}


if __name__ == "__main__":
    main()
