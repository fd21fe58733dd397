"""Memory of a tensor's own: what a cache lets go of goes back to the system at once.

From the allocator, large buffers that come and go between small ones that stay would leave holes, which glibc keeps: a
server's memory would grow until all of them are as large as the largest buffers.
"""

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

HAS_PAGES = hasattr(mmap, "MAP_PRIVATE")
"""Whether the system maps anonymous memory as Linux and macOS do."""


def new_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor of this shape, of the dtype and on the device of `like`, with any values.

    In a CPU's memory it lies in pages that no other tensor shares; those that nobody writes to take no memory.
    """
    if like.device.type != "cpu" or not HAS_PAGES:
        return like.new_empty(shape)
    pages = mmap.mmap(-1, prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(*shape)  # the tensor holds the pages, and they go with it
