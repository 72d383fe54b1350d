"""norm_quantize and add_norm_quantize beside plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.norm_quantize import ADD_NORM_QUANTIZE, NORM_QUANTIZE


def norm(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, kind: str, bias: Tensor | None, symmetric: bool,
    channel_scale: Tensor | None,
) -> Any:  # fmt: skip
    size = x.shape[-1:]
    v = F.rms_norm(x, size, weight, eps) if kind == "rms" else F.layer_norm(x, size, weight, bias, eps)
    return eager.quantize_rows(v.float() if channel_scale is None else v.float() * channel_scale, dtype, symmetric)


def add_norm(x: Tensor, residual: Tensor, **options: Any) -> Any:
    residual_out = x + residual
    return *norm(residual_out, **options), residual_out


if __name__ == "__main__":
    bench.main({NORM_QUANTIZE: norm, ADD_NORM_QUANTIZE: add_norm}, __doc__)
