"""Reads the bodies of requests, and says every problem of one in a single message."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
from pydantic import ValidationError

from treadle.common.documents import check_surrogates
from treadle.common.errors import shown, unknown_name
from treadle.serving.openai.bodies import Body, BodyKind, Json
from treadle.serving.openai.failures import MOST_LISTED, Failure, Problem, Problems, cut
from treadle.serving.openai.neutral import NEUTRAL
from treadle.serving.openai.params import ServeParams

MOST_FIELDS = 256
"""Of a JSON object in a body."""
MOST_INNER = 20_000
"""Lists and objects in a body; the garbage collector looks at each many times while more are made."""
MOST_VALUES = 500_000
"""Values in a body; no other thread runs while they are read, which takes 50 ms."""
GZIP = b"\x1f\x8b"


def read_object(raw: bytes, encoding: str = "") -> Json:
    """Return the JSON object that a body is; `encoding` is that of its content, as the client says."""
    if encoding not in ("", "identity") or raw.startswith(GZIP):
        given = f"Content-Encoding: got {shown(encoding or 'gzip')}"
        raise Failure(415, f"{given}; allowed: none, send the body as it is", code="unsupported_encoding")
    inner, values = _count(raw)
    if inner > MOST_INNER:
        raise Failure(400, f"the body: got {inner} lists and objects; allowed: at most {MOST_INNER}")
    if values > MOST_VALUES:
        raise Failure(400, f"the body: got {values} values; allowed: at most {MOST_VALUES}")
    try:
        text = raw.decode("utf-8-sig")
        given = json.loads(text, object_pairs_hook=_small)
        check_surrogates(text, given)
    except (ValueError, RecursionError) as error:
        raise Failure(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(given, dict):
        raise Failure(400, f"the body: got {shown(given)}; allowed: a JSON object")
    return cast(Json, given)


def _count(raw: bytes) -> tuple[int, int]:
    """Return how many lists and objects a JSON text has, and how many values; 0 where even its strings have few."""
    if raw.count(b"[") + raw.count(b"{") <= MOST_INNER and raw.count(b",") < MOST_VALUES:
        return 0, 0
    # several short passes in linear time, between which other threads run
    text = np.frombuffer(raw.replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8)
    is_outside = np.cumsum(text == ord('"'), dtype=np.uint8) % 2 == 0  # of strings
    counts = np.bincount(text[is_outside], minlength=256)
    return int(counts[ord("[")] + counts[ord("{")]), int(counts[ord(",")]) + 1


def _small(pairs: list[tuple[str, Any]]) -> Json:
    """Return a JSON object, which nobody needs with more fields: each that is unknown would be looked up."""
    if len(pairs) > MOST_FIELDS:
        allowed = f"at most {MOST_FIELDS}"
        raise Failure(
            400, f"the body: got an object of {len(pairs)} fields; allowed: {allowed}", code="too_many_fields"
        )
    return dict(pairs)


def read_body(kind: type[BodyKind], given: Json, limits: ServeParams) -> tuple[BodyKind, Problems]:
    """Return the body and its problems; where a field is wrong, the body has an example's.

    So what is right in it can be checked further, and one message can list everything.
    """
    try:
        return kind.model_validate(given, context=limits), []
    except ValidationError as error:
        entries = error.errors(include_url=False)
        right = given.keys() - {entry["loc"][0] for entry in entries}
        body = kind.model_validate({**kind.EXAMPLE, **{name: given[name] for name in right}}, context=limits)
        return body, _problems(kind, entries, limits)


def _problems(kind: type[Body], entries: Sequence[Mapping[str, Any]], limits: ServeParams) -> Problems:
    """Return what pydantic found, once a place; many are not worded but counted, as wording takes the most time."""
    schema = kind.model_json_schema()
    found = {entry["loc"]: entry for entry in reversed(entries)}
    worded = [_problem(entry, schema, limits) for entry in islice(reversed(found.values()), MOST_LISTED)]
    return [*worded, Problem.others(len(found) - len(worded))] if len(found) > len(worded) else worded


def _problem(entry: Mapping[str, Any], schema: Json, limits: ServeParams) -> Problem:
    loc, place = entry["loc"], _place(entry["loc"])
    description, known = _describe(schema, loc)
    allowed = with_limits(description, limits)
    if entry["type"] == "extra_forbidden":
        return Problem(place, f"{cut(place)}: {unknown_name('field', str(loc[-1]), known)}")
    if entry["type"] == "missing":
        return Problem(place, f"{place} is missing; give {allowed}")
    value = entry["input"]
    if isinstance(value, list) and entry["msg"].endswith("too many"):
        return Problem(place, f"{place}: got a list of {len(cast(list[Any], value))}; allowed: {allowed}")
    return Problem.of(place, value, allowed)


def with_limits(description: str, limits: ServeParams) -> str:
    """Return what a field's description allows, with the server's limits in the place of its options' names."""
    return re.sub("--max-[a-z]+", lambda found: str(getattr(limits, found[0][2:].replace("-", "_"))), description)


def _place(loc: tuple[int | str, ...]) -> str:
    """Return where in a body something is: messages[0].role."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _describe(schema: Json, loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """Return what is allowed at a place in a body, and the fields of the object that it is in."""
    node, known, description = schema, list[str](), ""
    for part in loc:
        inner = _resolved(schema, node)
        if isinstance(part, int):
            node = inner.get("items", node)
        else:
            known = [name for name, each in inner.get("properties", {}).items() if NEUTRAL not in each]
            node = inner.get("properties", {}).get(part, node)
        description = node.get("description", description)
    return description, known


def _resolved(schema: Json, node: Json) -> Json:
    """Return the object or list that a schema means, behind references and beside null."""
    for choice in node.get("anyOf", ()):
        if choice.get("type") != "null":
            node = choice
            break
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
