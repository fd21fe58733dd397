"""The commands that make bundles and their parts: `treadle fit`, `base` and `train`."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.flags import Json, Strict, takes
from treadle.common.errors import OptionError, collect, problem_list, unknown_name
from treadle.common.options import named, read_options
from treadle.common.params import RoutingParams, read_routing
from treadle.experiments.params import TrainParams

if TYPE_CHECKING:
    from treadle.engine.router_cache import Fitted
    from treadle.lora.adapter import Adapter
    from treadle.routing.calibration import FitReport
    from treadle.routing.centroids import Centroids
    from treadle.routing.samples import Sample

OTHERS = 2000
"""Examples of each other task, from which joined sequences choose."""
app = typer.Typer()


@app.command(name="fit")
@takes(routing=RoutingParams)
def fit_command(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    base: Annotated[str, typer.Option(help="folder or hub id of the base model")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="name=PATH or name=HUB_ID of an adapter; once for each adapter")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="folder; each sub-folder with an adapter is one, samples.txt or .jsonl in it")
    ] = None,
    samples: Annotated[
        list[str] | None,
        typer.Option(help="name=FILE of its sample texts (.txt, .jsonl, .jsonl.gz); not needed where they lie in the "
                          "adapter's folder or training left a centroid there"),
    ] = None,
    embedder: Annotated[
        str,
        typer.Option(help="tokens (made of the base's own token vectors), model2vec folder, a bundle's folder, "
                          "static:NAME, or sentence-transformers name; base+ before it lets the base model's own "
                          "states decide finally"),
    ] = "tokens",
    keep_samples: Annotated[int, typer.Option(help="samples of each adapter that the bundle keeps for doctor")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a bundle that is there")] = False,
    strict: Strict = False,
    as_json: Json = False,
    *,
    routing: dict[str, Any],
) -> None:  # fmt: skip
    """Make a bundle from adapters and sample texts of each; nothing is trained."""
    from treadle.bundle.base_model import quiet_libraries
    from treadle.bundle.bundle import save_bundle
    from treadle.bundle.bundle_files import finish_replacing
    from treadle.common.writing import check_writable
    from treadle.engine.preparing import is_by_states, text_embedder
    from treadle.engine.router_cache import fit_router

    started = time.perf_counter()
    check_writable(output / "bundle.json")  # now, not after the samples are embedded
    finish_replacing(output)  # its own adapters may be among those that are given
    quiet_libraries()
    problems: list[str] = []
    params = collect(problems, [partial(read_routing, routing, RoutingParams())])
    with_states = is_by_states(embedder)
    places, files = _places(adapters, adapter or [], samples or [], problems)
    read, texts, fitted = _fitting(places, files, problems, params[0] if with_states and params else None)
    own = text_embedder(embedder, base)
    if with_states and read:
        count = sum(map(len, texts.values()))
        print(f"reading {count} texts through the base model: this takes a minute or two on a CPU", file=sys.stderr)
    fit = fit_router(base, read, texts, own, params[0], fitted=fitted, with_states=with_states)
    wholes = {name: [each.whole for each in given[:keep_samples]] for name, given in texts.items()}
    kept = wholes if keep_samples else None
    folders = {each.name: each.source for each in read}
    save_bundle(output, base=base, adapters=folders, router=fit.router, samples=kept, overwrite=overwrite)
    seconds = time.perf_counter() - started
    if as_json:
        rows = {name: len(given) for name, given in texts.items()}
        print(json.dumps({"bundle": str(output), "samples": rows, **_fit_document(fit), "seconds": seconds}))
    else:
        _print_fit(f"wrote {output} after {seconds:.0f} s", fit)
        print(f"next: treadle generate {quote(str(output))} --prompt TEXT, or: treadle serve {quote(str(output))}")


def _print_fit(title: str, fit: "Fitted") -> None:
    """Print the cross-validation of texts and, if there is one, of the base model's states."""
    from treadle.cli.console import fit_table, new_console

    console = new_console()
    console.print(title)
    told = [("", fit.report, fit.router.centroids)]
    states = fit.router.states
    if states and fit.by_states:
        told.append((f"the base model's states, after layer {states.layer}:", fit.by_states, states.centroids))
    for heading, each, centroids in told:
        if heading:
            console.print(heading)
        console.print(fit_table(each, centroids))
        for warning in each.warnings():
            console.print(f"note: {warning}")


def _fit_document(fit: "Fitted") -> dict[str, Any]:
    """Return the cross-validations as JSON: of texts and, under "states", of the base model's states."""
    told, states = _report_document(fit.report), fit.router.states
    if states and fit.by_states:
        told["states"] = {"layer": states.layer, "spans": states.spans, **_report_document(fit.by_states)}
    return told


def _report_document(report: "FitReport") -> dict[str, Any]:
    return {key: value for key, value in asdict(report).items() if key != "calibrations"}


