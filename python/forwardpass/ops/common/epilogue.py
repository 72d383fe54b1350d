"""From accumulators to output: what dequant_activation and every GEMM share. The rule in plain torch, its argument checks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .activations import activate, check_activation, is_gated, separate_gate_up
from .quantized_rows import E4M3, FLOATS, check_elements, check_rows, check_vector, empty_q, pad_rows


def apply_epilogue(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None = None,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """acc [..., N], exact (int64 or fp64) or floats, to the output: the formula that every backend follows, a scale of None 1::

        y = fma(fp32(acc - a_zero_point * b_sum), fp32(a_scale * b_scale), bias)      one rounding each, to fp32
        out = activation(y) in fp32, gated activation(gate) * up                      then one rounding to out_dtype
        out = activation(y) + residual, likewise in fp32, where there is one          before that rounding
        out = fp32(activation(y) * ada_gate) + residual, of each sample's gate        in place of that
        out = activation(fp32(y + residual)), of residual_first                       in place of them
        int8, e4m3: sat(rne(fp32(out / out_scale))), int8 in -127..127

    The fma is computed in fp64 and rounded: the product of two fp32 is exact there, and the sum is off by less than 2^-52,
    which moves the fp32 result once in some 10^8 elements. Activations other than None, relu and relu6 are computed in fp64.
    """
    if a_zero_point is not None and b_sum is not None:
        acc = acc.long() - a_zero_point.long().reshape(per_row(a_zero_point, acc)) * b_sum.long()
    unit = torch.ones(1, device=acc.device)
    a_scale, b_scale = unit if a_scale is None else a_scale, unit if b_scale is None else b_scale
    y = acc.float().double() * (a_scale.reshape(per_row(a_scale, acc)) * b_scale).double()
    if bias is not None:
        y = y + bias.double()
    y = y.float()
    if residual is not None and residual_first:
        y = y + residual.float()
    y = y.double()
    if is_gated(activation):
        gate, up = separate_gate_up(y, -1)
        y = activate(activation, gate, up)
    else:
        y = activate(activation, y)
    if ada_gate is not None:
        y = y.float() * of_samples(ada_gate, y).float()
    if residual is not None and not residual_first:
        y = y.float() + residual.float()
    if out_scale is None:
        return y.to(out_dtype)
    scaled = y.float() / out_scale
    if out_dtype is E4M3:
        return pad_rows(scaled.clamp(-448, 448).to(E4M3))
    return pad_rows(scaled.nan_to_num(-127.0).round().clamp(-127, 127).to(torch.int8))


def of_samples(v: Tensor, y: Tensor) -> Tensor:
    """v [B, N] in the shape in which it is broadcast against y [B, ..., N]."""
    return v.reshape(v.shape[0], *[1] * (y.dim() - 2), v.shape[1])


def per_row(v: Tensor, acc: Tensor) -> tuple[int, ...]:
    """The shape in which v, one value or one a row of acc [..., N], is broadcast against it."""
    return (1,) if v.numel() == 1 else (*acc.shape[:-1], 1)


def fake_output(x: Tensor, shape: tuple[int, ...], activation: str | None, out_dtype: torch.dtype) -> Tensor:
    """shape [..., N] is that of the accumulators."""
    if is_gated(activation):
        shape = (*shape[:-1], shape[-1] // 2)
    return x.new_empty(shape, dtype=out_dtype) if out_dtype in FLOATS else empty_q(x, shape, out_dtype)


def fake_gemm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype,
    *options: object,
) -> Tensor:  # fmt: skip
    """Shape and dtype of what a product of a [..., K] and b [N, K] returns."""
    return fake_output(a, (*a.shape[:-1], b.shape[0]), activation, out_dtype)


def fake_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype,
    *options: object,
) -> Tensor:  # fmt: skip
    """The same for x [..., K], which is quantised on the way, and weight [N, K]."""
    return fake_output(x, (*x.shape[:-1], weight.shape[0]), activation, out_dtype)


def check_epilogue(
    op: str,
    x: Tensor,
    lead: tuple[int, ...],
    columns: int,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
    optional: tuple[str, ...] = (),
    residual: Tensor | None = None,
    operand: str = "b",
    ada_gate: Tensor | None = None,
) -> None:
    """The epilogue's arguments for accumulators [*lead, columns] on x's device; optional: scales that may be None; operand: the
    name that the call has for b, and for its scales and sums."""
    rows = 1
    for n in lead:
        rows = rows * n

    def one_or_each(
        name: str, v: Tensor | None, n: int, dtype: torch.dtype, check: Callable[..., None] = check_vector
    ) -> None:
        if v is not None:
            many = isinstance(v, Tensor) and v.numel() != 1
            check(op, name, v, n if many else 1, dtype, x)

    check_activation(op, activation)
    if is_gated(activation) and columns % 16:
        raise ValueError(f"{op}: {activation} needs N to be a multiple of 16, rows of {operand} interleaved by "
                         f"fp.ops.interleave_gate_up, and N is {columns}")  # fmt: skip
    for name, shown, v in (("a_scale", "a_scale", a_scale), ("b_scale", f"{operand}_scale", b_scale)):
        if not isinstance(v, Tensor) and not (v is None and name in optional):
            raise TypeError(f"{op}: {shown} must be a float32 tensor, not {type(v).__name__}")
    one_or_each("a_scale", a_scale, rows, torch.float32, check_elements)
    one_or_each(f"{operand}_scale", b_scale, columns, torch.float32)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATS:
            raise TypeError(
                f"{op}: bias must be a float32, float16 or bfloat16 tensor, not {getattr(bias, 'dtype', type(bias).__name__)}"
            )
        check_vector(op, "bias", bias, columns, bias.dtype, x)
    if out_dtype not in (*FLOATS, torch.int8, E4M3):
        raise TypeError(f"{op}: out_dtype must be float32, float16, bfloat16, int8 or float8_e4m3fn, not {out_dtype}")
    if (out_scale is not None) != (out_dtype not in FLOATS):
        raise ValueError(f"{op}: out_scale goes with out_dtype int8 or float8_e4m3fn, and only with them")
    outputs = columns // 2 if is_gated(activation) else columns
    one_or_each("out_scale", out_scale, outputs, torch.float32)
    one_or_each("a_zero_point", a_zero_point, rows, torch.int32, check_elements)
    check_vector(op, f"{operand}_sum", b_sum, columns, torch.int32, x)
    if b_sum is not None and a_zero_point is None:
        raise ValueError(f"{op}: {operand}_sum is used with a_zero_point only: pass both or neither")
    if residual is not None:
        check_residual(op, residual, (*lead, outputs), out_dtype, x)
    if ada_gate is not None:
        check_ada_gate(op, ada_gate, residual, (*lead, outputs), out_dtype, x)


def check_row_scales(op: str, b: Tensor) -> None:
    """Rows of the output of a product with b [N, K] have a scale each."""
    if b.shape[0] == 0:
        raise ValueError(f"{op}: b must have at least one row, as an output without columns has no scale, and b has shape "
                         f"{tuple(b.shape)}")  # fmt: skip


def check_residual(op: str, residual: Tensor, shape: tuple[int, ...], out_dtype: torch.dtype, x: Tensor) -> None:
    """residual is as the output, which is on x's device, but for its row stride."""
    if out_dtype not in FLOATS:
        raise ValueError(f"{op}: residual goes with out_dtype float32, float16 or bfloat16, and this is {out_dtype}: add it to a "
                         "float output, and quantise the sum")  # fmt: skip
    if not isinstance(residual, Tensor) or residual.dtype != out_dtype:
        raise TypeError(f"{op}: residual must be a tensor of {out_dtype}, as the output is, not "
                        f"{getattr(residual, 'dtype', type(residual).__name__)}")  # fmt: skip
    if tuple(residual.shape) != shape:
        raise ValueError(
            f"{op}: residual must have the output's shape, {list(shape)}, and has {list(residual.shape)}: expand it"
        )
    if residual.device != x.device:
        raise ValueError(f"{op}: residual is on {residual.device} and the input on {x.device}: move one of them")
    if residual.numel():
        check_rows(op, "residual", residual)


