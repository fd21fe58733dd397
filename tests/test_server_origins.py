"""A web page that somebody visits must not use a server on the same machine; everybody else must."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from treadle.common.errors import OptionError
from treadle.serving.openai.failures import Failure
from treadle.serving.openai.origins import PagePolicy
from treadle.serving.openai.params import ServeParams

from serving import Serving, serving

TEXTS = "/v1/completions"
BODY = b'{"model": "auto", "prompt": "add", "max_tokens": 1}'
EVIL = "http://evil.example"


def outcome(
    headers: list[tuple[str, str]], method: str = "POST", *, keys: bool = False, version: str = "1.1", **params: Any
) -> tuple[int, str | None]:
    """Return status and code of the refusal, (200, None) where there is none."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    policy = PagePolicy.of(ServeParams(**params), is_open=not keys)
    try:
        policy.check(method, version, Headers(raw=raw))
    except Failure as failure:
        return failure.status, failure.code
    return 200, None


OWN_HOSTS = [
    "localhost", "localhost:8000", "LocalHost.:8000", "app.localhost", "127.0.0.1:1", "127.0.0.2", "[::1]",
    "[::1]:8000", "[2001:db8::7]:80", "192.168.1.5:8000", "0.0.0.0:8000", "treadle", "my_app:8000", "gpu.local:8000",
    "host.docker.internal:8000", "treadle.ai.svc.cluster.local", "",
]  # fmt: skip
FOREIGN_HOSTS = [
    "evil.example", "evil.example:8000", "EVIL.example.", "localhost.evil.example", "127.0.0.1.nip.io:8000",
    "127.0.0.1.evil.example", "xn--lcalhost-.example", "localhost.com", "notlocal.localhosts.org",
]  # fmt: skip
NO_HOSTS = [
    "localhost:x",
    "a b",
    "a/b",
    "user@localhost",
    "[::1",
    "localhost:8000:1",
    "b\xfccher",
    "localhost,evil.example",
]


@pytest.mark.parametrize("host", OWN_HOSTS)
@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0"])
def test_names_that_no_web_site_can_have_are_answered(host: str, listens: str) -> None:
    assert outcome([("Host", host)], host=listens) == (200, None)


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_name_that_a_web_site_can_have_is_refused_unless_it_is_allowed(host: str, method: str) -> None:
    given = [("Host", host)]
    for listens in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.1.5"):
        assert outcome(given, method, host=listens) == (403, "host_not_allowed")
    assert outcome(given, method, keys=True) == (403, "host_not_allowed")
    for allowed in (host, "*"):
        assert outcome(given, method, allowed_host=("other.example", allowed)) == (200, None)
    assert outcome(given, method, host="0.0.0.0", keys=True) == (200, None)  # a page has no key
    assert outcome(given, method, host="0.0.0.0", keys=True, allowed_host=("other.example",))[0] == 403


def test_names_below_one_can_be_allowed() -> None:
    allowed = {"allowed_host": ("*.example.org",)}
    for host, status in (
        ("a.example.org", 200),
        ("a.b.EXAMPLE.org.:1", 200),
        ("example.org", 403),
        ("aexample.org", 403),
    ):
        assert outcome([("Host", host)], **allowed)[0] == status


@pytest.mark.parametrize("host", NO_HOSTS)
def test_what_is_no_host_is_refused(host: str) -> None:
    assert outcome([("Host", host)], keys=True, host="0.0.0.0") == (400, "invalid_host")


def test_only_clients_of_http_1_0_may_leave_host_out_and_nobody_gives_two() -> None:
    assert outcome([], version="1.0") == (200, None)
    assert outcome([]) == (400, "invalid_host")
    assert outcome([("Host", "localhost"), ("Host", "localhost")]) == (400, "invalid_host")


@pytest.mark.parametrize("host", ["http://a.example", "a.example/", "", "a b", "*.", "*.*", "**"])
def test_an_allowed_host_is_a_name(host: str) -> None:
    with pytest.raises(OptionError, match="is not a host's name; give it without scheme and path"):
        ServeParams(allowed_host=("fine.example", host))


