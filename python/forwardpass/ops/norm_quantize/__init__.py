"""norm_quantize and add_norm_quantize: a norm and the quantisation of its result in one pass.

The contracts; the rule itself is in reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.quantized_rows import check_float_rows, check_quantized, check_rows, check_vector, fake_quantized
from . import reference

KINDS = ("rms", "layer")


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    kind: str = "rms",
    bias: Tensor | None = None,
    symmetric: bool = True,
    channel_scale: Tensor | None = None,
    rotate: int | None = None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises x [..., K] along its last dimension and quantises each row; `q * scale` is the normalised row.

    The normalised value stays in fp32 until it is quantised: it is never rounded to x's dtype.

    Args:
        x: float32, float16 or bfloat16; last stride 1, any row stride.
        weight: [K] in x's dtype or float32, multiplies the normalised value; None: ones.
        eps: added to the mean square before its root; at least 0.
        dtype: torch.int8 (symmetric -127..127, asymmetric -128..127) or torch.float8_e4m3fn (-448..448), saturating.
        kind: "rms": x / sqrt(mean(x^2) + eps), arXiv 1910.07467; "layer": the same of x - mean(x), arXiv 1607.06450.
        bias: [K] in x's dtype or float32, added last; with kind="layer" only.
        symmetric: False adds a zero point; int8 only.
        channel_scale: float32 [K], multiplies the normalised columns (the smoothing of SmoothQuant, arXiv 2211.10438).
        rotate: 64, 128 or 256: so many columns at a time are multiplied by a Hadamard matrix, after channel_scale, which spreads
            outliers over them; K is a multiple of it. A weight whose columns were rotated alike (`fp.ops.rotate`) gives the same
            product. Kernels on GPUs round sums within it to tf32: their q may be a step off the reference's.
        ada_scale, ada_shift: [B, K] in x's dtype or float32, any row stride, for an x [B, ..., K]: adaptive layer norm (adaLN,
            arXiv 2212.09748). After weight and bias, each row of sample b is multiplied by 1 + ada_scale[b], and ada_shift[b] is
            added. Each may be left out.

    Returns:
        q [..., K] of dtype, its rows padded to 16 bytes; scale, float32 [...]; zero_point, int32 [...], or empty when
        symmetric. A row with a NaN or an infinity, or whose sum of squares is beyond float32, has a scale that is NaN.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, weight = torch.randn(4, 256), torch.rand(256)
        >>> q, scale, _ = fp.ops.norm_quantize(x, weight, 1e-6, torch.int8)
        >>> normed = torch.nn.functional.rms_norm(x, (256,), weight, 1e-6)
        >>> torch.allclose(q * scale[:, None], normed, atol=float(scale.max()))
        True
    """
    args = (x, weight, eps, dtype, kind, bias, symmetric, channel_scale)
    if ada_scale is not None or ada_shift is not None:
        return NORM_QUANTIZE(*args, rotate, ada_scale, ada_shift)
    return NORM_QUANTIZE(*args) if rotate is None else NORM_QUANTIZE(*args, rotate)


def add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    kind: str = "rms",
    bias: Tensor | None = None,
    symmetric: bool = True,
    channel_scale: Tensor | None = None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """norm_quantize of x + residual, which it also returns: the step between two blocks of a transformer.

    The norm is that of the sum as returned, rounded to x's dtype: the same bits as `norm_quantize(residual_out, ...)`.

    Args:
        x: as in norm_quantize, and so is everything not named here.
        residual: x's shape and dtype; last stride 1, any row stride.

    Returns:
        q, scale, zero_point as norm_quantize; residual_out, x + residual in x's dtype, contiguous.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, residual, weight = torch.randn(4, 256), torch.randn(4, 256), torch.rand(256)
        >>> q, scale, _, total = fp.ops.add_norm_quantize(x, residual, weight, 1e-6, torch.int8)
        >>> q.shape, scale.shape, torch.equal(total, x + residual)
        (torch.Size([4, 256]), torch.Size([4]), True)
    """
    args = (x, residual, weight, eps, dtype, kind, bias, symmetric, channel_scale)
    return ADD_NORM_QUANTIZE(*args) if rotate is None else ADD_NORM_QUANTIZE(*args, rotate)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> None:
    check_float_rows(op, "x", x)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be 'rms' or 'layer', not {kind!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, not {type(eps).__name__}: pass eps.item() if it is a tensor")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and at least 0, not {eps}")
    if bias is not None and kind == "rms":
        raise ValueError(f"{op}: an RMS norm has no bias: drop bias, or pass kind='layer'")
    check_vector(op, "weight", weight, x.shape[-1], (x.dtype, torch.float32), x)
    check_vector(op, "bias", bias, x.shape[-1], (x.dtype, torch.float32), x)
    check_quantized(op, x, x.shape[-1], dtype, None, None, None, symmetric, channel_scale, rotate)


def _check_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> None:
    _check("norm_quantize", x, weight, eps, dtype, kind, bias, symmetric, channel_scale, rotate)
    for name, v in (("ada_scale", ada_scale), ("ada_shift", ada_shift)):
        if v is not None:
            _check_of_samples("norm_quantize", name, v, x)


def _check_of_samples(op: str, name: str, v: Tensor, x: Tensor) -> None:
    """v is [B, K] for an x [B, ..., K], in x's dtype or float32, on its device."""
    if not isinstance(v, Tensor) or v.dtype not in (x.dtype, torch.float32):
        dtypes = " or ".join(map(str, dict.fromkeys((x.dtype, torch.float32))))
        raise TypeError(f"{op}: {name} must be a tensor of {dtypes}, not {getattr(v, 'dtype', type(v).__name__)}")
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} is one row a sample of x [B, ..., K], and x has shape {tuple(x.shape)}: pass "
                         "x.unsqueeze(0)")  # fmt: skip
    if v.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(f"{op}: {name} must be [B, K], {[x.shape[0], x.shape[-1]]} for x {tuple(x.shape)}, and has shape "
                         f"{tuple(v.shape)}: expand it to one row a sample")  # fmt: skip
    check_rows(op, name, v)
    if v.device != x.device:
        raise ValueError(f"{op}: {name} is on {v.device} and x on {x.device}: move one of them")


def _check_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> None:
    op = "add_norm_quantize"
    _check(op, x, weight, eps, dtype, kind, bias, symmetric, channel_scale, rotate)
    check_float_rows(op, "residual", residual)
    if residual.dtype != x.dtype or residual.shape != x.shape:
        raise ValueError(f"{op}: residual must have the dtype and shape of x, {x.dtype} {tuple(x.shape)}, "
                         f"not {residual.dtype} {tuple(residual.shape)}")  # fmt: skip
    if residual.device != x.device:
        raise ValueError(f"{op}: residual is on {residual.device} and x on {x.device}: move one of them")


def _fake_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quantized(x, tuple(x.shape), dtype, False, None, symmetric)


def _fake_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
    bias: Tensor | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_norm(x, weight, eps, dtype, kind, bias, symmetric, channel_scale), x.new_empty(x.shape)


NORM_QUANTIZE = Operation(norm_quantize, _check_norm, reference.norm_quantize, _fake_norm)
ADD_NORM_QUANTIZE = Operation(add_norm_quantize, _check_add_norm, reference.add_norm_quantize, _fake_add_norm)
