"""Queue, cancelling, keys, time limits, shutting down: what operators rely on."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Generator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import httpx
import openai
import pytest
from forking import start_command

from treadle.bundle.bundle import read_bundle
from treadle.engine.runners.runner import Runner
from treadle.routing.embedder import StaticEmbedder
from treadle.serving.openai.protocol import HttpProtocol

from conftest import bundle_without_samples
from failing import FailingSteps
from serving import CHAT, Serving, serving

TEXTS = "/v1/completions"
LONG: dict[str, Any] = {"model": "auto", "prompt": "add three", "max_tokens": 450, "temperature": 0}
SHORT: dict[str, Any] = {**LONG, "max_tokens": 2}


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, max_batch=2, max_queue=2) as each:
        yield each


def test_beyond_the_queue_requests_get_429_and_when_to_try_again(served: Serving) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with served.paused():
            accepted = [pool.submit(served.post, TEXTS, SHORT) for _ in range(4)]
            served.wait_until(lambda: served.scheduler.num_unfinished == 4)
            with pytest.raises(openai.RateLimitError, match="the queue is full: 2 sequences are waiting") as refused:
                served.client().completions.create(**SHORT)
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
            assert refused.value.code == "queue_full"
        assert [each.result().status_code for each in accepted] == [200] * 4
    assert served.post(TEXTS, SHORT).status_code == 200


def test_a_request_with_many_sequences_does_not_overfill_the_queue(served: Serving) -> None:
    three = {**SHORT, "prompt": ["a", "b", "c"]}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with served.paused():
            accepted = [pool.submit(served.post, TEXTS, three)]
            served.wait_until(lambda: served.scheduler.num_unfinished == 3)
            refused = served.post(TEXTS, three)  # two would have to wait, and there is room for one
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert "1 sequences are waiting, and the request brings 3 more" in refused.json()["error"]["message"]
            accepted.append(pool.submit(served.post, TEXTS, SHORT))
            served.wait_until(lambda: served.scheduler.num_unfinished == 4)
        assert [each.result().status_code for each in accepted] == [200, 200]


def test_unfinished_answers_share_a_budget_of_values(bundle_folder: Path) -> None:
    many = {**SHORT, "max_tokens": 50, "logprobs": 1}  # 100 values
    with (
        serving(bundle_folder, max_batch=9, max_values=100) as served,
        concurrent.futures.ThreadPoolExecutor(5) as pool,
    ):
        with served.paused():
            accepted = [pool.submit(served.post, TEXTS, many) for _ in range(4)]
            served.wait_until(lambda: served.scheduler.num_unfinished == 4)
            refused = served.post(TEXTS, many)  # a client may have half of eight largest answers
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "values_full")
            assert int(refused.headers["retry-after"]) == 5
            accepted.append(pool.submit(served.post, TEXTS, SHORT))
            served.wait_until(lambda: served.scheduler.num_unfinished == 5)
        assert [each.result().status_code for each in accepted] == [200] * 5
        assert [served.post(TEXTS, many | {"stream": each}).status_code for each in (True, False) * 4] == [200] * 8


def test_a_request_that_can_never_fit_is_refused_for_good(served: Serving) -> None:
    assert served.post(TEXTS, {**SHORT, "prompt": ["a", "b"], "n": 2}).status_code == 200
    refused = served.post(TEXTS, {**SHORT, "prompt": ["a", "b", "c"], "n": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "got 6 sequences (prompts times n); allowed: at most 4" in refused.json()["error"]["message"]
    assert served.scheduler.num_unfinished == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_cancelled_within_a_step(served: Serving, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = f"POST {TEXTS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    client = socket.create_connection(("127.0.0.1", served.server.port))
    client.sendall(head + body)
    served.wait_until(lambda: bool(served.engine.running) and len(served.engine.running[0].events) > 2)
    (row,) = served.engine.running
    with served.paused():
        client.close()
        served.wait_until(lambda: served.scheduler.is_cancelling)
        before = len(row.events)
    served.wait_until_idle()
    assert len(row.events) <= before + 1 < LONG["max_tokens"]
    assert served.engine.running == ()


def test_a_client_that_goes_away_while_it_waits_never_runs(served: Serving) -> None:
    with served.paused():
        sockets = []
        for _ in range(4):
            client = socket.create_connection(("127.0.0.1", served.server.port))
            body = json.dumps(LONG).encode()
            client.sendall(f"POST {TEXTS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            sockets.append(client)
        served.wait_until(lambda: served.scheduler.num_unfinished == 4)
        for client in sockets:
            client.close()
    served.wait_until_idle()
    assert served.post(TEXTS, SHORT).status_code == 200


def test_a_failing_forward_pass_costs_its_requests_and_not_the_server(served: Serving) -> None:
    engine, own = served.engine, served.engine.runner
    engine.runner = Runner(engine.model, engine.blend, [FailingSteps(MemoryError("no room"))])
    try:
        with pytest.raises(openai.InternalServerError, match="the forward pass failed"):
            served.client().completions.create(**LONG)
        stream = served.client().completions.create(**LONG, stream=True)
        with pytest.raises(openai.APIError, match="the forward pass failed"):
            list(stream)
        served.wait_until_idle()
    finally:
        engine.runner = own
    assert served.engine.running == ()
    assert served.client().completions.create(**SHORT).usage.completion_tokens == 2


def test_a_request_that_takes_too_long_is_given_up(bundle_folder: Path) -> None:
    with serving(bundle_folder, request_timeout=1.0) as served:
        with served.paused():
            answer = served.post(TEXTS, LONG)
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "timeout"
        served.wait_until_idle()


def test_a_body_that_trickles_in_is_refused(bundle_folder: Path) -> None:
    with serving(bundle_folder, read_timeout=1.0) as served:
        with socket.create_connection(("127.0.0.1", served.server.port)) as client:
            client.sendall(f"POST {TEXTS} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
            client.settimeout(20)
            assert b"408" in client.recv(1000).split(b"\r\n")[0]


class HastyProtocol(HttpProtocol):
    head_seconds = 0.3


def test_a_head_without_an_end_is_cut_off(served: Serving) -> None:
    def fill(connection: socket.socket) -> None:
        for _ in range(1000):
            connection.sendall(b"x" * 1000)
            time.sleep(0.001)

    with socket.create_connection(("127.0.0.1", served.server.port)) as endless:
        endless.sendall(b"GET /live HTTP/1.1\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            fill(endless)


def test_a_head_that_does_not_come_in_time_ends_its_connection(bundle_folder: Path) -> None:
    begun, whole = b"GET /live HTTP/1.1\r\n", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(bundle_folder, HastyProtocol) as hasty:
        for parts in ([], [begun], [whole, begun]):
            with socket.create_connection(("127.0.0.1", hasty.server.port)) as slow:
                slow.settimeout(20)
                for part in parts:
                    slow.sendall(part)
                    time.sleep(0.1)
                received = b"".join(iter(partial(slow.recv, 1000), b""))
                assert received.count(b"200 OK") == (whole in parts)


def test_a_slow_reader_holds_nobody_up(served: Serving) -> None:
    body = json.dumps({**LONG, "stream": True, "logprobs": 5}).encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", served.server.port))
    slow.sendall(f"POST {TEXTS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert slow.recv(1) == b"H"
    assert served.client().completions.create(**SHORT).usage.completion_tokens == 2
    served.wait_until_idle()  # the engine is done with it, though it has read one byte
    slow.close()


KEYS = {"api_key": ("whole",), "admin_key": "root"}


@pytest.fixture(scope="module")
def guarded(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Serving]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("few math,science\nnone ,\n")
    with serving(bundle_folder, api_key_file=str(file), cors_origin=("http://page.test",), **KEYS) as each:
        yield each


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/openapi.json", "/v1/adapters", "/nowhere", "/page/nowhere"]
)
def test_without_a_key_nothing_is_answered_but_live_and_health_and_the_pages_files(guarded: Serving, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer wholf"}):
        answer = guarded.request("GET", path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.request("GET", "/live").status_code == guarded.request("GET", "/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()


def test_a_key_sees_and_uses_its_adapters_only(guarded: Serving) -> None:
    few = guarded.client("few")
    assert [model.id for model in few.models.list()] == ["auto", "bundle", "math", "science", "base"]
    for model in ("code", "cod"):
        with pytest.raises(openai.NotFoundError) as refused:
            few.chat.completions.create(model=model, messages=CHAT)
        assert "'code'" not in str(refused.value).replace(f"model '{model}'", "")
    with pytest.raises(openai.BadRequestError, match=r"unknown adapter 'code'\. Allowed: math, science"):
        few.completions.create(**{**SHORT, "extra_body": {"treadle": {"fixed": {"code": 1.0}}}})
    with pytest.raises(openai.BadRequestError, match=r"unknown adapter 'code'\. Allowed: math, science"):
        few.completions.create(**{**SHORT, "extra_body": {"treadle": {"adapters": ["code"]}}})
    answer = few.completions.create(**{**SHORT, "extra_body": {"treadle": {"trace": True}}})
    assert answer.choices[0].model_extra["treadle"]["adapters"] == ["math", "science"]
    headers = {"Authorization": "Bearer few"}
    assert guarded.post("/v1/route", {"text": "def loop"}, headers=headers).json()["names"] == ["math", "science"]


@pytest.fixture(scope="module")
def equal_bundle(
    tmp_path_factory: pytest.TempPathFactory, equal_folders: dict[str, Path], embedder: StaticEmbedder
) -> Path:
    """Adapters of equal ranks, which any combine takes."""
    return bundle_without_samples(tmp_path_factory.mktemp("equal-served"), equal_folders, embedder)


SCORED: dict[str, Any] = {**LONG, "max_tokens": 0, "echo": True, "logprobs": 0}


def scored(served: Serving, key: str, **treadle: Any) -> list[float]:
    """Return the log-probabilities of a prompt's tokens."""
    body = {**SCORED, "treadle": {"fixed": {"math": 0.5, "science": 0.5}, **treadle}}
    answer = served.post(TEXTS, body, headers={"Authorization": f"Bearer {key}"}).json()
    return answer["choices"][0]["logprobs"]["token_logprobs"][1:]


