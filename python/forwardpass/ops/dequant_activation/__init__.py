"""dequant_activation: accumulators of a GEMM to its output, by the GEMM's own epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.epilogue import check_epilogue, fake_output
from ..common.quantized_rows import FLOATS, check_rows
from . import reference


def dequant_activation(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None = None,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """`activation((acc - a_zero_point * b_sum) * a_scale * b_scale + bias) + residual`: `ops.common.epilogue` has the formula.

    Args:
        acc: int32, float32, float16 or bfloat16 [..., N], last stride 1, any row stride.
        a_scale, b_scale: float32; one element, or one a row [...] and one a column [N]. None: 1.
        bias: float32, float16 or bfloat16 [N].
        activation: None, relu, gelu, gelu_tanh, silu, relu6, hard_swish; or silu_mul, gelu_mul, gelu_tanh_mul: columns are then
            blocks of 8 gate and 8 up (`interleave_gate_up`), N a multiple of 16, and the result has N / 2 columns.
        out_dtype: float32, float16, bfloat16; or int8 (-127..127) or float8_e4m3fn, with out_scale.
        out_scale: float32, one element or one an output column: what a step of the 8-bit output stands for.
        a_zero_point: int32, one element or one a row; with int32 accumulators. From -128 to 127, as those of `quantize` are, or
            any for which acc - a_zero_point * b_sum is within int32.
        b_sum: int32 [N], the row sums of b [N, K]; goes with a_zero_point.
        residual: of out_dtype and of the output's shape, last stride 1, any row stride; added in fp32 behind the activation and
            before the one rounding. Not with 8-bit outputs.
        ada_gate: [B, N] (gated: N / 2) of out_dtype, last stride 1, any row stride, for an output [B, ..., N]; with a residual.
            The gate of adaLN-Zero (arXiv 2212.09748): the rows of sample b are `ada_gate[b] * y + residual`, both steps in fp32.

    Returns:
        [..., N] (gated: N / 2) of out_dtype, contiguous; 8-bit ones with rows padded to 16 bytes.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> acc = torch.randint(-9999, 9999, (4, 256), dtype=torch.int32)
        >>> a_scale, b_scale = torch.rand(4) / 100, torch.rand(256) / 100
        >>> y = fp.ops.dequant_activation(acc, a_scale, b_scale, activation="relu", out_dtype=torch.float32)
        >>> torch.allclose(y, (acc * a_scale[:, None] * b_scale).relu())
        True
    """
    args = (acc, a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum)
    # To pass the schema's default takes 0.15 us; an int8_gemm of few elements takes 5. As all operations with a residual.
    if ada_gate is not None:
        return OPERATION(*args, residual, ada_gate)
    return OPERATION(*args) if residual is None else OPERATION(*args, residual)


def _check(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> None:
    op = "dequant_activation"
    if not isinstance(acc, Tensor) or acc.dtype not in (torch.int32, *FLOATS):
        raise TypeError(f"{op}: acc must be an int32, float32, float16 or bfloat16 tensor, not "
                        f"{getattr(acc, 'dtype', type(acc).__name__)}")  # fmt: skip
    check_rows(op, "acc", acc)
    if a_zero_point is not None and acc.dtype != torch.int32:
        raise ValueError(f"{op}: a_zero_point goes with int32 accumulators, and these are {acc.dtype}")
    if a_zero_point is not None and b_sum is None:
        raise ValueError(f"{op}: a_zero_point needs b_sum, the row sums of b: pass b.sum(1, dtype=torch.int32)")
    lead, columns = tuple(acc.shape[:-1]), acc.shape[-1]
    check_epilogue(
        op, acc, lead, columns, a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum,
        optional=("a_scale", "b_scale"), residual=residual, ada_gate=ada_gate,
    )  # fmt: skip


def _fake(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    *options: Tensor | None,
) -> Tensor:
    return fake_output(acc, tuple(acc.shape), activation, out_dtype)


OPERATION = Operation(dequant_activation, _check, reference.dequant_activation, _fake)
