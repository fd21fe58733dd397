"""POST /v1/route: explains how a text is weighed."""

from dataclasses import asdict, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from treadle.common.errors import TreadleError, listed
from treadle.engine.chat import joined
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.explain import explain
from treadle.routing.router import Router
from treadle.serving.openai.bodies import Json, RouteBody
from treadle.serving.openai.failures import Problem, Problems, failure_of, refusal
from treadle.serving.openai.middleware import RequestContext
from treadle.serving.openai.queues import Check
from treadle.serving.openai.reading import read, while_connected, within
from treadle.serving.openai.requests import MAX_TOKEN_CHARACTERS
from treadle.serving.openai.state import ServerState
from treadle.serving.openai.targets import AUTO


async def explain_text(request: Request) -> Response:
    """POST /v1/route: explain how a text, or the contents of a chat's messages, are weighed."""
    return await while_connected(request, _route(request))


async def _route(request: Request) -> Response:
    state, context = ServerState.of(request), RequestContext.of(request)
    caller = context.caller
    body, problems = await read(request, RouteBody)
    names, is_known = state.targets.names, not state.targets.unknown(body.model, caller)
    if is_known and body.model not in names:
        problems.append(Problem("model", f"model: got {body.model!r}, which is not routed; allowed: {listed(names)}"))
    model = (
        AUTO if is_known else body.model
    )  # a model that is not routed is refused once; its options are read as if it were
    target = state.targets.read(model, body.treadle, problems, caller)
    text = _text_to_weigh(body, problems, _most_letters(state))
    if problems:
        raise refusal(problems)

    def weigh(check: Check) -> Json:
        router = _attended(state.routers.among(target.adapters), check)
        state.engine.check_routing([target.routing], router)
        return asdict(explain(router, text, target.routing))

    try:
        async with within(state.params.request_timeout):
            explanation = await state.weigh(weigh, context.client, len(text))
    except TreadleError as error:
        raise failure_of(error) from error
    return JSONResponse({"object": "route", "routing": asdict(target.routing), **explanation})


def _text_to_weigh(body: RouteBody, problems: Problems, most: int | None) -> str:
    """Return a body's text or its messages' contents, and add to its problems."""
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


def _most_letters(state: ServerState) -> int | None:
    """Return how many characters a text may have, as many as a prompt; None = any number."""
    limits = [limit for limit in (state.params.max_prompt_tokens, state.engine.context) if limit]
    return min(limits) * MAX_TOKEN_CHARACTERS if limits else None


def _attended(router: Router, check: Check) -> Router:
    """Return a router whose embedder, if static, calls a check now and then."""
    embedder = router.embedder
    return replace(router, embedder=embedder.attended(check)) if isinstance(embedder, StaticEmbedder) else router
