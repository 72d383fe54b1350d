"""fp8_grouped_gemm beside torch._scaled_mm expert by expert, or of block scales products of bf16."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench
from benchmarks.fp8_gemm import baseline as fp8_gemm
from forwardpass.ops.common.experts import by_expert, of_expert, of_rows
from forwardpass.ops.fp8_grouped_gemm import OPERATION


def baseline(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor, *, bias: Tensor | None, activation: str | None,
    out_dtype: torch.dtype, out_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    def product(e: int, rows: slice, of_e: Tensor) -> Tensor:
        scale: Any = a_scale.flatten(0, -2)[rows] if b_scale.dim() >= 3 else of_rows(a_scale, rows)
        return fp8_gemm(of_e, b[e], scale, b_scale[e], of_expert(bias, e), activation, out_dtype, out_scale)

    return by_expert(a, offs, activation, out_dtype, b.shape[1], product)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
