"""Inputs that kernels are wrong on: made from those of the reference file, a family for each kind of mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .specification import Specification, trusted

#: bytes beyond a tensor's elements, in the same storage: NaN in every floating dtype, -1 in integers
POISON = 0xFF


@dataclass
class Trial:
    """A call that is to be made.

    Attributes:
        family: the kind of inputs.
        args: tensors on the CPU, with the strides and offsets that the candidate's will have, and numbers.
        seed: of the schedule.
        reuses: the candidate gets the memory of the call before, with other numbers in it: what it remembers by address is
            wrong then.
        weights: of a Model: what the reference gets beside args.
    """

    family: str
    sizes: Mapping[str, int]
    args: list[Any]
    seed: int
    reuses: bool = False
    weights: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={n}" for name, n in self.sizes.items())
        return f"{self.family} inputs{f', {sizes}' if sizes else ''}, seed {self.seed}"


def trials(spec: Specification) -> Iterator[Trial]:
    """All that a candidate is called with. The first sizes, powers of two, are those that kernels load in vectors; the second
    ones, primes, leave a part of a block masked, where hostile numbers do harm: they get every family."""
    hostile = min(1, len(spec.sizes) - 1)
    for n, sizes in enumerate(spec.sizes):
        weights = spec.models.weights(sizes) if spec.models else []
        more = tuple(HOSTILE) if n == hostile else ("strided", "offset") if n == 0 else ()
        for k, family in enumerate(("random", "again", *more)):
            if family in spec.without:
                continue
            args = _inputs(spec, sizes, 1000 * n + k)
            if family in HOSTILE and not HOSTILE[family](args):
                continue
            yield Trial(family, sizes, args, seed=k % 2, reuses=family == "again", weights=weights)


def _inputs(spec: Specification, sizes: Mapping[str, int], seed: int) -> list[Any]:
    torch.manual_seed(seed)
    args = trusted(spec.path, spec.inputs, **sizes)
    args = [args] if isinstance(args, Tensor) else list(args)
    for a in args:
        if isinstance(a, Tensor) and a.device.type != "cpu":
            raise ValueError(f"{spec.path}: inputs() makes tensors on the CPU, not on {a.device}")
        if not isinstance(a, (Tensor, int, float, bool)):
            raise ValueError(f"{spec.path}: inputs() makes tensors and numbers, not {type(a).__name__}")
    return args


def _floating(args: Sequence[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]


# Each changes the arguments, and says whether there was something to change.


def _zeros(args: list[Any]) -> bool:
    for t in _floating(args):
        t.zero_()
    return bool(_floating(args))


def _negative(args: list[Any]) -> bool:
    """A maximum below zero: masked elements must not count as 0."""
    for t in _floating(args):
        t.abs_().neg_()
    return bool(_floating(args))


def _shifted(args: list[Any]) -> bool:
    """A mean far from zero: sums of squares cancel."""
    for t in _floating(args):
        t.add_(1000.0 if t.dtype.itemsize >= 4 else 16.0)
    return bool(_floating(args))


def _outliers(args: list[Any]) -> bool:
    for t in _floating(args):
        t.mul_(torch.where(torch.rand(t.shape) < 0.02, 300.0, 1.0).to(t.dtype))
    return bool(_floating(args))


def _denormals(args: list[Any]) -> bool:
    for t in _floating(args):
        t.mul_(torch.finfo(t.dtype).tiny / 4)
    return bool(_floating(args))


def _plant(t: Tensor, values: Sequence[float]) -> None:
    """Each at a place of its own, the last element among them: it lies in the part of a block that is masked."""
    places = torch.randperm(t.numel())[: len(values)]
    places[0] = t.numel() - 1
    for place, value in zip(places.tolist(), values):
        index = torch.unravel_index(torch.tensor(place), t.shape)
        t[index] = value


def _nan(args: list[Any]) -> bool:
    for t in _floating(args)[:1]:
        _plant(t, [float("nan")])
    return bool(_floating(args))


def _infinity(args: list[Any]) -> bool:
    for t in _floating(args)[:1]:
        _plant(t, [float("inf"), -float("inf")] if t.numel() > 64 else [-float("inf")])
    return bool(_floating(args))


def _strided(args: list[Any]) -> bool:
    """Rows with poison between them; a row with poison between its elements."""
    changed = False
    for k, a in enumerate(args):
        if not isinstance(a, Tensor) or not a.numel():
            continue
        gap = 3 if a.dim() > 1 else 2
        shape = (
            [*a.shape[:-1], a.shape[-1] + gap]
            if a.dim() > 1
            else [*a.shape[:-1], a.shape[-1] * gap]
            if a.dim()
            else [1]
        )
        base = poisoned(shape, a.dtype)
        view = base[..., : a.shape[-1]] if a.dim() > 1 else base[::gap] if a.dim() else base[0]
        args[k] = view.copy_(a)
        changed = changed or a.dim() > 0
    return changed


def _offset(args: list[Any]) -> bool:
    """Contiguous, and behind one element of the same storage: no more aligned than an element is."""
    changed = False
    for k, a in enumerate(args):
        if isinstance(a, Tensor) and a.numel() and a.dim():
            args[k] = poisoned([a.numel() + 1], a.dtype)[1:].view(a.shape).copy_(a)
            changed = True
    return changed


def _overlap(args: list[Any]) -> bool:
    """Two arguments are one tensor, where two are alike; else every row is the same memory."""
    tensors = [(k, a) for k, a in enumerate(args) if isinstance(a, Tensor) and a.numel()]
    for i, (_, a) in enumerate(tensors):
        for k, b in tensors[i + 1 :]:
            if a.shape == b.shape and a.dtype == b.dtype:
                args[k] = a
                return True
    for k, a in tensors:
        if a.dim() > 1 and a.shape[0] > 1:
            args[k] = a[:1].clone().expand(a.shape)
            return True
    return False


HOSTILE = {
    "zeros": _zeros, "negative": _negative, "shifted": _shifted, "outliers": _outliers, "denormals": _denormals, "nan": _nan,
    "infinity": _infinity, "strided": _strided, "offset": _offset, "overlap": _overlap,
}  # fmt: skip


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = dtype.itemsize
    for n in shape:
        size *= n
    row = torch.full((size,), POISON, dtype=torch.uint8)
    return row.view(dtype).view(*shape)
