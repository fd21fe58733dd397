"""One declaration an option: its name, type, default, unit and meaning, for Python, command line and files alike."""

from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from treadle.errors import OptionError, OptionProblem, listed, problem_list, unknown_name

Value = TypeVar("Value")


def option(default: Value, meaning: str, allowed: str = "") -> Value:
    """Declare a dataclass field with its default and one line of meaning, which the command line shows as help.

    `allowed` says which values are, for messages; "" where the type says it.
    """
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


def meanings(options: type) -> dict[str, str]:
    """Return the line of meaning of each field of a dataclass."""
    return {entry.name: entry.metadata.get("meaning", "") for entry in fields(options)}


def allowed_values(options: type) -> dict[str, str]:
    """Return in words which values each field of a dataclass may have."""
    hints = get_type_hints(options)
    return {entry.name: entry.metadata.get("allowed") or _in_words(hints[entry.name]) for entry in fields(options)}


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        (inner,) = [choice for choice in get_args(kind) if choice is not NoneType]
        return f"{_in_words(inner)}, or none"
    if get_origin(kind) is Literal:
        return listed(get_args(kind))
    return "true or false" if kind is bool else _described(kind)


def read_options(options: type[Value], given: Mapping[str, Any], *, onto: Value | None = None) -> Value:
    """Return the dataclass `options` with the fields of `given`, over those of `onto` or the defaults.

    Values may be text, as a command line or a file gives them (`"none"`, `"true"`, `"math=0.7,code=0.3"`).

    Raises:
        OptionError: a field does not exist, a value has the wrong type, or the dataclass refuses it.
    """
    hints = get_type_hints(options)
    names = [entry.name for entry in fields(cast(Any, options))]
    values = {name: getattr(onto, name) for name in names} if onto is not None else {}
    problems: list[OptionProblem] = []
    for name, value in given.items():
        try:
            values[name] = parse(hints[name], value, name) if name in names else _refuse(name, names)
        except OptionError as error:
            is_name = name not in names or (get_origin(hints[name]) is Literal and isinstance(value, str))
            allowed = "" if is_name else allowed_values(cast(type, options))[name]
            problems.append(OptionProblem((name,), str(error), value, allowed))
    if problems:
        raise _all_problems(options, values, problems)
    return options(**values)


def _all_problems(options: type, values: Mapping[str, Any], problems: list[OptionProblem]) -> OptionError:
    """Return the error for fields that cannot be read, and for those that can but have problems of their own."""
    unread = {problem.options[0] for problem in problems}
    try:
        options(**values)
    except OptionError as error:
        problems += [each for each in error.problems if not unread & each.fields]
    texts = [problem.text for problem in problems]
    return OptionError(texts[0] if len(texts) == 1 else problem_list("options:", texts), problems)


def _refuse(name: str, names: list[str]) -> NoReturn:
    raise OptionError(unknown_name("option", name, names))


def parse(kind: Any, value: Any, name: str) -> Any:
    """Return `value`, which may be text, as the type `kind` of the option `name`."""
    if get_origin(kind) in (Union, UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if NoneType in get_args(kind):
                return None
        else:
            (kind,) = [choice for choice in get_args(kind) if choice is not NoneType]
    origin = get_origin(kind) or kind
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise OptionError(unknown_name(name, str(value), [str(choice) for choice in get_args(kind)]))
    reader = _numbers if kind == tuple[int, ...] else READERS.get(origin)
    parsed = reader(value) if reader else None
    if parsed is None:
        raise OptionError(f"{name}: expected {_described(kind)}, got {value!r}.")
    return parsed


def _described(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is tuple:
        return "a number or a list of numbers" if kind == tuple[int, ...] else "a text or a list of texts"
    return getattr(origin, "__name__", str(kind)) if get_origin(kind) is None else "name=number pairs"


def _bool(value: Any) -> bool | None:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None


def _int(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _names(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = [value]  # one entry: a stop string may hold commas and spaces
    return tuple(value) if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value) else None


def _numbers(value: Any) -> tuple[int, ...] | None:
    listed: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    single = [part for each in listed for part in (each.split(",") if isinstance(each, str) else [each])]
    numbers = [_int(each) for each in single]
    return None if None in numbers else cast(tuple[int, ...], tuple(numbers))


def _weights(value: Any) -> dict[str, float] | None:
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {name.strip(): number for name, _, number in pairs}
    if not isinstance(value, Mapping):
        return None
    numbers = {str(name): _float(number) for name, number in value.items()}
    return None if None in numbers.values() else cast(dict[str, float], numbers)


READERS: dict[Any, Any] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    tuple: _names,
    Mapping: _weights,
}
"""How the text or value of an option is read, by its type; None = it is not of that type."""
