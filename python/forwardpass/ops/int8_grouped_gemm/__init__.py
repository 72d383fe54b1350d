"""int8_grouped_gemm: `int8_gemm` of each expert's rows with that expert's weight, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation
from ..common.epilogue import check_epilogue
from ..common.experts import check_ends, check_expert_weight, check_experts_epilogue, fake_grouped_gemm
from ..common.quantized_rows import check_8bit
from ..int8_gemm import check_int8_depth, int8_notes
from . import reference


def int8_grouped_gemm(
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
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> Tensor:
    """`activation((a - a_zero_point) @ b[e].T * a_scale * b_scale[e] + bias[e])`, e the expert that a row of a is of.

    The bits are those of `int8_gemm` called expert by expert. No host waits for a GPU, so that graphs can be captured. Rows
    come in one of two layouts::

        sorted by expert   a [S, K], offs [E]: where each expert's rows end; the first one's begin at 0
        room for each      a [E, max_m, K], offs [E]: how many rows each expert has, its first ones

    Args:
        a: int8, see above, last stride 1, any row stride. K <= 131071, with a_zero_point <= 65536.
        b: int8 [E, N, K], E <= 512: of each expert nn.Linear's weight.
        a_scale: float32, one element, or one a row of a.
        b_scale: float32 [E, N].
        offs: int32 [E], on a's device, see above. Experts may have no rows, and any number needs no alignment.
        bias: [E, N] of float32, float16 or bfloat16.
        activation, out_dtype, out_scale: as in `dequant_activation`; gated activations want the rows of each b, b_scale, bias
            and b_sum interleaved by `interleave_gate_up`. out_scale is one for all experts.
        a_zero_point: int32, one element, or one a row of a.
        b_sum: int32 [E, N], b.sum(2): used with a_zero_point; computed by one more pass over b where it is not given.

    Returns:
        [S, N] or [E, max_m, N] (gated: N / 2) of out_dtype, contiguous; 8-bit ones with rows padded to 16 bytes. Rows that no
        expert has are 0.

        An end that is below the one before it, or above S, is wrong: on every backend all rows from that end on are NaN, or
        from the end before it if that is less. A count below 0 or above max_m makes all max_m rows of its expert NaN. An int8
        output, which has no NaN, holds -127 there.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, experts = torch.randn(5, 64), torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [2, 1]])  # 2 of 3 a token
        >>> a, a_scale, offs, position = fp.ops.permute_quantize(x, experts, 3, torch.int8)
        >>> b, b_scale, _ = fp.ops.quantize(torch.randn(3, 128, 64), torch.int8)
        >>> fp.ops.int8_grouped_gemm(a, b, a_scale, b_scale, offs, out_dtype=torch.float32).shape
        torch.Size([10, 128])
    """
    if a_zero_point is not None and b_sum is None:
        b_sum = b.sum(2, dtype=torch.int32)
    return OPERATION(a, b, a_scale, b_scale, offs, bias, activation, out_dtype, out_scale, a_zero_point, b_sum)


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
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
) -> None:
    op = "int8_grouped_gemm"
    check_8bit(op, "a", a, torch.int8)
    check_8bit(op, "b", b, torch.int8)
    check_expert_weight(op, "b", b, "a", a)
    check_int8_depth(op, b.shape[2], a_zero_point is not None)
    experts, n = b.shape[:2]
    check_epilogue(op, a, tuple(a.shape[:-1]), n, a_scale, None, None, activation, out_dtype, out_scale, a_zero_point, None,
                   optional=("b_scale",))  # fmt: skip
    check_experts_epilogue(op, a, experts, n, b_scale, bias, b_sum)
    if b_sum is not None and a_zero_point is None:
        raise ValueError(f"{op}: b_sum is used with a_zero_point only: pass both or neither")
    check_ends(op, offs, experts, "a", a)


def _notes(a: Tensor, b: Tensor, *options: object) -> list[str]:
    return int8_notes(a, b, options[7])


OPERATION = Operation(int8_grouped_gemm, _check, reference.int8_grouped_gemm, fake_grouped_gemm, notes=_notes)
