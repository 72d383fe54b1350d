"""w8a16_grouped_gemm in plain torch: w8a16_gemm's specification, expert by expert."""

from __future__ import annotations

from torch import Tensor

from ..common.experts import by_expert, of_expert
from ..w8a16_gemm.reference import w8a16_gemm


def w8a16_grouped_gemm(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    def product(e: int, rows: slice, of_e: Tensor) -> Tensor:
        return w8a16_gemm(of_e, weight[e], weight_scale[e], of_expert(bias, e), activation)

    return by_expert(x, offs, activation, x.dtype, weight.shape[1], product)
