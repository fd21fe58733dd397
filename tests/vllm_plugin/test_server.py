"""vLLM's own OpenAI server with the plugin beside it, over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from treadle.params import RoutingParams

from conftest import save_adapter
from vllm_plugin.engines import ALL, BASE, PROMPTS, reference, small_llama

KEY = "a-key-of-this-test"
MODELS = ["demo", "auto", "base", "math", "science", "code"]


class Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def call(self, path: str, body: Any = None, *, method: str | None = None, key: str = KEY) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.loads(response.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def complete(self, given: Any = None, model: str = "demo", prompt: str = PROMPTS[3]) -> tuple[int, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, "vllm_xargs": None if given is None else {"treadle": given}}  # fmt: skip
        return self.call("/v1/completions", body)

    def ids(self, given: Any = None, model: str = "demo") -> list[int]:
        status, body = self.complete(given, model)
        assert status == 200, body
        return body["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def late(small: Path) -> Path:
    return save_adapter(small.parent / "served" / "late", small_llama(), 9, r=5, lora_alpha=5, target_modules=ALL)


@pytest.fixture(scope="module")
def server(small: Path, late: Path) -> Generator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {"bundle": str(small), "max_adapters": 4, "max_rank": 8, "adapter_dir": str(late.parent)}
    command = [
        sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", str(small.parent / BASE),
        "--served-model-name", *MODELS, "--port", str(port), "--enforce-eager", "--dtype", "float32",
        "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16", "--api-key", KEY,
        "--additional-config", json.dumps({"treadle": config}),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_PLUGINS": "treadle", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (small.parent / "server.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    served = Server(port)
    try:
        deadline = time.monotonic() + 150
        while True:
            try:
                if served.call("/v1/models")[0] == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("the server did not start:\n" + Path(log.name).read_text()[-3000:])
            time.sleep(0.5)
        yield served
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def test_models_are_names_of_routings(server: Server, embedded: Any) -> None:
    status, body = server.call("/v1/models")
    assert status == 200
    assert [each["id"] for each in body["data"]] == MODELS
    expected = {
        "demo": reference(embedded, PROMPTS[3:4], None, 24)[0],
        "base": reference(embedded, PROMPTS[3:4], RoutingParams.base(), 24)[0],
        "code": reference(embedded, PROMPTS[3:4], RoutingParams.one("code"), 24)[0],
    }
    assert {model: server.ids(model=model) for model in expected} == expected
    assert server.ids(model="auto") == expected["demo"]
    assert server.ids("base", model="code") == expected["base"]  # the request's own options come first
    assert server.ids('{"math": 0.5}') == reference(
        embedded, PROMPTS[3:4], RoutingParams(rule="fixed", fixed={"math": 0.5}, every=None), 24
    )[0]  # fmt: skip
    assert server.complete(model="reading")[0] == 404


@pytest.mark.parametrize("given", ["maths", '{"evry": 2}', "{", '{"math": -1}', 3, ["math"], '{"past": "recompute"}'])
def test_bad_options_are_a_400(server: Server, given: Any) -> None:
    status, body = server.complete(given)
    assert status == 400
    assert "treadle" in body["error"]["message"]
    assert server.complete()[0] == 200


def test_beam_search_is_a_400(server: Server) -> None:
    body = {"model": "math", "prompt": "add", "max_tokens": 4, "n": 2, "use_beam_search": True}
    status, answer = server.call("/v1/completions", body)
    assert status == 400
    assert "beam search" in answer["error"]["message"]


def test_chat_and_responses_take_the_options_too(server: Server) -> None:
    messages = [{"role": "user", "content": "add three"}]
    chat = {"messages": messages, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    texts = {
        model: server.call("/v1/chat/completions", {**chat, "model": model})[1]["choices"][0]["message"]["content"]
        for model in ("demo", "math", "base")
    }
    assert len(set(texts.values())) == 3
    again = {**chat, "model": "demo", "vllm_xargs": {"treadle": "math"}}
    assert server.call("/v1/chat/completions", again)[1]["choices"][0]["message"]["content"] == texts["math"]
    bad = {**chat, "model": "demo", "vllm_xargs": {"treadle": "maths"}}
    assert server.call("/v1/chat/completions", bad)[0] == 400
    answer = {"input": "add three", "model": "demo", "max_output_tokens": 8, "vllm_xargs": {"treadle": "maths"}}
    assert server.call("/v1/responses", answer)[0] == 400


def test_the_route_is_the_weights_of_the_answer(server: Server, embedded: Any) -> None:
    _, body = server.complete('{"every": 3}')
    choice = body["choices"][0]
    asked = {"prompt": choice["prompt_token_ids"], "token_ids": choice["token_ids"], "treadle": {"every": 3}}
    status, answer = server.call("/v1/treadle/route", asked)
    assert status == 200
    assert answer["adapters"] == ["math", "science", "code"]
    params = RoutingParams(score="centred", temperature=0.3, every=3, recent=8)
    done = embedded.generate(PROMPTS[3], sampling=treadle.SamplingParams(max_tokens=24), routing=params)
    weights = np.array(answer["weights"])[answer["prompt_tokens"] - 1 :][: len(done.token_ids)]
    np.testing.assert_allclose(weights, done.weights, atol=1e-6)
    assert server.call("/v1/treadle/route", {**asked, "key": 1})[0] == 400
    assert server.call("/v1/treadle/route", {"prompt": "", "treadle": "maths"})[0] == 400
    assert server.call("/v1/treadle/route", asked, key="wrong")[0] == 401


def test_adapters_come_and_go_over_http(server: Server, late: Path) -> None:
    before = server.ids()
    new = {"name": "late", "path": "late", "samples": ["sum planet loop", "planet loop sum"]}
    assert server.call("/v1/treadle/adapters", {**new, "path": "../.."})[0] == 400
    assert server.call("/v1/treadle/adapters", {**new, "name": "math"})[0] == 400
    status, body = server.call("/v1/treadle/adapters", new)
    assert (status, body["adapters"]) == (200, {"math": 0, "science": 1, "code": 2, "late": 3}), body
    assert server.ids() != before
    assert server.ids("late") != server.ids("base")
    assert server.call("/v1/treadle/adapters/nobody", method="DELETE")[0] == 404
    status, body = server.call("/v1/treadle/adapters/late", method="DELETE")
    assert (status, list(body["adapters"])) == (200, ["math", "science", "code"])
    assert server.ids() == before
    assert server.complete("late")[0] == 400
    _, body = server.call("/v1/treadle/adapters")
    assert body["decisions"] > 0
