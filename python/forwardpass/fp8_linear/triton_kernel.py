"""fp8_linear in Triton: quantize's kernel, then fp8_gemm's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8_gemm.reference import BLOCK
from ..fp8_gemm.triton_kernel import fp8_gemm
from ..quantize.triton_kernel import quantize
from ..quantized_rows import E4M3


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    scale: Tensor | None,
    channel_scale: Tensor | None,
) -> Tensor:
    group_size = BLOCK if w_scale.dim() >= 2 else None
    q, dynamic_scale, _ = quantize(x, E4M3, scale, None, group_size, True, channel_scale)
    a_scale = dynamic_scale if scale is None else scale
    return fp8_gemm(q, weight, a_scale, w_scale, bias, activation, out_dtype, None)


torch.library.impl("forwardpass::fp8_linear_triton", ("cuda", "cpu"))(fp8_linear)
