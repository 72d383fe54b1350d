"""The Triton half of every op that ends in a quantisation, as csrc/device/quantize_rows.cuh is the CUDA half.

Launched with enable_fp_fusion=False: the formula's products are rounded before anything is added to them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantized_rows import E4M3, fake_quantized

#: A program holds one block of a segment in registers; a segment of several is read twice, the second time from L2.
#: Blocks of 16384 spill, whether 16 or 32 warps share them.
MAX_BLOCK = 8192


def segments(columns: int, group_size: int | None) -> dict[str, int]:
    """Constants of a launch over the segments of rows: BLOCK, and warps so that a thread holds 16 values.

    That takes 80 to 140 registers (static, sm_90); 32 values took 150 to 255.
    """
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(group_size or columns)))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def allocate(
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """What the op returns, and the kernel arguments that describe it (those of `quantize_segment`)."""
    q, s, z = result = fake_quantized(x, shape, dtype, scale is not None, group_size, symmetric)
    groups = s.shape[-1] if group_size and scale is None else 1
    q_ptr = q.view(torch.uint8) if dtype is E4M3 else q  # Triton refuses a pointer to e4m3 before sm_89
    arguments = {
        "q_ptr": q_ptr,
        "q_stride": -(-shape[-1] // 16) * 16,
        "scale_ptr": s if scale is None else scale,
        "zero_ptr": z if zero_point is None else zero_point,
        "scale_stride": s.stride(-1) if groups > 1 else 0,
        "channel_ptr": channel_scale if channel_scale is not None else q_ptr,
        "columns": shape[-1],
        "group": group_size or shape[-1],
        "groups": groups,
        "CHANNEL_SCALE": channel_scale is not None,
        "ROTATE": rotate or 0,
        "E4M3": dtype is E4M3,
        "SYMMETRIC": symmetric,
        "STATIC": scale is not None,
    }
    return result, arguments


@triton.jit
def to_e4m3_bits(v):
    """fp32 -> e4m3 as uint8, nearest even, saturating; on the bits, as Triton has no such conversion before sm_89."""
    b = v.to(tl.int32, bitcast=True)
    a = b & 0x7FFFFFFF
    normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (a.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    q = tl.minimum(tl.where(a < 0x3C800000, subnormal, normal), 0x7E)
    return (((b >> 24) & 0x80) | tl.where(a > 0x7F800000, 0x7F, q)).to(tl.uint8)


@triton.jit
def to_int(v, low, high):
    """Nearest integer in [low, high] (within 2^22), ties to even: adding 1.5 * 2^23 leaves it in the low bits; NaN gives low."""
    v = tl.where(v > low, v, low)
    v = tl.where(v < high, v, high)
    return (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def rotate_fours(v, STEP: tl.constexpr):
    """v [N], each four elements that are STEP apart times a regular Hadamard matrix."""
    N: tl.constexpr = v.shape[0]
    even, odd = tl.split(tl.permute(tl.reshape(v, (N // (4 * STEP), 2, 2, STEP)), (0, 3, 1, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    first, second = tl.join((a + b) + (c - d), (c + d) + (a - b)), tl.join((a + b) - (c - d), (c + d) - (a - b))
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 3, 1)), (N,))


@triton.jit
def rotate_blocks(v, SIZE: tl.constexpr):
    """Each SIZE elements of v times the Hadamard matrix of that size: the sums of rotation.rotate, in its order."""
    N: tl.constexpr = v.shape[0]
    v = rotate_fours(rotate_fours(rotate_fours(v, 1), 4), 16)
    if SIZE == 256:
        v = rotate_fours(v, 64)
    if SIZE == 128:
        a, b = tl.split(tl.permute(tl.reshape(v, (N // 128, 2, 64)), (0, 2, 1)))
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (N,))
    norm = 0.125 if SIZE == 64 else 0.0625 if SIZE == 256 else 0.08838834764831845
    return v * norm


@triton.jit
def magnitudes(v):
    """The bits of v where it is >= 0, else 0; and of -v where it is < 0. As integers NaN is the largest of all."""
    b = v.to(tl.int32, bitcast=True)
    a = b & 0x7FFFFFFF
    return tl.where(b >= 0, a, 0), tl.where(b < 0, a, 0)


@triton.jit
def at_least_smallest(span):
    return tl.where(span < 7.888609052210118e-31, 7.888609052210118e-31, span)  # 2^-100


@triton.jit
def segment_scale(
    high_bits, low_bits, row, group_index, scale_ptr, zero_ptr, scale_stride, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr,
    STATIC: tl.constexpr,
):  # fmt: skip
    """The reciprocal scale and the zero point of a segment, from the bits of its range; written where they are dynamic."""
    zero_point = 0
    if STATIC:
        inverse = tl.math.div_rn(1.0, tl.load(scale_ptr))
        if not SYMMETRIC:
            zero_point = tl.load(zero_ptr)
    else:
        high = high_bits.to(tl.float32, bitcast=True)
        low = low_bits.to(tl.float32, bitcast=True)
        span = tl.maximum(high_bits, low_bits).to(tl.float32, bitcast=True) if SYMMETRIC else high + low
        span = at_least_smallest(span)
        steps = 448.0 if E4M3 else 127.0 if SYMMETRIC else 255.0
        inverse = tl.math.div_rn(steps, span)
        offset = row + group_index * scale_stride
        tl.store(scale_ptr + offset, tl.math.div_rn(span, steps))
        if not SYMMETRIC:
            zero_point = to_int(low * inverse, 0.0, 255.0) - 128
            tl.store(zero_ptr + offset, zero_point)
    return inverse, zero_point


@triton.jit
def store_quantized(v, q_ptr, mask, inverse, zero_point, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr):
    """v -> q at q_ptr."""
    if E4M3:
        tl.store(q_ptr, to_e4m3_bits(v * inverse), mask=mask)
    else:
        low = -127.0 if SYMMETRIC else -128.0 - zero_point
        tl.store(q_ptr, (to_int(v * inverse, low, 127.0 - zero_point) + zero_point).to(tl.int8), mask=mask)
