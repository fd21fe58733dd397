"""Reading PEFT folders as people have them: each is blended as PEFT loads it, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from treadle.common.errors import AdapterError
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.blend import attach
from treadle.lora.compatibility import check_range

from conftest import BASE, calm, edit_config, save_adapter, tiny_llama

IDS = torch.tensor([[5, 17, 40, 99, 3, 250, 61]])  # (B, T)
LAYER = "base_model.model.model.layers.0.self_attn"
Q_A, Q_B, V_A, V_B = (f"{LAYER}.{module}.lora_{side}.weight" for module in ("q_proj", "v_proj") for side in "AB")
Tensors = dict[str, Tensor]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def blended(adapter: Adapter, model: PreTrainedModel | None = None) -> Tensor:
    """Return the logits with one adapter at weight 1, after checking that it moves them at all."""
    model = model if model is not None else calm(tiny_llama())
    base, blend = logits(model), attach(model, [adapter])
    with blend.using([1.0]):
        answer = logits(model)
    assert (answer - base).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    return answer


def by_peft(folder: Path, model: PreTrainedModel | None = None) -> Tensor:
    model = model if model is not None else calm(tiny_llama())
    return logits(PeftModel.from_pretrained(model, folder).eval())


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Edit an adapter's tensors on disk."""
    file = folder / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)


