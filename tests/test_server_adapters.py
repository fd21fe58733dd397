"""Adapters that come and go while the server runs."""

import concurrent.futures
import os
import shutil
import threading
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from treadle.bundle.centroid_files import save_centroid
from treadle.engine.adapter_set import AdapterSet
from treadle.lora.adapter import Adapter
from treadle.lora.stacking import Stacks
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import centroid_of

from conftest import SAMPLES, save_adapter
from serving import Serving, serving

TEXTS, ADAPTERS = "/v1/completions", "/v1/adapters"
ADMIN = {"Authorization": "Bearer root"}
BODY: dict[str, Any] = {"prompt": "add three", "max_tokens": 8, "temperature": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "shelf" / "poetry", seed=9, r=5)
    save_adapter(tmp_path / "shelf" / "foreign", seed=9, r=5)
    rename_layers(tmp_path / "shelf" / "foreign")
    return tmp_path / "shelf"


def rename_layers(adapter: Path) -> None:
    """Let an adapter be of another model: it has no factors for this one."""
    file = adapter / "adapter_model.safetensors"
    save_file({key.replace("layers", "blocks"): tensor for key, tensor in load_file(file).items()}, file)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shelf of adapters of which all but `poetry` are damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    save_adapter(folder / "poetry", seed=9, r=5)
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("/etc")
    for name in ("wrong", "pickle", "cut"):
        shutil.copytree(folder / "poetry", folder / name)
    rename_layers(folder / "wrong")
    (folder / "pickle" / "adapter_model.safetensors").rename(folder / "pickle" / "adapter_model.bin")
    os.truncate(folder / "cut" / "adapter_model.safetensors", 200)
    return folder


@pytest.fixture(scope="module")
def unchanged(bundle_folder: Path, damaged: Path) -> Generator[Serving]:
    with serving(bundle_folder, admin_key="root", adapter_dir=str(damaged)) as each:
        yield each


@pytest.fixture
def served(bundle_folder: Path, folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, admin_key="root", adapter_dir=str(folder)) as each:
        yield each


def names(served: Serving) -> list[str]:
    return [entry["name"] for entry in served.request("GET", ADAPTERS, headers=ADMIN).json()["data"]]


def add(served: Serving, **changes: Any) -> Any:
    body = {"name": "poetry", "path": "poetry", "samples": ["heat the loop", "the loop"], **changes}
    return served.post(ADAPTERS, body, headers=ADMIN)


def test_an_adapter_is_added_used_listed_and_removed(served: Serving) -> None:
    client = served.client()
    before = client.completions.create(model="auto", **BODY).choices[0].text
    answer = add(served)
    assert answer.status_code == 200
    entry = answer.json()["data"][-1]
    assert (entry["name"], entry["ranks"], entry["samples"]) == ("poetry", [5], 2)
    assert "poetry" in [model.id for model in client.models.list()]
    assert client.completions.create(model="poetry", **BODY).model == "poetry"
    assert len(served.post("/v1/route", {"text": "loop"}).json()["names"]) == 4
    assert served.request("DELETE", ADAPTERS + "/poetry", headers=ADMIN).status_code == 200
    assert names(served) == ["math", "science", "code"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="poetry", **BODY)
    assert client.completions.create(model="auto", **BODY).choices[0].text == before


def test_a_centroid_that_training_left_needs_no_samples(
    served: Serving, folder: Path, embedder: StaticEmbedder
) -> None:
    assert "holds no centroid.safetensors: give sample texts" in add(served, samples=None).json()["error"]["message"]
    own = centroid_of("poetry", SAMPLES["math"], embedder)
    save_centroid(folder / "poetry", own, "embedder", {})
    assert add(served, samples=None).json()["data"][-1]["samples"] == len(SAMPLES["math"])


