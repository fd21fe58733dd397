"""Embeddings, the head and whole saved modules are blended as PEFT loads them, and mixed by their differences."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_vectors import Attach, assert_close, calm, gpt2, llama, logits
from torch import Tensor
from transformers import PreTrainedModel

from treadle.common.errors import AdapterError, AdapterWarning
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.tokenization import prompt_ids
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import attach as attach_few
from treadle.routing.fitting import fit

from conftest import BASE, SAMPLES, TINY, save_adapter

Build = Callable[[], PreTrainedModel]
FILE = "adapter_model.safetensors"
HEAD, EMBEDDING = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


@pytest.fixture(params={"all active": 128, "needed active": 0}.items(), ids=lambda param: param[0])
def attach(request: pytest.FixtureRequest) -> Attach:
    return partial(attach_few, always_active_rows=request.param[1])


def tied() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, initializer_range=0.12, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def gemma() -> PreTrainedModel:
    """Its embedding multiplies the vectors."""
    torch.manual_seed(0)
    sizes = {"query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2, "initializer_range": 0.12}
    return calm(transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TINY, **sizes)).eval())


LORA = {"r": 4, "lora_alpha": 2}
ON_GPT2 = {**LORA, "fan_in_fan_out": True}
EMBED = ["q_proj", "embed_tokens"]
KINDS: dict[str, tuple[Build, LoraConfig]] = {
    "embedding": (llama, LoraConfig(**LORA, target_modules=EMBED)),
    "embedding and head": (llama, LoraConfig(**LORA, target_modules=[*EMBED, "lm_head"])),
    "tied embedding": (tied, LoraConfig(**LORA, target_modules=EMBED)),
    "scaled embedding": (gemma, LoraConfig(**LORA, target_modules=EMBED)),
    "embedding of GPT-2": (gpt2, LoraConfig(**ON_GPT2, target_modules=["c_attn", "wte"])),
    "saved head": (llama, LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "saved embedding": (llama, LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "both saved": (llama, LoraConfig(**LORA, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "saved linear layers": (llama, LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["up_proj"])),
    "saved tied head": (tied, LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"])),
}


def save(folder: Path, build: Build, config: LoraConfig, seed: int = 1) -> Path:
    """Write an adapter through PEFT, everything that was trained moved."""
    wrapped = get_peft_model(build(), config)
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder)
    return folder


def by_peft(folder: Path, build: Build) -> Tensor:
    return logits(PeftModel.from_pretrained(build(), folder).eval())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({key: each.contiguous() for key, each in change(load_file(folder / FILE)).items()}, folder / FILE)


@pytest.mark.parametrize(("build", "config"), KINDS.values(), ids=KINDS)
def test_one_hot_is_that_peft_adapter_row_by_row_and_the_base_stays_bit_for_bit(
    tmp_path: Path, build: Build, config: LoraConfig, attach: Attach
) -> None:
    folder, other = save(tmp_path / "one", build, config), save(tmp_path / "two", build, config, seed=2)
    model = build()
    base, modules = logits(model), list(model.modules())
    blend = attach(model, [read_adapter(other), read_adapter(folder)])
    with blend.using([[0.0, 1.0], [1.0, 0.0]]):
        rows = logits(model)
    assert (rows[0] - base[0]).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    assert_close(rows[0], by_peft(folder, build)[0])
    assert_close(rows[1], by_peft(other, build)[1])
    with blend.using([[0.0, 0.0], [0.3, 0.0]]):
        assert torch.equal(logits(model)[0], base[0])
    blend.detach()
    assert torch.equal(logits(model), base)
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))


def test_saved_heads_are_mixed_by_their_differences(tmp_path: Path, attach: Attach) -> None:
    config = LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"])
    folders = [save(tmp_path / str(seed), llama, config, seed) for seed in (1, 2)]
    for folder in folders:  # of the head alone
        edit(folder, lambda t: {key: each for key, each in t.items() if key == HEAD})
    model, ids = llama(), torch.tensor([[5, 17, 40]])
    with torch.no_grad():
        base, hidden = model(ids).logits, model.model(ids).last_hidden_state
        changes = [hidden @ (load_file(each / FILE)[HEAD] - model.lm_head.weight).t() for each in folders]
        weights = torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(1))
        blend = attach(model, [read_adapter(folder) for folder in folders])
        with blend.using(weights):
            ours = model(ids).logits
    assert_close(ours, base + sum(weights[..., index, None] * each for index, each in enumerate(changes)))


def test_each_token_of_an_embedding_has_its_own_weights(tmp_path: Path, attach: Attach) -> None:
    folders = [save(tmp_path / str(seed), *KINDS["embedding"], seed) for seed in (1, 2)]
    model = llama()
    blend = attach(model, [read_adapter(folder) for folder in folders])
    ids, weights = torch.tensor([[5, 17], [40, 3]]), torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), blend.using(weights):
        vectors = model.model.embed_tokens(ids)
    for row in range(2):
        for token in range(2):
            with torch.no_grad(), blend.using(weights[row, token]):
                assert_close(model.model.embed_tokens(ids[row : row + 1, token : token + 1])[0, 0], vectors[row, token])


@pytest.mark.parametrize("name", ["saved head", "embedding and head"])
def test_the_engine_generates_what_peft_would(tmp_path: Path, tokenizer: Any, embedder: Any, name: str) -> None:
    """A saved head is factors of our own steps; an embedding runs through the model's own forward."""
    build, config = KINDS[name]
    folder = save(tmp_path / "one", build, config)
    plain = save_adapter(tmp_path / "plain", build(), seed=3, lora_alpha=1)
    names = ("math", "science")
    adapters = [read_adapter(folder, "math"), read_adapter(plain, "science")]
    engine = Engine(build(), tokenizer, adapters, fit({each: SAMPLES[each] for each in names}, embedder))
    assert engine.blend.has_vectors == (name != "saved head")
    done = engine.generate("add three", sampling=SamplingParams(max_tokens=8), routing=RoutingParams.one("math"))
    peft, ids = PeftModel.from_pretrained(build(), folder).eval(), prompt_ids(tokenizer, "add three")
    for token in done.token_ids:
        best = logits(peft, torch.tensor([ids]))[0, -1]
        assert best[token] >= best.max() - 1e-4
        ids.append(token)


