"""Shapes and options of w8a16_grouped_gemm, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import LAYOUTS, assert_equal, awkward, laid_out, pairwise
from ..common.activations import GATED, PLAIN, is_gated
from ..common.experts import fill_unknown, outputs, row_ranges
from ..common.quantized_rows import E4M3
from ..fp8_gemm import BLOCK
from ..w8a16_gemm import cases as w8a16_gemm


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]  # rows of each expert
    n: int
    k: int
    x_dtype: torch.dtype = torch.bfloat16
    w_dtype: torch.dtype = torch.int8
    bias: bool = True
    activation: str | None = None
    layout: str = "aligned"  # of the weight
    room: int | None = None  # rows for each expert; None: they are sorted by expert
    beyond: int = 3  # rows of no expert, where they are sorted
    groups: bool = False  # scales of 128 columns, not of rows

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        experts = len(self.counts)
        lead = (sum(self.counts) + self.beyond,) if self.room is None else (experts, self.room)
        weight = torch.randint(-127, 128, (experts, self.n, self.k), generator=g, dtype=torch.int8)
        if self.w_dtype == E4M3:
            weight = (weight.float() * 3).to(E4M3)
        counts = torch.tensor(self.counts, dtype=torch.int32)
        of_row = (-(-self.k // BLOCK),) if self.groups else ()
        return (
            awkward((*lead, self.k), self.x_dtype, seed, device),
            laid_out(weight, self.layout, device),
            ((torch.rand(experts, self.n, *of_row, generator=g) + 0.5) / 2000).to(device),
            (counts.cumsum(0).int() if self.room is None else counts).to(device),
            torch.randn(experts, self.n, generator=g).to(device) if self.bias else None,
            self.activation,
        )

    def bytes(self) -> int:
        """The weights of experts that have rows once."""
        rows, with_rows = sum(self.counts), sum(n > 0 for n in self.counts)
        return rows * (self.k + outputs(self.n, self.activation)) * self.x_dtype.itemsize + with_rows * self.n * self.k

    def flops(self) -> int:
        return 2 * sum(self.counts) * self.n * self.k


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what a backend may return for args: for each expert's rows what w8a16_gemm may, zeros for those of none, and NaN
    for those of which that is unknown."""
    x, weight, weight_scale, offs, bias, activation = (a.cpu() if isinstance(a, Tensor) else a for a in args)
    if actual.shape[:-1] != x.shape[:-1] or actual.dtype != x.dtype or not actual.is_contiguous():
        raise AssertionError(f"{actual.dtype} {tuple(actual.shape)} {actual.stride()}")
    rows, results = x.flatten(0, -2), actual.cpu().flatten(0, -2)
    of_none, (ranges, unknown) = torch.ones(len(rows), dtype=torch.bool), row_ranges(x, offs)
    for e, (begin, end) in enumerate(ranges):
        of_none[begin:end] = False
        if begin < end:
            of_e = rows[begin:end], weight[e], weight_scale[e], None if bias is None else bias[e], activation
            w8a16_gemm.assert_matches(results[begin:end], of_e)
    expected = torch.zeros_like(results)
    fill_unknown(expected, unknown)
    assert_equal(results[of_none], expected[of_none], "rows of no expert")


#: rows of each expert: none, one, more than one thread computes by hand, one with most of them, none of the last or the first
COUNTS = (
    (5,),
    (0,),
    (1, 0, 0, 1),
    (0, 3, 48, 0, 49, 1, 16, 17, 0),
    (0, 0, 130, 16),
    (1,) + (0,) * 58 + (2,),
    tuple((7 * e) % 5 for e in range(60)),
)


def cases() -> Iterator[Case]:
    """Every pair of sizes and options, in both layouts, and no rows at all; an expert with more rows than a product has at once."""
    factors = {
        "counts": COUNTS,
        "n": (1, 16, 33, 130, 272),
        "k": (1, 7, 64, 130, 515),
        "x_dtype": (torch.bfloat16, torch.float16, torch.float32),
        "w_dtype": (torch.int8, E4M3),
        "bias": (True, False),
        "activation": (None, *PLAIN, *GATED),
        "layout": LAYOUTS,
        "sorted": (True, False),
        "groups": (False, True),
    }
    yield Case((0, 0), 33, 130, beyond=0)
    yield Case((0, 0), 16, 64, room=0)
    yield Case((1030, 2), 20, 40)
    for row in pairwise(factors):
        in_order, counts = row.pop("sorted"), row["counts"]
        if is_gated(row["activation"]):
            row["n"] = -(-row["n"] // 16) * 16
        yield Case(**row, room=None if in_order else max(*counts, 1) + len(counts) % 2)


def routed(tokens: int, choices: int, experts: int) -> tuple[int, ...]:
    """How many rows each expert has where tokens choose the next ones, in turn."""
    rows = tokens * choices
    return tuple(rows // experts + (e < rows % experts) for e in range(experts))


#: tokens x choices, experts, out, in: OLMoE's up and down projections, and Qwen3-30B-A3B's, of which an eighth of the experts
BENCHMARK_CASES = tuple(
    Case(routed(tokens, choices, experts), n, k, x_dtype=dtype, bias=False, beyond=0)
    for tokens, choices, experts, n, k in (
        (1, 8, 64, 2048, 2048),
        (1, 8, 64, 2048, 1024),
        (8, 8, 64, 2048, 2048),
        (512, 8, 16, 2048, 2048),
        (1, 8, 16, 1536, 2048),
    )
    for dtype in (torch.float32, torch.bfloat16)
)
