"""Prints where the time of a decoding step goes: products, attention, everything between them, and Python.

    python benchmarks/breakdown.py [--dtype float32 bfloat16] [--batch 1 8] [--steps 20]

Four ways to make one token a row, run in turn on the demo's bundle: transformers' bare base; the adapters through the
model's own forward, as treadle did at first and still does for models that it does not know; and treadle's own step
with routing off and blended. Milliseconds are medians without a profiler. Operations are what PyTorch dispatches in one
step, views included. The columns by kind come from torch.profiler, which slows small operations: they say what is
large. `rest` is what remains of the step's time without these: Python.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

from peers.peers import cached_step
from torch.profiler import ProfilerActivity, profile

from treadle.bundle.base_model import load_model, quiet_libraries
from treadle.bundle.bundle import read_bundle
from treadle.common.params import RoutingParams
from treadle.engine.engine import Engine
from treadle.experiments.params import BenchParams
from treadle.experiments.timing import MATRIX_PRODUCTS, Counter, interleave
from treadle.experiments.workbench import Lab, start_batch

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    quiet_libraries()
    print("| setting | arm | ms a step | operations | products | ms: products | attention | between | rest |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in options.dtype:
        for batch in options.batch:
            steps = arms(dtype, batch, options.steps + 20)
            times = interleave(steps, options.steps, warm_up=3)
            for name, step in steps.items():
                report(f"{dtype}, batch {batch}", name, 1000 * median(times[name]), step)


def arms(dtype: str, batch: int, tokens: int) -> dict[str, Step]:
    """Return one step of each way, after prompts of the bundle's own samples."""
    bundle = read_bundle(BUNDLE)
    lab = Lab.open(bundle, None, dtype, BenchParams(batch=(batch,), tokens=tokens))
    plain = load_model(bundle.base_model, dtype=dtype)
    slow = Engine(load_model(bundle.base_model, dtype=dtype), lab.engine.tokenizer, bundle.adapters, lab.engine.router,
                  is_fast=False)  # fmt: skip
    prompts = lab.prompts(batch, lab.params.prompt)
    ways = {
        "blended, the model's own forward": (slow, RoutingParams(every=1)),
        "treadle, routing off": (lab.engine, RoutingParams.base()),
        "treadle, every 1": (lab.engine, RoutingParams(every=1)),
    }
    made = {name: start_batch(engine, prompts, tokens, routing).step for name, (engine, routing) in ways.items()}
    return {"transformers, base": cached_step(plain, prompts), **made}


def report(setting: str, name: str, milliseconds: float, step: Step, rounds: int = 5) -> None:
    """Print one line: a step's time without a profiler, and what the profiler saw in `rounds` more."""
    with Counter() as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            step()
    spent = {"products": 0.0, "attention": 0.0, "between": 0.0}
    for event in seen.key_averages():
        operation = event.key.removeprefix("aten::")
        kind = "products" if operation in MATRIX_PRODUCTS or operation.startswith("mkldnn") else "between"
        spent["attention" if "scaled_dot_product" in operation else kind] += event.self_cpu_time_total / 1000 / rounds
    rest = max(milliseconds - sum(spent.values()), 0.0)
    cells = [f"{milliseconds:.1f}", str(counter.operations), str(counter.products)]
    cells += [f"{value:.1f}" for value in (*spent.values(), rest)]
    print(f"| {setting} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
