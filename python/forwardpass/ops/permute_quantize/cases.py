"""Shapes and options of permute_quantize, for tests (awkward) and benchmarks (real models), with the bytes a call must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import LAYOUTS, assert_equal, awkward, laid_out, pairwise
from . import reference

#: of `choose_experts`
ROUTINGS = ("even", "one", "sentinels", "none")


def choose_experts(tokens: int, choices: int, experts: int, routing: str, seed: int, dtype: torch.dtype) -> Tensor:
    """index [T, k]: of all experts ("even"), the last alone ("one"), with choices that are no expert among them ("sentinels"), or
    those alone ("none")."""
    g = torch.Generator().manual_seed(seed + 2)
    index = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :choices]
    if choices > experts:
        index = torch.randint(experts, (tokens, choices), generator=g)
    if routing == "one":
        index = torch.full_like(index, experts - 1)
    elif routing != "even":
        others = torch.tensor([-1, experts, experts + 1000, torch.iinfo(dtype).min, torch.iinfo(dtype).max])
        other = others[torch.randint(len(others), index.shape, generator=g)]
        index = torch.where(torch.rand(index.shape, generator=g) < (0.6 if routing == "sentinels" else 1), other, index)
    return index.to(dtype).contiguous()


@dataclass(frozen=True)
class Case:
    tokens: int
    choices: int
    experts: int
    columns: int
    x_dtype: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.int8
    index_dtype: torch.dtype = torch.int64
    routing: str = "even"
    group_size: int | None = None
    channel_scale: bool = False
    layout: str = "apart"  # of x

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.columns

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed + 1)
        channel = (torch.rand(self.columns, generator=g) + 0.25).to(device) if self.channel_scale else None
        x = awkward((self.tokens, self.columns), self.x_dtype, seed).contiguous()
        index = choose_experts(self.tokens, self.choices, self.experts, self.routing, seed, self.index_dtype)
        return laid_out(x, self.layout, device), index.to(device), self.experts, self.dtype, self.group_size, channel

    def bytes(self) -> int:
        """Read once, written once for each choice."""
        rows = self.tokens * self.choices
        scales = -(-self.columns // (self.group_size or self.columns))
        return (
            self.tokens * self.columns * self.x_dtype.itemsize
            + rows * (self.columns + 4 * scales + 4 + self.index_dtype.itemsize)
            + 4 * self.experts
        )


def assert_matches(actual: tuple[Tensor, ...], args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args: the reference's bits."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    expected = reference.permute_quantize(*args)
    for name, g, e in zip(("q", "scale", "offs", "position"), actual, expected, strict=True):
        assert_equal(g, e, name)


def cases() -> Iterator[Case]:
    """Every pair of options; more choices than a thread block counts, rows that are read twice."""
    yield Case(0, 2, 8, 16)
    yield Case(3, 0, 8, 16)
    yield Case(799, 8, 256, 33, torch.float16, index_dtype=torch.int32, routing="sentinels")
    yield Case(3000, 2, 512, 16)
    yield Case(3, 2, 8, 16400, dtype=torch.float8_e4m3fn, routing="sentinels", channel_scale=True)
    yield Case(2, 3, 8, 33000, routing="sentinels", group_size=16400)
    factors = {
        "tokens": (1, 3, 65, 1000),
        "choices": (1, 2, 8),
        "experts": (1, 8, 60, 256, 512),
        "columns": (1, 33, 64, 1032),
        "x_dtype": (torch.float32, torch.float16, torch.bfloat16),
        "dtype": (torch.int8, torch.float8_e4m3fn),
        "index_dtype": (torch.int32, torch.int64),
        "routing": ROUTINGS,
        "group_size": (None, 128, 50),
        "channel_scale": (False, True),
        "layout": LAYOUTS,
    }
    for row in pairwise(factors):
        yield Case(**row)


#: tokens of decode and of prefill: OLMoE and Qwen3-30B-A3B, whose experts are many and small, and Mixtral's; DeepSeek-V3's
BENCHMARK_CASES = tuple(
    Case(tokens, choices, experts, columns, dtype, layout="contiguous")
    for tokens in (1, 16, 1024)
    for choices, experts, columns in ((8, 64, 2048), (8, 128, 2048), (2, 8, 4096))
    for dtype in (torch.float32, torch.bfloat16)
) + tuple(
    Case(tokens, 8, 256, 7168, dtype=torch.float8_e4m3fn, group_size=128, layout="contiguous")
    for tokens in (1, 16, 1024)
)
