"""vLLM's own OpenAI server with the plugin beside it, over HTTP."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.engine.exceptions import EngineDeadError

import treadle
from treadle.common.params import RoutingParams
from treadle.serving.vllm import figures

from conftest import SAMPLES, save_adapter
from vllm_plugin.engines import ALL, BASE, PROMPTS, reference, small_llama

KEY, ADMIN = "a-key-of-this-test", "the-admin-of-this-test"
MODELS = ["demo", "auto", "base", "math", "science", "code"]


class Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def call(
        self, path: str, body: Any = None, *, method: str | None = None, key: str = KEY, admin: str = ADMIN
    ) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Content-Type": "application/json",
                "Authorization": f"Bearer {key}",
                "X-Admin-Key": admin,
            },
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.loads(response.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def figures(self) -> dict[str, float]:
        """Read the figures of the blending as Prometheus does: series -> value."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as response:
            text = response.read().decode()
        found = {
            sample.name + "".join(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(("treadle_", "vllm:generation_tokens_total"))
        }
        assert all(
            text.count(f"# TYPE {name} ") == 1 for name in ("treadle_adapter_weight_total", "process_cpu_seconds_total")
        )
        return found

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


@contextmanager
def running(bundle: Path, *flags: str, **options: Any) -> Generator[Server]:
    """Start a server, with more flags of vLLM's and more options of the plugin's, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = json.dumps({"treadle": {"bundle": str(bundle), **options}})
    command = [
        sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model",
        str(bundle.parent / BASE), "--served-model-name", *MODELS, "--port", str(port), "--enforce-eager", "--dtype",
        "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16",
        "--api-key", KEY, "--additional-config", config, *flags,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "treadle",
        "TREADLE_ADMIN_KEY": ADMIN,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    log = (bundle.parent / f"server-{port}.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    served = Server(port)
    try:
        deadline = time.monotonic() + 900
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


@pytest.fixture(scope="module")
def server(small: Path, late: Path) -> Generator[Server]:
    with running(small, max_adapters=4, max_rank=8, adapter_dir=str(late.parent)) as served:
        yield served


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
    params = RoutingParams(score="centred", temperature=0.3, every=3)
    done = embedded.generate(PROMPTS[3], sampling=treadle.SamplingParams(max_tokens=24), routing=params)
    weights = np.array(answer["weights"])[answer["prompt_tokens"] - 1 :][: len(done.token_ids)]
    np.testing.assert_allclose(weights, done.weights, atol=1e-6)
    assert server.call("/v1/treadle/route", {**asked, "key": 1})[0] == 400
    assert server.call("/v1/treadle/route", {"prompt": "", "treadle": "maths"})[0] == 400
    assert server.call("/v1/treadle/route", {"prompt": [3, 260]})[0] == 400
    assert server.call("/v1/treadle/route", {"prompt": [3] * 257})[0] == 400
    assert server.call("/v1/treadle/route", asked, key="wrong")[0] == 401


def test_prometheus_reads_what_was_generated(server: Server) -> None:
    before = server.figures()
    _, body = server.complete('{"every": 1}')
    choice = body["choices"][0]
    asked = {"prompt": choice["prompt_token_ids"], "token_ids": choice["token_ids"], "treadle": {"every": 1}}
    _, answer = server.call("/v1/treadle/route", asked)
    server.ids("base")
    after = server.figures()
    more = {name: after[name] - before[name] for name in before}
    weights = np.array(answer["weights"])[answer["prompt_tokens"] - 1 :][:24]  # those that the 24 tokens came from
    for name, weight in zip(("math", "science", "code"), weights.sum(0), strict=True):
        assert more["treadle_adapter_weight_total" + name] == pytest.approx(weight, rel=1e-5)
        assert after["treadle_adapter_loaded" + name] == 1
    assert more["treadle_generated_tokens_total"] == 48
    assert more["treadle_base_tokens_total"] == 24
    assert more["treadle_router_decisions_total"] == 24
    assert more["treadle_router_seconds_total"] > 0
    assert after["treadle_engines_answered"] == 1
    assert [more[name] for name in more if name.startswith("vllm:generation_tokens_total")] == [48]


def test_figures_of_engines_that_do_not_answer() -> None:
    answer = {"decisions": 2, "seconds": 0.5, "tokens": 3, "base_tokens": 1, "weights": {"math": 1.5}}

    async def two(function: str) -> list[dict[str, Any]]:
        assert function == "treadle_figures"
        return [answer, answer]

    async def dead(_: str) -> list[dict[str, Any]]:
        raise EngineDeadError

    async def slow(_: str) -> list[dict[str, Any]]:
        await asyncio.sleep(60)
        return []

    texts = [bytes(asyncio.run(figures.response(ask, timeout=0.05)).body).decode() for ask in (two, dead, slow, None)]
    assert all("process_cpu_seconds_total" in text for text in texts)  # vLLM's own are there whatever happens
    assert 'treadle_adapter_weight_total{adapter="math"} 3.0' in texts[0]
    assert "treadle_engines_answered 2.0" in texts[0]
    assert [text.count("treadle_") for text in texts[1:]] == [3, 3, 0]  # the gauge with its help and type
    assert all("treadle_engines_answered 0.0" in text for text in texts[1:3])


def test_adapters_come_and_go_over_http(server: Server, late: Path) -> None:
    before = server.ids()
    new = {"name": "late", "path": "late", "samples": ["sum planet loop", "planet loop sum"]}
    assert server.call("/v1/treadle/adapters", new, admin="no")[0] == 403
    assert server.call("/v1/treadle/adapters/math", method="DELETE", admin=KEY)[0] == 403
    assert server.call("/v1/treadle/adapters", {**new, "path": "../.."})[0] == 400
    assert server.call("/v1/treadle/adapters", {**new, "name": "math"})[0] == 400
    status, body = server.call("/v1/treadle/adapters", new)
    assert (status, body["adapters"]) == (200, {"math": 0, "science": 1, "code": 2, "late": 3}), body
    assert server.ids() != before
    assert server.ids("late") != server.ids("base")
    assert server.figures()["treadle_adapter_weight_totallate"] >= 24
    assert server.call("/v1/treadle/adapters/nobody", method="DELETE")[0] == 404
    status, body = server.call("/v1/treadle/adapters/late", method="DELETE")
    assert (status, list(body["adapters"])) == (200, ["math", "science", "code"])
    assert server.ids() == before
    assert "treadle_adapter_weight_totallate" not in server.figures()
    assert server.complete("late")[0] == 400
    _, body = server.call("/v1/treadle/adapters")
    assert body["decisions"] > 0


def test_a_model_that_was_an_adapter_is_a_400_until_it_is_back(server: Server, small: Path, late: Path) -> None:
    before = {model: server.ids(model=model) for model in ("demo", "math", "code")}
    assert before["demo"] != before["math"]
    shutil.copytree(small / "adapters" / "math", late.parent / "math")
    assert server.call("/v1/treadle/adapters/math", method="DELETE")[0] == 200
    status, body = server.complete(model="math")
    assert (status, "unknown choice 'math'" in body["error"]["message"]) == (400, True)
    new = {"name": "math", "path": "math", "samples": SAMPLES["math"]}
    for name in ("demo", "every", "a b"):  # a model that is routed, an option, no name
        assert server.call("/v1/treadle/adapters", {**new, "name": name})[0] == 400
    status, body = server.call("/v1/treadle/adapters", new)
    assert (status, body["adapters"]) == (200, {"science": 1, "code": 2, "math": 0}), body
    assert {model: server.ids(model=model) for model in before} == before  # with a cache of what there was


def test_two_data_parallel_engines_are_one(small: Path, embedded: Any) -> None:
    models = {
        "auto": None,
        "base": RoutingParams.base(),
        "math": RoutingParams.one("math"),
        "code": RoutingParams.one("code"),
    }
    expected = [ids for routing in models.values() for ids in reference(embedded, PROMPTS, routing, 24)]
    with running(small, "--data-parallel-size", "2") as served, ThreadPoolExecutor(16) as threads:
        asked = [(None, model, prompt) for model in models for prompt in PROMPTS]
        answers = list(threads.map(lambda each: served.complete(*each), asked))
        assert [body["choices"][0]["token_ids"] for _, body in answers] == expected
        after = served.figures()
    assert after["treadle_engines_answered"] == 2
    assert after["treadle_generated_tokens_total"] == 24 * len(expected)
    assert after["treadle_base_tokens_total"] == 24 * len(PROMPTS)
    assert after["treadle_adapter_weight_totalmath"] > 24 * len(PROMPTS)
    each = [value for name, value in after.items() if name.startswith("vllm:generation_tokens_total")]
    assert len(each) == 2
    assert min(each) > 0  # both had work
    assert sum(each) == 24 * len(expected)
