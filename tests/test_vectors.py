"""DoRA, IA3 and biases: adapters that do more than add factors, against the real PEFT, active and merged."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.tokenization import prompt_ids
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import ALWAYS_ACTIVE_ROWS, Blend
from treadle.lora.blend import attach as attach_adapters
from treadle.lora.layer import BlendedLinear, VectorLinear
from treadle.lora.vectors import weight_of
from treadle.routing.fitting import fit

from conftest import BASE, SAMPLES, calm, save_adapter, tiny_llama

IDS = torch.tensor([[5, 17, 40, 99, 3, 250, 61], [8, 1, 77, 120, 200, 33, 90]])  # (B, T)
FILE = "adapter_model.safetensors"
Build = Callable[[], PreTrainedModel]
Attach = Callable[..., Blend]


def llama() -> PreTrainedModel:
    return calm(tiny_llama())


def gpt2() -> PreTrainedModel:
    """Its layers are Conv1D, and have biases that are not zero; so have its norms."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 257}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids, initializer_range=0.2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return calm(model)


LORA, ON_GPT2 = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}, {"fan_in_fan_out": True}
GPT2_LORA = {"r": 3, "lora_alpha": 2, "target_modules": ["c_attn", "mlp.c_proj"], **ON_GPT2}
IA3_TARGETS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
IA3_GPT2 = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], **ON_GPT2}
PATTERNS = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}}
KINDS: dict[str, tuple[Build, PeftConfig]] = {
    "DoRA": (llama, LoraConfig(**LORA, use_dora=True)),
    "DoRA with rsLoRA and patterns": (llama, LoraConfig(**LORA, **PATTERNS, use_dora=True)),
    "DoRA on Conv1D with a bias": (gpt2, LoraConfig(**GPT2_LORA, use_dora=True)),
    "lora_bias": (gpt2, LoraConfig(**GPT2_LORA, lora_bias=True)),
    "bias of the targets": (gpt2, LoraConfig(**GPT2_LORA, bias="lora_only")),
    "every bias": (gpt2, LoraConfig(**GPT2_LORA, bias="all")),
    "DoRA with every bias": (gpt2, LoraConfig(**GPT2_LORA, bias="all", use_dora=True)),
    "IA3": (llama, IA3Config(**IA3_TARGETS)),
    "IA3 on Conv1D with a bias": (gpt2, IA3Config(**IA3_GPT2)),
}
OF_LLAMA = ("DoRA", "DoRA with rsLoRA and patterns", "IA3")


