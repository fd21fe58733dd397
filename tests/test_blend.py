"""The laws of blending, against the real PEFT on a tiny Llama: float32, absolute tolerance 1e-5 on the logits."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, PreTrainedModel

from treadle.common.errors import AdapterError, OptionError
from treadle.common.transformers_names import cache_argument, find_cache
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.blend import ALWAYS_ACTIVE_ROWS, Blend
from treadle.lora.blend import attach as attach_adapters
from treadle.lora.layer import BlendedLinear
from treadle.lora.pair import LoraPair

from conftest import RANKS, SAMPLES, TARGETS, save_adapter, tiny_llama

NAMES = tuple(SAMPLES)
IDS = torch.tensor([[5, 17, 40, 99, 3, 250, 61], [8, 1, 77, 120, 200, 33, 90], [61, 9, 9, 30, 2, 111, 4]])  # (B, T)
ROWS = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.2, 0.4], [1.0, 0.0, 0.0]])  # (B, N)
Q_PROJ = "model.layers.0.self_attn.q_proj"
V_PROJ = "model.layers.1.self_attn.v_proj"
PeftLoader = Callable[..., PeftModel]


def calm_llama() -> LlamaForCausalLM:
    """conftest's Llama with smaller weights: its logits are near 1, so rounding stays far below the tolerance."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.4)
    return model


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def read_all(folders: Mapping[str, Path]) -> list[Adapter]:
    return [read_adapter(folder, name) for name, folder in folders.items()]


def one_hot(name: str) -> list[float]:
    return [float(name == other) for other in NAMES]


def merged(deltas: Callable[[str], Tensor | float], paths: set[str]) -> LlamaForCausalLM:
    """A copy of the base model whose weights (out, in) had explicit updates added."""
    model = calm_llama()
    with torch.no_grad():
        for path in paths:
            model.get_submodule(path).weight += deltas(path)
    return model


def all_paths(adapters: list[Adapter]) -> set[str]:
    return {path for adapter in adapters for path in adapter.pairs}


Attach = Callable[..., Blend]


@pytest.fixture(params={"all active": ALWAYS_ACTIVE_ROWS, "needed active": 0}.items(), ids=lambda param: param[0])
def attach(request: pytest.FixtureRequest) -> Attach:
    """Every law holds for few adapters, which are all active, and for many, of which only the needed ones are."""
    return partial(attach_adapters, always_active_rows=request.param[1])


@pytest.fixture
def model() -> LlamaForCausalLM:
    return calm_llama()


@pytest.fixture(scope="module")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapters of unequal ranks and targets, as gentle as the model."""
    root = tmp_path_factory.mktemp("unequal")
    return {
        name: save_adapter(root / name, seed=index, lora_alpha=index, r=RANKS[name], target_modules=TARGETS[name])
        for index, name in enumerate(NAMES, 1)
    }


@pytest.fixture(scope="module")
def equal_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of equal ranks (4, and 2 on v_proj) and targets, but of different scales."""
    root = tmp_path_factory.mktemp("equal")
    return {
        name: save_adapter(root / name, seed=index, lora_alpha=index, rank_pattern={"v_proj": 2})
        for index, name in enumerate(NAMES, 1)
    }


@pytest.fixture
def unequal(adapter_folders: dict[str, Path]) -> list[Adapter]:
    return read_all(adapter_folders)


@pytest.fixture
def equal(equal_folders: dict[str, Path]) -> list[Adapter]:
    return read_all(equal_folders)


# --- one forward pass equals PEFT -----------------------------------------------------------------------------------


def test_one_hot_weights_are_that_peft_adapter(
    model: PreTrainedModel,
    unequal: list[Adapter],
    adapter_folders: dict[str, Path],
    peft_model: PeftLoader,
    attach: Attach,
) -> None:
    base, peft, blend = logits(model), peft_model(adapter_folders, calm_llama()), attach(model, unequal)
    for name in NAMES:
        peft.set_adapter(name)
        with blend.using(one_hot(name)):
            ours = logits(model)
        assert_close(ours, logits(peft))
        assert (ours - base).abs().max() > 0.1, "the adapter moves nothing: the comparison would be empty"


