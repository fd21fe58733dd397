"""Figures from result files alone: nothing is measured here.

Each figure is a function of results that returns a matplotlib figure, or None where the results do not hold it.
Markers, hatches and kinds of lines tell apart what colours do, so that a grey print is as good.
"""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.common.errors import TreadleError
from treadle.common.files import make_folder
from treadle.common.palette import colour
from treadle.common.writing import write_bytes, write_text
from treadle.experiments.panels import make_panels, wrapped, write_legend, write_note
from treadle.experiments.results import EvalResult, read_cell, read_settings
from treadle.experiments.study import Study
from treadle.experiments.tables import direction, sizes, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_COLORS = (colour(0), colour(5))
"""Colour of arms, and of the arm that they are compared with."""
BAR_MARKERS = "os"
MARKERS = "osD^vPX*<>"
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "|||", "OO", "**")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
"""Tell lines and areas apart in grey; their counts differ from that of the colours, so that pairs repeat late."""
PANEL_INCHES = 7.0
"""Width of a panel of ratios."""
INTERVAL = "with 95 % interval"
EVERY_LABEL = "generated tokens between\ntwo decisions (none = one decision)"
RC: dict[Any, Any] = {
    "svg.hashsalt": "treadle",  # the same results give the same file
    "pdf.fonttype": 42,  # publishers refuse Type 3
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "hatch.linewidth": 0.5,
}  # fmt: skip


def draw_all(folders: Sequence[Path], output: Path) -> list[Path]:
    """Draw every figure that the results allow as SVG and PDF files in `output`; return their paths."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise TreadleError("figures need: pip install 'treadle[plots]'") from error
    study = Study.read(folders)
    make_folder(output)
    drawn: list[Path] = []
    with mpl.rc_context(RC):
        for name, draw in FIGURES.items():
            figure = draw(study)
            if figure is not None:
                drawn += _save(figure, output / name)
    return drawn


def _save(figure: "Figure", path: Path) -> list[Path]:
    """Write a figure as SVG and as PDF; the same figure gives the same bytes."""
    svg, pdf = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    figure.savefig(pdf, format="pdf", bbox_inches="tight", metadata={"CreationDate": None})
    write_text(path.with_name(f"{path.name}.svg"), svg.getvalue())
    write_bytes(path.with_name(f"{path.name}.pdf"), pdf.getvalue())
    return [path.with_name(f"{path.name}.{ending}") for ending in ("svg", "pdf")]


def arms_figure(study: Study) -> "Figure | None":
    """NLL of every arm with its 95 % interval, one panel a task."""
    groups = {task: found[::-1] for task in study.tasks if (found := study.get(task, "nll"))}
    if not groups:
        return None
    labels = {row.arm: wrapped(row.arm) for rows in groups.values() for row in rows}
    heights = {arm: 1 + 0.8 * label.count("\n") for arm, label in labels.items()}
    lines = max(sum(heights[row.arm] for row in rows) for rows in groups.values())
    longest = max(len(line) for label in labels.values() for line in label.split("\n"))
    figure, axes = make_panels(len(groups), width=3.0 + 0.075 * longest, height=0.2 * lines + 1.1)
    for axis, (task, rows) in zip(axes, groups.items(), strict=True):
        tops = np.cumsum([heights[row.arm] for row in rows])
        places = [top - heights[row.arm] / 2 for top, row in zip(tops.tolist(), rows, strict=True)]
        for place, row in zip(places, rows, strict=True):
            is_first = row is rows[-1]
            axis.plot([row.low, row.high], [place, place], color=BAR_COLORS[is_first], linewidth=2)
            axis.plot(row.value, place, BAR_MARKERS[is_first], color=BAR_COLORS[is_first], markersize=6)
        axis.axvline(rows[-1].value, color="#999999", linewidth=0.8, linestyle="--")
        missing = {row.arm: " (no value)" for row in rows if math.isnan(row.value)}
        axis.set_yticks(places, [labels[row.arm] + missing.get(row.arm, "") for row in rows])
        axis.set_ylim(0, tops[-1])
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(_title(task, rows))
        axis.set_xlabel(_axis_label("nll"))
    write_note(figure, f"NLL {INTERVAL}; square and dashed line: the first arm")
    return figure


def _title(task: str, rows: Sequence[EvalResult]) -> str:
    return f"{wrapped(task)} (n = {sizes([row.n for row in rows])})"


def _axis_label(metric: str) -> str:
    return f"{'' if metric.startswith('nll') else metric + ', '}{unit(metric)}\n({direction(metric)})"


def _over(option: str, label: str, *, is_nll: bool = True) -> Callable[[Study], "Figure | None"]:
    """Return a figure of the NLL, or of each task's accuracy, over one option in which alone arms differ."""

    def draw(study: Study) -> "Figure | None":
        metrics = {task: "nll" if is_nll else study.accuracy(task) for task in study.tasks}
        found = {task: _families(study.get(task, metric), option) for task, metric in metrics.items()}
        groups = {task: families for task, families in found.items() if families}
        if not groups:
            return None
        figure, axes = make_panels(len(groups))
        for axis, (task, drawn) in zip(axes, groups.items(), strict=True):
            for index, rows in enumerate(drawn):
                _line(axis, rows, option, index)
            if len(drawn) > 1:
                axis.legend(fontsize=8)
            axis.set_title(_title(task, [row for rows in drawn for row in rows]))
            axis.set_xlabel(label)
            axis.set_ylabel(_axis_label(metrics[task]))
        write_note(figure, f"{'NLL' if is_nll else 'Right answers'} {INTERVAL}")
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


