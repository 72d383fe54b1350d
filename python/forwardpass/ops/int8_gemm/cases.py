"""Shapes and options of int8_gemm, for tests and benchmarks."""

from __future__ import annotations

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
    assert_equal,
    assert_quantized_close,
    compiled_for,
    few_macs,
    laid_out,
    pairwise,
)
from ..common.activations import EXACT, element_bound, is_gated, separate_gate_up
from ..common.quantized_rows import LEAST_RANGE
from ..dequant_activation.cases import (
    RESIDUAL_KERNEL,
    RESIDUALS,
    EpilogueCase,
    assert_epilogue_matches,
    epilogue_factors,
)
from . import reference


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    epilogue: EpilogueCase = EpilogueCase()
    layouts: tuple[str, str] = ("aligned", "aligned")  # of a and b, see `laid_out`
    quantized: bool = False  # int8_gemm_quantize, whatever the epilogue's out_dtype

    @property
    def op(self) -> str:
        return "int8_gemm_quantize" if self.quantized else "int8_gemm"

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order; operands over all of int8, -128 among them, rows of zeros and of extremes."""
        g = torch.Generator().manual_seed(seed)
        a = torch.randint(-128, 128, (self.m, self.k), generator=g, dtype=torch.int8)
        b = torch.randint(-128, 128, (self.n, self.k), generator=g, dtype=torch.int8)
        if self.m > 2:
            a[1], a[2] = 0, -128
        if self.n > 2:
            b[1], b[2] = 0, -128
        lead = (2, self.m // 2) if self.epilogue.ada_gate and self.m % 2 == 0 else (self.m,)
        e = self.epilogue.arguments(lead, self.n, 1 / (5000 * self.k**0.5), device, seed)
        b_sum = b.sum(1, dtype=torch.int32).to(device) if e["a_zero_point"] is not None else None
        a, b = (laid_out(x, layout, device) for x, layout in zip((a, b), self.layouts))
        shared = (a.unflatten(0, lead), b, e["a_scale"], e["b_scale"], e["bias"], e["activation"])
        if self.quantized:
            return (*shared, e["a_zero_point"], b_sum)
        return (*shared, e["out_dtype"], e["out_scale"], e["a_zero_point"], b_sum,
                *self.epilogue.added_of(lead, self.n, device, seed))  # fmt: skip

    def bytes(self) -> int:
        outputs = self.m * self.n // (2 if is_gated(self.epilogue.activation) else 1)
        size = 1 if self.quantized else self.epilogue.out_dtype.itemsize
        return self.m * self.k + self.n * self.k + outputs * size

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def assert_matches(actual: Tensor | tuple[Tensor, Tensor], args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args, those of int8_gemm or of int8_gemm_quantize."""
    if isinstance(actual, Tensor):
        assert_epilogue_matches(actual, reference.int8_gemm, args)
        return
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    a, b, a_scale, b_scale, bias, activation, a_zero_point, b_sum = args
    expected = reference.int8_gemm_quantize(*args)
    if activation in EXACT:  # the fp32 values are equal bit for bit, and so is what becomes of them
        for got, e in zip(actual, expected, strict=True):
            assert_equal(got, e)
        return
    q, scale = actual
    assert (q.stride(), scale.stride()) == tuple(e.stride() for e in expected)
    product = (a, b, a_scale, b_scale, bias)
    plain = reference.int8_gemm(*product, None, torch.float32, None, a_zero_point, b_sum)
    exact = reference.int8_gemm(*product, activation, torch.float64, None, a_zero_point, b_sum)
    gate, up = separate_gate_up(plain, -1) if is_gated(activation) else (plain, None)
    bound = element_bound(activation, gate, up) + 2.0**-22 * exact.abs()  # the reciprocal of the scale is rounded
    widest = exact.abs().amax(-1).clamp(min=LEAST_RANGE) / 127
    assert_close(scale, widest, bound.amax(-1) / 127 + 2.0**-22 * widest, "scale")
    assert_quantized_close(q, exact, bound, scale.cpu().unsqueeze(-1).expand(exact.shape))


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options, and no rows at all; 600 are more than one thread's on the CPU. few_kernels: in few
    of Triton's kernels."""
    yield from (Case(0, 33, 130, quantized=quantized) for quantized in (False, True))
    factors = {
        **GEMM_FACTORS,
        "m": (*GEMM_FACTORS["m"], 600),
        "layout_a": LAYOUTS,
        "layout_b": LAYOUTS,
        **epilogue_factors(),
        "residual": RESIDUALS,
        "quantized": (False, False, True),  # most are int8_gemm's
    }
    kernels = (
        compiled_for(GEMM_KERNEL | RESIDUAL_KERNEL | {"quantized": lambda quantized: quantized}) if few_kernels else []
    )
    for row in pairwise(factors, few_macs, kernels):
        m, n, k, layouts = row.pop("m"), row.pop("n"), row.pop("k"), (row.pop("layout_a"), row.pop("layout_b"))
        if is_gated(row["activation"]):
            n = -(-n // 16) * 16
        quantized = row.pop("quantized")
        yield Case(m, n, k, EpilogueCase(**row), layouts, quantized)


#: tokens x out x in: MiniLM at 8 x 128, BERT-large, Llama-8B's projections at 16 and 512 tokens
BENCHMARK_SHAPES = (
    (1024, 384, 384),
    (1024, 1536, 384),
    (1024, 384, 1536),
    (512, 4096, 1024),
    (16, 4096, 4096),
    (512, 4096, 4096),
)
BENCHMARK_CASES = tuple(
    Case(m, n, k, EpilogueCase(zero_point="row"), quantized=quantized)
    for m, n, k in BENCHMARK_SHAPES
    for quantized in (False, True)
)
