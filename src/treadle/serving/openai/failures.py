"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}} with the right status."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from treadle.common.errors import SHOWN, AdapterError, TreadleError, one_or_list, shown
from treadle.serving.openai.loop import EngineFailed
from treadle.serving.openai.scheduler import QueueFull, ShuttingDown

MAX_LISTED_PROBLEMS = 20
"""The problems that one message lists; it counts the others."""
CLIENT_GONE_STATUS = 499
"""Status in the log if the client went away, as nginx has it."""
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Problem:
    """A problem at one place of a request's body.

    Attributes:
        place: the place, such as messages[0].role.
        message: the place, the given value and what is allowed; "" = the problems are only counted.
        count: the number of problems it stands for.
        status: the answer's HTTP status.
        code: the answer's error code.
    """

    place: str
    message: str
    count: int = 1
    status: int = 400
    code: str | None = None

    @classmethod
    def of(cls, place: str, given: Any, allowed: str) -> "Problem":
        """Return the problem of a value that is not allowed."""
        return cls(place, f"{cut(place)}: got {shown(given)}; allowed: {allowed}")

    @classmethod
    def others(cls, count: int) -> "Problem":
        """Return a problem that stands for `count` others."""
        return cls("", "", count)

    @property
    def field(self) -> str | None:
        """The body's field."""
        return cut(self.place.replace("[", ".").partition(".")[0]) or None


Problems = list[Problem]


def cut(name: str) -> str:
    """Return a name for a message, shortened if it is long."""
    return name if len(name) <= SHOWN else name[: SHOWN - 4] + " ..."


class Failure(Exception):
    """A request that is refused, and why."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry = retry  # seconds

    def document(self) -> dict[str, Any]:
        """Return the JSON object."""
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers: Mapping[str, str] = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers = {**headers, "WWW-Authenticate": "Bearer"}
        return JSONResponse(self.document(), self.status, headers)


def refusal(problems: Problems) -> Failure:
    """Return the failure that lists a body's problems; an unknown model makes it a 404.

    Field and code are those of the problem with the highest status; among equals, one with a code, then the first.
    """
    messages = [problem.message for problem in problems if problem.message][:MAX_LISTED_PROBLEMS]
    if more := sum(problem.count for problem in problems) - len(messages):
        messages.append(f"... and {more} more")
    text = one_or_list("the request has several problems:", messages)
    worst = max(problems, key=lambda problem: (problem.status, problem.code is not None))
    return Failure(worst.status, text, param=worst.field, code=worst.code)


def failure_of(error: Exception) -> Failure:
    """Return the failure for an error of the scheduler or the engine."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, QueueFull):
        return Failure(429, str(error), code="queue_full", retry=error.seconds)
    if isinstance(error, ShuttingDown):
        return Failure(503, str(error), code="shutting_down", retry=5)
    if isinstance(error, EngineFailed):
        return Failure(500, str(error), code="engine_failed")
    if isinstance(error, AdapterError):
        return Failure(404, str(error), param="model", code="model_not_found")
    if isinstance(error, TreadleError):
        return Failure(400, str(error))
    raise error
