"""int8_conv2d: a convolution of int8 images in channels_last memory, with the epilogue of int8_gemm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Operation
from ...dispatch.reason import Reason
from ..common.activations import PLAIN, check_activation
from ..common.epilogue import check_epilogue, fake_output
from ..common.quantized_rows import FLOATS, check_8bit, check_vector
from ..int8_gemm import check_int8_depth, check_packed
from . import reference

#: Channels of a group, in and out, from which on a product of matrices pays: the kernels' tiles are some 16 to 64 wide.
LEAST_GROUP = 16
#: The most columns of a depthwise window, dilated, that the CPU's kernel takes: it multiplies the gaps too, as zeros.
MOST_DEPTHWISE_COLUMNS = 64
#: The most rows and columns of a kernel that CUDA's kernels take (kMostKernelSide in csrc/params/gemm.h).
MOST_SIDE = 15


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    out_dtype: torch.dtype,
    out_scale: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """`activation(conv2d(x, weight) * x_scale * weight_scale + bias) + residual`; exact int32 sums, the epilogue of `int8_gemm`.

    All images are in channels_last memory: `x.contiguous(memory_format=torch.channels_last)`. Both operands are symmetric, so
    that the zeros outside of an image are zeros.

    Args:
        x: int8 [N, C, H, W]; channels have stride 1, pixels, rows and images any.
        weight: int8 [C_out, C / groups, kh, kw] in channels_last memory. K = C / groups * kh * kw <= 131071.
        x_scale: float32, one element or [N]: one an image, as a window mixes pixels.
        weight_scale: float32, one element or [C_out].
        stride, padding, dilation: as in torch.nn.functional.conv2d, an integer or a pair (of height, of width).
        groups: divides C and C_out. Backends other than the reference take one group, or groups of at least 16 channels each; the
            CPU also takes depthwise convolutions, groups = C = C_out.
        bias: float32, float16 or bfloat16 [C_out].
        activation: None, relu, gelu, gelu_tanh, silu, relu6, hard_swish.
        residual: [N, C_out, H_out, W_out] of out_dtype, channels with stride 1, pixels any stride that rows and images collapse
            into; added in fp32 behind the activation and before the one rounding. Not with int8 outputs.
        residual_first: activation(... + residual), as a ResNet has it.
        out_dtype: float32, float16, bfloat16; or int8 (-127..127), with out_scale.
        out_scale: float32, one element or [C_out]: what a step of the int8 output stands for, a next convolution's static scale.
        packed: `pack_int8_weight(weight)`, which the cpu backend then does not pack anew on each call; used with one group alone.

    Returns:
        [N, C_out, H_out, W_out] of out_dtype in channels_last memory; int8 ones with pixels padded to 16 bytes.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, w = torch.randn(2, 16, 9, 9), torch.randn(32, 16, 3, 3)
        >>> q, weight = (t.mul(30).round().clamp(-127, 127).to(torch.int8).contiguous(memory_format=torch.channels_last)
        ...              for t in (x, w))
        >>> scale = torch.full((1,), 1 / 30)
        >>> y = fp.ops.int8_conv2d(q, weight, scale, scale, padding=1, out_dtype=torch.float32)
        >>> exact = torch.nn.functional.conv2d(x, w, padding=1)
        >>> y.shape, bool((y - exact).norm() < 0.02 * exact.norm())
        (torch.Size([2, 32, 9, 9]), True)
    """
    geometry = (pair("stride", stride), pair("padding", padding), pair("dilation", dilation), groups)
    args = (x, weight, x_scale, weight_scale, *geometry, bias, activation, out_dtype, out_scale)
    if packed is not None:
        return OPERATION(*args, residual, residual_first, packed)
    if residual_first:
        return OPERATION(*args, residual, residual_first)
    return OPERATION(*args) if residual is None else OPERATION(*args, residual)


def pair(name: str, v: int | Sequence[int]) -> tuple[int, int]:
    """(of height, of width)."""
    both = (v, v) if isinstance(v, int) else v
    if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(type(i) is int for i in both):
        raise TypeError(f"int8_conv2d: {name} must be an integer or a pair of integers, not {v!r}")
    return both[0], both[1]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """The height or the width of the output; below 1 where the kernel does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int]:
    """(images, height, width)."""
    height, width = (
        output_size(x.shape[i + 2], weight.shape[i + 2], stride[i], padding[i], dilation[i]) for i in (0, 1)
    )
    return x.shape[0], height, width


