"""What cases of the ops that quantise rows share: shapes that can be rotated, and what a backend may return of rotated values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...testing import assert_close, assert_quantized_close
from .quantized_rows import E4M3
from .rotation import SIZES, rotate

#: of cases
ROTATIONS = (None, None, *SIZES)


def whole_blocks(shape: tuple[int, ...], size: int | None) -> tuple[int, ...]:
    """shape, its last dimension made a multiple of what is rotated together."""
    return shape if size is None else (*shape[:-1], -(-shape[-1] // size) * size)


def group_of_blocks(group_size: int | None, size: int | None) -> int | None:
    """group_size, or a multiple of what is rotated together that is at least as large."""
    return group_size if size is None or group_size is None else -(-group_size // size) * size


def rotated_within(values: Tensor, bound: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """values [..., K] in float64, each known to `bound`, rotated, and how far a backend may be from them. Tensor cores round what
    they multiply and the sums of the first of two products to 11 bits, each an error of at most 2^-11 of the sum of magnitudes."""
    if size is None:
        return values, bound
    sums = (values.abs() * 2.0**-10 * 1.01 + bound).unflatten(-1, (-1, size)).sum(-1, keepdim=True) / math.sqrt(size)
    return rotate(values, size), sums.expand(*sums.shape[:-1], size).flatten(-2)


def assert_quantizes(
    actual: tuple[Tensor, Tensor, Tensor],
    expected: tuple[Tensor, Tensor, Tensor],
    values: Tensor,
    bound: Tensor,
    group_size: int | None,
    rotate: int | None,
    static_scale: Tensor | None = None,
    static_zero_point: Tensor | None = None,
) -> None:
    """actual (q, scale, zero_point) quantises `values` (fp64, not yet rotated), each known to `bound`: the scale and the zero point
    are within their bound of what they should be, and by them each q is the step of a value within it. Shapes, dtypes and strides
    are those of `expected`, the reference's."""
    q, scale, zero_point = (t.cpu() for t in actual)
    symmetric = zero_point.numel() == 0 and static_zero_point is None
    values, bound = rotated_within(values, bound, rotate)
    bound = bound + 2.0**-22 * values.abs()  # the rule's own roundings: two products, the scale and its reciprocal
    n = values.shape[-1]
    group = group_size or n
    groups, index = -(-n // group), torch.arange(n) // group

    def largest_of(t: Tensor) -> Tensor:
        return F.pad(t, (0, groups * group - n)).unflatten(-1, (groups, group)).amax(-1)

    s, z = static_scale, static_zero_point
    if s is None:
        largest = largest_of(bound)
        steps = 448 if q.dtype is E4M3 else 127 if symmetric else 255
        got_scale, expected_scale = (t if group_size else t.unsqueeze(-1) for t in (scale, expected[1]))
        assert_close(got_scale, expected_scale, largest * (1 if symmetric else 2) / steps, "scale")
        s = got_scale.double()
        if not symmetric:
            z = zero_point if group_size else zero_point.unsqueeze(-1)
            unrounded = largest_of((-values).clamp(min=0)) / s - 128  # before it was rounded
            assert_close(z.double(), unrounded, 0.5 + largest / s * 1.001, "zero_point")
            z = z[..., index]
        s = s[..., index]
    assert_quantized_close(q, values, bound, s, zero_point=z)
    for name, g, e in zip(("q", "scale", "zero_point"), actual, expected):
        is_, should_be = ((t.dtype, tuple(t.shape), t.stride()) for t in (g, e))
        if is_ != should_be:
            raise AssertionError(f"{name}: {is_}, expected {should_be}")
