"""Shapes and options of w8a16_gemm, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..activations import GATED, PLAIN, is_gated
from ..int8_gemm.cases import BENCHMARK_SHAPES
from ..quantized_rows import E4M3, FLOATS
from ..testing import apart, awkward, pairwise


@dataclass(frozen=True)
class Case:
    lead: tuple[int, ...]
    n: int
    k: int
    x_dtype: torch.dtype = torch.bfloat16
    w_dtype: torch.dtype = torch.int8
    scales: str = "column"  # or "tensor", "block"
    bias: bool = True
    activation: str | None = None

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        w = torch.randint(-127, 128, (self.n, self.k), generator=g, dtype=torch.int8)
        if self.w_dtype == E4M3:
            w = (w.float() * 3).to(E4M3)
        shape = {"tensor": (1,), "column": (self.n,), "block": (self.n, -(-self.k // 128))}[self.scales]
        w_scale = ((torch.rand(shape, generator=g) + 0.5) / 2000).to(device)
        bias = torch.randn(self.n, generator=g).to(device) if self.bias else None
        return (
            awkward((*self.lead, self.k), self.x_dtype, seed, device),
            apart(w, device),
            w_scale,
            bias,
            self.activation,
        )

    def bytes(self) -> int:
        m = 1
        for d in self.lead:
            m *= d
        outputs = m * self.n // (2 if is_gated(self.activation) else 1)
        return (m * self.k + outputs) * self.x_dtype.itemsize + self.n * self.k

    def flops(self) -> int:
        m = 1
        for d in self.lead:
            m *= d
        return 2 * m * self.n * self.k


def cases() -> Iterator[Case]:
    """Every pair of options; 300 rows of weight are more than the CPU widens at a time."""
    factors = {
        "lead": ((), (1,), (3,), (2, 9), (0,)),
        "n": (1, 16, 33, 304),
        "k": (1, 7, 128, 515),
        "x_dtype": FLOATS,
        "w_dtype": (torch.int8, E4M3),
        "scales": ("column", "tensor", "block"),
        "bias": (True, False),
        "activation": (None, *PLAIN, *GATED),
    }
    for row in pairwise(factors):
        if is_gated(row["activation"]):
            row["n"] = -(-row["n"] // 16) * 16
        yield Case(**row)


BENCHMARK_CASES = tuple(Case((m,), n, k, x_dtype=torch.float32) for m, n, k in BENCHMARK_SHAPES)
