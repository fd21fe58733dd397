"""Products by vLLM's kernels for CPUs are the plain product, to the rounding of bfloat16."""

import pytest
import torch

from treadle.engine.runners.cpu.packing import is_amd
from treadle.serving.vllm import cpu

SHAPES = [(128, 576), (960, 128), (32, 1536), (3072, 32), (16, 32), (4096, 64), (15, 64), (64, 40)]
TOKENS = [1, 2, 5, 8, 16, 17, 40, 300]
EPSILON = 2**-8
"""The step of bfloat16: half of it is lost where a sum in float32 is rounded."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_the_plain_product(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    product = cpu.cpu_product(weight)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
        expected = x.double() @ weight.double().t()
        with torch.inference_mode():
            made = product(x)
        assert made.dtype == torch.bfloat16
        torch.testing.assert_close(made.double(), expected, rtol=EPSILON, atol=EPSILON / 16)


def test_both_branches_are_taken() -> None:
    weight = torch.randn(128, 64).bfloat16()
    if cpu.branch_of(weight) != "by tokens":
        pytest.skip("this CPU has one kernel for all")
    taken: list[str] = []
    kernels = cpu.CpuKernels(
        own=lambda _: lambda x: taken.append("many") or x, small=lambda _: lambda made, x: taken.append("few")
    )
    product = cpu.cpu_product(weight, kernels)
    most = (cpu.MAX_SMALL_OUTPUTS_AMD if is_amd() else cpu.MAX_SMALL_OUTPUTS) // 128
    for tokens in (1, most, most + 1):
        product(torch.zeros(tokens, 64))
    assert taken == ["few", "few", "many"]
    assert cpu.branch_of(torch.zeros(15, 64).bfloat16()) == cpu.branch_of(torch.zeros(64, 40).bfloat16()) == "onednn"
    assert cpu.branch_of(torch.zeros(128, 64).half()) == "onednn"