@pytest.mark.parametrize(
    "weights",
    [[0.2, 0.5, 0.3], [0.0, 0.7, 0.3], [0.9, 0.8, 0.7], [0.0, 0.0, 1.3], [0.013, 0.4, 0.0]],
    ids=str,
)
@pytest.mark.parametrize("folders", ["adapter_folders", "equal_folders"])
def test_sum_is_pefts_cat(
    request: pytest.FixtureRequest, folders: str, weights: list[float], peft_model: PeftLoader, attach: Attach
) -> None:
    """PEFT's cat takes unequal ranks, unequal target modules and rank patterns; so does `sum`."""
    paths: dict[str, Path] = request.getfixturevalue(folders)
    peft, model = peft_model(paths, calm_llama()), calm_llama()
    peft.add_weighted_adapter(list(NAMES), weights, "merged", combination_type="cat")
    peft.set_adapter("merged")
    with attach(model, read_all(paths)).using(weights):
        assert_close(logits(model), logits(peft))


def test_sum_adds_each_adapters_weighted_update_to_the_weights(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    weights = [0.6, 0.3, 0.8]

    def delta(path: str) -> Tensor | float:
        owners = [
            (w, adapter.pairs[path]) for w, adapter in zip(weights, unequal, strict=True) if path in adapter.pairs
        ]
        return sum(w * pair.scale * pair.b @ pair.a for w, pair in owners)

    with attach(model, unequal).using(weights):
        assert_close(logits(model), logits(merged(delta, all_paths(unequal))))


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [0.0, 0.7, 0.6], [1.0, 0.0, 0.0]], ids=str)
def test_linear_is_pefts_linear(
    model: PreTrainedModel,
    equal: list[Adapter],
    equal_folders: dict[str, Path],
    peft_model: PeftLoader,
    weights: list[float],
    attach: Attach,
) -> None:
    peft = peft_model(equal_folders, calm_llama())
    peft.add_weighted_adapter(list(NAMES), weights, "merged", combination_type="linear")
    peft.set_adapter("merged")
    with attach(model, equal, combine="linear").using(weights):
        assert_close(logits(model), logits(peft))


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [0.0, 0.7, 0.6], [1.0, 0.0, 0.0]], ids=str)
def test_paper_is_all_bs_times_the_weighted_as(
    model: PreTrainedModel, equal: list[Adapter], weights: list[float], attach: Attach
) -> None:
    def delta(path: str) -> Tensor:
        pairs = [adapter.pairs[path] for adapter in equal]
        b = sum((pair.b for pair in pairs), torch.zeros(()))  # (out, r)
        a = sum((w * pair.scale * pair.a for w, pair in zip(weights, pairs, strict=True)), torch.zeros(()))  # (r, in)
        return b @ a

    with attach(model, equal, combine="paper").using(weights):
        assert_close(logits(model), logits(merged(delta, all_paths(equal))))


def test_paper_adds_only_the_bs_of_adapters_that_are_there_for_a_row(
    model: PreTrainedModel, equal: list[Adapter], attach: Attach
) -> None:
    few = attach(calm_llama(), equal[:2])
    with few.using([0.2, 0.5], "paper"):
        expected = logits(few.model)
    blend = attach(model, equal)
    with blend.using([0.2, 0.5, 0.0], "paper", [("math", "science")]):
        assert_close(logits(model), expected)
    with blend.using([0.2, 0.5, 0.0], "paper"):
        whole = logits(model)
        assert (whole - expected).abs().max() > 0.1
    with blend.using([[0.2, 0.5, 0.0]] * 3, "paper", [blend.names, ("science", "math"), blend.names]):
        mixed = logits(model)
    assert_close(mixed[1], expected[1])
    assert_close(mixed[[0, 2]], whole[[0, 2]])


