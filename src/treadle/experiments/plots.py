"""Figures from result files alone: nothing is measured here.

Each figure is a function of results that returns a matplotlib figure, or None where the results do not hold it.
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from treadle.common.documents import read_json
from treadle.common.errors import DataError, TreadleError
from treadle.common.files import make_folder
from treadle.common.palette import COLOURS, colour
from treadle.common.writing import write_text
from treadle.experiments.results import EvalResult, read_benches, read_cell, read_results, read_settings
from treadle.experiments.router_quality import Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_COLORS = (colour(0), colour(5))
"""Colour of arms, and of the arm that they are compared with."""
PANEL_INCHES = 7.0
"""Width of a panel of ratios."""
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


def draw_all(folders: Sequence[Path], output: Path) -> list[Path]:
    """Draw every figure that the results allow as SVG files in `output`; return their paths."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise TreadleError("figures need: pip install 'treadle[plots]'") from error
    mpl.use("agg")  # no display
    mpl.rcParams["svg.hashsalt"] = "treadle"  # the same results give the same file
    study = Study.read(folders)
    make_folder(output)
    drawn: list[Path] = []
    for name, draw in FIGURES.items():
        figure = draw(study)
        if figure is not None:
            text = io.StringIO()
            figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
            write_text(output / f"{name}.svg", text.getvalue())
            drawn.append(output / f"{name}.svg")
    return drawn


def arms_figure(study: Study) -> "Figure | None":
    """NLL of every arm with its 95 % interval, one panel a task."""
    tasks = [task for task in study.tasks if study.get(task, "nll")]
    if not tasks:
        return None
    figure, axes = _panels(len(tasks), height=0.22 * len(study.get(tasks[0], "nll")) + 1.2)
    for axis, task in zip(axes, tasks, strict=True):
        rows = study.get(task, "nll")[::-1]
        for place, row in enumerate(rows):
            axis.plot([row.low, row.high], [place, place], color=COLOURS[0], linewidth=2)
            axis.plot(row.value, place, "o", color=COLOURS[0], markersize=4)
        axis.set_yticks(range(len(rows)), [row.arm for row in rows], fontsize=7)
        axis.set_title(task)
        axis.set_xlabel("nats per token")
    return figure


def _over(option: str, label: str, *, is_nll: bool = True) -> Callable[[Study], "Figure | None"]:
    """Return a figure of the NLL, or of each task's accuracy, over one option in which alone arms differ."""

    def draw(study: Study) -> "Figure | None":
        found = {task: _families(study.get(task, "nll" if is_nll else study.accuracy(task)), option)
                 for task in study.tasks}  # fmt: skip
        groups = {task: families for task, families in found.items() if families}
        if not groups:
            return None
        figure, axes = _panels(len(groups))
        for axis, (task, drawn) in zip(axes, groups.items(), strict=True):
            for index, rows in enumerate(drawn):
                _line(axis, rows, option, COLOURS[index % len(COLOURS)])
            if len(drawn) > 1:
                axis.legend(fontsize=6)
            axis.set_title(task)
            axis.set_xlabel(label)
            axis.set_ylabel("nats per token" if is_nll else study.accuracy(task))
        return figure

    return draw


def _families(results: Sequence[EvalResult], option: str) -> list[list[EvalResult]]:
    """Return results that differ in one option alone, and have three values of it at least; not in who routes."""
    families: dict[str, list[EvalResult]] = {}
    for result in results:
        if result.routing and result.routing["rule"] != "fixed":
            others = {key: value for key, value in result.routing.items() if key != option}
            rest = json.dumps([result.versions.get("fingerprint"), others], sort_keys=True)
            families.setdefault(rest, []).append(result)
    return [rows for rows in families.values() if len({json.dumps((row.routing or {})[option]) for row in rows}) > 2]


def _line(axis: "Axes", rows: Sequence[EvalResult], option: str, color: str) -> None:
    """Draw values and intervals in the order of the option; none (once, or all of the text) comes last."""
    given = {json.dumps((row.routing or {})[option]): row for row in rows}
    order = sorted(given, key=lambda text: (text == "null", json.loads(text) or 0))
    values = [given[key] for key in order]
    axis.plot(range(len(order)), [row.value for row in values], "o-", color=color, markersize=4, label=values[0].arm)
    axis.fill_between(
        range(len(order)), [row.low for row in values], [row.high for row in values], color=color, alpha=0.15
    )
    axis.set_xticks(range(len(order)), ["none" if key == "null" else key.removesuffix(".0") for key in order])


def speed_figure(study: Study) -> "Figure | None":
    """Quality against tokens per second of generation, one panel a task."""
    tasks = [task for task in study.tasks if any(row.tokens_per_second for row in study.get(task, "nll"))]
    if not tasks:
        return None
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for row in [row for row in study.get(task, "nll") if row.tokens_per_second]:
            axis.plot(row.tokens_per_second, row.value, "o", color=COLOURS[0], markersize=4)
            axis.annotate(row.arm, (row.tokens_per_second, row.value), fontsize=6, xytext=(3, 2),
                          textcoords="offset points")  # fmt: skip
        axis.set_title(task)
        axis.set_xlabel("generated tokens per second")
        axis.set_ylabel("nats per token")
    return figure