def save(folder: Path, kind: str, seed: int = 1) -> Path:
    """Write an adapter of a kind through PEFT, everything that training could change moved."""
    build, config = KINDS[kind]
    wrapped = get_peft_model(build(), replace(config))
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return a function that gives the folder of a kind and a seed, each written once."""
    root = tmp_path_factory.mktemp("vectors")

    def give(kind: str, seed: int = 1) -> Path:
        folder = root / f"{kind.replace(' ', '-')}-{seed}"
        return folder if folder.exists() else save(folder, kind, seed)

    return give


Saved = Callable[..., Path]


@pytest.fixture(params={"all active": ALWAYS_ACTIVE_ROWS, "needed active": 0}.items(), ids=lambda param: param[0])
def attach(request: pytest.FixtureRequest) -> Attach:
    return partial(attach_adapters, always_active_rows=request.param[1])


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def by_peft(folder: Path, build: Build) -> PeftModel:
    return PeftModel.from_pretrained(build(), folder).eval()


@pytest.mark.filterwarnings("ignore:Unmerge result")
def test_one_hot_weights_are_that_peft_adapter_active_and_merged(kind: str, saved: Saved, attach: Attach) -> None:
    build, folder = KINDS[kind][0], saved(kind)
    model, peft = build(), by_peft(folder, build)
    base, active, merged = logits(model), logits(peft), logits(peft.merge_and_unload())
    other = read_adapter(saved("DoRA" if build is llama else "lora_bias", 2), "other")
    blend = attach(model, [other, read_adapter(folder, "one")])
    with blend.using([0.0, 1.0]):
        ours = logits(model)
    assert (ours - base).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    assert_close(ours, active)
    assert_close(ours, merged)


def test_no_weights_and_zero_weights_are_the_base_bit_for_bit_and_detach_leaves_no_trace(
    kind: str, saved: Saved, attach: Attach
) -> None:
    model = KINDS[kind][0]()
    base, modules = logits(model), list(model.modules())
    blend = attach(model, [read_adapter(saved(kind, seed), f"n{seed}") for seed in (1, 2)])
    assert blend.has_vectors
    assert torch.equal(logits(model), base)
    with blend.using([0.0, 0.0]):
        assert torch.equal(logits(model), base)
    with blend.using(torch.tensor([[0.0, 0.0], [0.3, 0.9]])):
        rows = logits(model)
    assert torch.equal(rows[0], base[0])
    assert (rows[1] - base[1]).abs().max() > 0.01
    blend.remove("n1")
    blend.add(read_adapter(saved(kind), "n1"))
    with blend.using([0.9, 0.3]):
        assert_close(logits(model)[1], rows[1])
    blend.detach()
    assert torch.equal(logits(model), base)
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))


LAYERS = {"q_proj": "model.layers.0.self_attn.q_proj", "v_proj": "model.layers.1.self_attn.v_proj"}
LAYERS |= {"down_proj": "model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_several_at_once_add_up_what_each_changes_in_a_layer(
    tmp_path: Path, saved: Saved, layer: str, attach: Attach
) -> None:
    """The law of a mixture of DoRA, IA3 and plain LoRA: y = base + sum_n w_n (PEFT's layer of n - base)."""
    plain = save_adapter(tmp_path / "plain", llama(), seed=3, r=3, lora_alpha=1, target_modules=["v_proj", "down_proj"])
    folders = [saved("DoRA"), plain, saved("IA3"), saved("DoRA with rsLoRA and patterns", 2)]
    model = llama()
    module = model.get_submodule(layer)
    x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(2, 5, len(folders), generator=torch.Generator().manual_seed(2))  # (B, T, N)
    with torch.no_grad():
        base = module(x)
        changes = [by_peft(folder, llama).get_submodule(f"base_model.model.{layer}")(x) - base for folder in folders]
        blend = attach(model, [read_adapter(folder, str(index)) for index, folder in enumerate(folders)])
        with blend.using(weights):
            ours = model.get_submodule(layer)(x)
    expected = base + sum(weights[..., index, None] * each for index, each in enumerate(changes))
    assert sum(bool(each.abs().max() > 0.01) for each in changes) >= 2
    assert_close(ours, expected)


def test_each_row_and_token_has_its_own_weights(kind: str, saved: Saved, attach: Attach) -> None:
    model = KINDS[kind][0]()
    blend = attach(model, [read_adapter(saved(kind, seed), f"n{seed}") for seed in (1, 2)])
    weights = torch.rand(2, IDS.shape[1], 2, generator=torch.Generator().manual_seed(1))
    with blend.using(weights):
        together = logits(model)
    for row in range(2):
        with blend.using(weights[row : row + 1]):
            assert_close(logits(model, IDS[row : row + 1])[0], together[row])
    for row, shared in enumerate(([0.4, 0.7], [0.9, 0.0])):
        with blend.using([[0.4, 0.7], [0.9, 0.0]]):
            rows = logits(model)
        with blend.using(shared):
            assert_close(rows[row], logits(model)[row])


def test_a_plain_row_beside_a_dora_row_is_what_it_is_alone(tmp_path: Path, saved: Saved, attach: Attach) -> None:
    plain = save_adapter(tmp_path / "plain", llama(), seed=3, lora_alpha=1)
    model = llama()
    with attach(model, [read_adapter(plain), read_adapter(saved("DoRA"))]).using([[1.0, 0.0], [0.0, 1.0]]):
        rows = logits(model)
    assert_close(rows[0], logits(by_peft(plain, llama))[0])
    assert_close(rows[1], logits(by_peft(saved("DoRA"), llama))[1])


def kinds_of(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, BlendedLinear)}


