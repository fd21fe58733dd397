"""The commands of experiments: `treadle eval`, `treadle sweep`, `treadle plot`, `treadle bench`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.flags import BundlePath, Device, Dtype, Json, MaybeBundle, Pack, Strict, open_source, takes
from treadle.common.errors import OptionError, collect, raise_all
from treadle.common.files import make_folder
from treadle.common.options import read_options
from treadle.common.params import SourceParams
from treadle.common.version import __version__
from treadle.experiments.params import BenchParams, EvalParams

if TYPE_CHECKING:
    from treadle.bundle.bundle import Bundle
    from treadle.engine.engine import Engine
    from treadle.experiments.arms import Arm
    from treadle.experiments.sets import EvalSet
    from treadle.experiments.tasks import Example
    from treadle.experiments.timing import Table
    from treadle.routing.router import Router

app = typer.Typer()
Output = Annotated[Path, typer.Option("-o", "--output", help="folder of results; finished cells are not repeated")]
Against = Annotated[
    str | None, typer.Option(help="arm that the tables' paired differences subtract; default: the first measured")
]


@app.command(name="eval")
@takes(source=SourceParams, evaluation=EvalParams)
def eval_command(  # noqa: PLR0913 a command's parameters are its flags
    bundle: MaybeBundle = None,
    *,
    tasks: Annotated[
        list[str], typer.Option(help="math, science, science-text, code, reading, mbpp: TASK=FILE, or alone for the "
                                     "hub's rows; a task's .json file; stream and conversation join the "
                                     "others; repeatable")
    ],
    output: Output,
    arms: Annotated[
        list[str] | None,
        typer.Option(help="base, oracle, uniform, routed, nearest, prompt, every-4, paper, an adapter's name ...; "
                          "routed@BUNDLE = by that bundle's embedder and centroids; or a .toml file of arms; "
                          "repeatable, or with commas"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="measure only these: the others lend examples to streams; repeatable, or with commas"),
    ] = None,
    against: Against = None,
    device: Device = None,
    dtype: Dtype = None,
    strict: Strict = False,
    as_json: Json = False,
    source: dict[str, Any],
    evaluation: dict[str, Any],
) -> None:  # fmt: skip
    """Measure arms on tasks: values with 95 % intervals, resumable, every generation kept.

    The folder also gets the table as Markdown, CSV and LaTeX: table.md, table.csv, table.tex.

    The task mbpp runs programs that a model wrote. Limits on time, memory and files stop accidents, but there is no
    sandbox: such a program can read, change and send what you can. Run models that you do not trust in a container.
    """
    from treadle.bundle.base_model import check_dtype
    from treadle.experiments.arms import choose_arms
    from treadle.experiments.tables import check_against

    problems: list[str] = []
    params = collect(problems, [partial(read_options, EvalParams, evaluation)])
    collect(problems, [partial(check_dtype, dtype)])
    found = open_source(bundle, source, strict=strict)
    router, wanted = found.router, _split(arms or ["base,oracle,uniform,routed"])
    chosen = collect(problems, [lambda: choose_arms(wanted, router.names, router.params)])
    collect(problems, [partial(check_against, against, [arm.name for arm in chosen[0]])] if chosen else [])
    asked = params[0] if params else EvalParams()
    sets = _sets(found, chosen[0] if chosen else [], tasks, _split(only or []), asked, problems)
    make_folder(output)
    _run(open_engine(found, device, dtype), sets, chosen[0], output, asked, as_json, against)


@app.command()
def sweep(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    bundle: BundlePath,
    file: Annotated[Path, typer.Argument(help="TOML file: tasks, options, and grids of routing options")],
    output: Output,
    device: Device = None,
    dtype: Dtype = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Measure every combination of a grid of routing options on tasks; resumable."""
    from treadle.bundle.bundle import read_bundle
    from treadle.experiments.arms import read_sweep

    found = read_bundle(bundle)
    asked = read_sweep(file, found.router.names, found.router.params)
    sets = _sets(found, asked.arms, asked.tasks, asked.only, asked.params, [])
    make_folder(output)
    _run(open_engine(found, device, dtype), sets, asked.arms, output, asked.params, as_json)


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="folders that eval, sweep or bench wrote")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for figures and tables")],
    against: Against = None,
    as_json: Json = False,
) -> None:
    """Draw every figure that the results allow (SVG, PDF) and write their tables; nothing is measured."""
    from treadle.experiments.plots import draw_all
    from treadle.experiments.study import Study
    from treadle.experiments.tables import write_tables

    made = {"tables": write_tables(Study.read(results), output, against), "figures": draw_all(results, output)}
    if as_json:
        print(json.dumps({kind: list(map(str, files)) for kind, files in made.items()}))
    else:
        print("\n".join(str(file) for files in made.values() for file in files))


