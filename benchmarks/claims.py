"""Prints the tables of docs/lab-answers.md from folders of results, and a verdict on each claim of the paper.

    python benchmarks/claims.py work/studies/main [more folders] [--metric nll] [--routed routed]

A verdict compares the routed arm with others on the same examples: a paired 95 % bootstrap of the difference. It is
"confirmed" or "refuted" where the interval leaves zero out, else "within noise". Nothing is measured here.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treadle.experiments.results import NUM_RESAMPLES, Fraction, difference, fractions_of, read_cell, read_results
from treadle.experiments.sets import STREAM_TASKS
from treadle.experiments.tasks import PAPER_TASKS

PRIMARY_METRICS = {
    "math": "exact_number",
    "science": "option",
    "science-text": "option",
    "code": "rouge_l",
    "reading": "f1",
    "mbpp": "pass_at_1",
    "conversation": "answer",
}
"""The metric that stands for a task; `option` is the share of rows whose right option is the likeliest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--metric", default="nll", help="nll, or primary: each task's own (exact_number, option ...)")
    parser.add_argument("--routed", default="routed", help="the arm that the claims are about")
    options = parser.parse_args()
    cells = read_cells(options.folders)
    table = ArmTable(cells, options.metric)
    table.print()
    print()
    print_seconds(options.folders)
    for task in [task for task in table.tasks if task in STREAM_TASKS]:
        print()
        print_by_domain(table, task)
    print()
    for line in [*verdicts(table, options.routed), *stream_verdicts(table, options.routed)]:
        print(f"- {line}")


def read_cells(folders: Sequence[Path]) -> dict[tuple[str, str, str], Path]:
    """Return where each (arm, task, metric) lies; tasks whose rows differ between folders end the program."""
    found = [(result, folder) for folder in folders for result in read_results(folder)]
    rows: dict[str, dict[str, Path]] = {}
    for result, folder in found:
        if result.rows:  # of results from before they had it, nothing is known
            rows.setdefault(result.task, {}).setdefault(result.rows, folder)
    differ = [f"{task}: {' and '.join(map(str, each.values()))}" for task, each in rows.items() if len(each) > 1]
    if differ:
        raise SystemExit("\n".join(["these hold other rows of the same task, which cannot be paired:", *differ]))
    return {(result.arm, result.task, result.metric): folder for result, folder in found}


class ArmTable:
    """Fractions of every arm and task."""

    def __init__(self, cells: dict[tuple[str, str, str], Path], metric: str) -> None:
        self.cells, self._metric = cells, metric
        self.tasks = [
            t for t in dict.fromkeys(t for _, t, _ in cells) if any(k[1:] == (t, self.metric(t)) for k in cells)
        ]
        self.arms = list(dict.fromkeys(arm for arm, _, _ in cells))

    def metric(self, task: str) -> str:
        """Return the metric that the table shows of a task."""
        return "nll" if self._metric == "nll" else PRIMARY_METRICS.get(task, "nll")

    def get(self, arm: str, task: str) -> Sequence[Fraction] | None:
        """Return the fractions of a cell, one an example; None where it was not measured."""
        folder = self.cells.get((arm, task, self.metric(task)))
        return None if folder is None else fractions_of(folder, arm, task, self.metric(task))

    def average(self, arm: str) -> np.ndarray | None:
        """Return the mean over the paper's tasks: the value, then bootstrap samples of it."""
        rows = [self.get(arm, task) for task in PAPER_TASKS]
        if any(row is None for row in rows):
            return None
        return np.mean([bootstrap(row) for row in rows], axis=0)

    def print(self) -> None:
        """Print one row an arm, one column a task, each with its 95 % interval."""
        names = [f"{task} ({self.metric(task)})" for task in self.tasks]
        print("| arm | " + " | ".join([*names, "average of four"]) + " |")
        print("|---" * (len(names) + 2) + "|")
        for arm in self.arms:
            rows = [self.get(arm, task) for task in self.tasks]
            cells = [format_cell(bootstrap(row)) if row else "" for row in rows]
            average = self.average(arm)
            print(f"| {arm} | " + " | ".join([*cells, "" if average is None else format_cell(average)]) + " |")


