"""Triton kernels compute the same as the reference kernels, on random shapes: on a GPU, or in Triton's interpreter.

The interpreter of Triton 3.6 needs numpy before 2.4.
"""

import os
from importlib import import_module

import pytest
import torch
from torch import Tensor

from treadle.engine.runners.cuda.interface import (
    CacheWindow,
    HeadNorms,
    Heads,
    LayerB,
    PendingNorm,
    PendingProduct,
    PendingUpdate,
)

from reference_kernels import PlainKernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is first imported
    pytest.skip("there is no GPU: set TRITON_INTERPRET=1 to use Triton's interpreter", allow_module_level=True)
kernels, products = (
    import_module("treadle.engine.runners.cuda.triton_launch"),
    import_module("treadle.engine.runners.cuda.gemv"),
)
PLAIN = PlainKernels()


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def noise(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, device=DEVICE)


def product(
    draw: torch.Generator, rows: int, outs: list[int], ranks: list[int], *, has_norm: bool = True, has_bias: bool = True
) -> PendingProduct:
    """Return a product of layers with these outputs, whose adapters have these ranks; 0 = none."""
    out, rank = sum(outs), sum(ranks)
    y = noise(draw, rows, out + rank)
    starts = [sum(ranks[:index]) for index in range(len(ranks))]
    factors = [
        LayerB(noise(draw, size, each), start) if each else None
        for size, each, start in zip(outs, ranks, starts, strict=True)
    ]
    update = PendingUpdate(y[:, out:], noise(draw, rows, rank), factors) if rank else None
    norm = PendingNorm(noise(draw, rows, 3).square() * 20, 48, 1e-5) if has_norm else None
    return PendingProduct(y, update, noise(draw, out) if has_bias else None, norm)


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("rank", [0, 3, 70, 600])
def test_add(draw: torch.Generator, rows: int, rank: int) -> None:
    given = product(draw, rows, [48], [rank], has_norm=False, has_bias=rank == 3)
    x, weight = noise(draw, rows, 48), noise(draw, 48)
    total, weighted, squares = kernels.TritonKernels().add(x, given, weight)
    expected, expected_weighted, expected_squares = PLAIN.add(x, given, weight)
    assert_same(total, expected)
    assert_same(weighted, expected_weighted)
    assert_same(squares.sum(-1, keepdim=True), expected_squares)


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("ranks", [[0, 0], [5, 0], [2, 70]])
def test_activate(draw: torch.Generator, rows: int, ranks: list[int]) -> None:
    given = product(draw, rows, [72, 72], ranks, has_bias=ranks[0] == 5)
    assert_same(kernels.TritonKernels().activate(given, 72), PLAIN.activate(given, 72))


def window(draw: torch.Generator, rows: int, room: int, heads: Heads, first: list[int], column: int) -> CacheWindow:
    """Return a cache of 40 columns with room for more rows, NaN wherever no row may look."""
    buffers = tuple(noise(draw, room, heads.kv, 40, heads.size) for _ in range(2))
    for buffer in buffers:
        buffer[:, :, column + 1 :] = torch.nan
        for row, begin in enumerate(first[:room]):
            buffer[row, :, :begin] = torch.nan
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    place = torch.tensor([40, column, rows], device=DEVICE)
    return CacheWindow(buffers, pointers, torch.tensor(first, device=DEVICE), place)


@pytest.mark.parametrize("rows", [1, 3, 18])
@pytest.mark.parametrize(("ranks", "has_norms"), [([0, 0, 0], True), ([2, 0, 3], False), ([4, 300, 1], True)])
def test_store(draw: torch.Generator, rows: int, ranks: list[int], *, has_norms: bool) -> None:
    heads = Heads(4, 2, 8)
    given = product(draw, rows, [32, 16, 16], ranks, has_bias=ranks[1] == 300)
    rotation = noise(draw, rows, 8), noise(draw, rows, 8)
    norms = HeadNorms(noise(draw, 8), noise(draw, 8), 1e-6) if has_norms else None
    caches = [window(draw.manual_seed(1), rows, rows, heads, [0] * rows, 7) for _ in range(2)]
    q = kernels.TritonKernels().store(given, heads, rotation, norms, caches[0])
    assert_same(q, PLAIN.store(given, heads, rotation, norms, caches[1]))
    for one, other in zip(caches[0].buffers, caches[1].buffers, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_rows_that_are_not_real_write_and_read_nothing(draw: torch.Generator) -> None:
    heads = Heads(4, 2, 8)
    given = product(draw, 4, [32, 16, 16], [2, 0, 3])
    rotation = noise(draw, 4, 8), noise(draw, 4, 8)
    cache = window(draw, 2, 2, heads, [0, 3, 0, 0], 7)  # room for two rows alone
    own = kernels.TritonKernels()
    q = own.store(given, heads, rotation, None, cache)
    read = own.attend(q, 2, 0.3, cache)
    assert torch.isfinite(read).all()
    assert not read[2:].any()
    real = CacheWindow(cache.buffers, cache.pointers, cache.first[:2], cache.place)
    assert_same(read[:2], PLAIN.attend(q[:2], 2, 0.3, real))


@pytest.mark.parametrize(("num_kv", "splits"), [(1, 1), (2, 5), (4, 1), (4, 32)])
def test_attend(draw: torch.Generator, num_kv: int, splits: int) -> None:
    cache = window(draw, 3, 5, Heads(4, num_kv, 16), [0, 5, 33], 35)
    q, own = noise(draw, 3, 4, 16), kernels.TritonKernels(attention_programs=splits * 3 * num_kv)
    for _ in range(2):  # the tickets are zeros again
        assert_same(own.attend(q, num_kv, 0.25, cache), PLAIN.attend(q, num_kv, 0.25, cache))


@pytest.mark.parametrize(("outs", "size"), [(40, 70), (64, 128)])
def test_products(draw: torch.Generator, outs: int, size: int) -> None:
    weight = noise(draw, outs, size)
    for rows in (1, 5, 33):
        x = noise(draw, rows, size)
        torch.testing.assert_close(products.thin_product(x, weight, 32, 64, 4, 3), x @ weight.t(), atol=1e-4, rtol=1e-4)
    vector = products.vector_product(x[:1], weight, 4, 64, 4)
    torch.testing.assert_close(vector, x[:1] @ weight.t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "outs"), [(1, 50), (1, 5000), (8, 50), (8, 5000), (9, 5000), (32, 16400)])
def test_the_fastest_products(draw: torch.Generator, rows: int, outs: int) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter's `dot` knows no bfloat16
    x, weight = noise(draw, rows, 70).to(dtype), noise(draw, outs, 70).to(dtype)
    expected = x.float() @ weight.float().t()
    torch.testing.assert_close(products.fastest_product(x, weight).float(), expected, atol=2e-2, rtol=1e-2)
