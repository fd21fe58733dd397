"""Adapters whose training began from a part of the base's own weight: PEFT repeats that on loading, and we blend it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_vectors import assert_close, gpt2, llama, logits
from torch import Tensor
from transformers import PreTrainedModel

from treadle.bundle.bundle import save_bundle
from treadle.common.errors import AdapterError, BundleError
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import attach
from treadle.routing.router import Router
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams

from conftest import BASE, edit_config, save_adapter

Build = Callable[[], PreTrainedModel]
ON_LLAMA = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
ON_GPT2 = {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
PATTERNS = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}}
KINDS: dict[str, tuple[Build, LoraConfig]] = {
    "PiSSA": (llama, LoraConfig(**ON_LLAMA, init_lora_weights="pissa")),
    "PiSSA with rsLoRA and patterns": (llama, LoraConfig(**ON_LLAMA, **PATTERNS, init_lora_weights="pissa")),
    "PiSSA on Conv1D": (gpt2, LoraConfig(**ON_GPT2, init_lora_weights="pissa")),
    "PiSSA with DoRA": (llama, LoraConfig(**ON_LLAMA, init_lora_weights="pissa", use_dora=True)),
    "OLoRA": (llama, LoraConfig(**ON_LLAMA, init_lora_weights="olora")),
    "OLoRA with rsLoRA and patterns": (llama, LoraConfig(**ON_LLAMA, **PATTERNS, init_lora_weights="olora")),
}


def save(folder: Path, build: Build, config: LoraConfig) -> Path:
    """Write an adapter through PEFT, moved from where its training began."""
    wrapped = get_peft_model(build(), config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def by_peft(folder: Path, build: Build) -> Tensor:
    return logits(PeftModel.from_pretrained(build(), folder).eval())


@pytest.mark.parametrize(("build", "config"), KINDS.values(), ids=KINDS)
def test_one_hot_is_that_peft_adapter_and_the_base_stays_bit_for_bit(
    tmp_path: Path, build: Build, config: LoraConfig
) -> None:
    folder = save(tmp_path / "one", build, config)
    plain = save_adapter(tmp_path / "plain", build(), seed=2, r=2, target_modules=config.target_modules, lora_alpha=1)
    model = build()
    base, adapters = logits(model), [read_adapter(plain), read_adapter(folder)]
    blend = attach(model, adapters)
    assert blend.has_vectors == config.use_dora  # else our own steps add the factors
    with blend.using([[0.0, 1.0], [1.0, 0.0]]):
        rows = logits(model)
    assert (rows[0] - base[0]).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    assert_close(rows[0], by_peft(folder, build)[0])
    assert_close(rows[1], by_peft(plain, build)[1])
    with blend.using([0.0, 0.0]):
        assert torch.equal(logits(model), base)
    blend.remove("plain")
    with blend.using([1.0]):
        assert_close(logits(model)[0], rows[0])  # the initial factors are taken out once
    blend.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("init", ["eva", "lora_ga", "gaussian", "orthogonal", "mica", True, False], ids=str)
def test_what_peft_reloads_as_plain_lora_is_plain_lora(tmp_path: Path, init: str | bool) -> None:
    folder = save_adapter(tmp_path / "one", llama(), seed=1, lora_alpha=2)
    edit_config(folder, init_lora_weights=init)
    model = llama()
    with attach(model, [read_adapter(folder)]).using([1.0]):
        assert_close(logits(model), by_peft(folder, llama))


def test_olora_on_conv1d_is_refused_as_peft_s_factors_do_not_fit(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", gpt2(), **ON_GPT2)
    edit_config(folder, init_lora_weights="olora")
    with pytest.raises(AdapterError, match=r"h.0.attn.c_attn: olora is known for Linear layers alone.*and 1 more like"):
        attach(gpt2(), [read_adapter(folder)])


def test_a_quantised_base_is_refused_because_training_began_with_another_weight(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    folder = save(tmp_path / "one", *KINDS["PiSSA"])
    model = llama()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(AdapterError, match=r"q_proj: pissa needs the weight that training began with, and this one is"):
        attach(model, [read_adapter(folder)])


def test_the_vllm_plugin_refuses_it_by_name(tmp_path: Path, adapter_folders: dict[str, Path], router: Router) -> None:
    folder = save(tmp_path / "one", *KINDS["PiSSA"])
    bundle = save_bundle(tmp_path / "mixed", base=BASE, adapters=adapter_folders | {"code": folder}, router=router)
    with pytest.raises(BundleError, match=r"adapter 'code' began from a part of the base's weights \(pissa\)"):
        open_bundle(PluginParams(bundle=str(bundle)))


def test_the_identity_knows_how_training_began(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", llama(), seed=1)
    plain = read_adapter(folder).identity
    edit_config(folder, init_lora_weights="pissa")
    assert read_adapter(folder).identity != plain
