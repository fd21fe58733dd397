"""A base and a folder of adapters are a bundle: what loads, what is left out and why, and what the cache keeps."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import treadle
from treadle.bundle.bundle import read_bundle
from treadle.bundle.centroid_files import save_centroid
from treadle.bundle.token_embedder import token_embedder
from treadle.common.errors import AdapterWarning, BundleError, OptionError, TreadleError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.loading import load
from treadle.engine.preparing import prepare
from treadle.lora.adapter import read_adapter
from treadle.routing.fitting import centroid_of, fit

from conftest import BASE, SAMPLES, Run, byte_tokenizer, edit_config, save_adapter, tiny_llama
from serving import serving

TEXTS = ["add the sum", "def loop", "heat of the planet", "the", ""]
SAMPLING = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / BASE
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREADLE_HOME", str(shared_home))
    return shared_home


@pytest.fixture
def folder(adapter_folders: dict[str, Path], tmp_path: Path) -> Path:
    """Three adapters, each with samples beside it."""
    for name, source in adapter_folders.items():
        shutil.copytree(source, tmp_path / "mine" / name)
        write_samples(tmp_path / "mine" / name, SAMPLES[name])
    return tmp_path / "mine"


def write_samples(folder: Path, texts: Sequence[str]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def places(folder: Path) -> dict[str, str]:
    return {each.name: str(each) for each in sorted(folder.iterdir())}


def test_the_cache_routes_as_fit_does(base: str, folder: Path, run: Run, tmp_path: Path) -> None:
    """Law: made of the folder, taken from the cache, fitted in Python and by the command: the same weights."""
    own = fit({name: SAMPLES[name] for name in sorted(SAMPLES)}, token_embedder(base)).weights(TEXTS)
    for _ in range(2):
        bundle = prepare(base, places(folder))
        assert bundle.router.names == ("code", "math", "science")
        np.testing.assert_array_equal(bundle.router.weights(TEXTS), own)
    code, _, err = run("fit", "--base", base, "--adapters", folder, "-o", tmp_path / "bundle", "--json")
    assert code == 0, err
    np.testing.assert_allclose(read_bundle(tmp_path / "bundle").router.weights(TEXTS), own, atol=1e-6)
    told = [run("route", *given, "--text", "add the sum", "--json")[1] for given in
            ([tmp_path / "bundle"], ["--base", base, "--adapters", folder])]  # fmt: skip
    assert json.loads(told[0]) == json.loads(told[1])


def test_a_second_start_takes_the_cache_and_a_change_does_not(
    base: str, folder: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "treadle.adapters")

    def fits() -> int:
        return caplog.messages.count("router: fitting it to the samples of 3 adapters ...")

    write_samples(folder / "math", ["add four", "the sum of three", "plus plus four"])
    names = ("code", "math", "science")
    first = prepare(base, places(folder)).router.weights(TEXTS)
    assert fits() == 1
    np.testing.assert_array_equal(prepare(base, places(folder)).router.weights(TEXTS), first)
    assert fits() == 1
    save_adapter(folder / "more", seed=9)  # without samples: nothing to fit
    assert prepare(base, places(folder)).router.names == (*names, "more")
    assert fits() == 1
    write_samples(folder / "math", ["add four", "the sum of three", "plus plus three"])
    assert (prepare(base, places(folder)).router.weights(TEXTS)[:, :3] != first).any()
    assert fits() == 2
    save_adapter(folder / "math", seed=11)
    prepare(base, places(folder))
    assert fits() == 3
    entries = sorted((home / "routers").iterdir())
    assert all({file.name for file in entry.iterdir()} == {"centroids.safetensors", "fit.json"} for entry in entries)


def test_starts_at_the_same_time_do_not_clash(base: str, folder: Path, home: Path) -> None:
    write_samples(folder / "math", ["sum of four", "the plus of three"])
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(prepare, base, places(folder)) for _ in range(3)]
        weights = [each.result().router.weights(TEXTS) for each in started]
    for each in weights[1:]:
        np.testing.assert_array_equal(each, weights[0])
    assert not [each.name for each in (home / "routers").iterdir() if each.name.startswith(".")]


def test_a_damaged_entry_says_what_to_delete(base: str, folder: Path, home: Path) -> None:
    write_samples(folder / "math", ["three of four", "the plus of the sum"])
    before = set((home / "routers").iterdir())
    prepare(base, places(folder))
    (entry,) = set((home / "routers").iterdir()) - before
    (entry / "centroids.safetensors").write_bytes(b"none")
    with pytest.raises(BundleError, match=f"{entry} cannot be used.*delete that folder"):
        prepare(base, places(folder))


def test_adapters_without_samples_act_by_name(base: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "science" / "samples.jsonl").unlink()
    with caplog.at_level(logging.INFO, "treadle.adapters"):
        engine = load(base=base, adapters=folder)
    assert engine.adapter_names == ("code", "math", "science")
    assert engine.router.unrouted == ("science",)
    lines = [record.getMessage() for record in caplog.records]
    assert "adapter math: routed by 4 samples (samples.jsonl)" in lines
    assert "adapter science: no samples, so no text chooses it; give its name or fixed weights" in lines
    assert not engine.generate("heat of the planet", sampling=SAMPLING).weights[:, 2].any()
    mine = engine.generate("add", sampling=SAMPLING, routing=RoutingParams.one("science"))
    alone = load(base=base, adapters={"science": folder / "science"})
    assert alone.generate("add", sampling=SAMPLING).token_ids == mine.token_ids  # the only one: nothing to choose
    for name in ("math", "code"):
        (folder / name / "samples.jsonl").unlink()
    nothing = load(base=base, adapters=folder)
    with pytest.raises(OptionError, match="no adapter has sample texts"):
        nothing.generate("add", sampling=SAMPLING)
    assert nothing.generate("add", sampling=SAMPLING, routing=RoutingParams.one("science")).token_ids == mine.token_ids


def spoil(folder: Path) -> dict[str, str]:
    """Damage adapters of a folder in many ways; return what the reason of each must hold."""
    reasons: dict[str, str] = {}

    def bad(name: str, reason: str, **config: Any) -> Path:
        reasons[name] = reason
        save_adapter(folder / name, seed=1)
        if config:
            edit_config(folder / name, **config)
        return folder / name

    (bad("no-weights", "adapter_model.safetensors") / "adapter_model.safetensors").unlink()
    (bad("no-config", "adapter_config.json") / "adapter_config.json").unlink()
    (bad("no-json", "adapter_config.json") / "adapter_config.json").write_text("{")
    (bad("cut", "adapter_model.safetensors") / "adapter_model.safetensors").write_bytes(b"\x10")
    bad("replicated", "layer_replication", layer_replication=[[0, 2]])
    bad("base", "reserved")
    bad("two words", "use letters, digits")
    file = bad("nan", "NaN") / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    other = tiny_llama().config
    other.hidden_size, other.head_dim = 16, 4
    bad("other-size", "do not fit the model")
    save_adapter(folder / "other-size", type(tiny_llama())(other), seed=1)
    return reasons


def test_bad_adapters_are_left_out_with_their_reasons(
    base: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = load(base=base, adapters=folder).generate("add the sum", sampling=SAMPLING)
    reasons = spoil(folder)
    bundle = prepare(base, places(folder))
    assert bundle.left_out.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in bundle.left_out[name], name
        assert f"adapter {name}: LEFT OUT: {bundle.left_out[name]}" in caplog.messages
    assert f"{len(reasons)} of {len(reasons) + 3} adapters are left out" in caplog.messages
    again = load(bundle).generate("add the sum", sampling=SAMPLING)
    assert again.token_ids == good.token_ids
    np.testing.assert_array_equal(again.weights, good.weights)
    with pytest.raises(BundleError, match="without --strict") as strict:
        prepare(base, places(folder), strict=True)
    assert all(f"- {name}: " in str(strict.value) for name in reasons)
    for name in SAMPLES:
        shutil.rmtree(folder / name)
    with pytest.raises(BundleError, match="no adapter can be used") as none:
        prepare(base, places(folder))
    assert all(f"- {name}: " in str(none.value) for name in reasons)


def test_an_adapter_that_the_loaded_weights_refuse_is_left_out(
    base: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether rows of a resized head are the base's own is seen only once these are loaded."""
    file = save_adapter(folder / "resized-head", seed=1) / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.full((261, 32), 0.5)}, file)
    write_samples(folder / "resized-head", ["the list of heat", "planet plus list"])
    engine = load(base=base, adapters=folder)
    assert engine.adapter_names == ("code", "math", "science")
    assert any("resized-head: LEFT OUT" in message and "lm_head.weight" in message for message in caplog.messages)
    engine.generate("add", sampling=SAMPLING)
    with pytest.raises(TreadleError, match=r"lm_head\.weight"):
        load(base=base, adapters=folder, strict=True)


