"""Shapes and options of unpermute, for tests (awkward) and benchmarks (real models), with the bytes a call must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import LAYOUTS, assert_equal, awkward, laid_out, pairwise
from . import reference


@dataclass(frozen=True)
class Case:
    tokens: int
    choices: int
    columns: int
    dtype: torch.dtype = torch.bfloat16
    weights_dtype: torch.dtype = torch.float32
    left_out: float = 0.0  # of choices: those that are no rows
    layout: str = "apart"
    groups: int = 1  # of y's rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.columns

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed + 1)
        rows = self.tokens * self.choices
        lead = (rows,) if self.groups == 1 else (self.groups, -(-rows // self.groups))
        # what rounding does not make equal: sums of another order, products that are not rounded
        y = awkward((*lead, self.columns), self.dtype, seed)
        y = laid_out(y.clone(memory_format=torch.contiguous_format), self.layout, device)
        position = torch.randperm(rows, generator=g).int()
        others = torch.tensor([-1, y.shape[:-1].numel(), -(2**31), 2**31 - 1]).int()
        other = others[torch.randint(len(others), position.shape, generator=g)]
        position = torch.where(torch.rand(rows, generator=g) < self.left_out, other, position)
        weights = torch.randn(self.tokens, self.choices, generator=g).to(self.weights_dtype)
        return y, position.reshape(self.tokens, self.choices).to(device), weights.to(device)

    def bytes(self) -> int:
        """Read once, written once."""
        rows = self.tokens * self.choices
        return (rows + self.tokens) * self.columns * self.dtype.itemsize + rows * (4 + self.weights_dtype.itemsize)


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args: the reference's bits."""
    assert_equal(actual, reference.unpermute(*(a.cpu() for a in args)))


def cases() -> Iterator[Case]:
    """Every pair of options; no tokens, no choices."""
    yield Case(0, 2, 16)
    yield Case(3, 0, 16)
    yield Case(5, 2, 40, left_out=1.0)
    factors = {
        "tokens": (1, 3, 65, 1000),
        "choices": (1, 2, 5, 8),
        "columns": (1, 33, 64, 264),
        "dtypes": tuple(
            (dtype, weights)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
            for weights in dict.fromkeys((torch.float32, dtype))
        ),
        "left_out": (0.0, 0.4),
        "layout": LAYOUTS,
        "groups": (1, 7),
    }
    for row in pairwise(factors):
        dtype, weights = row.pop("dtypes")
        yield Case(**row, dtype=dtype, weights_dtype=weights)


#: as permute_quantize's
BENCHMARK_CASES = tuple(
    Case(tokens, choices, columns, dtype, layout="contiguous")
    for tokens in (1, 16, 1024)
    for choices, columns in ((8, 2048), (2, 4096))
    for dtype in (torch.float32, torch.bfloat16)
)