def _line(axis: "Axes", rows: Sequence[EvalResult], option: str, index: int) -> None:
    """Draw values and intervals in the order of the option; none (once, or all of the text) comes last."""
    given = {json.dumps((row.routing or {})[option]): row for row in rows}
    order = sorted(given, key=lambda text: (text == "null", json.loads(text) or 0))
    values = [given[key] for key in order]
    color, marker, dash = _style(index)
    places = range(len(order))
    axis.plot(places, [row.value for row in values], marker=marker, linestyle=dash, color=color, markersize=5,
              label=wrapped(values[0].arm))  # fmt: skip
    axis.fill_between(places, [row.low for row in values], [row.high for row in values], color=color, alpha=0.15)
    axis.set_xticks(places, ["none" if key == "null" else key.removesuffix(".0") for key in order])


def _style(index: int) -> tuple[str, str, Any]:
    """Return the colour, marker and kind of line of a panel's line or point number `index`."""
    return colour(index), MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)]


def speed_figure(study: Study) -> "Figure | None":
    """Quality against tokens per second of generation, one panel a task."""
    rows = [row for row in study.results if row.metric == "nll" and row.tokens_per_second]
    if not rows:
        return None
    tasks, arms = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("task", "arm"))
    figure, axes = make_panels(len(tasks), height=3.0)
    for axis, task in zip(axes, tasks, strict=True):
        shown = [row for row in rows if row.task == task]
        for row in shown:
            _point(axis, row, arms.index(row.arm))
        axis.set_title(_title(task, shown))
        axis.set_xlabel("generated tokens per second\n(higher is better)")
        axis.set_ylabel(_axis_label("nll"))
        axis.locator_params(axis="x", nbins=5)
    write_legend(figure, _with_all(axes[-1], arms))
    write_note(figure, f"NLL {INTERVAL}, over speed")
    return figure


def _point(axis: "Axes", row: EvalResult, index: int) -> None:
    color, marker, _ = _style(index)
    axis.plot([row.tokens_per_second] * 2, [row.low, row.high], color=color, linewidth=1)
    axis.plot(row.tokens_per_second, row.value, marker, color=color, markersize=7,
              fillstyle="full" if index < len(MARKERS) else "none")  # fmt: skip


def _with_all(axis: "Axes", arms: Sequence[str]) -> "Axes":
    """Give an axis an entry of the legend for each arm, also for those that it does not show."""
    for index, arm in enumerate(arms):
        color, marker, _ = _style(index)
        axis.plot([], [], marker, color=color, markersize=7, label=wrapped(arm),
                  fillstyle="full" if index < len(MARKERS) else "none")  # fmt: skip
    return axis


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
    figure, axes = make_panels(len(found))
    shown: list[str] = []
    for axis, (task, (arm, weights)) in zip(axes, found.items(), strict=True):
        names = read_settings(study.folders[arm, task])["adapters"]
        colors = [_style(index)[0] for index in range(weights.shape[1])]
        areas = axis.stackplot(range(len(weights)), weights.T, labels=list(map(wrapped, names)), colors=colors)
        for index, area in enumerate(areas):
            area.set(hatch=HATCHES[index % len(HATCHES)], edgecolor="#222222", linewidth=0.4)
        axis.set_title(f"{wrapped(task)}\n{wrapped(arm)}")
        axis.set_xlabel("generated token")
        axis.set_ylabel("weight, 0 to 1 (stacked)")
        axis.margins(x=0)
        if names != shown and not shown:
            write_legend(figure, axis)
            shown = names
        elif names != shown:
            axis.legend()
    write_note(figure, "Weights in one generation a task (n = 1), of the arm whose weights move most")
    return figure


