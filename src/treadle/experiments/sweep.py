"""A sweep: arms x tasks in one TOML file, evaluated like any others and resumable like them.

tasks = ["math=gsm8k.jsonl.gz", "stream"]     as `treadle eval --tasks`
also = ["base", "oracle"]                     standard arms beside the grid
limit = 100                                   and any other option of `treadle eval`

[grid.frequency]                              arms: see `treadle.experiments.arms`
every = [1, 2, 4, "none"]
"""

from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

from treadle.common.errors import OptionError, collect, problem_list, unknown_name
from treadle.common.options import read_options
from treadle.common.params import EvalParams, RoutingParams
from treadle.experiments.arms import Arm, arms_of, choose_arms, distinct, read_toml


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for."""

    tasks: tuple[str, ...]
    only: tuple[str, ...]
    arms: tuple[Arm, ...]
    params: EvalParams


def read_sweep(file: Path, names: tuple[str, ...], default: RoutingParams) -> Sweep:
    """Return the sweep of a TOML file for adapters `names`, its arms over the params `default`.

    Raises:
        OptionError: lists everything that is wrong with the file.
    """
    document = read_toml(file)
    options = [entry.name for entry in fields(EvalParams)]
    allowed = ["tasks", "only", "also", *options, "arms", "grid"]
    problems = [unknown_name("key", key, allowed) for key in document if key not in allowed]
    for key in ("tasks", "only", "also"):
        listed = document.setdefault(key, [])
        if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
            problems.append(f"{key} must be a list of texts")
            document[key] = []
        elif key == "tasks" and not listed:
            problems.append("tasks names no task")
    given = {key: document[key] for key in options if key in document}
    params = collect(problems, [lambda: read_options(EvalParams, given)])
    steps = [lambda: choose_arms(document["also"], names, default)]
    if not document["also"] or {"arms", "grid"} & set(document):
        steps.append(lambda: arms_of(document, file, default))
    arms = distinct(list(chain.from_iterable(collect(problems, steps))), problems)
    if problems:
        raise OptionError(problem_list(f"sweep {file}:", problems))
    return Sweep(tuple(document["tasks"]), tuple(document["only"]), tuple(arms), params[0])
