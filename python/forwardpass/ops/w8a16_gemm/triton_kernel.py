"""w8a16_gemm in Triton: ops.common.triton_gemm, weights upconverted in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.epilogue import fake_output
from ..common.triton_gemm import gemm


def w8a16_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    out = fake_output(x, (*x.shape[:-1], weight.shape[0]), activation, x.dtype)
    return gemm(x, weight, None, weight_scale, bias, activation, out, residual=residual, ada_gate=ada_gate)


torch.library.impl("forwardpass::w8a16_gemm_triton", ("cuda", "cpu"))(w8a16_gemm)