def test_running_requests_finish_untouched(served: Serving) -> None:
    body = {**BODY, "max_tokens": 450}
    expected = {
        model: served.client().completions.create(model=model, **body).choices[0].text for model in ("auto", "math")
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with served.paused():
            running = [pool.submit(served.post, TEXTS, {**body, "model": model}) for model in expected]
            served.wait_until(lambda: served.scheduler.num_unfinished == 2)
        served.wait_until(lambda: len(served.engine.running) == 2)
        assert add(served).status_code == 200
        assert served.request("DELETE", ADAPTERS + "/math", headers=ADMIN).status_code == 200
        assert served.scheduler.num_unfinished == 2  # they run on, with an adapter that is gone for others
        with pytest.raises(openai.NotFoundError):
            served.client().completions.create(model="math", **BODY)
        refused = add(served, name="math")
        assert "still used by running rows" in refused.json()["error"]["message"]
        texts = [each.result().json()["choices"][0]["text"] for each in running]
    assert texts == list(expected.values())
    served.wait_until(lambda: served.engine.blend.names == ("science", "code", "poetry"))


def test_as_vllm_has_it(served: Serving, folder: Path) -> None:
    body = {"lora_name": "poetry", "lora_path": str(folder / "poetry"), "samples": ["loop"]}
    answer = served.post("/v1/load_lora_adapter", body, headers=ADMIN)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'poetry' added successfully.")
    assert names(served)[-1] == "poetry"
    again = served.post("/v1/load_lora_adapter", body, headers=ADMIN)
    assert (again.status_code, "exists already" in again.json()["error"]["message"]) == (400, True)
    answer = served.post("/v1/unload_lora_adapter", {"lora_name": "poetry"}, headers=ADMIN)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'poetry' removed successfully.")
    gone = served.post("/v1/unload_lora_adapter", {"lora_name": "poetri"}, headers=ADMIN)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "../poetry"}, "a folder below --adapter-dir"),
        ({"path": "/etc"}, "a folder below --adapter-dir"),
        ({"path": "."}, "a folder below --adapter-dir"),
        ({"path": "poetry\0"}, "a folder below --adapter-dir"),
        ({"path": "link"}, "a folder below --adapter-dir"),
        ({"path": "missing"}, "missing"),
        ({"path": "p" * 300}, "a folder below --adapter-dir"),
        ({"path": "empty"}, "not a PEFT folder"),
        ({"name": "base"}, "a name that is"),
        ({"name": "auto"}, "not a name that is taken"),
        ({"name": "bundle"}, "not a name that is taken"),
        ({"name": "../x"}, "letters, digits"),
        ({"name": "math"}, "exists already"),
        ({"samples": []}, "1 to 1000 texts"),
        ({"samples": "loop"}, "samples: got 'loop'"),
        ({"samples": ["loop", "", "   "]}, "2 of 3 hold no word that the embedder knows (number 2, 3)"),
        ({"path": "wrong"}, "do not fit the model"),
        ({"path": "pickle"}, "is a pickle"),
        ({"path": "cut"}, "cannot be read"),
    ],
)
def test_a_bad_adapter_is_refused_and_changes_nothing(
    unchanged: Serving, changes: dict[str, Any], message: str
) -> None:
    answer = add(unchanged, **changes)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert names(unchanged) == ["math", "science", "code"]


def test_nothing_can_be_added_without_an_adapter_dir(bundle_folder: Path) -> None:
    with serving(bundle_folder, admin_key="root") as served:
        assert add(served).json()["error"]["code"] == "no_adapter_dir"


def test_a_folder_that_is_damaged_while_it_is_served_hurts_nobody(served: Serving, folder: Path) -> None:
    assert add(served).status_code == 200
    before = served.client().completions.create(model="poetry", **BODY).choices[0].text
    os.truncate(folder / "poetry" / "adapter_model.safetensors", 100)
    (folder / "poetry" / "adapter_config.json").write_text("{")
    assert served.request("DELETE", ADAPTERS + "/math", headers=ADMIN).status_code == 200  # stacks what is left anew
    assert served.client().completions.create(model="poetry", **BODY).choices[0].text == before


def test_samples_are_embedded_beside_the_steps(served: Serving) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool, served.blocked(served.state.reading, threads=1):
        with served.paused():
            adding = pool.submit(add, served)
            served.wait_until(lambda: served.state.reading.num_waiting == 1)  # the samples are embedded by now
    assert adding.result().status_code == 200


class NotedStacks:
    """Stacks that note the thread in which they are built."""

    def __init__(self, stacks: Stacks, threads: list[str]) -> None:
        self._stacks, self._threads, self._is_built = stacks, threads, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stacks, name)

    def build(self) -> None:
        if not self._is_built:
            self._threads.append(threading.current_thread().name)
        self._is_built = True
        self._stacks.build()


class NotedSet:
    """An engine's adapters, whose stacks and newcomers note the threads in which they are built and let go of."""

    def __init__(self, adapters: AdapterSet) -> None:
        self._adapters = adapters
        self.threads: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapters, name)

    def plan_join(self, adapter: Adapter) -> Any:
        weakref.finalize(adapter, lambda: self.threads.append(threading.current_thread().name))
        return NotedStacks(self._adapters.plan_join(adapter), self.threads)

    def plan_drop(self) -> Any:
        stacks = self._adapters.plan_drop()
        return stacks and NotedStacks(stacks, self.threads)


def test_factors_are_stacked_and_let_go_of_beside_the_steps(served: Serving) -> None:
    noted: Any = NotedSet(served.engine.adapters)
    served.engine.adapters, threads = noted, noted.threads
    assert add(served).status_code == 200
    served.wait_until(lambda: len(threads) >= 2)
    assert set(threads) == {"treadle-read_0"}
    threads.clear()
    assert served.request("DELETE", ADAPTERS + "/poetry", headers=ADMIN).status_code == 200
    assert threads == ["treadle-read_0"]
    assert served.engine.blend.names == ("math", "science", "code")