def test_samples_that_cannot_be_read_cost_the_routing_only(
    base: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "math" / "samples.jsonl").write_text('{"nothing": 1}\n')
    bundle = prepare(base, places(folder))
    assert bundle.router.unrouted == ("math",)
    assert any("adapter math: its samples cannot be used" in message for message in caplog.messages)
    with pytest.raises(BundleError, match="math: its samples cannot be used"):
        prepare(base, places(folder), strict=True)


def test_a_centroid_that_training_left_is_taken_with_its_embedder(
    base: str, folder: Path, embedder: Any, tmp_path: Path
) -> None:
    embedder.save(tmp_path)
    words = str(tmp_path / "embedder")
    for name in SAMPLES:
        (folder / name / "samples.jsonl").unlink()
        own = centroid_of(name, SAMPLES[name], embedder, tails=embedder.tails)
        save_centroid(folder / name, own, words, {})
    bundle = prepare(base, places(folder), embedder=words)
    assert bundle.router.embedder.id == embedder.id
    assert bundle.router.centroids.names == ("code", "math", "science")
    mine = centroid_of("math", SAMPLES["math"], embedder)
    np.testing.assert_array_equal(bundle.router.centroids.means[1], mine.means[0])
    assert prepare(base, places(folder)).router.lacks_samples  # it is there, but anybody may have written its name
    with pytest.raises(BundleError, match=rf"made by the embedder '{words[:20]}.*, not by this one"):
        prepare(base, places(folder), strict=True)
    (folder / "math" / "treadle.json").write_text("{")
    with pytest.raises(BundleError, match=r"math: its centroid\.safetensors was made by the embedder 'static:"):
        prepare(base, places(folder), strict=True)
    tokens = token_embedder(base)
    own = centroid_of("code", SAMPLES["code"], tokens, tails=tokens.tails)
    save_centroid(folder / "code", own, "tokens", {})
    assert prepare(base, places(folder)).router.centroids.names == ("code",)


