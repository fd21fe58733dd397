"""Folders of mlx-lm, made from PEFT's: they are blended as PEFT loads those. The names are those of mlx_lm/tuner."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_vectors import assert_close, llama, logits
from torch import Tensor
from transformers import PreTrainedModel

from treadle.bundle.adapter_places import adapters_below
from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.common.errors import AdapterError, AdapterWarning
from treadle.lora.adapter import files_of, read_adapter
from treadle.lora.blend import attach
from treadle.routing.router import Router

from conftest import BASE, save_adapter

Tensors = dict[str, Tensor]
RANK, ALPHA = 4, 2
PARTS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
Q = "model.layers.0.self_attn.q_proj"


def peft_folder(folder: Path, **config: object) -> Path:
    return save_adapter(
        folder, llama(), seed=1, r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], **config
    )


def as_mlx(
    peft: Path, folder: Path, *, npz: bool = False, edit: Callable[[Tensors], Tensors] = dict, **config: Any
) -> Path:
    """Write what mlx-lm would have written of a PEFT adapter; `config` None = its first releases, which wrote none."""
    tensors: Tensors = {}
    for key, tensor in load_file(peft / "adapter_model.safetensors").items():
        module, part = re.fullmatch(rf"base_model\.model\.(.+)\.({'|'.join(PARTS)})", key).groups()
        tensors[f"{module}.{PARTS[part]}"] = tensor.t().contiguous() if tensor.dim() == 2 else tensor
    folder.mkdir()
    tensors = edit(tensors)
    if npz:
        np.savez(folder / "adapters.npz", **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    kind = "dora" if any(key.endswith(".m") for key in tensors) else "lora"
    written = {
        "model": "mlx-community/tiny-llama-4bit",
        "fine_tune_type": kind,
        "num_layers": 16,
        "lora_parameters": {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    }
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    return folder


def blended(folder: Path, model: PreTrainedModel | None = None) -> Tensor:
    model = model or llama()
    base = logits(model)
    with attach(model, [read_adapter(folder)]).using([1.0]):
        ours = logits(model)
    assert (ours - base).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    return ours


def by_peft(folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(llama(), folder).eval())


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("npz", [False, True], ids=["safetensors", "npz"])
def test_an_mlx_folder_is_blended_as_peft_loads_the_same_adapter(tmp_path: Path, use_dora: bool, npz: bool) -> None:
    peft = peft_folder(tmp_path / "peft", use_dora=use_dora)
    folder = as_mlx(peft, tmp_path / "one", npz=npz)
    assert_close(blended(folder), by_peft(peft))
    adapter = read_adapter(folder)
    assert (adapter.name, adapter.base_model) == ("one", "mlx-community/tiny-llama-4bit")


def test_some_layers_of_an_older_config_with_the_default_scale_of_twenty(tmp_path: Path) -> None:
    """`lora_layers` was the name of `num_layers`: the last layers have tensors. The first releases had no config."""
    peft = peft_folder(tmp_path / "peft", layers_to_transform=[1])

    def smaller(tensors: Tensors) -> Tensors:
        return {key: each * (ALPHA / RANK / 20) if "lora_b" in key else each for key, each in tensors.items()}

    folder = as_mlx(peft, tmp_path / "one", npz=True, edit=smaller, lora_layers=1, lora_parameters={"rank": RANK})
    for remove in (False, True):
        if remove:
            (folder / "adapter_config.json").unlink()
        with pytest.warns(
            AdapterWarning, match="adapter 'one': its config has no scale; mlx-lm's default is taken: 20"
        ):
            adapter = read_adapter(folder)
        model = llama()
        with attach(model, [adapter]).using([1.0]):
            assert_close(logits(model), by_peft(peft))


def test_an_mlx_adapter_shares_a_batch_and_a_bundle_with_peft_s(
    tmp_path: Path, adapter_folders: dict[str, Path], router: Router
) -> None:
    peft = peft_folder(tmp_path / "peft", use_dora=True)
    one = as_mlx(peft, tmp_path / "one", model=BASE)
    assert [file.name for file in files_of(one)] == ["adapter_config.json", "adapters.safetensors"]
    bundle = save_bundle(tmp_path / "bundle", base=BASE, adapters=adapter_folders | {"code": one}, router=router)
    adapters = read_bundle(bundle).adapters
    assert [adapter.identity for adapter in adapters if adapter.name == "code"] == [read_adapter(one).identity]
    model = llama()
    weights = torch.tensor([[float(adapter.name == name) for adapter in adapters] for name in ("math", "code")])
    with attach(model, adapters).using(weights):
        rows = logits(model)
    assert_close(rows[1], by_peft(peft)[1])
    assert_close(rows[0], by_peft(adapter_folders["math"])[0])


def test_folders_of_mlx_are_found_beside_those_of_peft(tmp_path: Path) -> None:
    peft = peft_folder(tmp_path / "shelf" / "peft")
    as_mlx(peft, tmp_path / "shelf" / "old", npz=True)
    (tmp_path / "shelf" / "old" / "adapter_config.json").unlink()
    as_mlx(peft, tmp_path / "shelf" / "new")
    assert list(adapters_below(tmp_path / "shelf")[0]) == ["new", "old", "peft"]


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in keys}


A, B = f"{Q}.lora_a", f"{Q}.lora_b"
SCALES = {"rank": RANK, "scale": 10.0, "alpha": 16.0, "dropout": 0.0}
DAMAGED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "no lora_b": (without(B), {}, f"{Q}: lora_b is missing"),
    "no magnitude": (dict, {"fine_tune_type": "dora"}, f"{Q}: m is missing"),
    "a magnitude without DoRA": (
        lambda t: t | {f"{Q}.m": torch.ones(32)},
        {"fine_tune_type": "lora"},
        f"{Q}: it has a m",
    ),
    "ranks": (
        lambda t: t | {B: t[B][:2].clone()},
        {},
        f"{Q}: lora_a (32, 4) and lora_b (2, 32) do not fit: need (in, r)",
    ),
    "experts": (
        lambda t: t | {A: torch.ones(3, 4, 32), B: torch.ones(3, 32, 4)},
        {},
        f"{Q}: lora_a (3, 4, 32) and lora_b",
    ),
    "foreign": (
        lambda t: t | {f"{Q}.linear.weight": torch.ones(32, 32)},
        {},
        f"{Q}.linear.weight: not lora_a, lora_b or m",
    ),
    "NaN": (lambda t: t | {A: t[A] / 0 * 0}, {}, f"{A} holds NaN or infinite values"),
    "integers": (lambda t: t | {A: t[A].int()}, {}, f"{A} is torch.int32; factors are"),
    "zero": (lambda t: {k: x * 0 if "lora_b" in k else x for k, x in t.items()}, {}, "all its B factors are zero"),
    "empty": (lambda _: {}, {}, "it holds no factors"),
    "alpha beside scale": (dict, {"lora_parameters": SCALES}, "lora_parameters has alpha=16.0: old releases of mlx-lm"),
    "scale of zero": (
        dict,
        {"lora_parameters": {"scale": 0}},
        "lora_parameters: scale must be a positive number, not 0",
    ),
    "scale of text": (dict, {"lora_parameters": {"scale": "2"}}, "lora_parameters: scale must be a positive number"),
    "parameters a list": (dict, {"lora_parameters": [1]}, "lora_parameters must be an object, not [1]"),
}


@pytest.mark.parametrize(("edit", "config", "message"), DAMAGED.values(), ids=DAMAGED)
def test_one_fault_is_one_problem(
    tmp_path: Path, edit: Callable[[Tensors], Tensors], config: dict[str, Any], message: str
) -> None:
    single = save_adapter(tmp_path / "peft", llama(), r=RANK, target_modules=["layers.0.self_attn.q_proj"])
    folder = as_mlx(single, tmp_path / "one", edit=edit, **config)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    head, *problems = str(caught.value).splitlines()
    assert head == f"adapter 'one' ({folder}) cannot be blended:"
    assert len(problems) == 1
    assert problems[0].startswith(f"  - {message}")


def test_an_alpha_equal_to_the_rank_is_no_question(tmp_path: Path) -> None:
    peft = peft_folder(tmp_path / "peft")
    same = {"rank": RANK, "scale": ALPHA / RANK, "alpha": RANK}
    assert_close(blended(as_mlx(peft, tmp_path / "one", lora_parameters=same)), by_peft(peft))


def pickled(file: Path) -> None:
    np.savez(file, **{A: np.array([{"a": 1}], object)})


def bomb(file: Path) -> None:
    np.savez_compressed(file, **{A: np.zeros((2000, 2000), np.float32)})


def renamed_text(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{A}.npy", "no array")


def half_of_it(file: Path) -> None:
    np.savez(file, **{A: np.ones((32, 4), np.float32)})
    file.write_bytes(file.read_bytes()[:200])


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle inside": (pickled, "adapters.npz cannot be read: "),
    "a bomb": (bomb, "adapters.npz cannot be read: it holds 16000"),
    "no archive": (lambda file: file.write_bytes(b"x" * 100), "adapters.npz cannot be read: "),
    "no array": (renamed_text, "is no array; save it as safetensors"),
    "truncated": (half_of_it, "adapters.npz cannot be read: "),
    "complex numbers": (
        lambda file: np.savez(file, a=np.ones(2, complex)),
        "'a' is complex128; save it as safetensors",
    ),
}


@pytest.mark.parametrize(("write", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_archive_is_refused_with_the_file_and_the_reason(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    write(folder / "adapters.npz")
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        read_adapter(folder)
    assert str(caught.value).startswith("adapter 'one': ")


@pytest.mark.parametrize(
    ("config", "message"),
    [({"fine_tune_type": "full"}, "its fine_tune_type is full"), ({"model": 3}, "model must be a text, not 3")],
    ids=str,
)
def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter(as_mlx(peft_folder(tmp_path / "peft"), tmp_path / "one", **config))
