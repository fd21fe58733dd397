"""A linear layer of vLLM holds parts of the checkpoint's layers, and a stack is laid beside it."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from treadle.common.errors import AdapterError, ModelError
from treadle.lora.adapter import read_adapter
from treadle.serving.vllm.attach import AttachContext, attach
from treadle.serving.vllm.cpu import Product
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.shards import shard_of
from treadle.serving.vllm.stacks import ModelStacks

from conftest import TINY

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def column(sizes: list[int], tp_size: int, tp_rank: int, **more: Any) -> SimpleNamespace:
    """Make a column-parallel layer of vLLM; sizes are those of this process."""
    return SimpleNamespace(
        input_size=64, input_size_per_partition=64, output_partition_sizes=sizes, output_size_per_partition=sum(sizes),
        tp_size=tp_size, tp_rank=tp_rank, **more,
    )  # fmt: skip


def test_heads_are_sharded_and_key_value_heads_repeated() -> None:
    # eight query heads and two key-value heads of 16 over four processes: each pair of processes has the same one
    shards = [
        shard_of("l.qkv_proj", column([32, 16, 16], 4, rank, num_kv_head_replicas=2), PACKED) for rank in range(4)
    ]
    q, k, v = zip(*(place.parts for place in shards), strict=True)
    assert [part.path for part in shards[0].parts] == ["l.q_proj", "l.k_proj", "l.v_proj"]
    assert [(part.rows.start, part.rows.stop) for part in q] == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert [(part.rows.start, part.rows.stop) for part in k] == [(0, 16), (0, 16), (16, 32), (16, 32)]
    assert [part.shape for part in (q[0], k[0], v[0])] == [(64, 128), (64, 32), (64, 32)]
    assert [part.start for part in shards[0].parts] == [0, 32, 48]
    assert shards[0].size_out == 64


def test_a_row_parallel_layer_reads_its_columns() -> None:
    layer = SimpleNamespace(
        input_size=96, input_size_per_partition=48, output_partition_sizes=[64], output_size_per_partition=64,
        tp_size=2, tp_rank=1,
    )  # fmt: skip
    (part,) = shard_of("l.down_proj", layer, PACKED).parts
    assert (part.shape, part.columns, part.rows) == ((96, 64), slice(48, 96), slice(0, 64))


def test_a_fused_layer_that_is_unknown_is_refused() -> None:
    with pytest.raises(ModelError, match=r"l\.mixed_proj makes 2 outputs"):
        shard_of("l.mixed_proj", column([32, 32], 1, 0), PACKED)


class Method:
    """vLLM's linear method."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight, bias)  # type: ignore[arg-type]


class Linear(nn.Module):
    """vLLM's replicated layer."""

    def __init__(self, size_in: int, sizes: list[int]) -> None:
        super().__init__()
        self.input_size, self.output_partition_sizes = size_in, sizes
        self.tp_size, self.tp_rank = 1, 0
        self.weight = nn.Parameter(torch.randn(sum(sizes), size_in), requires_grad=False)
        self.quant_method: Any = Method()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


class Fused(Linear):
    """Has no forward of its own."""


class Fast(Linear):
    """Has a kernel that knows nothing of linear methods."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


class Absent(nn.Module):
    """vLLM's layer of another pipeline stage."""


class Tiny(nn.Module):
    """The tiny model as vLLM has it: fused layers, and perhaps only some of the decoder's."""

    packed_modules_mapping = PACKED

    def __init__(self, down: type[Linear] = Linear, absent: int | None = None) -> None:
        super().__init__()
        hidden, middle = TINY["hidden_size"], TINY["intermediate_size"]
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Module()
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            layer.self_attn.qkv_proj = Fused(hidden, [32, 16, 16])
            layer.self_attn.o_proj = Linear(32, [hidden])
            layer.mlp.gate_up_proj = Fused(hidden, [middle, middle])
            layer.mlp.down_proj = down(middle, [hidden])
            self.model.layers.append(layer)
        if absent is not None:
            self.model.layers[absent] = Absent()


CONTEXT = AttachContext(
    num_tokens=16, device=torch.device("cpu"), dtype=torch.float32, linear=Linear, forwards=(Linear.forward,),
    unpacked=frozenset(), linear_method=Method, missing=Absent, pack=None,
)  # fmt: skip


