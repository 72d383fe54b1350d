"""Shapes and options of quantize, for tests (awkward) and benchmarks (real layers), with the bytes a call must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import AWKWARD_SHAPES, EMPTY_SHAPES, assert_equal, awkward, pairwise
from ..common.rotated_cases import ROTATIONS, assert_quantizes, group_of_blocks, whole_blocks
from . import reference


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    x_dtype: torch.dtype = torch.float16
    dtype: torch.dtype = torch.int8
    symmetric: bool = True
    group_size: int | None = None
    static: bool = False
    channel_scale: bool = False
    rotate: int | None = None

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed + 1)
        scale = torch.full((1,), 0.07, device=device) if self.static else None
        zero_point = (
            torch.full((1,), -9, dtype=torch.int32, device=device) if self.static and not self.symmetric else None
        )
        channel = (torch.rand(self.shape[-1], generator=g) + 0.25).to(device) if self.channel_scale else None
        x = awkward(self.shape, self.x_dtype, seed, device)
        return x, self.dtype, scale, zero_point, self.group_size, self.symmetric, channel, self.rotate

    def bytes(self) -> int:
        """Read once, written once."""
        n = 1
        for d in self.shape:
            n *= d
        segments = n // self.shape[-1] * -(-self.shape[-1] // (self.group_size or self.shape[-1]))
        return n * (self.x_dtype.itemsize + 1) + segments * (0 if self.static else 4 if self.symmetric else 8)


def assert_matches(actual: tuple[Tensor, Tensor, Tensor], args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args: the reference's bits; of rotated values what is within their bound."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    expected = reference.quantize(*args)
    x, _, scale, zero_point, group_size, _, channel_scale, rotate = args
    if rotate is not None:
        values = x.double() if channel_scale is None else x.double() * channel_scale
        assert_quantizes(actual, expected, values, torch.zeros_like(values), group_size, rotate, scale, zero_point)
        return
    for name, g, e in zip(("q", "scale", "zero_point"), actual, expected):
        assert_equal(g, e, name)


def cases(rotations: tuple[int | None, ...] = ROTATIONS) -> Iterator[Case]:
    """Every pair of options at some awkward shape; what the contract refuses is not among them."""
    factors = {
        "shape": (*AWKWARD_SHAPES, *EMPTY_SHAPES),
        "x_dtype": (torch.float32, torch.float16, torch.bfloat16),
        "quantization": ((torch.int8, True), (torch.int8, False), (torch.float8_e4m3fn, True)),
        "scaling": ((False, None), (False, 128), (False, 50), (True, None)),
        "channel_scale": (False, True),
        "rotate": rotations,
    }
    for row in pairwise(factors):
        (dtype, symmetric), (static, group) = row["quantization"], row["scaling"]
        rotate = row["rotate"]
        shape, group = whole_blocks(row["shape"], rotate), group_of_blocks(group, rotate)
        yield Case(shape, row["x_dtype"], dtype, symmetric, group, static, row["channel_scale"], rotate)


#: what layers really quantise: tokens x hidden size of MiniLM (8 x 128), BERT-large, Llama-8B, Llama-70B's MLP
BENCHMARK_CASES = tuple(
    Case(shape, dtype)
    for shape in ((1024, 384), (1024, 1536), (4096, 1024), (2048, 4096), (512, 28672))
    for dtype in (torch.float32, torch.bfloat16)
)
