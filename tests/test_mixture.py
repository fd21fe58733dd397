"""A fixed mixture in one adapter: real PEFT, with it alone, answers as treadle does with all of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from treadle.bundle.bundle import read_bundle
from treadle.common.errors import AdapterError, OptionError
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import attach
from treadle.lora.mixture import Mixture, mix, save_mixture
from treadle.lora.other_formats import save_gguf, save_mlx

from conftest import BASE, Run, byte_tokenizer, save_adapter, tiny_llama

IDS = torch.tensor([[5, 9, 77, 200, 31, 8]])
WEIGHTS = {"math": 0.7, "science": 0.0, "code": 1.3}


@torch.inference_mode()
def blended(adapters: dict[str, Path], weights: dict[str, float]) -> torch.Tensor:
    read = [read_adapter(folder, name) for name, folder in adapters.items()]
    blend = attach(tiny_llama(), read)
    with blend.using([weights.get(name, 0.0) for name in adapters]):
        return blend.model(IDS).logits


@torch.inference_mode()
def peft_logits(peft_model: Any, folder: Path) -> torch.Tensor:
    return peft_model({"one": folder})(IDS).logits


def test_peft_with_the_written_adapter_gives_the_same_logits(
    adapter_folders: dict[str, Path], peft_model: Any, tmp_path: Path
) -> None:
    """Adapters of unequal ranks and targets; one of them with rank-stabilised scale."""
    folders = {**adapter_folders, "law": save_adapter(tmp_path / "law", seed=7, r=5, use_rslora=True)}
    weights = {**WEIGHTS, "law": 0.4}
    mixture = mix([read_adapter(folder, name) for name, folder in folders.items()], weights)
    assert (mixture.error, mixture.worst) == (0, None)
    save_mixture(mixture, tmp_path / "one", BASE)
    expected = blended(folders, weights)
    base = blended(folders, {})
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(peft_logits(peft_model, tmp_path / "one"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(blended({"one": tmp_path / "one"}, {"one": 1.0}), expected, atol=1e-5, rtol=1e-5)
    ranks = {pair.rank for pair in read_adapter(tmp_path / "one").pairs.values()}
    assert ranks == {3, 12}  # science has no weight, and costs nothing


def test_a_smaller_rank_is_the_nearest_and_tells_its_error(
    adapter_folders: dict[str, Path], peft_model: Any, tmp_path: Path
) -> None:
    adapters = [read_adapter(folder, name) for name, folder in adapter_folders.items()]
    exact = mix(adapters, WEIGHTS)
    cut = mix(adapters, WEIGHTS, rank=2)
    assert all(pair.rank == 2 for pair in cut.pairs.values())
    updates = [{m: p.b.double() @ p.a.double() for m, p in each.pairs.items()} for each in (exact, cut)]
    off = {module: float((updates[0][module] - updates[1][module]).norm()) for module in exact.pairs}
    total = sum(float(each.norm()) ** 2 for each in updates[0].values()) ** 0.5
    assert cut.error == pytest.approx(sum(each**2 for each in off.values()) ** 0.5 / total, rel=1e-4)
    for module, update in updates[0].items():
        assert off[module] == pytest.approx(float(torch.linalg.svdvals(update)[2:].norm()), rel=1e-4)
    assert cut.worst is not None
    own = {module: off[module] / float(update.norm()) for module, update in updates[0].items()}
    assert cut.worst == (max(own, key=lambda module: own[module]), pytest.approx(max(own.values()), rel=1e-4))
    save_mixture(cut, tmp_path / "one", BASE)
    assert (peft_logits(peft_model, tmp_path / "one") - blended(adapter_folders, WEIGHTS)).abs().max() > 1e-3
    whole = mix(adapters, WEIGHTS, rank=7)  # the largest that there is
    assert (whole.error, whole.worst) == (0, None)
    assert mix(adapters, WEIGHTS, rank=5).error < cut.error
    save_mixture(whole, tmp_path / "whole", BASE)
    torch.testing.assert_close(
        peft_logits(peft_model, tmp_path / "whole"), blended(adapter_folders, WEIGHTS), atol=1e-5, rtol=1e-5
    )


def test_what_cannot_be_mixed_is_named(adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    adapters = [read_adapter(folder, name) for name, folder in adapter_folders.items()]
    with pytest.raises(AdapterError, match="Did you mean 'math'"):
        mix(adapters, {"maths": 1})
    for nothing in ({}, {"math": 0.0}):
        with pytest.raises(OptionError, match="no adapter has a weight"):
            mix(adapters, nothing)
    with pytest.raises(OptionError, match="rank must be at least 1"):
        mix(adapters, WEIGHTS, 0)
    dora = read_adapter(save_adapter(tmp_path / "dora", use_dora=True), "dora")
    pissa = replace(adapters[0], name="pissa", initial="pissa")
    head = replace(adapters[0], name="head", weights={"lm_head": tiny_llama().lm_head.weight})
    for more in (dora, pissa, head):
        with pytest.raises(AdapterError, match=f"{more.name}: a DoRA, IA3, PiSSA"):
            mix([*adapters, more], {"math": 1, more.name: 0.5})
    assert mix([*adapters, dora], {"math": 1}).pairs
    save_mixture(mix(adapters, WEIGHTS), tmp_path / "one", BASE)
    with pytest.raises(OptionError, match="holds an adapter already"):
        save_mixture(mix(adapters, WEIGHTS), tmp_path / "one", BASE)
    save_mixture(mix(adapters, {"math": 1}), tmp_path / "one", BASE, overwrite=True)
    assert {pair.rank for pair in read_adapter(tmp_path / "one").pairs.values()} == {4}


def test_the_command_writes_it(run: Run, bundle: Path, peft_model: Any, tmp_path: Path) -> None:
    code, out, err = run("export", bundle, "--fixed", "math=0.7,code=0.3", "-o", tmp_path / "one")
    assert code == 0, err
    assert f"wrote {tmp_path / 'one'}: 0.7 math, 0.3 code; 8 modules of rank 3, 7" in out
    assert "exact: the factors stand side by side" in out
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == read_bundle(bundle).base_model
    folders = {adapter.name: adapter.source for adapter in read_bundle(bundle).adapters}
    expected = blended(folders, {"math": 0.7, "code": 0.3})
    torch.testing.assert_close(peft_logits(peft_model, tmp_path / "one"), expected, atol=1e-5, rtol=1e-5)
    code, out, _ = run("export", bundle, "--fixed", "math=0.7,code=0.3", "-o", tmp_path / "two", "--rank", 2)
    assert code == 0
    assert "relative error of the update: " in out
    code, out, _ = run("export", bundle, "--fixed", "math=1", "-o", tmp_path / "three", "--rank", 8, "--json")
    assert json.loads(out)["error"] == 0
    code, _, err = run("export", bundle, "-o", tmp_path / "four")
    assert (code, "give --fixed name=weight pairs" in err) == (1, True)
    code, _, err = run("export", bundle, "--fixed", "maths=1", "-o", tmp_path / "four")
    assert (code, "Did you mean 'math'" in err) == (1, True)
    assert not (tmp_path / "four").exists()


def test_factors_of_an_embedding_are_refused(run: Run, tmp_path: Path) -> None:
    """PEFT keeps these under other names, and would leave out what it does not know."""
    tiny_llama().save_pretrained(tmp_path / BASE)
    byte_tokenizer().save_pretrained(tmp_path / BASE)
    words = save_adapter(tmp_path / "words", target_modules=["embed_tokens", "q_proj"])
    given = ["--base", tmp_path / BASE, "--adapter", f"words={words}", "--fixed", "words=1", "-o", tmp_path / "out"]
    code, _, err = run("export", *given)
    assert code == 1
    assert "these modules of the base are none:\n  - model.embed_tokens" in err
    assert not (tmp_path / "out").exists()


# Other formats


def updates_of(folders: dict[str, Path], weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The whole update (out, in) of each module, added up adapter by adapter."""
    sums: dict[str, torch.Tensor] = {}
    for name, folder in folders.items():
        for module, pair in read_adapter(folder, name).pairs.items():
            own = weights.get(name, 0.0) * pair.scale * (pair.b @ pair.a)
            sums[module] = sums.get(module, 0) + own
    return {module: each for module, each in sums.items() if each.any()}


