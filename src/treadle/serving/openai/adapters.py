"""The routes of adapters: list them, and add or remove one while requests run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from treadle.bundle.bundle import NAME, RESERVED
from treadle.bundle.centroid_files import read_centroid
from treadle.common.errors import LONGEST_NAME, AdapterError, TreadleError, problem_list, shown
from treadle.common.files import folder_below
from treadle.engine.state_fitting import state_centroid
from treadle.engine.state_texts import ReadText, texts_of_samples, texts_read_twice
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.compatibility import layer_shapes
from treadle.lora.names import warn_of_bases
from treadle.lora.peft_folder import WEIGHTS_FILE
from treadle.lora.peft_tensors import TENSOR_NAME
from treadle.lora.stacking import Stacks
from treadle.routing.centroids import Centroids, Floats
from treadle.routing.embedder import encode_views
from treadle.routing.fitting import centroid_from, known_texts, texts_of
from treadle.routing.router import Router
from treadle.routing.states import StateClasses, uses_states
from treadle.routing.statistics import EmbeddedTexts
from treadle.serving.openai.bodies import NAMING, AdapterBody, Json, LoadBody, UnloadBody
from treadle.serving.openai.failures import Failure, Problem, Problems, refusal
from treadle.serving.openai.middleware import RequestContext
from treadle.serving.openai.queues import Check, Client
from treadle.serving.openai.reading import read, while_connected
from treadle.serving.openai.scheduler import ShuttingDown
from treadle.serving.openai.state import ServerState

SLICE_TEXTS = 16
"""The number of sample texts that are embedded at a time."""
STATE_TEXTS = 2
"""The number of sample texts that the base model reads between two steps."""
NO_SAMPLES = (
    "samples: missing; allowed: a list of texts of the kind the adapter was trained for. This bundle routes by the "
    "base model's states, which are read from them"
)
Shapes = Mapping[str, tuple[int, int]]
"""The (in, out) of linear layers, by path."""


async def adapters(request: Request) -> Response:
    """GET /v1/adapters: list the loaded adapters."""
    _check_admin(request)
    state = ServerState.of(request)
    return JSONResponse({"object": "list", "data": await state.between_steps(lambda: _cards(state))})


async def add(request: Request) -> Response:
    """POST /v1/adapters: read an adapter's folder and let new requests use it."""
    _check_admin(request)
    body, problems = await read(request, AdapterBody)
    new = NewAdapter(body.name, body.path, body.samples)
    await while_connected(request, _add(request, new, problems))
    return await adapters(request)


async def remove(request: Request) -> Response:
    """DELETE /v1/adapters/{name}: hide an adapter from new requests; running ones finish with it."""
    _check_admin(request)
    await _remove(request, request.path_params["name"], "name")
    return await adapters(request)


async def load(request: Request) -> Response:
    """POST /v1/load_lora_adapter, as vLLM has it."""
    _check_admin(request)
    body, problems = await read(request, LoadBody)
    new = NewAdapter(body.lora_name, body.lora_path, body.samples, "lora_name", "lora_path")
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
    if not RequestContext.of(request).caller.is_admin:
        raise Failure(403, "this needs the admin key (treadle serve --admin-key)", code="admin_only")