def weights_figure(study: Study) -> "Figure | None":
    """Weights over the tokens of the longest generation of each task, stacked: of the arm whose weights move most."""
    found: dict[str, tuple[str, Any]] = {}
    for arm, task in study.folders:
        for row in read_cell(study.folders[arm, task], arm, task):
            weights = np.array(row.get("weights", []))  # (T, N)
            if len(weights) > 8 and (task not in found or _movement(weights) > _movement(found[task][1])):
                found[task] = arm, weights
    if not found:
        return None
    figure, axes = _panels(len(found))
    shown: list[str] = []
    for axis, (task, (arm, weights)) in zip(axes, found.items(), strict=True):
        names = read_settings(study.folders[arm, task])["adapters"]
        colors = [COLOURS[index % len(COLOURS)] for index in range(weights.shape[1])]
        axis.stackplot(range(len(weights)), weights.T, labels=names, colors=colors)
        axis.set_title(f"{task}: {arm}")
        axis.set_xlabel("generated token")
        axis.set_ylabel("weight")
        if names != shown:
            axis.legend(fontsize=6, loc="lower left")
            shown = names
    return figure


def _movement(weights: Any) -> float:
    return float(np.abs(np.diff(weights, axis=0)).sum())


def confusion_figure(study: Study) -> "Figure | None":
    """Domain by nearest adapter, as shares: the confusion matrix of each kind of text."""
    if not study.qualities:
        return None
    best = max(study.qualities, key=lambda quality: min(quality["accuracy"].values()))
    kinds = list(best["confusion"])
    figure, axes = _panels(len(kinds), height=3.2)
    for axis, kind in zip(axes, kinds, strict=True):
        table = np.array(best["confusion"][kind])
        axis.imshow(table, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(table):
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if share > 0.5 else "black")  # fmt: skip
        axis.set_xticks(range(len(best["names"])), best["names"], rotation=30, fontsize=7)
        axis.set_yticks(range(len(best["names"])), best["names"], fontsize=7)
        axis.set_title(f"{best['score']}, {kind}: {best['accuracy'][kind]:.3f}", fontsize=9)
    return figure


def cosines_figure(study: Study) -> "Figure | None":
    """Distributions of the cosines of held-out prompts to all centroids, one panel a domain."""
    if not study.qualities:
        return None
    quality = study.qualities[0]
    domains = [name for name in quality["names"] if quality["distributions"].get(name)]
    figure, axes = _panels(len(domains))
    for axis, domain in zip(axes, domains, strict=True):
        cosines = np.array(quality["distributions"][domain])  # (examples, N)
        for index, name in enumerate(quality["names"]):
            color = COLOURS[index % len(COLOURS)]
            axis.hist(cosines[:, index], bins=30, color=color, histtype="step", linewidth=1.4, label=name)
        axis.set_title(f"prompts of {domain}")
        axis.set_xlabel("cosine to the centroid")
    axes[0].legend(fontsize=6)
    return figure


def ratios_figure(tables: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Draw each arm's ratio to the first of its setting, with quartiles, in a panel a setting."""
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
    figure = Figure(figsize=(PANEL_INCHES, 0.24 * sum(heights)), layout="constrained")
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
        color = BAR_COLORS[line is lines[0]]
        axis.plot([line["low"] / one, line["high"] / one], [place, place], color=color, linewidth=2)
        axis.plot(line["ratio"], place, "o", color=color, markersize=4)
    axis.axvline(1.0, color="#999999", linewidth=0.6)
    axis.set_yticks(range(len(lines)), [line["arm"] for line in reversed(lines)], fontsize=6)
    axis.tick_params(axis="x", labelsize=6)
    if max(line["ratio"] for line in lines) > 5:
        axis.set_xscale("log")


def _panels(count: int, height: float = 2.8) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


FIGURES: dict[str, "Callable[[Study], Figure | None]"] = {
    "arms": arms_figure,
    "every": _over("every", "generated tokens between two decisions (none = one decision)"),
    "window": _over("window", "tokens that the embedder sees (none = all)"),
    "boost": _over("boost", "boost of the largest cosine"),
    "every-accuracy": _over("every", "generated tokens between two decisions (none = one decision)", is_nll=False),
    "window-accuracy": _over("window", "tokens that the embedder sees (none = all)", is_nll=False),
    "boost-accuracy": _over("boost", "boost of the largest cosine", is_nll=False),
    "speed": speed_figure,
    "weights": weights_figure,
    "confusion": confusion_figure,
    "cosines": cosines_figure,
    "ratios": lambda study: ratios_figure(study.benches),
}
