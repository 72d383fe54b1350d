"""What a candidate's output is held to: the reference in float64, and for each element a bound.

    bound = S * (16 * 2^-24 + 3 * u) + |reference| * (4 * u_out + 2 * sqrt(K) * 2^-24) + 4 * N + K * 2^-126 + tiny

S is how far the element moves when each input changes by its own size, at random signs: the conditioning of the element,
measured by calling the reference on inputs that are off by 2^-20. u is the unit roundoff of 16-bit inputs, or that of
PRECISION, and 0 for float32 and float64. u_out is the output's. K is the longest dimension of an input: sums of K terms in
float32. 2^-126 is the smallest normal number of float32: atom.add.f32 takes a term that is smaller for 0, as GPUs do. tiny is
the smallest number of the output.

N is what the reference itself is off in the inputs' own dtype: the largest of the element's errors at the inputs and at those
that are off by 2^-20. One error alone may be zero by chance. In a batch normalisation of equal rows, nothing but the rounding
of a mean is left, times 1 / sqrt(eps), and S is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .specification import Specification, trusted

STEP = 2.0**-20
PERTURBATIONS = 4


@dataclass
class Expected:
    """One output: its value in float64 (or as it is, where it is no floating number), its dtype, and the bound."""

    value: Tensor
    dtype: torch.dtype
    bound: Tensor
    unchecked: Tensor  # elements that the reference's own dtype cannot hold


def _outputs(result: Any, spec: Specification) -> list[Tensor]:
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not outputs or not all(isinstance(o, Tensor) for o in outputs):
        raise ValueError(f"{spec.path}: reference() returns a tensor, or several")
    return outputs


def _call(spec: Specification, args: Sequence[Any]) -> list[Tensor]:
    with torch.no_grad():
        return _outputs(trusted(spec.path, spec.reference, *args), spec)


def _double(args: Sequence[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def expected(spec: Specification, args: Sequence[Any]) -> list[Expected]:
    args = [a.clone() if isinstance(a, Tensor) else a for a in args]  # a reference may write its inputs
    exact = _call(spec, _double(args))
    native = _call(spec, _native(args, args))
    off = [_off(n, e) for n, e in zip(native, exact)]
    floating = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    condition = _condition(spec, args, exact, off) if floating else [torch.zeros(()) for _ in exact]
    coarse = max((_roundoff(a.dtype) for a in floating if a.dtype.itemsize < 4), default=0.0)
    unit = max(coarse, spec.precision or 0.0)
    longest = max((n for a in args if isinstance(a, Tensor) for n in a.shape), default=1)
    return [_expected(e, n, c, o, unit, longest)
            for e, n, c, o in zip(exact, native, condition, off)]  # fmt: skip


def _native(args: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Copies in the inputs' own dtypes: a reference may write its inputs."""
    return [a.to(b.dtype, copy=True) if isinstance(a, Tensor) else a for a, b in zip(args, like)]


def _off(native: Tensor, exact: Tensor) -> Tensor:
    return (native.double() - exact.double()).abs().nan_to_num(0, 0, 0)


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _condition(spec: Specification, args: Sequence[Any], exact: list[Tensor], off: list[Tensor]) -> list[Tensor]:
    """S of each output: the root mean square of some perturbations, and at least a quarter of its row's. What the
    reference is off there in the inputs' own dtype enlarges `off`."""
    squares = [torch.zeros(e.shape, dtype=torch.float64) for e in exact]
    generator = torch.Generator().manual_seed(0)
    for _ in range(PERTURBATIONS):
        moved = []
        for a, double in zip(args, _double(args)):
            if isinstance(a, Tensor) and a.is_floating_point():
                signs = torch.randint(0, 2, a.shape, generator=generator, dtype=torch.float64) * 2 - 1
                double = double * (1 + STEP * signs)
                if a.dtype.itemsize >= 4:  # a number of 16 bits would not move
                    double = double.to(a.dtype).double()
            moved.append(double)
        natives = _call(spec, _native(moved, args))
        for k, (e, n, m) in enumerate(zip(exact, natives, _call(spec, moved))):
            if e.is_floating_point():
                squares[k] += ((m.double() - e.double()) / STEP).nan_to_num(0, 0, 0).square() / PERTURBATIONS
                off[k] = torch.maximum(off[k], _off(n, m))
    roots = [total.sqrt() for total in squares]
    return [torch.maximum(r, 0.25 * r.square().mean(-1, keepdim=True).sqrt()) if r.dim() else r for r in roots]


def _expected(exact: Tensor, native: Tensor, condition: Tensor, off: Tensor, unit: float, longest: int) -> Expected:
    if not native.is_floating_point():
        nothing = torch.zeros(native.shape, dtype=torch.bool)
        return Expected(native, native.dtype, torch.zeros(native.shape, dtype=torch.float64), nothing)
    exact = exact.double()
    unchecked = exact.isfinite() & ~native.isfinite()
    share = 4 * _roundoff(native.dtype) + 2 * math.sqrt(longest) * 2.0**-24
    bound = condition * (16 * 2.0**-24 + 3 * unit) + exact.abs().nan_to_num(0, 0, 0) * share + 4 * off
    bound += longest * 2.0**-126 + torch.finfo(native.dtype).tiny * torch.finfo(native.dtype).eps
    return Expected(exact, native.dtype, bound, unchecked)


def is_trivial(outputs: Sequence[Expected]) -> bool:
    """Whether zeros would pass, so that nothing is checked."""
    return all(bool((e.value.abs() <= e.bound).all()) if e.value.dtype != torch.bool else not e.value.any()
               for e in outputs)  # fmt: skip


@dataclass
class Comparison:
    """share: the largest error, as a share of its bound. problem: "" where it is at most 1."""

    share: float
    bound: float
    problem: str = ""


def compare(index: str, output: Tensor, e: Expected) -> Comparison:
    """One output, on the CPU, of the right shape and dtype."""
    if not output.is_floating_point():
        wrong = output != e.value
        share = torch.where(wrong, math.inf, 0.0)
    else:
        value = output.double()
        both = value.isfinite() & e.value.isfinite()
        same = (value == e.value) | (value.isnan() & e.value.isnan())
        error = torch.where(same, 0.0, torch.where(both, (value - e.value).abs() / e.bound, math.inf))
        # The largest number and infinity are neighbours: a value that rounds to either is right.
        share = torch.where(e.unchecked, 0.0, error)
        wrong = share > 1
    if not wrong.any():
        return Comparison(float(share.max()) if share.numel() else 0.0, float(e.bound.max()) if share.numel() else 0.0)
    place = int(share.flatten().argmax())
    at_place = [int(n) for n in torch.unravel_index(torch.tensor(place), share.shape)] if share.dim() else []
    got, want, bound = (t.flatten()[place].item() for t in (output, e.value, e.bound))
    count = int(wrong.sum())
    text = f"{index}{at_place} is {got:.7g} instead of {want:.7g} (allowed: {bound:.2g} off); {count} of {wrong.numel()} are wrong"
    if output.is_floating_point() and (missing := int((output.isnan() & ~e.value.isnan()).sum())):
        text += f", {missing} of them NaN where the reference has none, as what nobody has written is"
    return Comparison(float(share.max()), bound, text)
