"""The page at /: a few static files. They are the same for everybody, so they need no key."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
HOME, PREFIX = "/", "/page/"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join([
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # a model's text cannot become HTML, even by mistake
    "trusted-types 'none'",
])  # fmt: skip
HEADERS = {
    "Cache-Control": "no-cache",  # asked for each time, and sent only after an update
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class StaticFile:
    """A file's content and headers."""

    content: bytes
    headers: dict[str, str]


@cache
def files() -> dict[str, StaticFile]:
    """Return the files by path below the folder; no other file is ever sent."""
    found: dict[str, StaticFile] = {}
    for path in sorted(each for each in FOLDER.rglob("*") if each.suffix in TYPES):
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {**HEADERS, "Content-Type": TYPES[path.suffix], "ETag": tag}
        found[path.relative_to(FOLDER).as_posix()] = StaticFile(content, headers)
    return found


def is_page(path: str) -> bool:
    """Return whether a request's path is the page or one of its files."""
    return path == HOME or (path.startswith(PREFIX) and path.removeprefix(PREFIX) in files())


async def home(request: Request) -> Response:
    """GET /."""
    return _send(request, "index.html")


async def file(request: Request) -> Response:
    """GET /page/{name}."""
    return _send(request, request.path_params["name"])


def routes() -> list[Route]:
    """Return the page's routes."""
    return [Route(HOME, home), Route(PREFIX + "{name:path}", file)]


def _send(request: Request, name: str) -> Response:
    found = files().get(name)
    if found is None:
        raise HTTPException(404)
    if request.headers.get("if-none-match") == found.headers["ETag"]:
        return Response(status_code=304, headers=found.headers)
    return Response(found.content, headers=found.headers)
