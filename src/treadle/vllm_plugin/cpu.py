"""Products with factors that never change, by the kernels that vLLM has for CPUs.

Products as thin as these take torch several times as long in half precision (`benchmarks/vllm_layer.py`).
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

MOST_OUTPUTS = 1 << 14
"""Tokens times outputs up to which vLLM's kernel for small weights is the faster one on a CPU without AMX tiles."""
OUTPUTS, INPUTS = 16, 32
"""That kernel takes multiples of these."""

Product = Callable[[Tensor], Tensor]


def is_cpu() -> bool:
    """Return whether vLLM runs on a CPU here."""
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def cpu_product(weight: Tensor) -> Product:
    """Return a product with a weight (out, in) in half precision: x (T, in) -> (T, out).

    vLLM itself takes its kernel for small weights on CPUs with AMX tiles only. With AVX-512's bfloat16 it runs too, and
    is faster for few tokens; then both are kept, which takes the room of the factors once more.
    """
    branch = branch_of(weight)
    if branch == "packed":
        return _packed(weight)
    many = _vllms_own(weight)
    return partial(_by_tokens, _packed(weight), many, MOST_OUTPUTS // len(weight)) if branch == "by tokens" else many


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


def _vllms_own(weight: Tensor) -> Product:
    """Return the product that vLLM's linear layers make with such a weight."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    utils.dispatch_cpu_unquantized_gemm(holder, remove_weight=False)
    return cast(Product, partial(cast(Any, holder.cpu_linear), weight=weight, bias=None))


def _packed(weight: Tensor) -> Product:
    """Return the product by vLLM's kernel for small weights, without vLLM's own function around it."""
    kernels: Any = torch.ops._C
    return partial(_thin, kernels.weight_packed_linear, kernels.convert_weight_packed(weight), len(weight))


def _thin(kernel: Any, packed: Tensor, size_out: int, x: Tensor) -> Tensor:
    """Return x (T, in) times a packed weight, (T, out)."""
    made = x.new_empty(x.shape[0], size_out)
    kernel(made, x, packed, None, True)
    return made


def _by_tokens(few: Product, many: Product, most: int, x: Tensor) -> Tensor:
    """Return one of two products with x (T, in), by T; compiled code must not ask for T, and has the one for many."""
    if torch.compiler.is_compiling() or x.shape[0] > most:
        return many(x)
    return few(x)
