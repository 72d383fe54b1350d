"""The rotation of rows before they are quantised: blocks of columns times a Hadamard matrix, which spreads outliers over a block.

The matrix of 64 and of 256 is *regular* (all rows have one sum), the one of ConvRot (arXiv 2512.03673): the Kronecker power of
``[[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2``. That of 128 is ``[[1, 1], [1, -1]] / sqrt(2)`` times that of
64. Each is orthogonal and symmetric: with inputs and weights rotated alike a product is what it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: columns that may be rotated together
SIZES = (64, 128, 256)


def rotate(x: Tensor, size: int) -> Tensor:
    """x [..., K], each `size` columns times the matrix of that size; in x's dtype, in steps whose order is the specification.

    In steps of 1, 4, 16, … columns a, b, c, d become ``(a + b) + (c - d)``, ``(a + b) - (c - d)``, ``(c + d) + (a - b)``,
    ``(c + d) - (a - b)``; of 128 columns the halves a, b become ``a + b``, ``a - b``; then all are multiplied by 1 / sqrt(size).
    """
    step = 1
    while 4 * step <= size:
        a, b, c, d = x.unflatten(-1, (-1, 4, step)).unbind(-2)
        ab, cd, a_b, c_d = a + b, c + d, a - b, c - d
        x = torch.stack([ab + c_d, ab - c_d, cd + a_b, cd - a_b], -2).flatten(-3)
        step *= 4
    if step < size:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
    return x * torch.full((), 1 / math.sqrt(size), dtype=x.dtype, device=x.device)


def hadamard(size: int) -> Tensor:
    """The matrix, [size, size], in float64."""
    return rotate(torch.eye(size, dtype=torch.float64, device="cpu"), size)


def sylvester(size: int) -> Tensor:
    """Sylvester's matrix of 1 and -1, [size, size], size a power of 2, in float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def fitting(columns: int, most: int | None) -> int | None:
    """The largest size up to `most` that divides `columns`; None where none does, or `most` is None."""
    return None if most is None else next((n for n in reversed(SIZES) if n <= most and columns % n == 0), None)


def check_rotate(op: str, rotate: int | None, columns: int, group_size: int | None) -> None:
    if rotate is None:
        return
    if isinstance(rotate, bool) or rotate not in SIZES:
        sizes = ", ".join(map(str, SIZES))
        raise ValueError(
            f"{op}: rotate must be one of {sizes}, the columns that are rotated together, or None, not {rotate!r}"
        )
    if columns % rotate:
        raise ValueError(
            f"{op}: {columns} columns are no multiple of rotate={rotate}: use rotate={fitting(columns, rotate)}"
        )
    if group_size is not None and group_size % rotate:
        raise ValueError(f"{op}: group_size={group_size} is no multiple of rotate={rotate}: columns that are rotated together "
                         "share a scale")  # fmt: skip


@dataclass(frozen=True)
class SignedRotation:
    """A Hadamard matrix M of others that is ours but for signs of its rows, and signs and the order of its columns: of each `size`
    columns of x, x M / sqrt(size) is ``rotate(x * signs, size)[..., order] * flips``."""

    size: int
    signs: Tensor  #: float32 [size], 1 and -1
    order: Tensor  #: int64 [size]
    flips: Tensor  #: float32 [size], 1 and -1

    @staticmethod
    def of(matrix: Tensor) -> SignedRotation | None:
        """For a matrix of 1 and -1, [size, size]; None where it is no such one, or of no size that is rotated here.

        Sylvester's are, of each size. Which signs the rows have follows from one column, whichever of ours it is compared with:
        products of two columns of ours are columns of Sylvester's, which form a group.
        """
        size = len(matrix)
        if size not in SIZES or matrix.shape != (size, size) or not (matrix.abs() == 1).all():
            return None
        ours, matrix = hadamard(size).sign(), matrix.double()
        signs = matrix[:, 0] * ours[:, 0]
        columns = ours @ (signs[:, None] * matrix) / size  # of theirs in ours, which is symmetric
        order = columns.abs().argmax(0)
        flips = columns.gather(0, order[None])[0]
        if len(order.unique()) < size or not torch.equal(ours[:, order] * flips * signs[:, None], matrix):
            return None
        return SignedRotation(size, signs.float(), order, flips.float())

    def weight(self, q: Tensor) -> Tensor:
        """A weight [N, K] for x M / sqrt(size), int8 or e4m3, as one for ``rotate(x * signs, size)``. An int8 of -128 whose sign
        changes becomes 127."""
        blocks = q.float().unflatten(1, (-1, self.size)) * self.flips.to(q.device)
        back = blocks.index_select(2, self.order.argsort().to(q.device)).flatten(1)
        return back.clamp(max=127).to(torch.int8) if q.dtype == torch.int8 else back.to(q.dtype)

    def channel_scale(self, columns: int, device: torch.device) -> Tensor | None:
        """What x [..., columns] is multiplied by; None where it is 1."""
        signs = self.signs.to(device).repeat(columns // self.size)
        return None if bool((signs > 0).all()) else signs
