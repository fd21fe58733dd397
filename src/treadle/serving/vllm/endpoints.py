"""Routes beside vLLM's own: the weights of a text, adapters that come and go, and figures for Prometheus.

vLLM loads them where `VLLM_PLUGINS` names treadle. They lie below /v1, where vLLM's `--api-key` guards. vLLM's
responses have no place for weights. The client has the options and token ids that they follow from
(`"return_token_ids": true`), so `/v1/treadle/route` gives exactly the weights under which an answer was made.
"""

import asyncio
import hmac
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from treadle.common.documents import parse_json
from treadle.common.errors import AdapterError, OptionError, TreadleError, problem_list, shown, unknown_name
from treadle.common.files import folder_below
from treadle.engine.chat import contents_of
from treadle.engine.tokenization import prompt_ids
from treadle.serving.vllm import figures
from treadle.serving.vllm.hooks import served_engine
from treadle.serving.vllm.mixture import check_name, read_newcomer, with_adapter, without_adapter
from treadle.serving.vllm.params import KEY
from treadle.serving.vllm.requests import ServedEngine
from treadle.serving.vllm.schedule import Schedule

ADMIN_VARIABLE = "TREADLE_ADMIN_KEY"
"""The environment variable with the key that may add and remove adapters; an option would be in vLLM's log."""
MAX_BODY_BYTES = 4 << 20
MAX_SAMPLES = 1000
"""The most sample texts of an adapter that joins."""
ROUTE_KEYS = ("prompt", "messages", "token_ids", KEY)


