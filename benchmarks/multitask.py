"""Trains the baseline that a reviewer asks for first: one LoRA on all four tasks together, and makes a bundle of it.

    python benchmarks/multitask.py --data ../shared/data --work work/multitask
    treadle sweep work/multitask/bundle benchmarks/studies/multitask.toml --dtype bfloat16 -o work/studies/multitask
    python benchmarks/claims.py work/studies/main work/studies/multitask

It sees the same examples as the demo's four adapters, as many steps as they have together, the same rank and rate.
About 45 minutes on two idle cores; a run that was stopped goes on from its last checkpoint.
"""

import argparse
import random
import sys
from pathlib import Path

from treadle.experiments.data import load_examples

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from recipe import ADAPTERS, BASE, treadle, write_examples

NAME = "multitask"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training files")
    parser.add_argument("--work", type=Path, default=Path("work/multitask"))
    parser.add_argument("--embedder", type=Path, default=Path(__file__).parents[1] / "demo" / "bundle" / "embedder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="to try it out; else as many as the four adapters have together")
    options = parser.parse_args()
    mixed = write_mixed(options.data, options.work, options.seed)
    steps = options.steps or sum(steps for _, steps in ADAPTERS.values())
    adapter = options.work / "adapter"
    if not (adapter / "adapter_config.json").exists():
        treadle("train", "--base", BASE, "--data", mixed, "--steps", steps, "--seed", options.seed, "-o", adapter)
    treadle("fit", "--base", BASE, f"--adapter={NAME}={adapter}", f"--samples={NAME}={mixed}", "--embedder",
            options.embedder, "--keep-samples", 0, "--overwrite", "-o", options.work / "bundle")  # fmt: skip


def write_mixed(data: Path, work: Path, seed: int) -> Path:
    """Write the training examples of the four adapters, as the recipe chooses them, in one shuffled file."""
    examples = [
        example
        for task, (file, steps) in ADAPTERS.items()
        for example in load_examples(data / file, task, limit=steps * 8, seed=seed)
    ]
    random.Random(seed).shuffle(examples)
    return write_examples(examples, work / "mixed.jsonl")


if __name__ == "__main__":
    main()
