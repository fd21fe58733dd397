"""Adapters on fused experts, against the real PEFT: its `target_parameters`, and files of transformers before 5."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.bundle.bundle import save_bundle
from treadle.common.errors import AdapterError, BundleError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.tokenization import prompt_ids
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import ALWAYS_ACTIVE_ROWS, Blend
from treadle.lora.blend import attach as attach_adapters
from treadle.lora.mixture import mix
from treadle.routing.fitting import fit
from treadle.routing.router import Router
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams

from conftest import BASE, SAMPLES, TINY, calm, edit_config, save_adapter

IDS = torch.tensor([[5, 17, 40, 99, 3, 250, 61], [8, 1, 77, 120, 200, 33, 90]])  # (B, T)
FILE = "adapter_model.safetensors"
Attach = Callable[..., Blend]
UP, DOWN, LINEAR = "experts.gate_up_proj", "experts.down_proj", ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Kind:
    """A tiny model with fused experts."""

    name: str
    options: dict[str, Any]
    up: str = UP

    def build(self) -> PreTrainedModel:
        """Return the model, the same every time, its router's choices clear and its logits near 1."""
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.name}Config")(**TINY, **self.options, initializer_range=0.3)
        model = getattr(transformers, f"{self.name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "experts" in name or name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
        return calm(model)


QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NEXT = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16}
NEXT |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
NEMOTRON = {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2}
NEMOTRON |= {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
KINDS = {
    "Mixtral": Kind("Mixtral", {"num_local_experts": 4}),
    "Qwen3-MoE": Kind("Qwen3Moe", QWEN),
    "Qwen3-Next": Kind("Qwen3Next", QWEN | NEXT),
    "gpt-oss, transposed and with biases": Kind("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Nemotron-H, without gates": Kind("NemotronH", NEMOTRON, "experts.up_proj"),
}


def save(folder: Path, kind: Kind, seed: int = 1, **options: Any) -> Path:
    """Write an adapter of experts and of attention through PEFT, all factors random."""
    given = {"r": 3, "lora_alpha": 2, "target_parameters": [kind.up, DOWN], "target_modules": LINEAR, **options}
    wrapped = get_peft_model(kind.build(), LoraConfig(**given))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params={"all active": ALWAYS_ACTIVE_ROWS, "needed active": 0}.items(), ids=lambda param: param[0])
def attach(request: pytest.FixtureRequest) -> Attach:
    return partial(attach_adapters, always_active_rows=request.param[1])


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def by_peft(folder: Path, kind: Kind) -> PeftModel:
    return PeftModel.from_pretrained(kind.build(), folder).eval()


def test_one_hot_weights_are_that_peft_adapter_and_none_are_the_base(
    tmp_path: Path, kind: Kind, attach: Attach
) -> None:
    folders = [save(tmp_path / "one", kind), save(tmp_path / "two", kind, 2, r=2, target_parameters=[DOWN])]
    model = kind.build()
    base, modules = logits(model), list(model.modules())
    blend = attach(model, [read_adapter(folder) for folder in folders])
    assert torch.equal(logits(model), base)
    for index, folder in enumerate(folders):
        with blend.using([float(index == at) for at in range(2)]):
            ours = logits(model)
        assert (ours - base).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
        assert_close(ours, logits(by_peft(folder, kind)))
    with blend.using([0.0, 0.0]):
        assert torch.equal(logits(model), base)
    blend.remove("one")
    with blend.using([1.0]):
        assert_close(logits(model), logits(by_peft(folders[1], kind)))
    blend.detach()
    assert torch.equal(logits(model), base)
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))


def test_weights_are_those_of_peft_s_adapters_that_act_together(tmp_path: Path, kind: Kind, attach: Attach) -> None:
    folders = {name: save(tmp_path / name, kind, seed, r=seed + 1) for seed, name in enumerate(("one", "two"), 1)}
    weights = {"one": 0.7, "two": 0.4}
    peft = PeftModel.from_pretrained(kind.build(), folders["one"], adapter_name="one").eval()
    peft.load_adapter(folders["two"], "two")
    peft.base_model.set_adapter(["one", "two"])
    for module in peft.modules():
        for name, weight in weights.items():
            if isinstance(module, LoraLayer):
                module.set_scale(name, weight)
    model = kind.build()
    with attach(model, [read_adapter(folder) for folder in folders.values()]).using(list(weights.values())):
        assert_close(logits(model), logits(peft))


