"""unpermute in Triton: a program has some columns of a token.

Launched with enable_fp_fusion=False: the formula's products are rounded before they are added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.quantized_rows import matrix_shape

#: Columns of a program, eight a thread.
BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "choices"])
def unpermute_kernel(y_ptr, y_stride, position_ptr, weights_ptr, out_ptr, rows, columns, choices, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(choices):
        row = tl.load(position_ptr + token * choices + i).to(tl.int64)
        if (row >= 0) & (row < rows):
            weight = tl.load(weights_ptr + token * choices + i).to(tl.float32)
            y = tl.load(y_ptr + row * y_stride + column, mask=column < columns, other=0.0)
            total += weight * y.to(tl.float32)
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=column < columns)


def unpermute(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    rows, columns, stride = matrix_shape(y)
    (tokens, choices), out = position.shape, y.new_empty(position.shape[0], columns)
    if tokens:
        block = min(BLOCK, max(16, triton.next_power_of_2(columns)))
        with torch.cuda.device_of(y):
            unpermute_kernel[(tokens, triton.cdiv(columns, block))](
                y, stride, position, weights, out, rows, columns, choices, BLOCK=block, num_warps=max(1, block // 256),
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


torch.library.impl("forwardpass::unpermute_triton", ("cuda", "cpu"))(unpermute)
