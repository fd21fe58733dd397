"""One declaration an option: its name, type, default, unit and meaning, for Python, command line and files alike."""

from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from treadle.errors import OptionError, problem_list, unknown_name

Value = TypeVar("Value")


def option(default: Value, meaning: str) -> Value:
    """Declare a dataclass field with its default and one line of meaning, which the command line shows as help."""
    return field(default=default, metadata={"meaning": meaning})


def meanings(options: type) -> dict[str, str]:
    """Return the line of meaning of each field of a dataclass."""
    return {entry.name: entry.metadata.get("meaning", "") for entry in fields(options)}


def read_options(options: type[Value], given: Mapping[str, Any], *, onto: Value | None = None) -> Value:
    """Return the dataclass `options` with the fields of `given`, over those of `onto` or the defaults.

    Values may be text, as a command line or a file gives them (`"none"`, `"true"`, `"math=0.7,code=0.3"`).

    Raises:
        OptionError: a field does not exist, a value has the wrong type, or the dataclass refuses it.
    """
    hints = get_type_hints(options)
    names = [entry.name for entry in fields(cast(Any, options))]
    values = {name: getattr(onto, name) for name in names} if onto is not None else {}
    problems: list[str] = []
    for name, value in given.items():
        try:
            values[name] = parse(hints[name], value, name) if name in names else _refuse(name, names)
        except OptionError as error:
            problems.append(str(error))
    if problems:
        try:  # what can be read may have problems of its own: all in one message
            options(**values)
        except OptionError as error:
            head, *listed = str(error).split("\n  - ")
            problems += listed or [head]
        raise OptionError(problems[0] if len(problems) == 1 else problem_list("options:", problems))
    return options(**values)


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
    numbers = [_int(each) for each in listed]
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
