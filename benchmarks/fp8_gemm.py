"""fp8_gemm and fp8_gemm_quantize beside plain torch code: torch._scaled_mm, or of block scales a product of bf16."""

from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, eager
from forwardpass.ops import interleave_gate_up
from forwardpass.ops.fp8_gemm import BLOCK, FP8_GEMM, FP8_GEMM_QUANTIZE


def columns(b: Tensor, b_scale: Tensor) -> Tensor:
    """Block scales of b [N, K], one an element; of a gated activation those of gate and of up."""
    n, k = b.shape
    if b_scale.dim() == 3:
        return interleave_gate_up(*(columns(b[: n // 2], half) for half in b_scale))
    return b_scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """bf16 [..., N]"""
    if b_scale.dim() >= 2:
        wide = a.float() * a_scale.repeat_interleave(BLOCK, -1)[..., : a.shape[-1]]
        return wide.bfloat16() @ (b.float() * columns(b, b_scale)).bfloat16().t()
    rows = a.flatten(0, -2)
    if a_scale.numel() == b_scale.numel() == 1:
        scales = a_scale.reshape(()), b_scale.reshape(())
    else:
        scales = (a_scale.reshape(-1, 1).expand(rows.shape[0], 1).contiguous(),
                  b_scale.reshape(1, -1).expand(1, b.shape[0]).contiguous())  # fmt: skip
    return torch._scaled_mm(rows, b.t(), *scales, out_dtype=torch.bfloat16).unflatten(0, a.shape[:-1])


def baseline(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None,
    out_dtype: torch.dtype, out_scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    unit = torch.ones(1, device=a.device)
    acc = product(a, b, a_scale, b_scale)
    return eager.dequantize(acc, unit, unit, bias, activation, out_dtype, out_scale=out_scale, residual=residual)


def baseline_quantize(*args: Any, group_size: int | None, **named: Any) -> tuple[Tensor, Tensor]:
    y = baseline(*args, **named, out_dtype=torch.float32)
    if group_size is None:
        return eager.quantize_rows(y, torch.float8_e4m3fn)[:2]
    return eager.quantize_groups(y, torch.float8_e4m3fn, group_size)


BASELINES = {FP8_GEMM: baseline, FP8_GEMM_QUANTIZE: baseline_quantize}

if __name__ == "__main__":
    bench.main(BASELINES, __doc__)
