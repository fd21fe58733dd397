"""Measures whether the adapters are experts: held-out answer NLL of the base, of each adapter, and of the blend.

    python benchmarks/experts.py --data ../shared/data [--limit 200]

Prints a table of docs/results.md: nats per token of the answer (end of text not counted) over all tokens of a task, on
examples that no adapter was trained on. Test rows of ARC are never read: its validation split is used.
"""

import argparse
from pathlib import Path

import numpy as np

import treadle
from treadle.bundle.base_model import quiet_libraries
from treadle.common.params import RoutingParams
from treadle.experiments.data import load_examples

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
HELD_OUT = {
    "math": "gsm8k-test-even.jsonl.gz",
    "science": "arc_challenge-validation.jsonl.gz",
    "code": "code_alpaca-test-a.jsonl.gz",
    "reading": "squad-validation-even.jsonl.gz",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--limit", type=int, default=200, help="examples a task")
    parser.add_argument("--dtype", default=None)
    options = parser.parse_args()
    quiet_libraries()
    engine = treadle.load(options.bundle, dtype=options.dtype)
    names = engine.adapter_names
    arms = {"base": RoutingParams.base()} | {name: RoutingParams.one(name) for name in names}
    arms["routed"] = engine.router.params

    print(f"| task (n = {options.limit}) | " + " | ".join(arms) + " |")
    print("|---" * (len(arms) + 1) + "|")
    for task in names:
        examples = load_examples(options.data / HELD_OUT[task], task, limit=options.limit, seed=0)
        prompts = [example.prompt for example in examples]
        completions = [example.completion for example in examples]
        cells: list[str] = []
        for params in arms.values():
            scores = engine.score(prompts, completions, routing=params)
            sums, counts = np.array([each.sum() for each in scores]), np.array([len(each) for each in scores])
            nll = -sums.sum() / counts.sum()
            error = np.sqrt(((-sums - nll * counts) ** 2).sum()) / counts.sum()  # of a ratio of sums
            cells.append(f"{nll:.3f} ± {error:.3f}")
        best = min(range(1 + len(names)), key=lambda column: float(cells[column].split()[0]))
        cells[best] = f"**{cells[best]}**"
        print(f"| {task} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
