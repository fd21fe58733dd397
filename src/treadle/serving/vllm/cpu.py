"""Products with factors that never change, by the kernels that vLLM has for CPUs.

Products as thin as these take torch several times as long in half precision (`benchmarks/vllm_layer.py`).
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from treadle.engine.runners.cpu.packing import is_amd
from treadle.serving.vllm.products import Into, Product, made_anew

MOST_OUTPUTS, MOST_OUTPUTS_AMD = 1 << 14, 1 << 17
"""Tokens times outputs up to which vLLM's kernel for small weights is the faster one on a CPU without AMX tiles."""
MOST_TOKENS = 1 << 30
"""Where that kernel is the faster one for any number of them."""
OUTPUTS, INPUTS = 16, 32
"""That kernel takes multiples of these."""


def is_cpu() -> bool:
    """Return whether vLLM runs on a CPU here."""
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def cpu_product(weight: Tensor) -> Product:
    """Return a product with a weight (out, in) in half precision: x (T, in) -> (T, out).

    vLLM itself takes its kernel for small weights on CPUs with AMX tiles only. With AVX-512's bfloat16 it runs too, and
    is faster for few tokens; then both are kept, which takes the room of the factors once more.
    """
    branch = branch_of(weight)
    if branch == "onednn":
        return Product(_vllms_own(weight))
    into = _packed(weight)
    if branch == "packed":
        return Product(partial(made_anew, into, len(weight)), into, MOST_TOKENS, len(weight))
    most = MOST_OUTPUTS_AMD if is_amd() else MOST_OUTPUTS
    return Product(_vllms_own(weight), into, most // len(weight), len(weight))


def branch_of(weight: Tensor) -> str:
    """Return how a weight (out, in) is multiplied: "packed", "onednn" (vLLM's own way), or one of these "by tokens"."""
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    size_out, size_in = weight.shape
    if utils.check_cpu_sgl_kernel(size_out, size_in, weight.dtype):
        return "packed"
    is_fit = weight.dtype == torch.bfloat16 and size_out % OUTPUTS == 0 and size_in % INPUTS == 0
    return "by tokens" if is_fit and _has_bfloat16() and size_out <= MOST_OUTPUTS else "onednn"


def _has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 with AVX-512, and vLLM has a kernel for it."""
    supported: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and supported() and hasattr(torch.ops._C, "weight_packed_linear")


def _vllms_own(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product that vLLM's linear layers make with such a weight."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    utils.dispatch_cpu_unquantized_gemm(holder, remove_weight=False)
    return cast(Callable[[Tensor], Tensor], partial(cast(Any, holder.cpu_linear), weight=weight, bias=None))


def _packed(weight: Tensor) -> Into:
    """Return vLLM's kernel for small weights without vLLM's own function around it: (made, x) is written to."""
    kernels: Any = torch.ops._C
    packed = kernels.convert_weight_packed(weight)
    kernel = kernels.weight_packed_linear.default

    def into(made: Tensor, x: Tensor) -> None:
        kernel(made, x, packed, None, True)

    return into
