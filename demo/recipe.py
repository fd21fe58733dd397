"""Makes a bundle from a base model and the training splits: adapters, static embedder, centroids.

    python demo/recipe.py --data ../shared/data --work work [--seed 1 --bundle work/seed1/bundle] [--steps 2]
    python demo/recipe.py --data ../shared/data --base Qwen/Qwen2.5-Coder-0.5B-Instruct --work work/skills

Each step leaves its result in the work folder and is skipped where that exists, so the recipe can be stopped and
started again. For the demo's base, whose bundle is demo/bundle, training takes about 40 minutes on two idle cores.
Only training splits are read.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from treadle.experiments.data import load_examples
from treadle.experiments.params import TrainParams
from treadle.experiments.tasks import Example

from demo import QUESTIONS
from embedder import build_embedder

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUNDLE = Path(__file__).parent / "bundle"


@dataclass(frozen=True)
class Part:
    """Examples that an adapter is trained on.

    Attributes:
        file: where they are from.
        form: the task that reads them.
        examples: how many, chosen by the seed.
    """

    file: str
    form: str
    examples: int


ARC, OPENBOOKQA = "arc_challenge-train.jsonl.gz", "openbookqa-train.jsonl.gz"
# base: task: what its adapter sees once
RECIPES = {
    BASE: {
        "math": [Part("gsm8k-train.jsonl.gz", "math", 960)],
        "science": [Part(ARC, "science", 960)],
        "code": [Part("code_alpaca-train.jsonl.gz", "code", 720)],
        "reading": [Part("squad-train.jsonl.gz", "reading", 640)],
    },
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": {
        "science": [
            Part(ARC, "science", 520),
            Part(OPENBOOKQA, "science", 184),
            Part(ARC, "science-text", 132),
            Part(OPENBOOKQA, "science-text", 44),
        ],
        "math": [Part("gsm8k-train.jsonl.gz", "math", 480)],
        "code": [Part("code_alpaca-train.jsonl.gz", "code", 640)],
        "reading": [Part("squad-train.jsonl.gz", "reading", 480)],
    },
}
TRAINING = {BASE: TrainParams(), "Qwen/Qwen2.5-Coder-0.5B-Instruct": TrainParams(max_tokens=256)}
"""By base; a step of the second takes up to 7 GB. Targets and learning rate are those of `benchmarks/targets.py`."""
JOINED = ("science", "math", "reading", "code")
"""The order in which other tasks are read for joined sequences; the random choices depend on it."""
SAMPLES = 1000
"""Training examples of each task that the router is fitted on."""


def treadle(*arguments: object) -> None:
    command = [sys.executable, "-m", "treadle", *map(str, arguments)]
    print("$ treadle", *command[3:], flush=True)
    subprocess.run(command, check=True)


def train(options: argparse.Namespace) -> None:
    recipe, params = RECIPES[options.base], TRAINING[options.base]
    for task, parts in recipe.items():
        output = options.adapters / task
        if (output / "adapter_model.safetensors").exists():
            continue
        num_steps = options.steps or sum(part.examples for part in parts) // params.batch_size
        examples = choose(options.data, parts, options.examples or num_steps * params.batch_size, options.seed)
        file = write_examples(examples, options.work / "examples" / f"{task}.jsonl")
        firsts = {other: recipe[other][0].file for other in JOINED if other != task}
        also = [f"--also={other}={options.data / first}" for other, first in firsts.items()]
        flags = ("--steps", num_steps, "--max-tokens", params.max_tokens, "--learning-rate", params.learning_rate)
        treadle("train", "--base", options.base, "--data", file, "--seed", options.seed, *flags, *also, "-o", output)


def choose(data: Path, parts: Sequence[Part], count: int, seed: int) -> list[Example]:
    """Return `count` examples of a task, of each part its share."""
    total = sum(part.examples for part in parts)
    shares = [(part, max(1, count * part.examples // total)) for part in parts]
    return [
        each for part, share in shares for each in load_examples(data / part.file, part.form, limit=share, seed=seed)
    ]


def write_examples(examples: Sequence[Example], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples), "utf-8")
    return file


def fit(options: argparse.Namespace) -> None:
    count = min(SAMPLES, options.examples or SAMPLES)
    names = RECIPES[options.base]
    for task, parts in names.items():
        write_examples(choose(options.data, parts, count, seed=1), options.work / "samples" / f"{task}.jsonl")
    adapters = [f"--adapter={task}={options.adapters / task}" for task in names]
    samples = [f"--samples={task}={options.work / 'samples' / f'{task}.jsonl'}" for task in names]
    treadle("fit", "--base", options.base, *adapters, *samples, "--embedder", options.embedder, "--keep-samples", 0,
            "--overwrite", "-o", options.bundle)  # fmt: skip
    own = {each.adapter: [each.example.prompt] for each in QUESTIONS}  # no row of a data set goes into the repository
    (options.bundle / "samples.json").write_text(json.dumps(own, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training files")
    parser.add_argument("--base", choices=RECIPES, default=BASE, help="base model; usual: the demo's")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for intermediate results")
    parser.add_argument("--adapters", type=Path, help="folder of the adapters; those in it are not trained again")
    parser.add_argument("--embedder", help="as of treadle fit; usual: made from all-MiniLM-L6-v2, as for the demo")
    parser.add_argument("--bundle", type=Path, help="bundle folder to write; usual: the demo's, or WORK/bundle")
    parser.add_argument("--seed", type=int, default=0, help="of the training; the bundle in the repository has 0")
    parser.add_argument("--steps", type=int, help="of each adapter, to try the recipe out; the usual ones are above")
    parser.add_argument(
        "--examples", type=int, help="of each task, for adapters and router alike; usual: as many as its steps need"
    )
    options = parser.parse_args()
    options.adapters = options.adapters or options.work / "adapters"
    options.bundle = options.bundle or (BUNDLE if options.base == BASE else options.work / "bundle")
    train(options)
    if options.embedder is None:
        options.embedder = options.work / "embedder"
        if not (options.embedder / "config.json").exists():
            build_embedder(options.embedder)
    fit(options)


if __name__ == "__main__":
    main()
