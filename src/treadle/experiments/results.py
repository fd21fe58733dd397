"""Results of an evaluation: values with bootstrap intervals, and the files that hold them.

    results.jsonl            one EvalResult a line, appended as each cell (an arm on a task) is finished
    settings.json            what was asked, and what all of them are results of
    cells/TASK/ARM.jsonl     every example of a cell: its values, its generated text and the weights of each token

A metric of an example is a fraction (numerator, denominator); a cell's value is the sum of the first over the sum of
the second: nats over tokens for `nll`, points over examples for the others.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import numpy as np

from treadle.common.documents import MOST_BYTES, open_file, parse_json, read_object, read_text
from treadle.common.errors import DataError, OptionError
from treadle.common.writing import append_text, write_text

if TYPE_CHECKING:
    from treadle.experiments.timing import Table

NUM_RESAMPLES = 2000
"""Bootstrap samples of an interval."""
MAX_NAME_CHARACTERS = 200
"""Characters of a file's name, but for its ending."""
Fraction = tuple[float, float]
TEXT_FIELDS = ("arm", "task", "metric", "source", "rows")
NUMBER_FIELDS = ("value", "low", "high", "seconds", "tokens_per_second")
INTEGER_FIELDS = ("n", "tokens", "seed")
"""Fields of a result by their type."""
BENCH_PREFIX = "bench-"
TABLE_KEYS = {"suite", "title", "lines"}
LINE_KEYS = {"arm", "setting", "seconds", "low", "high", "ratio"}
RESULTS_FILE, SETTINGS_FILE, CELLS_FOLDER = "results.jsonl", "settings.json", "cells"


@dataclass(frozen=True)
class EvalResult:
    """One metric of one arm on one task.

    Attributes:
        arm: its name.
        task: its name.
        metric: `nll` (nats per token of the reference), `option` (accuracy by likelihood), or one of
            `treadle.experiments.metrics`; of streams `nll` over all answers, and `nll-1`, `nll-2` ... of the first,
            second ... answer.
        value: the cell's value.
        low: lower end of the 95 % bootstrap interval over examples.
        high: its upper end.
        n: examples that counted.
        routing: the arm's RoutingParams; null = the oracle.
        source: where the rows are from.
        seconds: the whole cell took.
        tokens: generated in the cell.
        tokens_per_second: of its generation; 0 where nothing was generated.
        seed: of the rows, the shots and the bootstrap.
        versions: of treadle, torch, transformers and Python; the bundle's base, its embedder, a fingerprint of its
            adapters and centroids; dtype and device of the model.
        rows: a digest of the rows as they were asked; each of them is in the cell's file.
    """

    arm: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    routing: Mapping[str, Any] | None
    source: str
    seconds: float
    tokens: int
    tokens_per_second: float
    seed: int
    versions: Mapping[str, str]
    rows: str = ""


# Values with intervals


