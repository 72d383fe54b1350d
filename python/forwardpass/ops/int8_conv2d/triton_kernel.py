"""int8_conv2d in Triton: the GEMM of forwardpass.triton_gemm where windows are single pixels, else a GEMM of windows.

A row of a is an output pixel. Its columns are the channels under the kernel, tap by tap, each tap's padded to blocks. What lies
outside of the image, and channels beyond the last, are zeros of masked loads. Groups are a launch each.

Instructions of the main loop, a warp of 8 and a tile of 128 x 128 x 128 (static, machine code by ptxas of Triton 3.6), none of them
on local memory: see csrc/README.md. Nothing here has been timed on a GPU.

Launched with enable_fp_fusion=False: see triton_epilogue.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from ..common.triton_epilogue import activated, options, store_output
from ..common.triton_gemm import _RUN_TIME, gemm, machine_of, store_part, sum_parts_kernel, tile_of, tiling_of
from . import _fake

_GEOMETRY = [
    "channels", "image_stride", "row_stride", "pixel_stride", "height", "width", "out_height", "out_width", "kernel_w", "taps",
    "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w",
]  # fmt: skip
_ANY_ALIGNMENT = ["a_scale_ptr", "b_scale_ptr", "zero_ptr", "b_sum_ptr", "bias_ptr", "out_scale_ptr"]


@triton.jit(do_not_specialize=[*_GEOMETRY, *_RUN_TIME], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def conv2d_kernel(
    x_ptr, w_ptr, channels, image_stride, row_stride, pixel_stride, height, width, out_height, out_width, kernel_w, taps, stride_h,
    stride_w, padding_h, padding_w, dilation_h, dilation_w, rows, columns, per_part, part_stride, parts_ptr, a_scale_ptr,
    a_scale_step, b_scale_ptr, b_scale_step, zero_ptr, zero_step, b_sum_ptr, bias_ptr, bias_type, activation, out_scale_ptr,
    out_scale_step, residual_ptr, residual_stride, ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr, out_type, out_stride,
    out_columns, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """channels and strides of x count 16 bytes, per_part blocks of K, part_stride 16 elements: 16-byte alignment shows."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows beyond the last are the last: their sums are not stored
    pixel = tl.minimum(row, rows - 1)
    image, y, x = (
        pixel // (out_width * out_height),
        pixel // out_width % out_height * stride_h - padding_h,
        pixel % out_width * stride_w - padding_w,
    )
    place = image.to(tl.int64) * image_stride + y.to(tl.int64) * row_stride + x.to(tl.int64) * pixel_stride
    a = x_ptr + (place * 16)[:, None]
    b = w_ptr + (tl.minimum(column, columns - 1).to(tl.int64) * (taps * channels.to(tl.int64)) * 16)[:, None]
    of_tap = tl.cdiv(channels * 16, BLOCK_K)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(taps * of_tap, begin + per_part)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for block in tl.range(begin, end, num_stages=STAGES):
        tap = block // of_tap
        channel = (block % of_tap * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        down, right = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
        inside = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
        there = channel < channels * 16
        of_pixel = (down.to(tl.int64) * row_stride + right.to(tl.int64) * pixel_stride) * 16
        a_tile = tl.load(a + of_pixel + channel, mask=inside[:, None] & there, other=0)
        b_tile = tl.load(b + (tap * channels).to(tl.int64) * 16 + channel, mask=there, other=0)
        acc = tl.dot(a_tile, b_tile.T, acc, out_dtype=tl.int32)
    if SPLIT:
        parts_ptr += tl.program_id(1).to(tl.int64) * rows * (part_stride * 16)
        store_part(acc, parts_ptr, part_stride, row, rows, column, columns)
    else:
        values = activated(acc, acc, row, rows, column, out_columns, a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step,
                           zero_ptr, zero_step, b_sum_ptr, bias_ptr, bias_type, activation, residual_ptr, residual_stride, out_type,
                           RESIDUAL, False, None)  # fmt: skip
        store_output(values, row, rows, column, out_columns, residual_ptr, residual_stride, ada_gate_ptr, ada_gate_stride,
                     rows_per_sample, out_ptr, out_type, out_stride, out_scale_ptr, out_scale_step, RESIDUAL, None)  # fmt: skip


class Geometry(NamedTuple):
    """Where windows of images [N, H, W, C] lie, and a weight [C_out, kh, kw, C / groups]; pairs are of height and width."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def is_gemm(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the windows are single pixels, all of them, that lie at one distance."""
        height, width, pixel = x.shape[1], x.shape[2], x.stride(2)
        together = (height == 1 or x.stride(1) == width * pixel) and (
            x.shape[0] == 1 or x.stride(0) == height * width * pixel
        )
        single = tuple(weight.shape[1:3]) == (1, 1) and max(*self.stride, self.groups) == 1 and not any(self.padding)
        return single and together


def aligned_channels(x: Tensor, groups: int) -> Tensor:
    """[..., groups, C] of x [..., groups * C], C and every address a multiple of 16: a view, or a padded copy."""
    x = x.unflatten(-1, (groups, -1))
    channels = x.shape[-1]
    strides = [s for s, n in zip(x.stride()[:-2], x.shape) if n != 1]
    if channels % 16 == 0 and x.data_ptr() % 16 == 0 and not any(s % 16 for s in strides):
        return x
    copy = x.new_zeros((*x.shape[:-1], -(-channels // 16) * 16))
    copy[..., :channels] = x
    return copy


def convolve(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, geometry: Geometry, bias: Tensor | None,
    activation: str | None, out: Tensor, out_scale: Tensor | None, residual: Tensor | None, residual_first: bool,
) -> None:  # fmt: skip
    """One group: x [N, H, W, C], weight [n, kh, kw, C], out and residual [N, Ho, Wo, n]."""
    (_, height, width, channels), (n, kernel_h, kernel_w, _) = x.shape, weight.shape
    m, out_height, out_width = out.shape[0] * out.shape[1] * out.shape[2], out.shape[1], out.shape[2]
    arguments = options(
        x_scale, weight_scale, bias, activation, out, out_scale, residual=residual, residual_first=residual_first
    )
    taps = kernel_h * kernel_w
    machine = machine_of(driver.active.get_current_device())
    tiling = tiling_of(m, n, taps * channels, 1, False, False, False, machine)
    block_k = min(tiling.block_k, max(32, triton.next_power_of_2(channels)))
    blocks = taps * triton.cdiv(channels, block_k)
    parts = min(tiling.parts, blocks)
    per_part = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, per_part)
    sums = out.view(torch.uint8) if parts == 1 else torch.empty(
        (parts, m, triton.cdiv(n, 16) * 16), dtype=torch.int32, device=x.device
    )  # fmt: skip
    conv2d_kernel[(triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n), parts)](
        x, weight, channels // 16, *(s // 16 for s in x.stride()[:3]), height, width, out_height, out_width, kernel_w, taps,
        *geometry.stride, *geometry.padding, *geometry.dilation, m, n, per_part, triton.cdiv(n, 16), sums, **arguments,
        SPLIT=parts > 1, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=block_k, STAGES=tiling.stages,
        num_warps=tiling.warps, enable_fp_fusion=False,
    )  # fmt: skip
    if parts > 1:
        block = 256  # 4 accumulators, 16 bytes, for each thread of 2 warps
        width16, across = triton.cdiv(n, 16), triton.cdiv(n, block)
        sum_parts_kernel[(m * across,)](
            sums, width16, parts, m * width16, m, across, **arguments, GATED=False, BLOCK=block, num_warps=2,
            enable_fp_fusion=False,
        )  # fmt: skip


def int8_conv2d(
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
) -> Tensor:
    result = _fake(x, weight, x_scale, weight_scale, stride, padding, dilation, groups, bias, activation, out_dtype)
    if not result.numel():
        return result
    geometry = Geometry(stride, padding, dilation, groups)
    x, weight, out = (t.permute(0, 2, 3, 1) for t in (x, weight, result))
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    if x_scale.numel() > 1:  # each output pixel's
        x_scale = x_scale.repeat_interleave(out.shape[1] * out.shape[2])
    with torch.cuda.device_of(x):
        if geometry.is_gemm(x, weight):
            pixels = x.as_strided((x.shape[0] * x.shape[1] * x.shape[2], x.shape[3]), (x.stride(2), 1))
            gemm(pixels, weight.flatten(1), x_scale, weight_scale, bias, activation, out, out_scale, residual=residual,
                 residual_first=residual_first)  # fmt: skip
            return result
        x, weight = aligned_channels(x, groups), aligned_channels(weight, 1).squeeze(-2)
        n = weight.shape[0] // groups

        def of_group(v: Tensor | None, g: int) -> Tensor | None:
            """A part of the last dimension, if it is the columns'."""
            return v if v is None or v.numel() == 1 or groups == 1 else v[..., g * n : (g + 1) * n]

        for g in range(groups):
            part = of_group(out, g), of_group(weight_scale, g)
            assert part[0] is not None and part[1] is not None
            convolve(x[..., g, :], weight[g * n : (g + 1) * n], x_scale, part[1], geometry, of_group(bias, g), activation, part[0],
                     of_group(out_scale, g), of_group(residual, g), residual_first)  # fmt: skip
    return result


torch.library.impl("forwardpass::int8_conv2d_triton", ("cuda", "cpu"))(int8_conv2d)
