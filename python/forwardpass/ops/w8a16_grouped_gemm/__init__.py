"""w8a16_grouped_gemm: `w8a16_gemm` of each expert's rows with that expert's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation, Reason
from ..common.epilogue import check_epilogue, fake_output
from ..common.experts import check_ends, check_expert_weight, check_of_experts
from ..common.quantized_rows import E4M3, FLOATS, check_float_rows, copy_notes
from ..fp8_gemm import BLOCK
from ..w8a16_gemm import why_not_gpu
from . import reference


def w8a16_grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offs: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`activation(x @ (weight[e] * weight_scale[e]).T + bias[e])`, e the expert that a row of x is of.

    Weights of experts that have rows are read once, as 8 bits, and where they are. Rows come in one of two layouts::

        sorted by expert   x [S, K], offs [E]: where each expert's rows end; the first one's begin at 0
        room for each      x [E, max_m, K], offs [E]: how many rows each expert has, its first ones

    Args:
        x: float16, bfloat16 (or, on the CPU, float32), see above, last stride 1, any row stride.
        weight: int8 or float8_e4m3fn [E, N, K], E <= 512: of each expert nn.Linear's weight.
        weight_scale: float32 [E, N]; on a CPU and in Triton also [E, N, ceil(K / 128)], for groups of 128 columns.
        offs: int32 [E], on x's device, see above. Experts may have no rows, and any number needs no alignment.
        bias: float32, float16 or bfloat16 [E, N].
        activation: as in `dequant_activation`; gated ones want the rows of each weight, weight_scale and bias interleaved by
            `interleave_gate_up`.

    Returns:
        [S, N] or [E, max_m, N] (gated: N / 2) of x's dtype, contiguous. Rows that no expert has are 0.

        An end that is below the one before it, or above S, is wrong: on every backend all rows from that end on are NaN, or
        from the end before it if that is less. A count below 0 or above max_m makes all max_m rows of its expert NaN.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x = torch.randn(10, 64)  # sorted by expert: 3 rows of the first one, none of the second, 7 of the third
        >>> offs = torch.tensor([3, 3, 10], dtype=torch.int32)
        >>> weight, weight_scale, _ = fp.ops.quantize(torch.randn(3, 128, 64), torch.int8)
        >>> fp.ops.w8a16_grouped_gemm(x, weight, weight_scale, offs).shape
        torch.Size([10, 128])
    """
    return OPERATION(x, weight, weight_scale, offs, bias, activation)


def _check(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    op = "w8a16_grouped_gemm"
    check_float_rows(op, "x", x)
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.int8, E4M3):
        raise TypeError(
            f"{op}: weight must be an int8 or float8_e4m3fn tensor, not {getattr(weight, 'dtype', type(weight).__name__)}"
        )
    check_expert_weight(op, "weight", weight, "x", x)
    experts, n, k = weight.shape
    check_epilogue(op, x, tuple(x.shape[:-1]), n, None, None, None, activation, x.dtype, None, None, None,
                   optional=("a_scale", "b_scale"), operand="weight")  # fmt: skip
    if not isinstance(weight_scale, Tensor):
        raise TypeError(f"{op}: weight_scale must be a float32 tensor, not {type(weight_scale).__name__}")
    shape = (experts, n, -(-k // BLOCK)) if weight_scale.dim() == 3 else (experts, n)
    check_of_experts(op, "weight_scale", weight_scale, shape, (torch.float32,), x)
    check_of_experts(op, "bias", bias, (experts, n), FLOATS, x)
    check_ends(op, offs, experts, "x", x)


def _fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    return fake_output(x, (*x.shape[:-1], weight.shape[1]), activation, x.dtype)


def _why_not_cuda(x: Tensor, weight: Tensor | None, weight_scale: Tensor | None, *options: object) -> Reason | None:
    if weight_scale is not None and weight_scale.dim() == 3:
        return Reason(
            "scales",
            "this kernel has a scale for each row, and weight_scale has them for groups of columns",
            "use Triton's",
        )
    return why_not_gpu(x)


def _notes(x: Tensor, weight: Tensor, *options: object) -> list[str]:
    return copy_notes(x=x, weight=weight)


OPERATION = Operation(
    w8a16_grouped_gemm,
    _check,
    reference.w8a16_grouped_gemm,
    _fake,
    why_not={"cuda": _why_not_cuda, "triton": why_not_gpu},
    notes=_notes,
)
