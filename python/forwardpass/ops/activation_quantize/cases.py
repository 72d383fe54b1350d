"""Shapes and options of activation_quantize, for tests (awkward) and benchmarks (real layers), with the
bytes a call must move, and how close a backend has to come.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import AWKWARD_SHAPES, EMPTY_SHAPES, awkward, pairwise
from ..common.activations import GATED, LAYOUTS, PLAIN, activate, element_bound, is_gated, separate_gate_up
from ..common.quantized_rows import E4M3
from ..common.rotated_cases import ROTATIONS, assert_quantizes, group_of_blocks, whole_blocks
from . import reference


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # of q
    activation: str = "silu_mul"
    layout: str = "halves"
    x_dtype: torch.dtype = torch.float16
    dtype: torch.dtype = torch.int8
    symmetric: bool = True
    group_size: int | None = None
    channel_scale: bool = False
    rotate: int | None = None

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed + 1)
        channel = (torch.rand(self.shape[-1], generator=g) + 0.25).to(device) if self.channel_scale else None
        wide = (*self.shape[:-1], self.shape[-1] * (2 if is_gated(self.activation) else 1))
        x = awkward(wide, self.x_dtype, seed, device)
        return x, self.activation, self.dtype, self.group_size, self.layout, self.symmetric, channel, self.rotate

    def bytes(self) -> int:
        """Read once, written once."""
        n = 1
        for d in self.shape:
            n *= d
        segments = n // self.shape[-1] * -(-self.shape[-1] // (self.group_size or self.shape[-1]))
        read = self.x_dtype.itemsize * (2 if is_gated(self.activation) else 1)
        return n * (read + 1) + segments * (4 if self.symmetric else 8)


def assert_matches(actual: tuple[Tensor, Tensor, Tensor], args: tuple[Any, ...]) -> None:
    """actual is what a backend may return for args: a scale and a zero point within the activation's bound of the
    reference's, and by them each element the step of a value within that bound."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    x, activation, _, group_size, layout, _, channel_scale, rotate = args
    inputs = [t.double() for t in (separate_gate_up(x, -1, layout) if is_gated(activation) else (x,))]
    channel = 1.0 if channel_scale is None else channel_scale.double()
    values = activate(activation, *inputs) * channel
    bound = element_bound(activation, *inputs) * channel
    assert_quantizes(actual, reference.activation_quantize(*args), values, bound, group_size, rotate)


def cases(rotations: tuple[int | None, ...] = ROTATIONS) -> Iterator[Case]:
    """Every pair of options at some awkward shape; what the contract refuses is not among them."""
    factors = {
        "shape": (*AWKWARD_SHAPES, *EMPTY_SHAPES),
        "x_dtype": (torch.float32, torch.float16, torch.bfloat16),
        "activation": (*((a, "halves") for a in PLAIN), *itertools.product(GATED, LAYOUTS)),
        "quantization": ((torch.int8, True), (torch.int8, False), (E4M3, True)),
        "group_size": (None, 128, 50),
        "channel_scale": (False, True),
        "rotate": rotations,
    }
    for row in pairwise(factors):
        (activation, layout), (dtype, symmetric) = row["activation"], row["quantization"]
        *lead, n = row["shape"]
        n = -(-n // 8) * 8 if layout == "interleaved8" else n
        shape, group = whole_blocks((*lead, n), row["rotate"]), group_of_blocks(row["group_size"], row["rotate"])
        yield Case(
            shape, activation, layout, row["x_dtype"], dtype, symmetric, group, row["channel_scale"], row["rotate"]
        )


#: the inside of real MLPs, tokens x intermediate size: MiniLM (8 x 128), BERT-large, Llama-8B, Llama-70B
BENCHMARK_CASES = (
    *(Case((1024, 1536), "gelu", x_dtype=dtype, symmetric=False) for dtype in (torch.float32, torch.bfloat16)),
    Case((4096, 4096), "gelu", x_dtype=torch.bfloat16),
    *(Case((2048, 14336), "silu_mul", layout, torch.bfloat16) for layout in ("halves", "interleaved8")),
    Case((512, 28672), "silu_mul", x_dtype=torch.bfloat16),
)
