"""Prints for the command line: text coloured by its leading adapter, plain where the base leads, and tables."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from treadle.common.palette import colour
from treadle.routing.centroids import Floats

if TYPE_CHECKING:
    from treadle.engine.sequence import TokenEvent
    from treadle.experiments.adapter_doctor import FolderReport
    from treadle.experiments.doctor import BundleReport
    from treadle.experiments.results import EvalResult
    from treadle.experiments.router_quality import Quality
    from treadle.routing.calibration import FitReport
    from treadle.routing.centroids import Centroids
    from treadle.routing.explain import Explanation

FILE_WIDTH = 10_000
"""Columns of a file or a pipe."""


def legend(names: Sequence[str]) -> Text:
    """Return the adapters' names in their colours, and what has none."""
    line = Text()
    for index, name in enumerate(names):
        line.append(f"■ {name}  ", style=colour(index))
    return line.append("■ base, where its share is the largest", style="default")


def base_share(weights: Floats) -> float:
    """Return the base's share of one token: 1 minus the sum of the weights (N,)."""
    return max(0.0, 1.0 - float(weights.sum()))


def new_console(*, stderr: bool = False) -> Console:
    """Return a command's console. In a file or a pipe, tables keep their full width."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=FILE_WIDTH)


def print_coloured(console: Console, pieces: Sequence[str], weights: Floats) -> None:
    """Print the text of T tokens, each in the colour that leads in its row of `weights` (T, N)."""
    for piece, each in zip(pieces, weights, strict=True):
        style = colour(int(each.argmax())) if each.max() > base_share(each) else "default"
        console.print(Text(piece, style=style), end="", soft_wrap=True)


def stream_coloured(console: Console, events: Iterable["TokenEvent"]) -> list["TokenEvent"]:
    """Print tokens as they come, each in the colour of its leading adapter, plain where the base leads; return them."""
    shown: list[TokenEvent] = []
    for event in events:
        print_coloured(console, [event.text], event.weights[None])
        shown.append(event)
    console.print()
    return shown


def weights_table(title: str, names: Sequence[str], rows: Sequence[tuple[str, Floats]]) -> Table:
    """Return a table of mean weights (N,) and the base's share, with one row a text."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for index, name in enumerate(names):
        table.add_column(name, style=colour(index), justify="right")
    table.add_column("base", justify="right")
    for label, weights in rows:
        table.add_row(label, *(f"{weight:.2f}" for weight in (*weights, base_share(weights))))
    return table


def mean_weights(events: Sequence["TokenEvent"]) -> Floats:
    """Return the mean (N,) over tokens."""
    return np.mean([event.weights for event in events], axis=0)


