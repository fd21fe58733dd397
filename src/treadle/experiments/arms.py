"""Arms of an experiment: names for RoutingParams, so that an arm is data and not code.

A file of arms is TOML. A table under `arms` names one arm; a table under `grid` stands for all combinations of its
lists. Values left out are the bundle's. `bundle` names another bundle of the same adapters, whose embedder and
centroids then route.

    [arms.mine]
    every = 4
    window = 64

    [grid.frequency]            # arms frequency/every=1, frequency/every=2 ...
    every = [1, 2, 4, "none"]

    [arms.sentence]             # the bundle's own routing on another embedder; as is `routed@other/bundle`
    bundle = "other/bundle"

A sweep is a TOML file that names tasks, too:

    tasks = ["math=gsm8k.jsonl.gz", "stream"]     # as `treadle eval --tasks`
    also = ["base", "oracle"]                     # standard arms beside the grid
    limit = 100                                   # and any other option of `treadle eval`
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any, cast

from treadle.bundle.bundle import read_bundle
from treadle.common.documents import check_depth, read_text
from treadle.common.errors import OptionError, TreadleError, collect, problem_list, shown, unknown_name
from treadle.common.options import read_options
from treadle.common.params import RoutingParams, read_routing
from treadle.experiments.params import EvalParams
from treadle.lora.adapter import Adapter
from treadle.routing.router import Router

EVERY_TOKENS = (1, 2, 3, 4, 6, 8, 16)
WINDOW_TOKENS = (16, 32, 64, 128)
MAX_ARMS = 10_000
"""The most combinations of a grid, because measuring more takes months."""
MAX_FILE_BYTES = 1 << 20
"""Bytes of a file of arms."""
BOOST_FACTORS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Arm:
    """One way to weigh the adapters.

    Attributes:
        name: keys its results.
        params: None is the oracle, which each task gives its own adapter.
        bundle: folder of a bundle of the same adapters, whose embedder and centroids route; "" = the evaluated one's.
    """

    name: str
    params: RoutingParams | None
    bundle: str = ""

    def params_for(self, adapter: str) -> RoutingParams:
        """Return the params on a task whose own adapter is `adapter`."""
        if self.params is not None:
            return self.params
        if not adapter:
            raise OptionError("the arm oracle needs tasks that have an adapter of their own")
        return RoutingParams.one(adapter)


def standard_arms(names: Sequence[str], default: RoutingParams) -> dict[str, Arm]:
    """Return the arms that have names of their own, for adapters `names` and a bundle's default params.

    `base`, each adapter, `oracle`, `uniform`, `routed` (the default), `nearest`, `prompt`, `every-K`, `window-N`,
    `linear`, `paper-combine`, `cosine`, `centred`, `lda`, `causal`, `recompute`, `boost-B`, and `paper`.
    Every adapter is `adapter:NAME` too; one whose name is in this list has only that name.
    """
    routed = replace(default, rule="softmax", score="lda", fixed=None) if default.rule == "fixed" else default
    cosine = replace(routed, score="cosine", rule="softmax", temperature=None)  # which is the score's own
    boosted = replace(cosine, rule="boosted", window=None)  # the paper looks at all of the text
    given: dict[str, RoutingParams | None] = {
        **{name: RoutingParams.one(name) for name in names},
        **{f"adapter:{name}": RoutingParams.one(name) for name in names},
        "base": RoutingParams.base(),
        "oracle": None,
        "uniform": RoutingParams.uniform(names),
        "routed": default,
        "nearest": replace(routed, rule="top_k", top_k=1),
        "prompt": replace(routed, every=None, prefill="prompt"),
        **{f"every-{every}": replace(routed, every=every) for every in EVERY_TOKENS},
        **{f"window-{window}": replace(routed, window=window) for window in WINDOW_TOKENS},
        "linear": replace(routed, combine="linear"),
        "paper-combine": replace(routed, combine="paper"),
        "cosine": cosine,
        "centred": replace(cosine, score="centred"),
        "lda": replace(cosine, score="lda"),
        "causal": replace(routed, every=routed.every or 2, prefill="causal", past="keep", lag=0),
        "recompute": replace(routed, every=routed.every or 2, prefill="prompt", past="recompute"),
        **{f"boost-{boost}": replace(boosted, boost=float(boost)) for boost in BOOST_FACTORS},
        "paper": RoutingParams.paper(),
    }
    return {name: Arm(name, params) for name, params in given.items()}


def choose_arms(wanted: Sequence[str], names: Sequence[str], default: RoutingParams) -> list[Arm]:
    """Return the arms that `wanted` names: standard arms, `ARM@BUNDLE` on another bundle's centroids, TOML files.

    Raises:
        OptionError: lists every name that does not exist and every option that is not possible.
    """
    standard, chosen, problems = standard_arms(names, default), list[Arm](), list[str]()
    for entry in wanted:
        name, at, folder = entry.partition("@")
        if entry.endswith(".toml"):
            try:
                chosen += read_arms(Path(entry), default)
            except TreadleError as error:
                problems.append(str(error))
        elif name not in standard:
            problems.append(unknown_name("arm", name, standard))
        elif at and not folder:
            problems.append(f"{entry} names no bundle: write {name}@FOLDER")
        else:
            chosen.append(replace(standard[name], name=entry, bundle=folder))
    chosen = distinct_arms(chosen, problems)
    if problems:
        raise OptionError(problem_list("arms:", problems))
    return chosen


def distinct_arms(arms: Sequence[Arm], problems: list[str]) -> list[Arm]:
    """Return each arm once; a name that two different arms have is added to `problems`, as it keys their results."""
    kept: dict[str, Arm] = {}
    for arm in arms:
        if kept.setdefault(arm.name, arm) != arm:
            problems.append(f"two arms are called {arm.name!r}")
    return list(kept.values())


def read_arms(file: Path, default: RoutingParams) -> list[Arm]:
    """Return the arms of a TOML file, over the params `default`; raise an OptionError for impossible arms."""
    document = read_toml(file)
    unknown = [unknown_name("table", key, ("arms", "grid")) for key in document if key not in {"arms", "grid"}]
    return read_tables(document, file, default, unknown)


def read_tables(
    document: Mapping[str, Any], file: Path, default: RoutingParams, found: Sequence[str] = ()
) -> list[Arm]:
    """Return the arms that the tables `arms` and `grid` of a TOML document stand for, over the params `default`.

    Raises:
        OptionError: lists every problem, after those that were `found` before.
    """
    problems = list(found)
    tables = dict(_tables(document, "arms", problems))
    for name, table in _tables(document, "grid", problems).items():
        try:
            rows = expand(table)
        except OptionError as error:
            problems.append(f"{name}: {error}")
            continue
        tables |= {f"{name}/{label}": row for label, row in rows.items()}
        if not rows:
            problems.append(f"{name}: an empty list leaves no combination")
        if not table:
            problems.append(f"{name}: a grid needs an option with a list of values")
    arms: list[Arm] = []
    for name, table in tables.items():
        try:
            arms.append(_read_arm(name, table, default))
        except TreadleError as error:
            problems.append(f"{name}: {error}")
    if not tables and not problems:
        problems.append("it names no arm: write a table [arms.NAME] or [grid.NAME]")
    if problems:
        raise OptionError(problem_list(f"{file}:", problems))
    return arms


def read_routers(
    arms: Sequence[Arm], adapters: Sequence[Adapter], router: Router, problems: list[str]
) -> dict[str, Router]:
    """Return the router of each other bundle that an arm names, by folder; what is wrong is added to `problems`."""
    folders = dict.fromkeys(arm.bundle for arm in arms if arm.bundle)
    steps = [lambda folder=folder: (folder, _read_router(folder, adapters, router)) for folder in folders]
    return dict(collect(problems, steps))


def _read_router(folder: str, adapters: Sequence[Adapter], router: Router) -> Router:
    """Return the router of another bundle, whose adapters must be `adapters` in the order of `router`."""
    bundle = read_bundle(folder)
    own, other = ({(each.name, each.identity) for each in some} for some in (adapters, bundle.adapters))
    if differ := sorted({name for name, _ in own ^ other}):
        raise OptionError(f"bundle {folder} has other adapters ({', '.join(differ)}); an arm needs one of the same.")
    if bundle.router.names != router.names:
        raise OptionError(f"bundle {folder} has its adapters in another order: {', '.join(bundle.router.names)}.")
    return bundle.router


def _read_arm(name: str, table: Mapping[str, Any], default: RoutingParams) -> Arm:
    given = {key: value for key, value in table.items() if key != "bundle"}
    bundle = table.get("bundle", "")
    if "bundle" in table and (not bundle or not isinstance(bundle, str)):
        raise OptionError(f"bundle: got {shown(bundle)}; name a folder, or leave it out: the evaluated bundle routes.")
    return Arm(name, read_routing(given, default), bundle)


def expand(grid: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every combination of a grid's lists, under a label such as `every=2 window=64` of what varies."""
    axes = {key: cast(list[Any], value if isinstance(value, list) else [value]) for key, value in grid.items()}
    if (number := prod(map(len, axes.values()))) > MAX_ARMS:
        raise OptionError(f"the grid has {number} combinations; allowed: {MAX_ARMS}")
    rows = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    varies = [key for key, values in axes.items() if len(values) > 1] or list(axes)
    return {" ".join(f"{key}={row[key]}" for key in varies): row for row in rows}


def read_toml(file: Path) -> dict[str, Any]:
    """Return the document of a TOML file; an OptionError where it cannot be read."""
    text = read_text(file, OptionError, MAX_FILE_BYTES)
    try:
        document = tomllib.loads(text)
        check_depth(document)
    except RecursionError as error:
        raise OptionError(f"{file} cannot be read: it is nested too deeply") from error
    except ValueError as error:
        raise OptionError(f"{file} cannot be read: {error}") from error
    return document


def _tables(document: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, Mapping[str, Any]]:
    tables = document.get(key, {})
    if not isinstance(tables, dict) or not all(
        isinstance(each, dict) for each in cast(dict[str, Any], tables).values()
    ):
        problems.append(f"write [{key}.NAME] and the options of that name below it")
        return {}
    return cast(dict[str, Mapping[str, Any]], tables)


@dataclass(frozen=True)
class Sweep:
    """Tasks, arms and options of a sweep file."""

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
        steps.append(lambda: read_tables(document, file, default))
    arms = distinct_arms(list(chain.from_iterable(collect(problems, steps))), problems)
    if problems:
        raise OptionError(problem_list(f"sweep {file}:", problems))
    return Sweep(tuple(document["tasks"]), tuple(document["only"]), tuple(arms), params[0])
