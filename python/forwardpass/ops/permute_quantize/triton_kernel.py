"""permute_quantize in Triton: a program for each expert finds the places of those that chose it, then one for each choice
quantises its token's row, or a group of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.quantized_rows import E4M3, matrix_shape
from ..common.triton_rows import segments
from ..quantize.triton_kernel import quantize_segment
from . import OPERATION


@triton.jit
def load_experts(index_ptr, start, rows, experts, BLOCK: tl.constexpr):
    """(which choices, which expert each is of): `experts` for one that is none, -1 beyond the last choice."""
    choice = start + tl.arange(0, BLOCK)
    expert = tl.load(index_ptr + choice, mask=choice < rows, other=0).to(tl.int64)
    expert = tl.where((expert >= 0) & (expert < experts), expert, experts)
    return choice, tl.where(choice < rows, expert, -1)


@triton.jit(do_not_specialize=["rows", "experts"])
def positions_kernel(index_ptr, offs_ptr, position_ptr, rows, experts, BLOCK: tl.constexpr):
    """The last program is of the choices that are no expert."""
    expert = tl.program_id(0)
    before, count = 0, 0
    for start in range(0, rows, BLOCK):
        _, expert_of = load_experts(index_ptr, start, rows, experts, BLOCK)
        before += tl.sum(((expert_of >= 0) & (expert_of < expert)).to(tl.int32))
        count += tl.sum((expert_of == expert).to(tl.int32))
    if expert < experts:
        tl.store(offs_ptr + expert, before + count)
    for start in range(0, rows, BLOCK):
        choice, expert_of = load_experts(index_ptr, start, rows, experts, BLOCK)
        matches = (expert_of == expert).to(tl.int32)
        row = before + tl.cumsum(matches) - 1
        tl.store(position_ptr + choice, tl.where(expert < experts, row, -1), mask=expert_of == expert)
        before += tl.sum(matches)


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
            group_index, scale_ptr, scale_ptr, scale_stride, CHANNEL_SCALE, E4M3, True, False, BLOCK,
        )  # fmt: skip
    if choice >= tl.load(offs_ptr + experts - 1):  # a row that no choice has
        for start in range(0, length, BLOCK):
            c = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], q_ptr.dtype.element_ty)
            tl.store(q_ptr + choice * q_stride + begin + c, zeros, mask=c < length)
        tl.store(scale_ptr + choice + group_index * scale_stride, 0.0)


def permute_quantize(
    x: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype, group_size: int | None, channel_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, scale, offs, position = result = OPERATION.fake(x, index, num_experts, dtype, group_size, channel_scale)
    rows, columns = q.shape
    groups = 1 if group_size is None else scale.shape[1]
    q_ptr = q.view(torch.uint8) if dtype is E4M3 else q
    with torch.cuda.device_of(x):
        positions_kernel[(num_experts + 1,)](index, offs, position, rows, num_experts, BLOCK=1024)
        if rows:
            permute_quantize_kernel[(rows * groups,)](
                x, matrix_shape(x)[2], position, offs, q_ptr, q.stride(0), scale, scale.stride(-1) if groups > 1 else 0,
                q_ptr if channel_scale is None else channel_scale, columns, group_size or columns, groups, index.shape[1],
                num_experts, CHANNEL_SCALE=channel_scale is not None, E4M3=dtype is E4M3, **segments(columns, group_size),
                enable_fp_fusion=False,
            )  # fmt: skip
    return result


torch.library.impl("forwardpass::permute_quantize_triton", ("cuda", "cpu"))(permute_quantize)