ORIGINS: list[tuple[str, str, dict[str, Any], bool]] = [
    # origin, host, options, whether it may
    ("http://localhost:8000", "localhost:8000", {}, True),
    ("http://LOCALHOST", "localhost:80", {}, True),
    ("https://[::1]:8000", "[::1]:8000", {}, True),
    ("https://treadle.example", "treadle.example", {"allowed_host": ("treadle.example",)}, True),
    ("https://treadle.example", "127.0.0.1:8000", {"allowed_host": ("treadle.example",)}, True),
    ("https://treadle.example", "127.0.0.1:8000", {"allowed_host": ("*",)}, False),
    (EVIL, "127.0.0.1:8000", {"allowed_host": ("*",)}, False),
    (EVIL, "127.0.0.1:8000", {}, False),
    (EVIL, "127.0.0.1:8000", {"cors_origin": (EVIL,)}, True),
    (EVIL, "127.0.0.1:8000", {"cors_origin": ("*",)}, True),
    (EVIL + ":81", "127.0.0.1:8000", {"cors_origin": (EVIL,)}, False),
    ("http://localhost:3000", "localhost:8000", {}, False),
    ("http://localhost.evil.example:8000", "localhost:8000", {}, False),
    ("null", "localhost:8000", {}, False),
    ("", "localhost:8000", {}, False),
    ("chrome-extension://abc", "localhost:8000", {}, False),
]


@pytest.mark.parametrize(("origin", "host", "options", "may"), ORIGINS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_pages_of_other_origins_are_refused(
    origin: str, host: str, options: dict[str, Any], may: bool, method: str
) -> None:
    given = outcome([("Host", host), ("Origin", origin)], method, **options)
    assert given == ((200, None) if may else (403, "origin_not_allowed"))


def test_two_origins_are_not_better_than_one() -> None:
    given = [("Host", "localhost"), ("Origin", "http://localhost"), ("Origin", EVIL)]
    assert outcome(given) == (403, "origin_not_allowed")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_hides_the_origin_says_that_there_is_another(site: str) -> None:
    given = [("Host", "localhost"), ("Sec-Fetch-Site", site)]
    assert outcome(given, "POST") == (403, "origin_not_allowed")
    assert outcome(given, "DELETE") == (403, "origin_not_allowed")
    assert outcome(given, "GET") == (200, None)  # a link on another page leads to this one


def test_the_own_page_works_behind_a_proxy_that_changes_host() -> None:
    given = [("Host", "127.0.0.1:8000"), ("Origin", "https://treadle.example")]
    assert outcome([*given, ("Sec-Fetch-Site", "same-origin")]) == (200, None)
    assert outcome(given) == (403, "origin_not_allowed")
    assert outcome(given, keys=True, host="0.0.0.0") == (200, None)


@pytest.mark.parametrize(
    ("given", "may"),
    [
        (None, True),
        ("application/json", True),
        ("Application/JSON; charset=UTF-8", True),
        ("application/vnd.api+json", True),
        ("application/x-www-form-urlencoded", True),  # what curl -d says
        ("text/plain", False),
        ("text/plain;charset=UTF-8", False),
        ("multipart/form-data; boundary=x", False),
        ("text/plain, application/json", False),
        ("text/json+json", False),
        ("", False),
    ],
)
def test_a_body_is_json(given: str | None, may: bool) -> None:
    headers = [("Host", "localhost")] if given is None else [("Host", "localhost"), ("Content-Type", given)]
    for keys in (False, True):
        assert outcome(headers, keys=keys) == ((200, None) if may else (415, "unsupported_content_type"))
    assert outcome([*headers, ("Content-Type", "text/plain")])[0] == 415
    assert outcome(headers, "GET") == (200, None)


def test_a_form_of_a_page_is_refused_even_of_an_allowed_one() -> None:
    given = [("Host", "localhost"), ("Content-Type", "application/x-www-form-urlencoded"), ("Origin", EVIL)]
    assert outcome(given, cors_origin=("*",)) == (415, "unsupported_content_type")


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, cors_origin=("http://page.test",)) as each:
        yield each


def ask(served: Serving, **headers: str) -> httpx.Response:
    return served.request(
        "POST", TEXTS, content=BODY, headers={name.replace("_", "-"): headers[name] for name in headers}
    )


def test_a_server_tells_a_foreign_page_what_its_operator_can_do(served: Serving) -> None:
    before = served.scheduler.num_unfinished
    for headers, status, says in (
        ({"host": f"evil.example:{served.server.port}"}, 403, "--allowed-host"),
        ({"origin": EVIL}, 403, "--cors-origin"),
        ({"content_type": "text/plain"}, 415, "application/json"),
    ):
        refused = ask(served, **headers)
        assert refused.status_code == status
        assert says in refused.json()["error"]["message"]
        assert "access-control-allow-origin" not in refused.headers
        assert served.scheduler.num_unfinished == before
    for path in ("/", "/live", "/metrics", "/v1/models", "/nowhere"):
        assert served.request("GET", path, headers={"Host": "evil.example"}).status_code == 403


def test_a_server_answers_everybody_else(served: Serving) -> None:
    assert ask(served).status_code == 200
    assert ask(served, content_type="application/x-www-form-urlencoded").status_code == 200
    assert ask(served, origin=served.url, content_type="application/json").status_code == 200
    allowed = ask(served, origin="http://page.test", content_type="application/json")
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "http://page.test")
    assert served.client().models.list()