@pytest.mark.parametrize("combine", ["sum", "linear", "paper"])
def test_an_adapter_that_may_not_take_part_changes_nothing(equal_bundle: Path, tmp_path: Path, combine: str) -> None:
    (tmp_path / "keys").write_text("whole\nfew math,science\n")
    with serving(equal_bundle, api_key_file=str(tmp_path / "keys"), admin_key="root", prefix_cache=0) as served:
        limited = scored(served, "few", combine=combine)
        chosen = scored(served, "whole", combine=combine, adapters=["math", "science"])
        everything = scored(served, "whole", combine=combine)
        headers = {"Authorization": "Bearer root"}
        assert served.request("DELETE", "/v1/adapters/code", headers=headers).status_code == 200
        alone = scored(served, "whole", combine=combine)
    assert limited == pytest.approx(alone, abs=1e-4)
    assert chosen == pytest.approx(alone, abs=1e-4)
    assert (everything == pytest.approx(alone, abs=1e-4)) == (combine != "paper")  # there its B is added unweighted


def test_a_refusal_names_only_adapters_that_may_take_part(guarded: Serving) -> None:
    body = {**SHORT, "treadle": {"combine": "linear"}}
    refused = guarded.post(TEXTS, body, headers={"Authorization": "Bearer few"}).json()["error"]["message"]
    assert "science differ from math" in refused
    assert "code" not in refused
    body["treadle"]["adapters"] = ["math"]  # one adapter fits itself, whatever else is loaded
    assert guarded.post(TEXTS, body, headers={"Authorization": "Bearer few"}).status_code == 200


