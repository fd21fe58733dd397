"""The CPU step computes the same as the model's own forward, for every architecture that it knows."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from treadle.common.errors import OptionError
from treadle.common.params import Combine, RoutingParams, SamplingParams
from treadle.common.transformers_names import cache_argument
from treadle.engine.engine import Completion, Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cpu.layouts import (
    ColumnMajor,
    DuplicatedColumn,
    GemmLayout,
    PackedRowMajor,
    VectorLayout,
    fastest_layout,
)
from treadle.engine.runners.cpu.packing import DEFAULT_PACK_BYTES, can_pack, packs_by_default
from treadle.engine.runners.cpu.step import FastStep
from treadle.engine.runners.decoder import ARCHITECTURES, fits
from treadle.engine.runners.passes import PassInput
from treadle.engine.runners.runner import Runner
from treadle.experiments.pools import random_adapters
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.blend import ALWAYS_ACTIVE_ROWS, Blend, attach
from treadle.lora.layer import BlendedLinear
from treadle.lora.pair import LoraPair
from treadle.routing.centroids import Floats
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit
from treadle.routing.router import Router
from treadle.routing.running_sum import Sums
from treadle.routing.schedule import Seen

from conftest import SAMPLES, TINY, save_adapter

SIZES = TINY | {"max_position_embeddings": 256, "initializer_range": 0.2}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["add three plus four", "the planet", "def loop return list of the cell", "sum", "heat the atom", "list"]
ROUTINGS = [
    RoutingParams(every=1, temperature=5.0),
    RoutingParams.base(),
    RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.5}),
    RoutingParams(every=2, combine="linear", temperature=5.0),
    RoutingParams(every=2, combine="paper", temperature=5.0),
    RoutingParams(every=3, past="recompute", window=8, temperature=5.0),
]


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Make a tiny model whose biases and norms are random too."""
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**(SIZES | options))
    model = getattr(transformers, name)(config)
    for path, parameter in model.named_parameters():
        if path.endswith("bias") or "norm" in path:
            nn.init.normal_(parameter, mean=float("norm" in path), std=0.1)
    return model.to(dtype).eval()


class Variant(NamedTuple):
    """One way in which the step may hold factors and weights."""

    always_active_rows: int = ALWAYS_ACTIVE_ROWS
    is_packed: bool = False

    def step(self, model: PreTrainedModel, blend: Blend, *, on_amd: bool | None = None) -> FastStep:
        return FastStep(model, blend, pack=self.packs(model.dtype), on_amd=on_amd)

    def packs(self, dtype: torch.dtype) -> bool:
        return self.is_packed and can_pack(dtype)  # not all CPUs pack bfloat16

    def attach(self, model: PreTrainedModel, adapters: Sequence[Adapter]) -> Blend:
        return attach(model, adapters, always_active_rows=self.always_active_rows)


VARIANTS = {"all active": Variant(), "needed active": Variant(always_active_rows=0), "packed": Variant(is_packed=True)}
MakeEngine = Callable[..., Engine]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Few adapters, which are all active; many, of which the needed ones are; and packed weights."""
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of equal ranks on all linear layers; the four architectures have the same shapes."""
    root = tmp_path_factory.mktemp("all-linear")
    return {
        name: save_adapter(root / name, build("LlamaForCausalLM"), seed, target_modules=ALL_LINEAR)
        for seed, name in enumerate(SAMPLES, 1)
    }


@pytest.fixture(scope="module")
def make_engine(folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, router: Router) -> MakeEngine:
    """Make an engine; with a variant, its step runs in that."""

    def make(
        model: PreTrainedModel, *, is_fast: bool, variant: Variant | None = None, on_amd: bool | None = None
    ) -> Engine:
        adapters = [read_adapter(folder, name) for name, folder in folders.items()]
        engine = Engine(model, tokenizer, adapters, router, is_fast=is_fast and not variant)
        if is_fast and variant:
            run_in(engine, variant, on_amd=on_amd)
        return engine

    return make


def run_in(engine: Engine, variant: Variant, *, on_amd: bool | None = None) -> None:
    """Let an engine's steps run in a variant."""
    model, blend = engine.model, engine.blend
    blend.always_active_rows = variant.always_active_rows
    blend.take(blend.plan(blend.adapters))
    engine.runner = Runner(model, blend, [variant.step(model, blend, on_amd=on_amd)])


def build_known(name: str) -> PreTrainedModel:
    """Make a model that the step knows."""
    return build(name, **({"sliding_window": None} if name.startswith("Mistral") else {}))