def test_others_of_unequal_ranks_do_not_hinder_those_that_are_combined(
    model: PreTrainedModel, adapter_folders: dict[str, Path], equal_folders: dict[str, Path], attach: Attach
) -> None:
    pair = [read_adapter(equal_folders[name], name) for name in ("math", "science")]
    few = attach(calm_llama(), pair)
    blend = attach(model, [read_adapter(adapter_folders["code"], "code"), *pair])  # of rank 3, the others 4
    among, weights = [("math", "science")], [[0.0, 0.2, 0.5]] * 3
    for combine in ("linear", "paper"):
        with few.using([0.2, 0.5], combine):
            expected = logits(few.model)
        with blend.using(weights, combine, among):
            assert_close(logits(model), expected)
        with blend.using([*weights[:2], [1.0, 0.2, 0.5]], [combine, combine, "sum"], [*among * 2, blend.names]):
            assert_close(logits(model)[:2], expected[:2])
    with pytest.raises(OptionError, match="math, science differ from code"):
        blend.set_weights(weights, "linear")


def test_one_hot_gives_the_adapter_back_in_sum_and_linear_but_not_in_paper(
    model: PreTrainedModel, equal: list[Adapter], attach: Attach
) -> None:
    blend = attach(model, equal)
    answers = {}
    for combine in ("sum", "linear", "paper"):
        with blend.using(one_hot("science"), combine):
            answers[combine] = logits(model)
    blend.detach()
    alone = attach(model, equal[1:2])
    with alone.using([1.0]):
        expected = logits(model)
    assert_close(answers["sum"], expected)
    assert_close(answers["linear"], expected)
    assert (answers["paper"] - expected).abs().max() > 0.1


@pytest.mark.parametrize("combine", ["linear", "paper"])
def test_one_adapter_combines_in_any_way(
    model: PreTrainedModel, unequal: list[Adapter], combine: str, attach: Attach
) -> None:
    blend = attach(model, unequal[:1])
    with blend.using([0.7]):
        expected = logits(model)
    with blend.using([0.7], combine):
        assert_close(logits(model), expected)


def test_a_targeted_output_layer_with_tied_weights_is_pefts(
    tmp_path: Path, peft_model: PeftLoader, attach: Attach
) -> None:
    def tied() -> LlamaForCausalLM:
        model = calm_llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    folder = save_adapter(tmp_path / "head", target_modules=["q_proj", "lm_head"])
    model = tied()
    with attach(model, [read_adapter(folder)]).using([1.0]):
        assert_close(logits(model), logits(peft_model({"head": folder}, tied())))


def test_gradients_reach_the_inputs_as_in_peft(
    model: PreTrainedModel,
    unequal: list[Adapter],
    adapter_folders: dict[str, Path],
    peft_model: PeftLoader,
    attach: Attach,
) -> None:
    embedded = model.get_input_embeddings()(IDS).detach()  # (B, T, D)

    def gradient(of: nn.Module) -> Tensor:
        x = embedded.clone().requires_grad_()
        loss = of(inputs_embeds=x).logits.log_softmax(-1)[..., 7].mean()
        return torch.autograd.grad(loss, x)[0]

    peft = peft_model(adapter_folders, calm_llama())
    peft.set_adapter("code")
    with attach(model, unequal).using(one_hot("code")):
        assert_close(gradient(model), gradient(peft))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_blended_as_precisely_as_by_peft(
    unequal: list[Adapter], adapter_folders: dict[str, Path], peft_model: PeftLoader, dtype: torch.dtype, attach: Attach
) -> None:
    half, exact = calm_llama().to(dtype), calm_llama().to(dtype).float()
    base = logits(half)
    peft = peft_model(adapter_folders, calm_llama().to(dtype))
    peft.set_adapter("math")
    with attach(exact, unequal).using(one_hot("math")):
        expected = logits(exact)
    blend = attach(half, unequal)
    with blend.using(one_hot("math")):
        ours = logits(half)
    with blend.using([0.0, 0.0, 0.0]):
        assert torch.equal(logits(half), base)
    assert ours.dtype == dtype
    error, pefts_error = ((x.float() - expected).abs().mean() for x in (ours, logits(peft)))
    assert error < 1.5 * pefts_error


