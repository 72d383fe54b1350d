"""int8_gemm and int8_gemm_quantize: [M, K] times [N, K] transposed in int8, dequantisation and activation in the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.activations import is_gated
from ..common.epilogue import check_epilogue, check_row_scales, fake_gemm
from ..common.quantized_rows import check_8bit, check_rows, check_weight, copy_notes, fake_quantized
from . import reference

#: Beyond these depths a sum of K products could pass 2^31 - 1: without and with a zero point. 131072 products of -128 and -128
#: are 2^31, one too many; of an int8 less an int8 zero point, at most 255 in size, and -128 there may be 65793.
MAX_K, MAX_K_ZERO_POINT = 131071, 65536


def int8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
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
    """`activation((a - a_zero_point) @ b.T * a_scale * b_scale + bias) + residual`; int32 accumulators exact, epilogue as below.

    Args:
        a: int8 [..., K], last stride 1, any row stride. K <= 131071, with a_zero_point <= 65536.
        b: int8 [N, K], as nn.Linear's weight.
        a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point: as in `dequant_activation`; gated activations
            want the rows of b, b_scale, bias and b_sum interleaved by `interleave_gate_up`.
        b_sum: int32 [N], b.sum(1): used with a_zero_point; computed by one more pass over b where it is not given.
        residual: as in `dequant_activation`: [..., N] (gated: N / 2) of a float out_dtype.
        ada_gate: as in `dequant_activation`: [B, N] (gated: N / 2) of out_dtype, with a residual: `ada_gate[b] * y + residual`.

    Returns:
        [..., N] (gated: N / 2) of out_dtype, contiguous; 8-bit ones with rows padded to 16 bytes.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, weight = torch.randn(4, 256), torch.randn(128, 256)
        >>> (a, a_scale, _), (b, b_scale, _) = (fp.ops.quantize(t, torch.int8) for t in (x, weight))
        >>> y = fp.ops.int8_gemm(a, b, a_scale, b_scale, out_dtype=torch.float32)
        >>> y.shape, bool((y - x @ weight.T).norm() < 0.02 * y.norm())
        (torch.Size([4, 128]), True)
    """
    if a_zero_point is not None and b_sum is None:
        b_sum = b.sum(1, dtype=torch.int32)
    args = (a, b, a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum)
    if ada_gate is not None:
        return OPERATION(*args, residual, ada_gate)
    return OPERATION(*args) if residual is None else OPERATION(*args, residual)


def int8_gemm_quantize(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`int8_gemm` and `quantize` of its rows to int8 in one call: the result is never rounded to 16 bits.

    On a CPU, and on sm_90 where a tile has whole rows (up to 256 columns of b, without a gate and a zero point), the product's
    epilogue quantises them. Otherwise a second kernel quantises the product's float32 outputs.

    Args:
        a: as in int8_gemm, and so is everything not named here. There is no residual.

    Returns:
        q int8 [..., N] (gated: N / 2), its rows padded to 16 bytes; scale float32 [...]: what the next int8_gemm takes as a and
        a_scale.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> a, a_scale, _ = fp.ops.quantize(torch.randn(4, 256), torch.int8)
        >>> b, b_scale, _ = fp.ops.quantize(torch.randn(128, 256), torch.int8)
        >>> q, scale = fp.ops.int8_gemm_quantize(a, b, a_scale, b_scale, activation="relu")
        >>> q.shape, q.dtype, scale.shape
        (torch.Size([4, 128]), torch.int8, torch.Size([4]))
    """
    if a_zero_point is not None and b_sum is None:
        b_sum = b.sum(1, dtype=torch.int32)
    return QUANTIZE_OPERATION(a, b, a_scale, b_scale, bias, activation, a_zero_point, b_sum)


def check_int8_weight(op: str, name: str, b: Tensor, x_name: str, x: Tensor, zero_point: bool) -> None:
    """b is int8 [N, K] for an x [..., K] of a depth that int32 accumulators hold, on its device."""
    check_8bit(op, name, b, torch.int8)
    check_rows(op, x_name, x)
    check_weight(op, name, b, x_name, x)
    check_int8_depth(op, b.shape[1], zero_point)


def check_int8_depth(op: str, k: int, zero_point: bool) -> None:
    """int32 accumulators hold a sum of k products."""
    limit = MAX_K_ZERO_POINT if zero_point else MAX_K
    if k > limit:
        raise ValueError(
            f"{op}: K must be at most {limit}, so that int32 accumulators cannot overflow, and is {k}: split K"
        )


def check_packed(op: str, packed: Tensor | None, x: Tensor) -> None:
    """packed is what pack_int8_weight may have returned, beside an input x."""
    if packed is not None and not (isinstance(packed, Tensor) and packed.dtype == torch.int8):
        raise TypeError(f"{op}: packed must be an int8 tensor, not {getattr(packed, 'dtype', type(packed).__name__)}: pass what "
                        "pack_int8_weight returned for this weight")  # fmt: skip
    if packed is not None and packed.device != x.device:
        raise ValueError(
            f"{op}: packed is on {packed.device} and x on {x.device}: leave it out, other backends read weight"
        )


def _check(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    op: str = "int8_gemm",
) -> None:
    check_8bit(op, "a", a, torch.int8)
    check_int8_weight(op, "b", b, "a", a, a_zero_point is not None)
    lead, n = tuple(a.shape[:-1]), b.shape[0]
    check_epilogue(op, a, lead, n, a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum,
                   residual=residual, ada_gate=ada_gate)  # fmt: skip


def _check_quantize(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
) -> None:
    _check(a, b, a_scale, b_scale, bias, activation, torch.float32, None, a_zero_point, b_sum, op="int8_gemm_quantize")
    check_row_scales("int8_gemm_quantize", b)


def _fake_quantize(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None, *options: object
) -> tuple[Tensor, Tensor]:  # fmt: skip
    columns = b.shape[0] // 2 if is_gated(activation) else b.shape[0]
    q, scale, _ = fake_quantized(a, (*a.shape[:-1], columns), torch.int8, False, None, True)
    return q, scale


def _notes(a: Tensor, b: Tensor, *options: object) -> list[str]:
    return int8_notes(a, b, options[6])


def _notes_quantize(a: Tensor, b: Tensor, *options: object) -> list[str]:
    return int8_notes(a, b, options[4])


def int8_notes(a: Tensor, b: Tensor, a_zero_point: object) -> list[str]:
    """What a product costs besides, for `explain` and the log."""
    notes = copy_notes(a=a, b=b)
    if a_zero_point is not None:
        notes.append(f"b_sum: {b.numel()} bytes of b are read once more where it is not given")
    return notes


OPERATION = Operation(int8_gemm, _check, reference.int8_gemm, fake_gemm, notes=_notes)
QUANTIZE_OPERATION = Operation(
    int8_gemm_quantize, _check_quantize, reference.int8_gemm_quantize, _fake_quantize, notes=_notes_quantize
)