def test_the_figures_name_all_adapters_and_need_a_key_for_all(guarded: Serving) -> None:
    for key, status in (("few", 403), ("none", 403), ("whole", 200), ("root", 200)):
        answer = guarded.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
        assert (answer.status_code, 'adapter="code"' in answer.text) == (status, status == 200)
    refused = guarded.request("GET", "/metrics", headers={"Authorization": "Bearer few"}).json()["error"]
    assert refused["code"] == "limited_key"


def test_a_key_without_adapters_gets_the_base(guarded: Serving) -> None:
    none = guarded.client("none")
    assert [model.id for model in none.models.list()] == ["auto", "bundle", "base"]
    texts = {
        none.completions.create(**{**SHORT, "max_tokens": 12, "model": model}).choices[0].text
        for model in ("auto", "base")
    }
    assert len(texts) == 1


def test_callers_do_not_share_prefixes(guarded: Serving) -> None:
    prompt = {**SHORT, "model": "math", "prompt": "the planet heat cell " * 3}

    def cached(key: str) -> int:
        return guarded.client(key).completions.create(**prompt).usage.prompt_tokens_details.cached_tokens

    assert [cached("few"), cached("whole")] == [0, 0]
    assert [cached("few"), cached("whole")] == [len(prompt["prompt"]) - 1] * 2


