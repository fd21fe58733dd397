"""What was fitted is what is loaded, and nothing of a damaged bundle is loaded at all."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from old_centroids import old_arrays, write_old
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

import treadle
from treadle.bundle.base_model import load_model
from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.common.errors import AdapterWarning, BundleError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.lora.adapter import read_adapter
from treadle.lora.names import is_foreign
from treadle.routing.fitting import fit

from conftest import BASE, SAMPLES, edit_config, save_adapter, tiny_llama

DEMO = Path(__file__).parents[1] / "demo" / "bundle"

TEXTS = ["add three", "the planet loop", "def", ""]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, adapter_folders, router) -> Path:
    """A good bundle; tests that damage one copy it."""
    folder = tmp_path_factory.mktemp("saved") / "bundle"
    samples = {name: texts[:1] for name, texts in SAMPLES.items()}
    return save_bundle(folder, base=BASE, adapters=adapter_folders, router=router, samples=samples)


@pytest.fixture
def bundle(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Round trips


def test_a_bundle_holds_what_was_fitted(saved, adapter_folders, embedder):
    router, read = fit(SAMPLES, embedder), read_bundle(saved)
    assert read.base_model == BASE
    assert [adapter.name for adapter in read.adapters] == list(SAMPLES)
    assert read.samples == {name: texts[:1] for name, texts in SAMPLES.items()}
    assert read.router.names == router.names
    assert read.router.params == router.params
    assert read.router.embedder.id == embedder.id
    np.testing.assert_array_equal(read.router.centroids.means, router.centroids.means)
    assert read.router.centroids.calibrations == router.centroids.calibrations
    for score in ("cosine", "centred", "lda"):
        params = RoutingParams(score=score)
        np.testing.assert_array_equal(read.router.weights(TEXTS, params), router.weights(TEXTS, params))
    for adapter in read.adapters:
        original = read_adapter(adapter_folders[adapter.name], adapter.name)
        assert adapter.pairs.keys() == original.pairs.keys()
        for module, pair in adapter.pairs.items():
            assert torch.equal(pair.a, original.pairs[module].a)
            assert torch.equal(pair.b, original.pairs[module].b)
            assert pair.scale == original.pairs[module].scale


def test_an_engine_from_a_bundle_generates_what_the_one_before_did(engine, adapter_folders, tokenizer, tmp_path):
    base = tmp_path / BASE
    tiny_llama().save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_bundle(tmp_path / "bundle", base=str(base), adapters=adapter_folders, router=engine.router)
    loaded = treadle.load(tmp_path / "bundle", device="cpu")
    assert loaded.adapter_names == engine.adapter_names
    prompts, sampling = ["add three plus", "the planet é"], SamplingParams(max_tokens=12)
    for one, other in zip(
        engine.generate(prompts, sampling=sampling), loaded.generate(prompts, sampling=sampling), strict=True
    ):
        assert one.text == other.text
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_dtype_and_device_are_torchs_own_or_their_names(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    for dtype in ("bfloat16", torch.bfloat16):
        model = load_model(str(tmp_path), dtype=dtype, device=torch.device("cpu"))
        assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    assert load_model(str(tmp_path), device=torch.device("cpu", 0)).dtype == torch.float32
    for wrong in ("int8", torch.int8, "float", torch.float64):
        with pytest.raises(OptionError, match=r"dtype '\w+': allowed are float32, bfloat16, float16, as a text or as"):
            load_model(str(tmp_path), dtype=wrong)
    with pytest.raises(OptionError, match="device 'cuda:99' cannot be used"):
        load_model(str(tmp_path), device=torch.device("cuda:99"))


positive = st.floats(1e-3, 1e3)
common: dict[str, st.SearchStrategy] = {
    "temperature": st.none() | positive,
    "top_k": st.integers(1, 9),
    "every": st.integers(1, 99),
    "window": st.none() | st.integers(1, 999),
}
some_params = st.one_of(
    st.builds(RoutingParams, score=st.sampled_from(["cosine", "centred", "lda"]), rule=st.just("top_k"), **common),
    st.builds(RoutingParams, score=st.just("centred"), rule=st.just("boosted"), boost=positive, **common),
    st.builds(RoutingParams, past=st.sampled_from(["keep", "recompute"]), **common | {"every": st.none()}),
    st.builds(RoutingParams, prefill=st.just("causal"), **common),
    st.builds(
        RoutingParams, rule=st.just("fixed"), fixed=st.dictionaries(st.sampled_from(list(SAMPLES)), st.floats(0, 9))
    ),
)


@given(some_params)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_routing_params_survive_the_bundle(tmp_path, adapter_folders, router, params):
    router = replace(router, params=params)
    folder = save_bundle(tmp_path / "b", base=BASE, adapters=adapter_folders, router=router, overwrite=True)
    read = read_bundle(folder).router
    assert read.params == params
    assert json.loads((folder / "bundle.json").read_text())["routing"] == asdict(params)
    np.testing.assert_array_equal(read.weights(TEXTS), router.weights(TEXTS))


def test_the_papers_params_survive_the_bundle(tmp_path, equal_folders, embedder):
    router = fit(SAMPLES, embedder, RoutingParams.paper())
    save_bundle(tmp_path / "b", base=f"somewhere/{BASE}", adapters=equal_folders, router=router)
    assert read_bundle(tmp_path / "b").router.params == RoutingParams.paper()


def test_removed_options_that_did_nothing_are_passed_over(bundle):
    before = read_bundle(bundle).router.params
    top(routing=asdict(before) | {"unit_scale": False, "floor": None})(bundle)
    assert read_bundle(bundle).router.params == before


def test_a_bundle_may_lie_anywhere_and_be_read_from_anywhere(bundle, tmp_path, monkeypatch):
    moved = bundle.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert read_bundle("elsewhere").router.names == tuple(SAMPLES)
    monkeypatch.chdir(moved)
    assert read_bundle(".").router.names == tuple(SAMPLES)


# Damaged bundles: each is refused with a message that says what is wrong

Damage = Callable[[Path], Any]
REMOVE = object()


def edit(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (document | changes).items() if value is not REMOVE}


def top(**changes: Any) -> Damage:
    """Change keys of bundle.json."""

    def damage(folder: Path) -> None:
        file = folder / "bundle.json"
        file.write_text(json.dumps(edit(json.loads(file.read_text()), changes)))

    return damage


def entry(index: int = 0, **changes: Any) -> Damage:
    """Change keys of an adapter's entry in bundle.json."""

    def damage(folder: Path) -> None:
        file = folder / "bundle.json"
        document = json.loads(file.read_text())
        document["adapters"][index] = edit(document["adapters"][index], changes)
        file.write_text(json.dumps(document))

    return damage


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)

    return damage