class Endpoints:
    """The endpoint plugin that `vllm.plugins.endpoint_plugins.interface` describes."""

    name = KEY
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's app."""
        app.add_api_route("/metrics", metrics, methods=["GET"], include_in_schema=False)  # in the place of vLLM's own
        app.add_route("/v1/treadle/route", answering(route_prompt), methods=["POST"])
        app.add_route("/v1/treadle/adapters", answering(adapters), methods=["GET", "POST"])
        app.add_route("/v1/treadle/adapters/{name}", answering(remove), methods=["DELETE"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Read the bundle; without one the routes answer 404."""
        engine = served_engine(engine_client)
        if engine is not None:
            state.treadle = EndpointState(engine)


class EndpointState:
    """The state that the routes share."""

    def __init__(self, engine: ServedEngine, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.engine = engine
        self.reader = engine.reader
        self.max_body_bytes = max_body_bytes
        self.max_piece_length = max(map(len, engine.tokenizer.get_vocab()))  # characters
        self.admin_key = os.environ.get(ADMIN_VARIABLE, "").strip() or None
        self.changing = asyncio.Lock()  # one adapter at a time

    @property
    def taken(self) -> set[str]:
        """Names that no adapter can join under: the adapters', and the names of the routed model."""
        reader = self.reader
        return {*reader.mixture.names, *(name for name in self.engine.model_names if name not in reader.removed)}

    async def call(self, function: str, *arguments: Any) -> dict[str, Any]:
        """Call a function of every engine's core; return the first answer, or raise the error of any."""
        return _first(await self.engine.ask(function, *arguments))

    async def add(self, *arguments: Any) -> dict[str, Any]:
        """Let an adapter join in every engine, or in none; see `treadle.serving.vllm.live.Core.add_adapter`."""
        await self.call("treadle_check_adapter", *arguments)  # all are asked before any of them changes
        try:
            return await self.call("treadle_add_adapter", *arguments)
        except Exception:  # whatever kept one engine from it, the others must give it back
            with suppress(Exception):  # the first error says more than a dead engine's
                await self.engine.ask("treadle_remove_adapter", arguments[0])
            raise

    async def remove(self, name: str) -> dict[str, Any]:
        """Refuse requests that name an adapter, then take it out in every engine."""
        before = self.reader.mixture
        self.reader.mixture = without_adapter(before, name)
        try:
            answers = await self.engine.ask("treadle_remove_adapter", name)
        except Exception:
            self.reader.mixture = before
            raise
        if all("error" in answer for answer in answers):
            self.reader.mixture = before
        return _first(answers)


def _first(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first engine's answer, or raise an AdapterError with the first error of any."""
    for answer in answers:
        if "error" in answer:
            raise AdapterError(answer["error"])
    return answers[0]


class Refused(Exception):
    """A request that is refused with a status other than 400."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answering(handler: Callable[[Request, EndpointState], Any]) -> Callable[[Request], Any]:
    """Return a route whose errors have OpenAI's shape."""

    async def answer(request: Request) -> Response:
        try:
            state = getattr(request.app.state, KEY, None)
            if state is None:
                raise Refused(404, "this server has no treadle bundle")
            return JSONResponse(await handler(request, state))
        except (TreadleError, Refused) as error:
            status = error.status if isinstance(error, Refused) else 400
            kind = {404: "NotFoundError", 403: "ForbiddenError"}.get(status, "BadRequestError")
            return JSONResponse({"error": {"message": str(error), "type": kind, "param": None, "code": status}}, status)

    return answer


async def metrics(request: Request) -> Response:
    """Answer GET /metrics: vLLM's figures, and those of the blending after them."""
    state: EndpointState | None = getattr(request.app.state, KEY, None)
    return await figures.response(None if state is None else state.engine.ask)


async def route_prompt(request: Request, state: EndpointState) -> dict[str, Any]:
    """Return the weights (T, N) of every token of a prompt and of the generated tokens after it, if given."""
    body = await _body(request, state)
    if unknown := [unknown_name("field", name, ROUTE_KEYS) for name in body if name not in ROUTE_KEYS]:
        raise OptionError(problem_list("route:", unknown))
    prompt, messages = body.get("prompt"), body.get("messages")
    if prompt is messages is None or not (messages is None or prompt is None or _are_ids(prompt)):
        raise OptionError("route: give a prompt (a text or token ids), messages, or messages and their token ids")
    return await asyncio.to_thread(_route, state, (prompt, messages), body.get("token_ids") or [], body.get(KEY))


def _route(state: EndpointState, asked: tuple[Any, Any], generated: Any, given: Any) -> dict[str, Any]:
    """Return the weights of a prompt, of messages, or of messages that were rendered as the prompt's token ids."""
    prompt, messages = asked
    contents = None if messages is None else contents_of(_checked_prompt(state, messages))
    if _are_ids(prompt):
        ids = list(prompt)
    else:
        ids = prompt_ids(state.engine.tokenizer, _checked_prompt(state, messages if prompt is None else prompt))
    if not _are_ids(generated) and generated != []:
        raise OptionError("route: token_ids must be a list of token ids")
    whole = [*ids, *generated]
    if problems := _token_problems(state, whole):
        raise OptionError(problem_list("route:", problems))
    schedule = Schedule(state.reader.mixture, state.engine.tokenizer)
    opened = schedule.open(given, len(ids), contents)
    schedule.decide([(opened, whole, len(whole))])
    return {
        "adapters": list(opened.mixture.names),
        "prompt_tokens": len(ids),
        "weights": opened.weights(0, len(whole)).tolist(),
    }


def _token_problems(state: EndpointState, ids: Sequence[int]) -> list[str]:
    """Return why vLLM cannot have read these tokens (T,)."""
    problems: list[str] = []
    if len(ids) > state.engine.max_tokens:
        problems.append(f"{len(ids)} tokens; this server reads at most {state.engine.max_tokens} (--max-model-len)")
    if max(ids) >= state.engine.vocabulary:
        problems.append(f"token id {max(ids)}; allowed: 0 to {state.engine.vocabulary - 1}")
    return problems


def _checked_prompt(state: EndpointState, prompt: Any) -> Any:
    """Return the prompt, or raise an OptionError if its text is too long for any tokenizer."""
    messages = _messages(prompt)
    length = sum(map(len, contents_of(messages)))
    if length > state.engine.max_tokens * state.max_piece_length:
        raise OptionError(
            f"route: {length} characters cannot be {state.engine.max_tokens} tokens (--max-model-len) or fewer"
        )
    return prompt


def _messages(prompt: Any) -> Sequence[Mapping[str, Any]]:
    """Return a prompt as messages; an OptionError where it is neither a text nor messages."""
    if isinstance(prompt, str):
        return [{"content": prompt}]
    messages = cast(Sequence[Any], prompt) if isinstance(prompt, list) else []
    if not messages or not all(isinstance(each, Mapping) and "content" in each for each in messages):
        raise OptionError("route: prompt is a text or token ids; messages are objects with role and content")
    return messages


def _are_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(each) is int and each >= 0 for each in cast(list[Any], value))


async def adapters(request: Request, state: EndpointState) -> dict[str, Any]:
    """Answer GET with the adapters and the router's work; POST {"name", "path", "samples"} adds one."""
    if request.method == "GET":
        return await state.call("treadle_adapters")
    _check_admin(request, state)
    body = await _body(request, state)
    allowed = ("name", "path", "samples")
    if unknown := [unknown_name("field", name, allowed) for name in body if name not in allowed]:
        raise OptionError(problem_list("adapters:", unknown))
    name, samples = body.get("name"), body.get("samples")
    path = _inside(state, body.get("path"))
    is_list = isinstance(samples, list) and all(isinstance(each, str) for each in cast(list[Any], samples))
    is_list = is_list and 1 <= len(cast(list[str], samples)) <= MAX_SAMPLES
    if not isinstance(name, str) or not name or not (samples is None or is_list):
        raise OptionError(f"adapters: name is a text, samples are a list of 1 to {MAX_SAMPLES} texts")
    async with state.changing:
        mixture, params = state.reader.mixture, state.reader.params
        check_name(name, state.taken)
        newcomer = await asyncio.to_thread(read_newcomer, mixture, params, state.reader.base, name, path, samples)
        answer = await state.add(name, path, samples)
        state.reader.mixture = with_adapter(mixture, newcomer, answer["adapters"][name])
    return answer


async def remove(request: Request, state: EndpointState) -> dict[str, Any]:
    """Answer DELETE: take an adapter out of the requests that begin from now on."""
    name = str(request.path_params["name"])
    _check_admin(request, state)
    async with state.changing:
        if name not in state.reader.mixture.names:
            raise Refused(404, unknown_name("adapter", name, state.reader.mixture.names))
        return await state.remove(name)


def _check_admin(request: Request, state: EndpointState) -> None:
    """Raise a Refused unless adapters can come and go here, and the request has the key for it."""
    if state.reader.params.adapter_dir is None or state.admin_key is None:
        needs = f"max_adapters and adapter_dir, and a key in {ADMIN_VARIABLE}"
        raise Refused(403, f"adapters cannot come and go here: start the server with {needs}")
    bearer = re.fullmatch(r"[Bb]earer +(\S+) *", request.headers.get("authorization", ""))
    given = request.headers.get("x-admin-key") or (bearer[1] if bearer else "")
    if not hmac.compare_digest(given.encode(), state.admin_key.encode()):
        how = f"send X-Admin-Key: KEY, or Authorization: Bearer KEY, with the key of {ADMIN_VARIABLE}"
        raise Refused(403, f"this needs the admin key: {how}")


def _inside(state: EndpointState, path: Any) -> str:
    """Return an adapter's folder, which must lie below `adapter_dir`."""
    root = Path(state.reader.params.adapter_dir or "").expanduser()
    folder = folder_below(root, path) if isinstance(path, str) else None
    if folder is None:
        raise OptionError(f"adapters: path: got {shown(path)}; allowed: a folder below adapter_dir")
    return str(folder)


async def _body(request: Request, state: EndpointState) -> dict[str, Any]:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > state.max_body_bytes:
            raise Refused(413, f"the body is longer than {state.max_body_bytes} bytes, the most that is allowed")
    try:
        body = parse_json(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise OptionError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise OptionError("the body is not an object")
    return cast(dict[str, Any], body)
