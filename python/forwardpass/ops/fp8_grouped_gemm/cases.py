"""Shapes and options of fp8_grouped_gemm, for tests and benchmarks; how close a backend has to come is fp8_gemm's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import GEMM_KERNEL, LAYOUTS, assert_equal, compiled_for, laid_out, pairwise
from ..common.activations import is_gated
from ..common.experts import fill_unknown, outputs, row_ranges
from ..common.quantized_rows import E4M3, empty_scales
from ..dequant_activation.cases import EpilogueCase, epilogue_factors
from ..fp8_gemm import BLOCK
from ..fp8_gemm import cases as fp8_gemm
from ..int8_grouped_gemm.cases import BENCHMARK_SHAPES, COUNTS, mixed, routed, rows_of
from . import OPERATION, block_scales


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]  # rows of each expert
    n: int
    k: int
    epilogue: EpilogueCase = EpilogueCase()
    blocks: bool = False  # scales of 128 and of 128 x 128, in place of the epilogue's
    same_sign: bool = False
    layouts: tuple[str, str] = ("aligned", "aligned")  # of a and b, see `laid_out`
    room: int | None = None  # rows for each expert; None: they are sorted by expert
    beyond: int = 3  # rows of no expert, where they are sorted

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order: operands as fp8_gemm's cases have them, each expert's weight with rows like those."""
        g = torch.Generator().manual_seed(seed)
        experts = len(self.counts)
        lead = (sum(self.counts) + self.beyond,) if self.room is None else (experts, self.room)
        shapes = (*lead, self.k), (experts, self.n, self.k)
        a, b = (torch.randn(shape, generator=g) * 32 for shape in shapes)
        if self.same_sign:
            a, b = (torch.rand(shape, generator=g) * 32 + 16 for shape in shapes)
        for x in (a.flatten(0, -2), *b):
            for row, value in ((1, 0.0), (2, 1e6), (3, 2.0**-12)):
                if x.shape[0] > row:
                    x[row] *= value
        a, b = (x.clamp(-448, 448).to(E4M3) for x in (a, b))
        counts = torch.tensor(self.counts, dtype=torch.int32)
        ends = (counts.cumsum(0).int() if self.room is None else counts).to(device)
        step = 1 / (1024 * self.k ** (1.0 if self.same_sign else 0.5))  # outputs are then O(1)
        e = self.epilogue.arguments(lead, experts * self.n, step, device, seed)
        shape = experts, self.n
        bias, out_scale = e["bias"], e["out_scale"]
        if out_scale is not None and out_scale.numel() > 1:
            out_scale = out_scale[: outputs(self.n, self.epilogue.activation)].contiguous()
        a_scale, b_scale = e["a_scale"], e["b_scale"].view(shape)
        if self.blocks:
            groups = -(-self.k // BLOCK)
            a_scale = empty_scales(torch.empty(0, device=device), lead, groups, torch.float32)
            a_scale.as_strided((a_scale.untyped_storage().nbytes() // 4,), (1,)).fill_(torch.nan)
            a_scale.copy_((torch.rand(*lead, groups, generator=g) + 0.5) * step)
            of_one = block_scales(self.n, self.k, self.epilogue.activation)
            b_scale = (torch.rand(experts, *of_one, generator=g) + 0.5).to(device)
        a, b = (laid_out(x, layout, device) for x, layout in zip((a, b), self.layouts))
        return (a, b, a_scale, b_scale, ends, None if bias is None else bias.view(shape), e["activation"], e["out_dtype"],
                out_scale)  # fmt: skip

    def bytes(self) -> int:
        """The weights of experts that have rows are read once."""
        rows, weights = sum(self.counts), sum(n > 0 for n in self.counts)
        outs = rows * outputs(self.n, self.epilogue.activation)
        return rows * self.k + weights * self.n * self.k + outs * self.epilogue.out_dtype.itemsize

    def flops(self) -> int:
        return 2 * sum(self.counts) * self.n * self.k


def expert_arguments(args: tuple[Any, ...]) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Which rows an expert has, and fp8_gemm's arguments for them: of each that has some."""
    a, b, a_scale, b_scale, ends, bias, *options = args
    blocks, rows = b_scale.dim() >= 3, a.flatten(0, -2)
    for e, (begin, end) in enumerate(row_ranges(a, ends)[0]):
        if begin == end:
            continue
        where = slice(begin, end)
        scale = a_scale if a_scale.numel() == 1 and not blocks else a_scale.flatten(0, a.dim() - 2)[where]
        if blocks:
            scale = empty_scales(scale, (end - begin,), scale.shape[1], torch.float32).copy_(scale)
        yield where, (rows[where], b[e], scale, b_scale[e], None if bias is None else bias[e], *options)


def assert_matches(actual: Tensor, args: tuple[Any, ...], truncating: bool = False) -> None:
    """actual is what a backend may return for args: expert by expert what fp8_gemm may return, zeros in rows that none
    has, and NaN in those of which that is unknown."""
    actual, args = actual.cpu(), tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    fake = OPERATION.fake(*args)
    if (actual.shape, actual.dtype) != (fake.shape, fake.dtype) or (
        actual.numel() and actual.stride() != fake.stride()
    ):
        raise AssertionError(
            f"{actual.dtype} {actual.shape} {actual.stride()}, expected {fake.dtype} {fake.shape} {fake.stride()}"
        )
    rows = actual.flatten(0, -2)
    of_none = torch.ones(rows.shape[0], dtype=torch.bool)
    for where, of_expert in expert_arguments(args):
        of_none[where] = False
        fp8_gemm.assert_matches(rows[where], of_expert, truncating)
    expected = torch.zeros_like(actual.view(torch.uint8)).view(actual.dtype)
    fill_unknown(expected, row_ranges(args[0], args[4])[1])
    assert_equal(rows[of_none], expected.flatten(0, -2)[of_none], "rows that no expert has")


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options, in both layouts, and no rows at all. few_kernels: in few of Triton's kernels."""
    epilogue = epilogue_factors(zero_points=(None,))
    del epilogue["b_scale"]
    factors = {
        "counts": COUNTS,
        "n": (1, 16, 33, 130, 272),
        "k": (1, 64, 130, 300),
        "sorted": (True, False),
        "blocks": (False, True),
        "same_sign": (False, True),
        "layout_a": LAYOUTS,
        "layout_b": LAYOUTS,
        **epilogue,
    }
    kernel = {"counts": rows_of, "activation": GEMM_KERNEL["activation"], "blocks": bool}
    yield from (Case((0, 0), 33, 130, blocks=blocks, beyond=0) for blocks in (False, True))
    yield Case((0, 0), 16, 64, room=0)
    yield from (Case(mixed(experts), 33, 70, blocks=experts > 8) for experts in (8, 256))
    yield Case((70, 0, 5), 272, 515, blocks=True)  # several rows of b's blocks, the last of each not whole
    for row in pairwise(factors, kernels=compiled_for(kernel) if few_kernels else []):
        in_order = row.pop("sorted")
        names = ("counts", "n", "k", "blocks", "same_sign")
        counts, n, k, blocks, same_sign = (row.pop(name) for name in names)
        layouts = row.pop("layout_a"), row.pop("layout_b")
        if is_gated(row["activation"]):
            n = -(-n // 16) * 16
        room = None if in_order else max(*counts, 1) + len(counts) % 2
        yield Case(counts, n, k, EpilogueCase(**row), blocks, same_sign, layouts, room)


#: Sums of one sign, on which a kernel that does not promote its accumulator is out of bounds where that truncates.
PROMOTION_CASES = tuple(
    Case(counts, 64, k, EpilogueCase(bias=None), blocks=blocks, same_sign=True)
    for counts in ((3, 0, 9), (70, 20, 66, 120))
    for k in (512, 4096)
    for blocks in (False, True)
)

BENCHMARK_CASES = tuple(
    Case(
        routed(tokens, each, experts), n, k, EpilogueCase(bias=None, out_dtype=torch.bfloat16), blocks=blocks, beyond=0
    )
    for tokens, each, experts, n, k in BENCHMARK_SHAPES
    for blocks in (False, True)
)