def check_ada_gate(
    op: str, ada_gate: Tensor, residual: Tensor | None, shape: tuple[int, ...], out_dtype: torch.dtype, x: Tensor
) -> None:
    """ada_gate has a row for each sample of the output, which is [B, ..., N] on x's device and has a residual."""
    if residual is None:
        raise ValueError(
            f"{op}: ada_gate goes with a residual, as ada_gate * y + residual: pass one, or multiply the output"
        )
    if not isinstance(ada_gate, Tensor) or ada_gate.dtype != out_dtype:
        raise TypeError(f"{op}: ada_gate must be a tensor of {out_dtype}, as the output is, not "
                        f"{getattr(ada_gate, 'dtype', type(ada_gate).__name__)}")  # fmt: skip
    if math.prod(shape[:-1]) >= 2**32:
        raise ValueError(f"{op}: ada_gate goes with fewer than 2^32 rows, and this output is {list(shape)}: split it")
    if len(shape) < 2:
        raise ValueError(f"{op}: ada_gate is one row a sample of an output [B, ..., N], and this is {list(shape)}: pass "
                         "an input with a dimension of samples")  # fmt: skip
    if tuple(ada_gate.shape) != (shape[0], shape[-1]):
        raise ValueError(f"{op}: ada_gate must be [B, N], {[shape[0], shape[-1]]} for an output {list(shape)}, and has shape "
                         f"{list(ada_gate.shape)}: expand it to one row a sample")  # fmt: skip
    if ada_gate.device != x.device:
        raise ValueError(f"{op}: ada_gate is on {ada_gate.device} and the input on {x.device}: move one of them")
    if ada_gate.numel():
        check_rows(op, "ada_gate", ada_gate)
