"""permute_quantize in Triton: a counting sort of the choices by expert, then a program for each choice, which quantises its token's
row, or a group of it.

A slice is so many choices that follow each other. Programs of one launch count the choices of each expert in a slice, those of a
second one add up what the slices before each have, and those of a third give each choice of a slice its place. So choices are read
twice, however many experts there are. A single slice needs the third launch alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.quantized_rows import E4M3, matrix_shape
from ..common.triton_rows import segments
from ..quantize.triton_kernel import quantize_segment
from . import OPERATION

#: Choices that a program ranks at a time: it compares each with each, of which a thread of 128 then has 128 pairs.
BLOCK = 128
#: Choices of a slice, where there are at most MOST_SLICES. Counts are a number for each slice and expert, 2 MB at most.
LEAST_SLICE, MOST_SLICES = 4 * BLOCK, 1024


@triton.jit
def load_experts(index_ptr, choice, rows, experts):
    """The experts of choices, `experts` for none: a choice that is no expert, or is beyond the last one."""
    expert = tl.load(index_ptr + choice, mask=choice < rows, other=-1)
    return tl.where((expert >= 0) & (expert < experts), expert, experts).to(tl.int32)


@triton.jit
def count_choices(index_ptr, begin, end, rows, experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many choices of each expert [BINS] there are, and of none behind the last."""
    counts = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, BLOCK):
        counts += tl.histogram(load_experts(index_ptr, start + tl.arange(0, BLOCK), rows, experts), BINS)
    return counts


@triton.jit(do_not_specialize=["rows", "experts", "slice_size"])
def count_kernel(index_ptr, counts_ptr, rows, experts, slice_size, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [slices, experts]"""
    begin = tl.program_id(0) * slice_size
    counts = count_choices(index_ptr, begin, begin + slice_size, rows, experts, BINS, BLOCK)
    expert = tl.arange(0, BINS)
    tl.store(counts_ptr + tl.program_id(0) * experts + expert, counts, mask=expert < experts)


@triton.jit(do_not_specialize=["slices", "experts"])
def add_up_kernel(counts_ptr, totals_ptr, slices, experts, SLICES: tl.constexpr, EXPERTS: tl.constexpr):
    """In place of each count those of the slices before; totals [experts]: of all slices. EXPERTS: of a program, a sector's."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, slices, SLICES):
        of_slice = first + tl.arange(0, SLICES)
        ptr = counts_ptr + of_slice[:, None] * experts + expert[None, :]
        exists = (of_slice < slices)[:, None] & (expert < experts)[None, :]
        counts = tl.load(ptr, mask=exists, other=0)
        tl.store(ptr, tl.cumsum(counts, 0) - counts + total[None, :], mask=exists)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, total, mask=expert < experts)


@triton.jit(do_not_specialize=["rows", "experts", "slice_size"])
def positions_kernel(
    index_ptr, earlier_ptr, totals_ptr, offs_ptr, position_ptr, rows, experts, slice_size, SEVERAL: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SEVERAL: there are several slices, of which add_up_kernel has counted each; else a program counts its own."""
    begin = tl.program_id(0) * slice_size
    bins = tl.arange(0, BINS)
    if SEVERAL:
        total = tl.load(totals_ptr + bins, mask=bins < experts, other=0)
        earlier = tl.load(earlier_ptr + tl.program_id(0) * experts + bins, mask=bins < experts, other=0)
    else:
        total = count_choices(index_ptr, begin, begin + slice_size, rows, experts, BINS, BLOCK)
        earlier = tl.zeros([BINS], tl.int32)
    ends = tl.cumsum(total, 0)
    if begin == 0:
        tl.store(offs_ptr + bins, ends, mask=bins < experts)
    next_row = ends - total + earlier  # of each expert
    i = tl.arange(0, BLOCK)
    for start in range(begin, begin + slice_size, BLOCK):
        expert = load_experts(index_ptr, start + i, rows, experts)
        same_before = (expert[None, :] == expert[:, None]) & (i[None, :] < i[:, None])
        row = tl.gather(next_row, expert, 0) + tl.sum(same_before.to(tl.int32), 1)
        tl.store(position_ptr + start + i, tl.where(expert < experts, row, -1), mask=start + i < rows)
        next_row += tl.histogram(expert, BINS)


@triton.jit(do_not_specialize=["choices", "experts", "scale_stride"])
def permute_quantize_kernel(
    x_ptr, x_stride, position_ptr, offs_ptr, q_ptr, q_stride, scale_ptr, scale_stride, channel_ptr, columns, group, groups,
    choices, experts, CHANNEL_SCALE: tl.constexpr, E4M3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    choice, group_index = segment // groups, segment % groups
    begin = group_index * group
    length = tl.minimum(columns - begin, group)
    row = tl.load(position_ptr + choice).to(tl.int64)
    if row >= 0:
        quantize_segment(
            x_ptr + choice // choices * x_stride + begin, channel_ptr + begin, q_ptr + row * q_stride + begin, length, row,
            group_index, scale_ptr, scale_ptr, scale_stride, CHANNEL_SCALE, 0, E4M3, True, False, BLOCK,
        )  # fmt: skip
    if choice >= tl.load(offs_ptr + experts - 1):  # a row that no choice has
        for start in range(0, length, BLOCK):
            c = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], q_ptr.dtype.element_ty)
            tl.store(q_ptr + choice * q_stride + begin + c, zeros, mask=c < length)
        tl.store(scale_ptr + choice + group_index * scale_stride, 0.0)


def find_positions(index: Tensor, offs: Tensor, position: Tensor) -> None:
    rows, experts = index.numel(), offs.numel()
    size = max(LEAST_SLICE, triton.cdiv(triton.cdiv(rows, MOST_SLICES), BLOCK) * BLOCK)
    slices = max(1, triton.cdiv(rows, size))  # without choices offs are written too
    counts = totals = offs  # stand for what a single slice needs not
    bins = triton.next_power_of_2(experts + 1)
    if slices > 1:
        counts, totals = offs.new_empty(slices, experts), torch.empty_like(offs)
        count_kernel[(slices,)](index, counts, rows, experts, size, BINS=bins, BLOCK=BLOCK)
        add_up_kernel[(triton.cdiv(experts, 8),)](counts, totals, slices, experts, SLICES=128, EXPERTS=8)
    positions_kernel[(slices,)](
        index, counts, totals, offs, position, rows, experts, size, SEVERAL=slices > 1, BINS=bins, BLOCK=BLOCK
    )


def permute_quantize(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, group_size: int | None, channel_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, scale, offs, position = result = OPERATION.fake(x, index, num_experts, dtype, group_size, channel_scale)
    rows, columns = q.shape
    groups = 1 if group_size is None else scale.shape[1]
    q_ptr = q.view(torch.uint8) if dtype is E4M3 else q
    with torch.cuda.device_of(x):
        find_positions(index, offs, position)
        if rows:
            permute_quantize_kernel[(rows * groups,)](
                x, matrix_shape(x)[2], position, offs, q_ptr, q.stride(0), scale, scale.stride(-1) if groups > 1 else 0,
                q_ptr if channel_scale is None else channel_scale, columns, group_size or columns, groups, index.shape[1],
                num_experts, CHANNEL_SCALE=channel_scale is not None, E4M3=dtype is E4M3, **segments(columns, group_size),
                enable_fp_fusion=False,
            )  # fmt: skip
    return result


torch.library.impl("forwardpass::permute_quantize_triton", ("cuda", "cpu"))(permute_quantize)
