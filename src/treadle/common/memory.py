"""Memory of a tensor's own: what a cache lets go of goes back to the system at once.

From the allocator, large buffers that come and go between small ones that stay would leave holes, which glibc keeps: a
server's memory would grow until all of them are as large as the largest buffers.
"""

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes of a cache line: where each of several tensors in the same pages begins."""


def new_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor of this shape, of the dtype and on the device of `like`, with any values.

    In a CPU's memory it lies in pages that no other tensor shares; those that nobody writes to take no memory.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    pages = mmap.mmap(-1, prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(*shape)  # the tensor holds the pages, and they go with it


def side_by_side(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in pages of their own, in a CPU's memory. The pages go back to the system with the last copy."""
    sizes = [-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in tensors.values()]
    *starts, total = accumulate(sizes, initial=0)
    room = new_pages([max(total, 1)], torch.empty(0, dtype=torch.uint8))
    copies: dict[str, Tensor] = {}
    for start, (name, each) in zip(starts, tensors.items(), strict=True):
        copies[name] = room[start : start + each.nbytes].view(each.dtype).view(each.shape).copy_(each)
    return copies


def trim() -> bool:
    """Let the C library give back what it keeps of freed memory; return whether it can (glibc's can)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return True
