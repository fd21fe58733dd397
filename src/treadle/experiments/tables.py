"""Results as tables in Markdown, CSV and LaTeX, with intervals and paired differences: all three of the same lines."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from treadle.common.errors import OptionError, unknown_name
from treadle.common.files import make_folder
from treadle.common.writing import write_text
from treadle.experiments.results import NUM_RESAMPLES, EvalResult, Fraction, difference, read_cell
from treadle.experiments.study import Study

TEX_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
})  # fmt: skip
MARKDOWN_ESCAPES = str.maketrans({character: f"\\{character}" for character in "\\|*`<"})


@dataclass(frozen=True)
class ArmLine:
    """One metric of one arm on one task, and its difference to another arm on the same examples.

    Attributes:
        task: its name.
        metric: its name.
        arm: its name.
        n: examples that counted.
        value: of the metric.
        low: lower end of its 95 % interval.
        high: its upper end.
        against: the arm that is subtracted; "" where nothing can be paired.
        difference: this arm's value minus the other's, over examples that count for both; None without a pair.
        difference_low: lower end of the difference's 95 % interval, from a paired bootstrap.
        difference_high: its upper end.
        seed: of the rows and both bootstraps.
    """

    task: str
    metric: str
    arm: str
    n: int
    value: float
    low: float
    high: float
    against: str
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    seed: int


@dataclass(frozen=True)
class MetricTable:
    """The lines of one metric on one task, and the sentences of their caption."""

    lines: tuple[ArmLine, ...]
    caption: tuple[str, ...]


def write_tables(study: Study, output: Path, against: str | None = None) -> list[Path]:
    """Write `table.md`, `table.csv` and `table.tex` of all results to a folder; return their paths.

    Args:
        study: results; without any, nothing is written.
        output: is made where it does not exist.
        against: the arm that others are compared with; None = the first that was measured.

    Raises:
        OptionError: no result is of the arm `against`.
    """
    if not study.results:
        return []
    tables = result_tables(study, against)
    make_folder(output)
    for ending, form in FORMATS.items():
        write_text(output / f"table.{ending}", form(tables))
    return [output / f"table.{ending}" for ending in FORMATS]


def check_against(against: str | None, arms: Sequence[str]) -> None:
    """Raise an OptionError if there is no such arm to compare with; None is the first."""
    if against is not None and against not in arms:
        raise OptionError(f"--against: {unknown_name('arm', against, arms)}")


def result_tables(study: Study, against: str | None = None) -> list[MetricTable]:
    """Return one table for each task and metric, in the order in which they were measured."""
    arms = list(dict.fromkeys(result.arm for result in study.results))
    check_against(against, arms)
    values = {cell: _values(study, *cell) for cell in dict.fromkeys((each.arm, each.task) for each in study.results)}
    tables: list[MetricTable] = []
    for task, metric in sorted({(each.task, each.metric): None for each in study.results}, key=_order(study)):
        results = study.get(task, metric)
        other = next((each for each in results if each.arm == (against or arms[0])), None)
        lines = tuple(_line(each, other, values) for each in results)
        tables.append(MetricTable(lines, _caption(results, other, against or arms[0])))
    return tables


def _order(study: Study) -> Callable[[tuple[str, str]], int]:
    """Return a sorting key that keeps the metrics of a task together."""
    return lambda pair: study.tasks.index(pair[0])


def _values(study: Study, arm: str, task: str) -> dict[str, list[Fraction]]:
    """Return the fractions of every metric of a cell, one an example."""
    rows = read_cell(study.folders[arm, task], arm, task)
    return {
        metric: [(row["values"][metric][0], row["values"][metric][1]) for row in rows] for metric in rows[0]["values"]
    }


def _line(
    result: EvalResult, other: EvalResult | None, values: dict[tuple[str, str], dict[str, list[Fraction]]]
) -> ArmLine:
    against, (gain, low, high) = "", (None, None, None)
    if other is not None and other.arm != result.arm and other.rows == result.rows:
        ours, theirs = (values[each.arm, each.task][each.metric] for each in (result, other))
        against, (gain, low, high) = other.arm, difference(ours, theirs, result.seed)
    return ArmLine(
        task=result.task,
        metric=result.metric,
        arm=result.arm,
        n=result.n,
        value=result.value,
        low=result.low,
        high=result.high,
        against=against,
        difference=gain,
        difference_low=low,
        difference_high=high,
        seed=result.seed,
    )


def direction(metric: str) -> str:
    """Return "lower is better" of likelihoods in nats, else "higher is better"."""
    return "lower is better" if metric.startswith("nll") else "higher is better"


def unit(metric: str) -> str:
    """Return the unit of a metric: nats per token, or a share from 0 to 1."""
    return "nats per token" if metric.startswith("nll") else "0 to 1"


def sizes(counts: Sequence[int]) -> str:
    """Return counts of examples as "30", or "12 to 30" where they differ."""
    return " to ".join(map(str, sorted({min(counts, default=0), max(counts, default=0)})))


def _caption(results: Sequence[EvalResult], other: EvalResult | None, against: str) -> tuple[str, ...]:
    first = results[0]
    source = Path(first.source).name if Path(first.source).is_absolute() else first.source
    counts = sizes([each.n for each in results])
    versions = [first.versions[key] for key in ("base", "dtype", "device") if key in first.versions]
    return (
        f"{first.task}: {first.metric} ({unit(first.metric)}; {direction(first.metric)}), n = {counts}.",
        f"Rows: {source}, seed {first.seed}.",
        f"95 % interval: percentile bootstrap over the examples, {NUM_RESAMPLES} resamples.",
        *_of_pairs(results, other, against),
        *([f"Base: {', '.join(versions)}."] if versions else []),
    )


def _of_pairs(results: Sequence[EvalResult], other: EvalResult | None, against: str) -> list[str]:
    """Say how differences were computed, and why some are missing."""
    if other is None:
        return [f"No differences: {against} was not measured here."]
    unpaired = [each.arm for each in results if each.rows != other.rows]
    said = f"Difference: the arm minus {against} on the same examples, 95 % interval of a paired bootstrap."
    return [said, *([f"Measured on other rows than {against}: {', '.join(unpaired)}."] if unpaired else [])]


# Formats


def _csv(tables: Sequence[MetricTable]) -> str:
    """All lines of all tables, with every digit; captions are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([each.name for each in fields(ArmLine)])
    writer.writerows(astuple(line) for table in tables for line in table.lines)
    return text.getvalue()