def test_the_embedder_of_a_bundle_can_be_named(base: str, folder: Path, bundle_folder: Path) -> None:
    given = prepare(base, places(folder), embedder=str(bundle_folder))
    assert given.router.embedder.id == read_bundle(bundle_folder).router.embedder.id


def test_two_hundred_adapters_load_in_seconds_and_three_are_named(base: str, folder: Path) -> None:
    source = folder / "math"
    (source / "samples.jsonl").unlink()
    for index in range(198):
        shutil.copytree(source, folder / f"more-{index:03}")
    for index in (3, 77, 190):
        (folder / f"more-{index:03}" / "adapter_model.safetensors").write_bytes(b"{}")
    token_embedder(base)
    started = time.process_time()
    bundle = prepare(base, places(folder))
    engine = load(bundle)
    seconds = time.process_time() - started
    assert set(bundle.left_out) == {"more-003", "more-077", "more-190"}
    assert len(engine.adapter_names) == 198
    assert bundle.router.centroids.names == ("code", "science")
    assert seconds < 20


def test_load_says_what_it_takes(base: str, folder: Path, bundle_folder: Path) -> None:
    both: dict[str, Any] = {"base": base, "adapters": folder}
    wrong: list[dict[str, Any]] = [{}, {"base": base}, {"adapters": folder}, {"bundle": bundle_folder, **both}]
    for given in wrong:
        with pytest.raises(OptionError, match="load takes a bundle, or base= and adapters="):
            treadle.load(**given)
    with pytest.raises(OptionError, match="go with base="):
        treadle.load(bundle_folder, strict=True)
    with pytest.raises(OptionError, match="is not a folder"):
        treadle.load(base=base, adapters=folder / "nowhere")
    with pytest.raises(OptionError, match="it is a bundle: give"):
        treadle.load(base=base, adapters=bundle_folder)
    with pytest.raises(TreadleError, match="base model 'nowhere' cannot be loaded"):
        treadle.load(base="nowhere", adapters=folder)


