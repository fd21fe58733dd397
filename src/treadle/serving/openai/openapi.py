"""The OpenAPI document, made from the endpoints and their bodies."""

import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from treadle.common.options import meanings
from treadle.common.params import RoutingParams
from treadle.common.version import __version__
from treadle.serving.openai.bodies import Body, Json
from treadle.serving.openai.targets import TREADLE_FIELDS

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One endpoint of the server.

    Attributes:
        method: the HTTP method.
        path: as Starlette writes it.
        handler: answers the requests.
        summary: one line for the OpenAPI document; "" leaves the endpoint out of it.
        body: the model of the request's body, if it has one.
        tag: the group in the OpenAPI document.
    """

    method: str
    path: str
    handler: Handler
    summary: str = ""
    body: type[Body] | None = None
    tag: str = ""


NAME: Json = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@cache
def document(endpoints: tuple[Endpoint, ...]) -> Json:
    """Return the OpenAPI document of endpoints."""
    bodies = [(each.body, "validation") for each in endpoints if each.body is not None]
    _, schemas = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: Json = {}
    for endpoint in endpoints:
        if endpoint.summary:
            path = endpoint.path.replace(":path}", "}")  # without Starlette's converter
            paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, has_name="{name}" in path)
    routing = _routing()
    parts = {"Error": ERROR, "RoutingParams": routing, "Treadle": _treadle(routing)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "treadle", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**_refer(schemas["$defs"]), **parts},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _routing() -> Json:
    """Return the schema of the routing options; an option left out takes the bundle's value."""
    meaning = meanings(RoutingParams)
    schema = TypeAdapter(RoutingParams).json_schema()
    properties = {
        name: {**{key: each for key, each in option.items() if key != "default"}, "description": meaning[name]}
        for name, option in schema["properties"].items()
    }
    return {**schema, "properties": properties}


def _treadle(routing: Json) -> Json:
    """Return the schema of the field `treadle`: the routing options and two more fields."""
    names = {"type": ["array", "null"], "items": {"type": "string"}, "description": "only these adapters take part"}
    trace = {"type": "boolean", "description": "each choice carries its weights and what they were made from"}
    properties = {**routing["properties"], **dict(zip(TREADLE_FIELDS, (names, trace), strict=True))}
    return {**routing, "title": "Treadle", "properties": properties, "additionalProperties": False}


def _refer(schemas: Json) -> Json:
    """Return the schemas of bodies, in which `treadle` refers to its own schema."""
    reference = {"anyOf": [{"$ref": "#/components/schemas/Treadle"}, {"type": "null"}]}
    referring = copy.deepcopy(schemas)
    for schema in referring.values():
        if field := schema["properties"].get("treadle"):
            schema["properties"]["treadle"] = {"description": field["description"], **reference}
    return referring


def _operation(endpoint: Endpoint, *, has_name: bool) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {"description": "Refused: the message says what was given and what is allowed", "content": error}
    operation: Json = {
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
        "responses": {"200": {"description": "Done"}, "4XX": refused, "5XX": refused},
    }
    if has_name:
        operation["parameters"] = [NAME]
    if endpoint.body is not None:
        schema = {"$ref": f"#/components/schemas/{endpoint.body.__name__}"}
        content = {"schema": schema, "example": endpoint.body.EXAMPLE}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return operation
