"""Folders of results read together, for tables and figures: nothing is measured here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from treadle.common.documents import read_json
from treadle.common.errors import DataError
from treadle.experiments.results import EvalResult, read_benches, read_results
from treadle.experiments.router_quality import Quality

QUALITY_FILE = "routing.json"
"""File in a folder of results that keeps the output of `treadle route --eval --json`."""


@dataclass(frozen=True)
class Study:
    """The results of some folders, where each cell lies, and the tables of benches."""

    results: tuple[EvalResult, ...]
    folders: dict[tuple[str, str], Path]
    qualities: tuple[dict[str, Any], ...]
    benches: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, folders: Sequence[Path]) -> "Study":
        """Read folders of results; where two hold the same arm and task, the later one counts."""
        cells: dict[tuple[str, str, str], EvalResult] = {}
        places: dict[tuple[str, str], Path] = {}
        qualities: list[dict[str, Any]] = []
        for folder in folders:
            for result in read_results(folder):
                cells[result.arm, result.task, result.metric] = result
                places[result.arm, result.task] = folder
            qualities += _read_qualities(folder / QUALITY_FILE)
        benches = [table for folder in folders for table in read_benches(folder)]
        if not cells and not qualities and not benches:
            names = ", ".join(map(str, folders))
            raise DataError(f"no results in {names}; `treadle eval` and `treadle bench -o` write them")
        return cls(tuple(cells.values()), places, tuple(qualities), tuple(benches))

    @property
    def tasks(self) -> list[str]:
        """Return the tasks, in the order in which they were measured."""
        return list(dict.fromkeys(result.task for result in self.results))

    def get(self, task: str, metric: str) -> list[EvalResult]:
        """Return the results of one metric of a task, one an arm."""
        return [result for result in self.results if (result.task, result.metric) == (task, metric)]

    def accuracy(self, task: str) -> str:
        """Return the first metric of a task that counts right answers; "" where only likelihoods were measured."""
        found = [result.metric for result in self.results if result.task == task]
        return next((metric for metric in found if not metric.startswith("nll")), "")


def _read_qualities(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a `treadle route --eval` file, one for each score; none if there is no file."""
    if not os.path.lexists(file):
        return []
    found = read_json(file, DataError, strict=False)
    keys = {each.name for each in fields(Quality)}
    if not isinstance(found, list) or not all(isinstance(each, dict) and keys <= set(each) for each in found):
        raise DataError(f"{file} is not what treadle route --eval writes")
    return cast(list[dict[str, Any]], found)
