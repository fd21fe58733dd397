"""Memory of caches goes back to the system when they go."""

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import psutil
import pytest
import torch

from treadle.common.memory import ALIGNMENT, new_pages, side_by_side, trim
from treadle.engine.kv_cache import RowCache
from treadle.engine.prefix_cache import PrefixCache, PrefixText

MIB = 1 << 20
LAYERS = 4


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is asked of Linux")
def test_what_batches_leave_behind_is_the_prefixes_that_are_kept() -> None:
    # in a process of its own: what tests before left in this one's heap is noise
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        sizes, freed, kept = alone.submit(run_batches).result()
    assert min(freed) > 0.9
    assert kept > 7 * MIB
    assert max(sizes[20:]) - min(sizes[20:]) < 4 * MIB  # 31 MiB where caches lie in the allocator's memory


def run_batches() -> tuple[list[int], list[float], int]:
    """Run 40 batches that keep prefixes.

    Returns:
        The resident bytes after each; the share of its own bytes that each gave back at its end; the prefixes' bytes.
    """
    torch.empty(30 * MIB, dtype=torch.uint8)  # once freed, glibc takes what is smaller from its heap, and keeps it
    read = torch.ones(16, 4, 140, 64)  # once for all: what the allocator keeps of these is not what is measured
    process = psutil.Process()
    prefixes = PrefixCache(8 * MIB)
    sizes: list[int] = []
    freed: list[float] = []
    for number in range(40):
        length = 40 + 17 * number % 100
        cache = RowCache()
        for layer in cache.rows(LAYERS):
            layer.update(read[:, :, :length], read[:, :, :length])
        prefixes.store(PrefixText(np.arange(length) + 1000 * number, {}, (), ("sum", "")), cache, 0)
        before = process.memory_info().rss
        del cache, layer
        sizes.append(process.memory_info().rss)
        own = 2 * LAYERS * 16 * length * 4 * 64 * 4  # rows, tokens, heads, head, bytes
        freed.append((before - sizes[-1]) / own)
    return sizes, freed, prefixes.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_tensors_like_any_other(dtype: torch.dtype) -> None:
    with warnings.catch_warnings(action="error"):
        made = new_pages((3, 1, 5), torch.zeros(2, dtype=dtype))
    assert (made.shape, made.dtype, made.device.type) == ((3, 1, 5), dtype, "cpu")
    made[:] = 2
    assert made.sum() == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_side_by_side_are_the_same_and_share_nothing(dtype: torch.dtype) -> None:
    given = {"odd": torch.randn(3, 5).to(dtype), "none": torch.zeros(0, 4, dtype=dtype), "one": torch.ones(1).half()}
    transposed = {"turned": torch.randn(7, 2).t()}
    made = side_by_side({**given, **transposed})
    for name, each in {**given, **transposed}.items():
        assert (made[name].dtype, made[name].shape) == (each.dtype, each.shape)
        assert torch.equal(made[name], each)
        assert made[name].is_contiguous()
        assert made[name].data_ptr() % ALIGNMENT == 0
    given["odd"].zero_()
    made["one"].zero_()
    assert made["odd"].any()
    assert given["one"].all()


def test_no_tensors_are_no_copies() -> None:
    assert side_by_side({}) == {}


def test_copies_live_as_long_as_one_of_them() -> None:
    made = side_by_side({"a": torch.arange(1000), "b": torch.arange(2000)})
    kept = made.pop("b")
    del made
    assert torch.equal(kept, torch.arange(2000))


def test_trimming_changes_no_values() -> None:
    kept = torch.arange(100_000)
    assert trim() in (True, False)
    assert torch.equal(kept, torch.arange(100_000))
