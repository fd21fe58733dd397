"""Keys and values have a budget: rows wait for room, none that runs is lost, and the buffers never take more."""

import weakref
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache, RowLayer
from treadle.lora.adapter import read_adapter
from treadle.routing.router import Router
from treadle.serving.openai.jobs import Job, News, Work
from treadle.serving.openai.kv_memory import MIN_KV_BYTES, KvMemory, free_memory
from treadle.serving.openai.loop import Loop
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.targets import Routers

from conftest import TINY, byte_tokenizer

TOKEN = 2 * 2 * 2 * 8 * 4
"""Bytes of a token of the tiny model: keys and values of two layers with two heads of 8, in float32."""
MOST = (1 << 20) * 2 // 3 // TOKEN
"""Tokens that a MiB holds beside the layer of two that is moved while it grows."""


@pytest.fixture
def engine(adapter_folders: dict[str, Path], router: Router) -> Engine:
    """As the tests' engine, with room for long prompts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=4096, initializer_range=0.3)).eval()
    return Engine(model, byte_tokenizer(), [read_adapter(f, n) for n, f in adapter_folders.items()], router)


class Pages:
    """Counts the bytes of all buffers that are alive, and the most there were at any time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def new(self, shape: Sequence[int]) -> torch.Tensor:
        array = np.empty(prod(shape), np.float32)
        self.now += array.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(array, self.free, array.nbytes)
        return torch.from_numpy(array).view(*shape)

    def free(self, size: int) -> None:
        self.now -= size


@pytest.fixture
def pages(engine: Engine) -> Pages:
    made = Pages()

    class Counted(RowLayer):
        def new_buffer(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
            return made.new(shape)

    engine.runner.layer_type = Counted
    return made


@pytest.mark.parametrize(
    "routing", [RoutingParams.base(), RoutingParams(every=4, past="recompute")], ids=["kept", "read again"]
)
def test_many_long_requests_within_a_mebibyte(engine: Engine, pages: Pages, routing: RoutingParams) -> None:
    lengths = [300, 30, 250, 700, 10, 300, 120, 5] * 2
    prompts = [[97 + (place * 5 + step) % 26 for step in range(length)] for place, length in enumerate(lengths)]
    sampling = [SamplingParams(max_tokens=4 + 3 * place % 9) for place in range(len(lengths))]
    each = list(zip(prompts, sampling, strict=True))
    alone = [engine.generate_ids([p], sampling=s, routing=routing)[0].token_ids for p, s in each]
    metrics = Metrics()
    loop = Loop(engine, Routers(engine).among, ServeParams(kv_memory=1, prefix_cache=0, prompt_chunk=512), metrics)
    news: list[News] = []
    jobs = [Job(Work([p], [s], routing), news.append) for p, s in each]
    pages.most = pages.now
    for job in jobs:
        loop.accept(job)
    most_running = 0
    while loop.is_busy:
        loop.advance()
        used, limit, running = (
            metrics.registry.get_sample_value(f"treadle_{name}")
            for name in ("kv_bytes", "kv_limit_bytes", "sequences_running")
        )
        most_running = max(most_running, running)
        assert used <= limit == 1 << 20
    assert not [each for each in news if isinstance(each, Exception)]
    assert [tuple(event.token_id for event in job.rows[0].events) for job in jobs] == alone
    assert 1 < most_running < len(jobs)  # others waited
    assert pages.most <= 1 << 20


def test_a_row_that_can_never_be_held_is_refused_and_others_are_not(engine: Engine) -> None:
    loop = Loop(engine, Routers(engine).among, ServeParams(kv_memory=1), Metrics())
    told: dict[int, list[News]] = {}
    for length, max_tokens in ((MOST, 2), (MOST, 1), (10, MOST), (10, MOST - 9)):
        news = told.setdefault(len(told), [])
        loop.accept(
            Job(Work([[97] * length], [SamplingParams(max_tokens=max_tokens)], RoutingParams.base()), news.append)
        )
    loop.flush()
    assert [isinstance(news[0], OptionError) for news in told.values()] == [True, False, True, False]
    assert f"the prompt has {MOST} tokens and the answer up to 2; allowed: at most {MOST} together" in str(told[0][0])
    assert "--kv-memory" in str(told[0][0])
    assert loop.num_ended == 2


def test_what_is_not_given_comes_from_what_is_free(engine: Engine) -> None:
    memory = KvMemory(engine, None, 1024, lambda _: 4 << 30)
    assert (memory.total, memory.sizes.token_bytes) == (3 << 29, TOKEN)
    assert KvMemory(engine, None, 0, lambda _: 0).total == MIN_KV_BYTES


def test_free_memory_is_that_of_the_system_or_of_the_container(tmp_path: Path) -> None:
    free = partial(free_memory, torch.device("cpu"), tmp_path)
    assert free() > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 100\nactive_file 200\ninactive_file 300\nfile 500\n")
    assert free() > 1 << 20
    (tmp_path / "memory.max").write_text("1100\n")
    assert free() == 1000


@pytest.mark.parametrize(
    ("layer_bytes", "columns"), [(None, None), (0, None), (10_000, None), (None, 40), (10_000, 40)]
)
def test_buffers_grow_ahead_as_far_as_they_may_and_count_what_they_take(
    layer_bytes: int | None, columns: int | None
) -> None:
    cache = RowCache()
    if layer_bytes is not None:
        cache.allow(layer_bytes)
    if columns is not None:
        cache.expect(columns)
    states = torch.randn(3, 2, 20, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    for _ in range(30):
        for layer in range(2):
            cache.update(states[:, :, :1], states[:, :, :1], layer)
    assert cache.length == 50
    assert cache.num_bytes == sum(each.nbytes for pair in cache.buffers() for each in pair)
    most = cache.buffers()[0][0].shape[2]
    needed = 3 * 50 * 2 * 8 * 4 * 2
    if layer_bytes == 0 or columns == 40:
        assert most == 50
    assert layer_bytes is None or cache.num_bytes / 2 <= max(layer_bytes, needed)
