"""fp8_linear beside plain torch code: fp8_gemm's, of a quantised x."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from benchmarks.fp8_gemm import baseline as fp8_gemm
from forwardpass.ops.fp8_linear import OPERATION


def baseline(x: Tensor, weight: Tensor, weight_scale: Tensor, channel_scale: Tensor | None, **options: Any) -> Tensor:
    v = x.float() if channel_scale is None else x.float() * channel_scale
    static = options.pop("scale")
    if static is not None:
        q, scale = (v / static).clamp(-448, 448).to(torch.float8_e4m3fn), static
    elif weight_scale.dim() >= 2:
        q, scale = eager.quantize_groups(v, torch.float8_e4m3fn, 128)
    else:
        q, scale, _ = eager.quantize_rows(v, torch.float8_e4m3fn)
    return fp8_gemm(q, weight, scale, weight_scale, **options)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
