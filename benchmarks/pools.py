"""Four more domains, for pools of six and eight adapters: trains their adapters and makes both bundles.

    python benchmarks/pools.py --data ../shared/data --work work/pools [--steps 100]

Added to the demo's four: commonsense (CommonsenseQA), translation (Multi30k, English to German), then yes-no (BoolQ)
and dialogue (DialogSum). Rows that are evaluated are never trained on. The data sets carry terms of their own: use what
is made of them for measurements only.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treadle.experiments.data import load_examples, read_rows
from treadle.experiments.tasks import TASKS, Example

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from recipe import ADAPTERS, BASE, BUNDLE, SAMPLES, treadle, write_examples

HELD_OUT = 100
"""Rows for evaluation, where a data set comes in one file."""


def _translation(row: dict[str, Any]) -> Example:
    return Example(f"English: {row['en'].strip()}\n\nGerman:", " " + row["de"].strip(), bare=row["en"].strip())


def _yes_no(row: dict[str, Any]) -> Example:
    passage, question = row["passage"].strip(), row["question"].strip()
    return Example(
        f"Passage: {passage}\n\nIs it true? {question}\n\nAnswer:",
        " yes" if row["answer"] else " no",
        bare=f"{passage} {question}",
    )


def _dialogue(row: dict[str, Any]) -> Example:
    dialogue = row["dialogue"].strip()
    return Example(f"Dialogue:\n{dialogue}\n\nSummary:", " " + row["summary"].strip(), bare=dialogue)


# domain: (training file, evaluation file or None, how a row is read); the first two are in the pool of six
MORE: dict[str, tuple[str, str | None, Callable[[Any], Example]]] = {
    "commonsense": ("commonsense_qa-train.jsonl.gz", "commonsense_qa-validation.jsonl.gz", TASKS["science"].read),
    "translation": ("multi30k_en_de-train.jsonl.gz", "multi30k_en_de-validation.jsonl.gz", _translation),
    "yes-no": ("boolq-train.jsonl.gz", None, _yes_no),
    "dialogue": ("dialogsum-validation.jsonl.gz", None, _dialogue),
}
POOLS = {"six": list(MORE)[:2], "eight": list(MORE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work/pools"))
    parser.add_argument("--steps", type=int, default=100, help="of each adapter, 8 sequences each")
    options = parser.parse_args()
    for name in MORE:
        write_rows(options.data, options.work, name)
        adapter = options.work / "adapters" / name
        if not (adapter / "adapter_config.json").exists():
            rows = options.work / f"{name}-train.jsonl"
            treadle("train", "--base", BASE, "--data", rows, "--limit", options.steps * 8, "--steps", options.steps,
                    "-o", adapter)  # fmt: skip
    for task, (file, _) in ADAPTERS.items():
        rows = load_examples(options.data / file, task, limit=SAMPLES, seed=1)
        write_examples(rows, options.work / f"{task}-train.jsonl")
    for pool, more in POOLS.items():
        names = [*ADAPTERS, *more]
        homes = {name: (options.work if name in MORE else BUNDLE) / "adapters" / name for name in names}
        adapters = [f"--adapter={name}={home}" for name, home in homes.items()]
        samples = [f"--samples={name}={options.work / name}-train.jsonl" for name in names]
        treadle("fit", "--base", BASE, *adapters, *samples, "--embedder", BUNDLE / "embedder", "--keep-samples", 0,
                "--overwrite", "-o", options.work / pool)  # fmt: skip


def write_rows(data: Path, work: Path, name: str) -> None:
    """Write what a domain is trained on (at most SAMPLES examples), what it is evaluated on, and its task."""
    train_file, test_file, read = MORE[name]
    rows = [read(row) for row in read_rows(data / train_file)]
    random.Random(0).shuffle(rows)
    test = [read(row) for row in read_rows(data / test_file)] if test_file else rows[:HELD_OUT]
    train = rows if test_file else rows[HELD_OUT:]
    write_examples(train[:SAMPLES], work / f"{name}-train.jsonl")
    write_examples(test, work / f"{name}-test.jsonl")
    task = {"name": name, "prompt": "{prompt}", "completion": "{completion}", "bare": "{bare}"}
    (work / f"{name}.json").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
