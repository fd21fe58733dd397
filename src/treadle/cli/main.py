"""The command line: its commands, and how it ends."""

import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from treadle.cli import bundles, doctor, experiments, export, serve, texts
from treadle.common.errors import AdapterWarning, TreadleError
from treadle.common.version import __version__

app = typer.Typer(
    name="treadle",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: with rich it takes half as long again
)
for commands in (texts, bundles, doctor, export, experiments, serve):
    app.add_typer(commands.app)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"treadle {__version__}")
        raise typer.Exit


@app.callback()
def shared(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Blend LoRA adapters token by token, with a router that is computed, not trained."""


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (an error, in one line on stderr) or 2 (wrong usage)."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.simplefilter("ignore", FutureWarning)  # what other libraries say to their callers
        warnings.showwarning = _show_warning
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


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print a warning about an adapter without the line of code that gave it, and others as Python does."""
    if issubclass(category, AdapterWarning):
        print(f"treadle: warning: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))


def _leave_output() -> None:
    """Let what is still buffered go nowhere, as writing it when Python ends would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
