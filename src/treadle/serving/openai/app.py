"""The web application: its endpoints, the short ones of them, and the answers to requests that fit none."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware as Layer
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from treadle.bundle.bundle import Bundle
from treadle.engine.engine import Engine
from treadle.serving.openai import adapters, generating, page, route
from treadle.serving.openai.bodies import (
    AdapterBody,
    ChatBody,
    CompletionBody,
    Json,
    LoadBody,
    RouteBody,
    UnloadBody,
)
from treadle.serving.openai.failures import Failure, refusal
from treadle.serving.openai.keys import Keyring
from treadle.serving.openai.middleware import Middleware, RequestContext
from treadle.serving.openai.openapi import Endpoint, document
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.state import ServerState


async def models(request: Request) -> Response:
    """GET /v1/models: the names that `model` may have."""
    state, caller = ServerState.of(request), RequestContext.of(request).caller
    return JSONResponse({"object": "list", "data": [_card(state, name) for name in state.targets.models(caller)]})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    state, name = ServerState.of(request), request.path_params["name"]
    if unknown := state.targets.unknown(name, RequestContext.of(request).caller):
        raise refusal(unknown)
    return JSONResponse(_card(state, name))


def _card(state: ServerState, name: str) -> Json:
    is_adapter = name in state.engine.adapter_names
    parent = {"parent": "base", "root": name} if is_adapter else {"parent": None, "root": state.bundle.base_model}
    card = {"id": name, "object": "model", "created": 0, "owned_by": "treadle", "max_model_len": state.engine.context}
    return {**card, "has_chat_template": bool(state.engine.tokenizer.chat_template), **parent}


async def live(request: Request) -> Response:
    """GET /live: the process answers."""
    return JSONResponse({"status": "live"})


async def health(request: Request) -> Response:
    """GET /health: requests are accepted; 503 while shutting down, or after the engine has failed."""
    is_ready = ServerState.of(request).scheduler.is_ready
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics: Prometheus' text format. It names all adapters, so a key that is limited to some may not see it."""
    if RequestContext.of(request).caller.adapters is not None:
        raise Failure(403, "the figures name all adapters: send a key that is not limited to some", code="limited_key")
    return Response(ServerState.of(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    """GET /openapi.json: the schema of this server's requests."""
    return JSONResponse(document(ENDPOINTS))


GENERATE, MODELS, ADAPTERS, OPERATE = "Generate", "Models", "Adapters", "Operate"
"""Groups of endpoints in the OpenAPI document."""
ENDPOINTS = (
    Endpoint("GET", "/live", live, "The process answers", tag=OPERATE),
    Endpoint("GET", "/health", health, "Requests are accepted", tag=OPERATE),
    Endpoint("GET", "/metrics", metrics, "Figures for Prometheus", tag=OPERATE),
    Endpoint("GET", "/openapi.json", openapi),
    Endpoint(
        "GET",
        "/v1/models",
        models,
        "Names that a request may give as model, each with `max_model_len` (tokens) and `has_chat_template`",
        tag=MODELS,
    ),
    Endpoint("GET", "/v1/models/{name:path}", model, "One of them", tag=MODELS),
    Endpoint(
        "POST",
        "/v1/chat/completions",
        generating.chat,
        "Answer a chat, whole or as server-sent events",
        ChatBody,
        GENERATE,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        generating.complete,
        "Continue texts, whole or as server-sent events",
        CompletionBody,
        GENERATE,
    ),
    Endpoint("POST", "/v1/route", route.explain_text, "Explain how a text is weighed", RouteBody, GENERATE),
    Endpoint("GET", "/v1/adapters", adapters.adapters, "The adapters that are loaded (admin key)", tag=ADAPTERS),
    Endpoint("POST", "/v1/adapters", adapters.add, "Add an adapter (admin key)", AdapterBody, ADAPTERS),
    Endpoint("DELETE", "/v1/adapters/{name:path}", adapters.remove, "Remove an adapter (admin key)", tag=ADAPTERS),
    Endpoint(
        "POST",
        "/v1/load_lora_adapter",
        adapters.load,
        "Add an adapter, as vLLM has it (admin key)",
        LoadBody,
        ADAPTERS,
    ),
    Endpoint(
        "POST",
        "/v1/unload_lora_adapter",
        adapters.unload,
        "Remove an adapter, as vLLM has it (admin key)",
        UnloadBody,
        ADAPTERS,
    ),
)
"""A new endpoint is a line here, its body in `bodies`, and its handler in a file beside this one."""
ROUTES = [Route(each.path, each.handler, methods=[each.method]) for each in ENDPOINTS]


def make_app(bundle: Bundle, engine: Engine, params: ServeParams, keys: Keyring) -> Starlette:
    """Return the application that serves an engine; the engine's thread runs while the application does."""
    state = ServerState.make(bundle, engine, params)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        state.start()
        yield
        await state.shut_down()

    routes = [*ROUTES, *page.routes()] if params.page else ROUTES
    paths: dict[Any, str] = {route.endpoint: route.path for route in routes}
    cors = Layer(CORSMiddleware, allow_origins=params.cors_origin, allow_methods=["*"], allow_headers=["*"])
    outermost = Layer(
        Middleware,
        params=params,
        keys=keys,
        metrics=state.metrics,
        is_ready=lambda: state.scheduler.is_ready,
        paths=paths,
    )
    app = Starlette(
        routes=routes,
        middleware=[*([cors] if params.cors_origin else []), outermost],
        exception_handlers={Failure: _refused, HTTPException: _not_found},  # type: ignore[dict-item]
        lifespan=lifespan,
    )
    app.state.treadle = state
    return app


async def _refused(request: Request, failure: Failure) -> Response:
    RequestContext.of(request).notes["error"] = failure.code
    return failure.response()


async def _not_found(request: Request, error: HTTPException) -> Response:
    given = f"{request.method} {request.scope['path'][:100]}"
    if error.status_code == 405:
        allowed = ", ".join(sorted(_methods(request)))
        failure = Failure(405, f"got {given}; allowed: {allowed}", code="method_not_allowed")
        headers = {**(error.headers or {}), "Allow": allowed}
    else:
        paths = sorted({route.path.replace(":path}", "}") for route in ROUTES})  # without Starlette's converter
        failure = Failure(error.status_code, f"got {given}; allowed: {', '.join(paths)}", code="route_not_found")
        headers = error.headers or {}
    response = failure.response()
    response.headers.update(headers)
    return response


def _methods(request: Request) -> set[str]:
    """Return the methods of a path; each may have a route of its own."""
    routes = cast(list[Route], request.app.routes)
    return {
        method for route in routes if route.matches(request.scope)[0] != Match.NONE for method in route.methods or ()
    }
