"""The web application: its routes, and what they answer when they do not."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from treadle.bundle.bundle import Bundle
from treadle.engine.engine import Engine
from treadle.serving.openai import adapters, generating, page
from treadle.serving.openai.failures import Failure
from treadle.serving.openai.gate import Gate, Visit
from treadle.serving.openai.keys import Keyring
from treadle.serving.openai.openapi import document
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.state import State


async def live(request: Request) -> Response:
    """GET /live: the process answers."""
    return JSONResponse({"status": "live"})


async def health(request: Request) -> Response:
    """GET /health: requests are accepted; 503 while shutting down, or after the engine has failed."""
    is_ready = State.of(request).scheduler.is_ready
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics: Prometheus' text format; it names all adapters, which a key that is limited to some may not see."""
    if Visit.of(request).caller.adapters is not None:
        raise Failure(403, "the figures name all adapters: send a key that is not limited to some", code="limited_key")
    return Response(State.of(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    """GET /openapi.json: what can be sent to this server."""
    return JSONResponse(document())


ROUTES = [
    Route("/live", live),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
    Route("/v1/models", adapters.models),
    Route("/v1/models/{name:path}", adapters.model),
    Route("/v1/chat/completions", generating.chat, methods=["POST"]),
    Route("/v1/completions", generating.complete, methods=["POST"]),
    Route("/v1/route", adapters.route, methods=["POST"]),
    Route("/v1/adapters", adapters.adapters),
    Route("/v1/adapters", adapters.add, methods=["POST"]),
    Route("/v1/adapters/{name:path}", adapters.remove, methods=["DELETE"]),
    Route("/v1/load_lora_adapter", adapters.load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", adapters.unload, methods=["POST"]),
]


def make_app(bundle: Bundle, engine: Engine, params: ServeParams, keys: Keyring) -> Starlette:
    """Return the application that serves an engine; the engine's thread lives as long as it is served."""
    state = State.make(bundle, engine, params)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        state.start()
        yield
        await state.shut_down()

    routes = [*ROUTES, *page.routes()] if params.page else ROUTES
    paths: dict[Any, str] = {route.endpoint: route.path for route in routes}
    cors = Middleware(CORSMiddleware, allow_origins=params.cors_origin, allow_methods=["*"], allow_headers=["*"])
    gate = Middleware(
        Gate,
        params=params,
        keys=keys,
        metrics=state.metrics,
        is_ready=lambda: state.scheduler.is_ready,
        paths=paths,
    )
    app = Starlette(
        routes=routes,
        middleware=[*([cors] if params.cors_origin else []), gate],
        exception_handlers={Failure: _refused, HTTPException: _not_found},  # type: ignore[dict-item]
        lifespan=lifespan,
    )
    app.state.treadle = state
    return app


async def _refused(request: Request, failure: Failure) -> Response:
    Visit.of(request).notes["error"] = failure.code
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
    """Return the methods of a path, of which each may have a route of its own."""
    routes = cast(list[Route], request.app.routes)
    return {
        method for route in routes if route.matches(request.scope)[0] != Match.NONE for method in route.methods or ()
    }