def _places(
    folder: Path | None, single: Sequence[str], files: Sequence[str], problems: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the place of each adapter, and the files of samples that are given, by name."""
    from treadle.bundle.adapter_places import adapters_below

    below = collect(problems, [lambda: adapters_below(folder)[0]] if folder else [])
    places = (below[0] if below else {}) | named(single, "--adapter")
    if not places and not problems:
        problems.append("no adapter is given: name a folder of them (--adapters), or each (--adapter name=PATH)")
    chosen = named(files, "--samples")
    if not set(chosen) <= set(places):
        problems.append(f"--adapter names {', '.join(places)}; --samples names {', '.join(chosen)}")
    return places, chosen


def _fitting(
    places: dict[str, str], files: dict[str, str], problems: list[str], for_states: RoutingParams | None
) -> "tuple[list[Adapter], dict[str, list[Sample]], list[Centroids]]":
    """Return the adapters, the samples of those that have some and the centroids of the others.

    Every adapter is read, too, before anything is embedded; one error lists all `problems`, those found here included.
    `for_states` are the routing's params if the base model's states decide, which need samples of every adapter.
    """
    from treadle.bundle.adapter_places import adapter_place, samples_beside
    from treadle.bundle.centroid_files import read_centroid
    from treadle.engine.sample_files import load_samples
    from treadle.lora.adapter import read_adapter
    from treadle.routing.states import check_state_params

    def read(name: str) -> "Adapter":
        return read_adapter(adapter_place(places[name], name), name)

    adapters: list[Adapter] = collect(problems, [partial(read, name) for name in places])
    beside = {each.name: str(file) for each in adapters if (file := samples_beside(each.source))}
    files = {name: file for name, file in (beside | files).items() if name in places}
    trained = [adapter for adapter in adapters if adapter.name not in files]
    sampled = [name for name in places if name in files]
    texts = collect(problems, [partial(load_samples, files[name]) for name in sampled])
    if for_states:
        collect(problems, [partial(check_state_params, for_states)])
        problems += [f"adapter {each.name!r}: the base model's states need sample texts of it" for each in trained]
        trained = []
    fitted = collect(problems, [partial(read_centroid, each.source, each.name) for each in trained])
    if problems:
        raise OptionError(problem_list("no bundle can be made:", problems))
    return adapters, dict(zip(sampled, texts, strict=True)), fitted


@app.command()
def base(
    name: Annotated[str, typer.Argument(help="hub id under which the model is kept, such as org/model")],
    gguf: Annotated[Path | None, typer.Option(help="a GGUF file")] = None,
    package: Annotated[str | None, typer.Option(help="an installed pip package that carries one GGUF file")] = None,
    as_json: Json = False,
) -> None:
    """Turn a GGUF file into a plain Hugging Face folder in treadle's cache, once."""
    from treadle.bundle.base_model import convert_gguf, gguf_in_package, quiet_libraries

    quiet_libraries()
    if (gguf is None) == (package is None):
        raise typer.BadParameter("give one of --gguf and --package")
    folder = convert_gguf(name, gguf if gguf is not None else gguf_in_package(package or ""))
    print(json.dumps({"name": name, "folder": str(folder)}) if as_json else f"{name}: {folder}")


@app.command()
@takes(training=TrainParams)
def train(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    base: Annotated[str, typer.Option(help="folder or hub id of the base model")],
    data: Annotated[str, typer.Option(help="JSON lines with prompt and completion, or a hub data set")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the PEFT folder to write")],
    task: Annotated[
        str | None,
        typer.Option(
            help="read the rows as this task's: math, science, science-text, code, reading, mbpp; chat (rows "
            "hold messages); or a .json file with a prompt template"
        ),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="[TASK=]FILE of another task, for joined sequences; repeatable")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="examples to use, chosen by the seed")] = None,
    embedder: Annotated[
        str | None, typer.Option(help="write the examples' centroid by this embedder beside the adapter")
    ] = None,
    preset: Annotated[str, typer.Option(help="demo, or paper (rank 64, alpha 16, dropout 0.1)")] = "demo",
    as_json: Json = False,
    *,
    training: dict[str, Any],
) -> None:
    """Train one LoRA adapter and write a plain PEFT folder."""
    from treadle.bundle.base_model import load_tokenizer, quiet_libraries
    from treadle.experiments.data import CHAT_TASK, chat_task, load_examples
    from treadle.experiments.tasks import find_task
    from treadle.experiments.train import train_adapter

    presets = {"demo": TrainParams(), "paper": TrainParams.paper()}
    if preset not in presets:
        raise OptionError(unknown_name("preset", preset, presets))
    params = read_options(TrainParams, training, onto=presets[preset])
    quiet_libraries()
    tokenizer = load_tokenizer(base)

    def load(name: str | None, source: str, most: int | None) -> list[Any]:
        found = chat_task(tokenizer) if name == CHAT_TASK else find_task(name, also=[CHAT_TASK]) if name else None
        return load_examples(source, found, limit=most, seed=params.seed)

    examples = load(task, data, limit)
    others: list[Any] = []
    for entry in also or []:
        other_task, _, file = entry.partition("=") if not Path(entry).exists() else ("", "", entry)
        others += load(other_task if file else None, file or entry, OTHERS)
    train_adapter(base, examples, output, others=others, params=params, embedder=embedder)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the one that wrote it
        told = f"wrote {output}\nnext: {_after_training(base, output, is_routed=embedder is not None)}"
        print(json.dumps({"adapter": str(output), "examples": len(examples)}) if as_json else told)


def _after_training(base: str, adapter: Path, *, is_routed: bool) -> str:
    """Return the next step after training; an adapter without a centroid in its folder needs samples first."""
    fit = f"treadle fit --base {quote(base)} --adapters {quote(str(adapter.parent))} -o my-bundle"
    return (
        fit if is_routed else f"put a few dozen typical prompts into {adapter / 'samples.txt'}, one a line; then {fit}"
    )