def _cards(state: ServerState) -> list[Json]:
    router = state.engine.router
    counts = dict.fromkeys(router.names, 0)
    counts |= zip(router.centroids.names, router.centroids.counts.tolist(), strict=True)
    present = [adapter for adapter in state.engine.blend.adapters if adapter.name in counts]
    return [
        {
            "name": adapter.name,
            "source": str(adapter.source),
            "ranks": sorted({pair.rank // pair.num_experts for pair in adapter.pairs.values()}),
            "modules": len(adapter.modules),
            "bytes": adapter.num_bytes(),
            "samples": counts[adapter.name],
        }
        for adapter in present
    ]


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to add, and the names of the request's fields for its name and path."""

    name: str
    path: str
    samples: list[str] | None
    name_field: str = "name"
    path_field: str = "path"


async def _add(request: Request, new: NewAdapter, problems: Problems) -> None:
    """Embed, read and stack beside the running requests; only short work happens between steps."""
    state, client = ServerState.of(request), RequestContext.of(request).client
    if state.params.adapter_dir is None:
        raise Failure(403, "adapters cannot be added: start the server with --adapter-dir", code="no_adapter_dir")
    wrong = {problem.place for problem in problems}
    if new.name_field not in wrong:
        problems += _name_problems(state, new)
    folder = folder_below(Path(state.params.adapter_dir), new.path)
    if folder is None and new.path_field not in wrong:
        problems.append(Problem.of(new.path_field, new.path, "a folder below --adapter-dir"))
    if new.samples is None and uses_states(state.engine.router.states, state.engine.router.params):
        problems.append(Problem("samples", NO_SAMPLES))
    if folder is None or problems:
        raise refusal(problems)
    name, samples = new.name, new.samples
    try:
        own = None if samples is None else await _centroid(state, name, samples, client)
        await state.reading.run(partial(_join, state, new, folder, own), client)
    except TreadleError as error:
        raise Failure(400, str(error), param=new.path_field, code="adapter_refused") from error
    except OSError as error:  # a folder that may not be read
        message = f"{new.path_field}: got {shown(new.path)}, which cannot be read: {error.strerror}"
        raise Failure(400, message, param=new.path_field) from error


def _join(state: ServerState, new: NewAdapter, folder: Path, own: Centroids | None, check: Check) -> None:
    """Read an adapter, stack it, and attach it between two steps; its shapes are checked before its factors are read.

    One thread does all of it, so nobody else waits while a large adapter is freed.
    """
    engine, between_steps, name = state.engine, state.scheduler.call, new.name
    _check_shapes(folder, name, between_steps(lambda: layer_shapes(engine.model)).result())
    check()
    adapter = read_adapter(folder, name)
    warn_of_bases([adapter], state.bundle.base_model)
    own = own or read_centroid(folder, name)
    check()
    stacks = between_steps(partial(engine.adapters.plan_join, adapter)).result()
    stacks.build()
    check()
    if new.samples is None or engine.router.states is None:
        between_steps(partial(_attach, state, adapter, own, stacks)).result()
        return
    try:
        between_steps(partial(engine.adapters.attach, adapter, stacks)).result()
        states = _state_centroid(state, name, new.samples, engine.router.states, check)
        between_steps(partial(_attach, state, adapter, own, states=states)).result()
    except BaseException:  # WorkAbandoned, too
        with suppress(ShuttingDown):
            between_steps(partial(engine.adapters.give_up, name)).result()
        state.drop_now(check)
        raise


def _state_centroid(
    state: ServerState, name: str, samples: list[str], classes: StateClasses, check: Check
) -> Centroids:
    """Return the class of an attached adapter's states, read a few texts at a time between the steps."""
    texts = texts_of_samples(state.engine.tokenizer, samples)

    def read_states(texts: Sequence[ReadText], under: str | None) -> Floats:
        views: list[Floats] = []
        for start in range(0, len(texts), STATE_TEXTS):
            check()
            some = texts[start : start + STATE_TEXTS]
            views.append(state.scheduler.call(partial(state.engine.read_states, some, under)).result())
        return np.concatenate(views)

    return state_centroid(name, texts, read_states(texts, None), read_states(texts_read_twice(texts), name), classes)


async def _centroid(state: ServerState, name: str, samples: list[str], client: Client) -> Centroids:
    """Return the centroid of sample texts, embedded a few at a time."""
    router, size = state.engine.router, sum(map(len, samples))
    embedder, tails = router.embedder, router.tails
    texts = await state.preparing.run(lambda _: texts_of(name, samples), client, size)
    views: list[Floats] = []
    for start in range(0, len(texts), SLICE_TEXTS):
        some = [each.text for each in texts[start : start + SLICE_TEXTS]]
        views.append(
            await state.weigh(lambda _, some=some: encode_views(embedder, some, tails), client, sum(map(len, some)))
        )

    def fit(_: Check) -> Centroids:
        embedded = known_texts(name, EmbeddedTexts(texts, np.concatenate(views)))
        return centroid_from(name, embedded, embedder, tails)

    return await state.weighing.run(fit, client, size)


def _attach(
    state: ServerState,
    adapter: Adapter,
    own: Centroids,
    stacks: Stacks | None = None,
    states: Centroids | None = None,
) -> None:
    state.engine.adapters.join(adapter, own, stacks, states=states)
    state.metrics.set_adapters(state.engine.adapter_names)


async def _remove(request: Request, name: str, field: str) -> None:
    """Hide an adapter from new requests at once; its factors go beside the steps, when no sequence uses them."""
    state = ServerState.of(request)

    def retire() -> Router:
        state.engine.adapters.retire(name)
        state.metrics.set_adapters(state.engine.adapter_names)
        return state.engine.router

    try:
        await state.between_steps(retire)
    except AdapterError as error:
        raise Failure(404, str(error), param=field, code="adapter_not_found") from error
    with suppress(Failure):  # the queue is full: the next change frees the factors
        await state.reading.run(state.drop_now, RequestContext.of(request).client)


def _name_problems(state: ServerState, new: NewAdapter) -> Problems:
    """Return the problem of a name that is not allowed or is taken, if it is."""
    adapters, others = state.engine.adapter_names, [*RESERVED, *state.targets.names]
    if new.name in adapters:
        what = f"{new.name_field}: got {shown(new.name)}, which exists already"
    elif not NAME.fullmatch(new.name) or len(new.name) > LONGEST_NAME or new.name in others:
        what = f"{new.name_field}: got {shown(new.name)}"
    else:
        return []
    taken = ", ".join(dict.fromkeys([*others, *adapters]))
    return [Problem(new.name_field, f"{what}; allowed: {NAMING}, not a name that is taken ({taken})")]


def _check_shapes(folder: Path, name: str, shapes: Shapes) -> None:
    """Raise an AdapterError that lists the factors that fit no layer of these shapes, from the file's header alone.

    `read_adapter` finds everything else, such as a missing file; paths too, as PEFT may have renamed them.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return
    try:
        with safe_open(file, "pt") as opened:
            sizes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except (SafetensorError, OSError, ValueError):
        return
    if problems := list(_shape_problems(sizes, shapes)):
        raise AdapterError(problem_list(f"adapter {name!r} ({folder}) does not fit the model:", problems))


def _shape_problems(sizes: Mapping[str, tuple[int, ...]], shapes: Shapes) -> Iterator[str]:
    inputs, outputs = ({shape[side] for shape in shapes.values()} for side in (0, 1))
    for key, size in sizes.items():
        found = TENSOR_NAME.match(key)
        if found is None or len(size) != 2:
            continue
        if found["side"] == "A" and size[1] not in inputs:
            yield f"{key} is {size} (r, in); no linear layer of the model has {size[1]} inputs"
        if found["side"] == "B" and size[0] not in outputs:
            yield f"{key} is {size} (out, r); no linear layer of the model has {size[0]} outputs"
