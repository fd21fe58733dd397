"""The routes of adapters: what there is, how a text is weighed, and adding and removing while requests run."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from treadle.bundle.bundle import NAME, RESERVED, foreign_base
from treadle.bundle.centroid_files import read_centroid
from treadle.common.errors import LONGEST_NAME, AdapterError, TreadleError, listed, shown
from treadle.common.files import folder_below
from treadle.engine.chat import joined
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.compatibility import linear_shapes
from treadle.lora.stacking import Stacks
from treadle.routing.centroids import Centroids, Floats
from treadle.routing.explain import explain
from treadle.routing.fitting import centroid_from
from treadle.routing.router import Router
from treadle.routing.samples import sample_texts
from treadle.serving.openai.attending import while_connected, within
from treadle.serving.openai.bodies import NAMING, AdapterBody, Json, LoadBody, RouteBody, UnloadBody
from treadle.serving.openai.failures import Failure, Problem, Problems, failure_of, refusal
from treadle.serving.openai.gate import Visit
from treadle.serving.openai.generating import read
from treadle.serving.openai.lines import Check, Client
from treadle.serving.openai.outlines import check_outline
from treadle.serving.openai.requests import LONGEST_TOKEN
from treadle.serving.openai.state import State
from treadle.serving.openai.targets import AUTO
from treadle.serving.openai.weighing import attended

SLICE = 16
"""Sample texts that are embedded at a time."""


async def models(request: Request) -> Response:
    """GET /v1/models: what a request may name as `model`."""
    state, caller = State.of(request), Visit.of(request).caller
    return JSONResponse({"object": "list", "data": [_card(state, name) for name in state.targets.models(caller)]})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    state, name = State.of(request), request.path_params["name"]
    if unknown := state.targets.unknown(name, Visit.of(request).caller):
        raise refusal(unknown)
    return JSONResponse(_card(state, name))


def _card(state: State, name: str) -> Json:
    is_adapter = name in state.engine.adapter_names
    parent = {"parent": "base", "root": name} if is_adapter else {"parent": None, "root": state.bundle.base_model}
    card = {"id": name, "object": "model", "created": 0, "owned_by": "treadle", "max_model_len": state.engine.context}
    return {**card, **parent}


async def route(request: Request) -> Response:
    """POST /v1/route: how a text, or what the messages of a chat say, is weighed, and why."""
    return await while_connected(request, _route(request))


async def _route(request: Request) -> Response:
    state, visit = State.of(request), Visit.of(request)
    caller = visit.caller
    body, problems = await read(request, RouteBody)
    names, is_known = state.targets.names, not state.targets.unknown(body.model, caller)
    if is_known and body.model not in names:
        problems.append(Problem("model", f"model: got {body.model!r}, which is not routed; allowed: {listed(names)}"))
    model = AUTO if is_known else body.model  # one that is not routed is refused once, its options as if it were
    target = state.targets.read(model, body.treadle, problems, caller)
    text = _text_to_weigh(body, problems, _most_letters(state))
    if problems:
        raise refusal(problems)

    def weigh(check: Check) -> Json:
        router = attended(state.routers.among(target.adapters), check)
        state.engine.check_routing([target.routing], router)
        return asdict(explain(router, text, target.routing))

    try:
        async with within(state.params.request_timeout):
            explanation = await state.weigh(weigh, visit.client, len(text))
    except TreadleError as error:
        raise failure_of(error) from error
    return JSONResponse({"object": "route", "routing": asdict(target.routing), **explanation})


def _text_to_weigh(body: RouteBody, problems: Problems, most: int | None) -> str:
    """Return the text of a body, or what its messages say; adds to its problems."""
    wrong = {problem.place.partition("[")[0] for problem in problems}
    if not wrong & {"text", "messages"}:
        if body.text is None and body.messages is None:
            problems.append(Problem("text", "text is missing; allowed: a text, or messages instead"))
        elif body.text is not None and body.messages is not None:
            problems.append(Problem("messages", "messages: got messages and a text; allowed: one of them"))
    if body.messages is None:
        place, text = "text", body.text or ""
    else:
        place, text = "messages", joined([message.content for message in body.messages])
    if most is not None and len(text) > most:
        problems.append(Problem(place, f"{place}: got {len(text)} characters; allowed: at most {most}"))
    return text


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
    body, problems = await read(request, AdapterBody)
    new = New(body.name, body.path, body.samples)
    await while_connected(request, _add(request, new, problems))
    return await adapters(request)


async def remove(request: Request) -> Response:
    """DELETE /v1/adapters/{name}: new requests no longer see it, running ones finish with it."""
    _check_admin(request)
    await _remove(request, request.path_params["name"], "name")
    return await adapters(request)


async def load(request: Request) -> Response:
    """POST /v1/load_lora_adapter, as vLLM has it."""
    _check_admin(request)
    body, problems = await read(request, LoadBody)
    new = New(body.lora_name, body.lora_path, body.samples, "lora_name", "lora_path")
    await while_connected(request, _add(request, new, problems))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload(request: Request) -> Response:
    """POST /v1/unload_lora_adapter, as vLLM has it."""
    _check_admin(request)
    body, problems = await read(request, UnloadBody)
    if problems:
        raise refusal(problems)
    await _remove(request, body.lora_name, "lora_name")
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


@dataclass(frozen=True)
class New:
    """An adapter that a request wants to add, and what the request calls the fields that say so."""

    name: str
    path: str
    samples: list[str] | None
    name_field: str = "name"
    path_field: str = "path"


async def _add(request: Request, new: New, problems: Problems) -> None:
    """Embed, read and stack beside the running requests; only what is short happens between steps."""
    state, client = State.of(request), Visit.of(request).client
    if state.params.adapter_dir is None:
        raise Failure(403, "adapters cannot be added: start the server with --adapter-dir", code="no_adapter_dir")
    wrong = {problem.place for problem in problems}
    if new.name_field not in wrong:
        problems += _name_problems(state, new)
    folder = folder_below(Path(state.params.adapter_dir), new.path)
    if folder is None and new.path_field not in wrong:
        problems.append(Problem.of(new.path_field, new.path, "a folder below --adapter-dir"))
    if folder is None or problems:
        raise refusal(problems)
    name, samples = new.name, new.samples
    try:
        own = None if samples is None else await _centroid(state, name, samples, client)
        await state.reading.run(partial(_join, state, name, folder, own), client)
    except TreadleError as error:
        raise Failure(400, str(error), param=new.path_field, code="adapter_refused") from error
    except OSError as error:  # a folder that may not be read
        message = f"{new.path_field}: got {shown(new.path)}, which cannot be read: {error.strerror}"
        raise Failure(400, message, param=new.path_field) from error


def _join(state: State, name: str, folder: Path, own: Centroids | None, check: Check) -> None:
    """Read an adapter, stack it, and attach it between two steps; one that cannot fit is not read whole.

    All of it is one thread's, so that nobody else waits while a large adapter is let go of.
    """
    engine, between_steps = state.engine, state.scheduler.call
    check_outline(folder, name, between_steps(lambda: linear_shapes(engine.model)).result())
    check()
    adapter = read_adapter(folder, name)
    if problem := foreign_base(adapter, state.bundle.base_model):
        raise AdapterError(problem)
    own = own or read_centroid(folder, name)
    check()
    stacks = between_steps(partial(engine.plan_adapter, adapter)).result()
    stacks.build()
    check()
    between_steps(partial(_attach, state, adapter, own, stacks)).result()


async def _centroid(state: State, name: str, samples: list[str], client: Client) -> Centroids:
    """Return the centroid of sample texts, embedded some at a time."""
    embedder, size = state.engine.router.embedder, sum(map(len, samples))
    made = await state.preparing.run(lambda _: sample_texts(samples), client, size)
    vectors: list[Floats] = []
    for start in range(0, len(made.texts), SLICE):
        texts = made.texts[start : start + SLICE]
        vectors.append(await state.weigh(lambda _, texts=texts: embedder.encode(texts), client, sum(map(len, texts))))
    return await state.weighing.run(
        lambda _: centroid_from(name, made, np.concatenate(vectors), embedder), client, size
    )


def _attach(state: State, adapter: Adapter, own: Centroids, stacks: Stacks) -> None:
    state.engine.join_adapter(adapter, own, stacks)
    state.metrics.set_adapters(state.engine.adapter_names)


async def _remove(request: Request, name: str, field: str) -> None:
    """Hide an adapter from new requests at once; its factors go beside the steps, when no sequence uses them."""
    state = State.of(request)

    def retire() -> Router:
        state.engine.retire_adapter(name)
        state.metrics.set_adapters(state.engine.adapter_names)
        return state.engine.router

    try:
        await state.between_steps(retire)
    except AdapterError as error:
        raise Failure(404, str(error), param=field, code="adapter_not_found") from error
    with suppress(Failure):  # too much waits: the factors go with the next change
        await state.reading.run(state.drop_now, Visit.of(request).client)


def _name_problems(state: State, new: New) -> Problems:
    """Return the problem of a name that is no name or is taken; else none."""
    adapters, others = state.engine.adapter_names, [*RESERVED, *state.targets.names]
    if new.name in adapters:
        what = f"{new.name_field}: got {shown(new.name)}, which exists already"
    elif not NAME.fullmatch(new.name) or len(new.name) > LONGEST_NAME or new.name in others:
        what = f"{new.name_field}: got {shown(new.name)}"
    else:
        return []
    taken = ", ".join(dict.fromkeys([*others, *adapters]))
    return [Problem(new.name_field, f"{what}; allowed: {NAMING}, not a name that is taken ({taken})")]