@pytest.mark.parametrize("rows", [264, 256], ids=["grew", "shrank"])
def test_a_vocabulary_of_another_size_is_dropped_with_a_warning_or_refused_by_name(tmp_path: Path, rows: int) -> None:
    folder = save_adapter(tmp_path / "one", llama(), seed=1, lora_alpha=2)
    expected, own = by_peft(folder, llama), llama().model.embed_tokens.weight.detach()
    edit(folder, lambda t: t | {EMBEDDING: torch.cat([own, torch.ones(4, 32)])[:rows]})
    model = llama()
    with pytest.warns(AdapterWarning, match=r"another size of vocabulary(.|\n)*one: model.embed_tokens.weight"):
        blend = attach_few(model, [read_adapter(folder)])
    with blend.using([1.0]):
        assert_close(logits(model), expected)
    edit(folder, lambda t: t | {EMBEDDING: t[EMBEDDING] * 1.1})
    with pytest.raises(AdapterError, match=rf"weight of shape \(260, 32\) by one of \({rows}, 32\) whose rows differ"):
        attach_few(llama(), [read_adapter(folder)])


def test_dora_of_an_embedding_and_of_a_trained_weight_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", llama(), seed=1, use_dora=True, target_modules=EMBED)
    with pytest.raises(AdapterError, match=r"model\.embed_tokens: DoRA and other vectors of an embedding"):
        attach_few(llama(), [read_adapter(folder)])
    folder = save_adapter(tmp_path / "two", llama(), seed=1, use_dora=True, target_modules=["lm_head"])
    edit(folder, lambda t: t | {"base_model.model.lm_head.base_layer.weight": torch.ones(260, 32)})
    with pytest.raises(AdapterError, match=r"it replaces lm_head\.weight by another one, against which DoRA"):
        attach_few(llama(), [read_adapter(folder)])
