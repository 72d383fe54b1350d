"""What the ops that end in a quantisation share: the rule itself in plain torch, their argument checks, their layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotation import check_rotate
from .rotation import rotate as rotated

#: A row whose range is below this is treated as if it had this range: its reciprocal stays finite, its values become 0.
LEAST_RANGE = 2.0**-100
E4M3 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize_values(
    v: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    channel_scale: Tensor | None = None,
    rotate: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises fp32 values [..., K]: the formula that every backend follows operation by operation, so that bits are equal.

    Per segment (a row, or `group_size` columns of it), v times channel_scale first, then rotated (tensor cores round sums to tf32
    within it: with rotate the bits of kernels on GPUs differ)::

        symmetric   range = max|v|                          scale = range / steps    steps = 127 (int8), 448 (e4m3)
        asymmetric  range = max(v, 0) + max(-v, 0)          scale = range / 255
                    zero_point = -128 + rne(max(-v, 0) * (255 / range))
        q = sat(rne(v * (steps / range)) + zero_point)      static: v * (1 / scale)

    with range at least 2^-100, every operation rounded to fp32, ties to even. A NaN or infinity in a segment makes its scale
    NaN or infinite, and so everything computed from it; the q of such a segment is unspecified.
    """
    k, e4m3 = v.shape[-1], dtype is E4M3
    if channel_scale is not None:
        v = v * channel_scale
    if rotate is not None:
        v = rotated(v, rotate)
    group = group_size or k
    groups = -(-k // group)
    g = F.pad(v, (0, groups * group - k)).unflatten(-1, (groups, group))
    if scale is not None:
        inverse = (1.0 / scale).reshape(())
        shift = (
            zero_point.reshape(()) if zero_point is not None else torch.zeros((), dtype=torch.int32, device=v.device)
        )
        s, z = v.new_empty(0), v.new_empty(0, dtype=torch.int32)
    else:
        high, low = g.clamp(min=0).amax(-1), (-g).clamp(min=0).amax(-1)
        span = torch.maximum(high, low) if symmetric else high + low
        span = torch.where(span < LEAST_RANGE, LEAST_RANGE, span)
        # a tensor, as torch computes number / tensor as number * reciprocal, which rounds twice
        steps = torch.full_like(span, 448.0 if e4m3 else 127.0 if symmetric else 255.0)
        inverse, s = steps / span, span / steps
        z = (low * inverse).round().nan_to_num(0).to(torch.int32) - 128
        shift = torch.zeros_like(z).unsqueeze(-1) if symmetric else z.unsqueeze(-1)
        inverse = inverse.unsqueeze(-1)
        s, z = scales_layout(s, group_size), scales_layout(z, group_size) if not symmetric else z.new_empty(0)
    scaled = (g * inverse).flatten(-2)[..., :k]
    if e4m3:
        q = scaled.clamp(-448, 448).to(E4M3)
    else:
        shift = shift.expand(g.shape).flatten(-2)[..., :k]
        low_q = -127 if symmetric else -128
        q = (scaled.nan_to_num(0).clamp(-1e6, 1e6).round().to(torch.int32) + shift).clamp(low_q, 127).to(torch.int8)
    return pad_rows(q), s, z


def row_strides(shape: tuple[int, ...], padded: int) -> list[int]:
    """Strides of a tensor whose rows are `padded` elements apart and whose leading dimensions collapse."""
    strides = [1] * len(shape)
    step = padded
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = step
        step = step * max(shape[d], 1)
    return strides


def empty_q(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[..., K] of 1-byte elements, rows padded to 16 bytes: what the main loops of the GEMMs need."""
    return torch.empty_strided(shape, row_strides(shape, -(-shape[-1] // 16) * 16), dtype=dtype, device=x.device)


def pad_rows(q: Tensor) -> Tensor:
    """q in the layout of `empty_q`."""
    out = empty_q(q, tuple(q.shape), q.dtype)
    out.view(torch.uint8).copy_(q.view(torch.uint8))
    return out


def empty_scales(x: Tensor, lead: tuple[int, ...], groups: int | None, dtype: torch.dtype) -> Tensor:
    """[...] one a row, or [..., groups] with rows contiguous and groups a multiple of 4 elements apart."""
    strides = row_strides((*lead, 1), 1)[:-1]
    rows = 1
    for n in lead:
        rows = rows * max(n, 1)
    if groups is None:
        return torch.empty_strided(lead, strides, dtype=dtype, device=x.device)
    return torch.empty_strided((*lead, groups), [*strides, -(-rows // 4) * 4], dtype=dtype, device=x.device)


def scales_layout(s: Tensor, group_size: int | None) -> Tensor:
    """s [..., groups] in the layout of `empty_scales`; [...] where there is one segment a row."""
    lead, groups = tuple(s.shape[:-1]), s.shape[-1]
    if group_size is None:
        return empty_scales(s, lead, None, s.dtype).copy_(s.squeeze(-1))
    return empty_scales(s, lead, groups, s.dtype).copy_(s)


def fake_quantized(
    x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, static: bool, group_size: int | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of (q, scale, zero_point); the last two are empty where the caller gave them."""
    lead = tuple(shape[:-1])
    groups = None if group_size is None else -(-shape[-1] // group_size)
    none = x.new_empty(0, dtype=torch.float32)
    scale = none if static else empty_scales(x, lead, groups, torch.float32)
    shifted = not static and not symmetric
    zero_point = empty_scales(x, lead, groups, torch.int32) if shifted else none.to(torch.int32)
    return empty_q(x, shape, dtype), scale, zero_point


def check_float_rows(op: str, name: str, x: Tensor) -> None:
    """x is a float tensor [..., K] whose last stride is 1 and whose leading dimensions collapse into one row stride."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, float16 or bfloat16, not {x.dtype}: convert it with .to(torch.float16)"
        )
    check_rows(op, name, x)


def check_rows(op: str, name: str, x: Tensor) -> None:
    """The layout that all kernels take; the fix is always .contiguous()."""
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} must have at least one dimension, and is a scalar: use {name}.reshape(1)")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: the last dimension of {name} must not be empty, and {name} has shape {tuple(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dimension of {name} must have stride 1, not {x.stride(-1)}: pass {name}.contiguous()"
        )
    expected = None
    for d in range(x.dim() - 2, -1, -1):
        if x.shape[d] == 1:
            continue
        if expected is not None and x.stride(d) != expected and x.numel():
            raise ValueError(f"{op}: the leading dimensions of {name}, shape {tuple(x.shape)} and strides {x.stride()}, must "
                             f"collapse into rows of one stride: pass {name}.contiguous()")  # fmt: skip
        expected = x.stride(d) * x.shape[d]


def matrix_shape(x: Tensor) -> tuple[int, int, int]:
    """(rows, columns, row stride) of a tensor that `check_rows` accepts."""
    columns = x.shape[-1]
    strides = [x.stride(d) for d in range(x.dim() - 1) if x.shape[d] != 1]
    return x.numel() // columns, columns, (strides[-1] if strides else columns)


def check_8bit(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    """t is a tensor of dtype, int8 or float8_e4m3fn."""
    if not isinstance(t, Tensor) or t.dtype != dtype:
        dtype_text = "an int8" if dtype == torch.int8 else "a float8_e4m3fn"
        raise TypeError(
            f"{op}: {name} must be {dtype_text} tensor, not {getattr(t, 'dtype', type(t).__name__)}: see fp.ops.quantize"
        )


def check_weight(op: str, name: str, w: Tensor, x_name: str, x: Tensor) -> None:
    """w is [N, K] for an x [..., K], on its device."""
    check_rows(op, name, w)
    if w.dim() != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {name} must be [N, {x.shape[-1]}] for {x_name} {tuple(x.shape)}, and has shape {tuple(w.shape)}"
        )
    if w.device != x.device:
        raise ValueError(f"{op}: {name} is on {w.device} and {x_name} on {x.device}: move one of them")


def copy_notes(**operands: Tensor) -> list[str]:
    """What it costs that a GEMM's operands are not aligned, for `explain` and the log."""
    notes = []
    for name, x in operands.items():
        rows, columns, stride = matrix_shape(x)
        size = x.element_size()
        if rows and (stride * size % 16 or x.storage_offset() * size % 16):
            place = f"rows of {name} {stride * size} bytes apart" if stride * size % 16 else f"the first byte of {name}"
            copied = rows * -(-columns * size // 16) * 16
            notes.append(f"{place}, not at a multiple of 16: CUDA and Triton kernels first copy it, {copied} bytes")
    return notes


def check_vector(
    op: str, name: str, v: Tensor | None, size: int, dtype: torch.dtype | tuple[torch.dtype, ...], x: Tensor
) -> None:
    """An optional contiguous vector of `size` elements on x's device, of one of the dtypes. Of one dimension, or of one element:
    torch would broadcast [N, 1] otherwise than a kernel reads it."""
    check_elements(op, name, v, size, dtype, x)
    if v is not None and v.dim() > 1 and size != 1:
        raise ValueError(f"{op}: {name} must have one dimension, [{size}], and has shape {tuple(v.shape)}: flatten it")


def check_elements(
    op: str, name: str, v: Tensor | None, size: int, dtype: torch.dtype | tuple[torch.dtype, ...], x: Tensor
) -> None:
    """The same in whatever shape."""
    if v is None:
        return
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if not isinstance(v, Tensor) or v.dtype not in dtypes:
        dtype_names = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise TypeError(f"{op}: {name} must be a tensor of {dtype_names}, not {getattr(v, 'dtype', type(v).__name__)}")
    if v.numel() != size or not v.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous with {size} elements, and has shape {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{op}: {name} is on {v.device} and the input on {x.device}: move one of them")


def check_quantized(
    op: str,
    x: Tensor,
    columns: int,
    dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int | None,
    symmetric: bool,
    channel_scale: Tensor | None,
    rotate: int | None = None,
) -> None:
    """The quantisation options that every such op takes."""
    if dtype not in (torch.int8, E4M3):
        raise TypeError(f"{op}: dtype must be torch.int8 or torch.float8_e4m3fn, not {dtype}")
    if not isinstance(symmetric, bool):
        raise TypeError(f"{op}: symmetric must be True or False, not {symmetric!r}")
    if dtype is E4M3 and not symmetric:
        raise ValueError(f"{op}: float8_e4m3fn is symmetric: pass symmetric=True, or dtype=torch.int8")
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"{op}: group_size must be a positive integer or None, not {group_size!r}")
    if scale is not None and group_size is not None:
        raise ValueError(f"{op}: a static scale is one for the whole tensor: drop group_size or scale")
    if (zero_point is not None) != (scale is not None and not symmetric):
        raise ValueError(f"{op}: zero_point goes with a static scale and symmetric=False, and only with them")
    check_vector(op, "scale", scale, 1, torch.float32, x)
    check_vector(op, "zero_point", zero_point, 1, torch.int32, x)
    check_vector(op, "channel_scale", channel_scale, columns, torch.float32, x)
    check_rotate(op, rotate, columns, group_size)
