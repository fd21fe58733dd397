"""Measures the forms of a product of few rows with the base's weights: which one `treadle.fast_step` should take.

    python benchmarks/products.py [--dtype float32 bfloat16] [--rows 1 2 4 8 16 32 64]

For every number of rows: the median milliseconds of all products of one step (q k v, o, gate up, down of each layer,
and the head), by form: `x W^T` as `torch.nn.functional.linear` makes it, `(W x^T)^T`, and for one row `W x`. The forms
are run in turn. Weights are those of the demo's base.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from treadle.blend import attach
from treadle.fast_step import FastStep, Stack, product
from treadle.models import load_model, quiet_libraries
from treadle.timing import interleave

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
FORMS = {
    "x W^T": functional.linear,
    "(W x^T)^T": lambda x, weight: torch.mm(weight, x.t()).t(),
    "W x": lambda x, weight: torch.mv(weight, x[0])[None],
    "as treadle": product,
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
            inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1], dtype=weight.dtype) for weight in weights}
            forms = {name: form for name, form in FORMS.items() if rows == 1 or name != "W x"}
            times = measure(forms, weights, inputs, options.rounds)
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
        weights += [Stack(group).weight for group in (*groups, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])]
    return [*weights, model.lm_head.weight]


def measure(forms: dict, weights: list[Tensor], inputs: dict[int, Tensor], rounds: int) -> dict[str, float]:
    def all_products(form: Callable[[Tensor, Tensor], Tensor]) -> None:
        for weight in weights:
            form(inputs[weight.shape[1]], weight)

    seconds = interleave({name: partial(all_products, form) for name, form in forms.items()}, rounds)
    return {name: 1000 * median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
