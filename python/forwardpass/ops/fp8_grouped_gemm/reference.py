"""fp8_grouped_gemm in plain torch: fp8_gemm's specification, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.experts import by_expert, of_expert, of_rows
from ..fp8_gemm.reference import fp8_gemm


def fp8_grouped_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
) -> Tensor:
    def product(e: int, rows: slice, of_e: Tensor) -> Tensor:
        scale = a_scale.flatten(0, -2)[rows] if b_scale.dim() >= 3 else of_rows(a_scale, rows)
        assert scale is not None
        return fp8_gemm(of_e, b[e], scale, b_scale[e], of_expert(bias, e), activation, out_dtype, out_scale)

    return by_expert(a, offs, activation, out_dtype, b.shape[1], product)
