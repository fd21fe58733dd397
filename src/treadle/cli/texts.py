"""The commands that take a text: `treadle generate`, `treadle route`."""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.experiments import open_engine, route_eval
from treadle.cli.flags import Chat, Device, Dtype, Json, MaybeBundle, Pack, Strict, chat_messages, open_source, takes
from treadle.common.errors import OptionError, collect, raise_all
from treadle.common.options import read_options
from treadle.common.params import RoutingParams, SamplingParams, SourceParams, read_routing

if TYPE_CHECKING:
    from treadle.engine.engine import Engine

app = typer.Typer()
EMPTY = (
    "treadle: the answer is empty: the model ended the text at once. Try {}, which sends the prompt {}, "
    "another wording, or --temperature 0.7."
)
"""Says why nothing was printed, and what to try."""


@app.command()
@takes(source=SourceParams, sampling=SamplingParams, routing=RoutingParams)
def generate(  # noqa: PLR0913 a command's parameters are its flags
    bundle: MaybeBundle = None,
    *,
    prompt: Annotated[str, typer.Option(help="question, or text to continue; - reads standard input")],
    chat: Chat = None,
    trace: Annotated[Path | None, typer.Option(help="write tokens, log-probabilities and weights to this file")] = None,
    device: Device = None,
    dtype: Dtype = None,
    pack: Pack = None,
    strict: Strict = False,
    as_json: Json = False,
    source: dict[str, Any],
    sampling: dict[str, Any],
    routing: dict[str, Any],
) -> None:
    """Generate from a prompt; the text streams in the colours of its leading adapters."""
    from treadle.bundle.base_model import check_dtype
    from treadle.common.writing import check_writable, write_text

    problems: list[str] = []
    options = collect(problems, [partial(read_options, SamplingParams, sampling)])
    found = collect(problems, [partial(open_source, bundle, source, strict=strict)])
    default = found[0].router.params if found else RoutingParams()
    params = collect(problems, [partial(read_routing, routing, default)])
    collect(problems, [partial(check_dtype, dtype)])
    collect(problems, [partial(check_writable, trace)] if trace else [])  # now, not after the text is generated
    raise_all(problems)
    text = sys.stdin.read() if prompt == "-" else prompt
    engine = open_engine(found[0], device, dtype, pack)
    is_chat = bool(engine.tokenizer.chat_template) if chat is None else chat
    given = chat_messages(text) if is_chat and text else text
    if as_json or trace:
        document = _document(engine, given, options[0], params[0])
        if trace:
            write_text(trace, json.dumps(document, indent=2) + "\n")
        print(json.dumps(document) if as_json else document["text"])
        return
    if not _stream(engine, given, options[0], params[0]):
        told = ("--raw", "as it is") if is_chat else ("--chat", "as a user's message")
        print(EMPTY.format(*told), file=sys.stderr)


@app.command(name="route")
@takes(source=SourceParams, routing=RoutingParams)
def route_command(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    bundle: MaybeBundle = None,
    text: Annotated[str | None, typer.Option(help="the text to route; - reads standard input")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="read a JSON list of messages as a chat, or as text")
    ] = True,
    evaluate: Annotated[bool, typer.Option("--eval", help="accuracy and confusion on held-out examples")] = False,
    tasks: Annotated[list[str] | None, typer.Option(help="with --eval: TASK=FILE, as treadle eval; repeatable")] = None,
    limit: Annotated[int, typer.Option(help="with --eval: examples per task")] = 300,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="with --eval: folder for treadle plot")] = None,
    strict: Strict = False,
    as_json: Json = False,
    *,
    source: dict[str, Any],
    routing: dict[str, Any],
) -> None:
    """Show how the router weighs a text and why, or how often it is right. The base model is not loaded."""
    from treadle.engine.chat import contents_of, joined
    from treadle.routing.explain import explain

    if evaluate != bool(tasks) or evaluate != (text is None):
        raise typer.BadParameter("give --text, or --eval with --tasks")
    router = open_source(bundle, source, strict=strict).router
    params = read_routing(routing, router.params)
    if evaluate:
        if routing:
            raise OptionError(f"--eval measures every score by itself; leave out {', '.join(sorted(routing))}")
        route_eval(router, tasks or [], limit, output, as_json)
        return
    given = sys.stdin.read() if text == "-" else text or ""
    said = joined(contents_of(chat_messages(given))) if chat else given
    explanation = explain(router, said, params)
    if as_json:
        print(json.dumps(asdict(explanation)))
        return
    from treadle.cli.console import explanation_table, new_console

    console = new_console()
    console.print(explanation_table(explanation))
    if explanation.provisional:
        console.print("These weights are provisional: once the base model has read a text, its own states decide.")


def _document(engine: "Engine", prompt: Any, sampling: SamplingParams, routing: RoutingParams) -> dict[str, Any]:
    done = engine.generate(prompt, sampling=sampling, routing=routing)
    document = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in asdict(done).items()}
    return {**document, "routing": asdict(routing), "sampling": asdict(sampling)}


def _stream(engine: "Engine", prompt: Any, sampling: SamplingParams, routing: RoutingParams) -> str:
    """Print a text as it comes, then whose weights made it; return it."""
    from treadle.cli.console import base_share, legend, mean_weights, new_console, stream_coloured

    console = new_console()
    events = stream_coloured(console, engine.stream(prompt, sampling=sampling, routing=routing))
    means = mean_weights(events)  # (N,)
    shares = zip((*engine.adapter_names, "base"), (*means, base_share(means)), strict=True)
    notes = new_console(stderr=True)
    notes.print(legend(engine.adapter_names))
    notes.print("mean weights: " + "  ".join(f"{name} {share:.2f}" for name, share in shares))
    return "".join(event.text for event in events)