def without(tensors: Tensors, *keys: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter that a test may damage."""
    return save_adapter(tmp_path / "math")


def problems_of(folder: Path) -> list[str]:
    """Return the problems that `read_adapter` lists for a folder, without their bullets."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    head, *problems = str(caught.value).splitlines()
    assert head == f"adapter 'math' ({folder}) cannot be blended:"
    return [problem.removeprefix("  - ") for problem in problems]


# --- folders that load ----------------------------------------------------------------------------------------------

LOADABLE: dict[str, dict[str, object]] = {
    "alpha below the rank": {"lora_alpha": 1},
    "alpha with a fraction": {"lora_alpha": 2.5},
    "rank_pattern by name": {"rank_pattern": {"v_proj": 2}},
    "rank_pattern by expression": {"rank_pattern": {r"layers\.1\..*q_proj": 6, "q_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"layers.1.self_attn.q_proj": 1, "v_proj": 16}},
    "both patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 5}},
    "rsLoRA": {"use_rslora": True, "r": 7, "lora_alpha": 3},
    "rsLoRA with both patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q_proj": 2, "v_proj": 4},
    },
    "targets as an expression": {"target_modules": r".*\.1\.(self_attn\.(q|v)|mlp\.up)_proj"},
    "targets as a list of paths": {"target_modules": ["model.layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "one layer of two": {"layers_to_transform": 1},
    "a list of layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "excluded by name": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "excluded by expression": {"exclude_modules": r".*layers\.0.*"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("config", LOADABLE.values(), ids=LOADABLE)
def test_a_folder_that_peft_wrote_is_blended_as_peft_loads_it(tmp_path: Path, config: dict[str, object]) -> None:
    folder = save_adapter(tmp_path / "math", **{"lora_alpha": 2, **config})
    assert_close(blended(read_adapter(folder)), by_peft(folder))


def test_targets_left_as_all_linear_are_blended_as_peft_loads_them(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "math", target_modules="all-linear", lora_alpha=2)
    edit_config(folder, target_modules="all-linear")
    assert_close(blended(read_adapter(folder)), by_peft(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_factors_of_any_float_type_are_blended_as_peft_loads_them(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    adapter = read_adapter(folder)
    assert {pair.a.dtype for pair in adapter.pairs.values()} == {dtype}
    assert_close(blended(adapter), by_peft(folder))


def test_adapters_of_different_float_types_are_stacked_together(folder: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "code", seed=1, lora_alpha=2)
    edit_tensors(other, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    model = calm(tiny_llama())
    with attach(model, [read_adapter(folder), read_adapter(other)]).using([0.0, 1.0]):
        assert_close(logits(model), by_peft(other))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_conv1d_layers_are_blended_as_peft_loads_them_whatever_the_config_says(
    tmp_path: Path, fan_in_fan_out: bool
) -> None:
    def model() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.2)
        return GPT2LMHeadModel(config).eval()

    folder = save_adapter(tmp_path / "math", model(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    expected = by_peft(folder, model())
    edit_config(folder, fan_in_fan_out=fan_in_fan_out)
    assert_close(blended(read_adapter(folder), model()), expected)


@pytest.mark.parametrize(
    ("written", "found"),
    [(".weight", ".default.weight"), (".weight", ".math.weight"), ("base_model.model.", "")],
    ids=["adapter name default", "adapter name math", "no prefix"],
)
def test_keys_of_other_peft_versions_are_read_alike(folder: Path, written: str, found: str) -> None:
    expected = by_peft(folder)
    edit_tensors(folder, lambda tensors: {key.replace(written, found): tensor for key, tensor in tensors.items()})
    assert_close(blended(read_adapter(folder)), expected)


def test_the_config_of_the_first_peft_is_read(folder: Path) -> None:
    expected = by_peft(folder)
    old = {
        "base_model_name_or_path": BASE,
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(old))
    assert_close(blended(read_adapter(folder)), expected)


def test_an_adapter_knows_its_name_base_and_size(folder: Path) -> None:
    adapter = read_adapter(folder)
    assert (adapter.name, adapter.base_model, adapter.source) == ("math", BASE, folder)
    assert read_adapter(folder, "sums").name == read_adapter(str(folder), "sums").name == "sums"
    assert adapter.num_bytes() == sum(
        tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values()
    )


def test_one_zero_factor_among_others_is_no_problem(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {Q_B: tensors[Q_B] * 0})
    assert_close(blended(read_adapter(folder)), by_peft(folder))


TRAINING = {
    "regex that matches nothing": {"target_modules": r".*vision_tower.*q_proj"},
    "no expression": {"target_modules": "*q_proj"},
    "more modules than there are tensors": {"target_modules": ["q_proj", "k_proj", "gate_proj"]},
    "parameters of experts": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "excluded": {"exclude_modules": "(" * 3000 + ")" * 3000},
    "layers": {"layers_to_transform": [7]},
    "nothing": {"target_modules": None},
}


@pytest.mark.parametrize("change", TRAINING.values(), ids=TRAINING)
def test_the_tensors_say_what_was_trained_whatever_training_was_asked_for(
    folder: Path, change: dict[str, object]
) -> None:
    expected = by_peft(folder)
    edit_config(folder, **change)
    assert_close(blended(read_adapter(folder)), expected)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT's are zero there
def test_modules_without_tensors_are_left_alone_as_by_peft(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: without(tensors, V_A, V_B))
    assert_close(blended(read_adapter(folder)), by_peft(folder))


# --- features that are refused by name ------------------------------------------------------------------------------

WRITTEN_BY_PEFT: dict[str, tuple[dict[str, object], str]] = {
    "saved tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: it replaces rows of the embedding"),
    "aLoRA": ({"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens: an activated LoRA acts only after"),
    "fast PiSSA": (
        {"init_lora_weights": "pissa_niter_2"},
        "init_lora_weights='pissa_niter_2': its initial factors were",
    ),
    "saved norms": ({"modules_to_save": ["norm"]}, "layernorm.weight: a whole weight that is no matrix (modules_to_s"),
}


@pytest.mark.parametrize(("config", "message"), WRITTEN_BY_PEFT.values(), ids=WRITTEN_BY_PEFT)
def test_what_is_not_a_sum_of_updates_is_refused_by_name(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    folder = save_adapter(tmp_path / "math", **config)
    assert any(message in problem for problem in problems_of(folder))


# --- fields that this version does not know -------------------------------------------------------------------------


def test_an_unknown_field_that_is_set_is_a_warning_that_names_it(folder: Path) -> None:
    edit_config(folder, use_new_trick=True, other_trick={"k": 1}, unused_trick=None, off_trick=False)
    with pytest.warns(
        UserWarning, match="^adapter 'math': unknown fields that may matter: other_trick, use_new_trick$"
    ):
        adapter = read_adapter(folder)
    assert adapter.pairs.keys() == {f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qv"}


def test_no_field_of_the_installed_pefts_config_is_unknown(folder: Path) -> None:
    """A new PEFT field must be sorted into refused or harmless, not discovered by a user."""
    from peft import LoraConfig

    from treadle.lora.peft_folder import HARMLESS_FIELDS, REFUSED_FEATURES

    written = LoraConfig().to_dict().keys() | json.loads((folder / "adapter_config.json").read_text()).keys()
    assert written <= HARMLESS_FIELDS | REFUSED_FEATURES.keys()


# --- numbers that overflow ------------------------------------------------------------------------------------------


def scaled(side: str, factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: x * factor if f"lora_{side}" in key else x for key, x in tensors.items()}


def test_an_update_that_overflows_in_the_models_dtype_alone_is_refused_on_attaching(folder: Path) -> None:
    edit_tensors(folder, scaled("A", 3e4))
    adapter = read_adapter(folder)
    attach(tiny_llama(), [adapter]).detach()  # on a CPU, updates are computed in float32
    check_range([adapter], torch.bfloat16)
    with pytest.raises(AdapterError, match=r"(?s)math: model.layers.0.*too large for float16.*v_proj") as caught:
        check_range([adapter], torch.float16)
    assert len(str(caught.value).splitlines()) == 5
