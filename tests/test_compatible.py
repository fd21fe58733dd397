"""Adapters as PEFT writes them: with the head's own weight beside the factors, and with names of old releases."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle.common.errors import AdapterError, AdapterWarning
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import attach

from conftest import TINY, edit_config, save_adapter

IDS = torch.tensor([[5, 17, 40]])
SHAPES = {"A": (4, 32), "B": (32, 4)}
FILE = "adapter_model.safetensors"
HEAD = "base_model.model.lm_head.base_layer.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"


def llama(*, tied: bool = False) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, initializer_range=0.3, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE)


def with_weights(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter on the head, and whole weights beside it as PEFT saves them by default."""
    model = llama(tied=tied)
    save_adapter(folder, model, seed=1, target_modules=["q_proj", "lm_head"])
    weights = {HEAD: model.lm_head.weight, EMBEDDING: model.model.embed_tokens.weight}
    edit(folder, lambda t: t | {key: weight.detach().to(dtype).clone() for key, weight in weights.items()})
    return folder


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_is_blended_as_peft_loads_it(tmp_path: Path, tied: bool) -> None:
    folder = with_weights(tmp_path / "one", tied=tied)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(llama(tied=tied), folder).eval()(IDS).logits
    model = llama(tied=tied)
    blend = attach(model, [read_adapter(folder)])
    with torch.no_grad(), blend.using([1.0]):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)
    assert not blend.adapters[0].weights  # compared, and not held


def test_weights_of_another_dtype_are_the_base_s_own_if_they_round_to_them(tmp_path: Path) -> None:
    coarse, fine = with_weights(tmp_path / "one", dtype=torch.bfloat16), with_weights(tmp_path / "two")
    assert attach(llama(), [read_adapter(coarse)]).names == ("one",)
    assert attach(llama().to(torch.bfloat16), [read_adapter(fine)]).names == ("two",)


def test_weights_that_are_not_the_base_s_are_refused_by_name_all_at_once(tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "one")
    norm = "base_model.model.model.norm.weight"
    edit(folder, lambda t: t | {HEAD: t[HEAD][:, :31].clone(), EMBEDDING: torch.ones(270, 32)})
    with pytest.raises(AdapterError) as caught:
        attach(llama(), [read_adapter(folder)])
    text = str(caught.value)
    assert "one: it replaces lm_head.weight of shape (260, 32) by one of (260, 31)" in text
    assert "model.embed_tokens.weight of shape (260, 32) by one of (270, 32) whose rows differ, too" in text
    edit(folder, lambda t: t | {norm: torch.ones(32)})
    with pytest.raises(AdapterError, match=rf"{norm}: a whole weight that is no matrix \(modules_to_save\)"):
        read_adapter(folder)


def test_weights_that_rows_read_follow_them_on_the_head_too(tmp_path: Path) -> None:
    """The head reads the last tokens only; weights of all tokens are there."""
    model = llama()
    blend = attach(model, [read_adapter(with_weights(tmp_path / "one"))])
    weights = torch.rand(2, 3, 1)
    ids = torch.tensor([[5, 17, 40], [9, 8, 7]])
    with torch.no_grad(), blend.using(weights):
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, 1:], atol=1e-5, rtol=0)


def gemma() -> transformers.Gemma3ForConditionalGeneration:
    """A tiny Gemma 3 that reads images too: its layers had other names before transformers 4.52."""
    torch.manual_seed(0)
    types = {"layer_types": ["full_attention"], "num_hidden_layers": 1, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=TINY | types | {"initializer_range": 0.3},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of the vision tower: PEFT's are zero there
def test_old_names_of_layers_are_found_as_peft_finds_them(tmp_path: Path) -> None:
    targets = r".*language_model.*(q_proj|v_proj)"
    folder = save_adapter(tmp_path / "one", gemma(), seed=1, target_modules=targets)
    today, old = "model.language_model.layers", "language_model.model.layers"
    edit(folder, lambda t: {key.replace(today, old): tensor for key, tensor in t.items()})
    edit_config(folder, target_modules=["q_proj", "v_proj"])  # names that the vision tower has too
    model = gemma()
    with torch.no_grad():
        base, expected = model(IDS).logits, PeftModel.from_pretrained(gemma(), folder).eval()(IDS).logits
    assert (expected - base).abs().max() > 0.01
    blend = attach(model, [read_adapter(folder)])
    with torch.no_grad(), blend.using([1.0]):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)
    (name,) = {path.rpartition(".layers")[0] for path in blend.adapters[0].pairs}
    assert name == "model.language_model"


def test_problems_of_many_layers_are_one_line_with_their_number(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", llama(), seed=1, target_modules=["q_proj", "v_proj"])
    factors = load_file(folder / FILE)
    experts = {
        key.replace("self_attn", f"experts.{index}"): tensor.clone()
        for key, tensor in factors.items()
        for index in range(8)
    }
    save_file(experts, folder / FILE)
    with pytest.raises(AdapterError) as caught:
        attach(llama(), [read_adapter(folder)])
    head, *lines = str(caught.value).splitlines()
    assert head == "the adapters do not fit the model; name the base that they were trained on, or leave them out:"
    assert [line.strip() for line in lines] == [
        f"- one: the model has no module model.layers.0.experts.0.{name} (and 15 more like it)"
        for name in ("q_proj", "v_proj")
    ]


def test_a_part_that_the_model_lacks_is_a_warning_that_lists_it_and_the_rest_acts(tmp_path: Path) -> None:
    """An adapter of a model that reads images, on its text model."""
    folder = save_adapter(tmp_path / "one", llama(), seed=1)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(llama(), folder).eval()(IDS).logits
    tower = "model.vision_tower.encoder.layers"
    factors = load_file(folder / FILE)
    images = {key.replace("model.layers", tower): tensor.clone() for key, tensor in factors.items()}
    language = {key.replace("model.layers", "model.language_model.layers"): each for key, each in factors.items()}
    save_file(language | images, folder / FILE)
    model = llama()
    with pytest.warns(AdapterWarning) as caught:
        blend = attach(model, [read_adapter(folder)])
    assert str(caught[0].message).splitlines() == [
        "the model lacks some modules of adapters, which act without them:",
        f"  - one: {tower}.0.self_attn.q_proj (and 1 more like it)",
        f"  - one: {tower}.0.self_attn.v_proj (and 1 more like it)",
    ]
    with torch.no_grad(), blend.using([1.0]):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)
    blend.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)  # strict
        with pytest.raises(AdapterError, match="the model lacks some modules"):
            attach(model, [read_adapter(folder)])
    assert not any(hasattr(module, "b_all") for module in model.modules())


@pytest.mark.parametrize("prefix", ["model.layers", "language_model.model.layers", "model.text_model.layers"])
def test_an_adapter_of_the_text_model_acts_on_the_language_part_of_one_with_images(tmp_path: Path, prefix: str) -> None:
    folder = save_adapter(tmp_path / "one", gemma(), seed=1, target_modules=r".*language_model.*(q_proj|v_proj)")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(gemma(), folder).eval()(IDS).logits
    edit(folder, lambda t: {key.replace("model.language_model.layers", prefix): each for key, each in t.items()})
    model = gemma()
    with torch.no_grad(), attach(model, [read_adapter(folder)]).using([1.0]):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)


def test_names_that_no_release_had_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", llama(), seed=1)
    edit(folder, lambda t: {key.replace("layers", "blocks"): tensor for key, tensor in t.items()})
    with pytest.raises(AdapterError, match=r"no module model.blocks.0.self_attn.q_proj \(and 1 more like it\)"):
        attach(llama(), [read_adapter(folder)])
