"""Tables of results: the same numbers in Markdown, CSV and LaTeX, and those are the ones of the results' files."""

import csv
import json
import re
from pathlib import Path

import pytest

from treadle.common.errors import OptionError
from treadle.experiments.results import EvalResult, difference, fractions_of, interval, write_cell, write_results
from treadle.experiments.study import Study
from treadle.experiments.tables import write_tables

from conftest import Run

NAMES = ("base", "every_4", "50%|x&y#1")


def write_arm(folder: Path, arm: str, points: list[float], *, task: str = "my_task", rows: str = "r") -> None:
    values = {"nll": [[point * 3, 3.0] for point in points], "exact_match": [[point > 1, 1.0] for point in points]}
    write_cell(folder, arm, task, [
        {"index": index, "values": {metric: [float(n), d] for metric, each in values.items() for n, d in [each[index]]}}
        for index in range(len(points))
    ])  # fmt: skip
    results = []
    for metric in values:
        value, low, high = interval(fractions_of(folder, arm, task, metric), 0)
        versions = {"base": "a_base", "dtype": "float32"}
        results.append(
            EvalResult(
                arm, task, metric, value, low, high, len(points), None, "rows_1.jsonl", 1.0, 0, 0.0, 0, versions, rows
            )
        )
    write_results(folder, results, append=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "results"
    made.mkdir()
    for shift, arm in enumerate(NAMES):
        write_arm(made, arm, [0.5 + shift / 4, 1.5, 2.25 - shift, 3.0])
    return made


def read_tables(files: list[Path]) -> dict[str, list[list[str]]]:
    """Return the lines of each format as texts: arm, n, value, interval, difference, its interval."""
    markdown, table, latex = (file.read_text("utf-8") for file in files)
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("| ")]
    marked = [[cell.strip() for cell in line] for line in lines if line[1].strip() not in ("n", "---:")]
    rows = [line.removesuffix(r" \\").split(" & ") for line in latex.splitlines() if line.endswith(r"\\")]
    set_ = [[cell.strip("$") if cell != "--" else "-" for cell in row] for row in rows if row[1] != "n"]

    def ends(line: dict[str, str], name: str) -> str:
        low, high = (line[f"{name}low"], line[f"{name}high"])
        return f"[{float(low):.3f}, {float(high):.3f}]" if low else "-"

    plain = [
        [line["arm"], line["n"], f"{float(line['value']):.3f}", ends(line, ""),
         f"{float(line['difference']):.3f}" if line["difference"] else "-", ends(line, "difference_")]
        for line in csv.DictReader(table.splitlines())
    ]  # fmt: skip
    return {"md": marked, "csv": plain, "tex": set_}


def test_three_formats_hold_the_numbers_of_the_files(folder: Path) -> None:
    found = read_tables(write_tables(Study.read([folder]), folder))
    results = Study.read([folder]).results
    expected = []
    for metric in ("nll", "exact_match"):
        base = fractions_of(folder, "base", "my_task", metric)
        for result in [each for each in results if each.metric == metric]:
            row = [result.arm, "4", f"{result.value:.3f}", f"[{result.low:.3f}, {result.high:.3f}]", "-", "-"]
            if result.arm != "base":
                value, low, high = difference(fractions_of(folder, result.arm, "my_task", metric), base, 0)
                row[4:] = [f"{value:.3f}", f"[{low:.3f}, {high:.3f}]"]
            expected.append(row)
    assert found["csv"] == expected
    assert [row[1:] for row in found["md"]] == [row[1:] for row in found["tex"]] == [row[1:] for row in expected]
    assert [row[0] for row in found["md"]] == ["base", "every_4", r"50%\|x&y#1"] * 2
    assert [row[0] for row in found["tex"]] == ["base", r"every\_4", r"50\%|x\&y\#1"] * 2


def test_captions_say_metric_direction_size_seed_test_and_arm(folder: Path) -> None:
    markdown, _, latex = (file.read_text("utf-8") for file in write_tables(Study.read([folder]), folder, "every_4"))
    for text in (
        "my_task: nll (nats per token; lower is better), n = 4.",
        "higher is better",
        "seed 0",
        "95 % interval: percentile bootstrap",
        "minus every_4 on the same examples",
        "of a paired bootstrap",
    ):
        assert text in markdown
        assert text.replace("_", r"\_").replace("%", r"\%") in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\end{table}") == 2


def test_other_rows_are_not_paired_and_the_caption_says_so(folder: Path) -> None:
    write_arm(folder, "late", [1.0, 2.0], rows="others")
    write_arm(folder, "late", [1.0, 2.0], task="alone")
    markdown = write_tables(Study.read([folder]), folder)[0].read_text("utf-8")
    assert "Measured on other rows than base: late." in markdown
    assert "n = 2 to 4." in markdown
    assert "No differences: base was not measured here." in markdown
    assert re.search(r"\| late \| 2 \| 1.500 \| \[.*\] \| - \| - \|", markdown)


def test_an_unknown_arm_to_compare_with_is_named(folder: Path) -> None:
    with pytest.raises(OptionError, match="every_4"):
        write_tables(Study.read([folder]), folder, "every_5")


def test_eval_and_plot_write_the_same_tables(tmp_path: Path, bundle: Path, run: Run) -> None:
    rows = tmp_path / "math.jsonl"
    rows.write_text("".join(json.dumps({"question": f"add {i}", "answer": f"#### {i}"}) + "\n" for i in range(5)))
    asked = ("eval", bundle, "--tasks", f"math={rows}", "--arms", "base,oracle", "--limit", "3", "--no-generate", "-o",
             tmp_path / "out", "--against")  # fmt: skip
    code, _, err = run(*asked, "routed")
    assert (code, "--against" in err) == (1, True)
    assert not (tmp_path / "out").exists()
    code, out, err = run(*asked, "oracle")
    assert code == 0, err
    assert all(name in out for name in ("table.md", "table.csv", "table.tex"))
    code, out, err = run("plot", tmp_path / "out", "-o", tmp_path / "figures", "--against", "oracle", "--json")
    assert code == 0, err
    tables = [Path(file) for file in json.loads(out)["tables"]]
    assert [file.name for file in tables] == ["table.md", "table.csv", "table.tex"]
    for file in tables:
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