def _check_images(x: Tensor, weight: Tensor, groups: int) -> None:
    op = "int8_conv2d"
    check_8bit(op, "x", x, torch.int8)
    check_8bit(op, "weight", weight, torch.int8)
    for name, t, shape in (("x", x, "[N, C, H, W]"), ("weight", weight, "[C_out, C / groups, kh, kw]")):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must be {shape}, and has shape {tuple(t.shape)}: unsqueeze it")
        if 0 in t.shape[1:] or (name == "weight" and t.shape[0] == 0):
            raise ValueError(f"{op}: only the images of x may be none, and {name} has shape {tuple(t.shape)}")
    if type(groups) is not int or groups < 1:
        raise ValueError(f"{op}: groups must be a positive integer, not {groups!r}")
    if x.shape[1] % groups or weight.shape[0] % groups or weight.shape[1] != x.shape[1] // groups:
        raise ValueError(f"{op}: weight must be [C_out, {x.shape[1]} / groups, kh, kw] for x {tuple(x.shape)}, groups a "
                         f"divisor of both channels, and has shape {tuple(weight.shape)} with groups={groups}")  # fmt: skip
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device} and x on {x.device}: move one of them")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{op}: x must be in channels_last memory, and its channels have stride {x.stride(1)}: pass "
                         "x.contiguous(memory_format=torch.channels_last)")  # fmt: skip
    if not weight.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(f"{op}: weight must be in channels_last memory, and has strides {weight.stride()}: pass "
                         "weight.contiguous(memory_format=torch.channels_last)")  # fmt: skip


def _check_geometry(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int]:
    """output_shape, where there is one."""
    op = "int8_conv2d"
    for name, v, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(v) < least or max(v) > 1 << 30:
            raise ValueError(f"{op}: {name} must be from {least} to 2^30, and is {tuple(v)}")
    shape = output_shape(x, weight, stride, padding, dilation)
    if min(shape[1:]) < 1:
        raise ValueError(f"{op}: the kernel {tuple(weight.shape[2:])} with dilation {tuple(dilation)} must fit into the image "
                         f"{tuple(x.shape[2:])} with padding {tuple(padding)}")  # fmt: skip
    return shape


def _check_outputs(
    x: Tensor, weight: Tensor, shape: tuple[int, int, int], activation: str | None, out_dtype: torch.dtype,
    residual: Tensor | None, residual_first: bool,
) -> None:  # fmt: skip
    """What a convolution asks beyond what every epilogue does."""
    op = "int8_conv2d"
    check_activation(op, activation, (None, *PLAIN))
    if out_dtype not in (*FLOATS, torch.int8):
        raise TypeError(f"{op}: out_dtype must be float32, float16, bfloat16 or int8, not {out_dtype}")
    if not isinstance(residual_first, bool):
        raise TypeError(f"{op}: residual_first must be True or False, not {residual_first!r}")
    if residual_first and residual is None:
        raise ValueError(f"{op}: residual_first says where the residual is added: pass a residual, or leave it out")
    expected = (shape[0], weight.shape[0], *shape[1:])
    if isinstance(residual, Tensor) and tuple(residual.shape) != expected:
        raise ValueError(f"{op}: residual must have the output's shape, {list(expected)}, and has {list(residual.shape)}: "
                         "expand it")  # fmt: skip
    if isinstance(residual, Tensor) and residual.numel() and weight.shape[0] > 1 and residual.stride(1) != 1:
        raise ValueError(f"{op}: residual must be in channels_last memory, and its channels have stride {residual.stride(1)}: "
                         "pass residual.contiguous(memory_format=torch.channels_last)")  # fmt: skip


