"""quantize: rows of floats to int8 or e4m3 with a scale each. The contract; the rule itself is in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.quantized_rows import check_float_rows, check_quantized, fake_quantized
from . import reference


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    channel_scale: Tensor | None = None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises x [..., K] along its last dimension; `q * scale` (or `(q - zero_point) * scale`) gives it back.

    Args:
        x: float32, float16 or bfloat16; last stride 1, any row stride.
        dtype: torch.int8 (symmetric -127..127, asymmetric -128..127) or torch.float8_e4m3fn (-448..448), both saturating.
        scale: float32, one element: static quantisation of the whole tensor; None: dynamic, from each row's own values.
        zero_point: int32, one element; with a static scale and symmetric=False only.
        group_size: columns that share a dynamic scale; None: the whole row.
        symmetric: False adds a zero point, which pays where values are one-sided (after GELU or ReLU); int8 only.
        channel_scale: float32 [K], multiplies the columns of x first (the smoothing of SmoothQuant, arXiv 2211.10438).
        rotate: 64, 128 or 256: so many columns at a time are multiplied by a Hadamard matrix, after channel_scale, which spreads
            outliers over them; K is a multiple of it. A weight whose columns were rotated alike (`fp.ops.rotate`) gives the same
            product. Kernels on GPUs round sums within it to tf32: their q may be a step off the reference's.

    Returns:
        q [..., K] of dtype, its rows padded to 16 bytes; scale, float32, [...], or [..., ceil(K / group_size)] with the rows
        contiguous, or the static scale that was given; zero_point, int32, as scale, or empty when symmetric.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x = torch.randn(4, 256)
        >>> q, scale, _ = fp.ops.quantize(x, torch.int8)
        >>> q.shape, q.dtype, scale.shape
        (torch.Size([4, 256]), torch.int8, torch.Size([4]))
        >>> torch.allclose(q * scale[:, None], x, atol=float(scale.max()))
        True
    """
    args = (x, dtype, scale, zero_point, group_size, symmetric, channel_scale)
    q, s, z = OPERATION(*args) if rotate is None else OPERATION(*args, rotate)
    return q, s if scale is None else scale, z if zero_point is None else zero_point


def _check(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> None:
    check_float_rows("quantize", "x", x)
    check_quantized("quantize", x, x.shape[-1], dtype, scale, zero_point, group_size, symmetric, channel_scale, rotate)


def _fake(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quantized(x, tuple(x.shape), dtype, scale is not None, group_size, symmetric)


OPERATION = Operation(quantize, _check, reference.quantize, _fake)
