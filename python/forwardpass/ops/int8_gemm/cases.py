"""Shapes and options of int8_gemm, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import GEMM_FACTORS, GEMM_KERNEL, LAYOUTS, compiled_for, few_macs, laid_out, pairwise
from ..common.activations import is_gated
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

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order; operands over all of int8, -128 among them, rows of zeros and of extremes."""
        g = torch.Generator().manual_seed(seed)
        a = torch.randint(-128, 128, (self.m, self.k), generator=g, dtype=torch.int8)
        b = torch.randint(-128, 128, (self.n, self.k), generator=g, dtype=torch.int8)
        if self.m > 2:
            a[1], a[2] = 0, -128
        if self.n > 2:
            b[1], b[2] = 0, -128
        e = self.epilogue.arguments((self.m,), self.n, 1 / (5000 * self.k**0.5), device, seed)
        b_sum = b.sum(1, dtype=torch.int32).to(device) if e["a_zero_point"] is not None else None
        a, b = (laid_out(x, layout, device) for x, layout in zip((a, b), self.layouts))
        return (a, b, e["a_scale"], e["b_scale"], e["bias"], e["activation"], e["out_dtype"], e["out_scale"],
                e["a_zero_point"], b_sum, self.epilogue.residual_of((self.m,), self.n, device, seed))  # fmt: skip

    def bytes(self) -> int:
        outputs = self.m * self.n // (2 if is_gated(self.epilogue.activation) else 1)
        return self.m * self.k + self.n * self.k + outputs * self.epilogue.out_dtype.itemsize

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args."""
    assert_epilogue_matches(actual, reference.int8_gemm, args)


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options, and no rows at all; 600 are more than one thread's on the CPU. few_kernels: in few
    of Triton's kernels."""
    yield Case(0, 33, 130)
    factors = {
        **GEMM_FACTORS,
        "m": (*GEMM_FACTORS["m"], 600),
        "layout_a": LAYOUTS,
        "layout_b": LAYOUTS,
        **epilogue_factors(),
        "residual": RESIDUALS,
    }
    kernels = compiled_for(GEMM_KERNEL | RESIDUAL_KERNEL) if few_kernels else []
    for row in pairwise(factors, few_macs, kernels):
        m, n, k, layouts = row.pop("m"), row.pop("n"), row.pop("k"), (row.pop("layout_a"), row.pop("layout_b"))
        if is_gated(row["activation"]):
            n = -(-n // 16) * 16
        yield Case(m, n, k, EpilogueCase(**row), layouts)


#: tokens x out x in: MiniLM at 8 x 128, BERT-large, Llama-8B's projections at 16 and 512 tokens
BENCHMARK_SHAPES = (
    (1024, 384, 384),
    (1024, 1536, 384),
    (1024, 384, 1536),
    (512, 4096, 1024),
    (16, 4096, 4096),
    (512, 4096, 4096),
)
BENCHMARK_CASES = tuple(Case(m, n, k, EpilogueCase(zero_point="row")) for m, n, k in BENCHMARK_SHAPES)
