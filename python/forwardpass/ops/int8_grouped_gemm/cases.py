"""Shapes and options of int8_grouped_gemm, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import GEMM_KERNEL, LAYOUTS, compiled_for, laid_out, pairwise
from ..common.activations import is_gated
from ..common.experts import outputs
from ..dequant_activation.cases import EpilogueCase, assert_epilogue_matches, epilogue_factors
from . import reference


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]  # rows of each expert
    n: int
    k: int
    epilogue: EpilogueCase = EpilogueCase()
    layouts: tuple[str, str] = ("aligned", "aligned")  # of a and b, see `laid_out`
    room: int | None = None  # rows for each expert; None: they are sorted by expert
    beyond: int = 3  # rows of no expert, where they are sorted

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order; operands over all of int8, -128 among them, rows of zeros and of extremes."""
        g = torch.Generator().manual_seed(seed)
        experts = len(self.counts)
        lead = (sum(self.counts) + self.beyond,) if self.room is None else (experts, self.room)
        a = torch.randint(-128, 128, (*lead, self.k), generator=g, dtype=torch.int8)
        b = torch.randint(-128, 128, (experts, self.n, self.k), generator=g, dtype=torch.int8)
        if self.n > 2:
            b[:, 1], b[:, 2] = 0, -128
        counts = torch.tensor(self.counts, dtype=torch.int32)
        ends = (counts.cumsum(0).int() if self.room is None else counts).to(device)
        e = self.epilogue.arguments(lead, experts * self.n, 1 / (5000 * self.k**0.5), device, seed)
        shape = experts, self.n
        bias, out_scale = e["bias"], e["out_scale"]
        if out_scale is not None and out_scale.numel() > 1:
            out_scale = out_scale[: outputs(self.n, self.epilogue.activation)].contiguous()
        b_sum = b.sum(2, dtype=torch.int32).to(device) if e["a_zero_point"] is not None else None
        a, b = (laid_out(x, layout, device) for x, layout in zip((a, b), self.layouts))
        return (a, b, e["a_scale"], e["b_scale"].view(shape), ends, None if bias is None else bias.view(shape),
                e["activation"], e["out_dtype"], out_scale, e["a_zero_point"], b_sum)  # fmt: skip

    def bytes(self) -> int:
        """The weights of experts that have rows are read once."""
        rows, weights = sum(self.counts), sum(n > 0 for n in self.counts)
        outs = rows * outputs(self.n, self.epilogue.activation)
        return rows * self.k + weights * self.n * self.k + outs * self.epilogue.out_dtype.itemsize

    def flops(self) -> int:
        return 2 * sum(self.counts) * self.n * self.k


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args."""
    assert_epilogue_matches(actual, reference.int8_grouped_gemm, args)


#: rows of each expert: none, one, both sides of every tile, one with most of them, none of the last or of the first
COUNTS = (
    (5,),
    (0,),
    (1, 0, 0, 1),
    (0, 3, 64, 0, 65, 1, 17, 0),
    (0, 0, 130, 16),
    (1,) + (0,) * 58 + (2,),
    tuple((7 * e) % 5 for e in range(60)),
    (300, 1, 128, 129),
)


def mixed(experts: int) -> tuple[int, ...]:
    """Rows of each: all that are given to few experts, others among many."""
    rows = (1000, 0, 65, 1, 64, 3, 0, 3) if experts <= 8 else (0, 1, 3, 0, 65, 0, 1, 64)
    return tuple(rows[e % 8] if experts <= 60 or e % 32 < 8 else e % 5 % 2 for e in range(experts))


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options, in both layouts, and no rows at all. few_kernels: in few of Triton's kernels."""
    factors = {
        "counts": COUNTS,
        "n": (1, 16, 33, 130, 272),
        "k": (1, 64, 130, 300),
        "sorted": (True, False),
        "layout_a": LAYOUTS,
        "layout_b": LAYOUTS,
        **epilogue_factors(),
        "b_scale": ("column",),
    }
    kernels = compiled_for({"counts": rows_of, "activation": GEMM_KERNEL["activation"]}) if few_kernels else []
    yield Case((0, 0), 33, 130, beyond=0)
    yield Case((0, 0), 16, 64, room=0)
    yield from (Case(mixed(experts), 33, 70) for experts in (8, 256))
    for row in pairwise(factors, kernels=kernels):
        counts, n, k, in_order = row.pop("counts"), row.pop("n"), row.pop("k"), row.pop("sorted")
        layouts = row.pop("layout_a"), row.pop("layout_b")
        if is_gated(row["activation"]):
            n = -(-n // 16) * 16
        room = None if in_order else max(*counts, 1) + len(counts) % 2
        yield Case(counts, n, k, EpilogueCase(**row), layouts, room)


def rows_of(counts: tuple[int, ...]) -> int:
    """Which of the heights of tiles the mean of the counts takes."""
    mean = sum(counts) / len(counts)
    return (mean > 16) + (mean > 64)


#: tokens x experts of each, experts, out, in: OLMoE's up and down projections, one token and 512; Qwen3-30B's
BENCHMARK_SHAPES = (
    (1, 8, 64, 2048, 2048),
    (512, 8, 64, 2048, 2048),
    (512, 8, 64, 2048, 1024),
    (16, 8, 128, 1536, 2048),
)


def routed(tokens: int, each: int, experts: int) -> tuple[int, ...]:
    """How many rows each expert has where each token's are the next ones, in turn."""
    slots = tokens * each
    return tuple(slots // experts + (e < slots % experts) for e in range(experts))


BENCHMARK_CASES = tuple(
    Case(routed(tokens, each, experts), n, k, EpilogueCase(bias=None, out_dtype=torch.bfloat16), beyond=0)
    for tokens, each, experts, n, k in BENCHMARK_SHAPES
)
