"""Decides by Host, Origin and Content-Type which web pages may use the server.

A browser sends the requests of every page that a person visits, to localhost too. If a page's own name was made to
mean this machine (DNS rebinding), Host shows it; Origin shows any other page. Without asking first, pages may send
texts and forms, but never JSON.
"""

import socket
from dataclasses import dataclass

from starlette.datastructures import Headers

from treadle.common.errors import shown
from treadle.serving.openai.failures import Failure
from treadle.serving.openai.hosts import ANY, RESERVED_ENDINGS, can_be_a_web_site, host_name, is_loopback, matches
from treadle.serving.openai.params import ServeParams

SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing, so a link on another page may use them."""
FORM = "application/x-www-form-urlencoded"
"""`curl -d` sends any text with this type. A page sends forms with it, and then names its origin."""


@dataclass(frozen=True)
class PagePolicy:
    """Says whose requests are answered.

    Attributes:
        hosts: names of this server that a web site could have, too.
        named_hosts: the hosts that the operator gave by name.
        origins: origins of pages on other hosts that may use the server.
        is_strict: whether hosts and origins are checked; with keys there is no need, as no page has one.
    """

    hosts: tuple[str, ...]
    named_hosts: tuple[str, ...]
    origins: tuple[str, ...]
    is_strict: bool

    @classmethod
    def of(cls, params: ServeParams, *, is_open: bool) -> "PagePolicy":
        """Return the policy of a server; `is_open` means that it asks for no key."""
        own = [name for name in (params.host, socket.gethostname()) if host_name(name)]
        is_strict = is_open or is_loopback(params.host) or bool(params.allowed_host)
        named = tuple(host for host in params.allowed_host if host != ANY)
        return cls((*own, *params.allowed_host), named, params.cors_origin, is_strict)

    def check(self, method: str, version: str, headers: Headers) -> None:
        """Raise a Failure if a page may have sent the request unasked, or if its host is unclear."""
        host = self._check_host(version, headers)
        if self.is_strict:
            self._check_origin(method, host, headers)
        if method == "POST":
            _check_content_type(headers)

    def _check_host(self, version: str, headers: Headers) -> str:
        """Return the Host header; only clients of HTTP/1.0 may leave it out."""
        given = headers.getlist("host")
        if not given and version == "1.0":
            return ""
        name = host_name(given[0]) if len(given) == 1 else None
        if name is None:
            raise Failure(400, f"Host: got {shown(', '.join(given))}; allowed: one host", code="invalid_host")
        if self.is_strict and can_be_a_web_site(name) and not matches(name, self.hosts):
            endings = ", ".join(f".{ending}" for ending in RESERVED_ENDINGS)  # no names of ours: a page may read it
            allowed = f"IP addresses, names without a dot or that end with {endings}, treadle serve --allowed-host NAME"
            message = f"Host: got {shown(given[0])}; allowed: {allowed}"
            raise Failure(403, message, code="host_not_allowed")
        return given[0]

    def _check_origin(self, method: str, host: str, headers: Headers) -> None:
        site = headers.get("sec-fetch-site")  # browsers send it; a proxy may have changed Host on the way
        if site in ("same-origin", "none"):
            return
        foreign = [origin for origin in headers.getlist("origin") if not self._is_own(origin, host)]
        if not headers.getlist("origin") and site is not None and method not in SAFE:
            foreign = ["null"]
        if foreign:
            message = f"Origin: got {shown(foreign[0])}; allowed: this server's own page, --cors-origin ORIGIN"
            raise Failure(403, message, code="origin_not_allowed")

    def _is_own(self, origin: str, host: str) -> bool:
        """Return whether an origin is this server's own or an allowed one."""
        if origin in self.origins or "*" in self.origins:
            return True
        address = origin.partition("://")[2]
        if not address:
            return False
        return _without_port(address) == _without_port(host) or matches(host_name(address) or "", self.named_hosts)


def _without_port(address: str) -> str:
    """Return HOST:PORT in lower case, without the default ports."""
    return address.lower().removesuffix(":80").removesuffix(":443")


def _check_content_type(headers: Headers) -> None:
    """Raise a Failure for a type of body that a page may send without asking first."""
    for given in headers.getlist("content-type"):
        kind = given.partition(";")[0].strip().lower()
        is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
        if not is_json and (kind != FORM or "origin" in headers):
            message = f"Content-Type: got {shown(given)}; allowed: application/json"
            raise Failure(415, message, code="unsupported_content_type")
