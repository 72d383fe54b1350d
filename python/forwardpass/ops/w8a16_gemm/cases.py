"""Shapes and options of w8a16_gemm, for tests and benchmarks."""

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
    assert_close,
    awkward,
    compiled_for,
    few_macs,
    laid_out,
    leads,
    pairwise,
)
from ..common.activations import GATED, PLAIN, element_bound, is_gated, separate_gate_up
from ..common.epilogue import of_samples
from ..common.quantized_rows import E4M3
from ..dequant_activation.cases import RESIDUAL_KERNEL, RESIDUALS, ada_gate, residual
from ..int8_gemm.cases import BENCHMARK_SHAPES
from . import reference

ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


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
    layout: str = "aligned"  # of the weight
    residual: str | None = None  # or a layout of `laid_out`
    ada_gate: bool = False  # with a residual

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, (self.n, self.k), generator=g, dtype=torch.int8)
        if self.w_dtype == E4M3:
            weight = (weight.float() * 3).to(E4M3)
        shape = {"tensor": (1,), "column": (self.n,), "block": (self.n, -(-self.k // 128))}[self.scales]
        weight_scale = ((torch.rand(shape, generator=g) + 0.5) / 2000).to(device)
        bias = torch.randn(self.n, generator=g).to(device) if self.bias else None
        outputs = self.n // 2 if is_gated(self.activation) else self.n
        added = residual((*self.lead, outputs), self.x_dtype, self.residual, device, seed)
        return (
            awkward((*self.lead, self.k), self.x_dtype, seed, device),
            laid_out(weight, self.layout, device),
            weight_scale,
            bias,
            self.activation,
            added,
            *(() if added is None or not self.ada_gate else (ada_gate(added),)),
        )

    def bytes(self) -> int:
        m = math.prod(self.lead)
        outputs = m * self.n // (2 if is_gated(self.activation) else 1)
        return (m * self.k + outputs) * self.x_dtype.itemsize + self.n * self.k

    def flops(self) -> int:
        return 2 * math.prod(self.lead) * self.n * self.k


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what a backend may return for args: an fp32 sum of K products in any order is within K 2^-24 of the sum of their
    magnitudes, and 3 more roundings follow, 4 with a residual."""
    activation, added, gates = (*args[4:], None, None)[:3]
    x, weight, weight_scale, bias = (a.cpu() if isinstance(a, Tensor) else a for a in args[:4])
    if actual.dtype != x.dtype or not actual.is_contiguous():
        raise AssertionError(f"{actual.dtype} {actual.stride()}, expected {x.dtype} and contiguous")
    y = reference.w8a16_gemm(x.double(), weight, weight_scale, bias, None)
    exact = reference.w8a16_gemm(x.double(), weight, weight_scale, bias, activation)
    size = x.double().abs() @ reference.dequantize_weight(weight, weight_scale).abs().t() + (
        0 if bias is None else bias.abs()
    )
    error = size * (x.shape[-1] + 4) * 2.0**-24
    gate, up = separate_gate_up(y, -1) if is_gated(activation) else (y, None)
    errors = separate_gate_up(error, -1) if is_gated(activation) else (error, 0.0)
    bound, unit = element_bound(activation, gate, up, *errors), ULP[x.dtype]
    if gates is not None:
        gates = of_samples(gates.cpu(), exact).double()
        exact, bound = exact * gates, (bound + ULP[torch.float32] * exact.abs()) * gates.abs()
    if added is not None:
        bound = bound + ULP[torch.float32] * exact.abs()  # which the sum may cancel
        exact = exact + added.cpu().double()
        bound = bound + ULP[torch.float32] * exact.abs()
    least = {torch.float16: 2.0**-25}.get(x.dtype, 0.0)
    assert_close(actual, exact, bound * (1 + unit) + unit * exact.abs() + least)


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options; 272 rows of weight are more than the CPU upconverts at a time. few_kernels: in few of
    Triton's kernels."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)  # most cases have the first, and GPUs do not take the last
    factors = {
        **GEMM_FACTORS,
        "x_dtype": dtypes,
        "w_dtype": (torch.int8, E4M3),
        "scales": ("column", "tensor", "block"),
        "bias": (True, False),
        "activation": (None, *PLAIN, *GATED),
        "layout": LAYOUTS,
        "residual": RESIDUALS,
    }
    kernels = (
        compiled_for(
            GEMM_KERNEL | RESIDUAL_KERNEL | {"x_dtype": str, "w_dtype": str, "scales": lambda scales: scales == "block"}
        )
        if few_kernels
        else []
    )
    for row in leads(pairwise(factors, few_macs, kernels)):
        if is_gated(row["activation"]):
            row["n"] = -(-row["n"] // 16) * 16
        yield Case(**row)


BENCHMARK_CASES = tuple(
    Case((m,), n, k, x_dtype=dtype) for m, n, k in BENCHMARK_SHAPES for dtype in (torch.float32, torch.bfloat16)
)
