"""int8_grouped_gemm beside torch._int_mm expert by expert."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench
from benchmarks.int8_gemm import baseline as int8_gemm
from forwardpass.ops.common.experts import by_expert, of_expert, of_rows
from forwardpass.ops.int8_grouped_gemm import OPERATION


def baseline(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor, *, bias: Tensor | None, activation: str | None,
    out_dtype: torch.dtype, out_scale: Tensor | None, a_zero_point: Tensor | None, b_sum: Tensor | None,
) -> Tensor:  # fmt: skip
    def product(e: int, rows: slice, of_e: Tensor) -> Tensor:
        scale: Any = of_rows(a_scale, rows)
        return int8_gemm(of_e, b[e], scale, b_scale[e], bias=of_expert(bias, e), activation=activation, out_dtype=out_dtype,
                         out_scale=out_scale, a_zero_point=of_rows(a_zero_point, rows), b_sum=of_expert(b_sum, e))  # fmt: skip

    return by_expert(a, offs, activation, out_dtype, b.shape[1], product)


BASELINES = {OPERATION: baseline}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
