"""A real server of a tiny bundle on a free port, in a thread of the test's process.

It speaks plain HTTP. Clients verify nothing, because reading the certificates of this machine takes 20 ms a client.
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.loading import load
from treadle.engine.preparing import open_bundle
from treadle.serving.openai.keys import Keyring
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.protocol import HttpProtocol
from treadle.serving.openai.queues import Client, WorkQueue
from treadle.serving.openai.serve import Server
from treadle.serving.openai.state import ServerState

CHAT = [{"role": "user", "content": "add three plus four"}]


class Serving:
    """What tests talk to."""

    def __init__(self, server: Server, engine: Engine) -> None:
        self.server = server
        self.engine = engine
        self.state: ServerState = server.app.state.treadle
        self.scheduler = self.state.scheduler
        self.url = f"http://127.0.0.1:{server.port}"
        self.clients: list[openai.OpenAI] = []  # closed at the end: one in a cycle leaves its socket to chance

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(verify=False)
        made = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, http_client=http, **options
        )
        self.clients.append(made)
        return made

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=60, verify=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        self.wait_until(lambda: self.scheduler.num_unfinished == 0)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Hold the engine's thread between two steps."""
        is_held, go = threading.Event(), threading.Event()

        def hold() -> None:
            is_held.set()
            go.wait(30)

        self.scheduler.call(hold)
        assert is_held.wait(30)
        try:
            yield
        finally:
            go.set()

    @contextmanager
    def slowed(self, seconds: float = 0.02) -> Generator[None]:
        """Make the engine's thread wait between its steps: a browser is slower than a tiny model."""
        is_over = threading.Event()

        def slow() -> None:
            while not is_over.is_set():
                self.scheduler.call(lambda: time.sleep(seconds)).result(60)

        thread = threading.Thread(target=slow)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join(60)

    @contextmanager
    def blocked(self, line: WorkQueue, num_bytes: int = 0, threads: int = 2) -> Generator[None]:
        """Hold threads of a queue with work of a size; other work waits there until the end of the block."""
        begun, go = threading.Barrier(threads + 1, timeout=30), threading.Event()

        def hold(_: Any) -> None:
            begun.wait()
            go.wait(30)

        for _ in range(threads):
            line.queue(hold, Client(), num_bytes)
        begun.wait()
        try:
            yield
        finally:
            go.set()


@contextmanager
def serving(bundle: Path | None, http: type[HttpProtocol] = HttpProtocol, **params: Any) -> Generator[Serving]:
    """Serve a bundle, or the base and the adapters that `params` name, until the end of the block."""
    options = ServeParams(port=0, **params)
    read = open_bundle(bundle, options)
    engine = load(read)
    # a broken engine fails its test here, not in waiting
    engine.generate("x", sampling=SamplingParams(max_tokens=1), routing=RoutingParams.base())
    server = Server(read, engine, options, Keyring(options), http)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    made = Serving(server, engine)
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        server.should_exit = True
        thread.join(30)
        engine.detach()
        assert not thread.is_alive()
