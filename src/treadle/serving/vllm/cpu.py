"""Products with factors that never change, by the kernels that vLLM has for CPUs.

Products as thin as these take torch several times as long in half precision (docs/vllm.md). Importing
this module imports no vLLM; its kernels are looked up when a weight is packed.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from treadle.engine.runners.cpu.packing import is_amd

MAX_SMALL_OUTPUTS, MAX_SMALL_OUTPUTS_AMD = 1 << 14, 1 << 17
"""Tokens times outputs up to which vLLM's kernel for small weights is faster, without AMX tiles."""
ANY_TOKENS = 1 << 30
"""The limit where that kernel is the faster one for any number of tokens."""
OUTPUT_MULTIPLE, INPUT_MULTIPLE = 16, 32
"""That kernel takes multiples of these sizes."""

WriteKernel = Callable[[Tensor, Tensor], object]
"""(made, x) -> writes x W^T (T, out) into `made`, which is contiguous."""


@dataclass(frozen=True)
class Product:
    """Multiplies x (T, in) with a packed W by the kernel that is fastest for T tokens.

    Attributes:
        many: makes it for any number of tokens.
        into: (made, x) writes it into `made`, which is contiguous; None = there is no kernel that does.
        max_tokens: tokens up to which `into` is the faster one.
        size_out: the number of outputs, for `into`.
    """

    many: Callable[[Tensor], Tensor]
    into: WriteKernel | None = None
    max_tokens: int = 0
    size_out: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T; compiled code must not ask for T, and takes the one for many."""
        if self.into is None or torch.compiler.is_compiling() or x.shape[0] > self.max_tokens:
            return self.many(x)
        return in_new_memory(self.into, self.size_out, x)


def in_new_memory(into: WriteKernel, size_out: int, x: Tensor) -> Tensor:
    """Return the product (T, out) of x (T, in) that `into` writes, in new memory."""
    made = x.new_empty(x.shape[0], size_out)
    into(made, x)
    return made


def own_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product that vLLM's linear layers make with a weight (out, in)."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    utils.dispatch_cpu_unquantized_gemm(holder, remove_weight=False)
    return cast(Callable[[Tensor], Tensor], partial(cast(Any, holder.cpu_linear), weight=weight, bias=None))


def small_kernel(weight: Tensor) -> WriteKernel:
    """Return vLLM's kernel for small weights (out, in), without vLLM's own function around it."""
    kernels: Any = torch.ops._C
    packed = kernels.convert_weight_packed(weight)
    kernel = kernels.weight_packed_linear.default

    def into(made: Tensor, x: Tensor) -> None:
        kernel(made, x, packed, None, True)

    return into


@dataclass(frozen=True)
class CpuKernels:
    """The two ways in which vLLM multiplies with a weight (out, in) on a CPU.

    Attributes:
        own: makes the product of vLLM's linear layers.
        small: makes the kernel for small weights.
    """

    own: Callable[[Tensor], Callable[[Tensor], Tensor]] = own_product
    small: Callable[[Tensor], WriteKernel] = small_kernel


VLLM_KERNELS = CpuKernels()


def is_cpu() -> bool:
    """Return whether vLLM runs on a CPU here."""
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def cpu_product(weight: Tensor, kernels: CpuKernels = VLLM_KERNELS) -> Product:
    """Return a product with a weight (out, in) in half precision: x (T, in) -> (T, out).

    vLLM itself takes its kernel for small weights on CPUs with AMX tiles only. With AVX-512's bfloat16 it runs too, and
    is faster for few tokens; then both are kept, which takes the room of the factors once more.
    """
    branch = branch_of(weight)
    if branch == "onednn":
        return Product(kernels.own(weight))
    into = kernels.small(weight)
    if branch == "packed":
        return Product(partial(in_new_memory, into, len(weight)), into, ANY_TOKENS, len(weight))
    max_outputs = MAX_SMALL_OUTPUTS_AMD if is_amd() else MAX_SMALL_OUTPUTS
    return Product(kernels.own(weight), into, max_outputs // len(weight), len(weight))


def branch_of(weight: Tensor) -> str:
    """Return how a weight (out, in) is multiplied: "packed", "onednn" (vLLM's own way), or one of these "by tokens"."""
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    size_out, size_in = weight.shape
    if utils.check_cpu_sgl_kernel(size_out, size_in, weight.dtype):
        return "packed"
    is_fit = weight.dtype == torch.bfloat16 and size_out % OUTPUT_MULTIPLE == 0 and size_in % INPUT_MULTIPLE == 0
    return "by tokens" if is_fit and _has_bfloat16() and size_out <= MAX_SMALL_OUTPUTS else "onednn"


def _has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 with AVX-512, and vLLM has a kernel for it."""
    supported: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and supported() and hasattr(torch.ops._C, "weight_packed_linear")