def test_a_folder_that_is_an_adapter_is_the_only_one(base: str, folder: Path) -> None:
    shutil.copytree(folder / "math", folder / "math" / "checkpoint-100")
    assert load(base=base, adapters=folder / "math").adapter_names == ("math",)


def test_a_base_of_another_name_is_one_warning_and_strict_refuses_it(base: str, folder: Path) -> None:
    for name in ("math", "code"):
        edit_config(folder / name, base_model_name_or_path="org/quantised-twin")
    with pytest.warns(AdapterWarning, match="'code', 'math' on 'org/quantised-twin'"):
        assert prepare(base, places(folder)).router.centroids.names == ("code", "math", "science")
    with pytest.raises(BundleError, match="trained on 'org/quantised-twin'"):
        prepare(base, places(folder), strict=True)


def test_adapters_of_other_kinds_load_from_a_folder(base: str, folder: Path) -> None:
    save_adapter(folder / "dora", seed=3, use_dora=True)
    engine = load(base=base, adapters=folder)
    alone = load(base=base, adapters={"dora": folder / "dora"})
    routing = RoutingParams.one("dora")
    ids = [each.generate("add", sampling=SAMPLING, routing=routing).token_ids for each in (engine, alone)]
    assert ids[0] == ids[1]


# Hub


