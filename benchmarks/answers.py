"""Measures what answers gain where the router reads text alone, or the base's states: NLL against the oracle.

    python benchmarks/answers.py --data ../shared/data --work work/answers --domains 4 --samples 60 --states

A router is fitted on some samples of each domain (`benchmarks/router_rows.py`), and `treadle eval` asks the test rows
of the first four domains. Their adapters are those of the demo. With `--domains 8` four more are trained as those are,
80 steps each. They are for measurements only, because Multi30k has terms of its own. What
exists already is not made again.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from router_rows import EIGHT, FOUR, MORE, load_rows

from treadle.experiments.tasks import Example

DEMO = Path(__file__).parents[1] / "demo" / "bundle"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = 80
MAX_TOKENS = 160
"""Longer samples are left out of the training, which takes less than 3 GB then."""
FIELDS = {key: f"{{{key}}}" for key in ("prompt", "completion", "bare")}
TEST_FILES = {
    "math": "gsm8k-test-even",
    "science": "arc_challenge-test-even",
    "code": "code_alpaca-test-a",
    "reading": "squad-validation-even",
}
PARTS = ("train", "fit", "eval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work/answers"))
    parser.add_argument("--domains", type=int, choices=(4, 8), default=4)
    parser.add_argument("--samples", type=int, default=60, help="of each domain, that the router is fitted on")
    parser.add_argument("--states", action="store_true", help="the base's states decide once they are there")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tasks", nargs="+", default=list(FOUR), help="of the first four, or stream, conversation")
    parser.add_argument("--arms", default="oracle,routed")
    parser.add_argument("--limit", type=int, default=300, help="test rows of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of test rows")
    options = parser.parse_args()
    samples = load_rows(options.data)["samples"]
    names = FOUR if options.domains == len(FOUR) else EIGHT
    if "train" in options.only and names is EIGHT:
        train(options.work, samples)
    bundle = options.work / f"{len(names)}-{options.samples}-{'states' if options.states else 'text'}"
    if "fit" in options.only and not (bundle / "bundle.json").exists():
        chosen = {
            name: random.Random(0).sample(samples[name], min(options.samples, len(samples[name]))) for name in names
        }
        fit(options.work, bundle, chosen, options.states)
    if "eval" in options.only:
        results = bundle / f"results-{options.seed}-{'-'.join(options.tasks)}"
        treadle("eval", bundle, *asked(options.data, options.tasks), "--arms", options.arms, "--limit", options.limit,
                "--seed", options.seed, "--no-generate", "--dtype", "bfloat16", "-o", results)  # fmt: skip


def asked(data: Path, tasks: Sequence[str]) -> list[str]:
    """Return the flags that name tasks; a joined one needs the rows of all four."""
    joined = [task for task in tasks if task not in FOUR]
    flags = [f"--tasks={task}={data / TEST_FILES[task]}.jsonl.gz" for task in (FOUR if joined else tasks)]
    return [*flags, *(flag for task in joined for flag in (f"--tasks={task}", f"--only={task}"))]


def treadle(*arguments: object) -> None:
    command = [sys.executable, "-m", "treadle", *map(str, arguments)]
    print("$ treadle", *command[3:], flush=True)
    subprocess.run(command, check=True)


def write_rows(file: Path, examples: Sequence[Example]) -> Path:
    """Write examples as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{key: getattr(each, key) for key in FIELDS} for each in examples]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def train(work: Path, samples: dict[str, list[Example]]) -> None:
    """Train the adapters of the four more domains, some sequences joined with examples of the seven others."""
    files = {name: write_rows(work / f"{name}.jsonl", samples[name]) for name in EIGHT}
    for name in EIGHT:
        (work / f"{name}.json").write_text(json.dumps({"name": name, **FIELDS}, indent=2) + "\n", "utf-8")
    for name in MORE:
        output = work / "adapters" / name
        if (output / "adapter_model.safetensors").exists():
            continue
        also = [f"--also={work / other}.json={files[other]}" for other in EIGHT if other != name]
        treadle("train", "--base", BASE, "--task", work / f"{name}.json", "--data", files[name], "--steps", STEPS,
                "--max-tokens", MAX_TOKENS, "--seed", 0, *also, "-o", output)  # fmt: skip


def fit(work: Path, bundle: Path, samples: dict[str, list[Example]], with_states: bool) -> None:
    folders = {name: DEMO / "adapters" / name if name in FOUR else work / "adapters" / name for name in samples}
    adapters = [f"--adapter={name}={folder}" for name, folder in folders.items()]
    files = {name: write_rows(work / bundle.name / "samples" / f"{name}.jsonl", samples[name]) for name in samples}
    given = [f"--samples={name}={file}" for name, file in files.items()]
    treadle("fit", "--base", BASE, *adapters, *given, "--embedder", f"{'base+' * with_states}{DEMO / 'embedder'}",
            "--keep-samples", 0, "--overwrite", "-o", bundle)  # fmt: skip


if __name__ == "__main__":
    main()
