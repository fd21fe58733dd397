"""OpenTelemetry spans, one a request, where the package is there; without an SDK that is set up they cost nothing.

`opentelemetry-instrument treadle serve ...`, or any other way of setting up the SDK, decides where they go.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

HAS_PACKAGE = find_spec("opentelemetry") is not None
ATTRIBUTES = {
    "id": "treadle.request_id",
    "path": "http.route",
    "status": "http.response.status_code",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "tokens": "gen_ai.usage.output_tokens",
    "error": "error.type",
}
"""What of a request's log line goes into its span; no texts."""


@contextmanager
def span(headers: Mapping[str, str], line: Callable[[], Mapping[str, Any]]) -> Generator[None]:
    """Trace what happens inside, as a part of the trace that the headers name; `line` tells at the end what it was."""
    if not HAS_PACKAGE:
        yield
        return
    from opentelemetry import propagate, trace

    kind = trace.SpanKind.SERVER
    tracer = trace.get_tracer("treadle")
    with tracer.start_as_current_span("request", context=propagate.extract(headers), kind=kind) as current:
        yield
        if current.is_recording():
            known = line()
            current.update_name(f"{known['method']} {known['path']}")
            for name, attribute in ATTRIBUTES.items():
                if known.get(name) is not None:
                    current.set_attribute(attribute, known[name])
