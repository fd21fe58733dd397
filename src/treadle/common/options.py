"""One declaration an option: its name, type, default, unit and meaning, for Python, command line and files alike."""

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache
from math import isfinite
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from treadle.common.errors import OptionError, OptionProblem, listed, one_or_list, problem_list, told, unknown_name

Value = TypeVar("Value")
Kind = TypeVar("Kind")
TRUTH_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""Texts of a switch."""


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, or of each number in a list or mapping; None = no limit."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, number: float) -> bool:
        """Whether the number is finite and within the limits."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def in_words(self) -> str:
        """Return the limits as they follow "a number": " of at least 1", " from 0 to 1" or ""."""
        if self.at_least is not None and self.at_most is not None:
            return f" from {self.at_least} to {self.at_most}"
        words = {"of at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        limits = [f"{word} {limit}" for word, limit in words.items() if limit is not None]
        return f" {' and '.join(limits)}" if limits else ""


def option(
    default: Value,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Value:
    """Declare a dataclass field: its default, one line of meaning (the command line's help), the limits of its numbers.

    `check_fields` refuses what is not of the field's type or beyond its limits.
    """
    return field(default=default, metadata={"meaning": meaning, "bounds": Bounds(at_least, above, at_most, below)})


def meanings(options: type) -> dict[str, str]:
    """Return the line of meaning of each field of a dataclass."""
    return {entry.name: entry.metadata.get("meaning", "") for entry in fields(options)}


def explained(options: type[Kind]) -> type[Kind]:
    """Add the line of meaning of each field to a dataclass's docstring, where `help` shows it."""
    lines = [f"    {name}: {meaning}." for name, meaning in meanings(options).items()]
    options.__doc__ = "\n".join([options.__doc__ or "", "", "Attributes:", *lines])
    return options


@cache
def _hints(options: type) -> dict[str, Any]:
    return get_type_hints(options)


def _bounds(entry: "Field[Any]") -> Bounds:
    return entry.metadata.get("bounds", Bounds())


def _in_words(kind: Any, bounds: Bounds, given: Any = None) -> str:
    """Return the values an option may have, as a text has them where a text was given."""
    kind, may_be_none = _without_none(kind)
    words = {
        bool: "true or false",
        int: f"a whole number{bounds.in_words()}",
        float: f"a finite number{bounds.in_words()}",
        str: "a text",
        tuple[int, ...]: f"whole numbers{bounds.in_words()}",
    }
    if get_origin(kind) is Literal:
        text = listed(get_args(kind))
    elif get_origin(kind) is Mapping:
        example = "name=number pairs like math=0.7" if isinstance(given, str) else 'an object like {"math": 0.7}'
        text = f"{example}, each a finite number{bounds.in_words()}"
    else:
        text = words.get(kind, "a text or a list of texts")
    return f"{text}, or none" if may_be_none else text


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether None is one of its values."""
    if get_origin(kind) not in (Union, UnionType):
        return kind, False
    (inner,) = [choice for choice in get_args(kind) if choice is not NoneType]
    return inner, True


def check_fields(options: Any) -> list[OptionProblem]:
    """Check each field of an options dataclass against its type and limits; return what is wrong.

    What is right becomes plain Python: numpy's numbers int and float, lists tuples, a single text a tuple of it.
    """
    hints = _hints(type(options))
    problems: list[OptionProblem] = []
    for entry in fields(options):
        given, bounds = getattr(options, entry.name), _bounds(entry)
        kind, may_be_none = _without_none(hints[entry.name])
        if given is None and may_be_none:
            continue
        value = _checked(kind, given, bounds)
        if value is not None:
            object.__setattr__(options, entry.name, value)
            continue
        allowed = _in_words(hints[entry.name], bounds)
        if get_origin(kind) is Literal and isinstance(given, str):
            names = [str(choice) for choice in get_args(kind)]
            problems.append(OptionProblem((entry.name,), unknown_name(entry.name, given, names)))
        elif get_origin(kind) is Mapping and (wrong := _wrong_entries(given, bounds)):
            problems += [problem_of(f"{entry.name}.{name}", number, _in_words(float, bounds)) for name, number in wrong]
        else:
            words = _in_words(hints[entry.name], bounds, given)
            problems.append(
                OptionProblem((entry.name,), f"{entry.name} must be {words}, not {told(given)}", given, allowed)
            )
    return problems


def problem_of(name: str, given: Any, allowed: str) -> OptionProblem:
    """Return the problem that an option has a value that is not allowed."""
    return OptionProblem((name,), f"{name} must be {allowed}, not {told(given)}", given, allowed)


def raise_problems(head: str, problems: Sequence[OptionProblem]) -> None:
    """Raise one OptionError that lists all problems, if there are any."""
    if problems:
        raise OptionError(problem_list(head, [problem.text for problem in problems]), problems)


def _checked(kind: Any, given: Any, bounds: Bounds) -> Any:
    """Return a value as the type `kind`, without None; None where it is not of it or beyond its bounds."""
    origin = get_origin(kind)
    if origin is Literal:
        return given if any(type(given) is type(choice) and given == choice for choice in get_args(kind)) else None
    if origin is tuple:
        return _checked_list(get_args(kind)[0], given, bounds)
    if origin is Mapping:
        return None if not _is_named(given) or _wrong_entries(given, bounds) else dict(given)
    if kind in (int, float):
        return _number(kind, given, bounds)
    return given if isinstance(given, kind) else None


def _checked_list(kind: type, given: Any, bounds: Bounds) -> tuple[Any, ...] | None:
    listed = [given] if isinstance(given, str | Integral) else given
    if not isinstance(listed, list | tuple):
        return None
    values = [_checked(kind, each, bounds) for each in cast(Sequence[Any], listed)]
    return None if None in values else tuple(values)


def _number(kind: type, given: Any, bounds: Bounds) -> Any:
    """Return a number of Python's or numpy's as an int or a float within bounds, else None."""
    if isinstance(given, bool) or not isinstance(given, Integral if kind is int else Real):
        return None
    try:
        number = kind(cast(Any, given))
        return number if isfinite(number) and bounds.hold(number) else None
    except OverflowError:  # a whole number beyond every float
        return None


def _is_named(given: Any) -> bool:
    return isinstance(given, Mapping) and all(isinstance(name, str) for name in cast(Mapping[Any, Any], given))


def _wrong_entries(given: Any, bounds: Bounds) -> list[tuple[str, Any]]:
    """Return the entries of a mapping of names whose numbers are not allowed; none where it is no such mapping."""
    entries = list(cast(Mapping[str, Any], given).items()) if _is_named(given) else []
    return [(name, number) for name, number in entries if _number(float, number, bounds) is None]


def read_options(options: type[Value], given: Mapping[str, Any], *, onto: Value | None = None) -> Value:
    """Return the dataclass `options` with the fields of `given`, over those of `onto` or the defaults.

    Values may be text, as a command line or a file gives them (`"none"`, `"true"`, `"math=0.7,code=0.3"`).

    Raises:
        OptionError: a field does not exist, or the dataclass refuses a value; lists every problem.
    """
    hints = _hints(options)
    names = [entry.name for entry in fields(cast(Any, options))]
    values = {name: getattr(onto, name) for name in names} if onto is not None else {}
    values |= {name: parse(hints[name], value) for name, value in given.items() if name in names}
    unknown = [OptionProblem((name,), unknown_name("option", name, names)) for name in given if name not in names]
    if not unknown:
        return options(**values)
    problems = unknown
    try:
        options(**values)
    except OptionError as error:
        problems = [*unknown, *error.problems]
    raise OptionError(one_or_list("options:", [problem.text for problem in problems]), problems)


def parse(kind: Any, value: Any) -> Any:
    """Read a text as a value of the type `kind`; leave what cannot be read for `check_fields` to refuse."""
    kind, may_be_none = _without_none(kind)
    if may_be_none and isinstance(value, str) and value.lower() == "none":
        return None
    if get_origin(kind) is Mapping:
        return _parsed_entries(value)
    if kind == tuple[int, ...]:
        given: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        parts = [part for each in given for part in (each.split(",") if isinstance(each, str) else [each])]
        return [_parsed(int, part) for part in parts]
    return _parsed(kind, value)


def _parsed_entries(value: Any) -> Any:
    """Return name=number pairs as a mapping."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(mark for _, mark, _ in pairs):
            return value
        value = {name.strip(): number for name, _, number in pairs}
    if not isinstance(value, Mapping):
        return value
    return {name: _parsed(float, number) for name, number in cast(Mapping[Any, Any], value).items()}


def _parsed(kind: Any, value: Any) -> Any:
    """Return the text of a truth value or number as one."""
    if not isinstance(value, str):
        return value
    if kind is bool:
        return TRUTH_WORDS.get(value.lower(), value)
    try:
        return kind(value) if kind in (int, float) else value
    except ValueError:
        return value


def named(entries: Sequence[str], flag: str) -> dict[str, str]:
    """Return entries of the form name=VALUE as a mapping; an OptionError says which have another form."""
    split = [entry.partition("=") for entry in entries]
    if bad := [entry for entry, (name, _, value) in zip(entries, split, strict=True) if not name or not value]:
        raise OptionError(f"{flag} takes name=PATH, not {', '.join(map(repr, bad))}.")
    names = [name for name, _, _ in split]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"{flag} names {', '.join(repeated)} twice.")
    return {name: value for name, _, value in split}
