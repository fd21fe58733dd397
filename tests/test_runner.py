"""Each pass returns the same logits and hidden states as the model's own forward."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from treadle.common.params import Combine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cpu.chunk import ChunkPass
from treadle.engine.runners.cpu.step import FastStep
from treadle.engine.runners.cuda.step import GraphStep
from treadle.engine.runners.passes import ForwardPass, PassInput
from treadle.engine.runners.runner import ModelForward, Runner
from treadle.experiments.pools import random_adapters
from treadle.lora.blend import Blend, attach
from treadle.lora.vectors import LayerVectors

from reference_kernels import PlainKernels
from test_fast_step import build

NEW: dict[str, Callable[[PreTrainedModel, Blend], ForwardPass]] = {
    "forward": lambda model, blend: ModelForward(model, blend, None),
    "step": FastStep,
    "graph": lambda model, blend: GraphStep(model, blend, PlainKernels(), capture=lambda run: run),
    "chunk": ChunkPass,
}
IDS = torch.randint(0, 256, (2, 14), generator=torch.Generator().manual_seed(3))
WEIGHTS = np.array([[[0.7, 0.0, 0.4]], [[0.1, 0.9, 0.0]]], np.float32)  # (B, 1, N)
NAMES = ("a", "b", "c")


def given(cache: RowCache, first: int, end: int, *, rows: int = 2, layer: int | None = None) -> PassInput:
    """Return the columns from `first` to before `end` of some rows, the second behind two columns of padding."""
    pads = [0, 2][:rows]
    return PassInput(
        ids=IDS[:rows, first:end],
        pads=pads,
        weights=WEIGHTS[:rows],
        combines=["sum"] * rows,
        cache=cache,
        among=[NAMES] * rows,
        lengths=[end - pad for pad in pads],
        layer=layer,
    )


def blended(*, names: Sequence[str] = NAMES) -> tuple[PreTrainedModel, Blend]:
    model = build("LlamaForCausalLM")
    adapters = random_adapters(model, "base", len(names), rank=3, targets=["q_proj", "down_proj", "up_proj"])
    return model, attach(model, [replace(each, name=name) for each, name in zip(adapters, names, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hidden_states_are_those_of_transformers(name: str, layer: int) -> None:
    model, blend = blended()
    own, cache = NEW[name](model, blend), RowCache()
    rows, start = (1, 6) if name == "chunk" else (2, len(IDS[0]) - 1)
    ModelForward(model, blend, None).run(given(cache, 0, start, rows=rows))
    asked = given(cache, start, len(IDS[0]), rows=rows, layer=layer)
    assert own.takes(asked)
    found = own.run(asked)
    whole = given(RowCache(), 0, len(IDS[0]), rows=rows)
    with blend.using(WEIGHTS[:rows]):
        wanted = model(
            IDS[:rows], attention_mask=whole.mask(), position_ids=whole.positions(), output_hidden_states=True
        )
    assert found.hidden is not None
    torch.testing.assert_close(found.hidden, wanted.hidden_states[layer][:, start:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits, wanted.logits[:, -1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NEW)
def test_nothing_is_kept_where_nobody_asks(name: str) -> None:
    model, blend = blended()
    own, cache = NEW[name](model, blend), RowCache()
    with torch.no_grad():
        ModelForward(model, blend, None).run(given(cache, 0, 6, rows=1))
        end = 9 if name == "chunk" else 7
        assert own.run(given(cache, 6, end, rows=1)).hidden is None


@pytest.mark.parametrize("name", ["step", "graph"])
@pytest.mark.parametrize(
    ("combine", "weight", "is_taken"), [("sum", 1.0, True), ("linear", 1.0, False), ("paper", 0.0, True)]
)
def test_steps_of_our_own_take_sums_alone(name: str, combine: Combine, weight: float, is_taken: bool) -> None:
    model, blend = blended()
    cache = RowCache()
    with torch.no_grad():
        ModelForward(model, blend, None).run(given(cache, 0, 5))
    asked = replace(given(cache, 5, 6), combines=["sum", combine], weights=WEIGHTS * np.float32([[[1]], [[weight]]]))
    assert NEW[name](model, blend).takes(asked) == is_taken


def test_the_first_pass_that_takes_it_runs_it() -> None:
    model, blend = blended()
    ran: list[str] = []

    class Noted:
        def __init__(self, name: str, limit: int) -> None:
            self.name, self.limit = name, limit

        def takes(self, asked: PassInput) -> bool:
            return asked.ids.shape[1] <= self.limit

        def run(self, asked: PassInput) -> object:
            ran.append(self.name)
            return ModelForward(model, blend, None).run(asked)

    runner, cache = Runner(model, blend, [Noted("one", 1), Noted("few", 3)]), RowCache()
    with torch.no_grad():
        for first, end in ((0, 8), (8, 10), (10, 11)):
            runner.run(given(cache, first, end))
    assert ran == ["few", "one"]
    assert cache.length == 11


@pytest.mark.parametrize("has_vectors", [False, True])
def test_adapters_that_do_more_than_add_factors_run_through_the_models_own_forward(has_vectors: bool) -> None:
    model = build("LlamaForCausalLM")
    (plain,) = random_adapters(model, "base", 1, rank=3, targets=["q_proj"])
    path = next(iter(plain.pairs))
    vectors = {path: LayerVectors(out_scale=torch.full((plain.pairs[path].b.shape[0],), 1.5))}
    blend = attach(model, [replace(plain, vectors=vectors if has_vectors else {})])
    ran: list[str] = []

    class Noted:
        def takes(self, asked: PassInput) -> bool:
            return True

        def run(self, asked: PassInput) -> object:
            ran.append("own")
            return ModelForward(model, blend, None).run(asked)

    with torch.no_grad():
        asked = replace(given(RowCache(), 0, 5), weights=WEIGHTS[:, :, :1], among=[plain.name] * 2)
        Runner(model, blend, [Noted()]).run(asked)
    assert ran == ([] if has_vectors else ["own"])
