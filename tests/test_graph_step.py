"""The step that a GPU replays computes the same as the model's own forward.

Without a GPU nothing is captured. tests/test_kernels.py compares the kernels one by one.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowLayer
from treadle.engine.runners.cuda.graphs import CudaGraphs
from treadle.engine.runners.cuda.interface import Kernels
from treadle.engine.runners.cuda.step import Gpu, GraphStep, can_build_launchers, fits
from treadle.engine.runners.decoder import ARCHITECTURES
from treadle.engine.runners.runner import Runner
from treadle.engine.sequence import TokenSequence
from treadle.lora.adapter import read_adapter
from treadle.routing.router import Router

from conftest import SAMPLES, TARGETS, save_adapter
from reference_kernels import PlainKernels
from test_fast_step import ALL_LINEAR, PROMPTS, ROUTINGS, assert_same, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUMS = [each for each in ROUTINGS if each.combine == "sum"]
MakeEngine = Callable[..., Engine]


def triton_kernels() -> Kernels:
    if not find_spec("triton"):
        pytest.skip("Triton is not installed")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU, and Triton's interpreter takes minutes: set TRITON_INTERPRET=1 to wait for it")
    from treadle.engine.runners.cuda.triton_launch import TritonKernels

    return TritonKernels()


@pytest.fixture(params=["plain", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return PlainKernels() if request.param == "plain" else triton_kernels()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of unequal ranks; one of them is on all linear layers, the head included."""
    root = tmp_path_factory.mktemp("graph")
    targets = TARGETS | {"science": [*ALL_LINEAR, "lm_head"]}
    return {
        name: save_adapter(root / name, build("LlamaForCausalLM"), seed, r=seed + 2, target_modules=targets[name])
        for seed, name in enumerate(SAMPLES, 1)
    }


@pytest.fixture
def make_engine(folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, router: Router) -> MakeEngine:
    def make(kernels: Kernels | None, model: PreTrainedModel | None = None) -> Engine:
        adapters = [read_adapter(folder, name) for name, folder in folders.items()]
        model = (model or build("LlamaForCausalLM")).to(DEVICE)
        engine = Engine(model, tokenizer, adapters, router, is_fast=False)
        if kernels:
            engine.runner = Runner(model, engine.blend, [GraphStep(model, engine.blend, kernels, capture())])
        return engine

    return make


def capture() -> CudaGraphs | None:
    return CudaGraphs() if DEVICE == "cuda" else lambda run: run


def captures(engine: Engine) -> int:
    (step,) = engine.runner.own
    assert isinstance(step, GraphStep)
    return step.num_captures


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("num_rows", [1, 6])
def test_graph_is_forward_for_mixed_rows(make_engine: MakeEngine, kernels: Kernels, name: str, num_rows: int) -> None:
    options = {"sliding_window": None} if name.startswith("Mistral") else {}
    engines = [make_engine(each, build(name, **options)) for each in (kernels, None)]
    routings = [*SUMS, *SUMS][:6]
    for first in range(0, min(6, 2 * num_rows), num_rows):
        rows = slice(first, first + num_rows)
        graph, plain = (
            engine.generate(PROMPTS[rows], sampling=SamplingParams(max_tokens=5), routing=routings[rows])
            for engine in engines
        )
        assert_same(graph, plain)
    assert captures(engines[0]) > 0


def test_only_what_the_pass_knows_fits() -> None:
    """As on a GPU, where each of these alone leaves the model to its own forward."""
    gpu = Gpu(has_cuda=True, has_triton=True, capability=(9, 0))
    model = build("LlamaForCausalLM")
    assert not fits(model), "it is on no GPU"
    assert fits(model, "cpu", gpu)
    assert fits(build("LlamaForCausalLM", torch.bfloat16), "cpu", gpu)
    assert not fits(build("LlamaForCausalLM", torch.float16), "cpu", gpu)
    assert not fits(build("OlmoForCausalLM"), "cpu", gpu)
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not fits(build("LlamaForCausalLM", rope_parameters=scaling), "cpu", gpu)
    for other in (gpu._replace(has_cuda=False), gpu._replace(has_triton=False), gpu._replace(capability=(7, 5))):
        assert not fits(model, "cpu", other), other


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert not can_build_launchers(tmp_path)
    monkeypatch.setenv("CC", "cc")
    assert can_build_launchers(tmp_path)
    (tmp_path / "Python.h").unlink()
    assert not can_build_launchers(tmp_path)


