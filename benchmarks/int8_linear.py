"""int8_linear beside plain torch code around torch._int_mm."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from benchmarks.int8_gemm import baseline as int8_gemm
from forwardpass.ops.int8_linear import OPERATION


def baseline(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype,
    symmetric: bool, channel_scale: Tensor | None, weight_sum: Tensor | None, residual: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    v = x.float() if channel_scale is None else x.float() * channel_scale
    q, scale, zero_point = eager.quantize_rows(v, torch.int8, symmetric)
    epilogue = {"bias": bias, "activation": activation, "out_dtype": out_dtype, "residual": residual}
    if not symmetric:
        epilogue |= {"a_zero_point": zero_point, "b_sum": weight_sum}
    return int8_gemm(q, weight, scale, weight_scale, **epilogue)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