def test_each_row_and_token_has_its_own_weights_beside_plain_lora(tmp_path: Path, kind: Kind, attach: Attach) -> None:
    plain = save_adapter(tmp_path / "plain", kind.build(), seed=3, lora_alpha=1)
    folders = [save(tmp_path / "one", kind), plain, save(tmp_path / "two", kind, 2, target_parameters=[DOWN])]
    model = kind.build()
    blend = attach(model, [read_adapter(folder) for folder in folders])
    with blend.using([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]):
        rows = logits(model)
    assert_close(rows[0], logits(by_peft(folders[0], kind))[0])
    assert_close(rows[1], logits(by_peft(plain, kind))[1])
    weights = torch.rand(2, IDS.shape[1], 3, generator=torch.Generator().manual_seed(1))
    with blend.using(weights):
        together = logits(model)
    for row in range(2):
        with blend.using(weights[row : row + 1]):
            assert_close(logits(model, IDS[row : row + 1])[0], together[row])
    with blend.using(weights[:, :1]):
        shared = logits(model)
    assert_close(shared[:, 0], together[:, 0])
    for row in range(2):
        with blend.using(weights[row, 0]):
            assert_close(logits(model)[row], shared[row])


def test_on_a_half_precision_base_one_hot_is_as_near_to_the_exact_logits_as_peft(tmp_path: Path, kind: Kind) -> None:
    def half() -> PreTrainedModel:
        return kind.build().to(torch.bfloat16)

    folder, model = save(tmp_path / "one", kind), half()
    exact = logits(PeftModel.from_pretrained(half().float(), folder).eval())
    theirs = logits(PeftModel.from_pretrained(half(), folder).eval())
    with attach_adapters(model, [read_adapter(folder)]).using([1.0]):
        ours = logits(model)
    assert (ours - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "Qwen3-Next"])
def test_the_engine_decodes_as_one_uncached_forward(tmp_path: Path, tokenizer: Any, embedder: Any, name: str) -> None:
    kind = KINDS[name]
    plain = save_adapter(tmp_path / "plain", kind.build(), seed=3, lora_alpha=1)
    adapters = [read_adapter(save(tmp_path / "one", kind), "math"), read_adapter(plain, "science")]
    model = kind.build()
    router = fit({name: SAMPLES[name] for name in ("math", "science")}, embedder)
    engine = Engine(model, tokenizer, adapters, router)
    prompts = ["add three", "planet heat cell the atom", "the sum"]
    routing = [RoutingParams(every=1), RoutingParams.one("science"), RoutingParams.one("math")]
    done = engine.generate(prompts, sampling=SamplingParams(max_tokens=6), routing=routing)
    for prompt, completion in zip(prompts, done, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        whole = torch.tensor([[*ids, *completion.token_ids]])
        first = completion.weights[:1].repeat(len(ids), 0)
        weights = torch.tensor([[*first.tolist(), *completion.weights[1:].tolist()]])  # (1, T - 1, N)
        with engine.blend.using(weights):
            scores = logits(model, whole[:, :-1])[0].log_softmax(-1)
        chosen = scores[len(ids) - 1 :].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(chosen, torch.as_tensor(completion.logprobs), atol=1e-4, rtol=0)
    engine.remove_adapter("math")
    assert not engine.blend.has_vectors


# --- files of transformers before 5, a linear layer for each expert -------------------------------------------------

OLD_NAMES = {"Mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2")}
OLD_NAMES["Qwen3-MoE"] = ("mlp.experts", "gate_proj", "up_proj", "down_proj")


def save_old(folder: Path, name: str, *, with_up: bool = True) -> Path:
    """Write an adapter as it was trained on a linear layer of each expert, and on attention."""
    kind = KINDS[name]
    save_adapter(folder, kind.build(), seed=3, r=3, lora_alpha=2, target_modules=LINEAR)
    block, gate, up, down = OLD_NAMES[name]
    inner = 48 if name == "Mixtral" else 16
    tensors, generator = load_file(folder / FILE), torch.Generator().manual_seed(4)
    layers = [gate, up, down] if with_up else [gate, down]
    for index in range(2):
        for expert in range(4):
            for layer in layers:
                sizes = (inner, 32) if layer == down else (32, inner)
                path = f"base_model.model.model.layers.{index}.{block}.{expert}.{layer}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(3, sizes[0], generator=generator) * 0.2
                tensors[f"{path}.lora_B.weight"] = torch.randn(sizes[1], 3, generator=generator) * 0.2
    save_file(tensors, folder / FILE)
    edit_config(folder, target_modules=[*LINEAR, *layers])
    return folder


@pytest.mark.parametrize("name", OLD_NAMES)
def test_factors_of_single_experts_are_those_that_peft_fuses(tmp_path: Path, name: str, attach: Attach) -> None:
    kind, folder = KINDS[name], save_old(tmp_path / "old", name)
    model = kind.build()
    base = logits(model)
    blend = attach(model, [read_adapter(folder)])
    with blend.using([1.0]):
        ours = logits(model)
    assert (ours - base).abs().max() > 0.05
    assert_close(ours, logits(by_peft(folder, kind)))
    blend.add(read_adapter(save(tmp_path / "new", kind)))
    with blend.using([0.0, 1.0]):
        assert_close(logits(model), logits(by_peft(tmp_path / "new", kind)))
    some = save_old(tmp_path / "some", name, with_up=False)  # PEFT fuses no part of a weight alone
    assert attach(kind.build(), [read_adapter(some)]).names == ("some",)


