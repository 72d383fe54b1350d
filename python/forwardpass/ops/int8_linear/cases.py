"""Shapes and options of int8_linear, for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import (
    GEMM_FACTORS,
    GEMM_KERNEL,
    LAYOUTS,
    QUANTIZE_KERNEL,
    awkward,
    compiled_for,
    few_macs,
    laid_out,
    leads,
    pairwise,
)
from ..common.activations import GATED, PLAIN, is_gated
from ..common.quantized_rows import FLOATS
from ..dequant_activation.cases import RESIDUAL_KERNEL, RESIDUALS, assert_epilogue_matches, residual
from ..int8_gemm.cases import BENCHMARK_SHAPES
from . import pack_int8_weight, reference


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
    layout: str = "aligned"  # of the weight
    packed: bool = False
    residual: str | None = None  # or a layout of `laid_out`

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, (self.n, self.k), generator=g, dtype=torch.int8)
        weight_scale = (torch.rand(self.n, generator=g) + 0.5) / 2000
        bias = torch.randn(self.n, generator=g).to(device) if self.bias else None
        scale = torch.full((1,), 0.04, device=device) if self.static else None
        zero_point = (
            torch.full((1,), -11, dtype=torch.int32, device=device) if self.static and not self.symmetric else None
        )
        channel = (torch.rand(self.k, generator=g) + 0.25).to(device) if self.channel_scale else None
        weight_sum = None if self.symmetric else weight.sum(1, dtype=torch.int32).to(device)
        x = awkward((*self.lead, self.k), self.x_dtype, seed, device)
        weight = laid_out(weight, self.layout, device)
        packed = pack_int8_weight(weight) if self.packed and device == "cpu" else None
        outputs = self.n // 2 if is_gated(self.activation) else self.n
        added = residual((*self.lead, outputs), self.out_dtype, self.residual, device, seed)
        return (x, weight, weight_scale.to(device), bias, self.activation, self.out_dtype, scale, zero_point, self.symmetric,
                channel, weight_sum, packed, added)  # fmt: skip

    def bytes(self) -> int:
        m = math.prod(self.lead)
        outputs = m * self.n // (2 if is_gated(self.activation) else 1)
        return m * self.k * self.x_dtype.itemsize + self.n * self.k + outputs * self.out_dtype.itemsize

    def flops(self) -> int:
        return 2 * math.prod(self.lead) * self.n * self.k


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args."""
    assert_epilogue_matches(actual, reference.int8_linear, args)


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options; 600 rows are more than one thread's on the CPU. few_kernels: in few of Triton's kernels."""
    factors = {
        **GEMM_FACTORS,
        "m": (*GEMM_FACTORS["m"], 600),
        "x_dtype": FLOATS,
        "bias": (True, False),
        "activation": (None, *PLAIN, *GATED),
        "out_dtype": FLOATS,
        "static": (False, True),
        "symmetric": (False, True),
        "channel_scale": (False, True),
        "layout": LAYOUTS,
        "packed": (False, True),
        "residual": RESIDUALS,
    }
    kernels = compiled_for(GEMM_KERNEL | RESIDUAL_KERNEL, QUANTIZE_KERNEL) if few_kernels else []
    for row in leads(pairwise(factors, few_macs, kernels)):
        if is_gated(row["activation"]):
            row["n"] = -(-row["n"] // 16) * 16
        yield Case(**row)


BENCHMARK_CASES = tuple(Case((m,), n, k) for m, n, k in BENCHMARK_SHAPES)
