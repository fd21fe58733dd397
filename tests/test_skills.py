"""Numbers of benchmarks/skills.py go into the repository, texts of data sets do not."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from treadle.engine.engine import Engine
from treadle.experiments.arms import choose_arms
from treadle.experiments.evaluate import evaluate
from treadle.experiments.params import EvalParams
from treadle.experiments.results import fractions_of, read_results
from treadle.experiments.sets import load_sets

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def skills() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return import_module("skills")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_what_is_kept_of_results_are_numbers_and_goes_on_as_results(
    skills: ModuleType, engine: Engine, tmp_path: Path
) -> None:
    rows = [{"question": f"add {i} plus {i}?", "answer": f"secret {i}\n#### {i}"} for i in range(8)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = EvalParams(limit=3, max_tokens=3)
    sets = load_sets([f"math={tmp_path / 'math.jsonl'}", f"science={science(tmp_path)}", "stream"], params)
    arms = choose_arms(["base", "routed"], engine.adapter_names, engine.router.params)
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    evaluate(engine, sets, arms, whole, params)
    skills.keep_numbers(whole, kept)
    assert "secret" in "".join(file.read_text() for file in whole.rglob("*.jsonl"))
    found = [json.loads(line) for file in kept.glob("cells/*/*.jsonl") for line in file.read_text().splitlines()]
    assert {key for row in found for key in row} == {"index", "values", "adapters"}
    assert read_results(kept) == read_results(whole)
    for arm in ("base", "routed"):
        assert fractions_of(kept, arm, "math", "nll") == fractions_of(whole, arm, "math", "nll")
    done: list[bool] = []
    evaluate(engine, sets, arms, kept, params, lambda name, count, was_done: done.append(was_done))
    assert done == [True] * 6


def science(folder: Path) -> Path:
    row = {"question": "atom?", "choices": {"text": ["cell", "heat"], "label": ["A", "B"]}, "answerKey": "A"}
    (folder / "science.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return folder / "science.jsonl"


def test_every_study_names_tasks_that_have_rows(skills: ModuleType) -> None:
    for study in skills.STUDIES.values():
        assert set(study.tasks) <= {*skills.FILES, "stream", "conversation"}
