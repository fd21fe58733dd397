"""Arms are names for options, whatever the bundle's default; a sweep is a file of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams
from treadle.experiments.arms import Arm, choose_arms, expand, read_arms, read_sweep, standard_arms
from treadle.experiments.params import EvalParams

NAMES = ("math", "code")
DEFAULT = RoutingParams(temperature=1.5, top_k=3, every=5, window=48)
FIXED = [RoutingParams.base(), RoutingParams(rule="fixed", fixed={"math": 2}, every=4, past="recompute")]
ONCE_OR_NOT = [RoutingParams(past=past, every=every) for past in ("keep", "recompute") for every in (2, None)]
OTHERS = [
    RoutingParams(lag=1),
    RoutingParams(prefill="causal"),
    RoutingParams(combine="linear"),
    RoutingParams(score="cosine", rule="top_k"),
]
RANKED = RoutingParams(score="cosine", rule="top_k")
DEFAULTS = [DEFAULT, RoutingParams.paper(), *FIXED, *ONCE_OR_NOT, *OTHERS, RANKED]
BOOSTED = {"score": "cosine", "rule": "boosted", "temperature": None, "window": None}
CHANGES = {  # what each arm varies of DEFAULT
    "routed": {},
    "nearest": {"rule": "top_k", "top_k": 1},
    "prompt": {"every": None},
    **{f"every-{every}": {"every": every} for every in (1, 2, 3, 4, 6, 8, 16)},
    **{f"window-{window}": {"window": window} for window in (16, 32, 64, 128)},
    "linear": {"combine": "linear"},
    "paper-combine": {"combine": "paper"},
    **{score: {"score": score, "temperature": None} for score in ("cosine", "centred", "lda")},
    "causal": {"prefill": "causal"},
    "recompute": {"past": "recompute"},
    **{f"boost-{boost}": {**BOOSTED, "boost": boost} for boost in (1, 2, 3, 4, 5, 6, 8)},
}
ALONE = {  # arms that do not depend on the default
    "base": RoutingParams.base(),
    "math": RoutingParams.one("math"),
    "code": RoutingParams.one("code"),
    "adapter:math": RoutingParams.one("math"),
    "adapter:code": RoutingParams.one("code"),
    "oracle": None,
    "uniform": RoutingParams(rule="fixed", fixed={"math": 0.5, "code": 0.5}, every=None),
    "paper": RoutingParams.paper(),
}


def write(file: Path, text: str) -> Path:
    file.write_text(text, "utf-8", "surrogateescape")
    return file


@pytest.mark.parametrize("name", CHANGES)
def test_a_standard_arm_keeps_all_of_the_default_but_what_its_name_says(name):
    assert standard_arms(NAMES, DEFAULT)[name] == Arm(name, replace(DEFAULT, **CHANGES[name]))


@pytest.mark.parametrize("default", DEFAULTS)
def test_standard_arms_exist_for_every_default(default):
    arms = standard_arms(NAMES, default)
    assert [arm.name for arm in arms.values()] == list(arms)
    params = {name: arm.params for name, arm in arms.items()}
    assert set(params) == {*CHANGES, *ALONE}
    assert {name: params[name] for name in ALONE} == ALONE
    assert params["routed"] is default
    assert all(params[name].rule != "fixed" for name in set(CHANGES) - {"routed"})
    assert (params["prompt"].every, params["prompt"].prefill) == (None, "prompt")
    assert (params["causal"].prefill, params["recompute"].past) == ("causal", "recompute")
    assert params["causal"].every == params["recompute"].every == (default.every or 2)


def test_an_adapter_called_like_an_arm_has_a_name_of_its_own():
    arms = standard_arms(("prompt", "base"), DEFAULT)
    assert arms["prompt"].params == replace(DEFAULT, every=None)
    assert arms["base"].params == RoutingParams.base()
    assert arms["adapter:prompt"].params == RoutingParams.one("prompt")


def test_the_oracle_gives_each_task_its_own_adapter():
    arms = standard_arms(NAMES, DEFAULT)
    assert arms["oracle"].params_for("code") == arms["code"].params
    assert arms["nearest"].params_for("code") == arms["nearest"].params_for("") == arms["nearest"].params
    with pytest.raises(OptionError, match="oracle needs tasks that have an adapter"):
        arms["oracle"].params_for("")


# Files of arms

BAD_TABLES = """
[arms]
one = {evry = 2}
six = {bundle = 5}
seven = {bundle = ""}
two = {prefill = "causal", every = "none"}
three = {every = 3}
[grid]
four = {top_k = [1, 0]}
five = {window = []}
eight = {}
"""
TABLE_PROBLEMS = (
    "one: unknown option 'evry'. Did you mean 'every'?",
    "six: bundle: got 5; name a folder",
    "seven: bundle: got ''; name a folder",
    "eight: a grid needs an option with a list",
    "two: routing options:",
    "prefill causal decides in blocks",
    "four/top_k=0: routing options:",
    "five: an empty list leaves no combination",
)


@pytest.mark.parametrize(
    ("grid", "labels"),
    [
        ({"every": [1, "none"]}, ["every=1", "every=none"]),
        ({"every": [1, 2], "window": [3, 4]}, [f"every={e} window={w}" for e in (1, 2) for w in (3, 4)]),
        ({"every": [1], "window": 64}, ["every=1 window=64"]),
        ({"every": [1, 2], "window": []}, []),
    ],
)
def test_a_grid_is_all_combinations_labelled_by_what_varies(grid, labels):
    rows = expand(grid)
    assert list(rows) == labels
    assert all(row[key] == value or row[key] in value for row in rows.values() for key, value in grid.items())
    assert len({tuple(row.values()) for row in rows.values()}) == len(labels)


def test_a_file_of_arms_lies_over_the_default(tmp_path):
    text = """
        [arms]
        mine = {fixed = {math = 0.5, code = 0.25}}
        same = {}
        [grid.some]
        every = [1, "none"]
        score = ["cosine", "lda"]
    """
    assert {arm.name: arm.params for arm in read_arms(write(tmp_path / "arms.toml", text), DEFAULT)} == {
        "mine": replace(DEFAULT, rule="fixed", fixed={"math": 0.5, "code": 0.25}),
        "same": DEFAULT,
        **{f"some/every=1 score={score}": replace(DEFAULT, every=1, score=score) for score in ("cosine", "lda")},
        **{f"some/every=none score={score}": replace(DEFAULT, every=None, score=score) for score in ("cosine", "lda")},
    }


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("[arm]" + BAD_TABLES, ("unknown table 'arm'. Did you mean 'arms'?", *TABLE_PROBLEMS)),
        ("", ("it names no arm: write a table [arms.NAME]",)),
        ("arms = {every = 2}\ngrid = 3", ("write [arms.NAME] and the", "write [grid.NAME] and the")),
        ("[arms.one", ("cannot be read",)),
        ("\udcff", ("cannot be read",)),
    ],
)
def test_all_problems_of_a_file_of_arms_are_in_one_message(tmp_path, text, problems):
    file = write(tmp_path / "arms.toml", text)
    with pytest.raises(OptionError) as caught:
        read_arms(file, DEFAULT)
    assert [str(caught.value).count(problem) for problem in (str(file), *problems)] == [1] * (len(problems) + 1)
    assert not any(possible in str(caught.value) for possible in ("three", "top_k=1"))


def test_arms_are_chosen_by_name_and_from_files_each_once(tmp_path):
    file = str(write(tmp_path / "arms.toml", "[arms.mine]\nevery = 7"))
    standard = standard_arms(NAMES, DEFAULT)
    expected = [standard["oracle"], Arm("mine", replace(DEFAULT, every=7)), standard["code"]]
    assert choose_arms(["oracle", file, "code", "oracle", file], NAMES, DEFAULT) == expected


def test_an_arm_may_be_routed_by_another_bundle(tmp_path):
    text = """
        [arms.mine]
        every = 7
        bundle = "some/where"
        [grid.both]
        bundle = ["else", "more"]
    """
    file = str(write(tmp_path / "arms.toml", text))
    assert choose_arms(["prompt@else/where", file, "prompt"], NAMES, DEFAULT) == [
        Arm("prompt@else/where", replace(DEFAULT, every=None), "else/where"),
        Arm("mine", replace(DEFAULT, every=7), "some/where"),
        Arm("both/bundle=else", DEFAULT, "else"),
        Arm("both/bundle=more", DEFAULT, "more"),
        Arm("prompt", replace(DEFAULT, every=None)),
    ]
    with pytest.raises(OptionError) as caught:
        choose_arms(["promt@here", "prompt@"], NAMES, DEFAULT)
    for problem in ("unknown arm 'promt'. Did you mean 'prompt'?", "prompt@ names no bundle: write prompt@FOLDER"):
        assert str(caught.value).count(problem) == 1, problem


def test_all_arms_that_cannot_be_chosen_are_in_one_message(tmp_path):
    bad, base = write(tmp_path / "bad.toml", BAD_TABLES), write(tmp_path / "b.toml", "[arms.base]\nevery = 7")
    known = ("unknown arm 'nearst'. Did you mean 'nearest'?", "missing.toml cannot be read", "unknown arm 'science'")
    with pytest.raises(OptionError) as caught:
        choose_arms(["nearst", "base", str(base), str(bad), "missing.toml", "science"], NAMES, DEFAULT)
    for problem in (*known, "two arms are called 'base'", *TABLE_PROBLEMS):
        assert str(caught.value).count(problem) == 1, problem


# Sweeps


def test_a_sweep_is_tasks_and_arms_and_options(tmp_path):
    head = 'tasks = ["math=rows.jsonl", "stream"]\nalso = ["oracle", "base"]\nlimit = 7\ngenerate = false\n'
    file = write(tmp_path / "sweep.toml", head + "[arms.mine]\nevery = 7\n[grid.some]\nevery = [1, 2]")
    sweep = read_sweep(file, NAMES, DEFAULT)
    assert sweep.tasks == ("math=rows.jsonl", "stream")
    assert [arm.name for arm in sweep.arms] == ["oracle", "base", "mine", "some/every=1", "some/every=2"]
    assert [arm.params for arm in sweep.arms[2:]] == [replace(DEFAULT, every=every) for every in (7, 1, 2)]
    assert sweep.params == EvalParams(limit=7, generate=False)


@pytest.mark.parametrize(
    ("head", "problems"),
    [
        ('task = ["math"]', ("unknown key 'task'. Did you mean 'tasks'?", "tasks names no task")),
        ("tasks = 5\nalso = [1]", ("tasks must be a list of texts", "also must be a list of texts")),
        ('tasks = ["math"]\nlimit = 0', ("limit must be a whole number of at least 1, not 0",)),
        ('tasks = []\nlimit = "x"', ("tasks names no task", "limit must be a whole number of at least 1, not 'x'")),
        ('tasks = ["math"]\nalso = ["bas"]', ("unknown arm 'bas'. Did you mean 'base'?",)),
    ],
)
def test_all_problems_of_a_sweep_are_in_one_message(tmp_path, head, problems):
    file = write(tmp_path / "sweep.toml", head + BAD_TABLES)
    with pytest.raises(OptionError) as caught:
        read_sweep(file, NAMES, DEFAULT)
    for problem in (f"sweep {file}:", *problems, *TABLE_PROBLEMS):
        assert str(caught.value).count(problem) == 1, problem


def test_a_sweep_has_no_two_arms_of_one_name_as_results_are_kept_by_name(tmp_path):
    file = write(tmp_path / "sweep.toml", 'tasks = ["math"]\nalso = ["base"]\n[arms.base]\nevery = 7')
    with pytest.raises(OptionError, match="two arms are called 'base'"):
        read_sweep(file, NAMES, DEFAULT)


def test_a_sweep_of_standard_arms_needs_no_table_but_one_of_no_arm_is_refused(tmp_path):
    file = write(tmp_path / "sweep.toml", 'tasks = ["math"]\nalso = ["base", "oracle"]')
    assert [arm.name for arm in read_sweep(file, NAMES, DEFAULT).arms] == ["base", "oracle"]
    with pytest.raises(OptionError, match="it names no arm"):
        read_sweep(write(file, 'tasks = ["math"]'), NAMES, DEFAULT)
