"""fp8_gemm and fp8_gemm_quantize in plain torch: the specification. The product is in fp64, of the operands as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.activations import interleave_gate_up
from ..common.epilogue import apply_epilogue, per_row
from ..common.quantized_rows import E4M3, quantize_values

#: The sides of a block of b that has one scale; one of a is a row's part as wide.
BLOCK = 128


def rows_scale(a: Tensor, a_scale: Tensor, blocks: bool) -> Tensor:
    """What each element of a [..., K] is multiplied by, in fp64 and broadcast against it."""
    s = a_scale.double()
    if blocks:
        return s.repeat_interleave(BLOCK, -1)[..., : a.shape[-1]]
    return s.reshape(per_row(s, a))


def columns_scale(b: Tensor, b_scale: Tensor) -> Tensor:
    """The same for b [N, K]; b_scale [2, ...] is that of a gate and an up projection, whose rows b has interleaved."""
    s, (n, k) = b_scale.double(), b.shape
    if s.dim() == 3:
        gate, up = (columns_scale(b[: n // 2], half) for half in s)
        return interleave_gate_up(gate, up)
    if s.dim() == 2:
        return s.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return s.reshape(-1, 1)


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    a_values = a.double() * rows_scale(a, a_scale, b_scale.dim() >= 2)
    acc = a_values @ (b.double() * columns_scale(b, b_scale)).t()
    unit = torch.ones(1, device=a.device)
    return apply_epilogue(acc, unit, unit, bias, activation, out_dtype, out_scale, residual=residual, ada_gate=ada_gate)


def fp8_gemm_quantize(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    y = fp8_gemm(a, b, a_scale, b_scale, bias, activation, torch.float32, None)
    q, scale, _ = quantize_values(y, E4M3, group_size=group_size)
    return q, scale