def print_seconds(folders: Sequence[Path]) -> None:
    """Print how long each cell took, in seconds, likelihoods and texts together."""
    seconds = {(each.arm, each.task): each.seconds for folder in folders for each in read_results(folder)}
    tasks = list(dict.fromkeys(task for _, task in seconds))
    print("| seconds of the cell | " + " | ".join(tasks) + " |")
    print("|---" * (len(tasks) + 1) + "|")
    for arm in dict.fromkeys(arm for arm, _ in seconds):
        row = [f"{seconds[arm, task]:.0f}" if (arm, task) in seconds else "" for task in tasks]
        print(f"| {arm} | " + " | ".join(row) + " |")


def print_by_domain(table: ArmTable, task: str) -> None:
    """Print a stream's NLL by the domain of the answer: long answers do not outweigh short ones in the mean."""
    cells = {arm: read_cell(table.cells[arm, task, "nll"], arm, task) for arm in table.arms if table.get(arm, task)}
    domains = sorted({name for row in next(iter(cells.values())) for name in row["adapters"]})
    print(f"| {task}: answers in | " + " | ".join([*domains, "mean of domains"]) + " |")
    print("|---" * (len(domains) + 2) + "|")
    for arm, rows in cells.items():
        answers = [
            (name, row["values"][f"nll-{part + 1}"]) for row in rows for part, name in enumerate(row["adapters"])
        ]
        means = [bootstrap([each for name, each in answers if name == domain]) for domain in domains]
        print(f"| {arm} | " + " | ".join(map(format_cell, [*means, np.mean(means, axis=0)])) + " |")


def bootstrap(fractions: Sequence[Fraction]) -> np.ndarray:
    """Return the value of a cell, then NUM_RESAMPLES bootstrap values; arms of a task share the choice."""
    parts = np.array(fractions, np.float64)
    chosen = np.random.default_rng(len(parts)).integers(len(parts), size=(NUM_RESAMPLES, len(parts)))
    sums = np.concatenate([parts.sum(0)[None], parts[chosen].sum(1)])
    return sums[:, 0] / np.maximum(sums[:, 1], 1e-12)


def format_cell(samples: np.ndarray) -> str:
    low, high = np.percentile(samples[1:], [2.5, 97.5])
    return f"{samples[0]:.3f} ({low:.3f} to {high:.3f})"


def verdicts(table: ArmTable, routed: str) -> list[str]:
    """Return a line for each claim of the paper."""
    lines: list[str] = []
    sign = -1 if table.metric("math") == "nll" else 1  # of what is better
    for task in PAPER_TASKS:
        ours, base = table.get(routed, task), table.get("base", task)
        if ours and base:
            found = difference(ours, base, seed=0)
            lines.append(f"{routed} better than base on {task}: {verdict(found, sign)}")
    average = table.average(routed)
    for other in [arm for arm in table.arms if arm != routed]:
        theirs = table.average(other)
        if average is not None and theirs is not None:
            gap = average - theirs
            low, high = np.percentile(gap[1:], [2.5, 97.5])
            lines.append(f"{routed}'s average better than that of {other}: {verdict((gap[0], low, high), sign)}")
    return lines


def stream_verdicts(table: ArmTable, routed: str) -> list[str]:
    """Return a line for each other arm on each mixed stream."""
    lines: list[str] = []
    for task in [task for task in table.tasks if task in STREAM_TASKS]:
        ours = table.get(routed, task)
        for other in [arm for arm in table.arms if arm != routed]:
            theirs = table.get(other, task)
            if ours and theirs:
                found = difference(ours, theirs, seed=0)
                sign = -1 if table.metric(task) == "nll" else 1
                lines.append(f"{routed} better than {other} on {task}: {verdict(found, sign)}")
    return lines


def verdict(found: tuple[float, float, float], sign: int) -> str:
    value, low, high = found
    better = sorted((sign * low, sign * high))
    word = "confirmed" if better[0] > 0 else "refuted" if better[1] < 0 else "within noise"
    return f"{word} ({value:+.3f}, {low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
