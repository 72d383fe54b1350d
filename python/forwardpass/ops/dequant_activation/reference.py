"""dequant_activation in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.epilogue import apply_epilogue


def dequant_activation(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    return apply_epilogue(acc, a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum, residual,
                          ada_gate=ada_gate)  # fmt: skip
