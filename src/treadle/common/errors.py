"""The errors that treadle raises for a person to fix.

Each message says what was given, what is allowed and what to do, and lists every problem of its kind at once.
The command line prints them as they are, without a traceback.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

SHOWN = 60
"""Characters of a given value that a message repeats."""
REASON_CHARACTERS = 300
"""Characters of another library's error that a message repeats."""
LONGEST_NAME = 100
"""Characters; nothing is named longer, and to a longer name none is near."""
ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)


class TreadleError(Exception):
    """Anything that the caller can fix: a file, an option, a missing package."""


@dataclass(frozen=True)
class OptionProblem:
    """One wrong option, in parts: a server names options in another way than a command line.

    Attributes:
        options: the option to change, as in `every` or `fixed.math`, then those that it clashes with.
        text: the whole sentence, as Python and the command line have it.
        given: the value.
        allowed: which values are, in words; "" where `text` is the better sentence, such as one with the nearest name.
    """

    options: tuple[str, ...]
    text: str
    given: Any = None
    allowed: str = ""

    @property
    def fields(self) -> set[str]:
        """The fields that it is about."""
        return {option.partition(".")[0] for option in self.options}


class OptionError(TreadleError, ValueError):
    """An option has a value that is not allowed; `problems` has the parts of the message."""

    def __init__(self, message: str, problems: Sequence[OptionProblem] = ()) -> None:
        super().__init__(message)
        head, *listed = message.split("\n  - ")  # as `problem_list` made it
        self.problems = list(problems) or [OptionProblem((), text) for text in listed or [head]]


class AdapterError(TreadleError):
    """An adapter cannot be blended, or its name is unknown."""


class AdapterWarning(AdapterError, UserWarning):
    """An adapter will act, but perhaps not as meant; `warnings.simplefilter("error", AdapterWarning)` refuses it."""


class BundleError(TreadleError):
    """A bundle folder is incomplete, damaged or not meant for this use."""


class ModelError(TreadleError):
    """A base model cannot be found or loaded."""


class DataError(TreadleError):
    """A data file or one of its rows cannot be read."""


def problem_list(head: str, problems: Iterable[str]) -> str:
    """Return one message: `head`, then a line for each problem; a problem that lists others is indented."""
    return "\n".join([head, *("  - " + problem.replace("\n", "\n    ") for problem in problems)])


def one_or_list(head: str, problems: Sequence[str]) -> str:
    """Return the message of a single problem as it is, and `problem_list` of several."""
    return problems[0] if len(problems) == 1 else problem_list(head, problems)


def raise_all(problems: Sequence[str]) -> None:
    """Raise one OptionError that says all problems, each once, if there are any."""
    if problems:
        raise OptionError("\n".join(dict.fromkeys(problems)))


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return the message for a name that does not exist, with the nearest one and all that do."""
    names = list(allowed)
    close = get_close_matches(name, names, n=1) if len(name) <= LONGEST_NAME else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {shown(name)}.{hint} Allowed: {', '.join(names) or 'none'}."


def shown(value: Any) -> str:
    """Return a value for a message: a text in quotes, else JSON; a long one is cut."""
    pieces = [repr(value[:SHOWN])] if isinstance(value, str) else ENCODER.iterencode(value)
    text = ""
    for piece in pieces:  # of a long list, only its beginning is written
        text += piece
        if len(text) > SHOWN:
            return text[: SHOWN - 4] + " ..."
    return text


def told(value: Any) -> str:
    """Return a value of Python for a message, as its repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."


def reason_of(error: BaseException) -> str:
    """Return an error as one line: its type, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:REASON_CHARACTERS]}" if said else type(error).__name__


def first_of(entries: Sequence[Any], most: int, say: Callable[[Any], str] = str) -> list[str]:
    """Return the first `most` entries as texts, and behind them how many more there are."""
    more = [f"and {len(entries) - most} more"] if len(entries) > most else []
    return [*map(say, entries[:most]), *more]


def listed(values: Iterable[Any]) -> str:
    """Return values as a message lists what is allowed: 'a', 'b' or 'c'."""
    *most, last = map(shown, values)
    return f"{', '.join(most)} or {last}" if most else last


def collect(problems: list[str], steps: Iterable[Callable[[], Any]]) -> list[Any]:
    """Run steps and return the results of those that worked; what the others say is added to `problems`."""
    results: list[Any] = []
    for step in steps:
        try:
            results.append(step())
        except TreadleError as error:
            problems.append(str(error))
    return results
