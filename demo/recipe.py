"""Makes demo/bundle from the base model and the four data sets: adapters, static embedder, centroids.

    python demo/recipe.py --data ../shared/data --work work [--seed 1 --bundle work/seed1/bundle] [--steps 2]

Each step leaves its result in the work folder and is skipped where that exists, so the recipe can be stopped and
started again. Training takes about 40 minutes on two idle cores. Only training splits are read.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from treadle.experiments.data import load_examples
from treadle.experiments.tasks import Example

from demo import PROMPTS
from embedder import build_embedder

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUNDLE = Path(__file__).parent / "bundle"
# task: (training file, optimiser steps of 8 sequences)
ADAPTERS = {
    "math": ("gsm8k-train.jsonl.gz", 120),
    "science": ("arc_challenge-train.jsonl.gz", 120),
    "code": ("code_alpaca-train.jsonl.gz", 90),
    "reading": ("squad-train.jsonl.gz", 80),
}
JOINED = ("science", "math", "reading", "code")
"""The order in which other tasks are read for joined sequences; the random choices depend on it."""
SAMPLES = 1000
"""Training examples of each task that the router is fitted on."""


def treadle(*arguments: object) -> None:
    command = [sys.executable, "-m", "treadle", *map(str, arguments)]
    print("$ treadle", *command[3:], flush=True)
    subprocess.run(command, check=True)


def train(data: Path, work: Path, seed: int, steps: int | None, examples: int | None) -> None:
    for task, (file, usual) in ADAPTERS.items():
        output = work / "adapters" / task
        if (output / "adapter_model.safetensors").exists():
            continue
        also = [f"--also={other}={data / ADAPTERS[other][0]}" for other in JOINED if other != task]
        num_steps = steps or usual
        limit = examples or num_steps * 8  # one pass over a seeded choice of the training split
        treadle("train", "--base", BASE, "--data", data / file, "--task", task, "--limit", limit, "--steps", num_steps,
                "--seed", seed, *also, "-o", output)  # fmt: skip


def write_examples(examples: Sequence[Example], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples), "utf-8")
    return file


def write_samples(data: Path, work: Path, limit: int) -> None:
    for task, (file, _) in ADAPTERS.items():
        write_examples(load_examples(data / file, task, limit=limit, seed=1), work / "samples" / f"{task}.jsonl")


def fit(work: Path, bundle: Path) -> None:
    adapters = [f"--adapter={task}={work / 'adapters' / task}" for task in ADAPTERS]
    samples = [f"--samples={task}={work / 'samples' / f'{task}.jsonl'}" for task in ADAPTERS]
    treadle("fit", "--base", BASE, *adapters, *samples, "--embedder", work / "embedder", "--keep-samples", 0,
            "--overwrite", "-o", bundle)  # fmt: skip
    own = {task: [example.prompt] for task, example in PROMPTS.items()}  # no row of a data set goes into the repository
    (bundle / "samples.json").write_text(json.dumps(own, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training files")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for intermediate results")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="bundle folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the training; the bundle in the repository has 0")
    parser.add_argument("--steps", type=int, help="of each adapter, to try the recipe out; the usual ones are above")
    parser.add_argument("--examples", type=int, help="of each task, for adapters and router alike; usual: 8 a step")
    options = parser.parse_args()
    train(options.data, options.work, options.seed, options.steps, options.examples)
    write_samples(options.data, options.work, min(SAMPLES, options.examples or SAMPLES))
    if not (options.work / "embedder" / "config.json").exists():
        build_embedder(options.work / "embedder")
    fit(options.work, options.bundle)


if __name__ == "__main__":
    main()
