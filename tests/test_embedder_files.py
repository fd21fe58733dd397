"""Nothing in an embedder's folder is run, unpickled or fetched, and a damaged one is refused when it is loaded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from treadle.common.errors import ModelError, TreadleError
from treadle.routing.embedder import StaticEmbedder, load_embedder
from treadle.routing.embedder_files import check_folder

Damage = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path, embedder: StaticEmbedder) -> Path:
    """A static embedder's folder."""
    embedder.save(tmp_path)
    return tmp_path / "embedder"


def write(name: str, document: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(document))

    return damage


def modules(kind: str, path: str = "") -> Damage:
    return write("modules.json", [{"idx": 0, "name": "0", "path": path, "type": kind}])


def dense_of_a_pickle(folder: Path) -> None:
    modules("sentence_transformers.models.Dense", "1_Dense")(folder)
    (folder / "1_Dense").mkdir()
    torch.save({"x": torch.ones(1)}, folder / "1_Dense/pytorch_model.bin")


def dense_that_calls(folder: Path) -> None:
    modules("sentence_transformers.models.Dense", "1_Dense")(folder)
    write("1_Dense/config.json", {"activation_function": "os.getcwd"})(folder)


FORBIDDEN: dict[str, tuple[Damage, str]] = {
    "a class of its own": (modules("evil.Evil"), "modules.json names the class 'evil.Evil'; allowed: Transformer"),
    "a class of the library that loads others": (modules("sentence_transformers.models.Router"), "names the class"),
    "no list": (write("modules.json", {"type": "x"}), "must be a list of objects with the texts 'type' and 'path'"),
    "a path that leaves": (
        modules("sentence_transformers.models.Pooling", "../.."),
        "of a module leaves the folder",
    ),
    "a path of no system": (modules("sentence_transformers.models.Pooling", "a\0"), "of a module leaves the folder"),
    "a pickle": (dense_of_a_pickle, "1_Dense/pytorch_model.bin is a pickle, which can run code"),
    "a function as activation": (dense_that_calls, "activation_function 'os.getcwd' is none of torch.nn"),
    "an adapter of another model": (
        write("adapter_config.json", {"base_model_name_or_path": "someone/else"}),
        "adapter_config.json would load another model",
    ),
    "a kernel of the hub": (
        write("config.json", {"model_type": "bert", "attn_implementation": "someone/kernel"}),
        "attn_implementation 'someone/kernel' is code of somebody else's",
    ),
    "a pipe": (lambda folder: os.mkfifo(folder / "x.json"), "x.json is not a file"),
    "a link to nowhere": (lambda folder: (folder / "x").symlink_to("nowhere"), "x is not a file, or a link to nowhere"),
}


@pytest.mark.parametrize(("damage", "message"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_folder_that_would_run_or_fetch_something_is_refused(folder: Path, damage: Damage, message: str) -> None:
    check_folder(folder)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_embedder(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "model2vec", "planted"])
def test_code_that_lies_in_a_folder_never_runs(folder: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\nclass EvilConfig: pass\n"
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    map_of_code = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModel": "modeling_evil.Evil",
                   "AutoTokenizer": ["tokenization_evil.Evil", None]}  # fmt: skip
    write("config.json", {"model_type": kind, "auto_map": map_of_code})(folder)
    write("tokenizer_config.json", {"auto_map": map_of_code, "tokenizer_class": "Evil"})(folder)
    for planted in ("evil.Evil", "modeling_evil.Evil"):
        modules(planted)(folder)
        with pytest.raises(ModelError, match="names the class"):
            load_embedder(folder)
    (folder / "modules.json").unlink()
    if kind == "model2vec":
        load_embedder(folder)  # only its own files are read
    else:
        with pytest.raises(TreadleError):
            load_embedder(folder)
    assert not mark.exists()


def tensors(**changes: Any) -> Damage:
    """Change arrays of a static model."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in (load_file(file) | changes).items()}, file)

    return damage


def with_regex(folder: Path) -> None:
    """Cut words by an expression that backtracks without end; tokenizers stops it with a panic."""
    file = folder / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$b"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": split}))


def with_id(number: int) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "tokenizer.json"
        document = json.loads(file.read_text())
        document["model"]["vocab"]["add"] = number
        file.write_text(json.dumps(document))

    return damage


def array_of_objects(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as opened:
        np.save(opened, np.array([{}]), allow_pickle=True)


UNUSABLE: dict[str, tuple[Damage, str]] = {
    "NaN": (tensors(embeddings=np.full((220, 8), np.nan, np.float32)), ""),
    "mapping beyond the vectors": (tensors(mapping=np.arange(10_000)), "its mapping must hold one of"),
    "mapping of fractions": (tensors(mapping=np.ones(10_000, np.float32)), "its mapping must hold one of"),
    "weights of another number": (tensors(weights=np.ones(3, np.float32)), "its weights must be"),
    "an id beyond the vectors": (with_id(1_000_000), "its tokenizer has ids up to 1000000"),
    "an expression without end": (with_regex, "retry-limit-in-match over"),
    "a pickle in disguise": (lambda f: torch.save({"x": 1}, f / "model.safetensors"), "cannot be loaded"),
    "an array of objects": (array_of_objects, "cannot be loaded"),
}


@pytest.mark.parametrize(("damage", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_static_model_that_could_not_embed_is_refused_on_loading(
    folder: Path, damage: Damage, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=r"static embedder '.*' cannot be (loaded|used):") as caught:
        load_embedder(folder)
    assert message in str(caught.value)


def test_a_hub_id_in_a_bundle_takes_nothing_from_its_embedder_folder(folder: Path, monkeypatch: Any) -> None:
    asked: list[dict[str, Any]] = []

    class Library:
        def __init__(self, name: str, **options: Any) -> None:
            asked.append({"name": name, **options})
            raise OSError("offline")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", Library)
    shutil.copytree(folder, folder.parent / "other")
    with pytest.raises(ModelError, match="offline"):
        load_embedder("someone/embedder")
    (call,) = asked
    assert call["name"] == "someone/embedder"
    assert call["trust_remote_code"] is False
    assert call["model_kwargs"] == {"use_safetensors": True}