class HubHandler(SimpleHTTPRequestHandler):
    """Answers what a client of the hub asks of one repository, org/math, whose files are in a folder."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        root = Path(self.directory)
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/org/math/tree/"):
            files = [file for file in sorted(root.iterdir()) if file.is_file()]
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            body = json.dumps(entries).encode()
        elif path.startswith("/api/models/org/math"):
            names = [{"rfilename": file.name} for file in sorted(root.iterdir())]
            body = json.dumps({"id": "org/math", "sha": self.commit, "siblings": names}).encode()
        elif path.startswith("/org/math/resolve/") and (root / path.rpartition("/")[2]).is_file():
            body = (root / path.rpartition("/")[2]).read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Generator[dict[str, str]]:
    """The environment of a process whose hub is a small server on this machine."""
    (folder / "math" / "pickled.bin").write_bytes(b"nobody asks for it")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, directory=str(folder / "math")))
    HubHandler.asked.clear()
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
        server.shutdown()


def test_hub_ids_are_fetched_with_the_samples_beside_them(base: str, folder: Path, hub: dict[str, str]) -> None:
    command = [sys.executable, "-m", "treadle", "route", "--base", base, "--text", "add the sum", "--json"]
    given = ["--adapter", "math=org/math", "--adapter", f"code={folder / 'code'}", "--adapter", "gone=org/gone"]
    done = subprocess.run([*command, *given], env=hub, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapter math: routed by 4 samples (samples.jsonl)" in done.stderr
    assert "adapter gone: LEFT OUT: 'org/gone' is no folder, and the hub says: " in done.stderr
    assert not any("pickled" in path for path in HubHandler.asked)
    here = prepare(base, {name: str(folder / name) for name in ("math", "code")}).router
    np.testing.assert_allclose(json.loads(done.stdout)["weights"], here.weights(["add the sum"])[0], atol=1e-6)


def test_a_pickle_on_the_hub_is_fetched_to_be_converted_alone(
    base: str, folder: Path, hub: dict[str, str], tmp_path: Path
) -> None:
    file = folder / "math" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    before = read_adapter(folder / "math").identity
    file.unlink()
    route = [sys.executable, "-m", "treadle", "route", "--base", base, "--text", "add", "--adapter", "math=org/math"]
    done = subprocess.run(route, env=hub, capture_output=True, text=True, check=False)
    assert "'org/math' has no adapter_model.safetensors on the hub; if it has a pickle, treadle convert" in done.stderr
    assert not any("adapter_model.bin" in path for path in HubHandler.asked)
    convert = [sys.executable, "-m", "treadle", "convert", "org/math", "-o", str(tmp_path / "out")]
    done = subprocess.run(convert, env=hub, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_adapter(tmp_path / "out").identity == before


# Server


def test_a_server_of_a_folder_routes_those_with_samples(base: str, folder: Path) -> None:
    (folder / "science" / "samples.jsonl").unlink()
    expected = load(base=base, adapters=folder).generate("add the sum", sampling=SAMPLING).text
    asked = {"prompt": "add the sum", "max_tokens": 6, "temperature": 0}
    admin = {"Authorization": "Bearer admin"}
    with serving(None, base=base, adapters=str(folder), admin_key="admin", adapter_dir=str(folder)) as server:
        answer = server.post("/v1/completions", {"model": "auto", **asked, "treadle": {"trace": True}}).json()
        assert answer["choices"][0]["text"] == expected
        trace = answer["choices"][0]["treadle"]
        assert trace["adapters"] == ["code", "math", "science"]
        assert trace["cosines"][0][2] is trace["scores"][0][2] is None
        assert server.post("/v1/completions", {"model": "science", **asked}).status_code == 200
        cards = server.request("GET", "/v1/adapters", headers=admin).json()["data"]
        assert {card["name"]: card["samples"] for card in cards} == {"code": 4, "math": 4, "science": 0}
        told = server.post("/v1/route", {"model": "auto", "text": "add the sum"}).json()
        assert told["cosines"][2] is None
        assert server.request("DELETE", "/v1/adapters/science", headers=admin).status_code == 200
        more = {"name": "heat", "path": "science", "samples": SAMPLES["science"]}
        assert server.post("/v1/adapters", more, headers=admin).status_code == 200
        assert server.engine.router.weights(["heat of the planet"])[0, 2] > 0


def test_a_server_without_any_samples_serves_by_name_and_says_why_it_does_not_route(base: str, folder: Path) -> None:
    for name in SAMPLES:
        (folder / name / "samples.jsonl").unlink()
    asked = {"prompt": "add the sum", "max_tokens": 6, "temperature": 0}
    with serving(None, base=base, adapters=str(folder)) as server:
        refused = server.post("/v1/completions", {"model": "auto", **asked})
        assert refused.status_code == 400
        assert "no adapter has sample texts, so nothing can be routed" in refused.json()["error"]["message"]
        for given in ({"model": "math"}, {"model": "base"}, {"model": "auto", "treadle": {"fixed": {"math": 0.5}}}):
            assert server.post("/v1/completions", {**given, **asked}).status_code == 200
        assert server.post("/v1/route", {"model": "auto", "text": "add"}).status_code == 400


# Commands


def test_every_command_takes_a_base_and_a_folder(base: str, folder: Path, run: Run, tmp_path: Path) -> None:
    given = ["--base", base, "--adapters", folder]
    done = load(base=base, adapters=folder).generate("add the sum", sampling=SAMPLING)
    code, out, err = run("generate", *given, "--prompt", "add the sum", "--raw", "--max-tokens", 6, "--json")
    assert code == 0, err
    assert json.loads(out)["token_ids"] == list(done.token_ids)
    assert "adapter math: routed by 4 samples (samples.jsonl)\n" in err
    (folder / "math" / "samples.jsonl").unlink()
    spoil(folder)
    (folder / "logs").mkdir()
    code, out, err = run("route", *given, "--text", "add the sum")
    assert code == 0
    assert "no samples" in out
    assert "sub-folders without an adapter: logs\n" in err
    assert "adapter nan: LEFT OUT: " in err
    code, out, err = run("doctor", *given, "--json")
    assert code == 1  # because of those that are left out
    assert "adapter 'nan' is left out: " in err
    report = json.loads(out)
    assert [each["name"] for each in report["adapters"]] == ["code", "science", "math"]
    assert [len(each["cosines"]) for each in report["adapters"]] == [2, 2, 0]
    assert run("doctor", *given)[0] == 1
    for name in ("code", "science"):
        (folder / name / "samples.jsonl").unlink()
    unsampled = ["--base", base, "--adapter", f"math={folder / 'math'}", "--adapter", f"code={folder / 'code'}"]
    code, out, err = run("doctor", *unsampled)
    assert code == 0, err
    assert "cosines between the centroids" not in out
    for name in ("code", "science"):
        write_samples(folder / name, SAMPLES[name])
    single = ["--base", base, "--adapter", f"sum={folder / 'math'}", "--adapter", f"loop={folder / 'code'}"]
    code, out, err = run("generate", *single, "--prompt", "add", "--max-tokens", 2, "--json", "--fixed", "sum=0.5")
    assert code == 0, err
    assert json.loads(out)["adapter_names"] == ["loop", "sum"]
    tasks = tmp_path / "rows.jsonl"
    tasks.write_text(json.dumps({"question": "add three", "answer": "four #### 4"}) + "\n")
    code, _, err = run("eval", *single, "--tasks", f"math={tasks}", "--arms", "base,routed,sum", "--limit", 1, "-o",
                       tmp_path / "results", "--max-tokens", 2)  # fmt: skip
    assert code == 0, err
    code, _, err = run("bench", *single, "--suite", "decode", "--batch", 1, "--tokens", 8, "--rounds", 1, "--json")
    assert code == 0, err
    code, _, err = run("bench", *single, "--suite", "memory", "--tokens", 8)
    assert (code, "make one by treadle fit" in err) == (1, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give the folder of a bundle, or --base with --adapters FOLDER or --adapter name=PATH"),
        (["{bundle}", "--base", "{base}", "--adapters", "{folder}"], "give the folder of a bundle, or --base"),
        (["--base", "{base}"], "base needs adapters: a folder, or adapter name=PATH"),
        (["--adapters", "{folder}", "--embedder", "tokens"], "adapters, embedder need a base"),
        (["--base", "{base}", "--adapters", "{folder}/nowhere"], "nowhere' is not a folder"),
        (["--base", "{base}", "--adapters", "{base}"], "holds no adapter, which is a sub-folder with adapter_config"),
        (["--base", "{base}", "--adapters", "{bundle}"], "it is a bundle: give {bundle} without --base"),
        (["--base", "{base}", "--adapter", "math"], "--adapter takes name=PATH, not 'math'"),
        (["--base", "{base}", "--adapter", "a={folder}/math", "--adapter", "a=b"], "--adapter names a twice"),
        (["--base", "{base}", "--adapters", "{folder}", "--adapter", "math={folder}/code"], "both name math"),
        (["--base", "{base}", "--adapter", "a=./nowhere"], "'./nowhere' is no folder, and no hub id such as org/name"),
        (["--base", "{base}", "--adapter", "a=org/nowhere"], "'org/nowhere' is no folder, and the hub says: "),
        (["--base", "{base}", "--adapter", "a=or g/nowhere"], "'or g/nowhere' is no folder, and the hub says: "),
        (["--base", "{folder}/nowhere", "--adapters", "{folder}"], "nowhere' cannot be loaded: "),
        (["--base", "{base}", "--adapters", "{folder}", "--embedder", "./none"], "embedder './none': no such folder"),
    ],
)
def test_nonsense_ends_in_one_message(
    base: str, folder: Path, bundle_folder: Path, run: Run, given: list[str], message: str
) -> None:
    words = {"base": base, "folder": str(folder), "bundle": str(bundle_folder)}
    code, out, err = run("route", *(each.format(**words) for each in given), "--text", "add")
    assert (code, out) == (1, "")
    assert message.format(**words) in err
    assert "Traceback" not in err
