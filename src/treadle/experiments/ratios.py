"""Files of what `treadle bench` measured, one a run, and the figure of their ratios."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from treadle.common.documents import read_object
from treadle.common.errors import DataError
from treadle.common.writing import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from treadle.experiments.timing import Table

PREFIX = "bench-"
KEYS = {"suite", "title", "lines"}
LINE_KEYS = {"arm", "setting", "seconds", "low", "high", "ratio"}
COLORS = ("#4269d0", "#ff725c")
"""Of arms, and of the arm that the others are compared with."""
PANEL = 7.0
"""Inches that a panel is wide."""


def write_bench(folder: Path, suites: Sequence[str], facts: Mapping[str, Any], tables: Sequence["Table"]) -> Path:
    """Write the tables of one run; a file is named by suites, dtype and batches, and a later run of these replaces it.

    Args:
        folder: that is there.
        suites: that were asked for.
        facts: where and how it was measured, with `dtype` and `batch`.
        tables: so far.
    """
    batches = "-".join(map(str, facts["batch"]))
    file = folder / f"{PREFIX}{'-'.join(suites)}-{facts['dtype']}-batch-{batches}.json"
    document = {**facts, "tables": [asdict(table) for table in tables]}
    write_text(file, json.dumps(document, indent=1) + "\n")
    return file


def read_benches(folder: Path) -> list[dict[str, Any]]:
    """Return the tables of all runs in a folder, in the order of the files' names."""
    tables: list[dict[str, Any]] = []
    for file in sorted(folder.glob(f"{PREFIX}*.json")):
        found = read_object(file, DataError, strict=False).get("tables")
        each = cast(list[Any], found if isinstance(found, list) else [None])
        if not all(isinstance(table, dict) and table.keys() >= KEYS and _has_lines(table) for table in each):
            raise DataError(f"{file} is not what treadle bench -o writes")
        tables += each
    return tables


def _has_lines(table: Mapping[str, Any]) -> bool:
    lines = table["lines"]
    return isinstance(lines, list) and all(isinstance(line, dict) and _is_line(line) for line in lines)


def _is_line(line: Mapping[str, Any]) -> bool:
    """Whether a line has what is drawn of it: names, and numbers or nothing."""
    texts, numbers = ("arm", "setting"), ("seconds", "low", "high", "ratio")
    return (
        line.keys() >= LINE_KEYS
        and all(isinstance(line[key], str) for key in texts)
        and all(line[key] is None or type(line[key]) in (int, float) for key in numbers)
    )


def ratios_figure(tables: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Draw the ratio of each arm to the first of its setting, with quartiles; a panel for each table and setting."""
    panels = [
        (table, setting, lines)
        for table in tables
        for setting in dict.fromkeys(line["setting"] for line in table["lines"])
        if len(lines := [line for line in table["lines"] if line["setting"] == setting and _is_timed(line)]) > 1
    ]
    if not panels:
        return None
    from matplotlib.figure import Figure

    heights = [len(lines) + 2 for _, _, lines in panels]
    figure = Figure(figsize=(PANEL, 0.24 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flatten().tolist()
    for axis, (table, setting, lines) in zip(axes, panels, strict=True):
        _bars(axis, lines)
        axis.set_title(f"{table['title']}: {setting}", fontsize=7, loc="left", wrap=True)
    axes[-1].set_xlabel("ratio to the first arm, with quartiles", fontsize=7)
    return figure


def _is_timed(line: Mapping[str, Any]) -> bool:
    return all(line[key] for key in ("seconds", "low", "high", "ratio"))


def _bars(axis: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw each line's ratio and the quartiles of its seconds, over the seconds that a ratio of 1 stands for."""
    for place, line in enumerate(reversed(lines)):
        one = line["seconds"] / line["ratio"]
        color = COLORS[line is lines[0]]
        axis.plot([line["low"] / one, line["high"] / one], [place, place], color=color, linewidth=2)
        axis.plot(line["ratio"], place, "o", color=color, markersize=4)
    axis.axvline(1.0, color="#999999", linewidth=0.6)
    axis.set_yticks(range(len(lines)), [line["arm"] for line in reversed(lines)], fontsize=6)
    axis.tick_params(axis="x", labelsize=6)
    if max(line["ratio"] for line in lines) > 5:
        axis.set_xscale("log")
