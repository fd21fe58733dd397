"""Prefix tuning, prompt tuning and P-tuning beside one another and beside LoRA, against the real PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.bundle.bundle import save_bundle
from treadle.common.errors import AdapterError, BundleError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.tokenization import prompt_ids
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import attach
from treadle.lora.mixture import mix
from treadle.routing.fitting import fit
from treadle.routing.router import Router
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams

from conftest import BASE, SAMPLES, TINY, calm, edit_config, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # PEFT's call of the base
IDS = torch.tensor([[5, 17, 40, 99, 3, 250, 61], [8, 1, 77, 120, 200, 33, 90]])  # (B, T)
FILE, KEY = "adapter_model.safetensors", "prompt_embeddings"
CONFIGS: dict[str, Callable[[int], PeftConfig]] = {
    "prefix": lambda size: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size),
    "prompt": lambda size: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size),
    "P": lambda size: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=size, encoder_hidden_size=16),
}
SIZES = {"prefix": 5, "prompt": 3, "P": 4}
GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, eager": ("Llama", {"attn_implementation": "eager"}),
    "Qwen3": ("Qwen3", {}),
    "Phi-3, rotated in part": ("Phi3", {"partial_rotary_factor": 0.5}),
    "GLM, rotated in pairs": ("Glm", {"partial_rotary_factor": 0.5}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "Mistral, a window shorter than the text": ("Mistral", {"sliding_window": 4}),
    "Gemma 3, a window in some layers": ("Gemma3", GEMMA),
    "gpt-oss, with sinks": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "SmolLM3, a layer without positions": ("SmolLM3", {"no_rope_layers": [0, 1]}),
    "Llama, deep": ("Llama", {"num_hidden_layers": 24}),
    "Llama, YaRN": ("Llama", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
        "rope_theta": 10000.0, "original_max_position_embeddings": 16}}),
}  # fmt: skip


def build(base: str = "Llama") -> PreTrainedModel:
    name, options = BASES[base]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = kind(**TINY | options, initializer_range=0.3)
    return calm(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def save(folder: Path, kind: str, seed: int = 1, base: str = "Llama", size: int | None = None) -> Path:
    """Write an adapter of a kind through PEFT, all that is trained moved."""
    wrapped = get_peft_model(build(base), CONFIGS[kind](size or SIZES[kind]))
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder)
    return folder


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -ids.shape[1] :]


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def by_peft(folder: Path, base: str = "Llama") -> PeftModel:
    return PeftModel.from_pretrained(build(base), folder).eval()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_hot_weights_are_that_peft_adapter_and_none_are_the_base(tmp_path: Path, kind: str, base: str) -> None:
    folder, model = save(tmp_path / "one", kind, base=base), build(base)
    other = save(tmp_path / "other", "prefix" if kind == "P" else "P", 2, base)
    before, modules = logits(model), list(model.modules())
    blend = attach(model, [read_adapter(other), read_adapter(folder)])
    assert torch.equal(logits(model), before)
    with blend.using([0.0, 1.0]):
        ours = logits(model)
    assert (ours - before).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    assert_close(ours, logits(by_peft(folder, base)))
    with blend.using([0.0, 0.0]):
        assert torch.equal(logits(model), before)
    blend.remove("other")
    with blend.using([1.0]):
        assert_close(logits(model), ours)
    blend.detach()
    assert torch.equal(logits(model), before)
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


def test_half_of_an_adapter_twice_is_the_adapter_and_twins_of_any_kind_stand_beside_one_another(tmp_path: Path) -> None:
    folder, model = save(tmp_path / "one", "prompt"), build()
    blend = attach(model, [read_adapter(folder, "one"), read_adapter(folder, "twin")])
    expected = logits(by_peft(folder))
    for weights in ([0.5, 0.5], [0.9, 0.1]):
        with blend.using(weights):
            assert_close(logits(model), expected)
    with blend.using([0.5, 0.0]):
        assert (logits(model) - expected).abs().max() > 0.01


def test_weights_of_one_are_the_base_that_has_all_virtual_tokens_in_its_cache(tmp_path: Path) -> None:
    """The law of a mixture, by transformers alone: each adapter's tokens read alone, at positions that end at -1."""
    folders, model = [save(tmp_path / "P", "P"), save(tmp_path / "prompt", "prompt", 2)], build()
    caches: list[Any] = []
    with torch.no_grad():
        for folder in folders:
            vectors = load_file(folder / FILE)[KEY]
            positions = torch.arange(-len(vectors), 0)[None]
            caches.append(model(inputs_embeds=vectors[None], position_ids=positions, use_cache=True).cache)
        together = transformers.DynamicCache()
        for index in range(2):
            keys = torch.cat([each.layers[index].keys for each in caches], 2)
            together.update(keys, torch.cat([each.layers[index].values for each in caches], 2), index)
        expected = model(input_ids=IDS[:1], position_ids=torch.arange(IDS.shape[1])[None], cache=together).logits
    with attach(model, [read_adapter(folder) for folder in folders]).using([1.0, 1.0]):
        assert_close(logits(model, IDS[:1]), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_a_half_precision_base_one_hot_is_as_near_to_the_exact_logits_as_peft(tmp_path: Path, kind: str) -> None:
    def half() -> PreTrainedModel:
        return build().to(torch.bfloat16)

    folder, model = save(tmp_path / "one", kind), half()
    exact = logits(PeftModel.from_pretrained(half().float(), folder).eval())
    theirs = logits(PeftModel.from_pretrained(half(), folder).eval())
    with attach(model, [read_adapter(folder)]).using([1.0]):
        ours = logits(model)
    assert (ours - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()


@pytest.mark.parametrize("kind", CONFIGS)
def test_rounding_in_many_layers_is_no_reason_to_refuse(tmp_path: Path, kind: str) -> None:
    folder, model = save(tmp_path / "one", kind, base="Llama, deep", size=20), build("Llama, deep").to(torch.bfloat16)
    assert attach(model, [read_adapter(folder)]).names == ("one",)


def four(root: Path, base: str = "Llama") -> dict[str, Path]:
    """One adapter of each kind, and plain LoRA."""
    plain = save_adapter(root / "plain", build(base), seed=3, lora_alpha=1)
    return {kind: save(root / kind, kind, seed, base) for seed, kind in enumerate(CONFIGS, 1)} | {"plain": plain}


def test_each_row_and_token_has_its_own_weights_beside_plain_lora(tmp_path: Path) -> None:
    folders, model = four(tmp_path), build()
    before = logits(model)
    blend = attach(model, [read_adapter(folder) for folder in folders.values()])
    ids = IDS[[0, 1, 0, 1, 0]]
    with blend.using(torch.eye(5)[:, :4]):  # the last row is the base's
        rows = logits(model, ids)
    for index, folder in enumerate(folders.values()):
        assert_close(rows[index], logits(by_peft(folder), ids)[index])
    assert_close(rows[4], before[0])
    weights = torch.rand(2, IDS.shape[1], 4, generator=torch.Generator().manual_seed(1))
    with blend.using(weights):
        together = logits(model)
    for row in range(2):
        with blend.using(weights[row : row + 1]):
            assert_close(logits(model, IDS[row : row + 1])[0], together[row])
    with blend.using(weights[:, :1]):
        shared = logits(model)
    for row in range(2):
        with blend.using(weights[row, 0]):
            assert_close(logits(model)[row], shared[row])


def test_an_adapter_that_comes_or_goes_inside_weights_leaves_the_base(tmp_path: Path) -> None:
    folders, model = four(tmp_path), build()
    before = logits(model)
    blend = attach(model, [read_adapter(folders["prefix"])])
    with blend.using([1.0]):
        ours = logits(model)
        blend.add(read_adapter(folders["P"]))
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with blend.using([1.0, 0.0]):
        with blend.using(None):
            assert torch.equal(logits(model), before)
        assert_close(logits(model), ours)
    assert blend.has_vectors
    with pytest.raises(AdapterError, match="a blend attached already"):
        attach(model, [read_adapter(folders["plain"])])


ROUTINGS = [RoutingParams(every=1), RoutingParams.one("prefix"), RoutingParams.one("P"), RoutingParams.one("plain")]


@pytest.mark.parametrize(
    "base", ["Llama", "Mistral, a window shorter than the text", "Gemma 3, a window in some layers"]
)
def test_the_engine_decodes_as_one_uncached_forward_and_rows_are_what_they_are_alone(
    tmp_path: Path, tokenizer: Any, embedder: Any, base: str
) -> None:
    folders, model = four(tmp_path, base), build(base)
    samples = dict(
        zip(folders, [*SAMPLES.values(), ["plus list cell", "list plus", "cell loop", "the list"]], strict=True)
    )
    adapters = [read_adapter(folder, name) for name, folder in folders.items()]
    engine = Engine(model, tokenizer, adapters, fit(samples, embedder))
    prompts = ["add three", "planet heat cell the atom", "the sum", "def loop return list list"]
    sampling = SamplingParams(max_tokens=6)
    done = engine.generate(prompts, sampling=sampling, routing=ROUTINGS)
    for prompt, routing, completion in zip(prompts, ROUTINGS, done, strict=True):
        (alone,) = engine.generate([prompt], sampling=sampling, routing=[routing])
        assert alone.token_ids == completion.token_ids
        ids = prompt_ids(tokenizer, prompt)
        whole = torch.tensor([[*ids, *completion.token_ids]])
        first = completion.weights[:1].repeat(len(ids), 0)
        weights = torch.tensor([[*first.tolist(), *completion.weights[1:].tolist()]])  # (1, T - 1, N)
        with engine.blend.using(weights):
            scores = logits(model, whole[:, :-1])[0].log_softmax(-1)
        chosen = scores[len(ids) - 1 :].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(chosen, torch.as_tensor(completion.logprobs), atol=1e-4, rtol=0)
    for name in ("prefix", "prompt", "P"):
        engine.remove_adapter(name)
    assert not engine.blend.has_vectors


def test_rows_that_join_and_leave_and_are_read_in_chunks_are_what_they_are_alone(
    tmp_path: Path, tokenizer: Any, embedder: Any
) -> None:
    folders = {name: save(tmp_path / name, kind) for name, kind in zip(SAMPLES, CONFIGS, strict=True)}
    adapters = [read_adapter(folder, name) for name, folder in folders.items()]
    engine = Engine(build(), tokenizer, adapters, fit(SAMPLES, embedder))
    greedy, routing = SamplingParams(max_tokens=7, temperature=0), RoutingParams(every=1)
    prompts = [[*range(5, 9)], [*range(60, 90)], [*range(60, 70)], [*range(60, 90)]]
    alone = [list(engine.generate_ids([each], sampling=greedy, routing=routing)[0].token_ids) for each in prompts]
    batch = engine.new_batch(prefixes=PrefixCache(1 << 20))
    rows = engine.new_rows(prompts, sampling=greedy, routing=routing)
    for row in rows:
        reading = batch.begin([row])
        while not reading.is_finished:
            batch.read(reading, 3)
        batch.step()
    while batch.rows:
        batch.step()
    assert [[event.token_id for event in row.events] for row in rows] == alone


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_text_is_that_of_peft(tmp_path: Path, tokenizer: Any, embedder: Any, kind: str) -> None:
    folder = save(tmp_path / "one", kind)
    engine = Engine(build(), tokenizer, [read_adapter(folder, "math")], fit({"math": SAMPLES["math"]}, embedder))
    prompt = [5, 17, 40, 99]
    (own,) = engine.generate_ids(
        [prompt], sampling=SamplingParams(max_tokens=8, temperature=0), routing=RoutingParams.one("math")
    )
    ids, peft = torch.tensor([prompt]), by_peft(folder)
    for token in own.token_ids:
        assert int(logits(peft, ids)[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


# --- what is refused ------------------------------------------------------------------------------------------------

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
GPT2 = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4}
LATENT = TINY | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2}
BAD_BASES = {
    "learned positions": (
        transformers.GPT2Config,
        GPT2,
        "need rotary attention, and nothing else, in each layer; GPT2LMHeadModel",
    ),
    "length decides": (transformers.LlamaConfig, TINY | DYNAMIC, "need positions that do not depend on the length"),
    "wider": (transformers.LlamaConfig, TINY | {"hidden_size": 64}, r"are vectors of 32, the base's of 64"),
    "latent attention": (transformers.DeepseekV3Config, LATENT, "DeepseekV3For"),
    "states beside attention": (transformers.FalconH1Config, TINY, "nothing else, in each layer; FalconH1For"),
    "states": (transformers.MambaConfig, {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2}, "MambaFor"),
}


@pytest.mark.parametrize(("kind", "options", "message"), BAD_BASES.values(), ids=BAD_BASES)
def test_bases_that_cannot_have_virtual_tokens_are_refused_by_name(
    tmp_path: Path, kind: Any, options: dict[str, Any], message: str
) -> None:
    adapter = read_adapter(save(tmp_path / "one", "prompt"))
    with pytest.raises(AdapterError, match=rf"one: .*{message}"):
        attach(transformers.AutoModelForCausalLM.from_config(kind(**options)), [adapter])


def test_a_prefix_of_other_layers_and_other_combines_are_refused(tmp_path: Path) -> None:
    prefix, other = (read_adapter(save(tmp_path / kind, kind)) for kind in ("prefix", "P"))
    deeper = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | {"num_hidden_layers": 3}))
    with pytest.raises(AdapterError, match=r"prefix: .* = \(2, 2, 8\), the base has \(3, 2, 8\)"):
        attach(deeper, [prefix])
    with pytest.raises(OptionError, match=r"prefix, P hold .* virtual tokens"):
        attach(build(), [prefix, other], "linear")


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any], str]] = {
    "no tensor": (lambda t: {}, {}, f"{KEY} is missing"),
    "a foreign tensor": (lambda t: t | {"other": torch.ones(2)}, {}, "other: not a virtual token"),
    "NaN": (lambda t: {KEY: t[KEY] * float("nan")}, {}, f"{KEY} holds NaN or infinite values"),
    "fewer tokens": (lambda t: {KEY: t[KEY][:2]}, {}, rf"{KEY} is \(2, 64\), its config says \(5, 64\)"),
    "no number": (lambda t: t, {"num_layers": "two"}, "num_layers must be a positive whole number, not 'two'"),
    "an encoder's": (lambda t: t, {"num_transformer_submodules": 2}, "an encoder and a decoder"),
}


@pytest.mark.parametrize(("change", "config", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_folder_says_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], config: dict[str, Any], message: str
) -> None:
    folder = save(tmp_path / "one", "prefix")
    save_file({key: each.contiguous() for key, each in change(load_file(folder / FILE)).items()}, folder / FILE)
    edit_config(folder, **config)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)
    assert read_adapter(save(tmp_path / "two", "prefix")).num_bytes() == 5 * 64 * 4


def test_export_and_the_vllm_plugin_refuse_it_by_name(
    tmp_path: Path, adapter_folders: dict[str, Path], router: Router
) -> None:
    folder = save(tmp_path / "one", "prefix")
    with pytest.raises(AdapterError, match=r"one: .*virtual tokens, whose update is more than the factors"):
        mix([read_adapter(folder)], {"one": 1.0})
    bundle = save_bundle(tmp_path / "mixed", base=BASE, adapters=adapter_folders | {"code": folder}, router=router)
    with pytest.raises(BundleError, match="adapter 'code' has virtual tokens"):
        open_bundle(PluginParams(bundle=str(bundle)))
