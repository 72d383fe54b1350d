"""The GEMMs in Triton: one kernel for int8 and fp8 products and for 8-bit weights beside 16-bit activations.

a [M, K] and b [N, K] both have K contiguous. Operands whose rows are not 16-byte aligned are copied first, so the main loop
has no slow path: TMA on sm_90 and later, 16-byte cp.async before it.

Instructions of the main loop, a warp of 8 and a tile of 128 x 128 x 128 (static, machine code by ptxas of Triton 3.6), none of
them on local memory: int8 142 on sm_80 and sm_89, 85 on sm_90; fp8 with scales of rows 206 on sm_89, 149 on sm_90, of blocks 276
and 196. Nothing here has been timed on a GPU.

Launched with enable_fp_fusion=False: see triton_epilogue.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dequant_activation.triton_kernel import dequantize_block
from .activations import is_gated
from .quantized_rows import E4M3, matrix_shape
from .triton_epilogue import activated, options, store_group, store_output


@dataclass(frozen=True)
class Machine:
    arch: int  # 80, 89, 90
    shared: int  # bytes that a block may have
    multiprocessors: int


@functools.cache
def machine_of(device: Any) -> Machine:
    properties = driver.active.utils.get_device_properties(device)
    return Machine(
        driver.active.get_current_target().arch, properties["max_shared_mem"], properties["multiprocessor_count"]
    )


@dataclass(frozen=True)
class GemmTiling:
    """How a product is cut up. `swap`: b is the first operand of the matrix instructions."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool
    parts: int  # of K


