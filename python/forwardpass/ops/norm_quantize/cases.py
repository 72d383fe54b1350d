"""Shapes and options of norm_quantize and add_norm_quantize, for tests (awkward) and benchmarks (real layers), with
the bytes a call must move, and how close a backend has to come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import (
    AWKWARD_SHAPES,
    EMPTY_SHAPES,
    apart,
    assert_close,
    assert_equal,
    assert_quantized_close,
    awkward,
    pairwise,
)
from ..common.rotated_cases import ROTATIONS, rotated_within, whole_blocks
from . import reference


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    x_dtype: torch.dtype = torch.float16
    dtype: torch.dtype = torch.int8
    symmetric: bool = True
    kind: str = "rms"
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = None
    channel_scale: bool = False
    rotate: int | None = None
    residual: bool = False
    ada_scale: torch.dtype | None = None
    ada_shift: torch.dtype | None = None
    eps: float = 1e-5
    constant_rows: bool = True  # rows whose variance is nothing but rounding errors, in implementations that keep those

    @property
    def op(self) -> str:
        return "add_norm_quantize" if self.residual else "norm_quantize"

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed + 1)

        def vector(dtype: torch.dtype | None, offset: float) -> Tensor | None:
            if dtype is None:
                return None
            return (torch.randn(self.shape[-1], generator=g) / 2 + offset).to(device, dtype)

        x = awkward(self.shape, self.x_dtype, seed, device)
        if x.numel() and x.dim() > 1:
            x[0, ..., 0] = 900.0  # a layer norm is taken from here on
            if self.constant_rows and x.shape[0] > 5:  # no variance, and little beside a large mean
                x[4] = 59999.7
                x[5] = 2000 + torch.randn(x[5].shape, generator=g).to(x)
        sources = (x, awkward(self.shape, self.x_dtype, seed + 7, device)) if self.residual else (x,)
        channel = (torch.rand(self.shape[-1], generator=g) / 2 + 0.25).to(device) if self.channel_scale else None
        weight, bias = vector(self.weight, 1), vector(self.bias, 0)

        def of_samples(dtype: torch.dtype | None) -> Tensor | None:
            if dtype is None:
                return None
            return apart((torch.randn(self.shape[0], self.shape[-1], generator=g) / 2).to(dtype), device)

        ada = of_samples(self.ada_scale), of_samples(self.ada_shift)
        options = (self.rotate, *ada) if self.ada_scale or self.ada_shift else (self.rotate,)
        return (*sources, weight, self.eps, self.dtype, self.kind, bias, self.symmetric, channel, *options)

    def bytes(self) -> int:
        """Read once, written once."""
        n, size = math.prod(self.shape), self.x_dtype.itemsize
        vectors = sum(d.itemsize for d in (self.weight, self.bias) if d is not None) + 4 * self.channel_scale
        ada = sum(d.itemsize for d in (self.ada_scale, self.ada_shift) if d is not None)
        scales = n // self.shape[-1] * (4 if self.symmetric else 8)
        return n * (size * (3 if self.residual else 1) + 1) + self.shape[-1] * (vectors + self.shape[0] * ada) + scales


def expected_values(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    kind: str,
    bias: Tensor | None,
    channel_scale: Tensor | None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What norm_quantize quantises, in fp64, and how far an implementation in fp32 may be from each of the values.

    With u = 2^-24, to first order: a sum of K terms is off by at most depth * u * sum|terms|, where depth is its
    longest chain of additions, K / 16 + 32 here (the CPU's 16 lanes, which then are added up; the GPU's chains are
    shorter). So the inverse root of the mean square is off by a relative r = (depth / 2 + 5) u. A layer norm's centred
    values are off by e = (depth + 3) u mean|x - x_0| + 2 u |x - x_0|, as they are taken from the row's first value on,
    and, by the triangle inequality, its standard deviation by rms(e). Four roundings follow, and of adaLN three more.
    """
    u, v, k = 2.0**-24, x.double(), x.shape[-1]
    depth = k / 16 + 32
    e = torch.zeros_like(v)
    if kind == "layer":
        offset = (v - v[..., :1]).abs()
        e = (depth + 3) * u * offset.mean(-1, keepdim=True) + 2 * u * offset
        v = v - v.mean(-1, keepdim=True)
    inverse = (v.square().mean(-1, keepdim=True) + eps).rsqrt()
    r = (depth / 2 + 5) * u + e.square().mean(-1, keepdim=True).sqrt() * inverse
    gain = torch.ones(k, dtype=torch.float64, device=x.device) if weight is None else weight.double().abs()
    bound = gain * inverse * (e + v.abs() * (r + 2 * u))
    values = reference.normalize(x, weight, eps, kind, bias)
    bound = bound + 2 * u * values.abs()
    if ada_scale is not None:
        bound = bound * (1 + reference.of_samples(ada_scale, x)).abs()
    if ada_scale is not None or ada_shift is not None:
        scaled = reference.normalize(x, weight, eps, kind, bias, ada_scale)
        values = reference.normalize(x, weight, eps, kind, bias, ada_scale, ada_shift)
        bound = bound + u * (2 * scaled.abs() + values.abs())
    if channel_scale is not None:
        values, bound = values * channel_scale, bound * channel_scale
    return values, bound


