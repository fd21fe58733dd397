"""Bases that transformers' loaders read in four or eight bits: adapters act as in PEFT, and the engine runs them.

These loaders need packages that the locked environment lacks (gptqmodel wants a newer PyTorch). In a copy of it:

    pip install --upgrade setuptools
    pip install --no-deps --no-build-isolation gptqmodel optimum bitsandbytes pypcre tokenicer device-smi logbar defuser
    python -m pytest tests/test_quantised_loaders.py
"""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.blend import attach
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit

from conftest import SAMPLES, TINY, save_adapter

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""Kernels of four bits want multiples of their groups."""
GROUP, ZERO = 64, 8
"""Inputs that share a scale; the integer that stands for 0."""
IDS = torch.arange(3, 40)[None]
PACKED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
LOADED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def plain() -> LlamaForCausalLM:
    """The tiny Llama, the same every time, unquantised."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY | SIZES)).eval()


def packed(numbers: Tensor, dim: int, kind: str) -> Tensor:
    """Pack eight numbers of four bits each into an int32, along a dimension, in the order of the format."""
    order = range(8) if kind == "gptq" else (0, 2, 4, 6, 1, 3, 5, 7)
    eights = numbers.movedim(dim, -1).unflatten(-1, (-1, 8)).long()
    words = sum((eights[..., place] << (4 * index) for index, place in enumerate(order)), torch.zeros(()).long())
    return torch.where(words >= 2**31, words - 2**32, words).int().movedim(-1, dim).contiguous()


def save_packed(folder: Path, kind: str) -> LlamaForCausalLM:
    """Write the tiny Llama as GPTQ or AWQ files; return it with the weights that these stand for."""
    model = plain()
    state, stored = model.state_dict(), {}
    for name, weight in state.items():
        if not name.endswith("proj.weight"):
            stored[name] = weight.half()
            continue
        groups = weight.unflatten(1, (-1, GROUP))  # (out, in / GROUP, GROUP)
        scales = (groups.abs().amax(-1) / 7).half().float()
        numbers = (groups / scales[..., None]).round().clamp(-ZERO, 7) + ZERO
        state[name] = ((numbers - ZERO) * scales[..., None]).flatten(1)
        by_input, zeros = numbers.flatten(1).T, torch.full(scales.T.shape, ZERO)
        path = name.removesuffix("weight")
        if kind == "gptq":  # its first format stores zeros less one
            stored[f"{path}qzeros"] = packed(zeros - 1, 1, kind)
            stored[f"{path}g_idx"] = (torch.arange(weight.shape[1]) // GROUP).int()
        else:
            stored[f"{path}qzeros"] = packed(zeros, 1, kind)
        stored[f"{path}qweight"] = packed(by_input, 0 if kind == "gptq" else 1, kind)
        stored[f"{path}scales"] = scales.T.half().contiguous()
    config = copy.deepcopy(model.config)
    config.architectures, config.quantization_config = ["LlamaForCausalLM"], PACKED[kind]
    config.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    model.load_state_dict(state)
    return model


def load(folder: Path, **options: object) -> PreTrainedModel:
    """Let transformers read a folder in float32, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options).eval()


@torch.inference_mode()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "v_proj", "down_proj"]
    return [
        read_adapter(save_adapter(folder / name, plain(), seed, r=4, target_modules=targets))
        for seed, name in enumerate(SAMPLES)
    ]


@pytest.mark.parametrize("kind", PACKED)
def test_on_gptq_and_awq_one_hot_is_that_peft_adapter_on_the_weights_they_stand_for(
    tmp_path: Path, adapters: list[Adapter], kind: str
) -> None:
    pytest.importorskip("gptqmodel", reason="see the head of this file")
    real = save_packed(tmp_path, kind)
    model = load(tmp_path)
    assert "Linear" in type(model.model.layers[0].self_attn.q_proj).__name__
    assert type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    base = logits(model)
    torch.testing.assert_close(base, logits(real), atol=2e-3, rtol=0)  # its kernel keeps scales in half precision
    blend = attach(model, adapters)
    for index, adapter in enumerate(adapters):
        peft = PeftModel.from_pretrained(copy.deepcopy(real), adapter.source).eval()
        with blend.using([float(index == each) for each in range(len(adapters))]):
            torch.testing.assert_close(logits(model), logits(peft), atol=5e-3, rtol=0)
            assert (logits(model) - base).abs().max() > 0.1
    blend.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", LOADED)
def test_on_bitsandbytes_one_hot_is_that_peft_adapter(tmp_path: Path, adapters: list[Adapter], kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="see the head of this file")
    plain().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=LOADED[kind])
    base = logits(model)
    assert not torch.equal(base, logits(plain()))
    blend = attach(model, adapters)
    for index, adapter in enumerate(adapters):
        peft = PeftModel.from_pretrained(load(tmp_path, quantization_config=LOADED[kind]), adapter.source).eval()
        with blend.using([float(index == each) for each in range(len(adapters))]):
            # its kernels round what they read to half precision, and a last bit may fall to either side
            torch.testing.assert_close(logits(model), logits(peft), atol=1e-2, rtol=0)
            assert (logits(model) - base).abs().max() > 0.1


@pytest.mark.parametrize("kind", [*PACKED, "nf4"])
def test_the_engine_writes_what_transformers_writes_with_that_adapter(
    tmp_path: Path, adapters: list[Adapter], kind: str, tokenizer: Tokenizer, embedder: StaticEmbedder
) -> None:
    options = {}
    if kind in PACKED:
        pytest.importorskip("gptqmodel", reason="see the head of this file")
        save_packed(tmp_path, kind)
    else:
        pytest.importorskip("bitsandbytes", reason="see the head of this file")
        plain().save_pretrained(tmp_path)
        options = {"quantization_config": LOADED[kind]}
    engine = Engine(load(tmp_path, **options), tokenizer, adapters, fit(SAMPLES, embedder))
    blend = attach(reference := load(tmp_path, **options), adapters)
    prompts = [IDS[0, :9].tolist(), IDS[0, 5:].tolist(), IDS[0, 2:20].tolist()]
    routings = [RoutingParams.one(adapter.name) for adapter in adapters]
    done = engine.generate_ids(prompts, sampling=SamplingParams(max_tokens=8), routing=routings)
    for index, (ids, each) in enumerate(zip(prompts, done, strict=True)):
        with blend.using([float(index == other) for other in range(len(adapters))]), torch.inference_mode():
            text = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=None)
        assert list(each.token_ids) == text[0, len(ids) :].tolist()