@functools.lru_cache(maxsize=4096)
def tiling_of(
    m: int,
    n: int,
    k: int,
    a_bytes: int,
    scaled: bool,
    quantized: bool,
    gated: bool,
    machine: Machine,
    grouped: bool = False,
) -> GemmTiling:
    """A function of the shape and the machine alone. `scaled`: by blocks; `quantized`: a tile has 128 outputs, a group;
    `grouped`: m is the mean of the experts' rows.

    unmeasured: no figure here is from a GPU; the limits are computed.
    """
    if m <= 64:
        # Bytes of b bound it: tiles no taller than the rows, 16 being those of mma.sync; 64 rows of b, those of one wgmma.
        block_m, block_n, warps = 16 if m <= 16 else 64, 64, 4
        if quantized:
            block_n, warps = (256, 8) if gated else (128, 4)
    else:
        # 64 accumulators a thread: promotion doubles them, and 128 x 256 spills in the epilogue even without (static, sm_90).
        block_m, block_n, warps = (64, 256, 8) if quantized and gated else (128, 128, 8)
        if scaled and a_bytes == 2:
            block_n = 64  # b, upconverted, and twice 64 accumulators spill (static, sm_80)
    # 128 bytes of a row, the most that shared memory swizzles; the depth after which fp8 sums are promoted and block scales change
    block_k = 128 if a_bytes == 1 or m <= 16 else 64
    # Swapped, wgmma takes tiles of few rows, and mma.sync has 8 rows of gate and the 8 of up below them in the same threads, as
    # wgmma has them anyway. b upconverted in registers is not swapped: Triton rewrites those that a wgmma in flight reads.
    swap = a_bytes == 1 and (m <= 64 or (gated and machine.arch // 10 != 9))
    stage = (block_m * a_bytes + block_n) * block_k
    buffers = min(5 if m <= 64 else 4, (machine.shared - 1024) // stage)  # 1 KB: barriers
    stages = buffers if machine.arch >= 90 else buffers + 1  # cp.async: what is being multiplied needs no further one
    tiles, blocks = _tiles(m, n, block_m, block_n), triton.cdiv(k, block_k)
    parts = 1
    # a quantised group's maximum needs whole sums, and how many tiles experts have only the device knows
    if 2 * tiles <= machine.multiprocessors and not quantized and not grouped:
        # idle multiprocessors take parts of K, each at least 4 trips, as filling the pipeline takes about as many
        parts = max(1, min(machine.multiprocessors // tiles, blocks // 4))
        parts = triton.cdiv(blocks, triton.cdiv(blocks, parts))  # none is empty
    return GemmTiling(block_m, block_n, block_k, warps, stages, swap, parts)


def _tiles(m: int, n: int, block_m: int, block_n: int) -> int:
    return triton.cdiv(m, block_m) * triton.cdiv(n, block_n)


@triton.jit
def tile_of(program, tiles_m, tiles_n):
    """8 tiles down, then one to the right: programs that run together share 8 tiles of a and few of b, which stay in L2."""
    group = program // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    within = program % (8 * tiles_n)
    return group * 8 + within % height, within // height


@triton.jit
def expert_of(tile, rows, ends_ptr, experts, room, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert that has this row of tiles, its first row of the output there, the one behind its last (where none has it, no
    row), and whether it is unknown whose rows these are (experts.py). room 0: rows are sorted by expert."""
    each = tl.arange(0, EXPERTS)
    number = tl.load(ends_ptr + each, mask=each < experts, other=0)
    if room == 0:
        before = tl.load(ends_ptr + each - 1, mask=(each > 0) & (each < experts), other=0)
        wrong = (each < experts) & ((number < before) | (number > rows))
        # The first expert whose end is wrong gets all rows whose expert is unknown; those after it get none.
        first_wrong = tl.min(tl.where(wrong, each, EXPERTS), 0)
        known = tl.min(tl.where(each == first_wrong, tl.maximum(tl.minimum(number, before), 0), rows), 0)
        begin = tl.where(each <= first_wrong, tl.minimum(before, known), rows)
        end = tl.where(each < first_wrong, tl.minimum(number, known), rows)
    else:
        wrong = (number < 0) | (number > room)
        begin = each * room
        end = begin + tl.where(wrong, room, number)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    tile_end = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_end <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(each == expert, begin + (tile - (tile_end - tiles)) * BLOCK_M, 0), 0)
    unknown = tl.sum(((each == expert) & wrong).to(tl.int32), 0) > 0
    return expert, first, tl.sum(tl.where(each == expert, end, 0), 0), unknown


@triton.jit
def split_gate_up(acc):
    """[M, N] of blocks of 8 gate and 8 up to [M, N / 2] each; both are in one thread's registers."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    gate, up = tl.split(tl.permute(tl.reshape(acc, (M, N // 16, 2, 8)), (0, 1, 3, 2)))
    return tl.reshape(gate, (M, N // 2)), tl.reshape(up, (M, N // 2))


@triton.jit
def upconvert(b, to: tl.constexpr, ON_BITS: tl.constexpr):
    """8 bits to a 16-bit type, exactly. ON_BITS: the machine does not know e4m3, and b is uint8; or converts integers at an
    eighth of the rate of what is done here."""
    if ON_BITS:
        if b.dtype == tl.uint8:
            # e4m3's sign, exponent and mantissa in fp32's places stand for 2^-120 of the value, denormals included
            v = (b.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
            v = v.to(tl.float32, bitcast=True) * 1.329227995784916e36
            v = tl.where(tl.abs(v) > 448.0, float("nan"), v)
        else:
            # b + 128 in the low bits of 2^23
            v = ((b.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
        b = v.to(to)
    elif b.dtype.is_floating() and to == tl.bfloat16:
        b = b.to(tl.float16).to(tl.float32).to(to)  # Triton's own way needs cvt.bf16.f16, which sm_89 lacks
    else:
        b = b.to(to)
    return b


@triton.jit
def tiles_at(a, b, k, K, first_m, first_n, TMA: tl.constexpr, MASKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The operands' tiles from column k on: a and b are descriptors, or pointers to the first column of a tile."""
    if TMA:
        a_tile, b_tile = a.load([first_m, k]), b.load([first_n, k])
    else:
        cols = (k + tl.arange(0, BLOCK_K))[None, :]
        if MASKED:
            a_tile, b_tile = tl.load(a + cols, mask=cols < K, other=0.0), tl.load(b + cols, mask=cols < K, other=0.0)
        else:
            a_tile, b_tile = tl.load(a + cols), tl.load(b + cols)
    return a_tile, b_tile


@triton.jit
def multiply_add(
    a_tile, b_tile, acc, up, k, row, rows, column, first_n, columns, a_scale_ptr, a_group_step, b_scale_ptr, k_blocks,
    SCALES: tl.constexpr, SWAP: tl.constexpr, GATED: tl.constexpr, UPCONVERT: tl.constexpr, ON_BITS: tl.constexpr,
    PROMOTED: tl.constexpr,
):  # fmt: skip
    """The accumulators after one more block of K. They are in the order of the matrix instruction (SWAP: [N, M]) while nothing
    scales them, else [M, N], with gate and up apart where each has scales of its own."""
    if UPCONVERT:
        b_tile = upconvert(b_tile, a_tile.dtype, ON_BITS)
    if SWAP:
        first, second = b_tile, a_tile.T
    else:
        first, second = a_tile, b_tile.T
    if SCALES == "vectors" and not PROMOTED:
        acc = tl.dot(first, second, acc, out_dtype=acc.dtype)
    else:
        partial = tl.dot(first, second)
        block = (k // 128).to(tl.int64)
        if SCALES == "vectors":
            # the fma by 1 keeps the sum out of the matrix instruction's own accumulator
            acc = tl.fma(partial, tl.full(partial.shape, 1.0, tl.float32), acc)
        else:
            if SWAP:
                partial = tl.trans(partial)
            if SCALES == "groups":  # b_scale [N, K / 128]
                b_scale_ptr += column.to(tl.int64) * k_blocks + block
                b_scale = tl.load(b_scale_ptr, mask=column < columns, other=0.0)
                acc = tl.fma(partial, tl.broadcast_to(b_scale[None, :], partial.shape), acc)
            else:
                a_scale = tl.load(a_scale_ptr + row + block * a_group_step, mask=row < rows, other=0.0)[:, None]
                if GATED:  # b_scale [2, N / 256, K / 128]
                    b_scale_ptr += (first_n // 256).to(tl.int64) * k_blocks + block
                    gate_scale = tl.load(b_scale_ptr)
                    up_scale = tl.load(b_scale_ptr + tl.cdiv(columns, 256).to(tl.int64) * k_blocks)
                    gate_partial, up_partial = split_gate_up(partial)
                    acc = tl.fma(gate_partial, tl.broadcast_to(a_scale * gate_scale, acc.shape), acc)
                    up = tl.fma(up_partial, tl.broadcast_to(a_scale * up_scale, acc.shape), up)
                else:  # b_scale [N / 128, K / 128]
                    b_scale = tl.load(b_scale_ptr + (first_n // 128).to(tl.int64) * k_blocks + block)
                    acc = tl.fma(partial, tl.broadcast_to(a_scale * b_scale, partial.shape), acc)
    return acc, up


@triton.jit
def store_part(part, ptr, stride, row, rows, column, columns):
    """`stride` is of groups of 16 elements, `ptr` aligned: 16 bytes at a time but for the last columns."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * (stride * 16) + column[None, :], part, mask=inside)


_RUN_TIME = [
    "tile_rows", "experts", "room", "a_stride", "b_stride", "rows", "columns", "K", "per_part", "part_stride", "a_group_step",
    "a_scale_step", "b_scale_step", "zero_step", "bias_type", "activation", "out_type", "out_stride", "out_columns",
    "out_scale_step", "residual_stride", "ada_gate_stride", "rows_per_sample",
]  # fmt: skip
_OF_PARTS = ["parts", "acc_stride", "part_stride", "rows", "blocks", *_RUN_TIME[_RUN_TIME.index("a_scale_step") :]]
_ANY_ALIGNMENT = ["a_scale_ptr", "b_scale_ptr", "zero_ptr", "b_sum_ptr", "bias_ptr", "out_scale_ptr"]


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def gemm_kernel(
    ends_ptr, tile_rows, experts, room, a, b, a_stride, b_stride, rows, columns, K, per_part, part_stride, parts_ptr, a_group_step,
    a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step, zero_ptr, zero_step, b_sum_ptr, bias_ptr, bias_type,
    activation, out_scale_ptr, out_scale_step, residual_ptr, residual_stride, ada_gate_ptr, ada_gate_stride, rows_per_sample,
    out_ptr, out_type, out_stride, out_columns, RESIDUAL: tl.constexpr, SCALES: tl.constexpr, GATED: tl.constexpr,
    SPLIT: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    UPCONVERT: tl.constexpr, ON_BITS: tl.constexpr, PROMOTED: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """a_stride and b_stride count 16 bytes, per_part blocks of K, part_stride 16 elements: 16-byte alignment shows. EXPERTS: so
    many rows of tiles, of that many experts at most, as `ends_ptr` says; 0: one product."""
    tile_m, tile_n = tile_of(tl.program_id(0), tile_rows, tl.cdiv(columns, BLOCK_N))
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    first_b = first_n
    if EXPERTS:
        expert, first_m, rows, unknown = expert_of(tile_m, rows, ends_ptr, experts, room, EXPERTS, BLOCK_M)
        if first_m >= rows:
            return
        first_b += expert * columns
        if SCALES == "vectors":
            b_scale_ptr += expert * columns
        else:
            of_one = columns
            if SCALES == "blocks":
                of_one = tl.cdiv(columns, 256) * 2 if GATED else tl.cdiv(columns, 128)
            b_scale_ptr += (expert * of_one).to(tl.int64) * tl.cdiv(K, 128)
        b_sum_ptr += tl.where(zero_step >= 0, expert * columns, 0)
        bias_ptr += tl.where(bias_type > 0, expert * columns, 0) * tl.where(bias_type == 1, 4, 2)
    row, column = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if not TMA:
        # rows beyond the last are the last: their sums are not stored
        a_row = tl.minimum(row, rows - 1).to(tl.int64)
        b_row = (tl.minimum(column, columns - 1) + (first_b - first_n)).to(tl.int64)
        a += a_row[:, None] * (a_stride * (128 // a.dtype.element_ty.primitive_bitwidth))
        b += b_row[:, None] * (b_stride * 16)
    k_blocks = tl.cdiv(K, 128)
    begin = tl.program_id(1) * per_part * BLOCK_K
    end = tl.minimum(K, begin + per_part * BLOCK_K)
    whole = end if TMA else begin + (end - begin) // BLOCK_K * BLOCK_K  # TMA fills with zeros beyond K

    IN_ORDER: tl.constexpr = SWAP and SCALES == "vectors"
    HALVES: tl.constexpr = GATED and SCALES == "blocks"
    sums: tl.constexpr = tl.float32 if PROMOTED or UPCONVERT else tl.int32
    height: tl.constexpr = BLOCK_N if IN_ORDER else BLOCK_M
    width: tl.constexpr = BLOCK_M if IN_ORDER else BLOCK_N // 2 if HALVES else BLOCK_N
    acc = tl.zeros((height, width), sums)
    up = acc
    for k in tl.range(begin, whole, BLOCK_K, num_stages=STAGES):
        a_tile, b_tile = tiles_at(a, b, k, K, first_m, first_b, TMA, False, BLOCK_K)
        acc, up = multiply_add(a_tile, b_tile, acc, up, k, row, rows, column, first_n, columns, a_scale_ptr, a_group_step,
                       b_scale_ptr, k_blocks, SCALES, SWAP, GATED, UPCONVERT, ON_BITS, PROMOTED)  # fmt: skip
    if not TMA:  # noqa: SIM102 (of constants, and not)
        if whole < end:
            a_tile, b_tile = tiles_at(a, b, whole, K, first_m, first_b, TMA, True, BLOCK_K)
            acc, up = multiply_add(a_tile, b_tile, acc, up, whole, row, rows, column, first_n, columns, a_scale_ptr,
                           a_group_step, b_scale_ptr, k_blocks, SCALES, SWAP, GATED, UPCONVERT, ON_BITS, PROMOTED)  # fmt: skip

    if IN_ORDER:
        acc = tl.trans(acc)
    out_column = column
    if GATED:
        out_column = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        if not HALVES:
            acc, up = split_gate_up(acc)
    if SPLIT:
        parts_ptr += tl.program_id(1).to(tl.int64) * rows * (part_stride * 16)
        if GATED:
            wide = out_column + out_column // 8 * 8
            store_part(acc, parts_ptr, part_stride, row, rows, wide, columns)
            store_part(up, parts_ptr, part_stride, row, rows, wide + 8, columns)
        else:
            store_part(acc, parts_ptr, part_stride, row, rows, column, columns)
    else:
        y = activated(acc, up, row, rows, out_column, out_columns, a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step,
                      zero_ptr, zero_step, b_sum_ptr, bias_ptr, bias_type, activation, residual_ptr, residual_stride, out_type,
                      RESIDUAL, GATED, None)  # fmt: skip
        if EXPERTS:
            y = tl.where(unknown, float("nan"), y)
        if GROUPED:
            store_group(y, row, rows, tile_n, out_columns, out_ptr, out_stride, out_scale_ptr, out_scale_step)
        else:
            store_output(y, row, rows, out_column, out_columns, residual_ptr, residual_stride, ada_gate_ptr, ada_gate_stride,
                         rows_per_sample, out_ptr, out_type, out_stride, out_scale_ptr, out_scale_step, RESIDUAL,
                         None)  # fmt: skip


@triton.jit(do_not_specialize=_OF_PARTS, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def sum_parts_kernel(
    acc_ptr, acc_stride, parts, part_stride, rows, blocks, a_scale_ptr, a_scale_step, b_scale_ptr, b_scale_step, zero_ptr,
    zero_step, b_sum_ptr, bias_ptr, bias_type, activation, out_scale_ptr, out_scale_step, residual_ptr, residual_stride,
    ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr, out_type, out_stride, out_columns, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """acc_stride and part_stride count 16 elements."""
    dequantize_block(
        acc_ptr, acc_stride * 16, parts, part_stride.to(tl.int64) * 16, rows, blocks, a_scale_ptr, a_scale_step, b_scale_ptr,
        b_scale_step, zero_ptr, zero_step, b_sum_ptr, bias_ptr, bias_type, activation, out_scale_ptr, out_scale_step, residual_ptr,
        residual_stride, ada_gate_ptr, ada_gate_stride, rows_per_sample, out_ptr, out_type, out_stride, out_columns, RESIDUAL,
        GATED, None, BLOCK,
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """[rows, K] of x with 16-byte aligned rows: a view, or a copy where x's are not."""
    rows, columns, stride = matrix_shape(x)
    per_16 = 16 // x.element_size()
    padded = -(-columns // per_16) * per_16
    view = x.as_strided((rows, columns), (padded if rows == 1 else stride, 1))
    if x.data_ptr() % 16 == 0 and view.stride(0) % per_16 == 0:
        return view
    copy = torch.empty_strided((rows, columns), (padded, 1), dtype=x.dtype, device=x.device)
    copy.view(torch.uint8).copy_(view.view(torch.uint8))
    return copy


def gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor,
    out_scale: Tensor | None = None,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    residual: Tensor | None = None,
    group_scale: Tensor | None = None,
    ends: Tensor | None = None,
    residual_first: bool = False,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """Fills `out`, and returns it. a is int8, e4m3 or (without a_scale) of 16 bits; `group_scale` is filled with the scales of an
    e4m3 output in groups of 128. ends: b is [E, N, K], as are its scales and bias; which rows are an expert's, see `experts.py`."""
    if not out.numel():
        return out
    experts, room = 0 if ends is None else b.shape[0], 0 if ends is None or a.dim() == 2 else a.shape[1]
    wide, scaled, gated = a.element_size() == 2, b_scale.dim() >= (3 if experts else 2), is_gated(activation)
    promoted = wide or b.dtype is E4M3
    arguments = options(a_scale, b_scale, bias, activation, out, out_scale, a_zero_point, b_sum, residual, scaled,
                        residual_first, ada_gate)  # fmt: skip
    if group_scale is not None:
        arguments |= {"out_scale_ptr": group_scale, "out_scale_step": group_scale.stride(-1)}
    with torch.cuda.device_of(a):
        machine = machine_of(driver.active.get_current_device())
        a, b = aligned(a), aligned(b)
        (m, k), n = a.shape, b.shape[0] // max(experts, 1)
        tiling = tiling_of(triton.cdiv(m, max(experts, 1)), n, k, a.element_size(), scaled, group_scale is not None, gated, machine,
                 experts > 0)  # fmt: skip
        tile_rows = triton.cdiv(m, tiling.block_m)
        if experts:  # at most, as tiles are of one expert's rows each
            out.zero_()
            tile_rows = experts * triton.cdiv(room, tiling.block_m) if room else min(m, m // tiling.block_m + experts)
        width, split = triton.cdiv(n, 16), tiling.parts > 1
        parts = out.view(torch.uint8)
        if split:
            sums = torch.float32 if promoted else torch.int32
            parts = torch.empty((tiling.parts, m, 16 * width), dtype=sums, device=a.device)
        tma, on_bits = machine.arch >= 90, wide and machine.arch < (89 if b.dtype is E4M3 else 90)
        operands: list[Any] = [a, b.view(torch.uint8) if on_bits and b.dtype is E4M3 else b]
        if tma:
            operands = [
                TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, tiling.block_k])
                for t, rows in zip(operands, (tiling.block_m, tiling.block_n))
            ]
        gemm_kernel[(tile_rows * triton.cdiv(n, tiling.block_n), tiling.parts)](
            arguments["zero_ptr"] if ends is None else ends, tile_rows, experts, room, *operands,
            a.stride(0) * a.element_size() // 16, b.stride(0) // 16, m, n, k,
            triton.cdiv(triton.cdiv(k, tiling.block_k), tiling.parts), width, parts,
            a_scale.stride(-1) if scaled and a_scale is not None else 0, **arguments,
            SCALES="vectors" if not scaled else "groups" if wide else "blocks",
            GATED=gated and (not split or (scaled and not wide)), SPLIT=split, SWAP=tiling.swap, TMA=tma, UPCONVERT=wide,
            ON_BITS=on_bits, PROMOTED=promoted and not wide, GROUPED=group_scale is not None,
            BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, STAGES=tiling.stages,
            EXPERTS=max(32, triton.next_power_of_2(experts)) if experts else 0, num_warps=tiling.warps, enable_fp_fusion=False,
        )  # fmt: skip
        if split:
            block = 256  # 4 accumulators, 16 bytes, for each thread of 2 warps
            blocks = triton.cdiv(out.shape[-1], block)
            sum_parts_kernel[(m * blocks,)](
                parts, width, tiling.parts, m * width, m, blocks, **arguments, GATED=gated, BLOCK=block, num_warps=2,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out