def assert_matches(actual: tuple[Tensor, ...], args: tuple[Any, ...]) -> None:
    """actual is what a backend may return for args, those of norm_quantize or of add_norm_quantize: residual_out equal to
    the reference's; scale and zero point within the bound of its, and by them each q the step of a value within it."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    q, scale, zero_point, *residual_out = (t.cpu() for t in actual)
    expected: tuple[Tensor, ...] = (reference.add_norm_quantize if residual_out else reference.norm_quantize)(*args)
    for name, g, e in zip(("q", "scale", "zero_point", "residual_out"), actual, expected):
        if (g.shape, g.dtype, g.stride()) != (e.shape, e.dtype, e.stride()):
            raise AssertionError(f"{name}: {g.dtype} {g.shape} {g.stride()}, expected {e.dtype} {e.shape} {e.stride()}")
    if residual_out:
        assert_equal(residual_out[0], expected[3], "residual_out")
        args = (expected[3], *args[2:])
    x, weight, eps, dtype, kind, bias, symmetric, channel_scale, rotate, *ada = args
    if x.numel() == 0:
        return
    values, bound = expected_values(x, weight, eps, kind, bias, channel_scale, *ada)
    values, bound = rotated_within(values, bound, rotate)
    steps = 448 if dtype is torch.float8_e4m3fn else 127 if symmetric else 255
    worst = bound.amax(-1)  # of the range; that of an asymmetric one is the sum of two
    slack = 2.0**-22  # multiplying by the reciprocal, rounded, is not dividing by the scale
    assert_close(scale, expected[1], worst * (1 if symmetric else 2) / steps + slack * expected[1], "scale")
    shift = None if symmetric else zero_point.unsqueeze(-1)
    assert_quantized_close(q, values, bound + slack * values.abs(), scale.unsqueeze(-1), "q", shift)
    if not symmetric:
        low = (-values).clamp(min=0).amax(-1)
        tie = 0.5 + (worst + slack * low) / scale
        tie = torch.where(scale.isnan(), torch.inf, tie)  # unspecified there
        assert_close(zero_point + 128, (low / scale).nan_to_num(0), tie, "zero_point")


def cases(rotations: tuple[int | None, ...] = ROTATIONS) -> Iterator[Case]:
    """Every pair of options at some awkward shape; what the contract refuses is not among them."""
    factors = {
        "shape": (*AWKWARD_SHAPES, *EMPTY_SHAPES),
        "x_dtype": (torch.float32, torch.float16, torch.bfloat16),
        "quantization": ((torch.int8, True), (torch.int8, False), (torch.float8_e4m3fn, True)),
        "norm": (
            ("rms", None, None),
            ("rms", "x", None),
            ("layer", "float32", "x"),
            ("layer", "x", "float32"),
            ("layer", None, None),
        ),
        "channel_scale": (False, True),
        "rotate": rotations,
        "residual": (False, True),
        "eps": (1e-5, 1e-12),
    }
    # Beyond the row's end a thread has the outlier that its first column is, and no weight of 0 to hide it.
    yield Case((113, 203), torch.float32, kind="layer", weight=None, channel_scale=True)
    for row in pairwise(factors):
        (dtype, symmetric), (kind, *vectors) = row.pop("quantization"), row.pop("norm")
        weight, bias = ({"x": row["x_dtype"], "float32": torch.float32}.get(v) for v in vectors)
        row["shape"] = whole_blocks(row["shape"], row["rotate"])
        yield Case(**row, dtype=dtype, symmetric=symmetric, kind=kind, weight=weight, bias=bias)
    yield from ada_cases(rotations)


def ada_cases(rotations: tuple[int | None, ...] = ROTATIONS) -> Iterator[Case]:
    """adaLN: one row a sample, several in one or two dimensions, rows that are aligned or not."""
    factors = {
        "shape": ((7, 203), (3, 5, 130), (2, 3, 4, 256), (1, 9, 70)),
        "x_dtype": (torch.float32, torch.float16, torch.bfloat16),
        "quantization": ((torch.int8, True), (torch.int8, False), (torch.float8_e4m3fn, True)),
        "kind": ("layer", "rms"),
        "weight": (None, torch.float32),
        "ada": (("x", "x"), ("float32", "x"), ("x", "float32"), ("x", None), (None, "float32")),
        "rotate": rotations,
        "channel_scale": (False, True),
    }
    for row in pairwise(factors):
        (dtype, symmetric), ada = row.pop("quantization"), row.pop("ada")
        scale, shift = ({"x": row["x_dtype"], "float32": torch.float32}.get(v) for v in ada)
        row["shape"] = whole_blocks(row["shape"], row["rotate"])
        yield Case(**row, dtype=dtype, symmetric=symmetric, ada_scale=scale, ada_shift=shift)


#: the norms of real models: MiniLM (8 x 128 tokens; layer norm with residual), BERT-large, Llama-8B, Llama-70B; adaLN of DiT-XL
BENCHMARK_CASES = (
    *(
        Case(
            shape,
            dtype,
            kind=kind,
            weight=dtype,
            bias=dtype if kind == "layer" else None,
            residual=residual,
            constant_rows=False,
        )
        for shape, kind in (
            ((1024, 384), "layer"),
            ((4096, 1024), "layer"),
            ((2048, 4096), "rms"),
            ((512, 8192), "rms"),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for residual in (False, True)
    ),
    Case(
        (4, 256, 1152),
        torch.bfloat16,
        kind="layer",
        weight=None,
        ada_scale=torch.bfloat16,
        ada_shift=torch.bfloat16,
        constant_rows=False,
    ),
)
