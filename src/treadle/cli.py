"""The command line: one command a public function, its flags from the dataclass of its options."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from treadle.errors import TreadleError
from treadle.options import meanings, read_options
from treadle.train import TrainParams

app = typer.Typer(
    name="treadle",
    help="Blend LoRA adapters token by token, with a router that is computed, not trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]


def takes(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each field of a dataclass; its last parameter receives what was given as a dict."""
    kinds, helps = get_type_hints(options), meanings(options)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *own, last = inspect.signature(command, eval_str=True).parameters.values()
        flags = [
            inspect.Parameter(
                entry.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[bool | None if kinds[entry.name] is bool else str | None, _flag(entry, helps)],
            )
            for entry in fields(options)
        ]

        def run(**values: Any) -> None:
            given = {flag.name: values.pop(flag.name) for flag in flags}
            command(**values, **{last.name: {name: value for name, value in given.items() if value is not None}})

        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *flags)}
        return run

    return decorate


def _flag(entry: Any, helps: dict[str, str]) -> Any:
    default = entry.default if not isinstance(entry.default, tuple) else ",".join(entry.default)
    return typer.Option(f"--{entry.name.replace('_', '-')}", help=f"{helps[entry.name]} ({default})")


@app.command()
def base(
    name: Annotated[str, typer.Argument(help="hub id under which the model is kept, such as org/model")],
    gguf: Annotated[Path | None, typer.Option(help="a GGUF file")] = None,
    package: Annotated[str | None, typer.Option(help="an installed pip package that carries one GGUF file")] = None,
    as_json: Json = False,
) -> None:
    """Turn a GGUF file into a plain Hugging Face folder in treadle's cache, once."""
    from treadle.models import convert_gguf, gguf_in_package

    if (gguf is None) == (package is None):
        raise typer.BadParameter("give one of --gguf and --package")
    file = gguf if gguf is not None else gguf_in_package(package or "")
    folder = convert_gguf(name, file)
    print(json.dumps({"name": name, "folder": str(folder)}) if as_json else f"{name}: {folder}")


@app.command()
@takes(TrainParams)
def train(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    base: Annotated[str, typer.Option(help="folder or hub id of the base model")],
    data: Annotated[str, typer.Option(help="JSON lines with prompt and completion, or a hub data set")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the PEFT folder to write")],
    task: Annotated[str | None, typer.Option(help="read the rows as this task's: math, science, code, reading")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="[task=]FILE of another task, for joined sequences; repeatable")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="examples to use, a seeded choice")] = None,
    options: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Train one LoRA adapter and write a plain PEFT folder."""
    from treadle.data import load_examples
    from treadle.train import train_adapter

    params = read_options(TrainParams, options)
    examples = load_examples(data, task, limit=limit, seed=params.seed)
    others: list[Any] = []
    for entry in also or []:
        other_task, _, file = entry.rpartition("=")
        others += load_examples(file, other_task or None, limit=2000, seed=params.seed)
    train_adapter(base, examples, output, others=others, params=params)
    print(f"wrote {output}")


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (an error, in one line on stderr) or 2 (wrong usage)."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except TreadleError as error:
        if debug:
            raise
        sys.exit(f"treadle: {error}")
    sys.exit(0)
