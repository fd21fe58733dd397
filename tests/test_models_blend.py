"""Blending on other architectures and on quantised bases: the same laws, on tiny random models."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.scoring import score_ids
from treadle.engine.tokenization import prompt_ids
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.blend import attach
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit

from conftest import SAMPLES, TINY, save_adapter

IDS = torch.tensor([[5, 17, 40, 99, 3, 250, 61], [8, 1, 77, 120, 200, 33, 90]])  # (B, T)
SIZES = TINY | {"max_position_embeddings": 32, "initializer_range": 0.12}
GPT2_SIZES = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.12}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "v_proj", "gate_proj", "down_proj"]


@dataclass(frozen=True)
class Architecture:
    """A transformers model class, its tiny configuration, and the targets of its two adapters."""

    name: str
    options: dict[str, object]
    targets: tuple[list[str] | str, list[str] | str] = (ATTENTION, MLP)
    config: str = ""

    def build(self) -> PreTrainedModel:
        """Make the model, the same every time; its biases are not zero."""
        torch.manual_seed(0)
        config_class = getattr(transformers, self.config or f"{self.name}Config")
        head = {"GPT2": "LMHeadModel", "T5": "ForConditionalGeneration"}.get(self.name, "ForCausalLM")
        model = getattr(transformers, self.name + head)(config_class(**self.options))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model.eval()


LAYER_TYPES = ["sliding_attention", "full_attention"]
LLAMA = Architecture("Llama", SIZES)
ARCHITECTURES = [
    LLAMA,
    Architecture("Mistral", SIZES | {"sliding_window": 3}),
    Architecture("Qwen2", SIZES),
    Architecture("Qwen3", SIZES),
    Architecture("Gemma2", SIZES | {"sliding_window": 3, "query_pre_attn_scalar": 8, "layer_types": LAYER_TYPES}),
    Architecture(
        "Gemma3",
        SIZES | {"sliding_window": 3, "query_pre_attn_scalar": 8, "layer_types": LAYER_TYPES},
        config="Gemma3TextConfig",
    ),
    Architecture("Phi3", SIZES, targets=(["qkv_proj", "o_proj"], ["qkv_proj", "gate_up_proj"])),
    Architecture("GPT2", GPT2_SIZES, targets=(["c_attn", "attn.c_proj"], ["c_attn", "c_fc", "mlp.c_proj"])),
    # rows and tokens are one axis where these layers read
    Architecture(
        "OPT",
        {"vocab_size": 260, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 32, "max_position_embeddings": 32, "init_std": 0.12, "eos_token_id": 257},
        targets=(["fc1", "fc2"], ["q_proj", "fc2"]),
    ),
    # its own positions begin after that of padding; generate's do not
    Architecture(
        "Roberta",
        {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "is_decoder": True}
        | {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1, "eos_token_id": 257},
        targets=(["query", "value"], ["key", "output.dense"]),
    ),
    Architecture(
        "Qwen2Moe",
        SIZES
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 24},
        targets=(["shared_expert.up_proj", "q_proj"], ["shared_expert.down_proj", "v_proj"]),
    ),
    # an encoder and a decoder: attach alone takes them
    Architecture(
        "T5",
        {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"tie_word_embeddings": False, "initializer_factor": 1.0, "decoder_start_token_id": 0},
        targets=(["q", "v", "wo"], ["SelfAttention.k", "EncDecAttention.q", "wi"]),
    ),
    # values are shorter than keys
    Architecture(
        "DeepseekV2",
        SIZES
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "topk_group": 1},
        targets=(["q_a_proj", "o_proj"], ["q_b_proj", "kv_a_proj_with_mqa"]),
    ),
]

DECODERS = [each for each in ARCHITECTURES if each.name != "T5"]


def logits(model: nn.Module) -> Tensor:
    texts = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **texts).logits


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def two_adapters(folder: Path, architecture: Architecture) -> dict[str, Path]:
    """Write two adapters of unequal ranks and targets for an architecture."""
    one, two = architecture.targets
    save = partial(save_adapter, fan_in_fan_out=architecture.name == "GPT2")
    return {
        "one": save(folder / "one", architecture.build(), seed=1, r=4, lora_alpha=4, target_modules=one),
        "two": save(folder / "two", architecture.build(), seed=2, r=3, lora_alpha=1, target_modules=two),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_one_hot_is_that_peft_adapter_and_sum_is_cat_on_every_architecture(
    tmp_path: Path, architecture: Architecture, peft_model: Callable[..., PeftModel]
) -> None:
    folders = two_adapters(tmp_path, architecture)
    model, peft = architecture.build(), peft_model(folders, architecture.build())
    peft.add_weighted_adapter(["one", "two"], [0.7, 0.6], "merged", combination_type="cat")
    base, before = logits(model), list(model.modules())
    blend = attach(model, [read_adapter(folder) for folder in folders.values()])
    assert torch.equal(logits(model), base)
    for name, weights in {"one": [1.0, 0.0], "two": [0.0, 1.0], "merged": [0.7, 0.6]}.items():
        peft.set_adapter(name)
        with blend.using(weights):
            ours = logits(model)
        assert_close(ours, logits(peft))
        assert (ours - base).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    with blend.using([0.0, 0.0]):
        assert torch.equal(logits(model), base)
    blend.detach()
    assert torch.equal(logits(model), base)
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))


# --- quantised bases ------------------------------------------------------------------------------------------------

QUANTISED = ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"]


def quantised(kind: str) -> PreTrainedModel:
    """The tiny Llama with the weights of its linear layers in 8 or 4 bits, by TorchAO on the CPU."""
    quantization = pytest.importorskip("torchao.quantization", reason="pip install 'treadle[dev]'")
    model, options = LLAMA.build(), {"weight_dtype": torch.int4} if kind == "IntxWeightOnlyConfig" else {}
    quantization.quantize_(model.model, getattr(quantization, kind)(**options))
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor that a model holds, down to the integers and scales inside quantised weights."""
    copies: dict[str, Tensor] = {}

    def visit(name: str, tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for inner in tensor.__tensor_flatten__()[0]:
                visit(f"{name}.{inner}", getattr(tensor, inner))
        else:
            copies[name] = tensor.detach().clone()

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        visit(name, tensor)
    return copies


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folders = two_adapters(tmp_path_factory.mktemp("quantised"), LLAMA)
    return [read_adapter(folder) for folder in folders.values()]


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")  # PEFT could not merge it: nobody asks it to
@pytest.mark.parametrize("kind", QUANTISED)
def test_on_a_quantised_base_one_hot_is_that_peft_adapter(
    adapters: list[Adapter], peft_model: Callable[..., PeftModel], kind: str
) -> None:
    model = quantised(kind)
    peft = peft_model({adapter.name: adapter.source for adapter in adapters}, quantised(kind))
    blend = attach(model, adapters)
    for name, weights in {"one": [1.0, 0.0], "two": [0.0, 1.0]}.items():
        peft.set_adapter(name)
        with blend.using(weights):
            assert_close(logits(model), logits(peft))


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_is_never_written_to(adapters: list[Adapter], kind: str) -> None:
    model = quantised(kind)
    base, before = logits(model), stored(model)
    largest = max(tensor.abs().max() for tensor in before.values() if tensor.dtype == torch.int8)
    assert largest == (8 if kind == "IntxWeightOnlyConfig" else 127)
    assert not torch.equal(base, logits(LLAMA.build()))
    blend = attach(model, adapters)
    assert torch.equal(logits(model), base)
    with blend.using([0.0, 0.0]):
        assert torch.equal(logits(model), base)
    with blend.using([0.8, 0.5]):
        assert (logits(model) - base).abs().max() > 0.05
    blend.detach()
    assert torch.equal(logits(model), base)
    after = stored(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_layer_gains_the_explicit_update(adapters: list[Adapter], kind: str) -> None:
    model, path, x = quantised(kind), "model.layers.1.self_attn.v_proj", torch.randn(2, 5, 32)
    layer = model.get_submodule(path)
    with torch.no_grad(), attach(model, adapters).using([0.7, 0.6]):
        ours, base = model.get_submodule(path)(x), layer(x)
    pairs = [adapter.pairs[path] for adapter in adapters]
    delta = sum(w * pair.scale * pair.b @ pair.a for w, pair in zip([0.7, 0.6], pairs, strict=True))
    assert_close(ours, base + x @ delta.T)


@pytest.mark.parametrize("architecture", DECODERS, ids=lambda architecture: architecture.name)
def test_the_engine_decodes_every_architecture_as_one_uncached_forward(
    tmp_path: Path, architecture: Architecture, tokenizer: PreTrainedTokenizerFast, embedder: StaticEmbedder
) -> None:
    """Padded rows, a window of attention shorter than the text, learned positions: none may change a number."""
    adapters = [read_adapter(folder) for folder in two_adapters(tmp_path, architecture).values()]
    router = fit({"one": SAMPLES["math"], "two": SAMPLES["code"]}, embedder)
    engine = Engine(architecture.build(), tokenizer, adapters, router)
    prompts = ["add", "def list", "the planet x"]
    sampling, routing = SamplingParams(max_tokens=14), RoutingParams(every=1, window=4, temperature=5.0)
    together = engine.generate(prompts, sampling=sampling, routing=routing)
    for prompt, row in zip(prompts, together, strict=True):
        alone = engine.generate(prompt, sampling=sampling, routing=routing)
        assert alone.token_ids == row.token_ids
        ids = prompt_ids(tokenizer, prompt)
        (scores,) = score_ids(engine, [(ids, list(row.token_ids))], routing)
        assert_close(torch.from_numpy(row.logprobs), torch.from_numpy(scores), atol=1e-4)
