"""Which models the engine refuses by name: their state cannot be followed, or padding moves their tokens."""

import inspect
import re

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from treadle.common.errors import AdapterError, ModelError, OptionError
from treadle.engine.supported import check_supported, rereading_layers
from treadle.lora.adapter import Adapter, LoraPair
from treadle.lora.blend import attach
from treadle.lora.compatibility import check_tokens

from conftest import TINY, tiny_llama

BART = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 260}
REFUSED = {
    "MiniMax": (
        "MiniMax",
        TINY | {"layer_types": ["linear_attention", "full_attention"]},
        "does not take the engine's|inear",
    ),
    "RecurrentGemma": (
        "RecurrentGemma",
        TINY | {"block_types": ["recurrent", "attention"]},
        "it counts padding|recurrent",
    ),
    "Git": ("Git", TINY | {"vision_config": TINY | {"image_size": 32}}, "it counts padding"),
    "XLM": ("XLM", {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "n_words": 260}, "does not take the engine's cache"),
    "OpenAIGPT": ("OpenAIGPT", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 260}, "takes no cache"),
    "Bart": ("Bart", BART, "counts padding as tokens"),
}


def made(name: str, options: dict[str, object]) -> PreTrainedModel:
    head = {"OpenAIGPT": "LMHeadModel", "XLM": "WithLMHeadModel"}.get(name, "ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**options)).eval()


@pytest.mark.parametrize(("name", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_the_engine_cannot_run_is_refused_by_name(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"(?s)cannot run {name}\w+;.*{message}"):
        check_supported(made(name, options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mixtral", "Phi", "Olmo2"])
def test_rounding_in_half_precision_is_no_reason_to_refuse_but_padding_that_is_read_is(
    name: str, dtype: torch.dtype
) -> None:
    model = made(name, TINY | {"num_hidden_layers": 12, "hidden_size": 64, "head_dim": 16}).to(dtype)
    subclass = type(f"Other{name}ForCausalLM", (type(model),), {})  # none of the engine's own kinds
    model.__class__ = subclass
    check_supported(model)

    def without_mask(self: PreTrainedModel, *args: object, attention_mask: object = None, **options: object) -> object:
        return super(subclass, self).forward(*args, **options)

    without_mask.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    subclass.forward = without_mask
    with pytest.raises(ModelError, match="counts padding"):
        check_supported(model)


def test_a_model_that_takes_no_positions_but_minds_its_padding_is_run() -> None:
    options = {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 260}
    check_supported(made("Bloom", options))


def expert(path: str) -> Adapter:
    pair = LoraPair(torch.randn(2, 32), torch.randn(32, 2), 1.0)
    return Adapter("one", "base", {path: pair}, source=None)  # type: ignore[arg-type]


def test_adapters_of_routed_experts_are_refused_by_name_and_those_of_shared_ones_are_not() -> None:
    with pytest.raises(AdapterError, match="one: 1 layers of routed experts"):
        check_tokens([expert("model.layers.0.mlp.experts.3.up_proj")], ())
    check_tokens([expert("model.layers.0.mlp.shared_experts.up_proj"), expert("model.layers.0.experts_norm.0.a")], ())


def test_layers_that_read_the_past_again_are_found_and_their_adapters_refused_by_name() -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    sizes = TINY | {"num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1}
    found = rereading_layers(made("DeepseekV2", sizes | latent))
    if not found:  # transformers before 5.20 caches whole keys and values
        return
    assert found == {f"model.layers.{index}.self_attn.kv_b_proj" for index in range(2)}
    message = r"one: 1 layers that read the past again \(model.layers.1.self_attn.kv_b_proj\)"
    with pytest.raises(AdapterError, match=message):
        check_tokens([expert("model.layers.1.self_attn.kv_b_proj")], found)
    assert not rereading_layers(tiny_llama())


def test_an_expert_follows_weights_that_are_the_same_for_all_and_refuses_others() -> None:
    model = tiny_llama()
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    layer, tokens = model.model.layers[0].experts, torch.randn(3, 32)  # 3 of 4 tokens were sent to it
    blend = attach(model, [expert("model.layers.0.experts.0")])
    base = layer[0].base(tokens)
    with blend.using([1.0]), torch.no_grad():
        pair = blend.adapters[0].pairs["model.layers.0.experts.0"]
        torch.testing.assert_close(layer[0](tokens), base + tokens @ pair.a.T @ pair.b.T)
    message = re.escape("model.layers.0.experts.0 reads tokens in the shape (3,)")
    with blend.using(torch.tensor([[1.0], [0.5], [0.2]])), pytest.raises(OptionError, match=message):
        layer[0](tokens)
