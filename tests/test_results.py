"""Values with their intervals, and files from which only whole cells are read."""

import json
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killing import kills

from treadle.common.errors import DataError, OptionError
from treadle.experiments.results import (
    RESULTS_FILE,
    EvalResult,
    difference,
    fractions_of,
    interval,
    keep_whole,
    read_cell,
    read_results,
    write_cell,
    write_results,
)

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
counts = st.integers(1, 50).map(float)
examples = st.lists(st.tuples(st.floats(0, 100, width=32), counts), min_size=1, max_size=12)
ROUTING = {"every": 2, "fixed": None, "temperature": 1.5}
RESULT = EvalResult(
    "base", "math", "nll", 2.5, 2.0, 3.0, 2, ROUTING, "rows.jsonl", 1.5, 9, 6.0, 0, {"treadle": "0.1.0"}
)
ROWS = [
    {"index": 0, "values": {"nll": [1.0, 1.0], "f1": [0.5, 1.0]}},
    {"index": 1, "values": {"nll": [9.0, 3.0], "f1": [0.0, 0.0]}},
]


# Values with intervals


@given(fractions=examples, seed=st.integers(0, 9))
@quick
def test_an_interval_holds_its_value_which_is_a_ratio_of_sums(fractions, seed):
    value, low, high = interval(fractions, seed)
    assert value == pytest.approx(sum(n for n, _ in fractions) / sum(d for _, d in fractions))
    assert low <= value + 1e-9
    assert value <= high + 1e-9
    assert (value, low, high) == interval(fractions, seed)


@pytest.mark.parametrize(("value", "count"), list(product([0.1, 1 / 3, 0.7], [1, 9, 33, 100, 300])))
def test_equal_examples_have_an_interval_of_no_width(value, count):
    """Not even of one rounding error, as an error bar may not be negative."""
    middle, low, high = interval([(value, 1.0)] * count, 0)
    assert low == middle == high == pytest.approx(value)


def test_an_interval_is_that_of_the_normal_distribution_where_examples_are_many():
    value, low, high = interval([(0.0, 1.0), (1.0, 1.0)] * 200, 1)
    assert value == 0.5
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)
    assert interval([(0.0, 1.0), (1.0, 1.0)] * 200, 2) != (value, low, high)


@given(fractions=examples)
@quick
def test_an_example_that_does_not_count_changes_nothing(fractions):
    assert interval([(0.0, 0.0), *fractions, (0.0, 0.0)], 0) == interval(fractions, 0)


@pytest.mark.parametrize("nothing", [[], [(0.0, 0.0)]])
def test_nothing_has_no_value(nothing):
    for found in (interval(nothing, 0), difference(nothing, nothing, 0)):
        assert len(found) == 3
        assert all(number != number for number in found)  # noqa: PLR0124 only nan differs from itself


@given(fractions=examples, seed=st.integers(0, 9))
@quick
def test_an_arm_differs_from_itself_by_exactly_zero(fractions, seed):
    assert difference(fractions, list(fractions), seed) == (0.0, 0.0, 0.0)


@given(pairs=st.lists(st.tuples(st.floats(0, 9, width=32), st.floats(0, 9, width=32), counts), min_size=1, max_size=12))
@quick
def test_a_difference_is_that_of_the_values_and_turns_with_its_sides(pairs):
    ours, theirs = [(a, n) for a, _, n in pairs], [(b, n) for _, b, n in pairs]
    value, low, high = difference(ours, theirs, 3)
    assert value == pytest.approx(interval(ours, 3)[0] - interval(theirs, 3)[0], abs=1e-9)
    assert low <= value + 1e-9
    assert value <= high + 1e-9
    assert difference(theirs, ours, 3) == pytest.approx((-value, -high, -low), abs=1e-9)


def test_examples_are_paired_so_that_a_constant_gain_is_certain():
    theirs = [(float(index), 1.0) for index in range(30)]
    ours = [(points - 2, count) for points, count in theirs]
    assert difference(ours, theirs, 0) == pytest.approx((-2, -2, -2))


def test_an_example_that_one_side_lacks_is_left_out_of_both():
    ours, theirs = [(3.0, 1.0), (9.0, 1.0), (0.0, 0.0)], [(1.0, 1.0), (0.0, 0.0), (9.0, 1.0)]
    assert difference(ours, theirs, 0) == (2.0, 2.0, 2.0)


def test_a_difference_needs_the_same_examples():
    with pytest.raises(OptionError, match="needs the same examples; got 2 and 1"):
        difference([(1.0, 1.0)] * 2, [(1.0, 1.0)], 0)


# Files


def cell(folder, arm="base", task="math") -> list[EvalResult]:
    """Write a whole cell and return its results, which are not yet written."""
    write_cell(folder, arm, task, ROWS)
    return [replace(RESULT, arm=arm, task=task, metric=metric) for metric in ("nll", "f1")]