# --- the base model stays what it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["sum", "linear", "paper"])
def test_no_weights_and_zero_weights_are_the_base_model_bit_for_bit(
    model: PreTrainedModel, equal: list[Adapter], combine: str, attach: Attach
) -> None:
    base = logits(model)
    blend = attach(model, equal, combine=combine)
    assert torch.equal(logits(model), base)
    blend.set_weights([0.0, 0.0, 0.0])
    assert torch.equal(logits(model), base)
    blend.set_weights([0.3, 0.3, 0.3])
    assert not torch.equal(logits(model), base)
    blend.set_weights(None)
    assert torch.equal(logits(model), base)


def test_detach_leaves_the_same_modules_keys_and_logits(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    modules, keys, base = list(model.named_modules()), list(model.state_dict()), logits(model)
    blend = attach(model, unequal)
    blend.set_weights([0.3, 0.3, 0.3])
    logits(model)
    blend.detach()
    after = list(model.named_modules())
    assert [path for path, _ in after] == [path for path, _ in modules]
    assert all(now is before for (_, now), (_, before) in zip(after, modules, strict=True))
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), base)
    assert blend.names == ()


def test_base_weights_are_never_written_to(model: PreTrainedModel, unequal: list[Adapter], attach: Attach) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blend = attach(model, unequal)
    with blend.using([0.5, 0.5, 0.5]):
        logits(model)
    blend.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_using_restores_the_weights_before_it_also_nested_and_after_an_error(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    base, blend = logits(model), attach(model, unequal)
    with blend.using(one_hot("math")):
        outer = logits(model)
        with blend.using(one_hot("code")):
            assert not torch.equal(logits(model), outer)
            with blend.using(None):
                assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), outer)
        with pytest.raises(KeyError), blend.using(one_hot("science")):
            raise KeyError
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), base)


