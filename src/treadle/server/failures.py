"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}} with the right status."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from treadle.errors import AdapterError, TreadleError, problem_list
from treadle.server.loop import EngineFailed
from treadle.server.scheduler import Busy, Stopping

Problems = list[tuple[str, str]]
"""Field and message of each."""
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Failure(Exception):
    """A request that is not answered, and why."""

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
    """Return the failure for what is wrong with a body: (field, message) each."""
    messages = [message for _, message in problems]
    text = messages[0] if len(messages) == 1 else problem_list("the request has several problems:", messages)
    field = problems[0][0].replace("[", ".").partition(".")[0] or None
    return Failure(400, text, param=field)


def failure_of(error: Exception) -> Failure:
    """Return what the scheduler or the engine raised as a failure."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, Busy):
        return Failure(429, str(error), code="queue_full", retry=error.seconds)
    if isinstance(error, Stopping):
        return Failure(503, str(error), code="shutting_down", retry=5)
    if isinstance(error, EngineFailed):
        return Failure(500, str(error), code="engine_failed")
    if isinstance(error, AdapterError):
        return Failure(404, str(error), param="model", code="model_not_found")
    if isinstance(error, TreadleError):
        return Failure(400, str(error))
    raise error