def test_results_come_back_in_the_order_they_were_appended(tmp_path):
    assert read_results(tmp_path) == []
    first, second = cell(tmp_path), [replace(each, routing=None) for each in cell(tmp_path, "oracle")]
    write_results(tmp_path, first, append=True)
    write_results(tmp_path, second, append=True)
    assert read_results(tmp_path) == first + second
    write_results(tmp_path, second, append=False)
    assert read_results(tmp_path) == second


@pytest.mark.parametrize("length", [1, 60, -1])
def test_a_line_that_a_kill_cut_short_is_left_out_with_its_cell(tmp_path, length):
    whole, cut = cell(tmp_path), cell(tmp_path, "oracle")
    write_results(tmp_path, whole, append=True)
    lines = "".join(json.dumps(asdict(result)) + "\n" for result in cut)
    with (tmp_path / RESULTS_FILE).open("a") as file:
        file.write(lines[: len(lines) // 2 + length] if length > 0 else lines[:length])
    assert read_results(tmp_path) == whole


@pytest.mark.parametrize("missing", ["nll", "f1"])
def test_a_cell_with_a_missing_metric_is_left_out(tmp_path, missing):
    whole, part = cell(tmp_path), [each for each in cell(tmp_path, task="code") if each.metric != missing]
    write_results(tmp_path, part + whole, append=True)
    assert read_results(tmp_path) == whole


def test_results_without_their_cell_are_left_out(tmp_path):
    whole = cell(tmp_path)
    write_results(tmp_path, [*whole, replace(RESULT, arm="oracle")], append=True)
    assert read_results(tmp_path) == whole


@pytest.mark.parametrize(
    "content", [b"{oops\n", b"[1, 2]\n", b"7\n", b'{"arm": "base"}\n', b"\xff\n", b"\n", b'{"colour": 1}\n']
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / RESULTS_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"results\.jsonl: not a result: "):
        read_results(tmp_path)


def test_every_name_has_a_cell_of_its_own_below_the_folder(tmp_path):
    names = ["base", "frequency/every=1 window=none", "frequency", "../up", "a b", "a%20b", "é", ".."]
    output = tmp_path / "inside" / "output"
    rows: dict[Any, list[dict[str, Any]]] = {
        key: [{"index": place, "values": {}}] for place, key in enumerate(product(names, names[:4]))
    }
    for (arm, task), content in rows.items():
        write_cell(output, arm, task, content)
    assert all(read_cell(output, arm, task) == content for (arm, task), content in rows.items())
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == len(rows)
    assert all(file.is_relative_to(output / "cells") for file in files)


def test_a_cell_gives_the_fractions_of_each_metric(tmp_path):
    cell(tmp_path)
    assert read_cell(tmp_path, "base", "math") == ROWS
    assert fractions_of(tmp_path, "base", "math", "nll") == [(1.0, 1.0), (9.0, 3.0)]
    assert interval(fractions_of(tmp_path, "base", "math", "nll"), 0)[0] == 2.5
    assert interval(fractions_of(tmp_path, "base", "math", "f1"), 0) == (0.5, 0.5, 0.5)
    with pytest.raises(OptionError, match="base on math has no metric 'chrf', only nll, f1"):
        fractions_of(tmp_path, "base", "math", "chrf")
    with pytest.raises(DataError, match="no such cell"):
        fractions_of(tmp_path, "oracle", "math", "nll")


@pytest.mark.parametrize(
    "name", ["..", ".", "...", "../../up", "/etc/passwd", "a\0b", "\ud800", "x" * 500, "é" * 300, ""]
)
def test_no_name_of_a_task_or_an_arm_leaves_the_folder_of_cells(tmp_path, name):
    for task, arm in ((name, "base"), ("math", name)):
        write_cell(tmp_path / "out", arm, task, ROWS)
        assert read_cell(tmp_path / "out", arm, task) == ROWS
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2
    assert all(file.parts[:2] == ("out", "cells") and len(file.parts) == 4 for file in files)


def test_a_killed_writer_leaves_whole_cells_and_a_file_that_is_added_to(tmp_path):
    first, second = cell(tmp_path), cell(tmp_path, "oracle")
    write_results(tmp_path, first, append=True)

    def write() -> None:
        write_cell(tmp_path, "oracle", "code", ROWS)
        write_results(tmp_path, second, append=True)

    for _ in kills(write):
        assert read_results(tmp_path) in (first, first + second)
        with (tmp_path / RESULTS_FILE).open("a") as file:
            file.write('{"arm": "half')
        kept = keep_whole(tmp_path)
        assert kept == read_results(tmp_path)
        assert (tmp_path / RESULTS_FILE).read_text().endswith("\n")
        write_results(tmp_path, first, append=False)
