"""unpermute: what experts gave for a token, weighed and added up. The contract; the sum is in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.quantized_rows import check_elements, check_float_rows
from . import reference


def unpermute(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """The sum of each token's rows of y, each times its weight: in float32, in the order of its choices, rounded once.

    Args:
        y: float32, float16 or bfloat16 [rows, N], or [E, max_m, N], whose rows are numbered through; last stride 1, any row stride.
        position: int32 [T, k], contiguous: the rows of each token, as `permute_quantize` gives them. One that is no row of y, such
            as -1, adds nothing.
        weights: float32 or y's dtype [T, k], contiguous.

    Returns:
        [T, N] of y's dtype, contiguous.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> y = torch.randn(6, 64)  # rows of experts, as permute_quantize puts them
        >>> position = torch.tensor([[0, 3], [2, 4], [5, 1]], dtype=torch.int32)
        >>> weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.7, 0.3]])
        >>> torch.allclose(fp.ops.unpermute(y, position, weights)[1], 0.9 * y[2] + 0.1 * y[4])
        True
    """
    return OPERATION(y, position, weights)


def _check(y: Tensor, position: Tensor, weights: Tensor) -> None:
    op = "unpermute"
    check_float_rows(op, "y", y)
    if y.dim() < 2:
        raise ValueError(f"{op}: y must be [rows, N], and has shape {tuple(y.shape)}")
    if not isinstance(position, Tensor) or not isinstance(weights, Tensor):
        raise TypeError(f"{op}: position and weights must be tensors, and are {type(position).__name__} and "
                        f"{type(weights).__name__}")  # fmt: skip
    if position.dim() != 2 or weights.shape != position.shape:
        raise ValueError(f"{op}: position and weights must be of one shape [T, k], and have shapes {tuple(position.shape)} and "
                         f"{tuple(weights.shape)}")  # fmt: skip
    check_elements(op, "position", position, position.numel(), torch.int32, y)
    check_elements(op, "weights", weights, position.numel(), (torch.float32, y.dtype), y)


def _fake(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    return y.new_empty(position.shape[0], y.shape[-1])


OPERATION = Operation(unpermute, _check, reference.unpermute, _fake)
