"""The OpenAPI document, from the bodies' own declarations."""

import copy
from functools import cache

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from treadle.common.options import meanings
from treadle.common.params import RoutingParams
from treadle.common.version import __version__
from treadle.serving.openai.bodies import (
    AdapterBody,
    Body,
    ChatBody,
    CompletionBody,
    Json,
    LoadBody,
    RouteBody,
    UnloadBody,
)
from treadle.serving.openai.targets import BESIDE

BODIES: dict[str, tuple[type[Body], str]] = {
    "/v1/chat/completions": (ChatBody, "Answer a chat, whole or as server-sent events"),
    "/v1/completions": (CompletionBody, "Continue texts, whole or as server-sent events"),
    "/v1/route": (RouteBody, "Explain how a text is weighed"),
    "/v1/adapters": (AdapterBody, "Add an adapter (admin key)"),
    "/v1/load_lora_adapter": (LoadBody, "Add an adapter, as vLLM has it (admin key)"),
    "/v1/unload_lora_adapter": (UnloadBody, "Remove an adapter, as vLLM has it (admin key)"),
}
READS = {
    "/live": "The process answers",
    "/health": "Requests are accepted",
    "/metrics": "Figures for Prometheus",
    "/v1/models": "What a request may name as model",
    "/v1/adapters": "The adapters that are loaded (admin key)",
}
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
def document() -> Json:
    """Return the document; it is the same for every server."""
    kinds = [(kind, "validation") for kind, _ in BODIES.values()]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: Json = {path: {"get": _operation(summary)} for path, summary in READS.items()}
    paths["/v1/models/{name}"] = {"get": {**_operation("One of them"), "parameters": [NAME]}}
    paths["/v1/adapters/{name}"] = {"delete": {**_operation("Remove an adapter (admin key)"), "parameters": [NAME]}}
    for path, (kind, summary) in BODIES.items():
        reference = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
        body = {"required": True, "content": {"application/json": reference}}
        paths.setdefault(path, {})["post"] = {**_operation(summary), "requestBody": body}
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
    """Return the schema of the options of routing; where a request leaves one out, the bundle's counts."""
    meaning = meanings(RoutingParams)
    schema = TypeAdapter(RoutingParams).json_schema()
    properties = {
        name: {**{key: each for key, each in option.items() if key != "default"}, "description": meaning[name]}
        for name, option in schema["properties"].items()
    }
    return {**schema, "properties": properties}


def _treadle(routing: Json) -> Json:
    """Return the schema of the field `treadle`: the options of routing, and what is beside them."""
    names = {"type": ["array", "null"], "items": {"type": "string"}, "description": "only these adapters take part"}
    trace = {"type": "boolean", "description": "each choice carries its weights and what they were made from"}
    properties = {**routing["properties"], **dict(zip(BESIDE, (names, trace), strict=True))}
    return {**routing, "title": "Treadle", "properties": properties, "additionalProperties": False}


def _refer(schemas: Json) -> Json:
    """Return the schemas of bodies with a reference to that of `treadle` in them."""
    reference = {"anyOf": [{"$ref": "#/components/schemas/Treadle"}, {"type": "null"}]}
    referring = copy.deepcopy(schemas)
    for schema in referring.values():
        if field := schema["properties"].get("treadle"):
            schema["properties"]["treadle"] = {"description": field["description"], **reference}
    return referring


def _operation(summary: str) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {"description": "Refused: the message says what was given and what is allowed", "content": error}
    return {"summary": summary, "responses": {"200": {"description": "Done"}, "4XX": refused, "5XX": refused}}
