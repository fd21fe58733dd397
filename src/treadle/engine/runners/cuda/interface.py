"""The stages of a decode step on a GPU. `triton_launch` implements them; the tests' `reference_kernels` does in torch.

Products delay the norm's scale: they read x * w instead of norm(x), and the stage after a product multiplies its result
by 1 / rms(x), one number a row. So no stage is needed between an addition and a product.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class LayerB(NamedTuple):
    """The stacked B (out, R) of one layer, and the column of h where its R columns begin."""

    b: Tensor
    start: int


class PendingUpdate(NamedTuple):
    """The adapters' update of layers that read the same input, before the product with B.

    Attributes:
        h: A x (B, sum of R).
        gates: (B, sum of R) float32.
        layers: the B of each layer, in the order of its columns; None where no adapter targets it.
    """

    h: Tensor
    gates: Tensor
    layers: Sequence[LayerB | None]


class PendingNorm(NamedTuple):
    """A norm whose scale is pending: sums of squares (B, parts) of rows of `size`, and epsilon."""

    squares: Tensor
    size: int
    epsilon: float


class PendingProduct(NamedTuple):
    """A product y (B, out and more) whose result is (y + update) / rms + bias.

    Attributes:
        y: the product; columns after `out` are not part of it.
        update: of the adapters; None if none is active.
        bias: (out,).
        norm: of the product's input.
    """

    y: Tensor
    update: PendingUpdate | None = None
    bias: Tensor | None = None
    norm: PendingNorm | None = None


class HeadNorms(NamedTuple):
    """Weights (head,) of the norms of queries and keys, and their epsilon."""

    q: Tensor
    k: Tensor
    epsilon: float


class Heads(NamedTuple):
    """The numbers of heads, and the size of each."""

    q: int
    kv: int
    size: int


class CacheWindow(NamedTuple):
    """Where a layer's keys and values lie. All of it is data on the device; a captured graph contains none of it.

    Attributes:
        buffers: keys and values (rows, kv, columns, head), for the reference kernels alone.
        pointers: (2,) addresses of the two buffers.
        first: (B,) the first column of each row.
        place: (3,) columns of a buffer, the column to write to, and the number of real rows; later rows are padding.
    """

    buffers: tuple[Tensor, Tensor]
    pointers: Tensor
    first: Tensor
    place: Tensor


class Kernels(Protocol):
    """The stages of a step. They return new tensors."""

    def bucket(self, num_rows: int) -> int:
        """Return the number of rows for which a step of `num_rows` rows is captured."""
        ...

    def binds(self, buffers: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        """Return everything about a cache's buffers that a captured graph depends on."""
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
        """Finish q, k, v side by side, rotate q and k, and write k and v to the cache.

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
        """Return the attention result (B, q * head) of queries (B, q, head) over the cache."""
        ...

    def activate(self, product: PendingProduct, size: int) -> Tensor:
        """Return silu(gate) * up (B, size) of gate and up side by side (B, 2 * size)."""
        ...
