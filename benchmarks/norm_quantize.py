"""norm_quantize and add_norm_quantize beside plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.norm_quantize import ADD_NORM_QUANTIZE, NORM_QUANTIZE


def norm(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, kind: str, bias: Tensor | None, symmetric: bool,
    channel_scale: Tensor | None, rotate: int | None = None, ada_scale: Tensor | None = None, ada_shift: Tensor | None = None,
) -> Any:  # fmt: skip
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    v, size = x.float(), x.shape[-1:]  # as ours: what is quantised was not rounded to 16 bits before
    v = F.rms_norm(v, size, weight, eps) if kind == "rms" else F.layer_norm(v, size, weight, bias, eps)
    if ada_scale is not None and ada_shift is not None:
        v = v * (1 + ada_scale.float()[:, None]) + ada_shift.float()[:, None]
    return eager.quantize_rows(v if channel_scale is None else v * channel_scale, dtype, symmetric)


def add_norm(x: Tensor, residual: Tensor, **options: Any) -> Any:
    residual_out = x + residual
    return *norm(residual_out, **options), residual_out


BASELINES = {NORM_QUANTIZE: norm, ADD_NORM_QUANTIZE: add_norm}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
