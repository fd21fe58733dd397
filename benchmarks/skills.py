"""Measures the second base, its four adapters and the router: every cell of docs/results.md by one resumable command.

    python benchmarks/skills.py --data ../shared/data      # goes on where it was stopped
    python benchmarks/skills.py --data ../shared/data --only arc --tasks science --arms base --rows 100 --seed 0
    python benchmarks/skills.py --show                     # the tables of what is there

The second line measures one cell in minutes; --show takes the same --only, --rows and --seed. It fetches the base,
makes the bundles from the adapters of benchmarks/skills (training those that are missing), and measures study after
study, the most telling arms first. Finished cells are in benchmarks/skills/results, without the texts: numbers alone
may be committed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen import BASE, fetch

HERE = Path(__file__).parent
ROOT = HERE.parent
ADAPTERS, RESULTS = HERE / "skills", HERE / "skills" / "results"
ARC = "arc_challenge-test-even.jsonl.gz"
FILES = {
    "science": ARC,
    "science-text": ARC,
    "math": "gsm8k-test-even.jsonl.gz",
    "reading": "squad-validation-even.jsonl.gz",
    "code": "code_alpaca-test-a.jsonl.gz",
    "mbpp": "mbpp-validation.jsonl.gz",
}


@dataclass(frozen=True)
class Study:
    """Cells whose rows and settings are the same.

    Attributes:
        tasks: names in FILES, or `stream` and `conversation`.
        rows: examples of a task at most.
        flags: further options of `treadle eval`.
        arms: the arms that are measured, the most telling first; None = CORE, then MORE.
    """

    tasks: tuple[str, ...]
    rows: int
    flags: tuple[str, ...] = ()
    arms: tuple[str, ...] | None = None


CORE = ("oracle", "base", "routed", "uniform", "prompt", "science", "math", "reading", "code")
MORE = ("every-1", "every-2", "every-3", "every-4", "every-8", "nearest", "boost-4", "states", "paper")
MIXED = ("oracle", "base", "routed", "uniform", "prompt", "every-1", "every-4", "every-8", "every-16")
STUDIES = {
    "arc": Study(("science", "science-text"), 586, ("--no-generate",)),
    "nll": Study(("math", "reading", "code", "mbpp"), 300, ("--no-generate",)),
    "chat": Study(("science", "math", "reading", "mbpp", "code"), 200, ("--chat", "--max-tokens", "256"), ("base",)),
    "answers": Study(("reading", "math", "mbpp", "code"), 200),
    "few-shot": Study(("math",), 200, ("--shots", "4"), ("base", "oracle", "routed")),
    "stream": Study(("stream",), 100, ("--no-generate",), MIXED),
    "conversation": Study(("conversation",), 60, (), MIXED),
}
"""In the order in which they are measured."""
SEEDS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data files; not needed to show")
    parser.add_argument("--work", type=Path, default=Path("work/skills"), help="folder of bundles and texts")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="studies; usual: all")
    parser.add_argument("--tasks", nargs="+", help="of the studies; usual: all")
    parser.add_argument("--arms", nargs="+", help="usual: those of each study")
    parser.add_argument("--rows", type=int, help="of each task; usual: those of each study")
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS, help="of the rows; usual: 0 and 1")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.show:
        if options.data is None:
            parser.error("--data is needed to measure")
        measure_all(options)
    for seed in options.seed:
        show(options, seed)


def measure_all(options: argparse.Namespace) -> None:
    """Measure whatever is missing, seed after seed and study after study."""
    print(f"base: {fetch(options.work / 'parts')}", flush=True)
    for seed in options.seed:
        for name in options.only:
            arms = STUDIES[name].arms
            for group in [options.arms] if options.arms else [arms] if arms else [CORE, MORE]:
                measure(options, name, seed, group)


def make_bundle(options: argparse.Namespace, name: str, before: str = "") -> Path:
    """Return the bundle of the adapters, made where it is not there; `before` stands before the embedder's name."""
    bundle = options.work / name
    if not (bundle / "bundle.json").exists():
        embedder = before + str(ROOT / "demo" / "bundle" / "embedder")
        run(ROOT / "demo" / "recipe.py", "--data", options.data, "--base", BASE, "--work", options.work,
            "--adapters", ADAPTERS, "--embedder", embedder, "--bundle", bundle)  # fmt: skip
    return bundle


def arm_of(options: argparse.Namespace, name: str) -> str:
    """Return an arm as `treadle eval` takes it; `states` is a file that names a bundle with the base's states."""
    if name != "states":
        return name
    file = options.work / "states.toml"
    bundle = make_bundle(options, "states", "base+")
    file.write_text(f"[arms.states]\nbundle = {json.dumps(str(bundle))}\n", "utf-8")
    return str(file)


def measure(options: argparse.Namespace, name: str, seed: int, arms: Sequence[str]) -> None:
    """Measure arms on the tasks of a study, and keep the numbers."""
    study, folder = STUDIES[name], folder_of(options, name, seed)
    output = options.work / "results" / folder.name
    if folder.exists() and not output.exists():
        shutil.copytree(folder, output)
    wanted = [task for task in study.tasks if task in (options.tasks or study.tasks)]
    if not wanted:
        return
    mixed = [task for task in wanted if task not in FILES]
    named = ["science", "math", "reading", "code"] if mixed else wanted
    tasks = [f"--tasks={task}={options.data / FILES[task]}" for task in named]
    tasks += [flag for task in mixed for flag in ("--tasks", task, "--only", task)]
    bundle, named_arms = make_bundle(options, "bundle"), ",".join(arm_of(options, arm) for arm in arms)
    run("-m", "treadle", "eval", bundle, *tasks, "--arms", named_arms, "--limit", options.rows or study.rows,
        "--seed", seed, *study.flags, "--dtype", "bfloat16", "-o", output)  # fmt: skip
    keep_numbers(output, folder)


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Return where the numbers of a study are kept."""
    return RESULTS / f"{name}-{options.rows or STUDIES[name].rows}-seed-{seed}"


def keep_numbers(output: Path, folder: Path) -> None:
    """Copy a folder of results without its texts: of each example, the fractions of its metrics alone."""
    for file in sorted(output.rglob("*.json*")):
        copy = folder / file.relative_to(output)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.parent == output:
            shutil.copy(file, copy)
            continue
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        copy.write_text("".join(json.dumps(numbers_of(row)) + "\n" for row in rows), "utf-8")


def numbers_of(row: dict[str, object]) -> dict[str, object]:
    return {key: row[key] for key in ("index", "values", "adapters") if key in row}


def show(options: argparse.Namespace, seed: int) -> None:
    """Print the tables of one seed: accuracies with ARC's, then likelihoods with ARC's."""
    folders = {name: folder_of(options, name, seed) for name in STUDIES if name in options.only}
    found = {name: folder for name, folder in folders.items() if (folder / "results.jsonl").exists()}
    for names, metric in ((("arc", "answers"), "primary"), (("arc", "nll"), "nll"), (("chat",), "primary"),
                          (("few-shot",), "primary"), (("stream",), "nll"), (("conversation",), "nll"),
                          (("conversation",), "primary")):  # fmt: skip
        chosen = [found[name] for name in names if name in found]
        if chosen:
            print(f"\n{' and '.join(folder.name for folder in chosen)}, {metric}:\n", flush=True)
            run(HERE / "claims.py", *chosen, "--metric", metric)


def run(*arguments: object) -> None:
    """Run Python with arguments; end with its exit code where that is not 0."""
    done = subprocess.run([sys.executable, *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
