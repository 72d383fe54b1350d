"""Shapes and options of fp8_gemm and fp8_gemm_quantize, for tests and benchmarks, and how close a backend has to come."""

from __future__ import annotations

import itertools
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
    assert_quantized_close,
    compiled_for,
    few_macs,
    laid_out,
    pairwise,
)
from ..common.activations import activate, element_bound, is_gated, separate_gate_up
from ..common.epilogue import of_samples
from ..common.quantized_rows import E4M3, FLOATS, LEAST_RANGE, empty_scales
from ..dequant_activation.cases import RESIDUAL_KERNEL, RESIDUALS, EpilogueCase, epilogue_factors
from ..int8_gemm.cases import BENCHMARK_SHAPES
from . import FP8_GEMM, FP8_GEMM_QUANTIZE
from .reference import BLOCK, columns_scale, rows_scale

#: How far a sum may be from the exact one, of the sum of magnitudes: two-level fp32 stays under 2^-20.7 at K = 16384; sums of
#: 128 products by a tensor core that keeps 13 fractional bits, promoted to fp32, under 2^-10.6. Not promoted, such sums of one
#: sign are off by 2^-7.9 at K = 512 and 2^-4.5 at K = 4096.
EXACT, TRUNCATING = 2.0**-19, 2.0**-10
#: Half a unit in the last place; fp32 has one more for its own last operation.
HALF_UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: Sums of magnitudes beyond this many times the result (row norms) are data that cancels. K = 4100 normal values give 41; a
#: truncating accumulator keeps 1e-5 below 3.2 whatever the data.
CANCELS = {EXACT: 64.0, TRUNCATING: 3.0}


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    epilogue: EpilogueCase = EpilogueCase()
    blocks: bool = False  # scales of 128 and of 128 x 128, in place of the epilogue's
    quantized: bool = False  # fp8_gemm_quantize, whatever the epilogue's out_dtype
    rows: bool = False  # then: a scale for each row, instead of for each 128 columns
    same_sign: bool = False
    layouts: tuple[str, str] = ("aligned", "aligned")  # of a and b, see `laid_out`
    lead: bool = False  # a [2, M / 2, K] where M is even

    @property
    def op(self) -> str:
        return "fp8_gemm_quantize" if self.quantized else "fp8_gemm"

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order: a row of zeros, one of the largest values, one of denormals, one that is scaled a hundred times
        as much as the others. No outlier among the columns, and of one sign only magnitudes that are alike: small products
        beside large ones are cut by tensor cores that truncate, promoted or not (the magnitudes of normal values, 128 of
        one sign: by 2^-9.2)."""
        g = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(rows, self.k, generator=g) * 32 for rows in (self.m, self.n))
        if self.same_sign:
            a, b = (torch.rand(x.shape, generator=g) * 32 + 16 for x in (a, b))
        for x in (a, b):
            for row, value in ((1, 0.0), (2, 1e6), (3, 2.0**-12)):
                if x.shape[0] > row:
                    x[row] *= value
        a, b = (x.clamp(-448, 448).to(E4M3) for x in (a, b))
        lead = (2, self.m // 2) if (self.lead or self.epilogue.ada_gate) and self.m % 2 == 0 else (self.m,)
        step = 1 / (1024 * self.k ** (1.0 if self.same_sign else 0.5))  # outputs are then O(1)
        e = self.epilogue.arguments(lead, self.n, step, device, seed)
        if self.blocks:
            e["a_scale"], e["b_scale"] = self._block_scales(lead, step, g, device)
        if e["a_scale"].numel() > 1:
            e["a_scale"][(0,) * len(lead)] *= 100
        operands = (laid_out(a.unflatten(0, lead), self.layouts[0], device), laid_out(b, self.layouts[1], device))
        shared = (*operands, e["a_scale"], e["b_scale"], e["bias"], e["activation"])
        if self.quantized:
            return (*shared, None if self.rows else BLOCK)
        return (*shared, e["out_dtype"], e["out_scale"], *self.epilogue.added_of(lead, self.n, device, seed))

    def _block_scales(
        self, lead: tuple[int, ...], step: float, g: torch.Generator, device: str
    ) -> tuple[Tensor, Tensor]:
        """A group's scales end where the next begins or in NaN."""
        groups = -(-self.k // BLOCK)
        a_scale = empty_scales(torch.empty(0, device=device), lead, groups, torch.float32)
        a_scale.as_strided((a_scale.untyped_storage().nbytes() // 4,), (1,)).fill_(torch.nan)
        a_scale.copy_((torch.rand(*lead, groups, generator=g) + 0.5) * step)
        gated = is_gated(self.epilogue.activation)
        matrix = (-(-(self.n // 2 if gated else self.n) // BLOCK), groups)
        return a_scale, (torch.rand((2, *matrix) if gated else matrix, generator=g) + 0.5).to(device)

    def bytes(self) -> int:
        outputs = self.m * self.n // (2 if is_gated(self.epilogue.activation) else 1)
        size = 1 if self.quantized else self.epilogue.out_dtype.itemsize
        return self.m * self.k + self.n * self.k + outputs * size

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def assert_matches(actual: Tensor | tuple[Tensor, Tensor], args: tuple[Any, ...], truncating: bool = False) -> None:
    """actual is what a backend may return for args, those of fp8_gemm or of fp8_gemm_quantize; `truncating`: on tensor cores, or
    their model, that keep 13 fractional bits of a sum."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    operation = FP8_GEMM if isinstance(actual, Tensor) else FP8_GEMM_QUANTIZE
    fakes = operation.fake(*args)
    for g, f in zip(
        (actual,) if isinstance(actual, Tensor) else actual, (fakes,) if isinstance(fakes, Tensor) else fakes
    ):
        if (g.shape, g.dtype) != (f.shape, f.dtype) or (g.numel() and g.stride() != f.stride()):
            raise AssertionError(f"{g.dtype} {g.shape} {g.stride()}, expected {f.dtype} {f.shape} {f.stride()}")
    a, b, a_scale, b_scale, bias, activation, *options = args
    c = TRUNCATING if truncating else EXACT
    exact, bound, cancels = expected_values(a, b, a_scale, b_scale, bias, activation, c)
    if (gates := options[3] if len(options) > 3 else None) is not None:
        gates = of_samples(gates, exact).double()
        exact, bound = exact * gates, (bound + 2.0**-23 * exact.abs()) * gates.abs()
    if (added := options[2] if len(options) > 2 else None) is not None:
        bound = bound + 2.0**-23 * exact.abs()  # which the sum may cancel
        exact = exact + added.double()
    if not isinstance(actual, Tensor):
        _assert_quantized_matches(*actual, exact, bound, *options)
    elif actual.dtype in FLOATS:
        unit, least = HALF_UNIT[actual.dtype], {torch.float16: 2.0**-25}.get(actual.dtype, 0.0)
        assert_close(actual, exact, bound * (1 + unit) + unit * exact.abs() + least)
        assert_rows_close(actual, exact, cancels, least)
    else:
        assert_quantized_close(actual, exact, bound + 2.0**-23 * exact.abs(), options[1])


def expected_values(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str | None, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs in fp64, how far each may be off in fp32 where a sum is off by c of its magnitudes, and which rows cancel."""
    a_values = a.double() * rows_scale(a, a_scale, b_scale.dim() >= 2)
    b_values = (b.double() * columns_scale(b, b_scale)).t()
    y, size = a_values @ b_values, a_values.abs() @ b_values.abs()
    if bias is not None:
        y = y + bias.double()
    gate, up = separate_gate_up(y, -1) if is_gated(activation) else (y, None)
    errors = separate_gate_up(c * size, -1) if is_gated(activation) else (c * size, 0.0)
    exact = activate(activation, gate, up)
    bound = element_bound(activation, gate, up, *errors)
    return exact, bound, bound.norm(dim=-1) > c * CANCELS[c] * exact.norm(dim=-1)


def assert_rows_close(actual: Tensor, exact: Tensor, cancels: Tensor, least: float = 0.0) -> None:
    """1 - 2 <x, y> / (|x|^2 + |y|^2), which is |x - y|^2 over the same, below 1e-5 for every row that does not cancel, and for
    all of them together. `least`: what x and y may differ by all the same, half the smallest number of actual's type."""
    x, y = actual.cpu().double()[~cancels], exact[~cancels]
    finite = x.isfinite()  # not beyond float16; that is assert_close's
    x, y = x.where(finite, 0), y.where(finite, 0)
    for extent, dims in (("a row", (-1,)), ("all rows", tuple(range(x.dim())))):
        off = ((x - y).abs() - least).clamp(min=0).square().sum(dims)
        share = off / (x.square() + y.square()).sum(dims).clamp(min=1e-300)
        if bool((share >= 1e-5).any()):
            raise AssertionError(
                f"{extent}: 1 - 2 <x, y> / (|x|^2 + |y|^2) is {share.max().item():.1e}, not below 1e-5"
            )


def _assert_quantized_matches(q: Tensor, scale: Tensor, exact: Tensor, bound: Tensor, group_size: int | None) -> None:
    if group_size is None:
        group_size, scale = exact.shape[-1], scale.unsqueeze(-1)
    groups = scale.shape[-1]
    padded = (0, groups * group_size - exact.shape[-1])
    widest, off = (
        torch.nn.functional.pad(x, padded).unflatten(-1, (groups, group_size)).amax(-1) for x in (exact.abs(), bound)
    )
    slack = 2.0**-22  # multiplying by the reciprocal, rounded, is not dividing by the scale
    expected = widest.clamp(min=LEAST_RANGE) / 448
    assert_close(scale, expected, off / 448 + slack * expected, "scale")
    column_scale = scale.cpu().repeat_interleave(group_size, -1)[..., : exact.shape[-1]]
    assert_quantized_close(q, exact, bound + slack * exact.abs(), column_scale)


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options, and no rows at all. few_kernels: in few of Triton's kernels."""
    yield from (Case(0, 33, 130, blocks=blocks, quantized=blocks) for blocks in (False, True))
    # several rows of b's blocks, the last of each row not whole: of a few rows, and of many
    yield from (Case(m, 272, 515, blocks=True) for m in (2, 20))
    epilogue = epilogue_factors(zero_points=(None,))
    scales = [(a, b, False) for a, b in itertools.product(epilogue.pop("a_scale"), epilogue.pop("b_scale"))]
    factors = {
        **GEMM_FACTORS,
        "scales": (*scales, ("row", "column", True)),
        "layout_a": LAYOUTS,
        "layout_b": LAYOUTS,
        "lead": (False, True),
        "same_sign": (False, True),
        **epilogue,
        "residual": RESIDUALS,
        "out_dtype": (*epilogue["out_dtype"], "quantize", "quantize rows"),
    }
    kernels = (
        compiled_for(
            GEMM_KERNEL
            | RESIDUAL_KERNEL
            | {"scales": lambda scales: scales[2], "out_dtype": lambda dtype: dtype if isinstance(dtype, str) else None}
        )
        if few_kernels
        else []
    )
    for row in pairwise(factors, few_macs, kernels):
        a_scale, b_scale, blocks = row.pop("scales")
        layouts = (row.pop("layout_a"), row.pop("layout_b"))
        output = row["out_dtype"]
        if quantized := isinstance(output, str):
            row["out_dtype"] = torch.float32
        sizes = {name: row.pop(name) for name in ("m", "n", "k", "lead", "same_sign")}
        if is_gated(row["activation"]):
            sizes["n"] = -(-sizes["n"] // 16) * 16
        e = EpilogueCase(a_scale, b_scale, **row)
        yield Case(
            **sizes, epilogue=e, blocks=blocks, quantized=quantized, rows=output == "quantize rows", layouts=layouts
        )


#: Sums of one sign, on which a kernel that does not promote its accumulator is out of bounds where that truncates.
PROMOTION_CASES = tuple(
    Case(64, 64, k, EpilogueCase(bias=None), blocks=blocks, same_sign=True)
    for k in (512, 4096)
    for blocks in (False, True)
)

_BENCHMARK_EPILOGUE = EpilogueCase(out_dtype=torch.bfloat16)
BENCHMARK_CASES = tuple(
    Case(m, n, k, _BENCHMARK_EPILOGUE, blocks=blocks, quantized=quantized, layouts=("contiguous", "contiguous"))
    for m, n, k in BENCHMARK_SHAPES
    for blocks, quantized in ((False, False), (True, False), (True, True))
)
