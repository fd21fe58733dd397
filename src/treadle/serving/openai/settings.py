"""Where the server's options come from: the command line over the environment over a file over the defaults."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_origin, get_type_hints

from treadle.common.documents import check_depth, read_text
from treadle.common.errors import OptionError, problem_list, unknown_name
from treadle.common.options import meanings, read_options
from treadle.serving.openai.params import SECRETS, ServeParams

PREFIX = "TREADLE_"
"""Of the environment variables: TREADLE_PORT, TREADLE_API_KEY ..."""
MOST_FILE = 1 << 20
"""Bytes of the file."""
MOST_BRACKETS = 256
CONFIG_VARIABLE = "TREADLE_CONFIG"


def read_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None
) -> tuple[ServeParams, dict[str, str]]:
    """Return the options, and for each field where its value comes from.

    Args:
        flags: fields given on the command line.
        environment: of the process.
        file: YAML with fields as keys; None takes the one that TREADLE_CONFIG names, if any.

    Raises:
        OptionError: an unknown key, or a value that is not allowed.
    """
    file = file or (Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None)
    sources: list[tuple[str, Mapping[str, Any]]] = [
        (f"file {file}", read_file(file) if file else {}),
        ("environment", read_environment(environment)),
        ("command line", flags),
    ]
    origins = {entry.name: "default" for entry in fields(ServeParams)}
    values: dict[str, Any] = {}
    for source, given in sources:
        values |= given
        origins |= dict.fromkeys(given, source)
    return read_options(ServeParams, values), origins


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that environment variables give; of a list, the entries are separated by commas."""
    hints = get_type_hints(ServeParams)
    given: dict[str, Any] = {}
    for name, kind in hints.items():
        text = environment.get(PREFIX + name.upper())
        if text:
            given[name] = [part for part in text.split(",") if part] if get_origin(kind) is tuple else text
    return given


def read_file(file: Path) -> dict[str, Any]:
    """Return the fields of a YAML file; an unknown key is an OptionError that names the nearest."""
    import yaml

    try:
        text = read_text(file, OptionError, MOST_FILE)
        if text.count("[") + text.count("{") > MOST_BRACKETS:  # yaml's time grows with their square
            raise OptionError(f"it has more than {MOST_BRACKETS} lists and objects")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise OptionError("an alias (*name) is not read, as a few may stand for more than memory holds")
        document: Any = yaml.safe_load(text)
        check_depth(document)
    except (ValueError, yaml.YAMLError) as error:  # yaml makes dates and numbers by Python's own constructors
        raise OptionError(f"config {str(file)!r} cannot be read: {error}") from error
    except RecursionError as error:
        raise OptionError(f"config {str(file)!r} cannot be read: it is nested too deeply") from error
    if not isinstance(document, dict):
        raise OptionError(f"config {str(file)!r} holds no keys; expected lines like port: 8000")
    given = {str(key).replace("-", "_"): value for key, value in cast(dict[Any, Any], document).items()}
    known = [entry.name for entry in fields(ServeParams)]
    if unknown := [unknown_name("key", key, known) for key in given if key not in known]:
        raise OptionError(problem_list(f"config {str(file)!r}:", unknown))
    return given


def print_settings(params: ServeParams, origins: Mapping[str, str]) -> str:
    """Return the options as YAML that can be read back, each with its source and meaning; keys are not shown."""
    lines: list[str] = []
    for name, meaning in meanings(ServeParams).items():
        value = getattr(params, name)
        is_secret = name in SECRETS and value
        plain = list(value) if isinstance(value, tuple) else value
        text = f"# {name}: (not shown)" if is_secret else f"{name}: {json.dumps(plain)}"  # JSON is YAML
        lines.append(f"{text}  # {origins[name]}; {meaning}")
    return "\n".join(lines)
