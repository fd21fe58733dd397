"""The plugin's routes over two engines that are stubs: adapters come and go in all of them or in none."""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from treadle.common.errors import OptionError
from treadle.serving.vllm import endpoints, engine_hooks
from treadle.serving.vllm.endpoints import Endpoints, EndpointState
from treadle.serving.vllm.hooks import served_engine
from treadle.serving.vllm.live import Core
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.requests import OptionReader
from treadle.serving.vllm.schedule import Schedule

from conftest import BASE, save_adapter

ADMIN = "root-of-this-test"
NEW = {"name": "late", "path": "late", "samples": ["sum planet loop", "planet loop sum"]}


class Engine:
    """One engine's core, whose worker may refuse an adapter when it is looked at, or when it is put in."""

    def __init__(self, params: PluginParams, tokenizer: Any) -> None:
        bundle, mixture = open_bundle(params)
        core = Core(params, bundle.base_model, Schedule(mixture, tokenizer))
        self.scheduler = SimpleNamespace(treadle=core, requests={})
        self.refuses: dict[bool, str | Exception] = {}  # whether it is put in -> what is wrong

    def collective_rpc(self, function: Any, args: tuple[Any, ...]) -> list[str | None]:
        problem = self.refuses.get(args[0] is not None)
        if isinstance(problem, Exception):
            raise problem
        return [problem]

    @property
    def names(self) -> tuple[str, ...]:
        return self.scheduler.treadle.mixture.names


class Engines:
    """vLLM's client, and the engines behind it."""

    def __init__(self, each: list[Engine]) -> None:
        self.each = each
        self.during: Any = lambda function: None

    async def call_utility_all_async(self, function: str, *arguments: Any) -> list[Any]:
        self.during(function)
        return [getattr(engine_hooks, function)(engine, *arguments) for engine in self.each]


