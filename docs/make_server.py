"""Writes what the server says of itself: http.md, environment.md and metrics.md. `python docs/make_server.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from prometheus_client import Counter

from treadle.common.options import meanings
from treadle.serving.openai.app import ENDPOINTS
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.neutral import NEUTRAL
from treadle.serving.openai.openapi import document
from treadle.serving.openai.params import PREFIX, SECRETS, ServeParams

WRITTEN = "Written by `docs/make_server.py`."
HTTP = f"""# HTTP

The routes of `treadle serve`. {WRITTEN} A server has the same as OpenAPI 3.1 at `/openapi.json`.
[Serving](server.md) explains what the fields do together, and who may ask what.

With keys, send `Authorization: Bearer KEY`. A refusal has OpenAI's shape. Its message lists every problem of
the request:

```json
{{"error": {{"message": "...", "type": "invalid_request_error", "param": "prompt", "code": null}}}}
```

| status | when |
|---|---|
| 400 | a field or its value is not allowed, or the prompt is too long (`context_length_exceeded`) |
| 401, 403 | no key or a wrong one; a key that may not do this, or a page or a host that is not allowed |
| 404, 405 | no such model or route; not this method |
| 413, 415 | the body is too large, or not JSON |
| 429 | the queue is full, or one client has too much in it: `Retry-After` says when to come back |
| 500 | this sequence could not be computed (`engine_failed`) |
| 503 | the server is starting or ending |"""
ENVIRONMENT = f"""# Environment variables

{WRITTEN} On a command line a flag wins over the environment, and the environment over the file of `--config`.

| variable | read by | meaning |
|---|---|---|
| `TREADLE_HOME` | everything | the folder of treadle's cache; else `$XDG_CACHE_HOME/treadle`, else `~/.cache/treadle` |
| `TREADLE_CONFIG` | `serve` | YAML file with options, as `--config` |
| `TREADLE_VLLM` | the plugin | a bundle's folder, or the plugin's options as JSON ([vLLM](vllm.md)) |
| `TREADLE_ADMIN_KEY` | `serve`, the plugin | key that may add and remove adapters |
| `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` | everything that reads the hub | as in transformers |
| `OMP_NUM_THREADS` | PyTorch | threads of a product on a CPU |
| `CC` | steps on a GPU | the C compiler that Triton calls |

## Options of the server

Each option of `treadle serve` is a variable. Lists are separated by commas."""
METRICS = f"""# Metric names

{WRITTEN} `GET /metrics` of `treadle serve` gives these figures to Prometheus. Labels are bounded: routes, statuses,
loaded adapters. A histogram has the series `_bucket`, `_sum` and `_count`. What the vLLM plugin adds to vLLM's own
figures is in [vLLM](vllm.md#metrics)."""


def table(head: str, rows: Iterator[tuple[str, ...]]) -> str:
    """Return a Markdown table; `head` has its columns' names."""
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kind(schema: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    if "$ref" in schema:
        return "object"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(each) for each in schema["anyOf"] if each != {"type": "null"}))
    found = schema.get("type", "any")
    return " or ".join(each for each in found if each != "null") if isinstance(found, list) else str(found)


def fields(schema: dict[str, Any], schemas: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield name, type and meaning of the fields of a body that change an answer."""
    for name, field in schema["properties"].items():
        if not field.get(NEUTRAL):
            required = " **(required)**" if name in schema.get("required", []) else ""
            yield f"`{name}`{required}", kind(field), field.get("description", "")


def operation(method: str, path: str, given: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of one route's section."""
    yield f"### {method.upper()} {path}\n\n{given['summary']}."
    address = f"localhost:8000{path.replace('{name}', 'base' if 'models' in path else 'name')}"
    admin = ' -H "Authorization: Bearer $ADMIN"' if "admin key" in given["summary"] else ""
    asked = f" -X {method.upper()}" if method == "delete" else ""
    if body := given.get("requestBody"):
        content = body["content"]["application/json"]
        yield f"```bash\ncurl {address}{admin} -d '{json.dumps(content['example'])}'\n```"
        schema = schemas[content["schema"]["$ref"].rsplit("/", 1)[1]]
        yield table("field | type | value", fields(schema, schemas))
        if neutral := [f"`{name}`" for name, field in schema["properties"].items() if field.get(NEUTRAL)]:
            yield f"Taken only with a value that changes no answer: {', '.join(neutral)}."
    else:
        yield f"```bash\ncurl {address}{asked}{admin}\n```"


def http() -> str:
    """Return http.md, made from the OpenAPI document."""
    given = document(ENDPOINTS)
    schemas = given["components"]["schemas"]
    groups: dict[str, list[str]] = {}
    for path, methods in given["paths"].items():
        for method, each in methods.items():
            groups.setdefault(each["tags"][0], []).extend(operation(method, path, each, schemas))
    order = sorted(groups, key=["Generate", "Models", "Adapters", "Operate"].index)
    sections = [part for tag in order for part in (f"## {tag}", *groups[tag])]
    routing = table(
        "option | type | meaning",
        ((f"`{name}`", kind(each), each["description"]) for name, each in schemas["Treadle"]["properties"].items()),
    )
    return "\n\n".join([HTTP, *sections, f"## The field `treadle`\n\n{routing}"]) + "\n"


def environment() -> str:
    """Return environment.md, made from the server's options."""
    named, meaning = get_type_hints(ServeParams), meanings(ServeParams)
    defaults = ServeParams()

    def rows() -> Iterator[tuple[str, ...]]:
        for name in named:
            value = getattr(defaults, name)
            shown = "" if value in (None, ()) or name in SECRETS else f"`{value}`"
            yield f"`{PREFIX}{name.upper()}`", meaning[name], shown

    return f"{ENVIRONMENT}\n\n{table('variable | meaning | default', rows())}\n"


def metrics() -> str:
    """Return metrics.md, made from the server's registry."""

    def rows() -> Iterator[tuple[str, ...]]:
        for each in vars(Metrics()).values():
            if described := getattr(each, "describe", None):
                [family] = described()
                name = family.name + ("_total" if isinstance(each, Counter) else "")
                labels = ", ".join(f"`{label}`" for label in each._labelnames)
                yield f"`{name}`", family.type, labels, family.documentation

    return f"{METRICS}\n\n{table('name | type | labels | meaning', rows())}\n"


PAGES = {"http.md": http, "environment.md": environment, "metrics.md": metrics}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (Path(__file__).parent / name).write_text(make(), "utf-8")
