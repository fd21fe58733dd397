"""Writes validation rows: what no adapter was trained on, no centroid was fitted on, and no test split holds.

    python benchmarks/validation.py --data ../shared/data -o work/validation [--limit 300]

Options are chosen on these, never on test rows. Of GSM8K, CodeAlpaca and SQuAD they are rows of the training split that
the recipe (demo/recipe.py) did not choose; of ARC-Challenge, whose training split is used up, its validation split.
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

from treadle.common.errors import DataError
from treadle.experiments.data import load_examples, read_rows
from treadle.experiments.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from recipe import ADAPTERS, SAMPLES

SPLIT_OF_ITS_OWN = {"science": "arc_challenge-validation.jsonl.gz"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="rows a task")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for task, (file, steps) in ADAPTERS.items():
        rows = list(read_rows(options.data / SPLIT_OF_ITS_OWN.get(task, file)))
        if task not in SPLIT_OF_ITS_OWN:
            used = {example.prompt for example in load_examples(options.data / file, task, limit=steps * 8, seed=0)}
            used |= {example.prompt for example in load_examples(options.data / file, task, limit=SAMPLES, seed=1)}
            # the pool from which other tasks' joined sequences took theirs
            used |= {example.prompt for example in load_examples(options.data / file, task, limit=2000, seed=0)}
            rows = [row for row in rows if TASKS[task].read(row).prompt not in used]
        if len(rows) < options.limit and task not in SPLIT_OF_ITS_OWN:
            raise DataError(f"{file}: only {len(rows)} rows are left")
        chosen = random.Random(7).sample(rows, min(options.limit, len(rows)))
        out = options.output / f"{task}.jsonl.gz"
        with gzip.open(out, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in chosen)
        print(f"{out}: {len(chosen)} rows")


if __name__ == "__main__":
    main()