class App(Starlette):
    """vLLM's app, which is FastAPI's."""

    def add_api_route(self, *_: Any, **__: Any) -> None:
        """The figures need vLLM."""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that comes while the server runs."""
    return save_adapter(tmp_path_factory.mktemp("adapters") / "late", seed=9, r=2)


@pytest.fixture
def params(bundle_folder: Path, late: Path, tmp_path: Path) -> PluginParams:
    for name in ("late", "math", "code"):
        shutil.copytree(late, tmp_path / name)
    return PluginParams(bundle=str(bundle_folder), max_adapters=4, max_rank=8, adapter_dir=str(tmp_path))


@pytest.fixture
def engines(params: PluginParams, tokenizer: Any) -> Engines:
    return Engines([Engine(params, tokenizer) for _ in range(2)])


@pytest.fixture
def state(
    bundle_folder: Path, params: PluginParams, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> EndpointState:
    monkeypatch.setenv(endpoints.ADMIN_VARIABLE, ADMIN)
    model = SimpleNamespace(
        tokenizer=str(bundle_folder.parent / BASE), tokenizer_revision=None, trust_remote_code=False, max_model_len=256,
        get_vocab_size=lambda: 260, served_model_name=["demo", "auto", "math", "code"],
    )  # fmt: skip
    processor = SimpleNamespace(treadle=OptionReader.open(params))
    engine = served_engine(SimpleNamespace(input_processor=processor, model_config=model, engine_core=engines))
    assert engine is not None
    return EndpointState(engine)


@pytest.fixture
def http(state: EndpointState) -> TestClient:
    app = App()
    Endpoints().attach_router(app)
    app.state.treadle = state
    return TestClient(app, raise_server_exceptions=False, headers={"X-Admin-Key": ADMIN})


def test_a_chat_is_routed_as_its_text(state: EndpointState, engines: Engines, tokenizer: Any, http: TestClient) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "def loop"}]}]
    text = http.post("/v1/treadle/route", json={"prompt": "def loop"}).json()
    chat = http.post("/v1/treadle/route", json={"messages": messages}).json()
    assert chat["weights"][-1] == text["weights"][-1]
    assert chat["prompt_tokens"] > text["prompt_tokens"]
    other = tokenizer("<|a|>def loop<|template|> of heat of planets").input_ids  # as another template has it
    rendered = http.post("/v1/treadle/route", json={"messages": messages, "prompt": other}).json()
    assert (rendered["prompt_tokens"], rendered["weights"][-1]) == (len(other), text["weights"][-1])
    for body in ({}, {"messages": messages, "prompt": "def loop"}, {"messages": [{"role": "user"}]}, {"messages": [7]}):
        assert http.post("/v1/treadle/route", json=body).status_code == 400


def held(state: EndpointState, engines: Engines) -> list[tuple[str, ...]]:
    """The adapters that the server and each engine know."""
    return [state.reader.mixture.names, *(engine.names for engine in engines.each)]


def test_an_adapter_joins_and_leaves_everywhere(state: EndpointState, engines: Engines, http: TestClient) -> None:
    answer = http.post("/v1/treadle/adapters", json=NEW)
    assert (answer.status_code, answer.json()["adapters"]["late"]) == (200, 3)
    assert held(state, engines) == [("math", "science", "code", "late")] * 3
    assert http.delete("/v1/treadle/adapters/late").status_code == 200
    assert http.delete("/v1/treadle/adapters/late").status_code == 404
    assert held(state, engines) == [("math", "science", "code")] * 3


@pytest.mark.parametrize("when", [False, True], ids=["when it is looked at", "when it is put in"])
@pytest.mark.parametrize("problem", ["no room", RuntimeError("a worker fell")], ids=["refused", "failed"])
def test_an_adapter_that_one_engine_refuses_joins_none(
    state: EndpointState, engines: Engines, http: TestClient, when: bool, problem: str | Exception
) -> None:
    engines.each[1].refuses[when] = problem
    answer = http.post("/v1/treadle/adapters", json=NEW)
    assert answer.status_code == (400 if isinstance(problem, str) else 500)
    assert held(state, engines) == [("math", "science", "code")] * 3
    engines.each[1].refuses.clear()
    assert http.post("/v1/treadle/adapters", json=NEW).status_code == 200


def test_what_leaves_is_refused_before_the_engines_know(
    state: EndpointState, engines: Engines, http: TestClient
) -> None:
    seen: list[tuple[str, ...]] = []
    engines.during = lambda function: seen.append(state.reader.mixture.names)
    http.delete("/v1/treadle/adapters/code")
    assert seen == [("math", "science")]
    engines.during = lambda function: (_ for _ in ()).throw(RuntimeError("the engines are gone"))
    assert http.delete("/v1/treadle/adapters/science").status_code == 500
    assert state.reader.mixture.names == ("math", "science")  # all is as it was


def test_a_model_that_was_an_adapter_does_not_become_the_routed_one(state: EndpointState, http: TestClient) -> None:
    reader = state.reader
    assert reader.choice(None, "math") == "math"
    assert reader.choice(None, "demo") == "auto"
    http.delete("/v1/treadle/adapters/math")
    with pytest.raises(OptionError, match="unknown choice 'math'"):
        reader.choice(None, "math")
    assert reader.choice("code", "math") == "code"  # a request's own options come first
    assert reader.choice(None, "demo") == "auto"
    assert http.post("/v1/treadle/adapters", json={**NEW, "name": "math", "path": "math"}).status_code == 200
    assert reader.choice(None, "math") == "math"


@pytest.mark.parametrize("name", ["demo", "auto", "science", "every", "a/b", ""])
def test_names_that_mean_something_else_are_a_400(
    state: EndpointState, engines: Engines, http: TestClient, name: str
) -> None:
    assert http.post("/v1/treadle/adapters", json={**NEW, "name": name}).status_code == 400
    assert held(state, engines) == [("math", "science", "code")] * 3


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({"X-Admin-Key": ADMIN}, True),
        ({"X-Admin-Key": ADMIN, "Authorization": "Bearer a-key-of-vllm"}, True),
        ({"X-Admin-Key": "", "Authorization": f"Bearer {ADMIN}"}, True),
        ({"X-Admin-Key": "", "Authorization": "Bearer a-key-of-vllm"}, False),
        ({"X-Admin-Key": "", "Authorization": f"Basic {ADMIN}"}, False),
        ({"X-Admin-Key": "wrong", "Authorization": f"Bearer {ADMIN}"}, False),
        ({"X-Admin-Key": ADMIN[:-1]}, False),
        ({"X-Admin-Key": ""}, False),
    ],
)
def test_only_the_admin_key_changes_adapters(
    state: EndpointState, engines: Engines, http: TestClient, headers: dict[str, str], may: bool
) -> None:
    answers = [
        http.post("/v1/treadle/adapters", json=NEW, headers=headers),
        http.delete("/v1/treadle/adapters/math", headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [200 if may else 403] * 2
    assert held(state, engines) == [("science", "code", "late") if may else ("math", "science", "code")] * 3
    assert all("TREADLE_ADMIN_KEY" in answer.json()["error"]["message"] for answer in answers if not may)
    assert http.get("/v1/treadle/adapters", headers=headers).status_code == 200  # to see them needs vLLM's key alone


def test_without_an_admin_key_or_a_folder_nobody_changes_adapters(
    state: EndpointState, engines: Engines, http: TestClient
) -> None:
    state.admin_key = None
    for headers in ({}, {"X-Admin-Key": ""}, {"X-Admin-Key": "None"}):
        assert http.post("/v1/treadle/adapters", json=NEW, headers=headers).status_code == 403
    state.admin_key = ADMIN
    state.reader.params = replace(state.reader.params, adapter_dir=None)
    assert (
        http.post("/v1/treadle/adapters", json=NEW).status_code
        == http.delete("/v1/treadle/adapters/math").status_code
        == 403
    )
    assert held(state, engines) == [("math", "science", "code")] * 3


@pytest.mark.parametrize("path", ["..", ".", "", "/etc", "late/..", "late\0", "x" * 5000, "nowhere", 7, None])
def test_an_adapter_lies_below_its_folder(
    state: EndpointState, engines: Engines, http: TestClient, tmp_path: Path, path: Any
) -> None:
    (tmp_path / "out").symlink_to("/etc")
    for given in (path, "out"):
        answer = http.post("/v1/treadle/adapters", json={**NEW, "path": given})
        assert answer.status_code == 400
        assert "allowed: a folder below adapter_dir" in answer.json()["error"]["message"]
    assert held(state, engines) == [("math", "science", "code")] * 3


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b'"x"', b"1", b'{"a": "\\ud800"}', b'{"a": NaN}']
)
def test_a_body_that_is_no_object_is_a_400(http: TestClient, raw: bytes) -> None:
    for route in ("/v1/treadle/adapters", "/v1/treadle/route"):
        assert http.post(route, content=raw).status_code == 400


def test_what_is_too_much_is_refused(state: EndpointState, http: TestClient) -> None:
    for samples in ([], ["a"] * 1001):
        answer = http.post("/v1/treadle/adapters", json={**NEW, "samples": samples})
        assert (answer.status_code, "1 to 1000 texts" in answer.json()["error"]["message"]) == (400, True)
    state.max_body_bytes = 1000
    assert http.post("/v1/treadle/route", json={"prompt": "a" * 1000}).status_code == 413


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "outside the vocabulary": ({"prompt": [3, 260]}, "token id 260; allowed: 0 to 259"),
    "far outside": ({"prompt": [3], "token_ids": [1 << 70]}, "allowed: 0 to 259"),
    "negative": ({"prompt": [-1]}, "prompt is a text or token ids"),
    "too many tokens": ({"prompt": [3] * 200, "token_ids": [3] * 57}, "257 tokens; this server reads at most 256"),
    "a text of too many": ({"prompt": "a" * 257}, "257 tokens"),
    "a text that cannot be fewer": ({"prompt": "a" * 100_000}, "100000 characters cannot be 256 tokens"),
    "both wrong": ({"prompt": [300] * 300}, "token id 300"),
}


@pytest.mark.parametrize("case", BAD)
def test_tokens_that_the_model_cannot_read_are_a_400(http: TestClient, case: str) -> None:
    body, message = BAD[case]
    answer = http.post("/v1/treadle/route", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_the_route_of_the_longest_prompt(http: TestClient) -> None:
    answer = http.post("/v1/treadle/route", json={"prompt": [3] * 255 + [259], "treadle": "math"})
    assert answer.status_code == 200
    assert np.array(answer.json()["weights"]).shape == (256, 3)


class SlowTokens(list[int]):
    """Token ids that another thread reads only when it may."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(ids)
        self.reading, self.go_on = threading.Event(), threading.Event()

    def __getitem__(self, index: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            self.reading.set()
            assert self.go_on.wait(30)
        return super().__getitem__(index)


def test_a_step_does_not_wait_for_a_prompt(engines: Engines) -> None:
    """The input thread reads prompts; the scheduler plans steps of others meanwhile."""
    schedule = engines.each[0].scheduler.treadle.schedule
    ids = list(range(60, 120))
    running = schedule.open({"every": 1}, 20)
    schedule.decide([(running, ids[:20], 20)])
    prompt = SlowTokens(ids)
    stream = schedule.open({"every": 1}, 50)
    thread = threading.Thread(target=lambda: schedule.decide([(stream, prompt, 50)]))
    thread.start()
    assert prompt.reading.wait(30)
    steps = threading.Timer(10, prompt.go_on.set)  # a step that waits gets its turn, and fails below
    steps.start()
    for end in range(20, 40):
        schedule.plan([("a", running, ids[:end], end - 1, end)])
    was_free = not prompt.go_on.is_set()
    steps.cancel()
    prompt.go_on.set()
    thread.join()
    assert was_free
    assert stream.decided >= 50
    assert schedule.counts.decisions == 1 + 19 + 1  # a prompt, its tokens after the first, and the other prompt


def test_engines_are_asked_one_after_the_other(state: EndpointState, engines: Engines, http: TestClient) -> None:
    """Two adapters that join at once get slots of their own."""

    async def sent(body: Any) -> AsyncIterator[bytes]:
        yield json.dumps(body).encode()

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            for name in ("late", "later"):
                body = {**NEW, "name": name}
                request: Any = SimpleNamespace(
                    method="POST", headers={"x-admin-key": ADMIN}, stream=partial(sent, body)
                )
                group.create_task(endpoints.adapters(request, state))

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(both())
    assert "4 slots are taken" in str(raised.value.exceptions[0])
    assert held(state, engines) == [("math", "science", "code", "late")] * 3