def test_factors_of_single_experts_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    folder = save_old(tmp_path / "old", "Qwen3-MoE")
    tensors = load_file(folder / FILE)
    experts = "base_model.model.model.layers.0.mlp.experts"
    tensors = {key.replace(f"{experts}.3.", f"{experts}.7."): each for key, each in tensors.items()}
    key = f"{experts}.1.down_proj.lora_A.weight"
    save_file(tensors | {key: tensors[key][:, :5].contiguous()}, folder / FILE)
    with pytest.raises(AdapterError) as caught:
        attach_adapters(KINDS["Qwen3-MoE"].build(), [read_adapter(folder)])
    head, *lines = [line.strip() for line in str(caught.value).splitlines()]
    assert head == "factors of single experts do not fit the model's fused ones:"
    path = "- old: model.layers.0.mlp.experts"
    assert sorted(lines) == [
        f"{path}.down_proj: expert 1 is (16, 32) (in, out) of 4 experts, its factors are (5, 32)",
        f"{path}.down_proj: expert 7 is (16, 32) (in, out) of 4 experts, its factors are (16, 32)",
        f"{path}.gate_up_proj: expert 7 is (32, 16) (in, out) of 4 experts, its factors are (32, 16)",
        f"{path}.gate_up_proj: expert 7 is (32, 16) (in, out) of 4 experts, its factors are (32, 16)",
    ]


def test_rank_and_alpha_patterns_and_rslora_count_for_experts_as_in_peft(tmp_path: Path) -> None:
    kind = KINDS["Qwen3-MoE"]
    patterns = {"rank_pattern": {"experts.down_proj": 12}, "alpha_pattern": {"gate_up_proj": 5}, "use_rslora": True}
    folder = save(tmp_path / "one", kind, **patterns)  # 12 is also the rank of four experts together without it
    model = kind.build()
    with attach_adapters(model, [read_adapter(folder)]).using([1.0]):
        assert_close(logits(model), logits(by_peft(folder, kind)))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_other_combines_and_experts_of_another_number_or_kind_are_refused(tmp_path: Path) -> None:
    kind = KINDS["Qwen3-MoE"]
    one, two = (read_adapter(save(tmp_path / name, kind), name) for name in ("one", "two"))
    with pytest.raises(OptionError, match=r"one, two hold .* factors of fused experts"):
        attach_adapters(kind.build(), [one, two], "linear")
    model = kind.build()
    with attach_adapters(model, [one], "linear").using([1.0]):
        assert_close(logits(model), logits(by_peft(tmp_path / "one", kind)))
    more = Kind("Qwen3Moe", QWEN | {"num_experts": 6})
    with pytest.raises(AdapterError, match=r"one: .*down_proj has 6 experts, its factors are of 4 \(and 1 more"):
        attach_adapters(more.build(), [one])
    edit_config(tmp_path / "one", target_parameters=None)
    with pytest.raises(AdapterError, match=r"experts.base_layer: its factors have rank 12, its config says 3"):
        read_adapter(tmp_path / "one")


def test_the_router_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT would let it act: it chooses other experts then."""
    kind = KINDS["Qwen3-MoE"]
    adapter = read_adapter(save(tmp_path / "one", kind, target_parameters=["mlp.gate.weight", DOWN]))
    with pytest.raises(AdapterError, match=r"one: the model has no linear layer model.layers.0.mlp.gate \(and 1 more"):
        attach_adapters(kind.build(), [adapter])


def test_experts_that_compute_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "intermediate_size_mlp": 48, "layer_types": ["full_attention"] * 2}
    config = transformers.Llama4TextConfig(**TINY, **sizes)
    folder = save(tmp_path / "one", KINDS["Mixtral"])
    tensors = load_file(folder / FILE)
    save_file({key.replace("mlp", "feed_forward"): each for key, each in tensors.items()}, folder / FILE)
    message = r"one: model.layers.0.feed_forward.experts.\w+: Llama4TextExperts does not compute as transformers' other"
    with pytest.raises(AdapterError, match=message):
        attach_adapters(transformers.Llama4ForCausalLM(config), [read_adapter(folder)])


def test_export_and_the_vllm_plugin_refuse_it_by_name(
    tmp_path: Path, adapter_folders: dict[str, Path], router: Router
) -> None:
    folder = save(tmp_path / "one", KINDS["Qwen3-MoE"])
    with pytest.raises(
        AdapterError, match=r"one: .*fused experts or virtual tokens, whose update is more than the factors"
    ):
        mix([read_adapter(folder)], {"one": 1.0})
    bundle = save_bundle(tmp_path / "mixed", base=BASE, adapters=adapter_folders | {"code": folder}, router=router)
    with pytest.raises(BundleError, match="adapter 'code' changes fused experts"):
        open_bundle(PluginParams(bundle=str(bundle)))
