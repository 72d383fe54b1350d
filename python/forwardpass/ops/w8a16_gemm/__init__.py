"""w8a16_gemm: a linear layer whose weights are 8-bit and whose activations stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation, Reason
from ..common.epilogue import check_epilogue, fake_output
from ..common.quantized_rows import E4M3, check_elements, check_float_rows, check_weight, copy_notes
from . import reference


def w8a16_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """`activation(x @ (weight * weight_scale).T + bias) + residual`: weights are read as 8 bits and upconverted in registers.

    Args:
        x: float16, bfloat16 (or, on the CPU, float32) [..., K], last stride 1, any row stride.
        weight: int8 or float8_e4m3fn [N, K].
        weight_scale: float32, one element, [N], or contiguous [N, ceil(K / 128)] for blocks of 128 columns.
        bias: float32, float16 or bfloat16 [N].
        activation: as in `dequant_activation`; gated ones want the rows of weight, weight_scale and bias interleaved by
            `interleave_gate_up`.
        residual: as in `dequant_activation`: [..., N] (gated: N / 2) of x's dtype.
        ada_gate: as in `dequant_activation`: [B, N] (gated: N / 2) of x's dtype, with a residual: `ada_gate[b] * y + residual`.

    Returns:
        [..., N] (gated: N / 2) of x's dtype, contiguous.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, weight = torch.randn(4, 256), torch.randn(128, 256)
        >>> q, weight_scale, _ = fp.ops.quantize(weight, torch.int8)
        >>> y = fp.ops.w8a16_gemm(x, q, weight_scale)
        >>> y.shape, bool((y - x @ weight.T).norm() < 0.02 * y.norm())
        (torch.Size([4, 128]), True)
    """
    args = (x, weight, weight_scale, bias, activation)
    if ada_gate is not None:
        return OPERATION(*args, residual, ada_gate)
    return OPERATION(*args) if residual is None else OPERATION(*args, residual)


def _check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> None:
    op = "w8a16_gemm"
    check_float_rows(op, "x", x)
    n = check_weight_only(op, "", weight, weight_scale, x, "weight_scale")
    unit = x.new_empty(1, dtype=torch.float32)
    blocks = weight_scale.dim() == 2
    check_epilogue(
        op, x, tuple(x.shape[:-1]), n, unit, unit if blocks else weight_scale, bias, activation, x.dtype, None, None, None,
        residual=residual, operand="weight", ada_gate=ada_gate,
    )  # fmt: skip


def check_weight_only(op: str, prefix: str, weight: object, scale: object, x: Tensor, name: str = "scale") -> int:
    """The rows of a weight. Its scale is checked if it is of blocks. Words name them by prefix, and the scale by `name`."""
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.int8, E4M3):
        dtype = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"{op}: {prefix}weight must be an int8 or float8_e4m3fn tensor, not {dtype}")
    check_weight(op, f"{prefix}weight", weight, "x", x)
    if not isinstance(scale, Tensor):
        raise TypeError(f"{op}: {prefix}{name} must be a float32 tensor, not {type(scale).__name__}")
    n, groups = weight.shape[0], -(-weight.shape[1] // 128)
    if scale.dim() == 2:
        if tuple(scale.shape) != (n, groups):
            raise ValueError(
                f"{op}: {prefix}{name} of blocks must be [{n}, {groups}], and has shape {tuple(scale.shape)}"
            )
        check_elements(op, f"{prefix}{name}", scale, n * groups, torch.float32, x)
    return n


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    return fake_output(x, (*x.shape[:-1], weight.shape[0]), activation, x.dtype)


def why_not_gpu(x: Tensor, *options: object) -> Reason | None:
    if x.dtype != torch.float32:
        return None
    return Reason(
        "dtype", "tensor cores multiply 16-bit activations, and x is float32", "convert it to bfloat16 or float16"
    )


def _notes(x: Tensor, weight: Tensor, *options: object) -> list[str]:
    return copy_notes(x=x, weight=weight)


OPERATION = Operation(
    w8a16_gemm,
    _check,
    reference.w8a16_gemm,
    _fake,
    why_not={"cuda": why_not_gpu, "triton": why_not_gpu},
    notes=_notes,
)
