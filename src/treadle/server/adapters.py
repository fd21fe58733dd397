"""The routes of adapters: what there is, how a text is weighed, and adding and removing while requests run."""

import asyncio
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from treadle.adapters import Adapter, read_adapter
from treadle.bundle import NAME, RESERVED, foreign_base
from treadle.centroid_files import read_centroid
from treadle.centroids import Centroids
from treadle.errors import AdapterError, TreadleError
from treadle.explain import explain
from treadle.routing import Router
from treadle.server.bodies import AdapterBody, Json, LoadBody, RouteBody, UnloadBody, read_body, shown
from treadle.server.failures import Failure, failure_of, refusal
from treadle.server.gate import Visit
from treadle.server.generating import parse, read_json
from treadle.server.requests import LONGEST_TOKEN
from treadle.server.state import State

SLICE = 16
"""Sample texts that are embedded at a time."""


async def models(request: Request) -> Response:
    """GET /v1/models: what a request may name as `model`."""
    state, caller = State.of(request), Visit.of(request).caller
    return JSONResponse({"object": "list", "data": [_card(state, name) for name in state.targets.models(caller)]})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    state, name = State.of(request), request.path_params["name"]
    state.targets.read(name, None, [], Visit.of(request).caller)  # refuses an unknown name
    return JSONResponse(_card(state, name))


def _card(state: State, name: str) -> Json:
    is_adapter = name in state.engine.adapter_names
    parent = {"parent": "base", "root": name} if is_adapter else {"parent": None, "root": state.bundle.base_model}
    card = {"id": name, "object": "model", "created": 0, "owned_by": "treadle", "max_model_len": state.engine.context}
    return {**card, **parent}


async def route(request: Request) -> Response:
    """POST /v1/route: how a text is weighed, and why."""
    state, caller = State.of(request), Visit.of(request).caller
    body, problems = read_body(RouteBody, await read_json(request))
    target = state.targets.read(body.model, body.treadle, problems, caller)
    if body.model not in state.targets.names:
        problems.append(("model", f"model: got {body.model!r}, which is not routed; allowed: {state.targets.names}"))
    most = _most_letters(state)
    if most is not None and len(body.text) > most:
        problems.append(("text", f"text: got {len(body.text)} characters; allowed: at most {most}"))
    if problems:
        raise refusal(problems)

    def weigh() -> Json:
        router = state.routers.among(target.adapters)
        state.engine.check_routing([target.routing], router)
        return asdict(explain(router, body.text, target.routing))

    seconds = state.params.request_timeout
    try:
        async with asyncio.timeout(seconds):
            explanation = await state.weigh(weigh)
    except TreadleError as error:
        raise failure_of(error) from error
    except TimeoutError as error:
        raise Failure(504, f"the request took longer than {seconds} seconds", code="timeout") from error
    return JSONResponse({"object": "route", "routing": asdict(target.routing), **explanation})


def _most_letters(state: State) -> int | None:
    """Return the characters of a text that is weighed at most: as many as a prompt may have; None = any number."""
    limits = [limit for limit in (state.params.max_prompt_tokens, state.engine.context) if limit]
    return min(limits) * LONGEST_TOKEN if limits else None


async def adapters(request: Request) -> Response:
    """GET /v1/adapters: the adapters that are loaded."""
    _check_admin(request)
    state = State.of(request)
    return JSONResponse({"object": "list", "data": await state.between_steps(lambda: _cards(state))})


async def add(request: Request) -> Response:
    """POST /v1/adapters: read an adapter's folder and let new requests use it."""
    _check_admin(request)
    body = parse(AdapterBody, await read_json(request))
    await _add(State.of(request), body.name, body.path, body.samples)
    return await adapters(request)


async def remove(request: Request) -> Response:
    """DELETE /v1/adapters/{name}: new requests no longer see it, running ones finish with it."""
    _check_admin(request)
    await _remove(State.of(request), request.path_params["name"])
    return await adapters(request)


