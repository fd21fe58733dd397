"""Times the forms of every product of a step on a GPU, from which the table of `runners.cuda.gemv` was taken."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from gpu_check import relative
from gpu_clock import BLOCK, DEVICE, Report, in_turn
from torch import Tensor
from torch.nn import functional

from treadle.engine.runners.cuda.step import GraphStep

Form = Callable[[Tensor, Tensor], Tensor]
LAYERS = 12
"""Whose weights a graph goes through: together larger than the device's cache."""
VECTORS = ((4, 1024, 4), (8, 512, 4), (16, 256, 4), (2, 2048, 8))
THINS = ((32, 128, 4, 4), (16, 256, 4, 4), (64, 128, 4, 3))


def report_products(step: GraphStep, setting: str, batches: Sequence[int], peak: float, report: Report) -> None:
    """Report the share of the bandwidth `peak` (bytes a second) of each form of each product."""
    for batch in batches:
        for name, weights in step.weights().items():
            seconds = time_products(product_forms(batch), weights, batch)
            best = min(seconds, key=lambda form: seconds[form])
            speeds = {form: round(weights[0].nbytes / each / peak, 3) for form, each in seconds.items()}
            report("product", setting=setting, batch=batch, weight=name, best=best, of_bandwidth=speeds)


def product_forms(rows: int) -> dict[str, Form]:
    """Return the ways to compute a product of so many rows."""
    from treadle.engine.runners.cuda.gemv import thin_product, vector_product

    forms: dict[str, Form] = {"torch": functional.linear}
    if rows == 1:
        for outs, columns, warps in VECTORS:
            form = partial(vector_product, outs=outs, columns=columns, warps=warps)
            forms[f"vector {outs, columns, warps}"] = form
    if rows <= 32:
        for outs, columns, warps, stages in THINS:
            form = partial(thin_product, outs=outs, columns=columns, warps=warps, stages=stages)
            forms[f"thin {outs, columns, warps, stages}"] = form
    return forms


@torch.inference_mode()
def time_products(forms: Mapping[str, Form], weights: Sequence[Tensor], rows: int) -> dict[str, float]:
    """Return the seconds of one product x W^T with each W (out, in), over graphs of several layers' products."""
    x = torch.randn(rows, weights[0].shape[1], device=DEVICE, dtype=weights[0].dtype)
    expected = forms["torch"](x, weights[0])
    replays: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        error = relative(form(x, weights[0]), expected)
        assert error < 1e-2, f"{name}: relative error {error:.1e}"
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in (list(weights) * LAYERS)[:LAYERS]:
                form(x, weight)
        replays[name] = graph.replay
    seconds = in_turn(replays, rounds=7)
    return {name: median(each) * BLOCK / LAYERS for name, each in seconds.items()}