def test_only_the_admin_key_manages_adapters(guarded: Serving) -> None:
    for method, path in (
        ("GET", "/v1/adapters"),
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/math"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ):
        answer = guarded.request(method, path, headers={"Authorization": "Bearer whole"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_only")
    assert guarded.request("GET", "/v1/adapters", headers={"Authorization": "Bearer root"}).status_code == 200


def test_cors_is_for_named_origins_only(guarded: Serving, served: Serving) -> None:
    def preflight(server: Serving, origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return server.request("OPTIONS", TEXTS, headers=headers)

    assert preflight(guarded, "http://page.test").headers["access-control-allow-origin"] == "http://page.test"
    assert "access-control-allow-origin" not in preflight(guarded, "http://other.test").headers
    assert "access-control-allow-origin" not in preflight(served, "http://page.test").headers


def test_tls(bundle_folder: Path, tmp_path: Path) -> None:
    import ssl

    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout key.pem -out cert.pem"
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command.split(), *name], check=True, capture_output=True, cwd=tmp_path)
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    with serving(bundle_folder, **files) as served:
        trusted = ssl.create_default_context(cafile=files["tls_cert"])
        url = served.url.replace("http:", "https:")
        assert httpx.get(url + "/live", verify=trusted).status_code == 200


def test_what_does_not_finish_in_time_is_told_so(bundle_folder: Path) -> None:
    with serving(bundle_folder, shutdown_timeout=0.2) as served, concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = served.client().completions.create(**LONG, n=8, stream=True)
        next(iter(stream))
        whole = pool.submit(served.post, TEXTS, {**LONG, "n": 8})
        served.wait_until(lambda: served.scheduler.num_unfinished == 16)
        served.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        assert whole.result().status_code == 503


def start_server(bundle: Path, *flags: object) -> tuple[BaseProcess, TextIO, str]:
    """Start `treadle serve`; return the process, its log and its address."""
    process, log = start_command("serve", bundle, "--port", 0, *flags, TREADLE_MAX_N="32")
    for line in log:
        if found := re.search(r"serving on (http://[\d.:]+)", line):
            return process, log, found[1]
    raise AssertionError("it did not start")


def test_the_log_says_where_the_page_is_which_models_there_are_and_what_routes_them(bundle_folder: Path) -> None:
    process, log, url = start_server(bundle_folder)
    with log:
        page, models, routing = (next(log) for _ in range(3))
        ask_to_end(process)
        assert exit_code(process) == 0
    assert page.endswith(f"page: {url}/\n")
    assert "auto and bundle (routed); alone: math, science, code; base (no adapter)" in models
    params = read_bundle(bundle_folder).router.params
    assert f"score {params.score}, rule {params.rule}; weights are made every {params.every} tokens" in routing


def ask_to_end(process: BaseProcess) -> None:
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)


def exit_code(process: BaseProcess) -> int | None:
    process.join(30)
    return process.exitcode


def test_sigterm_finishes_what_runs_and_exits_with_0(bundle_folder: Path) -> None:
    process, log, url = start_server(bundle_folder, "--log-format", "json")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(**LONG, n=4, stream=True)
    chunks = [next(iter(stream))]
    ask_to_end(process)
    until = time.monotonic() + 10
    while httpx.get(f"{url}/health").status_code == 200:
        assert time.monotonic() < until
    assert httpx.get(f"{url}/live").status_code == 200
    with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
        client.completions.create(**SHORT)
    assert refused.value.status_code == 503
    chunks += stream
    assert sum(chunk.choices[0].finish_reason is not None for chunk in chunks) == 4
    assert exit_code(process) == 0
    client.close()
    with log:
        lines = [json.loads(line) for line in log]
    (line,) = [line for line in lines if line.get("path") == TEXTS and line["status"] == 200]
    assert any("shutting down: 4 sequences are left" in line.get("message", "") for line in lines)
    assert line["tokens"] == 4 * 450 or line["tokens"] > 4
    assert "add three" not in json.dumps(lines)


def test_a_second_signal_ends_without_waiting_for_what_runs(bundle_folder: Path) -> None:
    process, log, url = start_server(bundle_folder)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = iter(client.completions.create(**LONG, n=4, stream=True))
    next(stream)
    ask_to_end(process)
    until = time.monotonic() + 10
    while httpx.get(f"{url}/health").status_code == 200:
        assert time.monotonic() < until
    ask_to_end(process)
    with pytest.raises(openai.APIError, match="the server is shutting down"):
        for _ in stream:
            pass
    assert exit_code(process) == 0
    client.close()
    with log:
        text = log.read()
    assert "a second signal came: 4 sequences do not finish" in text
    assert "Traceback" not in text
    assert "Error" not in text


@pytest.mark.parametrize("sent", [b"BLAH\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n"])
def test_what_is_no_http_gets_an_error_like_all_others(served: Serving, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port)) as client:
        client.settimeout(20)
        client.sendall(sent)
        received = b"".join(iter(partial(client.recv, 1000), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert f"content-length: {len(body)}".encode() in head
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert "Content-Length" in error["message"]
