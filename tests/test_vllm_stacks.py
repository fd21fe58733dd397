"""The stacked factors of a fused layer, whole or sharded, against the sum adapter by adapter."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.blend import attach
from treadle.serving.vllm.cpu import Product
from treadle.serving.vllm.shards import LayerShard, ShardPart, equal_ranks, own_ranks, plain_update
from treadle.serving.vllm.stacks import GateBoard, LayerStack

from conftest import save_adapter, tiny_llama

LAYER = "model.layers.0.self_attn"
NAMES = ("q_proj", "k_proj", "v_proj")
SIZES = (32, 16, 16)  # rows of q, k and v of the tiny model
NewStack = Callable[..., LayerStack]
Update = Callable[..., torch.Tensor]


def fused(shards: int = 1, shard: int = 0) -> LayerShard:
    """q, k and v in one column-parallel layer, as one of some processes holds it."""
    parts, start = [], 0
    for name, size in zip(NAMES, SIZES, strict=True):
        mine = size // shards
        rows = slice(shard * mine, (shard + 1) * mine)
        parts.append(ShardPart(f"{LAYER}.{name}", (32, size), slice(0, 32), rows, start))
        start += mine
    return LayerShard(tuple(parts), 32, start)


def row_parallel(shards: int, shard: int) -> LayerShard:
    mine = 48 // shards
    part = ShardPart("model.layers.0.mlp.down_proj", (48, 32), slice(shard * mine, (shard + 1) * mine), slice(0, 32), 0)
    return LayerShard((part,), mine, 32)


def board() -> GateBoard:
    return GateBoard(16, torch.device("cpu"), torch.float32)


def updated(
    new_stack: NewStack, shard: LayerShard, adapters: list[Adapter], weights: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    gates = board()
    stack = new_stack(shard, gates, own_ranks(shard, adapters))
    for slot, adapter in enumerate(adapters):
        stack.put(slot, adapter)
    scales = [next(iter(adapter.pairs.values())).scale for adapter in adapters]
    gates.fill((weights * torch.tensor(scales)).numpy(), [1] * len(weights))
    return stack.update(torch.zeros(len(x), shard.size_out), x)


@pytest.fixture(params=[0, 1 << 30], ids=["a product a part", "one product"])
def new_stack(request: pytest.FixtureRequest) -> NewStack:
    return partial(LayerStack, max_zero_bytes=request.param)


@pytest.fixture
def update(new_stack: NewStack) -> Update:
    return partial(updated, new_stack)


@pytest.fixture(scope="module")
def adapters(adapter_folders: dict[str, Path]) -> list[Adapter]:
    return [read_adapter(folder, name) for name, folder in adapter_folders.items()]


def test_a_fused_layer_is_the_sum_over_its_adapters(update: Update, adapters: list[Adapter]) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(5, 32), torch.rand(5, 3)
    made = update(fused(), adapters, weights, x)
    torch.testing.assert_close(made, plain_update(fused(), adapters, weights, x).float())
    assert not torch.allclose(made, plain_update(fused(), adapters, weights.roll(1, 1), x).float())


def test_shards_of_rows_join_to_the_whole(update: Update, adapters: list[Adapter]) -> None:
    x, weights = torch.randn(5, 32), torch.rand(5, 3)
    whole = update(fused(), adapters, weights, x).split(SIZES, 1)
    halves = [update(fused(2, shard), adapters, weights, x).split([s // 2 for s in SIZES], 1) for shard in (0, 1)]
    for part in range(3):
        torch.testing.assert_close(torch.cat([halves[0][part], halves[1][part]], 1), whole[part])


def test_shards_of_columns_add_up_to_the_whole(update: Update, adapters: list[Adapter]) -> None:
    x, weights = torch.randn(5, 48), torch.rand(5, 3)
    whole = update(row_parallel(1, 0), adapters, weights, x)
    halves = [
        update(row_parallel(2, shard), adapters, weights, x[:, shard * 24 : (shard + 1) * 24]) for shard in (0, 1)
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole)


def test_weights_of_zero_change_nothing(update: Update, adapters: list[Adapter]) -> None:
    assert not update(fused(), adapters, torch.zeros(5, 3), torch.randn(5, 32)).any()


def test_the_sum_is_that_of_the_embedded_blend(update: Update, adapters: list[Adapter]) -> None:
    x, weights = torch.randn(1, 4, 32), torch.rand(1, 4, 3)
    model = tiny_llama()
    blend = attach(model, adapters)
    layers = [model.get_submodule(f"{LAYER}.{name}") for name in NAMES]
    with torch.no_grad():
        base = torch.cat([layer(x) for layer in layers], -1)[0]
        with blend.using(weights):
            expected = torch.cat([layer(x) for layer in layers], -1)[0] - base
    made = update(fused(), adapters, weights[0], x[0])
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_a_slot_is_overwritten_in_place(new_stack: NewStack, adapters: list[Adapter], tmp_path: Path) -> None:
    late = read_adapter(save_adapter(tmp_path / "late", seed=7, r=2, target_modules=["k_proj"]))
    gates = board()
    stack = new_stack(fused(), gates, equal_ranks(fused(), frozenset(NAMES), 4, 6))
    addresses = [each.data_ptr() for each in stack.buffers()]
    x = torch.randn(2, 32)
    for slot, adapter in enumerate(adapters):
        stack.put(slot, adapter)
    stack.put(0, late)
    gates.fill(np.array([[4.0, 0, 0, 0]], np.float32), [2])  # its weight 1 times its scale 8 / 2
    made = stack.update(torch.zeros(2, 64), x)
    torch.testing.assert_close(made, plain_update(fused(), [late], torch.ones(2, 1), x).float())
    assert [each.data_ptr() for each in stack.buffers()] == addresses


def test_more_tokens_than_there_are_gates_for_are_refused(adapters: list[Adapter]) -> None:
    with pytest.raises(RuntimeError, match="gates for 16"):
        board().fill(np.zeros((1, 3), np.float32), [17])


@pytest.mark.parametrize("most", [0, 2, 1000], ids="kernels that write for up to {} tokens".format)
def test_packed_products_are_the_same(new_stack: NewStack, adapters: list[Adapter], most: int) -> None:
    gates = board()
    stack = new_stack(fused(), gates, own_ranks(fused(), adapters))
    for slot, adapter in enumerate(adapters):
        stack.put(slot, adapter)
    written: list[int] = []

    def pack(weight: torch.Tensor) -> Product:
        def into(made: torch.Tensor, x: torch.Tensor) -> None:
            written.append(len(x))
            made.copy_(x @ weight.t())

        return Product(lambda x: x @ weight.t(), into if most else None, most, len(weight))

    rows = np.array([[2.0, 1.0, 0.5], [0.0, 1.0, 3.0], [1.0, 0.0, 0.0]], np.float32)  # (S, slots)
    steps = [(rows[[which] * num_tokens], num_tokens) for which, num_tokens in enumerate((3, 1, 3))]
    inputs = [(torch.randn(num_tokens, 32), torch.randn(num_tokens, 64)) for _, num_tokens in steps]
    made: list[list[torch.Tensor]] = []
    for is_packed in (False, True):
        if is_packed:
            stack.pack(pack)
        made.append([])
        for (each, num_tokens), (x, y) in zip(steps, inputs, strict=True):
            gates.fill(each, [1] * num_tokens)
            made[-1].append(stack.update(y.clone(), x))
    for plain, packed in zip(*made, strict=True):
        torch.testing.assert_close(packed, plain)
    assert set(written) == {each for each in (1, 3) if each <= most}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_graph_reads_new_gates(new_stack: NewStack, adapters: list[Adapter]) -> None:
    device = torch.device("cuda")
    gates = GateBoard(16, device, torch.float32)
    stack = new_stack(fused(), gates, own_ranks(fused(), adapters))
    for slot, adapter in enumerate(adapters):
        stack.put(slot, adapter)
    x = torch.randn(4, 32, device=device)
    base = torch.randn(4, 64, device=device)
    stack.update(base.clone(), x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = stack.update(base.clone(), x)
    scales = torch.tensor([next(iter(adapter.pairs.values())).scale for adapter in adapters])
    for seed in range(3):
        weights = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
        gates.fill((weights * scales).numpy(), [1] * 4)
        graph.replay()
        expected = base.cpu() + plain_update(fused(), adapters, weights, x).float()
        torch.testing.assert_close(made.cpu(), expected, atol=1e-4, rtol=1e-3)