def explanation_table(explanation: "Explanation") -> Table:
    """Return cosine, score and weight of each adapter; below, the words that decided."""
    table = Table(title_justify="left")
    for heading in ("adapter", "cosine", "score", "weight"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    scores = explanation.scores or (float("nan"),) * len(explanation.names)
    for index, name in enumerate(explanation.names):
        cosine, score, weight = explanation.cosines[index], scores[index], explanation.weights[index]
        style = "bold" if weight == max(explanation.weights) > 0 else ""
        told = ("no samples", "") if cosine is None or score is None else (f"{cosine:.3f}", f"{score:.2f}")
        table.add_row(Text(name, colour(index)), *told, f"{weight:.3f}", style=style)
    if explanation.base > 0:
        table.add_row("the base", "", "", f"{explanation.base:.3f}")
    if explanation.words:
        told = ", ".join(f"{word} +{lead:.2f}" for word, lead in explanation.words)
        table.caption = f"words for the nearest: {told}"
    return table


def fit_table(report: "FitReport", centroids: "Centroids") -> Table:
    """Return the cross-validation of a router: one row an adapter, its prompts' shares by nearest adapter."""
    table = Table(title_justify="left")
    if report.accuracy is not None:
        table.title = (
            f"cross-validation: {report.accuracy:.1%} of the samples' prompts are nearest to their own adapter"
        )
    columns = (*report.names, "the base") if report.confusion else ()
    for heading in ("adapter", "samples", *columns):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    shares = dict(zip(report.names, report.confusion, strict=bool(report.confusion)))
    for index, (name, count) in enumerate(zip(centroids.names, centroids.counts.tolist(), strict=True)):
        own = [f"{share:.2f}" for share in shares.get(name, ())]
        table.add_row(Text(name, colour(index)), str(count), *own)
    return table


def report_tables(report: "BundleReport") -> list[Table]:
    """Return the tables of `treadle doctor`: one row an adapter, and the cosines between centroids."""
    table = Table(title_justify="left")
    for heading in ("adapter", "rank", "targets", "modules", "norm", "change (nats)", "samples"):
        table.add_column(heading)
    cosines = Table(title="cosines between the centroids", title_justify="left")
    for heading in ("", *(adapter.name for adapter in report.adapters if adapter.cosines)):
        cosines.add_column(heading, justify="right" if heading else "left")
    for index, adapter in enumerate(report.adapters):
        name = Text(adapter.name, colour(index))
        table.add_row(
            name,
            ", ".join(map(str, adapter.ranks)),
            ", ".join(adapter.targets),
            str(adapter.modules),
            f"{adapter.norm:.3f}",
            f"{adapter.change:.4f}",
            str(adapter.samples) if adapter.samples else "none: probe text",
        )
        if adapter.cosines:
            cosines.add_row(name, *(f"{cosine:.3f}" for cosine in adapter.cosines))
    return [table, cosines] if cosines.rows else [table]


LEGEND = (
    "norm: size of the whole update, scale included. change: divergence from the base on the adapter's own texts; near "
    "0 it does nothing. cosines: near 1 the means of two domains are alike, and the scatter alone tells them apart."
)
"""Explains the columns of `report_tables`."""


def verdict(report: "BundleReport") -> str:
    """Return the last line of `treadle doctor`: healthy, or how much is wrong."""
    count = len(report.adapters)
    if not report.problems:
        return f"verdict: healthy. All {count} adapters load, and each changes what the base says."
    return f"verdict: {len(report.problems)} of {count + report.num_left_out} adapters need care; see below."


def adapter_lines(report: "FolderReport") -> list[str]:
    """Return the lines of `treadle doctor` about one adapter's folder."""
    if report.problem:
        return [f"{report.name}: treadle cannot blend it", "verdict: cannot be used as it is; see below"]
    shapes = [
        f"{each.name} {each.modules} x {' or '.join(map(str, each.shapes))}" if each.shapes != (None,) else each.name
        for each in report.targets
    ]
    ranks, scales = (", ".join(f"{each:g}" for each in values) for values in (report.ranks, report.scales))
    told = {
        "base": f"{report.base_model or 'none'} (by its config)",
        "rank": f"{ranks}; scale {scales}" if ranks else "",
        "layers": _ranges(report.layers),
        "modules": ", ".join(shapes) + " (in, out)" * bool(report.ranks),
        "tensors": f"{report.tensors} in {', '.join(report.dtypes)}, {report.num_bytes} bytes",
        "note": "; ".join(report.notes),
        "fits": f"{', '.join(report.cached) or 'no base'} in treadle's cache, by shapes",
    }
    if fit := report.fit:
        lacks = f"; the base lacks {', '.join(fit.missing)}" if fit.missing else ""
        told["on"] = f"{fit.base}: it cannot act" if fit.misfits else f"{fit.base}: {fit.acting} modules act{lacks}"
    lines = [f"  {heading:<8} {text}" for heading, text in told.items() if text]
    acts = not report.fit or not report.fit.misfits
    last = f"verdict: healthy{' on this base' * bool(report.fit)}" if acts else "verdict: not for this base; see below"
    return [f"{report.name}: {report.kind}; treadle blends it", *lines, last]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ranges: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def results_table(task: str, results: Sequence["EvalResult"]) -> Table:
    """Return the values of one task with their 95 % intervals: one row an arm, one column a metric."""
    metrics = list(dict.fromkeys(result.metric for result in results))
    cells = {(result.arm, result.metric): result for result in results}
    table = Table(title=f"{task} (n = {results[0].n})", title_justify="left")
    table.add_column("arm")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for arm in dict.fromkeys(result.arm for result in results):
        row = [cells.get((arm, metric)) for metric in metrics]
        table.add_row(arm, *(f"{r.value:.3f} ({r.low:.3f}-{r.high:.3f})" if r else "" for r in row))
    return table


def quality_tables(qualities: Sequence["Quality"]) -> list[Table]:
    """Return the accuracy of each score on each kind of text, then the confusion of the best score."""
    kinds = list(qualities[0].accuracy)
    summary = Table(title="accuracy of the nearest adapter, mean over domains", title_justify="left")
    for heading in ("score", *kinds):
        summary.add_column(heading, justify="left" if heading == "score" else "right")
    for quality in qualities:
        known = (f"{quality.accuracy[kind]:.3f}" if kind in quality.accuracy else "-" for kind in kinds)
        summary.add_row(quality.score, *known)
    if qualities[0].separation is not None:
        summary.caption = f"separation of the centroids: {qualities[0].separation:.2f} pooled standard deviations"
    best = max(qualities, key=lambda quality: min(quality.accuracy.values()))
    tables = [summary]
    for kind in kinds:
        table = Table(title=f"{best.score}, {kind}: domain by nearest adapter", title_justify="left")
        for heading in ("", *best.names):
            table.add_column(heading, justify="right" if heading else "left")
        for name, shares in zip(best.names, best.confusion[kind], strict=True):
            asked = any(shares)  # else the domain has no examples of this kind
            table.add_row(name, *(f"{share:.3f}" if asked else "-" for share in shares))
        tables.append(table)
    return tables
