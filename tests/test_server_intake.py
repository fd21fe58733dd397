"""No client ends or starves another: bodies, connections, preparation and adapters of one leave the others alone."""

import concurrent.futures
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.engine.engine import Engine
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import StaticEmbedder, encode_views
from treadle.routing.fitting import centroid_of
from treadle.serving.openai import adapters, generating, protocol
from treadle.serving.openai.answers import json_pieces
from treadle.serving.openai.generating import read_body
from treadle.serving.openai.queues import SMALL_WORK_BYTES
from treadle.serving.openai.targets import Routers

from conftest import save_adapter
from serving import Serving, serving

TEXTS, ADAPTERS = "/v1/completions", "/v1/adapters"
BODY: dict[str, Any] = {"model": "math", "prompt": "add three", "max_tokens": 2, "temperature": 0}
ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    save_adapter(folder / "poetry", seed=9, r=5)
    return folder


@pytest.fixture(scope="module")
def served(bundle_folder: Path, shelf: Path) -> Generator[Serving]:
    with serving(bundle_folder, api_key=("key",), admin_key="root", adapter_dir=str(shelf)) as each:
        yield each


def connect(served: Serving) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", served.server.port))
    client.settimeout(20)
    return client


def request(path: str, body: bytes = b"", *, key: str = "key", length: int | None = None) -> bytes:
    """Return a POST of a body, of which more may be announced than comes."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Authorization: Bearer {key}\r\nContent-Length: {length or len(body)}\r\n\r\n".encode() + body


def is_closed(client: socket.socket) -> bool:
    """Return whether a connection ends, after what may still come."""
    try:
        while client.recv(4096):
            pass
    except ConnectionError:
        pass
    return True  # else it has timed out


@pytest.mark.parametrize(("path", "key", "status"), [("/live", "key", 405), ("/", "", 405), (TEXTS, "wrong", 401)])
def test_who_may_not_send_a_body_is_answered_before_it_comes(
    served: Serving, path: str, key: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "UNREAD_BODY_SECONDS", 0.2)
    with connect(served) as client:
        client.sendall(request(path, b"x" * 1000, key=key, length=4 << 20))
        assert f" {status} ".encode() in client.recv(4096).split(b"\r\n")[0]
        assert is_closed(client)  # nobody waits for the rest of it


def test_a_client_that_does_not_read_is_closed(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.3)
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key\r\n\r\n"

    def fill(client: socket.socket) -> None:
        for _ in range(1000):
            client.sendall(asked * 50)
            time.sleep(0.02)

    with connect(served) as client, pytest.raises(ConnectionError):
        fill(client)
    assert served.request("GET", "/live").status_code == 200


def test_of_too_many_connections_the_oldest_idle_one_is_closed(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.wait_until(lambda: not served.server.server_state.connections)
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 3)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, served.paused():  # the pool waits for what runs
        busy = pool.submit(served.post, TEXTS, BODY, headers={"Authorization": "Bearer key"})
        served.wait_until(lambda: served.scheduler.num_unfinished == 1)
        clients = [connect(served)]
        clients[0].sendall(request(TEXTS, b"{", length=1000))  # half of a body is nothing that is worked on
        assert served.request("GET", "/live").status_code == 200  # by now the half has come
        clients += [connect(served) for _ in range(3)]
        assert is_closed(clients[0])
        assert served.request("GET", "/live").status_code == 200
        for client in clients:
            client.close()
    assert busy.result().status_code == 200  # what runs is not closed for others


class Held:
    """Holds whatever calls it."""

    def __init__(self, call: Callable[..., Any], applies: Callable[..., bool] = lambda *_: True) -> None:
        self._call = call
        self._applies = applies
        self.begun, self.go = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        if self._applies(*given):
            self.begun.set()
            assert self.go.wait(30)
        return self._call(*given)


def is_large(_: Any, given: dict[str, Any], *__: Any) -> bool:
    return len(str(given)) > SMALL_WORK_BYTES


def test_large_requests_do_not_hold_up_a_small_one_and_abandoned_ones_are_not_read(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(read_body, is_large)
    monkeypatch.setattr(generating, "read_body", held)
    large = request(TEXTS, json.dumps({**BODY, "prompt": "x" * (2 * SMALL_WORK_BYTES)}).encode())
    clients = [connect(served) for _ in range(4)]
    try:
        for client in clients:
            client.sendall(large)
        assert held.begun.wait(20)
        assert served.post(TEXTS, BODY, headers={"Authorization": "Bearer key"}).status_code == 200
        line = served.server.app.state.treadle.preparing
        served.wait_until(lambda: line.num_waiting == 3)
        for client in clients:
            client.close()
        served.wait_until(lambda: line.num_waiting == 0)
    finally:
        held.go.set()
    assert served.post(TEXTS, BODY, headers={"Authorization": "Bearer key"}).status_code == 200
    assert held.calls == 3  # one large and two small


def test_an_adapter_is_read_beside_everything_else(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(adapters.read_adapter)
    monkeypatch.setattr(adapters, "read_adapter", held)
    body = {"name": "poetry", "path": "poetry", "samples": ["heat the loop"]}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        adding = pool.submit(served.post, ADAPTERS, body, headers=ADMIN)
        try:
            assert held.begun.wait(20)
            assert served.post(TEXTS, BODY, headers=ADMIN).status_code == 200
            assert served.post("/v1/route", {"text": "loop"}, headers=ADMIN).status_code == 200
        finally:
            held.go.set()
        assert adding.result().status_code == 200
    assert served.request("DELETE", ADAPTERS + "/poetry", headers=ADMIN).status_code == 200


def test_an_adapter_that_cannot_fit_is_refused_by_its_header(
    served: Serving, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(shelf / "huge", seed=1)
    half, names = 1 << 29, [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
    shapes = [[4, half // 16], [half // 16, 4]]
    header = json.dumps({
        name: {"dtype": "F32", "shape": shape, "data_offsets": [index * half, (index + 1) * half]}
        for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }).encode()  # fmt: skip
    with (shelf / "huge" / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * half)
    monkeypatch.setattr(adapters, "read_adapter", pytest.fail)
    body = {"name": "huge", "path": "huge", "samples": ["heat"]}
    answer = served.post(ADAPTERS, body, headers=ADMIN)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].count("no linear layer of the model has 33554432") == 2


def test_what_is_prepared_when_the_server_ends_is_told_so(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(read_body)
    monkeypatch.setattr(generating, "read_body", held)
    with serving(bundle_folder) as served, concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(served.post, TEXTS, BODY)
        assert held.begun.wait(20)
        waiting = pool.submit(served.post, TEXTS, BODY)
        served.wait_until(lambda: served.server.app.state.treadle.preparing.num_waiting == 1 or held.calls > 1)
        served.server.handle_exit(signal.SIGTERM, None)
        held.go.set()
        assert {each.result(20).status_code for each in (running, waiting)} == {503}


def test_routers_of_chosen_adapters_are_few_and_say_the_same(engine: Engine, embedder: StaticEmbedder) -> None:
    kept, whole = Routers(engine, max_routers=2), engine.router
    views = encode_views(embedder, ["add three plus four", "def loop return list"], whole.tails)
    is_running = np.array([False, True])
    sets = [frozenset(names) for count in (1, 2) for names in combinations(whole.names, count)]
    for names in [*sets, *sets]:
        chosen = kept.among(names)
        expected = whole.centroids
        for name in set(whole.names) - names:
            expected = expected.remove(name)
        for score in ("cosine", "centred"):
            one, other = (each.cosines(views[:, 0], score) for each in (chosen.centroids, expected))
            np.testing.assert_array_equal(one, other)
        one, other = (each.evidence(views, is_running) for each in (chosen.centroids, expected))
        np.testing.assert_array_equal(one, other)
        assert len(kept) <= 2
        assert kept.among(names) is chosen
    assert kept.among(frozenset(whole.names)) is whole


def test_chosen_centroids_hold_their_own_numbers_alone(embedder: StaticEmbedder) -> None:
    made = Centroids.empty(embedder.id, embedder.dim, embedder.tails)
    for number in range(20):
        made = made.join(centroid_of(f"a{number}", ["add three", "heat the planet"], embedder))
    few = made.among([f"a{number}" for number in range(5)])
    assert few.num_bytes == pytest.approx(made.num_bytes / 4)
    for stage in few.stages.values():
        assert stage.factors.base is None or len(stage.factors.base) == 5  # not a view of all


@pytest.mark.parametrize("document", [
    {}, [], {"a": [], "b": {}, "c": None, "d": [[[[list(range(1000))]]]]},
    {"choices": [{"logprobs": {"content": [{"token": "\u00e9", "n": [number]} for number in range(700)]}}]},
])  # fmt: skip
def test_a_document_in_pieces_is_the_document(document: Any) -> None:
    pieces = list(json_pieces(document))
    assert json.loads(b"".join(pieces)) == document
    assert max(map(len, pieces)) < 12_000


def test_a_long_answer_is_written_beside_the_event_loop_and_is_the_same(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    pieces = json_pieces
    monkeypatch.setattr(
        generating, "json_pieces", lambda value: (threads.append(threading.current_thread().name), pieces(value))[1]
    )
    body = {**BODY, "prompt": "the planet heat " * 20, "echo": True, "logprobs": 5}
    ask = partial(served.post, TEXTS, headers=ADMIN)
    short, long = (ask({**body, "n": n}).json()["choices"] for n in (1, 2))
    assert [each["logprobs"] for each in long] == [short[0]["logprobs"]] * 2
    ask(BODY)
    assert [name.partition("_")[0] for name in threads] == ["treadle-write"] * 2 + ["MainThread"] or threads
    stream = ask({**body, "stream": True}).text
    first = json.loads(stream.split("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["logprobs"]["tokens"][:-1] == short[0]["logprobs"]["tokens"][:-2]