def _cells(line: ArmLine) -> list[str]:
    """Return the texts of a line but for its arm: n, value, interval, difference, interval; "" = none."""
    ends = (line.low, line.high), (line.difference_low, line.difference_high)
    intervals = [f"[{_number(low)}, {_number(high)}]" if _number(low) else "" for low, high in ends]
    return [str(line.n), _number(line.value), intervals[0], _number(line.difference), intervals[1]]


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _header(table: MetricTable) -> list[str]:
    against = next((line.against for line in table.lines if line.against), "")
    return [
        "arm",
        "n",
        table.lines[0].metric,
        "95 % interval",
        *([f"minus {against}", "95 % interval"] if against else []),
    ]


def _markdown(tables: Sequence[MetricTable]) -> str:
    parts: list[str] = []
    for table in tables:
        header = [_plain(name).translate(MARKDOWN_ESCAPES) for name in _header(table)]
        rows = [
            [_plain(line.arm).translate(MARKDOWN_ESCAPES), *(cell or "-" for cell in _cells(line))][: len(header)]
            for line in table.lines
        ]
        marks = ["---", *["---:"] * (len(header) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (header, marks, *rows)]
        parts.append("\n".join([_plain(" ".join(table.caption)).translate(MARKDOWN_ESCAPES), "", *lines]) + "\n")
    return "\n".join(parts)


def _latex(tables: Sequence[MetricTable]) -> str:
    r"""Tables for `\input`; they need the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}\n"]
    for table in tables:
        header = [_plain(name).translate(TEX_ESCAPES) for name in _header(table)]
        rows = [
            [_plain(line.arm).translate(TEX_ESCAPES), *(f"${cell}$" if cell else "--" for cell in _cells(line))]
            for line in table.lines
        ]
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{table.lines[0].task}-{table.lines[0].metric}")
        parts.append("\n".join([
            r"\begin{table}", r"\centering",
            rf"\caption{{{_plain(' '.join(table.caption)).translate(TEX_ESCAPES)}}}", rf"\label{{tab:{name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", f"{' & '.join(header)} \\\\", r"\midrule",
            *(f"{' & '.join(row[: len(header)])} \\\\" for row in rows),
            r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]) + "\n")  # fmt: skip
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


FORMATS: dict[str, Callable[[Sequence[MetricTable]], str]] = {"md": _markdown, "csv": _csv, "tex": _latex}
