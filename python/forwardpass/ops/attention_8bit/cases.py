"""Shapes and options of attention_8bit, those of attention with q, k and v to be quantised, and how close a backend has to come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import cases as attention
from . import reference

#: Of the output's norm, by which a backend may differ from the reference, whose operands in 8 bits are the same: exponentials
#: differ by rounding, and now and then a probability by one of 255 steps. A step of e4m3 is up to a sixteenth of a value.
CLOSE = {"int8": 2e-3, "fp8": 4e-3}


@dataclass(frozen=True)
class Case(attention.Case):
    rotates: bool = True
    products: str = "int8"  #: the call's dtype; `dtype` is that of q, k and v

    @property
    def op(self) -> str:
        return "attention_8bit_with_lse" if self.lse else "attention_8bit"

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        q, k, v, *options = super().arguments(device, seed)
        return q, k, v, self.products, self.rotates, *options


@dataclass(frozen=True)
class GrowingCase(Case):
    """Maxima grow for eight of 32 rows at a time: the scores of each of four blocks of keys are large for these alone. The next
    four blocks have the same keys, for which no maximum grows."""

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        q, k, *rest = super().arguments(device, seed)
        for i in range(4):
            q[..., i] = torch.where(torch.arange(q.shape[1]) // 8 % 4 == i, 40, 0)[:, None]
            k[:, i * reference.BLOCK : (i + 1) * reference.BLOCK, :, i] = 20
        k[:, 4 * reference.BLOCK : 8 * reference.BLOCK] = k[:, : 4 * reference.BLOCK]
        return q, k, *rest


@dataclass(frozen=True)
class RareCase(Case):
    """Operands in 8 bits, with a scale for each key, as of a cache: one is NaN. Of each 32 rows eight have scores of many
    thousands, others in each of four warps."""

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        q, k, v, products, rotates, *options = super().arguments(device, seed)
        row = torch.arange(q.shape[1], device=device)
        q = torch.where((row // 8 % 4 == row // 32 % 4)[:, None, None], q * 4000, q / 100)
        q8, q_scale, q_shift, k8, k_scale, v8, v_scale, of_block = reference.quantize_attention(
            q, k, v, products, rotates, *options[-3:-1]
        )
        k_scale *= torch.linspace(-2, 2, 150, device=device).exp2()[torch.arange(k_scale.shape[1]) * 7 % 150, None]
        k_scale[:, -400] = torch.nan
        scales = q_scale, q_shift, k_scale, v_scale, of_block if products == "int8" else None
        return q8, k8, v8, products, rotates, *options, *scales, q.dtype


@dataclass(frozen=True)
class QuantizeCase(Case):
    """quantize_attention, of a case's q, k and v."""

    @property
    def op(self) -> str:
        return "quantize_attention"

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        q, k, v, products, rotates, *options = super().arguments(device, seed)
        return q, k, v, products, rotates, *options[-3:-1]

    def flops(self) -> int:
        return 0

    def bytes(self) -> int:
        """Each operand read once and written once in 8 bits, with a scale for each row, key and channel."""
        (h, hk), (d, dv) = self.heads, self.dims
        rows, keys = (sum(n) for n in zip(*self.lengths()))
        elements = rows * h * d + keys * hk * (d + dv)
        return elements * (self.dtype.itemsize + 1) + 4 * (2 * rows * h + keys * hk + len(self.lengths()) * hk * dv)


def assert_matches(actual: Tensor | tuple[Tensor, Tensor], args: tuple[Any, ...], close: float | None = None) -> None:
    """actual is what a backend may return for args: o, or o and lse, beside the reference's. close: in place of CLOSE."""
    o, lse = actual if isinstance(actual, tuple) else (actual, None)
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    expected, expected_lse = reference.attention_8bit_with_lse(args[0].float(), *args[1:])
    dtype = args[-1] if isinstance(args[-1], torch.dtype) else args[0].dtype  # of operands that were given
    if (o.shape, o.dtype) != (expected.shape, dtype) or not o.is_contiguous():
        raise AssertionError(f"o: {o.dtype} {o.shape} {o.stride()}, expected {dtype} {expected.shape}, contiguous")
    close = CLOSE[args[3]] if close is None else close
    _assert_near(o, expected, close + 2 * attention.ULP[o.dtype], "o")
    if lse is not None:
        if lse.dtype != torch.float32 or not lse.is_contiguous():
            raise AssertionError(f"lse: {lse.dtype} {lse.stride()}, expected torch.float32, contiguous")
        _assert_near(lse, expected_lse, close + 2e-5, "lse")


def _assert_near(x: Tensor, expected: Tensor, bound: float, name: str) -> None:
    """The same infinities and NaN, the norm of the difference within the bound, and no element far off."""
    x, expected = x.cpu().double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(
        torch.where(finite, 0, x).nan_to_num(7, 8, 9), torch.where(finite, 0, expected).nan_to_num(7, 8, 9)
    ):
        raise AssertionError(f"{name}: infinities and NaN are elsewhere than in the reference")
    difference, size = (x - expected)[finite], expected[finite]
    if not difference.norm() <= bound * size.norm():  # a NaN is not less
        raise AssertionError(
            f"{name}: off by {difference.norm() / size.norm():.2e} of its norm, at most {bound:.1e} is allowed"
        )
    if size.numel() and not (worst := difference.abs().max()) <= 8 * bound * size.abs().max():
        raise AssertionError(f"{name}: an element is off by {worst:.2e}, of values up to {size.abs().max():.2e}")


def of_attention(case: attention.Case, rotates: bool, products: str = "int8") -> Case:
    fields = {name: getattr(case, name) for name in attention.Case.__dataclass_fields__}
    return Case(**fields, rotates=rotates, products=products)


def cases(products: str = "int8") -> Iterator[Case]:
    """Those of attention, every other one rotated."""
    for i, case in enumerate(attention.cases()):
        yield of_attention(case, i % 2 == 0, products)


BENCHMARK_CASES = tuple(
    kind(**vars(of_attention(case, True)))
    for kind, cases in ((Case, attention.BENCHMARK_CASES), (QuantizeCase, attention.BENCHMARK_CASES[1:3]))
    for case in cases
)