@app.command()
@takes(source=SourceParams, options=BenchParams)
def bench(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    bundle: MaybeBundle = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="decode, prefill, router, memory; repeatable, or with commas"),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    pack: Pack = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="folder for a file of what was measured, for `treadle plot`")
    ] = None,
    strict: Strict = False,
    as_json: Json = False,
    *,
    source: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Measure speed and memory side by side: interleaved runs in one process, medians, ratios to the base."""
    from treadle.bundle.base_model import quiet_libraries
    from treadle.experiments.results import write_bench
    from treadle.experiments.suites import check_lab, check_suites, measure
    from treadle.experiments.timing import markdown
    from treadle.experiments.workbench import Lab

    quiet_libraries()
    names = list(dict.fromkeys(_split(suite or ["decode"])))
    problems: list[str] = []
    collect(problems, [lambda: check_suites(names)])
    params = collect(problems, [lambda: read_options(BenchParams, options)])
    collect(problems, [lambda: make_folder(output)] if output else [])
    raise_all(problems)
    lab = Lab.open(open_source(bundle, source, strict=strict), device, dtype, params[0], pack=pack)
    check_lab(lab, names)
    if not as_json:
        print(lab.about)
    found: list[Table] = []
    for table in measure(lab, names):
        found.append(table)
        if not as_json:
            print(f"\n{markdown(table)}", flush=True)
        if output:  # after each table: what comes later may fail
            write_bench(output, names, lab.facts, found)
    if as_json:
        print(json.dumps({**lab.facts, "tables": [asdict(table) for table in found]}))


def route_eval(router: "Router", tasks: Sequence[str], limit: int, output: Path | None, as_json: bool) -> None:
    """Print how often the nearest adapter is the right one, by each score, and keep it for `treadle plot`."""
    from dataclasses import replace
    from typing import get_args

    from treadle.cli.console import new_console, quality_tables
    from treadle.common.params import RoutingParams, Score
    from treadle.common.writing import check_writable, write_text
    from treadle.experiments.router_quality import route_quality
    from treadle.experiments.sets import load_sets
    from treadle.experiments.study import QUALITY_FILE

    if output:
        check_writable(output / QUALITY_FILE)
    examples: dict[str, tuple[Example, ...]] = {}
    asked = EvalParams(limit=limit)
    sets = load_sets(tasks, asked)
    for each in sets:
        if each.task is None:
            raise OptionError(f"{each.name} joins several domains; --eval needs tasks of one domain each")
        examples[each.adapter] = examples.get(each.adapter, ()) + each.examples
    params = [replace(RoutingParams(), score=score) for score in get_args(Score)]
    problems: list[str] = []
    qualities = collect(problems, [lambda each=each: route_quality(router, examples, each) for each in params])
    if not qualities:
        raise OptionError("\n".join(dict.fromkeys(problems)))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    rows = [{"task": each.name, "source": each.source, "rows": each.rows, "n": len(each)} for each in sets]
    about = {"embedder": router.embedder.id, "asked": rows, "seed": asked.seed, "treadle": __version__}
    document = json.dumps([asdict(quality) | about for quality in qualities])
    if output:
        write_text(output / QUALITY_FILE, document + "\n")
    if as_json:
        print(document)
        return
    for table in quality_tables(qualities):
        new_console().print(table)


def open_engine(bundle: "Bundle", device: str | None, dtype: str | None, pack: bool | None = None) -> "Engine":
    """Load the base of a bundle that has been read."""
    from treadle.bundle.base_model import quiet_libraries
    from treadle.engine.loading import load

    quiet_libraries()
    return load(bundle, device=device, dtype=dtype, pack=pack)


def _split(entries: Sequence[str]) -> list[str]:
    """Return the names of a flag that may be repeated or hold commas."""
    return [name for entry in entries for name in entry.split(",")]


def _sets(
    found: "Bundle",
    arms: Sequence["Arm"],
    tasks: Sequence[str],
    only: Sequence[str],
    params: EvalParams,
    problems: list[str],
) -> "list[EvalSet]":
    """Load the sets of an evaluation; raise for all `problems` before the base model loads."""
    from treadle.experiments.arms import read_routers
    from treadle.experiments.sets import load_sets
    from treadle.lora.compatibility import check_combine

    sets = collect(problems, [lambda: load_sets(tasks, params, only)])
    read_routers(arms, found.adapters, found.router, problems)
    combines = dict.fromkeys(arm.params.combine for arm in arms if arm.params is not None)
    collect(problems, [partial(check_combine, combine, found.adapters) for combine in combines])
    raise_all(problems)
    return sets[0]


def _run(  # noqa: PLR0913, PLR0917 all that a run is made of
    engine: "Engine",
    sets: Sequence["EvalSet"],
    arms: Sequence["Arm"],
    output: Path,
    params: EvalParams,
    as_json: bool,
    against: str | None = None,
) -> None:
    from treadle.cli.console import new_console, results_table
    from treadle.cli.progress import progress
    from treadle.experiments.evaluate import evaluate
    from treadle.experiments.study import Study
    from treadle.experiments.tables import write_tables

    with progress(sum(map(len, sets)) * len(arms)) as advance:
        results = evaluate(engine, sets, arms, output, params, advance)
    tables = write_tables(Study.read([output]), output, against)
    if as_json:
        print(json.dumps([asdict(result) for result in results]))
        return
    for task in dict.fromkeys(result.task for result in results):
        new_console().print(results_table(task, [result for result in results if result.task == task]))
    print("\n".join(map(str, tables)))
