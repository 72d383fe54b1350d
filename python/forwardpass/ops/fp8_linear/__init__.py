"""fp8_linear: a linear layer with e4m3 weights and activations, float in and float out, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.epilogue import check_epilogue, fake_linear
from ..common.quantized_rows import E4M3, FLOATS, check_float_rows, check_quantized, copy_notes
from ..fp8_gemm import BLOCK, check_fp8_weight, why_no_fp8
from . import reference


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    channel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    rotate: int | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """`quantize(x)` to e4m3, then `fp8_gemm` with `weight`, without what passes between them.

    Args:
        x: float32, float16 or bfloat16 [..., K], last stride 1, any row stride.
        weight: float8_e4m3fn [N, K].
        weight_scale: float32 [1] or [N], and x is quantised per row; or of 128 x 128 blocks as fp8_gemm's b_scale, and x is
            quantised in groups of 128 columns.
        bias, activation: as in `dequant_activation`; gated activations want the rows of weight, bias and a weight_scale [N]
            interleaved by `interleave_gate_up`.
        out_dtype: float32, float16 or bfloat16; None: that of x.
        scale: float32, one element: static quantisation of x, not with block scales.
        channel_scale: float32 [K], multiplies x first, as in `quantize`.
        residual: as in `dequant_activation`: [..., N] (gated: N / 2) of out_dtype.
        rotate: as in `quantize`; the columns of weight were rotated alike.
        ada_gate: as in `dequant_activation`: [B, N] (gated: N / 2) of out_dtype, with a residual: `ada_gate[b] * y + residual`.

    Returns:
        [..., N] (gated: N / 2) of out_dtype, contiguous.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments; GPUs below sm_89 multiply no FP8.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, weight = torch.randn(4, 256), torch.randn(128, 256)
        >>> q, weight_scale, _ = fp.ops.quantize(weight, torch.float8_e4m3fn)
        >>> y = fp.ops.fp8_linear(x, q, weight_scale)
        >>> y.shape, bool((y - x @ weight.T).norm() < 0.1 * y.norm())
        (torch.Size([4, 128]), True)
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    args = (x, weight, weight_scale, bias, activation, dtype, scale, channel_scale)
    if ada_gate is not None:
        return OPERATION(*args, residual, rotate, ada_gate)
    if rotate is not None:
        return OPERATION(*args, residual, rotate)
    return OPERATION(*args) if residual is None else OPERATION(*args, residual)


def _check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    scale: Tensor | None,
    channel_scale: Tensor | None,
    residual: Tensor | None = None,
    rotate: int | None = None,
    ada_gate: Tensor | None = None,
) -> None:
    op = "fp8_linear"
    check_float_rows(op, "x", x)
    blocks = check_fp8_weight(op, "weight", weight, "weight_scale", weight_scale, activation, "x", x)
    if blocks and scale is not None:
        raise ValueError(f"{op}: a static scale goes with weight_scale [1] or [N], and weight_scale is of blocks, "
                         f"{tuple(weight_scale.shape)}: drop scale")  # fmt: skip
    group_size = BLOCK if blocks else None
    check_quantized(op, x, x.shape[-1], E4M3, scale, None, group_size, True, channel_scale, rotate)
    if out_dtype not in FLOATS:
        raise TypeError(
            f"{op}: out_dtype must be float32, float16 or bfloat16, not {out_dtype}: for 8 bits use fp8_gemm"
        )
    unit = x.new_empty(1, dtype=torch.float32)
    lead, n = tuple(x.shape[:-1]), weight.shape[0]
    check_epilogue(op, x, lead, n, unit, unit if blocks else weight_scale, bias, activation, out_dtype, None, None, None,
                   residual=residual, operand="weight", ada_gate=ada_gate)  # fmt: skip


def _notes(x: Tensor, weight: Tensor, *options: object) -> list[str]:
    return copy_notes(weight=weight)


OPERATION = Operation(
    fp8_linear, _check, reference.fp8_linear, fake_linear, ("cuda", "triton"),
    why_not_arch=why_no_fp8, notes=_notes,
)  # fmt: skip
