"""The command line: one command a public function, its flags from the dataclasses of its options."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from treadle.cli import experiments, serve
from treadle.cli.flags import BundlePath, Chat, Device, Dtype, Json, Pack, chat_messages, takes
from treadle.common.errors import OptionError, TreadleError, collect, problem_list, raise_all, unknown_name
from treadle.common.options import read_options
from treadle.common.params import RoutingParams, SamplingParams, read_routing
from treadle.experiments.params import TrainParams

if TYPE_CHECKING:
    from treadle.engine.engine import Engine
    from treadle.routing.centroids import Centroids
    from treadle.routing.router import Router
    from treadle.routing.samples import Sample

OTHERS = 2000
"""Examples of each other task, from which joined sequences choose."""
app = typer.Typer(
    name="treadle",
    help="Blend LoRA adapters token by token, with a router that is computed, not trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: with rich it takes half as long again
)
app.add_typer(experiments.app)
app.add_typer(serve.app)


@app.command()
@takes(sampling=SamplingParams, routing=RoutingParams)
def generate(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    bundle: BundlePath,
    prompt: Annotated[str, typer.Option(help="text to continue; - reads standard input")],
    chat: Chat = False,
    trace: Annotated[Path | None, typer.Option(help="write tokens, log-probabilities and weights to this file")] = None,
    device: Device = None,
    dtype: Dtype = None,
    pack: Pack = None,
    as_json: Json = False,
    *,
    sampling: dict[str, Any],
    routing: dict[str, Any],
) -> None:
    """Generate from a prompt; the text streams in the colours of its leading adapters."""
    from treadle.bundle.base_model import check_dtype
    from treadle.bundle.bundle import read_bundle
    from treadle.common.writing import check_writable, write_text

    problems: list[str] = []
    options = collect(problems, [partial(read_options, SamplingParams, sampling)])
    found = collect(problems, [partial(read_bundle, bundle)])
    params = collect(problems, [partial(_routing, found[0].router if found else None, routing)])
    collect(problems, [partial(check_dtype, dtype)])
    collect(problems, [partial(check_writable, trace)] if trace else [])  # now, not after the text is generated
    raise_all(problems)
    text = sys.stdin.read() if prompt == "-" else prompt
    engine = experiments.open_engine(found[0], device, dtype, pack)
    given = chat_messages(text) if chat else text
    if as_json or trace:
        document = _document(engine, given, options[0], params[0])
        if trace:
            write_text(trace, json.dumps(document, indent=2) + "\n")
        print(json.dumps(document) if as_json else document["text"])
        return
    _stream(engine, given, options[0], params[0])


@app.command()
@takes(routing=RoutingParams)
def route(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    bundle: BundlePath,
    text: Annotated[str | None, typer.Option(help="the text to route; - reads standard input")] = None,
    chat: Chat = False,
    evaluate: Annotated[bool, typer.Option("--eval", help="accuracy and confusion on held-out examples")] = False,
    tasks: Annotated[list[str] | None, typer.Option(help="with --eval: TASK=FILE, as treadle eval; repeatable")] = None,
    limit: Annotated[int, typer.Option(help="with --eval: examples a task")] = 300,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="with --eval: folder for treadle plot")] = None,
    as_json: Json = False,
    *,
    routing: dict[str, Any],
) -> None:
    """Show how the router weighs a text and why, or how often it is right. The base model is not loaded."""
    from treadle.bundle.bundle import read_bundle
    from treadle.engine.chat import contents_of, joined
    from treadle.routing.explain import explain

    if evaluate != bool(tasks) or evaluate != (text is None) or (evaluate and chat):
        raise typer.BadParameter("give --text (and --chat), or --eval with --tasks")
    router = read_bundle(bundle).router
    params = _routing(router, routing)
    if evaluate:
        if routing:
            raise OptionError(f"--eval measures every score by itself; leave out {', '.join(sorted(routing))}")
        experiments.route_eval(router, tasks or [], limit, output, as_json)
        return
    given = sys.stdin.read() if text == "-" else text or ""
    said = joined(contents_of(chat_messages(given))) if chat else given
    explanation = explain(router, said, params)
    if as_json:
        print(json.dumps(asdict(explanation)))
        return
    from treadle.cli.console import explanation_table, new_console

    new_console().print(explanation_table(explanation))


@app.command(name="fit")
@takes(routing=RoutingParams)
def fit_command(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    base: Annotated[str, typer.Option(help="folder or hub id of the base model")],
    adapter: Annotated[list[str], typer.Option(help="name=PATH of a PEFT folder; once for each adapter")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write")],
    samples: Annotated[
        list[str] | None,
        typer.Option(help="name=FILE of its sample texts (.txt, .jsonl, .jsonl.gz); not for adapters whose training "
                          "left a centroid beside them"),
    ] = None,
    embedder: Annotated[
        str, typer.Option(help="model2vec folder, static:NAME, or sentence-transformers name")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    keep_samples: Annotated[int, typer.Option(help="texts of each adapter that the bundle keeps, for doctor")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a bundle that is there")] = False,
    as_json: Json = False,
    *,
    routing: dict[str, Any],
) -> None:  # fmt: skip
    """Make a bundle from adapters and sample texts of each; nothing is trained."""
    from treadle.bundle.bundle import save_bundle
    from treadle.bundle.bundle_files import finish_replacing
    from treadle.common.writing import check_writable
    from treadle.routing.router import fit

    check_writable(output / "bundle.json")  # now, not after the samples are embedded
    finish_replacing(output)  # its own adapters may be among those that are given
    folders, files = _pairs(adapter, "--adapter"), _pairs(samples or [], "--samples")
    problems: list[str] = []
    if not set(files) <= set(folders):
        problems.append(f"--adapter names {', '.join(folders)}; --samples names {', '.join(files)}")
    params = collect(problems, [partial(_routing, None, routing)])
    texts, fitted = _fitting(folders, files, problems)
    router = fit(texts, embedder, params[0], fitted=fitted)
    wholes = {name: [each.whole for each in given[:keep_samples]] for name, given in texts.items()}
    kept = wholes if keep_samples else None
    save_bundle(output, base=base, adapters=folders, router=router, samples=kept, overwrite=overwrite)
    counts = dict(zip(router.names, router.centroids.counts.tolist(), strict=True))
    rows = {name: len(given) for name, given in texts.items()}
    if as_json:
        print(json.dumps({"bundle": str(output), "samples": rows, "texts": counts}))
    else:
        print(f"wrote {output}: samples {rows}, texts made of them {counts}")


def _fitting(
    folders: dict[str, str], files: dict[str, str], problems: list[str]
) -> "tuple[dict[str, list[Sample]], list[Centroids]]":
    """Return the samples of the adapters that have some and the centroids of the others.

    Every adapter is read, too, before anything is embedded; one error lists all `problems`, those found here included.
    """
    from treadle.bundle.centroid_files import read_centroid
    from treadle.experiments.data import load_samples
    from treadle.lora.adapter import read_adapter

    adapters = collect(problems, [partial(read_adapter, path, name) for name, path in folders.items()])
    good = {adapter.name for adapter in adapters}
    sampled = [name for name in folders if name in files]
    trained = [name for name in folders if name not in files and name in good]
    texts = collect(problems, [partial(load_samples, files[name]) for name in sampled])
    fitted = collect(problems, [partial(read_centroid, Path(folders[name]), name) for name in trained])
    if problems:
        raise OptionError(problem_list("no bundle can be made:", problems))
    return dict(zip(sampled, texts, strict=True)), fitted


@app.command()
def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="folder of a bundle", metavar="BUNDLE")] = None,
    samples: Annotated[list[str] | None, typer.Option(help="name=FILE of texts to read instead of the kept")] = None,
    device: Device = None,
    dtype: Dtype = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="examine the vLLM that is installed instead")] = False,
    as_json: Json = False,
) -> None:
    """Examine a bundle: load it strictly, check that each adapter acts, time a step. Exit 1 if something is wrong."""
    if vllm == (bundle is not None):
        raise typer.BadParameter("give a BUNDLE, or --vllm")
    if bundle is None:
        experiments.doctor_vllm(as_json)
        return
    from treadle.bundle.base_model import quiet_libraries
    from treadle.experiments.data import load_texts
    from treadle.experiments.doctor import examine

    quiet_libraries()
    texts = {name: load_texts(file)[:8] for name, file in _pairs(samples or [], "--samples").items()}
    report = examine(bundle, samples=texts, device=device, dtype=dtype)
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        from treadle.cli.console import new_console, report_tables

        console = new_console()
        console.print(f"base {report.base_model} on {report.device} in {report.dtype}")
        console.print(*report_tables(report), sep="\n")
        base, blended = report.base_step * 1000, report.blended_step * 1000
        console.print(f"a step: base {base:.1f} ms, blended {blended:.1f} ms, ratio {blended / base:.3f} (medians)")
    if report.problems:
        raise TreadleError("; ".join(report.problems))


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
            help="read the rows as this task's: math, science, code, reading, mbpp; chat (rows hold "
            "messages); or a .json file with a prompt template"
        ),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="[TASK=]FILE of another task, for joined sequences; repeatable")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="examples to use, a seeded choice")] = None,
    embedder: Annotated[
        str | None, typer.Option(help="leave the centroid of the examples beside the adapter, made by this embedder")
    ] = None,
    preset: Annotated[str, typer.Option(help="demo, or paper (rank 64, alpha 16, dropout 0.1)")] = "demo",
    as_json: Json = False,
    *,
    training: dict[str, Any],
) -> None:
    """Train one LoRA adapter and write a plain PEFT folder."""
    from treadle.bundle.base_model import load_tokenizer
    from treadle.experiments.data import CHAT_TASK, chat_task, load_examples
    from treadle.experiments.tasks import find_task
    from treadle.experiments.train import train_adapter

    presets = {"demo": TrainParams(), "paper": TrainParams.paper()}
    if preset not in presets:
        raise OptionError(unknown_name("preset", preset, presets))
    params = read_options(TrainParams, training, onto=presets[preset])
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
        print(json.dumps({"adapter": str(output), "examples": len(examples)}) if as_json else f"wrote {output}")


def _routing(router: "Router | None", given: dict[str, Any]) -> RoutingParams:
    """Return a bundle's params, or the defaults, with what was given on the command line over them."""
    onto = router.params if router is not None else RoutingParams()
    return read_routing(given, onto)