def laid(bundle: Path, model: nn.Module, unpacked: frozenset[str] = frozenset(), **options: Any) -> ModelStacks:
    params = PluginParams(bundle=str(bundle), **options)
    return attach(model, *open_bundle(params), params, replace(CONTEXT, unpacked=unpacked))


def test_stacks_lie_beside_the_layers_that_adapters_target(bundle_folder: Path) -> None:
    model = Tiny()
    stacks = laid(bundle_folder, model)
    assert len(stacks.stacks) == 8
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(2, TINY["intermediate_size"])
    torch.testing.assert_close(layer(x), Method().apply(layer, x))  # no weights yet: the base
    layer.treadle.gates.fill_(1.0)
    assert not torch.allclose(layer(x), Method().apply(layer, x))


def test_layers_that_pass_their_linear_method_by_are_refused(bundle_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)layers\.0\.mlp\.down_proj \(Fast\) has a forward.*layers\.1\.mlp\.down"):
        laid(bundle_folder, Tiny(Fast))
    with pytest.raises(ModelError, match=r"o_proj: this model reads its weights by itself"):
        laid(bundle_folder, Tiny(), frozenset(["o_proj"]))
    assert len(laid(bundle_folder, Tiny(), frozenset(["lm_head"])).stacks) == 8  # what nothing targets may be anything


def test_a_stack_with_a_wrong_factor_is_found_out(bundle_folder: Path) -> None:
    def doubled(weight: torch.Tensor) -> Product:
        factor = 2 if weight.shape[1] == TINY["hidden_size"] else 1
        return Product(lambda x: x @ weight.t() * factor)

    params = PluginParams(bundle=str(bundle_folder))
    with pytest.raises(ModelError, match=r"qkv_proj does not compute the blend here: off by"):
        attach(Tiny(), *open_bundle(params), params, replace(CONTEXT, pack=doubled))


def test_factors_that_overflow_in_the_dtype_of_the_stacks_are_refused_by_name(bundle_folder: Path) -> None:
    params = PluginParams(bundle=str(bundle_folder), max_adapters=4)
    bundle, mixture = open_bundle(params)
    large = [
        replace(each, pairs={path: replace(pair, a=pair.a * 3e4) for path, pair in each.pairs.items()})
        for each in bundle.adapters
    ]
    stacks = attach(Tiny(), bundle, mixture, params, CONTEXT)
    stacks.check_room(large[0])  # in float32 they are fine
    stacks = attach(Tiny().half(), bundle, mixture, params, replace(CONTEXT, dtype=torch.float16))
    with pytest.raises(AdapterError, match=r"math: model\.layers\.0.*too large for float16"):
        stacks.check_room(large[0])
    with pytest.raises(AdapterError, match=r"(?s)math: .*too large for float16.*code: "):
        attach(Tiny(), replace(bundle, adapters=tuple(large)), mixture, params, replace(CONTEXT, dtype=torch.float16))


def test_a_pipeline_stage_takes_an_adapter_of_all_layers(bundle_folder: Path, adapter_folders: dict[str, Path]) -> None:
    """Each stage has room for what it holds; what no stage has room for is refused by each."""
    late = read_adapter(adapter_folders["science"], "late")
    stages = [laid(bundle_folder, Tiny(absent=each), max_adapters=4, max_rank=8) for each in (0, 1)]
    for stage in stages:
        stage.check_room(late)
        assert len(stage.stacks) == 4
    lost = replace(late, pairs={**late.pairs, "model.layers.7.self_attn.q_proj": next(iter(late.pairs.values()))})
    for stage in stages:
        with pytest.raises(AdapterError, match=r"layers\.7\.self_attn\.q_proj: there is no room for it$"):
            stage.check_room(lost)


def test_the_doctor_wants_a_bundle_or_vllm(run) -> None:
    assert run("doctor")[0] == 2
    assert run("doctor", "/nowhere", "--vllm")[0] == 2


@pytest.mark.skipif(find_spec("vllm") is not None, reason="here vLLM is installed")
def test_the_doctor_says_how_vllm_is_installed(run) -> None:
    code, _, error = run("doctor", "--vllm")
    assert code == 1
    assert "pip install 'treadle[vllm]'" in error
