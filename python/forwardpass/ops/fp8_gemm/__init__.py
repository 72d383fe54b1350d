"""fp8_gemm and fp8_gemm_quantize: [M, K] times [N, K] transposed in e4m3, dequantisation and activation in the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Operation, Reason
from ..common.activations import is_gated
from ..common.epilogue import check_epilogue, check_row_scales, fake_gemm
from ..common.quantized_rows import (
    E4M3,
    check_8bit,
    check_elements,
    check_rows,
    check_weight,
    copy_notes,
    fake_quantized,
)
from . import reference
from .reference import BLOCK

#: The least GPU whose tensor cores multiply e4m3.
CAPABILITY = (8, 9)
#: Majors of the GPUs (B200, B300, Thor) that multiply e4m3 by tcgen05 alone: ptxas emulates the mma.sync that PTX for
#: compute_90 has, with spills (csrc/README.md).
TCGEN05_ONLY = (10, 11)


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype,
    out_scale: Tensor | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """`activation((a * a_scale) @ (b * b_scale).T + bias) + residual` of float8_e4m3fn operands.

    Tensor cores add e4m3 products with fewer bits than fp32 has, so kernels move their sums to fp32 every 128 of K: the
    result is within 2^-10 of the sum of |a * b| on such hardware, whatever K, and within 2^-19 where products add exactly.

    Scales are of the whole tensor, of rows, or of blocks. Of blocks are both, as b_scale's dimensions say::

        a_scale   float32, one element, or one a row of a
        b_scale   float32 [1] or [N]
        blocks    a_scale [..., ceil(K / 128)] in the layout of `quantize(a, torch.float8_e4m3fn, group_size=128)`: rows
                  contiguous, groups a multiple of 4 apart; b_scale [ceil(N / 128), ceil(K / 128)] contiguous, with a gated
                  activation [2, ceil(N / 256), ceil(K / 128)]: the gate matrix's, then the up matrix's

    Args:
        a: float8_e4m3fn [..., K], last stride 1, any row stride.
        b: float8_e4m3fn [N, K], as nn.Linear's weight.
        a_scale, b_scale: see above.
        bias, activation, out_dtype, out_scale, residual: as in `dequant_activation`; gated activations want the rows of b, bias
            and a b_scale [N] interleaved by `interleave_gate_up`.
        ada_gate: as in `dequant_activation`: [B, N] (gated: N / 2) of out_dtype, with a residual: `ada_gate[b] * y + residual`.

    Returns:
        [..., N] (gated: N / 2) of out_dtype, contiguous; 8-bit ones with rows padded to 16 bytes.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments; GPUs below sm_89 multiply no FP8.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> x, weight = torch.randn(4, 256), torch.randn(128, 256)
        >>> (a, a_scale, _), (b, b_scale, _) = (fp.ops.quantize(t, torch.float8_e4m3fn) for t in (x, weight))
        >>> y = fp.ops.fp8_gemm(a, b, a_scale, b_scale, out_dtype=torch.float32)
        >>> y.shape, bool((y - x @ weight.T).norm() < 0.1 * y.norm())
        (torch.Size([4, 128]), True)
    """
    args = (a, b, a_scale, b_scale, bias, activation, out_dtype, out_scale)
    if ada_gate is not None:
        return FP8_GEMM(*args, residual, ada_gate)
    return FP8_GEMM(*args) if residual is None else FP8_GEMM(*args, residual)


def fp8_gemm_quantize(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    group_size: int | None = BLOCK,
) -> tuple[Tensor, Tensor]:
    """`fp8_gemm` and `quantize` of its result to e4m3 in one pass: the result is never rounded to 16 bits.

    Args:
        a: as in fp8_gemm, and so is everything not named here. There is no residual.
        group_size: columns of the output that share a scale: 128; None: a row has one. On sm_90 a row of up to 256 columns of b is
            quantised in the product's epilogue, in which one block has all of it. Of a wider one, and on other GPUs, the
            product's float32 outputs are quantised by a second kernel.

    Returns:
        q float8_e4m3fn [..., N] (gated: N / 2), its rows padded to 16 bytes; scale float32 [..., ceil(N / 128)] with rows
        contiguous and groups a multiple of 4 apart, or [...]: what the next fp8_gemm takes as a and a_scale.

    Raises:
        TypeError: an argument is of another type or dtype than above.
        ValueError: a shape, layout, device, value or combination of arguments is not one of those above.
        Unsupported: a backend asked for by name cannot run these arguments; GPUs below sm_89 multiply no FP8.
        RuntimeError: an input requires grad, in grad mode: operations have no backward.

    Example:
        >>> a, a_scale, _ = fp.ops.quantize(torch.randn(4, 256), torch.float8_e4m3fn)
        >>> b, b_scale, _ = fp.ops.quantize(torch.randn(384, 256), torch.float8_e4m3fn)
        >>> q, scale = fp.ops.fp8_gemm_quantize(a, b, a_scale, b_scale)
        >>> q.shape, q.dtype, scale.shape
        (torch.Size([4, 384]), torch.float8_e4m3fn, torch.Size([4, 3]))
    """
    return FP8_GEMM_QUANTIZE(a, b, a_scale, b_scale, bias, activation, group_size)


def check_fp8_weight(op: str, name: str, b: Tensor, scale_name: str, b_scale: Tensor, activation: str | None,
                     x_name: str, x: Tensor) -> bool:  # fmt: skip
    """b is e4m3 [N, K] for an x [..., K] on its device, and b_scale a scale for it; returns whether that is of blocks."""
    check_8bit(op, name, b, E4M3)
    check_weight(op, name, b, x_name, x)
    if not isinstance(b_scale, Tensor):
        raise TypeError(f"{op}: {scale_name} must be a float32 tensor, not {type(b_scale).__name__}")
    if b_scale.dim() < 2:
        return False
    n, k = b.shape
    gated = is_gated(activation)
    one_matrix = (-(-(n // 2 if gated else n) // BLOCK), -(-k // BLOCK))
    shape = (2, *one_matrix) if gated else one_matrix
    if tuple(b_scale.shape) != shape:
        raise ValueError(f"{op}: {scale_name} of {BLOCK} x {BLOCK} blocks must be {list(shape)} for {name} {(n, k)} with "
                         f"activation {activation}, and has shape {tuple(b_scale.shape)}: a scale per row is [{n}]")  # fmt: skip
    check_elements(op, scale_name, b_scale, b_scale.numel(), torch.float32, x)
    return True


def check_group_scales(op: str, name: str, s: Tensor, x: Tensor) -> None:
    """s is what `quantize` returns beside x for groups of 128."""
    if not isinstance(s, Tensor) or s.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be a float32 tensor, not {getattr(s, 'dtype', type(s).__name__)}")
    shape = (*x.shape[:-1], -(-x.shape[-1] // BLOCK))
    if tuple(s.shape) != shape:
        raise ValueError(
            f"{op}: {name} must be {list(shape)}, as b_scale is of blocks, and has shape {tuple(s.shape)}: "
            f"see fp.ops.quantize(…, group_size={BLOCK})"
        )
    if s.device != x.device:
        raise ValueError(f"{op}: {name} is on {s.device} and the input on {x.device}: move one of them")
    step, rows = 1, max(1, x[..., 0].numel())
    for d in range(s.dim() - 2, -1, -1):
        if s.shape[d] != 1 and s.stride(d) != step and s.numel():
            break
        step *= s.shape[d]
    else:
        if s.shape[-1] == 1 or s.numel() == 0 or (s.stride(-1) % 4 == 0 and s.stride(-1) >= rows):
            return
    raise ValueError(f"{op}: {name} must have its rows contiguous and its groups a multiple of 4 apart, as "
                     f"fp.ops.quantize(…, group_size={BLOCK}) returns it, and its strides are {s.stride()}")  # fmt: skip


def _check(
    op: str,
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
) -> None:
    check_8bit(op, "a", a, E4M3)
    check_rows(op, "a", a)
    blocks = check_fp8_weight(op, "b", b, "b_scale", b_scale, activation, "a", a)
    if blocks:
        check_group_scales(op, "a_scale", a_scale, a)
    elif isinstance(a_scale, Tensor) and a_scale.dim() == a.dim() > 1 and a_scale.shape[-1] != 1:
        raise ValueError(f"{op}: a_scale {tuple(a_scale.shape)} is of groups and b_scale {tuple(b_scale.shape)} is not of blocks: "
                         "pass both of one kind")  # fmt: skip
    unit = a.new_empty(1, dtype=torch.float32)
    scales = (unit, unit) if blocks else (a_scale, b_scale)
    check_epilogue(op, a, tuple(a.shape[:-1]), b.shape[0], *scales, bias, activation, out_dtype, out_scale, None, None,
                   residual=residual, ada_gate=ada_gate)  # fmt: skip


def _check_gemm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype,
    out_scale: Tensor | None, residual: Tensor | None = None, ada_gate: Tensor | None = None,
) -> None:  # fmt: skip
    _check("fp8_gemm", a, b, a_scale, b_scale, bias, activation, out_dtype, out_scale, residual, ada_gate)


def _check_gemm_quantize(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None,
    group_size: int | None,
) -> None:  # fmt: skip
    if group_size not in (BLOCK, None):
        raise ValueError(f"fp8_gemm_quantize: group_size must be {BLOCK}, or None for rows, not {group_size!r}: for another, "
                         "fp8_gemm, then quantize")  # fmt: skip
    _check("fp8_gemm_quantize", a, b, a_scale, b_scale, bias, activation, torch.float32, None)
    if group_size is None:
        check_row_scales("fp8_gemm_quantize", b)


def _fake_gemm_quantize(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    columns = b.shape[0] // 2 if is_gated(activation) else b.shape[0]
    q, scale, _ = fake_quantized(a, (*a.shape[:-1], columns), E4M3, False, group_size, True)
    return q, scale


def why_no_fp8(backend: str, capability: tuple[int, int]) -> Reason | None:
    """None where this backend's kernels multiply e4m3 on tensor cores of such a GPU, else the reason."""
    major, minor = capability
    if capability < CAPABILITY:
        return Reason("no_fp8", f"this GPU is sm_{major}{minor}, and tensor cores multiply FP8 from sm_89 on (L40S, RTX 40, H100)",
                      'use int8: precision="int8", fp.nn.Int8Linear, fp.ops.int8_gemm')  # fmt: skip
    if backend == "cuda" and major in TCGEN05_ONLY:
        return Reason("emulated_fp8", f"this GPU is sm_{major}{minor}, where the FP8 mma.sync of the CUDA kernels is emulated and "
                      "slower than bf16's", "use the Triton backend, which compiles tcgen05")  # fmt: skip
    return None


def _notes(a: Tensor, b: Tensor, *options: object) -> list[str]:
    return copy_notes(a=a, b=b)


FP8_GEMM = Operation(
    fp8_gemm, _check_gemm, reference.fp8_gemm, fake_gemm, ("cuda", "triton"), why_not_arch=why_no_fp8, notes=_notes
)
FP8_GEMM_QUANTIZE = Operation(
    fp8_gemm_quantize, _check_gemm_quantize, reference.fp8_gemm_quantize, _fake_gemm_quantize, ("cuda", "triton"),
    why_not_arch=why_no_fp8, notes=_notes,
)  # fmt: skip