@pytest.fixture(scope="module")
def plain_answers(make_engine: MakeEngine) -> Callable[[str, int], list[list[Completion]]]:
    """Answers of a model's own forward to all prompts, `num_rows` at once; made once a module."""

    @cache
    def answers(name: str, num_rows: int) -> list[list[Completion]]:
        engine = make_engine(build_known(name), is_fast=False)
        assert not engine.is_fast
        return mixed_rows(engine, num_rows)

    return answers


def mixed_rows(engine: Engine, num_rows: int) -> list[list[Completion]]:
    """Generate from all prompts, `num_rows` at once, each with another routing."""
    sampling = SamplingParams(max_tokens=8)
    rows = [slice(first, first + num_rows) for first in range(0, len(PROMPTS), num_rows)]
    return [engine.generate(PROMPTS[some], sampling=sampling, routing=ROUTINGS[some]) for some in rows]


def assert_same(fast: list[Completion], plain: list[Completion]) -> None:
    for a, b in zip(fast, plain, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=5e-5)
        np.testing.assert_allclose(a.weights, b.weights, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_fast_is_forward_for_mixed_rows(
    make_engine: MakeEngine,
    plain_answers: Callable[[str, int], list[list[Completion]]],
    variant: Variant,
    name: str,
    num_rows: int,
) -> None:
    engine = make_engine(build_known(name), is_fast=True, variant=variant)
    assert engine.is_fast
    for fast, plain in zip(mixed_rows(engine, num_rows), plain_answers(name, num_rows), strict=True):
        assert_same(fast, plain)


@pytest.mark.parametrize("on_amd", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_every_layout_is_forward(
    make_engine: MakeEngine,
    plain_answers: Callable[[str, int], list[list[Completion]]],
    variant: Variant,
    num_rows: int,
    on_amd: bool,
) -> None:
    name = "Qwen2ForCausalLM"
    engine = make_engine(build(name), is_fast=True, variant=variant, on_amd=on_amd)
    for fast, plain in zip(mixed_rows(engine, num_rows), plain_answers(name, num_rows), strict=True):
        assert_same(fast, plain)


@pytest.mark.parametrize(
    ("dtype", "on_amd", "kinds"),
    [
        (torch.float32, True, [DuplicatedColumn, ColumnMajor, ColumnMajor, ColumnMajor, GemmLayout]),
        (torch.bfloat16, True, [GemmLayout, GemmLayout, ColumnMajor, ColumnMajor, GemmLayout]),
        (torch.float32, False, [VectorLayout, GemmLayout, ColumnMajor, ColumnMajor, GemmLayout]),
        (torch.bfloat16, False, [VectorLayout, ColumnMajor, ColumnMajor, GemmLayout, GemmLayout]),
    ],
)
def test_the_layout_follows_the_machine(dtype: torch.dtype, on_amd: bool, kinds: list[type[GemmLayout]]) -> None:
    def found(*rows: int, has_packs: bool) -> list[type[GemmLayout]]:
        layouts = [fastest_layout(each, dtype, has_packs=has_packs, on_amd=on_amd, has_mkl=True) for each in rows]
        return [type(layout) for layout in layouts]

    assert found(1, 2, 8, 32, 33, has_packs=False) == kinds
    first = kinds[0] if dtype == torch.float32 else PackedRowMajor  # one row of float32 is slower so
    assert found(1, 2, 33, has_packs=True) == [first, PackedRowMajor, PackedRowMajor]


class Reference(NamedTuple):
    """Logits (B, V) of the last of nine tokens by the model's own forward, in float32 and in bfloat16."""

    ids: Tensor
    exact: Tensor
    rounded: Tensor


@cache
def reference(num_rows: int) -> Reference:
    ids = torch.randint(0, 256, (num_rows, 9), generator=torch.Generator().manual_seed(0))
    models = build("LlamaForCausalLM"), build("LlamaForCausalLM", torch.bfloat16)
    with torch.inference_mode():
        return Reference(ids, *(model(input_ids=ids, logits_to_keep=1).logits[:, -1] for model in models))


@pytest.mark.parametrize("on_amd", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_bfloat16_is_as_close_to_float32_as_forward_is(variant: Variant, num_rows: int, on_amd: bool) -> None:
    ids, exact, rounded = reference(num_rows)

    def last(dtype: torch.dtype) -> Tensor:
        model, cache = build("LlamaForCausalLM", dtype), RowCache()
        step = variant.step(model, variant.attach(model, []), on_amd=on_amd)
        with torch.inference_mode():
            model(input_ids=ids[:, :-1], use_cache=True, **{cache_argument(model): cache})
            return step.run(step_of(ids[:, -1:], cache)).logits[:, 0]

    fast, equal = last(torch.bfloat16), last(torch.float32)
    torch.testing.assert_close(equal, exact, atol=1e-5, rtol=1e-5)
    assert (fast - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


def blended_logits(num_rows: int, dtype: torch.dtype, variant: Variant | None = None) -> tuple[Tensor, Blend]:
    """Return the logits (B, V) of the last of nine tokens with three adapters: of the step, or of forward (None)."""
    ids = torch.randint(0, 256, (num_rows, 9), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(num_rows, 3, generator=torch.Generator().manual_seed(1))
    model, cache = build("LlamaForCausalLM", dtype), RowCache()
    blend = (variant or Variant()).attach(model, random_adapters(model, "base", 3, rank=4, targets=ALL_LINEAR))
    with torch.inference_mode(), blend.using(weights):
        model(input_ids=ids[:, :-1], use_cache=True, **{cache_argument(model): cache})
        if variant:
            step = variant.step(model, blend)
            return step.run(step_of(ids[:, -1:], cache, weights.numpy()[:, None])).logits[:, 0].clone(), blend
        positions = torch.full((num_rows, 1), 8)
        given = {cache_argument(model): cache, "position_ids": positions, "logits_to_keep": 1}
        return model(input_ids=ids[:, -1:], **given).logits[:, -1], blend


@cache
def blended_reference(num_rows: int) -> tuple[Tensor, Tensor]:
    """Return forward's logits in float32 and in bfloat16."""
    return blended_logits(num_rows, torch.float32)[0], blended_logits(num_rows, torch.bfloat16)[0]


@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_adapters_in_bfloat16_are_as_close_to_float32_as_forward_is(variant: Variant, num_rows: int) -> None:
    exact, plain = blended_reference(num_rows)
    fast, blend = blended_logits(num_rows, torch.bfloat16, variant)
    assert (fast - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()
    if blend.has_all_active:  # and A is part of the product with the weights, which share its memory
        layer = blend.model.get_submodule("model.layers.0.self_attn.q_proj")
        pair = blend.adapters[0].pairs["model.layers.0.self_attn.q_proj"]
        assert pair.a.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


def test_layers_of_one_size_do_not_overwrite_what_they_read(variant: Variant) -> None:
    def logits(variant: Variant | None) -> Tensor:
        model = build("LlamaForCausalLM", intermediate_size=16)  # gate and up together are as many as down
        adapters = random_adapters(model, "base", 3, rank=2, targets=["down_proj", "gate_proj"])
        blend, cache = (variant or Variant()).attach(model, adapters), RowCache()
        weights = np.float32([[[0.5, 0.8, 0.2]]] * 6)
        ids = torch.randint(0, 256, (6, 9), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), blend.using(weights):
            whole = model(input_ids=ids, logits_to_keep=1).logits[:, -1]
            if not variant:
                return whole
            model(input_ids=ids[:, :-1], use_cache=True, **{cache_argument(model): cache})
            return variant.step(model, blend).run(step_of(ids[:, -1:], cache, weights)).logits[:, 0]

    torch.testing.assert_close(logits(variant), logits(None), atol=1e-4, rtol=1e-4)


def come_and_go(engine: Engine, folder: Path) -> list[list[Completion]]:
    """Generate before and after an adapter comes, and after another one goes."""
    sampling = SamplingParams(max_tokens=8)
    first = engine.generate(PROMPTS, sampling=sampling)
    engine.add_adapter("more", folder, ["planet", "planet the", "the planet heat"])
    second = engine.generate(PROMPTS, sampling=sampling, routing=RoutingParams.one("more"))
    engine.remove_adapter("math")
    return [first, second, engine.generate(PROMPTS, sampling=sampling)]


@pytest.fixture(scope="module")
def plain_come_and_go(make_engine: MakeEngine, folders: dict[str, Path]) -> list[list[Completion]]:
    return come_and_go(make_engine(build("LlamaForCausalLM"), is_fast=False), folders["science"])


def test_adapters_that_come_and_go(
    make_engine: MakeEngine,
    folders: dict[str, Path],
    variant: Variant,
    plain_come_and_go: list[list[Completion]],
) -> None:
    engine = make_engine(build("LlamaForCausalLM"), is_fast=True, variant=variant)
    for fast, plain in zip(come_and_go(engine, folders["science"]), plain_come_and_go, strict=True):
        assert_same(fast, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_models_are_packed_only_if_asked(dtype: torch.dtype) -> None:
    fast = {"on_amd": True, "capability": "AVX512"}
    assert packs_by_default(DEFAULT_PACK_BYTES, dtype, **fast) == can_pack(dtype)
    assert not packs_by_default(DEFAULT_PACK_BYTES + 1, dtype, **fast)
    assert not packs_by_default(1, dtype, on_amd=True, capability="AVX2")
    assert not packs_by_default(1, dtype, on_amd=False, capability="AVX512")


def test_asked_or_not(tokenizer: PreTrainedTokenizerFast, router: Router, folders: dict[str, Path]) -> None:
    adapters = [read_adapter(folder, name) for name, folder in folders.items()]
    for is_asked in (True, False):
        engine = Engine(build("LlamaForCausalLM"), tokenizer, adapters, router, pack=is_asked)
        assert engine.runner.has_packs == is_asked


@pytest.mark.parametrize("case", ["another model", "another dtype", "no step of our own"])
def test_what_cannot_be_packed_is_refused(
    tokenizer: PreTrainedTokenizerFast, router: Router, folders: dict[str, Path], case: str
) -> None:
    model = build("LlamaForCausalLM", torch.float16 if case == "another dtype" else torch.float32)
    if case == "another model":
        model = build("OlmoForCausalLM")
    adapters = [read_adapter(folder, name) for name, folder in folders.items()]
    with pytest.raises(OptionError, match="pack: nothing reads packed weights here"):
        Engine(model, tokenizer, adapters, router, is_fast=case != "no step of our own", pack=True)
    assert not any(isinstance(module, BlendedLinear) for module in model.modules())  # nothing was attached


def test_weights_are_packed_once_while_adapters_come_and_go(
    make_engine: MakeEngine, folders: dict[str, Path], variant: Variant
) -> None:
    engine = make_engine(build("LlamaForCausalLM"), is_fast=True, variant=variant)
    (step,) = engine.runner.own
    assert isinstance(step, FastStep)
    base = RoutingParams.base()
    for _ in range(2):
        engine.generate(PROMPTS, sampling=SamplingParams(max_tokens=3), routing=base)
    expected = 1 + 4 * TINY["num_hidden_layers"] if engine.runner.has_packs else 0  # none for a single float32 row
    assert step.packs.num_packed == expected
    engine.add_adapter("more", folders["science"], ["planet", "planet the", "the planet heat"])
    engine.generate(PROMPTS, sampling=SamplingParams(max_tokens=3), routing=base)
    assert step.packs.num_packed == expected
    assert not any(parameter.is_inference() for parameter in engine.model.parameters())  # they can be trained again


def negate(engine: Engine) -> list[Completion]:
    """Write to a weight, then generate."""
    with torch.no_grad():
        engine.model.model.layers[1].mlp.down_proj.base.weight.mul_(-1)
    return engine.generate(PROMPTS, sampling=SamplingParams(max_tokens=8))


@pytest.fixture(scope="module")
def plain_negated(make_engine: MakeEngine) -> list[Completion]:
    return negate(make_engine(build("LlamaForCausalLM"), is_fast=False))


def test_weights_that_somebody_writes_to_are_read_anew(
    make_engine: MakeEngine, variant: Variant, plain_negated: list[Completion]
) -> None:
    engine = make_engine(build("LlamaForCausalLM"), is_fast=True, variant=variant)
    before = engine.generate(PROMPTS, sampling=SamplingParams(max_tokens=8))
    after = negate(engine)
    assert_same(after, plain_negated)
    assert [each.token_ids for each in before] != [each.token_ids for each in after]


def test_a_hook_is_not_passed_by(make_engine: MakeEngine) -> None:
    engine = make_engine(build("LlamaForCausalLM"), is_fast=True)
    seen: list[nn.Module] = []
    handle = engine.model.model.norm.register_forward_hook(lambda module, given, result: seen.append(module))
    engine.generate("add", sampling=SamplingParams(max_tokens=4))
    assert len(seen) == 4
    handle.remove()
    engine.generate("add", sampling=SamplingParams(max_tokens=4))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MistralForCausalLM", {"sliding_window": 3}),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}),
        ("LlamaForCausalLM", {"attn_implementation": "eager"}),
        ("GemmaForCausalLM", {}),
        ("OlmoForCausalLM", {}),
    ],
)
def test_what_it_does_not_know_is_left_to_forward(name: str, options: dict[str, Any]) -> None:
    assert not fits(build(name, **options))


def test_other_linear_layers_are_left_to_forward() -> None:
    class Special(nn.Linear):
        pass

    model = build("LlamaForCausalLM")
    assert fits(model)
    model.model.layers[1].mlp.up_proj = Special(32, 48, bias=False)
    assert not fits(model)
    assert not fits(build("LlamaForCausalLM").to("meta"))
    mixed = build("LlamaForCausalLM")
    mixed.lm_head.to(torch.bfloat16)
    assert not fits(mixed)


def test_weights_keep_their_values_and_all_are_held_once(make_engine: MakeEngine, variant: Variant) -> None:
    def held(model: nn.Module) -> int:
        tensors = [*model.parameters(), *model.buffers()]
        return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())

    model = build("LlamaForCausalLM")
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    size = held(model)
    for _ in range(2):
        engine = make_engine(model, is_fast=True, variant=variant)
        pairs = pairs_of(engine.blend)
        assert held(model) == size + sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)
        factors = {each.untyped_storage().data_ptr() for each in engine.blend.factors()}
        if engine.blend.has_all_active:
            assert {pair.a.untyped_storage().data_ptr() for pair in pairs} <= factors
        q, k, _ = (getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "qkv")
        assert q.base.weight.untyped_storage().data_ptr() == k.base.weight.untyped_storage().data_ptr()
        engine.detach()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def pairs_of(blend: Blend) -> list[LoraPair]:
    return [pair for adapter in blend.adapters for pair in adapter.pairs.values()]


def step_of(ids: Tensor, cache: RowCache, weights: Floats | None = None) -> PassInput:
    """Return the input of a pass: one token a row (B, 1) after cached ones, under weights (B, 1, N)."""
    return PassInput(
        ids, [0] * len(ids), weights, ["sum"] * len(ids), cache, [[]] * len(ids), [cache.length + 1] * len(ids)
    )


MATRIX_PRODUCTS = frozenset(
    {"mm", "mv", "addmm", "addmm_", "addmv", "addmv_", "linear", "bmm", "matmul", "_linear_pointwise"}
)
"""PyTorch's names of matrix products."""


class Counter(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches inside it, and which of them are matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.products += func.__name__.split(".")[0] in MATRIX_PRODUCTS
        return func(*args, **(kwargs or {}))


def counted(step: FastStep, model: PreTrainedModel, num_rows: int, weights: list[float] | None) -> Counter:
    """Count the operations of one step of `num_rows` rows, the setting of the weights included."""
    cache = RowCache()
    ids = torch.zeros(num_rows, 4, dtype=torch.long)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})

    given = None if weights is None else np.float32([[weights]])  # the same for all rows

    def one() -> None:
        step.run(step_of(ids[:, :1], cache, given))

    one()  # buffers, views and the matrices that take weights to gates are made once
    with Counter() as counter:
        one()
    return counter


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_step_makes_no_more_products_than_it_must(folders: dict[str, Path], variant: Variant, num_rows: int) -> None:
    model = build("LlamaForCausalLM")
    blend = variant.attach(model, [read_adapter(folder, name) for name, folder in folders.items()])
    step = variant.step(model, blend)
    layers = len(model.model.layers)
    gates = 1  # the three adapters have one layout
    bare, blended = (counted(step, model, num_rows, weights).products for weights in (None, [0.2, 0.3, 0.5]))
    assert bare == 1 + 4 * layers  # the head; q k v, o, gate up, down
    products_with_a = 0 if blend.has_all_active else 4  # A lies below the weights, or is a product of its own
    assert blended == gates + 1 + (4 + products_with_a + 7) * layers  # one B for each layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_adapters_add_their_products_and_the_gates_and_nothing_else(
    variant: Variant, num_rows: int, dtype: torch.dtype
) -> None:
    def added(layers: int) -> int:
        model = build("LlamaForCausalLM", dtype, num_hidden_layers=layers)
        blend = variant.attach(model, random_adapters(model, "base", 3, rank=4, targets=ALL_LINEAR))
        step = variant.step(model, blend)
        bare, blended = (counted(step, model, num_rows, weights).operations for weights in (None, [0.2, 0.3, 0.5]))
        return blended - bare

    is_below = variant.always_active_rows > 0
    each_layer = 4 + 7 + (0 if is_below else 4 + 4)  # gates, B; A lies below the weights, or has an input of its dtype
    each_layer += 0 if dtype == torch.float32 else 4  # the sums, in float32, are added to the results
    if variant.packs(dtype) and (num_rows > 1 or dtype != torch.float32):
        each_layer += 4  # what oneDNN makes is copied to where updates are added
        each_layer += num_rows > 1  # and q, k and v then into one piece
    assert added(4) - added(2) == 2 * each_layer
    assert added(2) - 2 * each_layer <= (20 if is_below else 26)  # of a step: weights are checked, and made into gates


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_step_takes_as_many_operations_for_many_adapters_as_for_two(variant: Variant, num_rows: int) -> None:
    def operations(count: int) -> int:
        model = build("LlamaForCausalLM")
        adapters = random_adapters(model, "base", count, rank=2, targets=["q_proj", "v_proj", "down_proj"])
        step = variant.step(model, variant.attach(model, adapters))
        return counted(step, model, num_rows, [1 / count] * count).operations

    assert operations(12) == operations(2)


def test_rows_with_the_same_options_are_weighed_together(make_engine: MakeEngine) -> None:
    weighed: list[int] = []

    class Counted(Router):
        def weigh(self, seen: Seen, params: RoutingParams) -> Floats:
            weighed.append(len(seen.views))
            return super().weigh(seen, params)

    engine = make_engine(build("LlamaForCausalLM"), is_fast=True)
    engine.router = Counted(engine.router.centroids, engine.router.embedder, engine.router.params)
    ids = [engine.tokenizer(prompt).input_ids for prompt in PROMPTS]
    equal = [RoutingParams(every=1) for _ in PROMPTS]  # equal, not the same object
    rows = engine.new_rows(ids, sampling=SamplingParams(max_tokens=4), routing=equal)
    batch = engine.new_batch(end_ids=frozenset())
    weighed.clear()
    batch.join(rows)
    while batch.rows:
        batch.step()
    assert weighed == [len(PROMPTS)] * 4


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_embeds_the_new_text_alone(make_engine: MakeEngine, embedder: StaticEmbedder, every: int) -> None:
    summed: list[int] = []

    class Counted(StaticEmbedder):
        def encode(self, texts: Sequence[str]) -> Floats:
            raise AssertionError("a step encodes whole texts")

        def sum_words(self, words: Sequence[str]) -> Sums:
            summed.append(len(words))
            return super().sum_words(words)

    engine = make_engine(build("LlamaForCausalLM"), is_fast=True)
    engine.router = replace(engine.router, embedder=Counted(embedder.model))

    def words_of_steps(length: int) -> int:
        ids = [[*b"and the sum " * (length // 12)]]
        rows = engine.new_rows(ids, sampling=SamplingParams(max_tokens=9), routing=RoutingParams(every=every))
        batch = engine.new_batch(end_ids=frozenset())
        batch.join(rows)
        summed.clear()
        while batch.rows:
            batch.step()
        return sum(summed)

    assert max(words_of_steps(24), words_of_steps(240)) <= 8 * 3, "three words a token at most: none is read again"


def is_call(frame: FrameType, event: str) -> bool:
    """Return whether a function is called; a sum over the adapters that act resumes a generator for each."""
    return event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR


@pytest.mark.parametrize("combine", ["sum", "linear"])
def test_a_step_makes_as_many_calls_for_many_adapters_as_for_four(
    tokenizer: PreTrainedTokenizerFast, embedder: StaticEmbedder, variant: Variant, combine: Combine
) -> None:
    routing = RoutingParams(rule="top_k", top_k=4, every=1, temperature=100.0, combine=combine)  # four act at a time

    def calls(count: int) -> int:
        model = build("LlamaForCausalLM")
        adapters = random_adapters(model, "base", count, rank=2, targets=["q_proj", "v_proj"])
        samples = {each.name: [f"{each.name} sum", f"sum {each.name}"] for each in adapters}
        engine = Engine(model, tokenizer, adapters, fit(samples, embedder), is_fast=False)
        run_in(engine, variant)
        rows = engine.new_rows([[*b"the sum of it"]] * 2, sampling=SamplingParams(max_tokens=9), routing=routing)
        batch = engine.new_batch(end_ids=frozenset())
        batch.join(rows)
        made: list[int] = []
        while batch.rows:
            made.append(0)
            sys.setprofile(lambda frame, event, arg: made.append(made.pop() + is_call(frame, event)))
            try:
                batch.step()
            finally:
                sys.setprofile(None)
        return min(made)  # others meet a new word, or other adapters than before

    assert calls(12) == calls(4)
