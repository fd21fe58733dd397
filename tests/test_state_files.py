"""States in a bundle's files, and what commands and servers tell of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.bundle.centroid_files import read_states, write_states
from treadle.bundle.token_embedder import token_embedder
from treadle.common.errors import BundleError, ModelError, OptionError
from treadle.common.params import RoutingParams
from treadle.engine.loading import load
from treadle.routing.explain import explain
from treadle.routing.router import Router
from treadle.routing.schedule import Seen
from treadle.routing.states import StateClasses
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams

from conftest import BASE, SAMPLES, Run, byte_tokenizer, tiny_llama

Damage = Callable[[dict[str, np.ndarray], dict[str, str]], None]
FILE = "states.safetensors"
BY_TEXT = RoutingParams(states=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / BASE)
    byte_tokenizer().save_pretrained(tmp_path / BASE)
    return tmp_path / BASE


@pytest.fixture
def save(tmp_path: Path, base: Path, adapter_folders: dict[str, Path], router: Router, classes: StateClasses) -> Any:
    """Return what writes a bundle with states."""

    def write(params: RoutingParams | None = None, states: StateClasses | None = classes) -> Path:
        given = replace(router, params=params or RoutingParams(), states=states)
        folder = tmp_path / "with-states"
        return save_bundle(folder, base=str(base), adapters=adapter_folders, router=given, overwrite=True)

    return write


def change(file: Path, damage: Damage) -> None:
    """Change the arrays and the metadata of a file."""
    with safe_open(file, "np") as opened:
        metadata = dict(opened.metadata())
    arrays = load_file(file)
    damage(arrays, metadata)
    save_file(arrays, file, metadata)


# Files


def test_states_weigh_as_they_were_written_bit_for_bit(tmp_path: Path, router: Router, classes: StateClasses) -> None:
    write_states(tmp_path / FILE, classes)
    read = read_states(tmp_path / FILE)
    assert (read.layer, read.spans, read.centroids.names) == (classes.layer, classes.spans, classes.centroids.names)
    views = np.random.default_rng(0).normal(size=(6, 2, 32)).astype(np.float32)
    seen = Seen(views, np.arange(6) % 2 == 0)
    one, other = (replace(router, states=each).weigh_states(seen, RoutingParams()) for each in (read, classes))
    np.testing.assert_array_equal(one, other)


def test_a_bundle_keeps_states_and_one_without_them_leaves_none(save: Any, classes: StateClasses) -> None:
    states = read_bundle(save()).router.states
    assert states is not None
    np.testing.assert_array_equal(states.centroids.means, classes.centroids.means)
    folder = save(states=None)
    assert not (folder / FILE).exists()
    assert read_bundle(folder).router.states is None


def without(key: str) -> Damage:
    return lambda _, metadata: metadata.__delitem__(key)


def with_metadata(**changes: str) -> Damage:
    return lambda _, metadata: metadata.update(changes)


def with_array(key: str, make: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return lambda arrays, _: arrays.__setitem__(key, make(arrays[key]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("layer"), "must give a layer"),
        (without("spans"), "must give a layer, and the spans"),
        (without("names"), "must hold means"),
        (with_metadata(layer='"one"'), "must give a layer"),
        (with_metadata(layer="0"), "layer 0: the first is 1"),
        (with_metadata(layer="true"), "must give a layer"),
        (with_metadata(spans="[16, 0]"), "each is 1 to 64 tokens"),
        (with_metadata(spans="[1000000000, 4]"), "each is 1 to 64 tokens"),
        (with_metadata(spans="[16, 5]"), "do not fit the tails"),
        (with_metadata(spans="[16]"), "do not fit the tails"),
        (with_metadata(spans="[]"), "each is 1 to 64 tokens"),
        (with_metadata(spans="not json"), "the spans of the views as a list"),
        (with_metadata(names='["math", "code", "science"]'), "is for math, code, science"),
        (with_array("means", lambda given: given * np.nan), "NaN or infinity"),
        (with_array("means", lambda given: given * 9), "longer than 1"),
        (with_array("prompt.factors", lambda given: given[:, :, :8].copy()), "prompt factors has shape"),
        (lambda arrays, _: arrays.__setitem__("scatter", arrays["means"]), "must hold means"),
    ],
)
def test_a_damaged_file_is_refused_by_name(save: Any, damage: Damage, message: str) -> None:
    folder = save()
    change(folder / FILE, damage)
    with pytest.raises(BundleError, match="cannot be used") as refused:
        read_bundle(folder)
    assert message in str(refused.value)
    assert FILE in str(refused.value)


def test_a_file_that_is_cut_or_a_link_to_nothing_is_refused(save: Any, tmp_path: Path) -> None:
    folder = save()
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:200])
    with pytest.raises(BundleError, match=FILE):
        read_bundle(folder)
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=FILE):
        read_bundle(folder)


def test_what_could_not_be_read_again_is_not_written(save: Any, classes: StateClasses) -> None:
    with pytest.raises(BundleError, match="prefill = causal: not possible"):
        save(RoutingParams(prefill="causal"))
    with pytest.raises(BundleError, match="states know math, science only"):
        save(states=classes.among(["math", "science"]))
    with pytest.raises(OptionError, match="fit both on the same adapters"):
        save(states=replace(classes, centroids=replace(classes.centroids, names=("math", "code", "science"))))


def test_a_base_of_another_shape_is_refused_when_the_bundle_is_loaded(save: Any) -> None:
    folder = save()
    change(folder / FILE, with_metadata(embedder_id="states:llama-30x576:1"))
    with pytest.raises(ModelError, match="they are states:llama-30x576:1, this model's would be states:llama-2x32:1"):
        load(folder)


# Commands


def fit_arguments(tmp_path: Path, base: Path, folders: dict[str, Path], embedder: str) -> list[object]:
    given: list[object] = ["--base", base, "--embedder", embedder, "-o", tmp_path / "fitted"]
    for name, folder in folders.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(SAMPLES[name]) + "\n")
        given += ["--adapter", f"{name}={folder}", "--samples", f"{name}={tmp_path / name}.txt"]
    return given


@pytest.fixture
def words(tmp_path: Path, bundle_folder: Path) -> str:
    """The folder of the embedder of words."""
    return str(bundle_folder / "embedder")


def test_fit_takes_states_behind_an_embedder_of_texts(
    run: Run, tmp_path: Path, base: Path, words: str, adapter_folders: dict[str, Path], classes: StateClasses
) -> None:
    arguments = fit_arguments(tmp_path, base, adapter_folders, f"base+{words}")
    code, out, err = run("fit", *arguments)
    assert code == 0, err
    assert "the base model's states, after layer 1:" in out
    assert out.count("cross-validation:") == 2
    read = read_bundle(tmp_path / "fitted")
    assert read.router.states is not None
    means = read.router.states.centroids.means  # the base was read in bfloat16
    np.testing.assert_allclose(means, classes.centroids.means, atol=5e-3)
    code, out, _ = run("fit", *arguments, "--overwrite", "--json")
    told = json.loads(out)
    assert (told["states"]["layer"], told["states"]["spans"]) == (1, [16, 4])
    assert 0 <= told["states"]["accuracy"] <= 1
    assert told["seconds"] > 0
    assert load(read).generate("add three").weights.shape[1] == 3


def test_states_alone_stand_behind_the_token_vectors_of_the_base(
    run: Run, tmp_path: Path, base: Path, adapter_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREADLE_HOME", str(tmp_path / "home"))
    code, _, err = run("fit", *fit_arguments(tmp_path, base, adapter_folders, "base"))
    assert code == 0, err
    read = read_bundle(tmp_path / "fitted").router
    assert read.states is not None
    assert read.embedder.id == token_embedder(str(base)).id


def test_fit_refuses_what_states_cannot_do_before_anything_is_loaded(
    run: Run, tmp_path: Path, base: Path, words: str, adapter_folders: dict[str, Path]
) -> None:
    arguments = fit_arguments(tmp_path, tmp_path / "no-base", adapter_folders, f"base+{words}")
    code, _, err = run("fit", *arguments[:-2], "--prefill", "causal")
    assert code == 1
    assert "adapter 'code': the base model's states need sample texts of it" in err
    assert "prefill = causal: not possible" in err
    assert not (tmp_path / "fitted").exists()


def test_route_and_doctor_tell_of_states(run: Run, save: Any) -> None:
    folder = save()
    explained = ("route", folder, "--text", "add three")
    assert "provisional: once the base model has read a text, its own states decide" in run(*explained)[1]
    assert json.loads(run(*explained, "--json")[1])["provisional"] is True
    assert "provisional" not in run(*explained, "--no-states")[1]
    assert json.loads(run(*explained, "--no-states", "--json")[1])["provisional"] is False
    assert "states after layer 1 decide: means of the last 16 and 4 tokens" in run("doctor", folder)[1]
    told = json.loads(run("doctor", folder, "--json")[1])
    assert (told["state_layer"], told["state_spans"]) == (1, [16, 4])


def test_an_explanation_is_final_where_the_text_decides(router: Router, classes: StateClasses) -> None:
    with_states = replace(router, states=classes)
    assert explain(with_states, "add").provisional
    for params in (BY_TEXT, RoutingParams.one("math"), RoutingParams(score="cosine")):
        assert not explain(with_states, "add", params).provisional
    assert not explain(router, "add").provisional


# Those who cannot use states


def test_vllm_serves_the_text_views_alone(save: Any) -> None:
    with pytest.raises(BundleError, match=r'(?s)cannot be blended in vLLM.*"states": false'):
        open_bundle(PluginParams(bundle=str(save())))
    mixture = open_bundle(PluginParams(bundle=str(save(BY_TEXT))))[1]
    assert mixture.read_request({"every": 4}) == replace(BY_TEXT, every=4)
    assert mixture.read_request("math") == RoutingParams.one("math")
    with pytest.raises(OptionError, match="use states = false"):
        mixture.read_request({"states": True})
