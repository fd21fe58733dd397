"""Flags: those that commands share, and one for each field of an options dataclass."""

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_origin, get_type_hints

import typer

from treadle.common.errors import AdapterWarning
from treadle.common.options import meanings, read_options
from treadle.common.params import SourceParams

if TYPE_CHECKING:
    from treadle.bundle.bundle import Bundle

Command = Callable[..., None]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
BundlePath = Annotated[Path, typer.Argument(help="folder of a bundle", metavar="BUNDLE")]
MaybeBundle = Annotated[
    Path | None, typer.Argument(help="folder of a bundle; or give --base and --adapters instead", metavar="BUNDLE")
]
Device = Annotated[str | None, typer.Option(help="torch device; default: CUDA where there is one")]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="a second copy of the weights as oneDNN packs them; default: on AMD's CPUs, where it takes at most a GiB",
    ),
]


def _refuse_warnings(strict: bool) -> bool:
    """Let everything that is a warning about an adapter be an error from now on."""
    if strict:
        warnings.simplefilter("error", AdapterWarning)
    return strict


Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        callback=_refuse_warnings,
        help="refuse adapters that are otherwise left out or a warning: damaged ones, another base's name, modules "
        "that the base lacks",
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="read the text as a user's message (a JSON list of messages as these), or as it is; default: as a message "
        "where the base has a chat template",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU")]


def chat_messages(text: str) -> list[dict[str, Any]]:
    """Return the messages of a chat: those of a JSON list, else one user's message with this text."""
    try:
        given = json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError:
        given = None
    entries = cast(list[Any], given) if isinstance(given, list) else []
    if entries and all(isinstance(entry, dict) and {"role", "content"} <= entry.keys() for entry in entries):
        return entries
    return [{"role": "user", "content": text}]


@contextmanager
def _told_on_stderr() -> Generator[None]:
    """Write to standard error what is logged of adapters."""
    log, handler = logging.getLogger("treadle.adapters"), logging.StreamHandler()
    before, log.propagate = log.level, False
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        log.propagate = True


def open_source(bundle: Path | None, source: dict[str, Any], *, strict: bool = False) -> "Bundle":
    """Return the bundle that a command is given, read or made; what was found goes to stderr."""
    from treadle.bundle.base_model import quiet_libraries
    from treadle.engine.preparing import open_bundle

    if source:
        quiet_libraries()
    with _told_on_stderr():
        return open_bundle(bundle, read_options(SourceParams, source), strict=strict)


def takes(**options: type) -> Callable[[Command], Command]:
    """Give a command the flags of options classes; the parameter called like each gets a dict of what was given.

    A flag is called like its field. Where two classes share a field, the later one's flag starts with the name of its
    parameter: `--temperature` and `--routing-temperature`.
    """
    flags: dict[str, tuple[str, Any]] = {}  # flag parameter -> (options parameter, field)
    for owner, kind in options.items():
        for entry in fields(kind):
            flags[f"{owner}_{entry.name}" if entry.name in flags else entry.name] = (owner, entry)

    def decorate(command: Command) -> Command:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name not in options
        ]
        added = [_parameter(name, options[owner], entry) for name, (owner, entry) in flags.items()]

        def run(**values: Any) -> None:
            given: dict[str, dict[str, Any]] = {owner: {} for owner in options}
            for name, (owner, entry) in flags.items():
                value = values.pop(name)
                if value not in (None, []):
                    given[owner][entry.name] = value
            command(**values, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
        return run

    return decorate


def _parameter(name: str, options: type, entry: "Field[Any]") -> inspect.Parameter:
    """Return the command's parameter for one field; every value arrives as text, or None where it was not given."""
    hint = get_type_hints(options)[entry.name]
    is_switch, is_list = hint is bool, get_origin(hint) is tuple
    default = entry.default if isinstance(entry.default, int | float | str | tuple) else ""
    if isinstance(default, tuple):
        default = ", ".join(map(str, default))
    flag = typer.Option(f"--{name.replace('_', '-')}" + f"/--no-{name.replace('_', '-')}" * is_switch)
    flag.help = meanings(options)[entry.name] + f" ({default})" * bool(str(default)) + "; repeatable" * is_list
    kind = bool | None if is_switch else list[str] | None if is_list else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, flag])
