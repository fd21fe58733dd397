"""The errors that treadle raises for a person to fix.

Each message says what was given, what is allowed and what to do, and lists every problem of its kind at once.
The command line prints them as they are, without a traceback.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class TreadleError(Exception):
    """Anything that the caller can fix: a file, an option, a missing package."""


class OptionError(TreadleError, ValueError):
    """An option has a value that is not allowed."""


class AdapterError(TreadleError):
    """A PEFT folder cannot be blended, or an adapter's name is unknown."""


class BundleError(TreadleError):
    """A bundle folder is incomplete, damaged or not meant for this use."""


class ModelError(TreadleError):
    """A base model cannot be found or loaded."""


class DataError(TreadleError):
    """A data file or one of its rows cannot be read."""


def problem_list(head: str, problems: Iterable[str]) -> str:
    """Return one message: `head`, then a line for each problem."""
    return "\n".join([head, *(f"  - {problem}" for problem in problems)])


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return the message for a name that does not exist, with the nearest one and all that do."""
    names = list(allowed)
    close = get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(names) or 'none'}."


def collect(problems: list[str], steps: Iterable[Callable[[], Any]]) -> list[Any]:
    """Run steps and return the results of those that worked; what the others say is added to `problems`."""
    results: list[Any] = []
    for step in steps:
        try:
            results.append(step())
        except TreadleError as error:
            problems.append(str(error))
    return results
