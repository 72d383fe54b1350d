"""Shapes and options of fp8_linear, for tests and benchmarks."""

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
from ..common.quantized_rows import E4M3, FLOATS
from ..dequant_activation.cases import RESIDUAL_KERNEL, RESIDUALS, residual
from ..fp8_gemm import cases as gemm
from ..fp8_gemm.reference import BLOCK
from ..int8_gemm.cases import BENCHMARK_SHAPES
from . import reference


@dataclass(frozen=True)
class Case:
    lead: tuple[int, ...]
    n: int
    k: int
    x_dtype: torch.dtype = torch.bfloat16
    scales: str = "row"  # of the weight; or "tensor", "block"
    bias: bool = True
    activation: str | None = None
    out_dtype: torch.dtype = torch.bfloat16
    static: bool = False
    channel_scale: bool = False
    layout: str = "aligned"  # of the weight
    residual: str | None = None  # or a layout of `laid_out`

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed + 1)  # another than of x, or their rows are parallel
        weight = (torch.randn(self.n, self.k, generator=g) * 100).clamp(-448, 448).to(E4M3)
        gated, groups = is_gated(self.activation), -(-self.k // BLOCK)
        matrix = (-(-(self.n // 2 if gated else self.n) // BLOCK), groups)
        shape = {"tensor": (1,), "row": (self.n,), "block": (2, *matrix) if gated else matrix}[self.scales]
        weight_scale = ((torch.rand(shape, generator=g) + 0.5) / 3000).to(device)
        bias = torch.randn(self.n, generator=g).to(device) if self.bias else None
        outputs = self.n // 2 if gated else self.n
        scale = torch.full((1,), 0.04, device=device) if self.static else None
        channel = (torch.rand(self.k, generator=g) + 0.25).to(device) if self.channel_scale else None
        x = awkward((*self.lead, self.k), self.x_dtype, seed, device)
        return (
            x,
            laid_out(weight, self.layout, device),
            weight_scale,
            bias,
            self.activation,
            self.out_dtype,
            scale,
            channel,
            residual((*self.lead, outputs), self.out_dtype, self.residual, device, seed),
        )

    def bytes(self) -> int:
        m, outputs = math.prod(self.lead), self.n // (2 if is_gated(self.activation) else 1)
        return m * self.k * self.x_dtype.itemsize + self.n * self.k + m * outputs * self.out_dtype.itemsize

    def flops(self) -> int:
        return 2 * math.prod(self.lead) * self.n * self.k


def assert_matches(actual: Tensor, args: tuple[Any, ...], truncating: bool = False) -> None:
    """actual is what a backend may return for args: that of fp8_gemm for the very x that the reference quantises to."""
    x, weight, weight_scale, bias, activation, out_dtype, scale, channel_scale, *added = (
        a.cpu() if isinstance(a, Tensor) else a for a in args
    )
    a, a_scale = reference.quantized_input(x, weight_scale, scale, channel_scale)
    gemm.assert_matches(
        actual, (a, weight, a_scale, weight_scale, bias, activation, out_dtype, None, *added), truncating
    )


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options; a static scale and one of blocks exclude each other. few_kernels: in few of Triton's
    kernels."""
    factors = {
        **GEMM_FACTORS,
        "x_dtype": FLOATS,
        "scales": (("row", False), ("tensor", False), ("row", True), ("tensor", True), ("block", False)),
        "bias": (True, False),
        "activation": (None, *PLAIN, *GATED),
        "out_dtype": FLOATS,
        "channel_scale": (False, True),
        "layout": LAYOUTS,
        "residual": RESIDUALS,
    }
    kernels = (
        compiled_for(
            GEMM_KERNEL | RESIDUAL_KERNEL | {"scales": lambda scales: scales[0] == "block"},
            QUANTIZE_KERNEL | {"scales": lambda scales: (scales[0] == "block", scales[1])},
        )
        if few_kernels
        else []
    )
    for row in leads(pairwise(factors, few_macs, kernels)):
        if is_gated(row["activation"]):
            row["n"] = -(-row["n"] // 16) * 16
        row["scales"], row["static"] = row["scales"]
        yield Case(**row)


BENCHMARK_CASES = tuple(Case((m,), n, k, scales=scales) for m, n, k in BENCHMARK_SHAPES for scales in ("row", "block"))
