"""w8a16_grouped_gemm in Triton: ops.common.triton_gemm, weights upconverted in registers, whose programs find their expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.triton_gemm import gemm
from . import OPERATION


def w8a16_grouped_gemm(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    out = OPERATION.fake(x, weight, weight_scale, offs, bias, activation)
    return gemm(x, weight, None, weight_scale, bias, activation, out, ends=offs)


torch.library.impl("forwardpass::w8a16_grouped_gemm_triton", ("cuda", "cpu"))(w8a16_grouped_gemm)