def _movement(weights: Any) -> float:
    return float(np.abs(np.diff(weights, axis=0)).sum())


def confusion_figure(study: Study) -> "Figure | None":
    """Domain by nearest adapter, as shares: the confusion matrix of each kind of text."""
    if not study.qualities:
        return None
    best = max(study.qualities, key=lambda quality: min(quality["accuracy"].values()))
    kinds, names = list(best["confusion"]), list(map(wrapped, best["names"]))
    side = max(2.2, 0.42 * len(names)) + 1.2
    figure, axes = make_panels(len(kinds), width=side + 0.5, height=side)
    for axis, kind in zip(axes, kinds, strict=True):
        table = np.array(best["confusion"][kind])
        axis.imshow(table, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(table):
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if share > 0.5 else "black")  # fmt: skip
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("nearest adapter")
        axis.set_ylabel("domain of the text")
        axis.set_title(f"{kind}: {best['accuracy'][kind]:.3f} right")
    counts = [len(rows) for rows in best["distributions"].values() if rows]
    write_note(
        figure,
        f"Score {best['score']}, shares of a domain's texts (each row sums to 1; higher on the diagonal is better), "
        f"n = {sizes(counts)} a domain",
    )
    return figure


def cosines_figure(study: Study) -> "Figure | None":
    """Cosines of held-out prompts to their own centroid and to the nearest other one, one panel a domain."""
    if not study.qualities:
        return None
    quality = study.qualities[0]
    domains = [name for name in quality["names"] if quality["distributions"].get(name)]
    figure, axes = make_panels(len(domains))
    for axis, domain in zip(axes, domains, strict=True):
        cosines = np.array(quality["distributions"][domain])  # (examples, N)
        own = quality["names"].index(domain)
        others = np.delete(cosines, own, axis=1).max(1, initial=-1.0)  # (examples,)
        both = np.concatenate([cosines[:, own], others])
        bins = np.linspace(both.min(), both.max(), 25).tolist()
        axis.hist(cosines[:, own], bins=bins, color=colour(0), alpha=0.6, label="its own centroid (higher is better)")
        axis.hist(others, bins=bins, color="#222222", histtype="step", linewidth=1.4, linestyle="--",
                  label="the nearest other centroid (lower is better)")  # fmt: skip
        axis.set_title(f"prompts of {wrapped(domain)} (n = {len(cosines)})")
        axis.set_xlabel("cosine")
        axis.set_ylabel("prompts in a bin")
    write_legend(figure, axes[0])
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

    heights = [sum(1 + wrapped(line["arm"]).count("\n") for line in lines) + 2 for _, _, lines in panels]
    figure = Figure(figsize=(PANEL_INCHES, 0.24 * sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flatten().tolist()
    for axis, (table, setting, lines) in zip(axes, panels, strict=True):
        _bars(axis, lines)
        axis.set_title(f"{table['title']}: {setting}", fontsize=9, loc="left", wrap=True)
    axes[-1].set_xlabel("ratio to the first arm (square): medians with quartiles (lower is better)")
    return figure


def _is_timed(line: Mapping[str, Any]) -> bool:
    return all(line[key] for key in ("seconds", "low", "high", "ratio"))


def _bars(axis: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw each line's ratio and the quartiles of its seconds, over the seconds that a ratio of 1 stands for."""
    for place, line in enumerate(reversed(lines)):
        one = line["seconds"] / line["ratio"]
        color = BAR_COLORS[line is lines[0]]
        axis.plot([line["low"] / one, line["high"] / one], [place, place], color=color, linewidth=2)
        axis.plot(line["ratio"], place, BAR_MARKERS[line is lines[0]], color=color, markersize=6)
    axis.axvline(1.0, color="#999999", linewidth=0.6)
    axis.set_yticks(range(len(lines)), [wrapped(line["arm"]) for line in reversed(lines)])
    if max(line["ratio"] for line in lines) > 5:
        axis.set_xscale("log")


FIGURES: dict[str, "Callable[[Study], Figure | None]"] = {
    "arms": arms_figure,
    "every": _over("every", EVERY_LABEL),
    "window": _over("window", "tokens that the embedder sees (none = all)"),
    "boost": _over("boost", "boost of the largest cosine"),
    "every-accuracy": _over("every", EVERY_LABEL, is_nll=False),
    "window-accuracy": _over("window", "tokens that the embedder sees (none = all)", is_nll=False),
    "boost-accuracy": _over("boost", "boost of the largest cosine", is_nll=False),
    "speed": speed_figure,
    "weights": weights_figure,
    "confusion": confusion_figure,
    "cosines": cosines_figure,
    "ratios": lambda study: ratios_figure(study.benches),
}
