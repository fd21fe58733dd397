"""Tensor parallel over two processes: the same text."""

from pathlib import Path

import pytest

import treadle
from treadle.common.params import RoutingParams
from treadle.routing.embedder import StaticEmbedder

from vllm_plugin.engines import ADAPTERS, PROMPTS, agree, reference, serving, write_bundle

MODES = {
    "auto": (None, None),
    "fixed": ({"math": 0.7, "code": 1.3}, RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 1.3}, every=None)),
    "one": ("science", RoutingParams.one("science")),
    "base": ("base", RoutingParams.base()),
}


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["sharded", "the key-value head in both"])
def test_two_processes_are_one(
    tmp_path: Path,
    embedder: StaticEmbedder,
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    bundle = write_bundle(tmp_path, embedder, ADAPTERS, kv_heads)
    engine = treadle.load(bundle, device="cpu", dtype="float32")
    expected = {mode: reference(engine, PROMPTS, routing) for mode, (_, routing) in MODES.items()}
    prompts = [prompt for prompt in PROMPTS for _ in MODES]
    given = [each for _ in PROMPTS for each, _ in MODES.values()]
    wanted = [expected[mode][index] for index in range(len(PROMPTS)) for mode in MODES]
    with serving(bundle, tensor_parallel_size=2) as served:
        assert agree(served.run(prompts, given), wanted) == []
