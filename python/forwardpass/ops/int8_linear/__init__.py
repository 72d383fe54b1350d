"""int8_linear: a linear layer with int8 weights and activations, float in and float out, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation, library
from ..common.epilogue import check_epilogue, fake_linear
from ..common.quantized_rows import FLOATS, check_float_rows, check_quantized, copy_notes
from ..int8_gemm import check_int8_weight, check_packed
from . import reference


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    symmetric: bool = True,
    channel_scale: Tensor | None = None,
    weight_sum: Tensor | None = None,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    rotate: int | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """`quantize(x)` then `int8_gemm` with `weight`: the same bits as the two calls, without what passes between them.

    Args:
        x: float32, float16 or bfloat16 [..., K], last stride 1, any row stride.
        weight: int8 [N, K]; weight_scale: float32, one element or [N].
        bias, activation: as in `dequant_activation`; gated activations want the rows of weight, weight_scale, bias and weight_sum
            interleaved by `interleave_gate_up`.
        out_dtype: float32, float16 or bfloat16; None: that of x.
        scale, zero_point, channel_scale: how x is quantised, as in `quantize`; dynamic per row without `scale`.
        symmetric: True: x is quantised without a zero point. False has about half of the error after GELU or ReLU, and needs
            weight_sum. A layer keeps that: `fp.nn.Int8Linear` is asymmetric by default. A bare call would have to read the weight
            once more for it, so here the default is symmetric.
        weight_sum: int32 [N], weight.sum(1, dtype=torch.int32); with symmetric=False, and only with it.
        packed: `pack_int8_weight(weight)`, which the cpu backend then does not pack anew on each call; results are the same
            with it and without, also where the weight has changed since. Other backends read weight.
        residual: as in `dequant_activation`: [..., N] (gated: N / 2) of out_dtype.
        rotate: as in `quantize`; the columns of weight were rotated alike.
        ada_gate: as in `dequant_activation`: [B, N] (gated: N / 2) of out_dtype, with a residual: `ada_gate[b] * y + residual`.

    Returns:
        [..., N] (gated: N / 2) of out_dtype, contiguous.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, weight = torch.randn(4, 256), torch.randn(128, 256)
        >>> q, weight_scale, _ = fp.ops.quantize(weight, torch.int8)
        >>> y = fp.ops.int8_linear(x, q, weight_scale)
        >>> y.shape, bool((y - x @ weight.T).norm() < 0.02 * y.norm())
        (torch.Size([4, 128]), True)
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    args = (
        x,
        weight,
        weight_scale,
        bias,
        activation,
        dtype,
        scale,
        zero_point,
        symmetric,
        channel_scale,
        weight_sum,
        packed,
    )
    if ada_gate is not None:
        return OPERATION(*args, residual, rotate, ada_gate)
    if rotate is not None:
        return OPERATION(*args, residual, rotate)
    return OPERATION(*args) if residual is None else OPERATION(*args, residual)


def pack_int8_weight(weight: Tensor, *, verify: bool = True) -> Tensor:
    """A weight as this process's int8 GEMM on the CPU reads it, for `int8_linear(packed=)` and `int8_conv2d(packed=)`.

    It holds a checksum of the weight, by which those know whether it is still the same. To compute that reads the weight once
    more on each call; on AVX-512 VNNI it takes as long as packing, and nothing is packed.

    Args:
        weight: int8 [N, K] on the CPU, last stride 1, any row stride; or [C_out, C, kh, kw] in channels_last memory.
        verify: False: the packed weight is used as it is, without a look at the weight. Whoever changes the weight packs it anew,
            or results are those of the weight before.

    Returns:
        int8 [bytes], of no form to rely on: of this version and of the instructions that `forwardpass doctor` names. On AVX2 up
        to four times the weight's bytes, for normal weights 1.1 times; empty where the weight is read as it is.

    Raises:
        TypeError: weight is no int8 tensor.
        ValueError: its shape, layout or device is not as above.

    Example:
        >>> x, (weight, weight_scale, _) = torch.randn(4, 256), fp.ops.quantize(torch.randn(128, 256), torch.int8)
        >>> packed = fp.ops.pack_int8_weight(weight)  # once, for all calls
        >>> y = fp.ops.int8_linear(x, weight, weight_scale, packed=packed)
        >>> torch.equal(y, fp.ops.int8_linear(x, weight, weight_scale))
        True
    """
    if isinstance(weight, Tensor) and weight.dim() == 4 and weight.permute(0, 2, 3, 1).is_contiguous():
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    check_int8_weight("pack_int8_weight", "weight", weight, "weight", weight, False)
    if weight.device.type != "cpu":
        raise ValueError(f"pack_int8_weight: weight must be on the CPU, and is on {weight.device}")
    if not isinstance(verify, bool):
        raise TypeError(f"pack_int8_weight: verify must be True or False, not {verify!r}")
    return torch.ops.forwardpass.pack_int8_weight(weight, verify)


def _check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    weight_sum: Tensor | None,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    rotate: int | None = None,
    ada_gate: Tensor | None = None,
) -> None:
    op = "int8_linear"
    check_float_rows(op, "x", x)
    check_int8_weight(op, "weight", weight, "x", x, not symmetric)
    check_quantized(op, x, x.shape[-1], torch.int8, scale, zero_point, None, symmetric, channel_scale, rotate)
    if (weight_sum is not None) == symmetric:
        raise ValueError(
            f"{op}: weight_sum, weight.sum(1, dtype=torch.int32), goes with symmetric=False, and only with it"
        )
    if out_dtype not in FLOATS:
        raise TypeError(
            f"{op}: out_dtype must be float32, float16 or bfloat16, not {out_dtype}: for 8 bits use int8_gemm"
        )
    check_packed(op, packed, x)
    if not isinstance(weight_scale, Tensor):
        raise TypeError(f"{op}: weight_scale must be a float32 tensor, not {type(weight_scale).__name__}")
    lead, n, unit = (
        tuple(x.shape[:-1]),
        weight.shape[0],
        weight_scale.new_empty(1, dtype=torch.float32, device=x.device),
    )
    shift = None if symmetric else unit.int()
    check_epilogue(op, x, lead, n, unit, weight_scale, bias, activation, out_dtype, None, shift, weight_sum,
                   residual=residual, operand="weight", ada_gate=ada_gate)  # fmt: skip


def _notes(x: Tensor, weight: Tensor, *options: object) -> list[str]:
    return copy_notes(weight=weight)


if library.load_error is None:

    @torch.library.register_fake("forwardpass::pack_int8_weight")
    def _(weight: Tensor, verify: bool = True) -> Tensor:
        return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int8)


OPERATION = Operation(int8_linear, _check, reference.int8_linear, fake_linear, notes=_notes)