def test_other_combines_are_left_to_forward(
    make_engine: MakeEngine, tokenizer: PreTrainedTokenizerFast, router: Router, tmp_path: Path
) -> None:
    def make(*, is_graph: bool) -> Engine:
        model = build("LlamaForCausalLM").to(DEVICE)
        alike = {name: save_adapter(tmp_path / name, build("LlamaForCausalLM"), 1) for name in SAMPLES}
        adapters = [read_adapter(folder, name) for name, folder in alike.items()]
        engine = Engine(model, tokenizer, adapters, router, is_fast=False)
        if is_graph:
            step = GraphStep(model, engine.blend, PlainKernels(), capture())
            engine.runner = Runner(model, engine.blend, [step])
        return engine

    graph, plain = (
        make(is_graph=is_graph).generate(PROMPTS, sampling=SamplingParams(max_tokens=8), routing=ROUTINGS)
        for is_graph in (True, False)
    )
    assert_same(graph, plain)


def test_rows_join_and_leave_and_a_batch_is_its_singles(make_engine: MakeEngine, kernels: Kernels) -> None:
    """Rows of different lengths come while others run, so that windows shift and buffers move."""
    engine, alone = make_engine(kernels), make_engine(None)
    prompts = [[5, 9, 7], list(range(40, 60)), [3], list(range(100, 109))]
    routings = [SUMS[0], SUMS[2], RoutingParams.base(), SUMS[0]]
    rows = [
        TokenSequence(ids, engine.router, routing, SamplingParams(max_tokens=tokens), engine.tokenizer)
        for ids, routing, tokens in zip(prompts, routings, (9, 3, 6, 5), strict=True)
    ]
    batch = engine.new_batch(end_ids=frozenset())
    waiting = list(rows)
    while waiting or batch.rows:
        if batch.rows:
            batch.step()
        if waiting:
            batch.join([waiting.pop(0)])
    for row in rows:
        single = TokenSequence(row.ids[: row.prompt_tokens], alone.router, row.routing, row.sampling, alone.tokenizer)
        batch = alone.new_batch(end_ids=frozenset())
        batch.join([single])
        while batch.rows:
            batch.step()
        assert single.ids == row.ids
        np.testing.assert_allclose(
            [event.logprob for event in row.events], [event.logprob for event in single.events], atol=5e-5
        )


class SmallLayer(RowLayer):
    """Its buffers are soon full."""

    growth_tokens = 2


def test_weights_and_buffers_change_without_another_capture(make_engine: MakeEngine, kernels: Kernels) -> None:
    engines = [make_engine(each) for each in (kernels, None)]
    for engine in engines:
        engine.runner.layer_type = SmallLayer
    sampling = SamplingParams(max_tokens=12)
    graph, plain = (
        [engine.generate(prompt, sampling=sampling, routing=SUMS[0]) for prompt in PROMPTS[:2]] for engine in engines
    )
    assert_same(graph, plain)
    assert len({tuple(row) for row in graph[0].weights.tolist()}) > 1
    if not isinstance(kernels, PlainKernels):
        assert captures(engines[0]) == 1
    assert_same(*([engine.generate("the sum", routing=RoutingParams.base(), sampling=sampling)] for engine in engines))


def test_adapters_that_come_and_go(make_engine: MakeEngine, kernels: Kernels, folders: dict[str, Path]) -> None:
    engines = [make_engine(each) for each in (kernels, None)]
    sampling = SamplingParams(max_tokens=4)
    for engine in engines:
        engine.generate(PROMPTS[:2], sampling=sampling)
        engine.add_adapter("more", folders["science"], ["planet", "planet the", "the planet heat"])
    assert_same(
        *(engine.generate(PROMPTS[:2], sampling=sampling, routing=RoutingParams.one("more")) for engine in engines)
    )
    for engine in engines:
        engine.remove_adapter("math")
    assert_same(*(engine.generate(PROMPTS[:2], sampling=sampling) for engine in engines))


def test_weights_keep_their_values_and_are_held_once(make_engine: MakeEngine) -> None:
    model = build("LlamaForCausalLM").to(DEVICE)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    engine = make_engine(PlainKernels(), model)
    engine.generate(PROMPTS[:2], sampling=SamplingParams(max_tokens=2))
    pairs = engine.blend.adapters[0].pairs
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    own = pairs["model.layers.0.self_attn.q_proj"].a.untyped_storage().data_ptr()
    assert own == layer.weight.untyped_storage().data_ptr() == layer.stacked_a.a_all.untyped_storage().data_ptr()
    assert held(model) == sum(parameter.nbytes for parameter, _ in before.values()) + factors(engine)
    engine.detach()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def held(model: nn.Module) -> int:
    """Return the bytes of the storages that the parameters are views of, and of the B."""
    tensors = [*model.parameters(), *(each for name, each in model.named_buffers() if name.endswith("b_all"))]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors}.values())


def factors(engine: Engine) -> int:
    return sum(each.nbytes for each in engine.blend.factors())