def interval(fractions: Sequence[Fraction], seed: int) -> tuple[float, float, float]:
    """Return (value, low, high) of a sum of fractions: the 95 % percentile bootstrap over examples."""
    parts = np.array(fractions, np.float64).reshape(-1, 2)  # (n, 2)
    parts = parts[parts[:, 1] > 0]
    if not len(parts):
        return float("nan"), float("nan"), float("nan")
    sums = parts[np.random.default_rng(seed).integers(len(parts), size=(NUM_RESAMPLES, len(parts)))].sum(1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    points, count = parts.sum(0)  # added up in the order of the samples: equal values give an interval of no width
    return float(points / count), float(low), float(high)


def difference(ours: Sequence[Fraction], theirs: Sequence[Fraction], seed: int) -> tuple[float, float, float]:
    """Return (value, low, high) of ours - theirs on the same examples: a paired 95 % bootstrap."""
    a, b = np.array(ours, np.float64).reshape(-1, 2), np.array(theirs, np.float64).reshape(-1, 2)
    if a.shape != b.shape:
        raise OptionError(f"a paired difference needs the same examples; got {len(a)} and {len(b)}")
    keep = (a[:, 1] > 0) & (b[:, 1] > 0)
    a, b = a[keep], b[keep]
    if not len(a):
        return float("nan"), float("nan"), float("nan")
    chosen = np.random.default_rng(seed).integers(len(a), size=(NUM_RESAMPLES, len(a)))
    means = [parts[chosen].sum(1) for parts in (a, b)]  # (NUM_RESAMPLES, 2) each
    low, high = np.percentile(means[0][:, 0] / means[0][:, 1] - means[1][:, 0] / means[1][:, 1], [2.5, 97.5])
    sums = a.sum(0), b.sum(0)
    return float(sums[0][0] / sums[0][1] - sums[1][0] / sums[1][1]), float(low), float(high)


# Files


def read_settings(output: Path) -> dict[str, Any]:
    """Return the settings of a folder of results; raise a DataError if they cannot be read."""
    return read_object(output / SETTINGS_FILE, DataError, strict=False)


def read_results(output: Path) -> list[EvalResult]:
    """Return the results of a folder, without cells and lines that a kill cut short.

    Raises:
        DataError: the file holds something else.
    """
    file = output / RESULTS_FILE
    if not os.path.lexists(file):
        return []
    with open_file(file, DataError, MOST_BYTES) as opened:
        text = opened.read().decode("utf-8", "replace")
    results: list[EvalResult] = []
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # the last line, while it was being written
        try:
            results.append(_result_of(parse_json(line, strict=False)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: not a result: {line[:60]!r} ({error})") from error
    metrics: dict[tuple[str, str], set[str]] = {}
    for result in results:
        metrics.setdefault((result.arm, result.task), set()).add(result.metric)
    whole = {(arm, task) for (arm, task), found in metrics.items() if found == _metrics_of(output, arm, task)}
    return [result for result in results if (result.arm, result.task) in whole]


def keep_whole(output: Path) -> list[EvalResult]:
    """Return the results of a folder, whose file then holds nothing else: a kill may have cut a cell short."""
    results = read_results(output)
    file = output / RESULTS_FILE
    if file.exists() and file.read_text("utf-8", "replace") != _lines(results):
        write_results(output, results, append=False)
    return results


def _result_of(document: Any) -> EvalResult:
    """Return a line as a result; a TypeError or ValueError where it is none."""
    result = EvalResult(**document)
    wrong = [name for name in TEXT_FIELDS if not isinstance(getattr(result, name), str)]
    wrong += [name for name in NUMBER_FIELDS if not is_number(getattr(result, name))]
    wrong += [name for name in INTEGER_FIELDS if type(getattr(result, name)) is not int]
    wrong += [name for name in ("routing", "versions") if not isinstance(getattr(result, name) or {}, dict)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} of another type")
    return result


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number; true and false are not."""
    return type(value) in (int, float)


def write_results(output: Path, results: Sequence[EvalResult], *, append: bool) -> None:
    """Write results to a folder's file, after those that are there or instead of them."""
    (append_text if append else write_text)(output / RESULTS_FILE, _lines(results))


def _lines(results: Sequence[EvalResult]) -> str:
    return "".join(json.dumps(asdict(result)) + "\n" for result in results)


def write_cell(output: Path, arm: str, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all examples of a cell at once, so that a file is always complete."""
    write_text(_cell_file(output, arm, task), "".join(json.dumps(row) + "\n" for row in rows))


def read_cell(output: Path, arm: str, task: str) -> list[dict[str, Any]]:
    """Return the examples of a finished cell: `index`, `values` {metric: [numerator, denominator]}, text, weights."""
    file = _cell_file(output, arm, task)
    if not os.path.lexists(file):
        raise DataError(f"{file}: no such cell")
    text = read_text(file, DataError, MOST_BYTES)
    try:
        rows = [parse_json(line, strict=False) for line in text.splitlines()]
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}; remove it, and its cell is measured again") from error
    if not rows or not all(_is_example(row) and row["values"].keys() == rows[0]["values"].keys() for row in rows):
        raise DataError(f"{file} holds no examples; remove it, and its cell is measured again")
    return rows


def _is_example(row: Any) -> bool:
    """Return whether a line of a cell holds fractions."""
    values = cast(dict[str, Any], row).get("values") if isinstance(row, dict) else None
    if not isinstance(values, dict):
        return False
    fractions = cast(dict[str, Any], values).values()
    return all(isinstance(each, list) and len(each) == 2 and all(map(is_number, each)) for each in fractions)


def fractions_of(output: Path, arm: str, task: str, metric: str) -> list[Fraction]:
    """Return the fractions of one metric of a finished cell, one an example."""
    rows = read_cell(output, arm, task)
    if metric not in rows[0]["values"]:
        raise OptionError(f"{arm} on {task} has no metric {metric!r}, only {', '.join(rows[0]['values'])}")
    return [cast(Fraction, tuple(row["values"][metric])) for row in rows]


def _metrics_of(output: Path, arm: str, task: str) -> set[str]:
    """Return the metrics that apply to some example of a cell; none where there is no cell."""
    if not os.path.lexists(_cell_file(output, arm, task)):
        return set()
    rows = read_cell(output, arm, task)
    return {name for name in rows[0]["values"] if any(row["values"][name][1] > 0 for row in rows)}


def _cell_file(output: Path, arm: str, task: str) -> Path:
    return output / CELLS_FOLDER / _file_name(task, safe="") / f"{_file_name(arm, safe=' =')}.jsonl"


def _file_name(name: str, safe: str) -> str:
    """Return a safe file name: a long one keeps its beginning and a digest."""
    quoted = quote(name, safe=safe, errors="surrogatepass")
    if not quoted.strip("."):  # "." and ".." are other folders
        quoted = quoted.replace(".", "%2E") or "%"
    if len(quoted) <= MAX_NAME_CHARACTERS:
        return quoted
    return f"{quoted[: MAX_NAME_CHARACTERS - 17]}-{hashlib.sha256(quoted.encode()).hexdigest()[:16]}"


# Files of `treadle bench`


def write_bench(folder: Path, suites: Sequence[str], facts: Mapping[str, Any], tables: Sequence["Table"]) -> Path:
    """Write the tables of one run to a file named by suites, dtype and batches.

    Args:
        folder: an existing folder.
        suites: names of the measured suites.
        facts: where and how it was measured, with `dtype` and `batch`.
        tables: so far.
    """
    batches = "-".join(map(str, facts["batch"]))
    file = folder / f"{BENCH_PREFIX}{'-'.join(suites)}-{facts['dtype']}-batch-{batches}.json"
    document = {**facts, "tables": [asdict(table) for table in tables]}
    write_text(file, json.dumps(document, indent=1) + "\n")
    return file


def read_benches(folder: Path) -> list[dict[str, Any]]:
    """Return the tables of all runs in a folder, in the order of the files' names."""
    tables: list[dict[str, Any]] = []
    for file in sorted(folder.glob(f"{BENCH_PREFIX}*.json")):
        found = read_object(file, DataError, strict=False).get("tables")
        each = cast(list[Any], found if isinstance(found, list) else [None])
        if not all(isinstance(table, dict) and table.keys() >= TABLE_KEYS and _has_lines(table) for table in each):
            raise DataError(f"{file} is not what treadle bench -o writes")
        tables += each
    return tables


def _has_lines(table: Mapping[str, Any]) -> bool:
    lines = table["lines"]
    return isinstance(lines, list) and all(isinstance(line, dict) and _is_line(line) for line in lines)


def _is_line(line: Mapping[str, Any]) -> bool:
    """Return whether a line has its names, and a number or null for each value that is drawn."""
    texts, numbers = ("arm", "setting"), ("seconds", "low", "high", "ratio")
    return (
        line.keys() >= LINE_KEYS
        and all(isinstance(line[key], str) for key in texts)
        and all(line[key] is None or type(line[key]) in (int, float) for key in numbers)
    )
