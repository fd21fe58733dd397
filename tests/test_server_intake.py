"""No client ends or starves another: bodies, connections, preparation and adapters of one leave the others alone."""

import concurrent.futures
import json
import signal
import socket
import threading
import time
from collections.abc import Generator
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
from treadle.serving.openai.answers import json_pieces
from treadle.serving.openai.protocol import HttpProtocol
from treadle.serving.openai.queues import SMALL_WORK_BYTES, Check, Client, WorkAbandoned
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


class HastyProtocol(HttpProtocol):
    """Few connections, and little time for each."""

    write_seconds, unread_body_seconds, max_connections = 0.3, 0.2, 3


@pytest.fixture(scope="module")
def hasty(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, HastyProtocol, api_key=("key",)) as each:
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
def test_who_may_not_send_a_body_is_answered_before_it_comes(hasty: Serving, path: str, key: str, status: int) -> None:
    with connect(hasty) as client:
        client.sendall(request(path, b"x" * 1000, key=key, length=4 << 20))
        assert f" {status} ".encode() in client.recv(4096).split(b"\r\n")[0]
        assert is_closed(client)  # nobody waits for the rest of it


def test_a_client_that_does_not_read_is_closed(hasty: Serving) -> None:
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key\r\n\r\n"

    def fill(client: socket.socket) -> None:
        for _ in range(1000):
            client.sendall(asked * 50)
            time.sleep(0.02)

    with connect(hasty) as client, pytest.raises(ConnectionError):
        fill(client)
    assert hasty.request("GET", "/live").status_code == 200


def test_of_too_many_connections_the_oldest_idle_one_is_closed(hasty: Serving) -> None:
    hasty.wait_until(lambda: not hasty.server.server_state.connections)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, hasty.paused():  # the pool waits for what runs
        busy = pool.submit(hasty.post, TEXTS, BODY, headers={"Authorization": "Bearer key"})
        hasty.wait_until(lambda: hasty.scheduler.num_unfinished == 1)
        clients = [connect(hasty)]
        clients[0].sendall(request(TEXTS, b"{", length=1000))  # half of a body is nothing that is worked on
        assert hasty.request("GET", "/live").status_code == 200  # by now the half has come
        clients += [connect(hasty) for _ in range(3)]
        assert is_closed(clients[0])
        assert hasty.request("GET", "/live").status_code == 200
        for client in clients:
            client.close()
    assert busy.result().status_code == 200  # what runs is not closed for others


def test_large_requests_do_not_hold_up_a_small_one_and_abandoned_ones_are_not_read(served: Serving) -> None:
    large = request(TEXTS, json.dumps({**BODY, "prompt": "x" * (2 * SMALL_WORK_BYTES)}).encode())
    clients, line = [connect(served) for _ in range(4)], served.state.preparing
    with served.blocked(line, 2 * SMALL_WORK_BYTES, threads=1):
        for client in clients:
            client.sendall(large)
        served.wait_until(lambda: line.num_waiting == 4)
        assert served.post(TEXTS, BODY, headers={"Authorization": "Bearer key"}).status_code == 200
        for client in clients:
            client.close()
        served.wait_until(lambda: line.num_waiting == 0)
    assert served.post(TEXTS, BODY, headers={"Authorization": "Bearer key"}).status_code == 200


def test_an_adapter_is_read_beside_everything_else(served: Serving) -> None:
    body = {"name": "poetry", "path": "poetry", "samples": ["heat the loop"]}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with served.blocked(served.state.reading, threads=1):
            adding = pool.submit(served.post, ADAPTERS, body, headers=ADMIN)
            served.wait_until(lambda: served.state.reading.num_waiting == 1)
            assert served.post(TEXTS, BODY, headers=ADMIN).status_code == 200
            assert served.post("/v1/route", {"text": "loop"}, headers=ADMIN).status_code == 200
            assert not adding.done()
        assert adding.result().status_code == 200
    assert served.request("DELETE", ADAPTERS + "/poetry", headers=ADMIN).status_code == 200


def test_an_adapter_that_cannot_fit_is_refused_by_its_header(served: Serving, shelf: Path) -> None:
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
    body = {"name": "huge", "path": "huge", "samples": ["heat"]}
    answer = served.post(ADAPTERS, body, headers=ADMIN)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.count("no linear layer of the model has 33554432") == 2
    assert "zero" not in message  # as its factors are, had they been read


def test_what_is_prepared_when_the_server_ends_is_told_so(bundle_folder: Path) -> None:
    with serving(bundle_folder) as served, concurrent.futures.ThreadPoolExecutor(1) as pool:
        line, begun = served.state.preparing, threading.Event()

        def until_abandoned(check: Check) -> None:
            begun.set()
            while True:
                check()
                time.sleep(0.005)

        with served.blocked(line, threads=1):
            running = line.queue(until_abandoned, Client())
            assert begun.wait(20)
            waiting = pool.submit(served.post, TEXTS, BODY)
            served.wait_until(lambda: line.num_waiting == 1)
            served.server.handle_exit(signal.SIGTERM, None)
            assert waiting.result(20).status_code == 503
        with pytest.raises(WorkAbandoned):
            running.future.result(20)


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


def test_a_long_answer_is_written_beside_the_event_loop_and_is_the_same(served: Serving) -> None:
    body = {**BODY, "prompt": "the planet heat " * 20, "echo": True, "logprobs": 5}
    ask = partial(served.post, TEXTS, headers=ADMIN)
    short, long = (ask({**body, "n": n}).json()["choices"] for n in (1, 2))
    assert [each["logprobs"] for each in long] == [short[0]["logprobs"]] * 2
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with served.blocked(served.state.writing):
            later = pool.submit(ask, {**body, "n": 2})
            served.wait_until(lambda: served.state.writing.num_waiting == 1)
            assert ask(BODY).status_code == 200  # a short one does not wait for it
            assert not later.done()
        assert later.result().json()["choices"] == long
    stream = ask({**body, "stream": True}).text
    first = json.loads(stream.split("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["logprobs"]["tokens"][:-1] == short[0]["logprobs"]["tokens"][:-2]
