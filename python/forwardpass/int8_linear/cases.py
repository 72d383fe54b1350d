"""Shapes and options of int8_linear, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..activations import GATED, PLAIN, is_gated
from ..int8_gemm.cases import BENCHMARK_SHAPES
from ..quantized_rows import FLOATS
from ..testing import apart, awkward, pairwise


@dataclass(frozen=True)
class Case:
    lead: tuple[int, ...]
    n: int
    k: int
    x_dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str | None = None
    out_dtype: torch.dtype = torch.float32
    static: bool = False
    symmetric: bool = False
    channel_scale: bool = False

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, (self.n, self.k), generator=g, dtype=torch.int8)
        w_scale = (torch.rand(self.n, generator=g) + 0.5) / 2000
        bias = torch.randn(self.n, generator=g).to(device) if self.bias else None
        scale = torch.full((1,), 0.04, device=device) if self.static else None
        zero_point = (
            torch.full((1,), -11, dtype=torch.int32, device=device) if self.static and not self.symmetric else None
        )
        channel = (torch.rand(self.k, generator=g) + 0.25).to(device) if self.channel_scale else None
        w_sum = None if self.symmetric else weight.sum(1, dtype=torch.int32).to(device)
        x = awkward((*self.lead, self.k), self.x_dtype, seed, device)
        return (x, apart(weight, device), w_scale.to(device), bias, self.activation, self.out_dtype, scale, zero_point,
                self.symmetric, channel, w_sum)  # fmt: skip

    def bytes(self) -> int:
        m = 1
        for d in self.lead:
            m *= d
        outputs = m * self.n // (2 if is_gated(self.activation) else 1)
        return m * self.k * self.x_dtype.itemsize + self.n * self.k + outputs * self.out_dtype.itemsize

    def flops(self) -> int:
        m = 1
        for d in self.lead:
            m *= d
        return 2 * m * self.n * self.k


def cases() -> Iterator[Case]:
    """Every pair of options."""
    factors = {
        "lead": ((), (1,), (3,), (2, 9), (600,), (0,), (2, 0)),
        "n": (1, 16, 33, 208),
        "k": (1, 7, 64, 515),
        "x_dtype": FLOATS,
        "bias": (True, False),
        "activation": (None, *PLAIN, *GATED),
        "out_dtype": FLOATS,
        "static": (False, True),
        "symmetric": (False, True),
        "channel_scale": (False, True),
    }
    for row in pairwise(factors):
        if is_gated(row["activation"]):
            row["n"] = -(-row["n"] // 16) * 16
        yield Case(**row)


BENCHMARK_CASES = tuple(Case((m,), n, k) for m, n, k in BENCHMARK_SHAPES)