async def load(request: Request) -> Response:
    """POST /v1/load_lora_adapter, as vLLM has it."""
    _check_admin(request)
    body = parse(LoadBody, await read_json(request))
    await _add(State.of(request), body.lora_name, body.lora_path, body.samples)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload(request: Request) -> Response:
    """POST /v1/unload_lora_adapter, as vLLM has it."""
    _check_admin(request)
    body = parse(UnloadBody, await read_json(request))
    await _remove(State.of(request), body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check_admin(request: Request) -> None:
    if not Visit.of(request).caller.is_admin:
        raise Failure(403, "this needs the admin key (treadle serve --admin-key)", code="admin_only")


def _cards(state: State) -> list[Json]:
    counts = dict(zip(state.engine.adapter_names, state.engine.router.centroids.counts.tolist(), strict=True))
    present = [adapter for adapter in state.engine.blend.adapters if adapter.name in counts]
    return [
        {
            "name": adapter.name,
            "source": str(adapter.source),
            "ranks": sorted({pair.rank for pair in adapter.pairs.values()}),
            "modules": len(adapter.pairs),
            "bytes": adapter.num_bytes(),
            "samples": counts[adapter.name],
        }
        for adapter in present
    ]


async def _add(state: State, name: str, path: str, samples: list[str] | None) -> None:
    """Read and embed beside the running requests; only the last moment, when it is attached, is between steps."""
    if not NAME.fullmatch(name) or name in (*RESERVED, *state.targets.names):
        raise Failure(400, f"name: got {name!r}; allowed: letters, digits, '.', '_' and '-', not a name that is taken")
    folder = _folder(state, path)
    try:
        adapter = await state.prepare(partial(_read, state, name, folder))
        if samples is None:
            own = await state.prepare(partial(read_centroid, folder, name))
        else:
            embedder = state.engine.router.embedder
            slices = [samples[start : start + SLICE] for start in range(0, len(samples), SLICE)]
            vectors = [await state.weigh(partial(embedder.encode, texts)) for texts in slices]
            own = Centroids.empty(embedder.id, embedder.dim).add(name, np.concatenate(vectors))
        await state.between_steps(partial(_attach, state, adapter, own))
    except TreadleError as error:
        raise Failure(400, str(error), code="adapter_refused") from error
    except OSError as error:  # a name that no file can have, a folder that may not be read
        raise Failure(400, f"path: got {shown(path)}, which cannot be read: {error.strerror}", param="path") from error


def _read(state: State, name: str, folder: Path) -> Adapter:
    adapter = read_adapter(folder, name)
    if problem := foreign_base(adapter, state.bundle.base_model):
        raise AdapterError(problem)
    return adapter


def _attach(state: State, adapter: Adapter, own: Centroids) -> None:
    state.engine.join_adapter(adapter, own)
    state.metrics.set_adapters(state.engine.adapter_names)


async def _remove(state: State, name: str) -> None:
    def detach() -> Router:
        state.engine.remove_adapter(name)
        state.metrics.set_adapters(state.engine.adapter_names)
        return state.engine.router

    try:
        await state.between_steps(detach)
    except AdapterError as error:
        raise Failure(404, str(error), param="name", code="adapter_not_found") from error


def _folder(state: State, path: str) -> Path:
    """Return the folder that a path means, which must lie below --adapter-dir, links followed."""
    root = state.params.adapter_dir
    if root is None:
        raise Failure(403, "adapters cannot be added: start the server with --adapter-dir", code="no_adapter_dir")
    folder = Path(os.path.realpath(Path(root) / path)) if "\0" not in path else Path()
    if not folder.is_relative_to(os.path.realpath(root)) or folder == Path(os.path.realpath(root)):
        raise Failure(400, f"path: got {path!r}; allowed: a folder below --adapter-dir", param="path")
    return folder
