"""Prints the main table over several training seeds: the mean over seeds, and the claims on that mean.

    python benchmarks/seeds.py work/full/seeds/0 work/full/seeds/1 work/full/seeds/2 [--metric nll] [--routed routed]

Each folder holds one seed's folders of results (`treadle eval`), all of the same rows. An interval is a 95 % bootstrap
over examples, the same examples for all seeds; the last column shows how far seeds lie apart. Nothing is measured here.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from claims import Table, bootstrap, format_cell, read_cells, verdict

from treadle.experiments.tasks import PAPER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=Path, nargs="+", help="one folder a seed")
    parser.add_argument("--metric", default="nll", help="nll, or primary: each task's own")
    parser.add_argument("--routed", default="routed", help="the arm that the claims are about")
    options = parser.parse_args()
    tables = [read_seed(folder, options.metric) for folder in options.seeds]
    tasks = [task for task in [*PAPER, "stream"] if all(task in table.tasks for table in tables)]
    arms = [arm for arm in tables[0].arms if all(table.get(arm, task) for table in tables for task in tasks)]
    found = {(arm, task): [bootstrap(table.get(arm, task)) for table in tables] for arm in arms for task in tasks}
    has_average = set(PAPER) <= set(tasks)
    if has_average:
        found |= {(arm, "average"): over_tasks([found[arm, task] for task in PAPER]) for arm in arms}
    columns = [*tasks, *(["average"] if has_average else [])]
    print_table(found, arms, columns)
    print()
    sign = -1 if options.metric == "nll" else 1
    for column in columns:
        for arm in [arm for arm in arms if arm != options.routed]:
            gap = np.mean(found[options.routed, column], axis=0) - np.mean(found[arm, column], axis=0)
            low, high = np.percentile(gap[1:], [2.5, 97.5])
            print(f"- {options.routed} better than {arm}, {column}: {verdict((gap[0], low, high), sign)}")


def read_seed(folder: Path, metric: str) -> Table:
    """Return the results of one seed, whose folders lie below `folder`."""
    places = sorted(file.parent for file in folder.glob("**/results.jsonl"))
    return Table(read_cells(places), metric)


def over_tasks(rows: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Return the mean over tasks for each seed, of bootstrap values a task and seed."""
    return [np.mean(each, axis=0) for each in zip(*rows, strict=True)]


def print_table(found: dict[tuple[str, str], list[np.ndarray]], arms: Sequence[str], columns: Sequence[str]) -> None:
    """Print the mean over seeds with its interval, one row an arm; last, the values of each seed in the last column."""
    print("| arm | " + " | ".join(columns) + f" | {columns[-1]} of each seed |")
    print("|---" * (len(columns) + 2) + "|")
    for arm in arms:
        cells = [format_cell(np.mean(found[arm, column], axis=0)) for column in columns]
        each = ", ".join(f"{samples[0]:.3f}" for samples in found[arm, columns[-1]])
        print(f"| {arm} | " + " | ".join(cells) + f" | {each} |")


if __name__ == "__main__":
    main()
