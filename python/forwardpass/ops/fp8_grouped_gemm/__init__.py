"""fp8_grouped_gemm: `fp8_gemm` of each expert's rows with that expert's weight, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.activations import is_gated
from ..common.epilogue import check_epilogue
from ..common.experts import check_ends, check_expert_weight, check_experts_epilogue, fake_grouped_gemm
from ..common.quantized_rows import E4M3, check_8bit, copy_notes
from ..fp8_gemm import BLOCK, check_group_scales, why_no_fp8
from . import reference


def fp8_grouped_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    offs: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None = None,
) -> Tensor:
    """`activation((a * a_scale) @ (b[e] * b_scale[e]).T + bias[e])`, e the expert that a row of a is of.

    As close to the exact product as `fp8_gemm`. No host waits for a GPU, so that graphs can be captured. Rows come in one of
    two layouts::

        sorted by expert   a [S, K], offs [E]: where each expert's rows end; the first one's begin at 0
        room for each      a [E, max_m, K], offs [E]: how many rows each expert has, its first ones

    Scales are of rows, or of blocks. Of blocks are both, as b_scale's dimensions say::

        a_scale   float32, one element, or one a row of a
        b_scale   float32 [E, N]
        blocks    a_scale [..., ceil(K / 128)] in the layout of `quantize(a, torch.float8_e4m3fn, group_size=128)`: rows
                  contiguous, groups a multiple of 4 apart; b_scale [E, ceil(N / 128), ceil(K / 128)] contiguous, with a gated
                  activation [E, 2, ceil(N / 256), ceil(K / 128)]: the gate matrices', then the up matrices'

    Args:
        a: float8_e4m3fn, see above, last stride 1, any row stride.
        b: float8_e4m3fn [E, N, K], E <= 512: of each expert nn.Linear's weight.
        a_scale, b_scale: see above.
        offs: int32 [E], on a's device, see above. Experts may have no rows, and any number needs no alignment.
        bias: [E, N] of float32, float16 or bfloat16.
        activation, out_dtype, out_scale: as in `dequant_activation`; gated activations want the rows of each b, bias and b_scale
            [E, N] interleaved by `interleave_gate_up`. out_scale is one for all experts.

    Returns:
        [S, N] or [E, max_m, N] (gated: N / 2) of out_dtype, contiguous; 8-bit ones with rows padded to 16 bytes. Rows that no
        expert has are 0.

        An end that is below the one before it, or above S, is wrong: on every backend all rows from that end on are NaN, or
        from the end before it if that is less. A count below 0 or above max_m makes all max_m rows of its expert NaN. An int8
        output, which has no NaN, holds -127 there.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments; GPUs below sm_89 multiply no FP8.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, experts = torch.randn(5, 64), torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [2, 1]])  # 2 of 3 a token
        >>> a, a_scale, offs, position = fp.ops.permute_quantize(x, experts, 3, torch.float8_e4m3fn)
        >>> b, b_scale, _ = fp.ops.quantize(torch.randn(3, 128, 64), torch.float8_e4m3fn)
        >>> fp.ops.fp8_grouped_gemm(a, b, a_scale, b_scale, offs, out_dtype=torch.float32).shape
        torch.Size([10, 128])
    """
    return OPERATION(a, b, a_scale, b_scale, offs, bias, activation, out_dtype, out_scale)


def block_scales(n: int, k: int, activation: str | None) -> tuple[int, ...]:
    """The shape of one expert's scales of 128 x 128 blocks."""
    blocks = -(-k // BLOCK)
    return (2, -(-(n // 2) // BLOCK), blocks) if is_gated(activation) else (-(-n // BLOCK), blocks)


def _check(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
) -> None:
    op = "fp8_grouped_gemm"
    check_8bit(op, "a", a, E4M3)
    check_8bit(op, "b", b, E4M3)
    check_expert_weight(op, "b", b, "a", a)
    experts, n, k = b.shape
    blocks = isinstance(b_scale, Tensor) and b_scale.dim() >= 3
    check_epilogue(op, a, tuple(a.shape[:-1]), n, None if blocks else a_scale, None, None, activation, out_dtype, out_scale, None,
                   None, optional=("a_scale", "b_scale") if blocks else ("b_scale",))  # fmt: skip
    if blocks:
        check_group_scales(op, "a_scale", a_scale, a)
    scale_shape = (experts, *block_scales(n, k, activation)) if blocks else None
    check_experts_epilogue(op, a, experts, n, b_scale, bias, None, scale_shape)
    check_ends(op, offs, experts, "a", a)


def _notes(a: Tensor, b: Tensor, *options: object) -> list[str]:
    return copy_notes(a=a, b=b)


OPERATION = Operation(
    fp8_grouped_gemm, _check, reference.fp8_grouped_gemm, fake_grouped_gemm, ("cuda", "triton"), why_not_arch=why_no_fp8,
    notes=_notes,
)  # fmt: skip