def test_plain_layers_stay_plain_before_beside_and_after_an_adapter_with_vectors(
    tmp_path: Path, saved: Saved, attach: Attach
) -> None:
    plain = read_adapter(save_adapter(tmp_path / "plain", llama(), seed=3, target_modules=["q_proj", "up_proj"]))
    model = llama()
    blend = attach(model, [plain])
    with blend.using([0.6]):
        alone = logits(model)
    assert kinds_of(model) == {BlendedLinear}
    assert not blend.has_vectors
    blend.add(read_adapter(saved("DoRA"), "dora"))
    assert blend.has_vectors
    assert type(model.get_submodule(LAYERS["q_proj"])) is VectorLinear
    assert type(model.model.layers[0].mlp.up_proj) is BlendedLinear
    with blend.using([0.6, 0.0]):
        assert_close(logits(model), alone)
    blend.add(read_adapter(saved("IA3"), "ia3"))
    blend.remove("dora")
    with blend.using([0.0, 1.0]):
        assert_close(logits(model), logits(by_peft(saved("IA3"), llama)))
    blend.remove("ia3")
    assert not blend.has_vectors
    assert kinds_of(model) == {BlendedLinear}
    with blend.using([0.6]):
        assert torch.equal(logits(model), alone)


@pytest.mark.parametrize("combine", ["linear", "paper"])
def test_other_combines_are_refused_by_name_and_one_adapter_takes_any(
    tmp_path: Path, saved: Saved, combine: str
) -> None:
    plain = read_adapter(save_adapter(tmp_path / "plain", llama(), seed=3))
    dora = read_adapter(saved("DoRA"), "dora")
    with pytest.raises(OptionError, match=rf"combine='{combine}' combines factors alone; dora holds scales or biases"):
        attach_adapters(llama(), [plain, dora], combine=combine)
    model = llama()
    with attach_adapters(model, [dora], combine=combine).using([1.0]):
        assert_close(logits(model), logits(by_peft(saved("DoRA"), llama)))
    mixed = llama()
    twin = replace(plain, name="twin", identity="twin")
    blend = attach_adapters(mixed, [plain, twin, dora])
    with blend.using([[0.3, 0.4, 0.0], [0.0, 0.0, 1.0]], [combine, "sum"], [["plain", "twin"], ["dora"]]):
        rows = logits(mixed)
    assert_close(rows[1], logits(by_peft(saved("DoRA"), llama))[1])
    other = llama()
    with attach_adapters(other, [plain, twin], combine=combine).using([0.3, 0.4]):
        assert_close(rows[0], logits(other)[0])


def test_on_a_half_precision_base_one_hot_is_as_near_to_peft_as_plain_lora(tmp_path: Path, saved: Saved) -> None:
    def half() -> PreTrainedModel:
        return llama().to(torch.bfloat16)

    plain = save_adapter(tmp_path / "plain", llama(), seed=3, lora_alpha=1)
    errors: list[float] = []
    for folder in (plain, saved("DoRA"), saved("IA3")):
        model = half()
        with attach_adapters(model, [read_adapter(folder)]).using([1.0]):
            errors.append(float((logits(model) - logits(by_peft(folder, half))).abs().max()))
    assert max(errors[1:]) <= max(2 * errors[0], 0.02)


@pytest.mark.parametrize("name", OF_LLAMA)
def test_the_engine_decodes_as_one_uncached_forward(
    tmp_path: Path, tokenizer: Any, embedder: Any, saved: Saved, name: str
) -> None:
    """Our own steps know no vectors: the model's own forward runs, also for rows of plain LoRA beside them."""
    plain = save_adapter(tmp_path / "plain", llama(), seed=3, lora_alpha=1)
    names = ("math", "science")
    adapters = [read_adapter(saved(name), "math"), read_adapter(plain, "science")]
    model = llama()
    engine = Engine(model, tokenizer, adapters, fit({name: SAMPLES[name] for name in names}, embedder))
    prompts = ["add three", "planet heat cell the atom"]
    routing = [RoutingParams(every=1), RoutingParams.one("math")]
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


def test_the_weight_of_a_quantised_layer_is_read_through_the_layer() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(64, 48)
    holder = nn.Sequential(layer)
    quantize_(holder, Int8WeightOnlyConfig())
    expected = holder[0].weight.dequantize()
    assert_close(weight_of(holder[0]), expected, 1e-4)
    assert weight_of(gpt2().transformer.h[0].attn.c_attn).shape == (96, 32)


def test_identities_differ_by_vectors(tmp_path: Path, saved: Saved) -> None:
    """vLLM and the server tell adapters apart by them."""
    folder = save(tmp_path / "one", "DoRA")
    before = read_adapter(folder)
    save_file(
        {key: each * 1.5 if "magnitude" in key else each for key, each in load_file(folder / FILE).items()},
        folder / FILE,
    )
    assert read_adapter(folder).identity != before.identity
    assert before.num_bytes() == sum(each.nbytes for each in load_file(folder / FILE).values())
