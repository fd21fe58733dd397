"""What the stages of a decode step on a GPU take and give, from `triton_launch` and `reference_kernels` alike.

A step's products leave the norm's scale for later: they read x * w instead of norm(x), and the stage behind a product
multiplies its result by 1 / rms(x), which is one number a row. So there is no stage between an addition and a product.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class LayerB(NamedTuple):
    """The second product of one layer's adapters: b (out, R), and the column of h where its R begin."""

    b: Tensor
    start: int


class PendingUpdate(NamedTuple):
    """What adapters add to layers that read the same input.

    Attributes:
        h: A x (B, sum of R).
        gates: (B, sum of R) float32.
        factors: of each layer, in the order of its columns; None where no adapter targets it.
    """

    h: Tensor
    gates: Tensor
    factors: Sequence[LayerB | None]


class PendingNorm(NamedTuple):
    """A norm that is still to be multiplied in: sums of squares (B, parts) of rows of `size`, and its epsilon."""

    squares: Tensor
    size: int
    epsilon: float


class PendingProduct(NamedTuple):
    """A product y (B, out and more) and what is still to come: (y + update) / rms + bias.

    Attributes:
        y: the product; columns behind `out` are not part of it.
        update: of the adapters; None where none acts.
        bias: (out,).
        norm: of the product's input.
    """

    y: Tensor
    update: PendingUpdate | None = None
    bias: Tensor | None = None
    norm: PendingNorm | None = None


class HeadNorms(NamedTuple):
    """Weights (head,) of the norms of each head's queries and keys, and their epsilon."""

    q: Tensor
    k: Tensor
    epsilon: float


class Heads(NamedTuple):
    """How many heads there are, and the size of each."""

    q: int
    kv: int
    size: int


class CacheWindow(NamedTuple):
    """Where a layer's keys and values lie, all of it data on the device: nothing here is part of a captured graph.

    Attributes:
        buffers: keys and values (rows, kv, columns, head), for the plain kernels alone.
        pointers: (2,) addresses of the two buffers.
        first: (B,) the first column of each row.
        place: (3,) columns of a buffer, the column to write to, and how many rows there are; rows behind are not real.
    """

    buffers: tuple[Tensor, Tensor]
    pointers: Tensor
    first: Tensor
    place: Tensor


class Kernels(Protocol):
    """The stages of a step; what they return is new."""

    def bucket(self, num_rows: int) -> int:
        """Return for how many rows a step is captured that has `num_rows`."""
        ...

    def binds(self, buffers: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        """Return what of a cache's buffers becomes part of a captured graph."""
        ...

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T (B, out) for x (B, in)."""
        ...

    def add(self, x: Tensor, product: PendingProduct, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + product (B, H), the same times `weight` (H,), and its sums of squares (B, parts)."""
        ...

    def store(
        self,
        product: PendingProduct,
        shape: Heads,
        rotation: tuple[Tensor, Tensor],
        head_norms: HeadNorms | None,
        window: CacheWindow,
    ) -> Tensor:
        """Finish q, k, v side by side (B, (q + kv + kv) * head), rotate q and k and write k and v to the cache.

        Args:
            product: has q, k and v.
            shape: of the heads.
            rotation: cosines and sines (B, head).
            head_norms: of q and k.
            window: to write to.

        Returns:
            the queries (B, q, head).
        """
        ...

    def attend(self, queries: Tensor, num_kv: int, scaling: float, window: CacheWindow) -> Tensor:
        """Return what queries (B, q, head) read from the cache: (B, q * head)."""
        ...

    def activate(self, product: PendingProduct, size: int) -> Tensor:
        """Return silu(gate) * up (B, size) of gate and up side by side (B, 2 * size)."""
        ...
