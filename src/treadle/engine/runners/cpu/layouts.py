"""How the results of a step lie in memory, and the product that makes them so: which is fastest depends on the CPU."""

import torch
from torch import Tensor

from treadle.engine.runners.cpu.packing import Weight, is_amd, packed_product

HAS_MKL = torch.backends.mkl.is_available()
COLUMN_ROWS = {torch.float32: range(4, 33), torch.bfloat16: range(2, 17)}
"""Numbers of rows for which W x^T is faster than x W^T with MKL and oneDNN (benchmarks/products.py)."""
AMD_COLUMN_ROWS = {torch.float32: range(2, 33), torch.bfloat16: range(8, 33)}
"""The same on AMD's CPUs, where MKL multiplies a matrix by one vector, or x W^T of a few rows, with one thread."""


class Form:
    """How the results of a step lie: a row for each row of the batch, (B, n), made as x W^T."""

    makes_anew = False
    """Whether products with the base's weights come in memory of their own (`packed_product`), and are copied."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of `size` results a row."""
        return self.num_rows, size

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the view of W (out, in) that `multiply` takes."""
        return weight.t()

    def base_matrix(self, weight: Weight) -> Tensor:
        """Return what `multiply_base` takes of a weight of the base's."""
        return self.matrix(weight.plain)

    def lay(self, rows: Tensor) -> Tensor:
        """Return the view of (B|1, n) that lies as results do."""
        return rows

    def lay_gates(self, gates: Tensor) -> Tensor:
        """Return gates (B|1, n) as what multiplies results."""
        return self.lay(gates).contiguous()

    def rows(self, laid: Tensor) -> Tensor:
        """Return the view (B, n) of what lies as results do."""
        return laid

    def part(self, laid: Tensor, columns: slice) -> Tensor:
        """Return the view of some of n."""
        return laid[:, columns]

    def multiply(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """Put W x into `out`."""
        torch.mm(x, matrix, out=out)

    def multiply_base(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """Put W x into `out`, W being the base's."""
        self.multiply(matrix, x, out)

    def add_product(self, y: Tensor, matrix: Tensor, x: Tensor) -> None:
        """Add W x to y."""
        y.addmm_(x, matrix)


class Columns(Form):
    """A column for each row of the batch, (n, B), made as W x^T."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n, B)."""
        return size, self.num_rows

    def matrix(self, weight: Tensor) -> Tensor:
        """W itself."""
        return weight

    def lay(self, rows: Tensor) -> Tensor:
        """(B|1, n) as (n, B|1)."""
        return rows.t()

    def rows(self, laid: Tensor) -> Tensor:
        """(n, B) as (B, n)."""
        return laid.t()

    def part(self, laid: Tensor, columns: slice) -> Tensor:
        """Rows of (n, B)."""
        return laid[columns]

    def multiply(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """W x^T."""
        torch.mm(matrix, x, out=out)

    def add_product(self, y: Tensor, matrix: Tensor, x: Tensor) -> None:
        """Y + W x^T."""
        y.addmm_(matrix, x)


class Vector(Columns):
    """One row as a vector, (n,)."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n,)."""
        return (size,)

    def lay(self, rows: Tensor) -> Tensor:
        """(1, n) as (n,)."""
        return rows[0]

    def rows(self, laid: Tensor) -> Tensor:
        """(n,) as (1, n)."""
        return laid[None]

    def multiply(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """W x."""
        torch.mv(matrix, x, out=out)

    def add_product(self, y: Tensor, matrix: Tensor, x: Tensor) -> None:
        """Y + W x."""
        y.addmv_(matrix, x)


class Twice(Columns):
    """One row as two equal columns, (n, 2): a product that MKL makes with all threads."""

    def shape(self, size: int) -> tuple[int, ...]:
        """(n, 2)."""
        return size, 2

    def lay(self, rows: Tensor) -> Tensor:
        """(1, n) as (n, 2), a copy."""
        return rows.expand(2, -1).contiguous().t()

    def lay_gates(self, gates: Tensor) -> Tensor:
        """(1, n) as (n, 1), for both columns."""
        return gates.t()

    def rows(self, laid: Tensor) -> Tensor:
        """(n, 2) as (1, n), the first column."""
        return laid[:, :1].t()


class Packed(Form):
    """Rows, made by oneDNN from weights of the base's that it has packed; see `treadle.engine.runners.cpu.packing`."""

    makes_anew = True

    def base_matrix(self, weight: Weight) -> Tensor:
        """Return the packed copy."""
        return weight.packed

    def multiply_base(self, matrix: Tensor, x: Tensor, out: Tensor) -> None:
        """Put x W^T into `out`."""
        out.copy_(packed_product(x, matrix))


def fastest_form(num_rows: int, dtype: torch.dtype, *, has_packs: bool) -> Form:
    """Return the form of a step of so many rows; on one machine always the same, because forms round differently.

    `has_packs`: the base's weights may be taken as oneDNN packs them, which is slower for one row of float32 alone.
    """
    if has_packs and (num_rows > 1 or dtype != torch.float32):
        return Packed(num_rows)
    on_amd = HAS_MKL and is_amd()
    if num_rows == 1 and not on_amd:
        return Vector(1)
    if num_rows == 1 and dtype == torch.float32:
        return Twice(1)
    many = (AMD_COLUMN_ROWS if on_amd else COLUMN_ROWS).get(dtype, ()) if HAS_MKL else ()
    return Columns(num_rows) if num_rows in many else Form(num_rows)