def test_gguf_holds_the_update_in_the_order_of_llama_cpp(adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    """Rows of queries and keys are put back by transformers' own reader of GGUF files."""
    gguf = pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    config = tiny_llama().config
    save_gguf(mix([read_adapter(f, n) for n, f in adapter_folders.items()], WEIGHTS), tmp_path, config)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    text = {key: reader.get_field(key).contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert text == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {each.name: torch.tensor(each.data) for each in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    back = LlamaTensorProcessor({})._reverse_permute_weights
    expected = updates_of(adapter_folders, WEIGHTS)
    assert len(tensors) == 2 * len(expected)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for module, update in expected.items():
        name = names.get_name(f"{module}.weight", (".weight",))
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        whole = alpha / a.shape[0] * (b @ a)  # as llama.cpp scales it
        kind = module.rpartition(".")[2]
        if kind in heads:
            assert not torch.allclose(whole, update, atol=1e-5)
            whole = torch.tensor(back(whole.numpy(), heads[kind], heads[kind]))
        torch.testing.assert_close(whole, update, atol=1e-5, rtol=1e-4)


def test_mlx_holds_the_update(adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    save_mlx(mix([read_adapter(f, n) for n, f in adapter_folders.items()], WEIGHTS), tmp_path, tiny_llama().config)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"], parameters["rank"]) == ("lora", 2, 7)
    assert parameters["keys"] == ["mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.v_proj"]
    tensors = load_file(tmp_path / "adapters.safetensors")
    for module, update in updates_of(adapter_folders, WEIGHTS).items():
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert (a.shape[1], b.shape[0]) == (7, 7)
        torch.testing.assert_close(parameters["scale"] * (a @ b).T, update, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(  # and our own reader of such folders agrees
        blended({"one": tmp_path}, {"one": 1.0}), blended(adapter_folders, WEIGHTS), atol=1e-5, rtol=1e-5
    )


def test_other_formats_refuse_what_they_have_no_place_for(
    adapter_folders: dict[str, Path], tmp_path: Path, run: Run, bundle: Path
) -> None:
    mixture = mix([read_adapter(f, n) for n, f in adapter_folders.items()], WEIGHTS)
    config = tiny_llama().config
    outside = Mixture({"lm_head": next(iter(mixture.pairs.values()))})
    with pytest.raises(OptionError, match="these are none:\n  - lm_head"):
        save_mlx(outside, tmp_path, config)
    with pytest.raises(OptionError, match="no name for these modules of the base:\n  - odd"):
        save_gguf(Mixture({"odd": outside.pairs["lm_head"]}), tmp_path, config)
    config.model_type = "odd"
    with pytest.raises(OptionError, match="a base of type 'odd' is not known; known are llama"):
        save_gguf(mixture, tmp_path, config)
    given = ["export", bundle, "--fixed", "math=1", "-o", tmp_path / "out"]
    for form, file in (("gguf", "adapter.gguf"), ("mlx", "adapters.safetensors")):
        code, _, err = run(*given, "--format", form)
        assert code == 0, err
        assert (tmp_path / "out" / file).is_file()
        code, _, err = run(*given, "--format", form)
        assert (code, "exists already" in err) == (1, True)
        assert run(*given, "--format", form, "--overwrite")[0] == 0
    code, _, err = run(*given, "--format", "gguff")
    assert (code, "Did you mean 'gguf'" in err) == (1, True)
