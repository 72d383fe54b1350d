"""activation_quantize: an activation, or a gated one, and the quantisation of its result, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.activations import GATED, LAYOUTS, PLAIN, check_activation, is_gated
from ..common.quantized_rows import check_float_rows, check_quantized, fake_quantized
from . import reference


def activation_quantize(
    x: Tensor,
    activation: str,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    layout: str = "halves",
    symmetric: bool = True,
    channel_scale: Tensor | None = None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Activates x in fp32 and quantises the result [..., N] along its last dimension, as `quantize` does.

    Args:
        x: float32, float16 or bfloat16, [..., N], or, gated, [..., 2N] of gate and up; last stride 1, any row stride.
        activation: "gelu" (with erf), "gelu_tanh", "silu", "relu", "relu6", "hard_swish", or gated, activation(gate) * up:
            "silu_mul", "gelu_mul", "gelu_tanh_mul".
        dtype: torch.int8 (symmetric -127..127, asymmetric -128..127) or torch.float8_e4m3fn (-448..448).
        group_size: columns of the result that share a scale; None: the whole row.
        layout: of a gated x: "halves", columns [0, N) gate and [N, 2N) up; "interleaved8", 8 columns of gate, 8 of up,
            and so on (`interleave_gate_up`), N a multiple of 8. Without a gate it must be "halves".
        symmetric: False adds a zero point, which pays after GELU, SiLU and ReLU, whose values are one-sided; int8 only.
        channel_scale: float32 [N], multiplies the columns of the result before it is quantised.
        rotate: 64, 128 or 256: so many columns at a time are multiplied by a Hadamard matrix, after channel_scale, which spreads
            outliers over them; N is a multiple of it. A weight whose columns were rotated alike (`fp.ops.rotate`) gives the same
            product. Kernels on GPUs round sums within it to tf32: their q may be a step off the reference's.

    Returns:
        q [..., N] of dtype, its rows padded to 16 bytes; scale, float32, [...], or [..., ceil(N / group_size)] with the
        rows contiguous; zero_point, int32, as scale, or empty when symmetric.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x = torch.randn(4, 512)  # 256 columns of gate, 256 of up
        >>> q, scale, _ = fp.ops.activation_quantize(x, "silu_mul", torch.int8)
        >>> q.shape, scale.shape
        (torch.Size([4, 256]), torch.Size([4]))
    """
    args = (x, activation, dtype, group_size, layout, symmetric, channel_scale)
    return OPERATION(*args) if rotate is None else OPERATION(*args, rotate)


def _columns(x: Tensor, activation: str) -> int:
    return x.shape[-1] // 2 if is_gated(activation) else x.shape[-1]


def _check(
    x: Tensor,
    activation: str,
    dtype: torch.dtype,
    group_size: int | None,
    layout: str,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> None:
    op = "activation_quantize"
    check_float_rows(op, "x", x)
    check_activation(op, activation, (*PLAIN, *GATED))
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if not is_gated(activation) and layout != "halves":
        raise ValueError(f"{op}: layout {layout!r} is for a gated activation, and {activation} has no gate: drop it")
    multiple = 16 if layout == "interleaved8" else 2
    if is_gated(activation) and x.shape[-1] % multiple:
        raise ValueError(f"{op}: {activation} in layout {layout!r} needs a last dimension that is a multiple of "
                         f"{multiple}, and x has shape {tuple(x.shape)}: pad gate and up alike")  # fmt: skip
    check_quantized(op, x, _columns(x, activation), dtype, None, None, group_size, symmetric, channel_scale, rotate)


def _fake(
    x: Tensor,
    activation: str,
    dtype: torch.dtype,
    group_size: int | None,
    layout: str,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quantized(x, (*x.shape[:-1], _columns(x, activation)), dtype, False, group_size, symmetric)


OPERATION = Operation(activation_quantize, _check, reference.activation_quantize, _fake)
