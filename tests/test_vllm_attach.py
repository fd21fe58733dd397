"""Which part of which of the checkpoint's layers a linear layer of vLLM's holds, and a doctor without vLLM."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from treadle.errors import ModelError
from treadle.vllm_plugin.attach import place_of

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def column(sizes: list[int], tp_size: int, tp_rank: int, **more: Any) -> SimpleNamespace:
    """What vLLM's column-parallel layers say of themselves; sizes are those of this process."""
    return SimpleNamespace(
        input_size=64, input_size_per_partition=64, output_partition_sizes=sizes, output_size_per_partition=sum(sizes),
        tp_size=tp_size, tp_rank=tp_rank, **more,
    )  # fmt: skip


def test_heads_are_sharded_and_key_value_heads_repeated() -> None:
    # eight query heads and two key-value heads of 16 over four processes: each pair of processes has the same one
    places = [
        place_of("l.qkv_proj", column([32, 16, 16], 4, rank, num_kv_head_replicas=2), PACKED) for rank in range(4)
    ]
    q, k, v = zip(*(place.parts for place in places), strict=True)
    assert [part.path for part in places[0].parts] == ["l.q_proj", "l.k_proj", "l.v_proj"]
    assert [(part.rows.start, part.rows.stop) for part in q] == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert [(part.rows.start, part.rows.stop) for part in k] == [(0, 16), (0, 16), (16, 32), (16, 32)]
    assert [part.shape for part in (q[0], k[0], v[0])] == [(64, 128), (64, 32), (64, 32)]
    assert [part.start for part in places[0].parts] == [0, 32, 48]
    assert places[0].size_out == 64


def test_a_row_parallel_layer_reads_its_columns() -> None:
    layer = SimpleNamespace(
        input_size=96, input_size_per_partition=48, output_partition_sizes=[64], output_size_per_partition=64,
        tp_size=2, tp_rank=1,
    )  # fmt: skip
    (part,) = place_of("l.down_proj", layer, PACKED).parts
    assert (part.shape, part.columns, part.rows) == ((96, 64), slice(48, 96), slice(0, 64))


def test_a_fused_layer_that_is_unknown_is_refused() -> None:
    with pytest.raises(ModelError, match=r"l\.mixed_proj makes 2 outputs"):
        place_of("l.mixed_proj", column([32, 32], 1, 0), PACKED)


def test_the_doctor_wants_a_bundle_or_vllm(run) -> None:
    assert run("doctor")[0] == 2
    assert run("doctor", "/nowhere", "--vllm")[0] == 2


@pytest.mark.skipif(find_spec("vllm") is not None, reason="here vLLM is installed")
def test_the_doctor_says_how_vllm_is_installed(run) -> None:
    code, _, error = run("doctor", "--vllm")
    assert code == 1
    assert "pip install 'treadle[vllm]'" in error
