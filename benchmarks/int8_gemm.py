"""int8_gemm and int8_gemm_quantize beside plain torch code around torch._int_mm."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops.int8_gemm import OPERATION, QUANTIZE_OPERATION


def baseline(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, **epilogue: Any) -> Tensor:
    acc = torch._int_mm(a.flatten(0, -2), b.t()).unflatten(0, a.shape[:-1])
    return eager.dequantize(acc, a_scale, b_scale, **epilogue)


def baseline_quantize(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    q, scale, _ = eager.quantize_rows(baseline(*args, **named, out_dtype=torch.float32), torch.int8)
    return q, scale


BASELINES = {OPERATION: baseline, QUANTIZE_OPERATION: baseline_quantize}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
