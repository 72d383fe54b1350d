"""permute_quantize: tokens to rows in the order of their experts, quantised on the way. The contract; the rule is reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.experts import MOST_EXPERTS
from ..common.quantized_rows import check_elements, check_float_rows, check_quantized, fake_quantized
from . import reference


def permute_quantize(
    x: Tensor,
    index: Tensor,
    num_experts: int,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    channel_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows that grouped GEMMs take: x [T, K] quantised as `quantize` does, a row for each expert that a token chose.

    Rows are in the order of experts, those of one expert in that of tokens and of a token's choices. A choice that is no expert,
    below 0 or from num_experts on, gets no row: its position is -1, and the rows at the end that are then left over are zeros.

    Args:
        x: float32, float16 or bfloat16 [T, K]; last stride 1, any row stride.
        index: int32 or int64 [T, k], contiguous: the experts of each token.
        num_experts: 1 to 512.
        dtype: torch.int8 (-127..127) or torch.float8_e4m3fn (-448..448), both saturating.
        group_size: columns that share a scale; None: the whole row.
        channel_scale: float32 [K], multiplies the columns of x first.

    Returns:
        q [T * k, K] of dtype, its rows padded to 16 bytes; scale, float32 [T * k], or [T * k, ceil(K / group_size)] with the rows
        contiguous; offs, int32 [num_experts], where each expert's rows end; position, int32 [T, k], the row of each choice, as
        `unpermute` takes it. The grouped GEMMs take q, offs and the scales: `fp8_grouped_gemm` those of 128 columns beside
        blocks.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, index = torch.randn(3, 64), torch.tensor([[0, 2], [1, 2], [2, 0]])  # 2 experts of 4 a token
        >>> q, scale, offs, position = fp.ops.permute_quantize(x, index, 4, torch.int8)
        >>> q.shape, offs.tolist(), position.tolist()
        (torch.Size([6, 64]), [2, 3, 6, 6], [[0, 3], [2, 4], [5, 1]])
    """
    return OPERATION(x, index, num_experts, dtype, group_size, channel_scale)


def _check(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, group_size: int | None, channel_scale: Tensor | None
) -> None:
    op = "permute_quantize"
    check_float_rows(op, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [T, K], and has shape {tuple(x.shape)}")
    if not isinstance(index, Tensor):
        raise TypeError(f"{op}: index must be an int32 or int64 tensor, not {type(index).__name__}")
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: index must be [{x.shape[0]}, k] for x {tuple(x.shape)}, and has shape {tuple(index.shape)}"
        )
    check_elements(op, "index", index, index.numel(), (torch.int32, torch.int64), x)
    if index.numel() > 2**30:
        raise ValueError(f"{op}: index must have at most 2^30 elements, and has {index.numel()}")
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not 1 <= num_experts <= MOST_EXPERTS:
        raise ValueError(f"{op}: num_experts must be an integer from 1 to {MOST_EXPERTS}, not {num_experts!r}")
    check_quantized(op, x, x.shape[1], dtype, None, None, group_size, True, channel_scale)


def _fake(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, group_size: int | None, channel_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, scale, _ = fake_quantized(x, (index.shape[0] * index.shape[1], x.shape[1]), dtype, False, group_size, True)
    return (
        q,
        scale,
        x.new_empty(num_experts, dtype=torch.int32),
        x.new_empty(index.shape, dtype=torch.int32),
    )


OPERATION = Operation(permute_quantize, _check, reference.permute_quantize, _fake)