def _check(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    packed: Tensor | None = None,
) -> None:
    op = "int8_conv2d"
    _check_images(x, weight, groups)
    check_packed(op, packed, x)
    check_int8_depth(op, weight.shape[1] * weight.shape[2] * weight.shape[3], False)
    shape = _check_geometry(x, weight, stride, padding, dilation)
    _check_outputs(x, weight, shape, activation, out_dtype, residual, residual_first)
    if not isinstance(x_scale, Tensor):
        raise TypeError(f"{op}: x_scale must be a float32 tensor, not {type(x_scale).__name__}")
    check_vector(op, "x_scale", x_scale, 1 if x_scale.numel() == 1 else shape[0], torch.float32, x)
    unit = x_scale.new_empty(1)
    pixels = residual.permute(0, 2, 3, 1) if isinstance(residual, Tensor) else residual
    check_epilogue(op, x, shape, weight.shape[0], unit, weight_scale, bias, activation, out_dtype, out_scale, None, None,
                   residual=pixels, operand="weight")  # fmt: skip


def _fake(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype, *options: object,
) -> Tensor:  # fmt: skip
    shape = output_shape(x, weight, stride, padding, dilation)
    return fake_output(x, (*shape, weight.shape[0]), activation, out_dtype).permute(0, 3, 1, 2)


def why_not_groups(x: Tensor, weight: Tensor | None, *options: Any) -> Reason | None:
    """Groups that are narrower than a kernel's tiles: depthwise convolutions among them. weight is None before there is a call."""
    groups = options[5]
    if weight is None or groups in (None, 1) or min(weight.shape[1], weight.shape[0] // groups) >= LEAST_GROUP:
        return None
    return Reason(
        "narrow_groups",
        f"it multiplies groups of at least {LEAST_GROUP} channels, "
        f"and these are of {weight.shape[1]} and {weight.shape[0] // groups}",
        "leave this convolution in floats",
    )


def is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Each channel by itself, with one output."""
    return groups > 1 and groups == x.shape[1] == weight.shape[0]


def _why_not_cpu(x: Tensor, weight: Tensor | None, *options: Any) -> Reason | None:
    dilation, groups = options[4], options[5]
    if weight is None or groups is None or not is_depthwise(x, weight, groups):
        return why_not_groups(x, weight, *options)
    columns = (weight.shape[3] - 1) * dilation[1] + 1
    if columns <= MOST_DEPTHWISE_COLUMNS:
        return None
    return Reason(
        "wide_window",
        f"its depthwise windows have at most {MOST_DEPTHWISE_COLUMNS} columns, dilated, and these have {columns}",
        "leave this convolution in floats",
    )


def _why_not_cuda(x: Tensor, weight: Tensor | None, *options: Any) -> Reason | None:
    if weight is not None and max(weight.shape[2:]) > MOST_SIDE:
        height, width = weight.shape[2:]
        return Reason(
            "large_kernel",
            f"it has kernels of at most {MOST_SIDE} x {MOST_SIDE}, and this one is {height} x {width}",
            "leave this convolution in floats",
        )
    return why_not_groups(x, weight, *options)


def _notes(x: Tensor, weight: Tensor, *options: Any) -> list[str]:
    """What the copies of operands cost that are not aligned."""
    channels = weight.shape[1]
    padded = -(-channels // 16) * 16
    if padded != channels:
        copied = x.numel() // channels * padded + weight.numel() // channels * padded
        return [f"{channels} channels, not a multiple of 16: CUDA and Triton kernels first copy x and weight, padded to {padded}, "
                f"{copied} bytes"]  # fmt: skip
    strides = [x.stride(d) for d in (0, 2, 3) if x.shape[d] > 1]
    if any(s % 16 for s in strides) or x.storage_offset() % 16:
        return [
            f"pixels of x, not all at multiples of 16 bytes: CUDA and Triton kernels first copy it, {x.numel()} bytes"
        ]
    return []


OPERATION = Operation(
    int8_conv2d,
    _check,
    reference.int8_conv2d,
    _fake,
    why_not={"cpu": _why_not_cpu, "cuda": _why_not_cuda, "triton": why_not_groups},
    notes=_notes,
)