def test_refused_weights_leave_the_weights_before_them(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    blend = attach(model, unequal)
    with blend.using(one_hot("math")):
        expected = logits(model)
        with pytest.raises(OptionError), blend.using([1.0]):
            pass
        assert torch.equal(logits(model), expected)
        with pytest.raises(OptionError):
            blend.set_weights([0.5, 0.5, 0.5], "linear")
        assert torch.equal(logits(model), expected)


def test_blends_on_two_models_do_not_know_each_other(unequal: list[Adapter], attach: Attach) -> None:
    one, two = calm_llama(), calm_llama()
    base = logits(one)
    first, second = attach(one, unequal), attach(two, unequal[:1])
    with first.using(one_hot("code")), second.using([1.0]):
        code, math = logits(one), logits(two)
    assert torch.equal(logits(one), base)
    assert not torch.equal(code, math)
    with first.using(one_hot("math")):
        assert_close(logits(one), math)
        assert torch.equal(logits(two), base)
    first.detach()
    with second.using([1.0]):
        assert torch.equal(logits(two), math)


# --- weights are row data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["sum", "linear", "paper"])
def test_each_row_of_a_batch_is_that_row_alone(
    model: PreTrainedModel, equal: list[Adapter], combine: str, attach: Attach
) -> None:
    blend = attach(model, equal, combine=combine)
    with blend.using(ROWS):
        batch = logits(model)
    for row, weights in enumerate(ROWS):
        with blend.using(weights):
            assert_close(batch[row : row + 1], logits(model, IDS[row : row + 1]))


def test_rows_of_different_combines_share_a_batch(model: PreTrainedModel, equal: list[Adapter], attach: Attach) -> None:
    blend = attach(model, equal)
    combines = ["linear", "sum", "paper"]
    with blend.using(ROWS, combines):
        batch = logits(model)
    for row, combine in enumerate(combines):
        with blend.using(ROWS[row], combine):
            assert_close(batch[row : row + 1], logits(model, IDS[row : row + 1]))


def test_a_row_without_weights_is_the_base_row(model: PreTrainedModel, unequal: list[Adapter], attach: Attach) -> None:
    base = logits(model)
    rows = torch.tensor([one_hot("math"), [0.0, 0.0, 0.0], one_hot("code")])
    with attach(model, unequal).using(rows):
        assert torch.equal(logits(model)[1], base[1])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_position_t_of_a_layer_is_updated_by_the_weights_of_t(
    model: PreTrainedModel, unequal: list[Adapter], num_rows: int, attach: Attach
) -> None:
    torch.manual_seed(1)
    weights, x = torch.rand(num_rows, 5, 3), torch.randn(3, 5, 32)  # (B|1, T, N), (B, T, in)
    original = model.get_submodule(Q_PROJ)
    with torch.no_grad(), attach(model, unequal).using(weights):
        y = model.get_submodule(Q_PROJ)(x)
    for row in range(3):
        for t in range(5):
            pairs = [adapter.pairs[Q_PROJ] for adapter in unequal]
            w = weights[row % num_rows, t]
            delta = sum(w[i] * pair.scale * pair.b @ pair.a for i, pair in enumerate(pairs))
            assert_close(y[row, t], original(x[row, t]).detach() + delta @ x[row, t])


@pytest.mark.parametrize("combine", ["sum", "linear", "paper"])
def test_one_forward_with_weights_of_every_token_is_cached_decoding(
    model: PreTrainedModel, equal: list[Adapter], combine: str, attach: Attach
) -> None:
    torch.manual_seed(2)
    weights = torch.rand(3, IDS.shape[1], 3)  # (B, T, N)
    blend = attach(model, equal, combine=combine)
    with blend.using(weights):
        whole = logits(model)
    cache, steps = None, []
    with torch.no_grad():
        for t in range(IDS.shape[1]):
            with blend.using(weights[:, t]):
                out = model(IDS[:, t : t + 1], use_cache=True, **{cache_argument(model): cache})
            cache = find_cache(out)
            steps.append(out.logits)
    assert_close(torch.cat(steps, 1), whole)


def test_weights_of_one_shape_broadcast_like_their_expansion(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    blend, w = attach(model, unequal), torch.tensor([0.2, 0.5, 0.3])
    with blend.using(w):
        expected = logits(model)
    for same in (w.tolist(), w.numpy().astype(np.float64), w.expand(3, 3), w.expand(1, 7, 3), w.expand(3, 7, 3)):
        with blend.using(same):
            assert_close(logits(model), expected)


# --- the work of a pass ---------------------------------------------------------------------------------------------


class CountedProducts(TorchDispatchMode):
    """Counts the matrix products inside it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, counted if it is a product."""
        self.count += func.__name__.split(".")[0] in {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
        return func(*args, **(kwargs or {}))


def count_products(model: PreTrainedModel) -> int:
    with CountedProducts() as counted:
        logits(model)
    return counted.count


def test_a_pass_makes_one_product_an_input_and_one_a_layer_however_many_adapters(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    base = count_products(model)
    for adapters in (unequal[:1], unequal):
        blend = attach(model, adapters)
        layers = [path for path, module in model.named_modules() if isinstance(module, BlendedLinear)]
        inputs = {re.sub("(q|k|v)_proj$", "qkv", re.sub("(gate|up)_proj$", "gate_up", path)) for path in layers}
        with blend.using([0.5] * len(adapters)):
            assert count_products(model) == base + len(inputs) + len(layers)
        blend.detach()
    assert len(inputs) < len(layers), "nothing shares an input: the comparison would be empty"


def test_layers_that_share_a_product_may_read_other_inputs_and_in_any_order(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    blend = attach(model, unequal)
    attention = model.get_submodule("model.layers.0.self_attn")
    names = [name for name in ("v_proj", "k_proj", "q_proj") if isinstance(getattr(attention, name), BlendedLinear)]
    x, other = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    with torch.no_grad(), blend.using([0.5, 0.3, 0.2]):
        expected = {name: [getattr(attention, name)(each.clone()) for each in (x, other)] for name in names}
        for name in names * 2:  # a pass that broke off leaves products behind: nobody may take them for another input
            assert_close(getattr(attention, name)(x), expected[name][0])
            assert_close(getattr(attention, name)(other), expected[name][1])
    assert len(names) > 1


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Nine adapters of rank 16: so many that only the needed ones are active."""
    root = tmp_path_factory.mktemp("many")
    names = [f"a{index}" for index in range(9)]
    assert 9 * 16 > ALWAYS_ACTIVE_ROWS
    return [read_adapter(save_adapter(root / name, seed=seed, r=16), name) for seed, name in enumerate(names)]


def test_of_many_adapters_only_those_that_act_are_computed(many: list[Adapter]) -> None:
    model, few = calm_llama(), calm_llama()
    blend, pair = attach_adapters(model, many), attach_adapters(few, [many[2], many[7]])
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, BlendedLinear)
    for weights in ([0.6, 0.3], [0.2, 0.9], [0.0, 0.4], [0.5, 0.0]):
        full = np.zeros(9, np.float32)
        full[[2, 7]] = weights
        blend.set_weights(full)
        pair.set_weights(weights)
        assert_close(logits(model), logits(few))
        assert layer.b_active.shape[1] == 32, "two of nine, also where one of them is enough"
    blend.set_weights(np.eye(9, dtype=np.float32)[4])
    assert layer.b_active.shape[1] == 16
    blend.set_weights([0.1] * 9)
    assert layer.b_active.shape[1] == 9 * 16


def test_factors_are_in_memory_once(model: PreTrainedModel, unequal: list[Adapter], attach: Attach) -> None:
    blend = attach(model, unequal)
    for adapter, given in zip(blend.adapters, unequal, strict=True):
        for path, pair in adapter.pairs.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, BlendedLinear)
            assert torch.equal(pair.a, given.pairs[path].a)
            assert torch.equal(pair.b, given.pairs[path].b)
            assert pair.a.untyped_storage().data_ptr() == layer.stacked_a.a_all.untyped_storage().data_ptr()
            assert pair.b.untyped_storage().data_ptr() == layer.b_all.untyped_storage().data_ptr()


def held_bytes(model: PreTrainedModel) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def halved(adapter: Adapter) -> Adapter:
    """Return the adapter in bfloat16, as most are on disk."""
    halves = {path: replace(pair, a=pair.a.bfloat16(), b=pair.b.bfloat16()) for path, pair in adapter.pairs.items()}
    return replace(adapter, pairs=halves)


def test_many_adapters_take_their_own_bytes_and_a_copy_of_those_that_act(many: list[Adapter]) -> None:
    halves = [halved(adapter) for adapter in many]
    own = sum(adapter.num_bytes() for adapter in halves)
    model = calm_llama()
    base = held_bytes(model)
    blend = attach_adapters(model, halves[:8])
    blend.add(halves[8])
    assert held_bytes(model) == base + own
    blend.set_weights(np.eye(9, dtype=np.float32)[4])
    logits(model)
    assert held_bytes(model) == base + own + 2 * own // 9, "one of nine, in float32"


def test_a_text_between_two_domains_copies_no_factors_again(many: list[Adapter]) -> None:
    blend = attach_adapters(calm_llama(), many)
    one, other = np.zeros(9, np.float32), np.zeros(9, np.float32)
    one[[1, 2, 3]], other[[2, 3, 4]] = 0.3, 0.3
    for weights in (one, other):
        blend.set_weights(weights)
    stacks = blend.active_stacks
    for weights in (one, other, one, other):
        blend.set_weights(weights)
        assert blend.active_stacks is stacks


# --- adapters come and go -------------------------------------------------------------------------------------------


def test_added_and_removed_adapters_are_the_set_attached_from_the_start(unequal: list[Adapter], attach: Attach) -> None:
    math, science, code = unequal
    model, fresh = calm_llama(), calm_llama()
    blend, reference = attach(model, [math]), attach(fresh, [code, math])
    blend.set_weights([0.7])
    blend.add(science, code)
    assert blend.names == NAMES
    assert torch.equal(logits(model), logits(fresh)), "weights of the adapters before are still in force"
    blend.set_weights([0.1, 0.2, 0.3])
    blend.remove("science")
    blend.remove("math")
    blend.add(math)
    assert blend.names == reference.names == ("code", "math")
    assert list(model.state_dict()) == list(fresh.state_dict())
    with blend.using([0.4, 0.9]), reference.using([0.4, 0.9]):
        assert torch.equal(logits(model), logits(fresh))


def broken(adapter: Adapter, **changes: object) -> Adapter:
    pairs = {path: LoraPair(pair.a[:, :-1], pair.b, pair.scale) for path, pair in adapter.pairs.items()}
    return replace(adapter, name="broken", pairs=pairs, **changes)


@pytest.mark.parametrize("failure", ["shape", "name", "combine"])
def test_a_failed_add_changes_nothing(
    model: PreTrainedModel, equal: list[Adapter], failure: str, attach: Attach
) -> None:
    other = replace(equal[0], name="other", pairs={Q_PROJ: equal[0].pairs[Q_PROJ]})
    bad = {"shape": broken(equal[2]), "name": equal[0], "combine": other}[failure]
    blend = attach(model, equal[:2], combine="linear")
    modules, names = list(model.modules()), blend.names
    blend.set_weights([0.5, 0.8])
    expected = logits(model)
    with pytest.raises((AdapterError, OptionError)):
        blend.add(equal[2], bad)
    assert blend.names == names
    assert torch.equal(logits(model), expected)
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))


def test_removing_an_unknown_adapter_is_refused_with_the_nearest_name(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    blend = attach(model, unequal)
    with pytest.raises(AdapterError, match=r"unknown adapter 'maths'\. Did you mean 'math'"):
        blend.remove("maths")
    assert blend.names == NAMES


def test_a_model_takes_one_blend_at_a_time(model: PreTrainedModel, unequal: list[Adapter], attach: Attach) -> None:
    blend = attach(model, unequal[:1])
    with pytest.raises(AdapterError, match=r"attached already: detach\(\) it, or add\(\) to it"):
        attach(model, unequal[1:])
    blend.detach()
    assert attach(model, unequal[1:]).names == NAMES[1:]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["linear", "paper"])
def test_unequal_adapters_are_refused_by_name_with_the_way_out(
    model: PreTrainedModel, unequal: list[Adapter], combine: str, attach: Attach
) -> None:
    message = f"combine='{combine}' needs adapters of equal ranks.*science, code differ from math.*combine='sum'"
    with pytest.raises(OptionError, match=message):
        attach(model, unequal, combine=combine)
    blend: Blend = attach(model, unequal)
    with pytest.raises(OptionError, match=message):
        blend.set_weights(ROWS, ["sum", combine, "sum"])


def test_an_unknown_combine_is_refused_with_the_nearest_name(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    with pytest.raises(OptionError, match=r"unknown combine 'liner'\. Did you mean 'linear'"):
        attach(model, unequal, combine="liner")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], r"shape \(2,\); expected \(N,\), \(B, N\) or \(B, T, N\) with N = 3: math, science, code"),
        (torch.ones(3, 4), r"shape \(3, 4\)"),
        (torch.ones(1, 1, 1, 3), r"shape \(1, 1, 1, 3\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        ([0.5, -0.1, 0.5], "finite and not negative"),
        ([0.5, float("nan"), 0.5], "finite and not negative"),
        (np.array([[0.5, np.inf, 0.5]]), "finite and not negative"),
    ],
    ids=["count", "row count", "four axes", "scalar", "negative", "NaN", "infinite"],
)
def test_weights_that_mean_nothing_are_refused(
    model: PreTrainedModel, unequal: list[Adapter], weights: Tensor, message: str, attach: Attach
) -> None:
    with pytest.raises(OptionError, match=message):
        attach(model, unequal).set_weights(weights)


def test_everything_that_does_not_fit_the_model_is_one_message_and_nothing_is_attached(
    model: PreTrainedModel, unequal: list[Adapter], attach: Attach
) -> None:
    math, science, code = unequal
    foreign = replace(math, pairs={"model.layers.9.self_attn.q_proj": math.pairs[V_PROJ]})
    narrow = LoraPair(science.pairs[Q_PROJ].a[:, :16], science.pairs[Q_PROJ].b, 1.0)
    modules = list(model.modules())
    with pytest.raises(AdapterError) as caught:
        attach(model, [foreign, replace(science, pairs={**science.pairs, Q_PROJ: narrow}), code, code])
    assert str(caught.value).splitlines() == [
        "the adapters do not fit the model; name the base that they were trained on, or leave them out:",
        "  - two adapters are called 'code'",
        f"  - science: {Q_PROJ} is (32, 32) (in, out), its factors are (16, 32)",
        "  - math: the model has no module model.layers.9.self_attn.q_proj",
    ]
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))
