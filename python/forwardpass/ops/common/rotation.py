"""The rotation of rows before they are quantised: blocks of columns times a Hadamard matrix, which spreads outliers over a block.

The matrix of 64 and of 256 is *regular* (all rows have one sum), the one of ConvRot (arXiv 2512.03673): the Kronecker power of
``[[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2``. That of 128 is ``[[1, 1], [1, -1]] / sqrt(2)`` times that of
64. Each is orthogonal and symmetric: with inputs and weights rotated alike a product is what it was.
"""

from __future__ import annotations

import math

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
    return rotate(torch.eye(size, dtype=torch.float64), size)


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