def folder_at(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def pipe_at(name: str) -> Damage:
    """Put a pipe that nobody writes to in the place of a file: whoever opens it as a file waits for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def truncate(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def factors(change: Callable[[torch.Tensor], torch.Tensor], side: str, only_first: bool = False) -> Damage:
    """Change the factors A or B of the adapter math."""

    def damage(folder: Path) -> None:
        file = folder / "adapters/math/adapter_model.safetensors"
        tensors = load_tensors(file)
        keys = [key for key in sorted(tensors) if f"lora_{side}" in key][: 1 if only_first else None]
        save_tensors(tensors | {key: change(tensors[key]).contiguous() for key in keys}, file)

    return damage


def config(**changes: Any) -> Damage:
    return lambda folder: edit_config(folder / "adapters/math", **changes)


def centroids(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict, **metadata: str | None
) -> Damage:
    """Change arrays and metadata of the centroids file."""

    def damage(folder: Path) -> None:
        file = folder / "centroids.safetensors"
        with safe_open(file, "np") as opened:
            given = dict(opened.metadata()) | metadata
        arrays = {key: np.array(array, order="C") for key, array in change(load_file(file)).items()}
        save_file(arrays, file, {key: value for key, value in given.items() if value is not None})

    return damage


def with_nan(array: np.ndarray | torch.Tensor) -> Any:
    changed = array.copy() if isinstance(array, np.ndarray) else array.clone()
    changed[0, 0] = float("nan")
    return changed


def pickled(folder: Path) -> None:
    file = folder / "adapters/math/adapter_model.safetensors"
    torch.save(load_tensors(file), file.with_name("adapter_model.bin"))
    file.unlink()


def linked_out(folder: Path) -> None:
    inside = folder / "adapters/math"
    inside.rename(folder.parent / "outside")
    inside.symlink_to(folder.parent / "outside")


def linked_embedder(folder: Path) -> None:
    (folder / "embedder").rename(folder.parent / "outside")
    (folder / "embedder").symlink_to(folder.parent / "outside")


def other_embedder(folder: Path) -> None:
    file = folder / "embedder/model.safetensors"
    save_file({key: array + np.float32(1) for key, array in load_file(file).items()}, file)


DAMAGES: dict[str, tuple[Damage, str]] = {
    # bundle.json
    "no bundle.json": (remove("bundle.json"), "is not a bundle: it has no bundle.json. `treadle fit` makes one."),
    "not JSON": (write("bundle.json", "{"), "bundle.json cannot be read as JSON"),
    "not UTF-8": (lambda folder: (folder / "bundle.json").write_bytes(b'{"\xff": 1}'), "it is not UTF-8 (byte 2)"),
    "not an object": (write("bundle.json", "[]"), "bundle.json does not hold an object"),
    "unknown key": (top(adaptors=[]), "unknown key 'adaptors'. Did you mean 'adapters'?"),
    "missing key": (top(base_model=REMOVE), "bundle.json: key 'base_model' is missing"),
    "wrong type": (top(routing="fast"), "'routing' must be a dict, not 'fast'"),
    "no adapters": (top(adapters=[]), "it names no adapter"),
    "adapter not an object": (top(adapters=["math"]), "adapters[0] is not an object"),
    "unknown adapter key": (entry(rank=4), "adapters[0]: unknown key 'rank'"),
    "missing adapter key": (entry(1, path=REMOVE), "adapters[1]: key 'path' is missing"),
    "samples not a number": (entry(samples=True), "'samples' must be a int, not true"),
    "nested without end": (
        write("bundle.json", "[" * 200_000),
        "bundle.json cannot be read as JSON: it is nested deeper",
    ),
    "a number beyond floating point": (entry(samples=10**400), "a number of 401 digits is too large"),
    "NaN": (top(routing={"every": float("nan")}), "bundle.json cannot be read as JSON: NaN is not a JSON number"),
    "a key twice": (write("bundle.json", '{"routing": {}, "routing": {}}'), "the key 'routing' is there twice"),
    "a folder instead of bundle.json": (folder_at("bundle.json"), "is not a bundle: it has no bundle.json"),
    # names and paths
    "long path": (entry(path="a" * 5000), "leaves the bundle's folder"),
    "half of a surrogate pair": (entry(path="\ud800"), "it holds half of a surrogate pair"),
    "long name": (entry(name="a" * 101), "use letters, digits, '.', '_' and '-', at most 100"),
    "duplicate name": (entry(1, name="math"), "two adapters are called 'math'"),
    "bad name": (entry(name="../math"), "adapter name '../math': use letters, digits"),
    "reserved name": (entry(name="auto"), "adapter name 'auto' is reserved"),
    "absolute path": (entry(path="/etc"), "adapter 'math': path '/etc' leaves the bundle's folder"),
    "path with ..": (entry(path="adapters/../../math"), "path 'adapters/../../math' leaves the bundle's folder"),
    "path with NUL": (entry(path="adapters\0"), "leaves the bundle's folder"),
    "symlink out": (linked_out, "path 'adapters/math' leaves the bundle's folder"),
    "embedder absolute": (top(embedder="/etc"), "embedder '/etc' leaves the bundle's folder"),
    "embedder with ..": (top(embedder="embedder/../../x"), "embedder 'embedder/../../x' leaves the bundle's folder"),
    "embedder in the home": (top(embedder="~/x"), "embedder '~/x' leaves the bundle's folder"),
    "static embedder absolute": (top(embedder="static:/etc"), "embedder 'static:/etc' leaves the bundle's folder"),
    "embedder symlink out": (linked_embedder, "embedder 'embedder' leaves the bundle's folder"),
    # adapters
    "no adapter folder": (remove("adapters/math"), "adapters/math is not a PEFT folder"),
    "adapter config not JSON": (
        write("adapters/math/adapter_config.json", "x"),
        "adapter_config.json cannot be read as JSON",
    ),
    "no factors file": (remove("adapters/math/adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "pickle only": (pickled, "adapter_model.bin is a pickle, which can run code"),
    "truncated factors": (
        truncate("adapters/math/adapter_model.safetensors"),
        "adapter_model.safetensors cannot be re",
    ),
    "NaN in factors": (factors(with_nan, "A", only_first=True), "lora_A.weight holds NaN or infinite"),
    "infinite factor": (factors(lambda b: b / 0, "B", only_first=True), "lora_B.weight holds NaN or infinite"),
    "zero B": (factors(torch.zeros_like, "B"), "all its B factors are zero"),
    "A and B do not fit": (factors(lambda b: b[:, :2], "B"), "lora_A (4, 32) and lora_B (32, 2) do not fit"),
    "other rank than its config's": (config(r=8), "its factors have rank 4, its config says 8"),
    "DoRA": (config(use_dora=True), "use_dora: lora_magnitude_vector is missing"),
    "QA-LoRA": (config(use_qalora=True), "use_qalora: QA-LoRA pools its input"),
    "not a LoRA": (
        config(peft_type="LOHA"),
        "its peft_type is LOHA; LORA, IA3, PREFIX_TUNING, PROMPT_TUNING, P_TUNING can be blended",
    ),
    "deeply nested config": (write("adapters/math/adapter_config.json", "[" * 200_000), "it is nested deeper than 64"),
    "a pipe for factors": (pipe_at("adapters/math/adapter_model.safetensors"), "has no adapter_model.safetensors"),
    # centroids
    "a pipe for centroids": (pipe_at("centroids.safetensors"), "centroids.safetensors is missing"),
    "no centroids": (remove("centroids.safetensors"), "centroids.safetensors is missing"),
    "truncated centroids": (truncate("centroids.safetensors"), "centroids.safetensors cannot be read"),
    "NaN in centroids": (centroids(lambda a: a | {"means": with_nan(a["means"])}), "means holds NaN or infinity"),
    "centroids of other names": (
        centroids(names='["math", "physics", "code"]'),
        "centroids.safetensors is for math, physics, code; bundle.json names math, science, code",
    ),
    "centroids of names in another order": (centroids(names='["code", "science", "math"]'), "is for code, science"),
    "other sample count": (entry(samples=7), "'math': centroids.safetensors counts 4 samples, bundle.json says 7"),
    # embedder
    "another embedder": (other_embedder, "the centroids were made by the embedder 'static:"),
    "centroids of another embedder": (centroids(embedder_id="sentence:1"), "made by the embedder 'sentence:1', not 's"),
    "no embedder folder": (remove("embedder"), "embedder': no such folder"),
    "no embedder config": (remove("embedder/config.json"), "config.json cannot be read: No such file"),
    "deeply nested embedder config": (
        write("embedder/config.json", "[" * 200_000),
        "it is nested deeper than 64 levels",
    ),
    "embedder config not an object": (write("embedder/config.json", "[]"), "config.json does not hold an object"),
    "no embedder vectors": (
        remove("embedder/model.safetensors"),
        "Error: Could not find expected model",
    ),
    "truncated embedder": (truncate("embedder/model.safetensors"), "static embedder"),
    "embedder tokenizer damaged": (write("embedder/tokenizer.json", "{"), "static embedder"),
    # routing
    "unknown routing option": (top(routing={"evry": 2}), "unknown option 'evry'. Did you mean 'every'?"),
    "removed routing options": (
        top(routing={"unit_scale": True, "floor": -1.5}),
        "treadle no longer has unit_scale = true, floor = -1.5; delete it from bundle.json to route without it",
    ),
    "routing value of another type": (top(routing={"every": "often"}), "every must be a whole number"),
    "bad routing value": (top(routing={"every": 0}), "every must be a whole number of at least 1"),
    "clashing routing": (top(routing={"rule": "boosted"}), "rule boosted multiplies a cosine; with score lda"),
    "fixed names an unknown adapter": (
        top(routing={"rule": "fixed", "fixed": {"maths": 1}}),
        "unknown adapter 'maths'. Did you mean 'math'?",
    ),
    "combine that the ranks do not allow": (
        top(routing={"combine": "linear"}),
        "combine='linear' needs adapters of equal ranks and target modules; science, code differ from math",
    ),
    # samples
    "samples of an unknown adapter": (write("samples.json", '{"art": []}'), "samples.json: unknown adapter 'art'"),
    "samples not texts": (write("samples.json", '{"math": [1]}'), "samples.json: 'math' must be a list of texts"),
    "samples not JSON": (write("samples.json", "["), "samples.json cannot be read as JSON"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_bundle_is_refused(bundle, damage, message):
    damage(bundle)
    with pytest.raises(BundleError) as caught:
        treadle.load(bundle)
    assert message in str(caught.value)
    assert str(bundle) in str(caught.value)


def test_a_relative_bundle_without_its_embedder_does_not_ask_the_hub(bundle, monkeypatch):
    remove("embedder")(bundle)
    monkeypatch.chdir(bundle.parent)
    with pytest.raises(BundleError, match="no such folder"):
        treadle.load("bundle")


def test_one_sample_an_adapter_is_enough(tmp_path, adapter_folders, embedder):
    router = fit({name: texts[:1] for name, texts in SAMPLES.items()}, embedder)
    save_bundle(tmp_path / "b", base=BASE, adapters=adapter_folders, router=router)
    weights = read_bundle(tmp_path / "b").router.weights([texts[0] for texts in SAMPLES.values()])
    assert np.isfinite(weights).all()
    assert (weights.argmax(-1) == np.arange(3)).all()


@pytest.mark.parametrize(
    "together",
    [
        ["unknown key", "missing key", "wrong type"],  # found in bundle.json
        ["duplicate name", "path with ..", "embedder absolute"],
        ["DoRA", "QA-LoRA", "other sample count"],  # found in the files
        ["zero B", "truncated centroids", "no embedder config", "bad routing value", "samples not texts"],
    ],
    ids=" + ".join,
)
def test_all_problems_are_in_one_message(bundle, together):
    for name in together:
        DAMAGES[name][0](bundle)
    with pytest.raises(BundleError) as caught:
        treadle.load(bundle)
    for name in together:
        assert DAMAGES[name][1] in str(caught.value)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_no_pickle_is_ever_opened(bundle, tmp_path):
    mark = tmp_path / "it-went-off"
    for name in ("adapters/math/adapter_model.bin", "embedder/pytorch_model.bin", "centroids.bin", "pytorch_model.bin"):
        torch.save(Bomb(mark), bundle / name)
    read_bundle(bundle)
    for file in bundle.rglob("*.safetensors"):
        file.rename(file.with_suffix(".aside"))
        with pytest.raises(BundleError):
            read_bundle(bundle)
        shutil.copyfile(bundle / "pytorch_model.bin", file)  # a pickle in the place of safetensors
        with pytest.raises(BundleError):
            read_bundle(bundle)
        file.with_suffix(".aside").rename(file)
    assert not mark.exists()
    torch.load(bundle / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # the bomb works


# Saving


def test_saving_does_not_overwrite_unless_told_to(bundle, adapter_folders, embedder):
    before = contents(bundle)
    router = fit(SAMPLES, embedder, RoutingParams(every=7))
    with pytest.raises(BundleError, match="holds a bundle already; name another folder, or overwrite it"):
        save_bundle(bundle, base=BASE, adapters=adapter_folders, router=router)
    assert contents(bundle) == before
    (bundle / "README.md").write_text("mine")
    save_bundle(bundle, base=BASE, adapters=adapter_folders, router=router, overwrite=True)
    assert read_bundle(bundle).router.params.every == 7
    assert (bundle / "README.md").read_text() == "mine"
    assert not (bundle / "samples.json").exists()  # the old bundle's own files are gone


def test_a_bundle_can_be_made_of_its_own_adapters(bundle, embedder):
    before = contents(bundle / "adapters")
    folders = {name: bundle / "adapters" / name for name in SAMPLES}
    save_bundle(bundle, base=BASE, adapters=folders, router=fit(SAMPLES, embedder), overwrite=True)
    assert contents(bundle / "adapters") == before
    assert read_bundle(bundle).router.names == tuple(SAMPLES)


def test_the_folder_may_be_the_current_one(tmp_path, monkeypatch, adapter_folders, embedder):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_bundle(".", base=BASE, adapters=adapter_folders, router=fit(SAMPLES, embedder))
    assert read_bundle(tmp_path / "here").router.names == tuple(SAMPLES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": {"math": "nowhere"}}, "the router knows math, science, code; the adapters are math"),
        ({"adapters": {"math": "nowhere"}}, "nowhere is not a PEFT folder"),
        ({"samples": {"art": ["x"]}}, "unknown adapter in samples 'art'"),
    ],
)
def test_an_error_in_saving_leaves_the_bundle_as_it_was(bundle, adapter_folders, router, changes, message):
    before = contents(bundle)
    options = {"base": BASE, "adapters": adapter_folders, "router": router, **changes}
    with pytest.raises(BundleError) as caught:
        save_bundle(bundle, **options, overwrite=True)
    assert message in str(caught.value)
    assert contents(bundle) == before


def test_an_interrupted_save_leaves_the_bundle_as_it_was(bundle, adapter_folders, embedder):
    class FullDisk:
        id, dim = embedder.id, embedder.dim

        def save(self, folder: Path) -> str:
            raise OSError("no space left on device")

    before = contents(bundle)
    router = replace(fit(SAMPLES, embedder), embedder=FullDisk())
    with pytest.raises(OptionError, match=f"{bundle} cannot be written: no space left on device; make room"):
        save_bundle(bundle, base=BASE, adapters=adapter_folders, router=router, overwrite=True)
    assert contents(bundle) == before
    save_bundle(bundle, base=BASE, adapters=adapter_folders, router=fit(SAMPLES, embedder), overwrite=True)
    assert read_bundle(bundle).samples == {}


def test_names_that_the_server_needs_are_reserved(tmp_path, embedder):
    folder = save_adapter(tmp_path / "adapter")
    router = fit({"base": ["one"], "a/b": ["two"]}, embedder)
    with pytest.raises(BundleError, match=r"(?s)'a/b': use letters.*'base' is reserved"):
        save_bundle(tmp_path / "b", base=BASE, adapters={"base": folder, "a/b": folder}, router=router)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("read", [lambda folder: folder, str, treadle.read_bundle])
def test_an_engine_is_made_of_the_bundles_parts(bundle_folder, model, read):
    loaded = treadle.load(read(bundle_folder))
    assert isinstance(loaded, Engine)
    assert loaded.adapter_names == tuple(SAMPLES)
    loaded.detach()
    own, wanted = loaded.model.state_dict(), model.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "named",
    [
        "org/Some-Model",
        "other/some-model",
        "/srv/models/some-model/",
        "C:\\models\\some-model",
        "/home/u/.cache/treadle/models/org--some-model",
        "/home/u/.cache/huggingface/hub/models--org--some-model/snapshots/0123456789abcdef0123456789abcdef01234567",
        "/home/u/.cache/huggingface/hub/models--org--some-model/snapshots/main/",
        "/home/u/.cache/huggingface/hub/models--org--some-model",
        "/root/.cache/modelscope/hub/models/org/some-model",
        "",
    ],
)
def test_the_folder_of_a_cache_is_the_model_that_it_keeps(adapter_folders, named):
    adapter = replace(read_adapter(adapter_folders["math"]), base_model=named)
    for base in ("org/some-model", "/srv/models--org--some-model/snapshots/abc", "models/org--some-model"):
        assert not is_foreign(adapter, base)
    assert is_foreign(adapter, "org/another-model") == bool(named)


@pytest.mark.parametrize(
    "named", ["org/model--large", "work/snapshots/large", "/models--org--other/snapshots/some-model"]
)
def test_another_model_in_a_cache_is_foreign(adapter_folders, named):
    adapter = replace(read_adapter(adapter_folders["math"]), base_model=named)
    assert is_foreign(adapter, "org/some-model")


TWINS = {"math": "unsloth/some-model-bnb-4bit", "science": "../some-model-AWQ", "code": "unsloth/some-model-bnb-4bit"}


def test_bases_of_other_names_are_one_line_of_warning_and_refused_where_warnings_are_errors(
    tmp_path, adapter_folders, router
):
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in adapter_folders.items()}
    for name, folder in folders.items():
        edit_config(folder, base_model_name_or_path=TWINS[name])
    line = (
        "the base is 'tiny-llama', but by their configs adapters were trained on others: "
        "'math', 'code' on 'unsloth/some-model-bnb-4bit'; 'science' on '../some-model-AWQ'. "
        "The shapes decide whether they fit."
    )
    save = partial(save_bundle, tmp_path / "twins", base=BASE, adapters=folders, router=router)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)  # strict
        with pytest.raises(BundleError, match=re.escape(line)):
            save()
    with pytest.warns(AdapterWarning) as caught:
        bundle = save()
    with pytest.warns(AdapterWarning) as again:
        assert read_bundle(bundle).router.names == router.names
    assert [str(each.message) for each in (*caught, *again)] == [line, line]


def test_the_demos_bundle_knows_prompts_of_its_kinds():
    read = treadle.read_bundle(DEMO)
    assert [(adapter.name, len(adapter.pairs)) for adapter in read.adapters] == [
        ("math", 60), ("science", 60), ("code", 60), ("reading", 60)
    ]  # fmt: skip
    texts = ["What is 3 + 4 times 12?", "Which planet is nearest to the sun?", "def add(a, b):\n    return a + b"]
    weights = read.router.weights(texts)
    assert (weights.argmax(-1) == np.arange(3)).all()


def test_a_bundle_of_an_older_release_loads_and_its_options_that_went_do_nothing(bundle):
    """Its weights are those of then: `test_centroid_files.py`."""
    top(routing=asdict(RoutingParams()) | {"recent": 32, "change": 4.0})(bundle)
    embedder_id = read_bundle(bundle).router.embedder.id
    arrays = old_arrays()
    write_old(bundle / "centroids.safetensors", arrays, embedder_id=embedder_id)
    for index, count in enumerate(arrays["counts"].tolist()):
        entry(index, samples=count)(bundle)
    read = treadle.read_bundle(bundle).router
    assert read.params == RoutingParams()
    assert read.tails == ()
    for trace in (read.weights(TEXTS), read.trace(["add ", "three ", "plus"], 2, RoutingParams(every=1))):
        np.testing.assert_allclose(trace.sum(-1), 1, atol=1e-5)  # the base has no share
