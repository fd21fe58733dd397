"""Memory layouts of a step's matrix products (GEMMs) on a CPU; which one is fastest depends on the CPU."""

import torch
from torch import Tensor

from treadle.engine.runners.cpu.packing import BaseWeight, is_amd, packed_product

HAS_MKL = torch.backends.mkl.is_available()
COLUMN_ROWS = {torch.float32: range(4, 33), torch.bfloat16: range(2, 17)}
"""Numbers of rows for which W x^T is faster than x W^T with MKL and oneDNN (9fff023:benchmarks/products.py)."""
AMD_COLUMN_ROWS = {torch.float32: range(2, 33), torch.bfloat16: range(8, 33)}
"""The same on AMD's CPUs. MKL runs a matrix times one vector, or x W^T of a few rows, on one thread there."""


class GemmLayout:
    """How results lie in memory. This class is row-major: (B, n), computed as x W^T."""

    allocates_results = False
    """True if a product with a base weight comes in new memory (`packed_product`) and must be copied."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of `size` results a row."""
        return self.num_rows, size

    def operand(self, weight: Tensor) -> Tensor:
        """Return the view of W (out, in) that `multiply` takes."""
        return weight.t()

    def base_operand(self, weight: BaseWeight) -> Tensor:
        """Return the form of a base weight that `multiply_base` takes."""
        return self.operand(weight.plain)

    def to_layout(self, rows: Tensor) -> Tensor:
        """Return (B|1, n) in this layout."""
        return rows

    def gates_to_layout(self, gates: Tensor) -> Tensor:
        """Return gates (B|1, n) in the shape that multiplies results."""
        return self.to_layout(gates).contiguous()

    def to_rows(self, results: Tensor) -> Tensor:
        """Return results as a view (B, n)."""
        return results

    def select(self, results: Tensor, columns: slice) -> Tensor:
        """Return a view of some of the n columns."""
        return results[:, columns]

    def multiply(self, operand: Tensor, x: Tensor, out: Tensor) -> None:
        """Write W x to `out`."""
        torch.mm(x, operand, out=out)

    def multiply_base(self, operand: Tensor, x: Tensor, out: Tensor) -> None:
        """Write W x to `out`, for a base weight W."""
        self.multiply(operand, x, out)

    def add_product(self, y: Tensor, operand: Tensor, x: Tensor) -> None:
        """Add W x to y."""
        y.addmm_(x, operand)


class ColumnMajor(GemmLayout):
    """A column for each row of the batch: (n, B), computed as W x^T."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n, B)."""
        return size, self.num_rows

    def operand(self, weight: Tensor) -> Tensor:
        """W itself."""
        return weight

    def to_layout(self, rows: Tensor) -> Tensor:
        """(B|1, n) as (n, B|1)."""
        return rows.t()

    def to_rows(self, results: Tensor) -> Tensor:
        """(n, B) as (B, n)."""
        return results.t()

    def select(self, results: Tensor, columns: slice) -> Tensor:
        """Rows of (n, B)."""
        return results[columns]

    def multiply(self, operand: Tensor, x: Tensor, out: Tensor) -> None:
        """W x^T."""
        torch.mm(operand, x, out=out)

    def add_product(self, y: Tensor, operand: Tensor, x: Tensor) -> None:
        """Y + W x^T."""
        y.addmm_(operand, x)


class VectorLayout(ColumnMajor):
    """One row as a vector (n,)."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n,)."""
        return (size,)

    def to_layout(self, rows: Tensor) -> Tensor:
        """(1, n) as (n,)."""
        return rows[0]

    def to_rows(self, results: Tensor) -> Tensor:
        """(n,) as (1, n)."""
        return results[None]

    def multiply(self, operand: Tensor, x: Tensor, out: Tensor) -> None:
        """W x."""
        torch.mv(operand, x, out=out)

    def add_product(self, y: Tensor, operand: Tensor, x: Tensor) -> None:
        """Y + W x."""
        y.addmv_(operand, x)


class DuplicatedColumn(ColumnMajor):
    """One row as two equal columns (n, 2): MKL computes this product with all threads."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n, 2)."""
        return size, 2

    def to_layout(self, rows: Tensor) -> Tensor:
        """(1, n) as (n, 2), a copy."""
        return rows.expand(2, -1).contiguous().t()

    def gates_to_layout(self, gates: Tensor) -> Tensor:
        """(1, n) as (n, 1), for both columns."""
        return gates.t()

    def to_rows(self, results: Tensor) -> Tensor:
        """(n, 2) as (1, n), the first column."""
        return results[:, :1].t()


class PackedRowMajor(GemmLayout):
    """Row-major, computed by oneDNN from packed base weights; see `treadle.engine.runners.cpu.packing`."""

    allocates_results = True

    def base_operand(self, weight: BaseWeight) -> Tensor:
        """Return the packed copy."""
        return weight.packed

    def multiply_base(self, operand: Tensor, x: Tensor, out: Tensor) -> None:
        """Write x W^T to `out`."""
        out.copy_(packed_product(x, operand))


def fastest_layout(
    num_rows: int, dtype: torch.dtype, *, has_packs: bool, on_amd: bool | None = None, has_mkl: bool = HAS_MKL
) -> GemmLayout:
    """Return the layout for steps of `num_rows` rows. One machine always gets the same: layouts round differently.

    Args:
        num_rows: of the batch.
        dtype: of the base weights.
        has_packs: packed weights may be used; they are slower for a single float32 row.
        on_amd: the CPU is AMD's; None asks the system.
        has_mkl: PyTorch was built with MKL.
    """
    if has_packs and (num_rows > 1 or dtype != torch.float32):
        return PackedRowMajor(num_rows)
    on_amd = has_mkl and (is_amd() if on_amd is None else on_amd)
    if num_rows == 1 and not on_amd:
        return VectorLayout(1)
    if num_rows == 1 and dtype == torch.float32:
        return DuplicatedColumn(1)
    column_rows = (AMD_COLUMN_ROWS if on_amd else COLUMN_ROWS).get(dtype, ()) if has_mkl else ()
    return ColumnMajor(num_rows) if num_rows in column_rows else GemmLayout(num_rows)
