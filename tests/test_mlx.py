"""Folders of mlx-lm, made from PEFT's: they are blended as PEFT loads those. The names are those of mlx_lm/tuner."""

import json
import re
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
from treadle.common.errors import AdapterWarning
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


def test_an_alpha_equal_to_the_rank_is_no_question(tmp_path: Path) -> None:
    peft = peft_folder(tmp_path / "peft")
    same = {"rank": RANK, "scale": ALPHA / RANK, "alpha": RANK}
    assert_close(blended(as_mlx(peft, tmp_path / "one", lora_parameters=same)), by_peft(peft))
