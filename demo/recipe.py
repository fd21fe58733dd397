"""Makes demo/bundle from the base model and the four data sets: adapters, static embedder, centroids.

    python demo/recipe.py --data ../shared/data --work work

Each step leaves its result in the work folder and is skipped where that exists, so the recipe can be stopped and
started again. Training takes about an hour and a half on two cores. Only training splits are read.
"""

import argparse
import subprocess
import sys
from pathlib import Path

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# task: (training file, optimiser steps of 8 sequences)
ADAPTERS = {
    "science": ("arc_challenge-train.jsonl.gz", 120),
    "math": ("gsm8k-train.jsonl.gz", 120),
    "reading": ("squad-train.jsonl.gz", 80),
    "code": ("code_alpaca-train.jsonl.gz", 110),
}


def treadle(*arguments: object) -> None:
    command = [sys.executable, "-m", "treadle", *map(str, arguments)]
    print("$ treadle", *command[3:], flush=True)
    subprocess.run(command, check=True)


def train(data: Path, work: Path) -> None:
    for task, (file, steps) in ADAPTERS.items():
        output = work / "adapters" / task
        if (output / "adapter_model.safetensors").exists():
            continue
        also = [f"--also={other}={data / ADAPTERS[other][0]}" for other in ADAPTERS if other != task]
        limit = steps * 8  # one pass over a seeded choice of the training split
        treadle("train", "--base", BASE, "--data", data / file, "--task", task, "--limit", limit, "--steps", steps,
                *also, "-o", output)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training files")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for intermediate results")
    options = parser.parse_args()
    train(options.data, options.work)


if __name__ == "__main__":
    main()