def _pairs(entries: Sequence[str], flag: str) -> dict[str, str]:
    split = [entry.partition("=") for entry in entries]
    if bad := [entry for entry, (name, _, value) in zip(entries, split, strict=True) if not name or not value]:
        raise OptionError(f"{flag} takes name=PATH, not {', '.join(map(repr, bad))}.")
    names = [name for name, _, _ in split]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"{flag} names {', '.join(repeated)} twice.")
    return {name: value for name, _, value in split}


def _document(engine: "Engine", prompt: Any, sampling: SamplingParams, routing: RoutingParams) -> dict[str, Any]:
    done = engine.generate(prompt, sampling=sampling, routing=routing)
    document = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in asdict(done).items()}
    return {**document, "routing": asdict(routing), "sampling": asdict(sampling)}


def _stream(engine: "Engine", prompt: Any, sampling: SamplingParams, routing: RoutingParams) -> None:
    from treadle.cli.console import legend, mean_weights, new_console, stream_coloured

    console = new_console()
    events = stream_coloured(console, engine.stream(prompt, sampling=sampling, routing=routing))
    means = zip(engine.adapter_names, mean_weights(events), strict=True)
    notes = new_console(stderr=True)
    notes.print(legend(engine.adapter_names))
    notes.print("mean weights: " + "  ".join(f"{name} {weight:.2f}" for name, weight in means))


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (an error, in one line on stderr) or 2 (wrong usage)."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.simplefilter("ignore", FutureWarning)  # what other libraries say to their callers
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused where texts are checked
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        try:
            app(arguments)
        finally:
            sys.stdout.flush()  # here, where a full disk can still be told
    except TreadleError as error:
        if debug:
            raise
        print(f"treadle: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has gone, as in `treadle ... | head`
        _leave_output()
        sys.exit(1)
    except OSError as error:  # standard output, or a file that nothing above has worded
        if debug:
            raise
        print(f"treadle: {error.filename or 'output'} cannot be used: {error.strerror or error}", file=sys.stderr)
        _leave_output()
        sys.exit(1)
    sys.exit(0)


def _leave_output() -> None:
    """Let what is still buffered go nowhere, as writing it when Python ends would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
