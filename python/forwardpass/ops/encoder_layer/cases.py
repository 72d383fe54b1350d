"""Shapes and options of encoder_layer, for tests and benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import pairwise
from ..common.activations import GATED, PLAIN, interleave_gate_up, is_gated
from ..common.quantized_rows import FLOATS
from ..int8_linear import pack_int8_weight
from ..quantize.reference import quantize
from . import EncoderWeights, Int8Weight, flat, reference
from .reference import NO_WINDOW

#: A value that is within its error of a tie between two steps of its 8 bits is rounded to one of them here and to the other there.
#: Of values off by a relative e that is a share of e / STEP, each off by a STEP: together sqrt(e STEP). With fp32 between the steps
#: it is a value here and there: at most 6e-4 of all values, and 9e-3 of a row, in three seeds of these cases; with 16 bits half of
#: the bound. Without a residual, a bias or a scale, or with heads exchanged, it is .1 and more.
TOTAL, OF_ROW = 2e-3, 2e-2
#: Of 8 bits, relative to the deviation of what is rounded.
STEP = 0.024


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    h: int
    heads: int
    inner: int
    layers: int = 1
    x_dtype: torch.dtype = torch.float32
    attention_dtype: torch.dtype = torch.float32
    activation: str | None = "gelu"
    pre_norm: bool = False
    symmetric: bool = False
    bias: bool = True
    channel_scale: bool = False
    packed: bool = False
    key_lens: bool = False
    score_bias: int | None = None  #: dimensions of the bias of scores, which is longer than all sequences
    apart: bool = False  #: rows of x
    fused: bool = False  #: q, k and v
    rotated: int = 0  #: columns of a head
    rotary_apart: bool = False  #: rows of cosines and sines
    windows: tuple[int, ...] = ()  #: of the layers in turn
    first_norm: bool = True
    wide_norms: bool = True  #: in float32; False: in `x_dtype`

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)

        def linear(n: int, k: int, gated: bool = False) -> Int8Weight:
            q, scale, _ = quantize(torch.randn(n, k, generator=g) / k**0.5, torch.int8, None, None, None, True, None)
            half = n // 2
            if gated:
                q, scale = (interleave_gate_up(t[:half], t[half:]) for t in (q, scale))
            bias = torch.randn(n, generator=g) / 4 if self.bias else None
            total = None if self.symmetric else q.sum(1, dtype=torch.int32)
            channel = torch.rand(k, generator=g) + 0.5 if self.channel_scale else None
            packed = pack_int8_weight(q, verify=False) if self.packed and device == "cpu" else None
            on_device = [t if t is None else t.to(device) for t in (bias, total, channel, packed)]
            return Int8Weight(q.to(device), scale.to(device), *on_device)

        def norm() -> tuple[Tensor, Tensor | None]:
            weight, bias = torch.rand(self.h, generator=g) + 0.5, torch.randn(self.h, generator=g) / 4
            dtype = torch.float32 if self.wide_norms else self.x_dtype
            return weight.to(device, dtype), bias.to(device, dtype) if self.bias else None

        gated = is_gated(self.activation)

        def layer() -> EncoderWeights:
            q = linear(3 * self.h, self.h) if self.fused else linear(self.h, self.h)
            k, v = (None if self.fused else linear(self.h, self.h) for _ in range(2))
            out, up = linear(self.h, self.h), linear(self.inner * (1 + gated), self.h, gated)
            return EncoderWeights(q, k, v, out, up, linear(self.h, self.inner), norm(), norm())

        weights = [layer() for _ in range(self.layers)]
        x = torch.randn(sum(self.lengths), 2 * self.h if self.apart else self.h, generator=g).to(device, self.x_dtype)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)
        keys = [n - i % 3 if n > i % 3 else n for i, n in enumerate(self.lengths)]
        key_lens = torch.tensor(keys, dtype=torch.int32, device=device) if self.key_lens else None
        return (x[:, : self.h], cu_seqlens, flat(weights), self.heads, 1e-12, self.activation, self.pre_norm, None,
                self.attention_dtype, key_lens, self._score_bias(device, g), *self._rotary(device, g),
                [self.windows[i % len(self.windows)] for i in range(self.layers) if self.windows],
                self.first_norm or not self.pre_norm)  # fmt: skip

    def _rotary(self, device: str, g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer has other angles, of no regular positions."""
        if not self.rotated:
            return [], []
        cos: list[Tensor] = []
        sin: list[Tensor] = []
        for _ in range(self.layers):
            angles = torch.randn(sum(self.lengths), self.rotated, generator=g).to(device)
            for to, x in ((cos, angles.cos()), (sin, angles.sin())):
                to.append(
                    torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : self.rotated] if self.rotary_apart else x
                )
        return cos, sin

    def _score_bias(self, device: str, g: torch.Generator) -> Tensor | None:
        """With rows and heads that are not contiguous."""
        if self.score_bias is None:
            return None
        most = max(self.lengths, default=0) + 2
        bias = torch.randn(self.heads, most, most + 3, generator=g)[..., :most].to(device)
        return bias if self.score_bias == 3 else bias[None]

    def bytes(self) -> int:
        """Weights, the stream in and out of each layer, q, k and v."""
        rows, gate = sum(self.lengths), 1 + is_gated(self.activation)
        weights = self.h * (4 * self.h + (1 + gate) * self.inner)
        moved = 2 * self.h * self.x_dtype.itemsize + 2 * 3 * self.h * self.attention_dtype.itemsize
        return self.layers * (weights + rows * moved)

    def flops(self) -> int:
        rows, gate = sum(self.lengths), 1 + is_gated(self.activation)
        products = rows * self.h * (4 * self.h + (1 + gate) * self.inner)
        return 2 * self.layers * (products + 2 * self.h * sum(n * n for n in self.lengths))


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args."""
    expected = reference.encoder_layer(*args)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.is_contiguous()
    got, want = actual.double(), expected.double()
    assert torch.equal(got.isnan(), want.isnan()), "other rows are NaN"
    got, want = got.nan_to_num(0), want.nan_to_num(0)
    off, sizes = (got - want).norm(dim=1), want.norm(dim=1)
    layers = len(args[2]) // reference.LAYER
    rounded = sum((STEP * torch.finfo(t).eps) ** 0.5 for t in (expected.dtype, args[8]) if t != torch.float32)
    worst = (off / sizes.clamp(min=1e-30)).max().item() if len(off) else 0.0
    total = (off.norm() / sizes.norm().clamp(min=1e-30)).item() if len(off) else 0.0
    assert total <= layers * (TOTAL + rounded), f"off by {total:.2e} of all values, the worst row by {worst:.2e}"
    assert worst <= layers * (OF_ROW + 3 * rounded), f"the worst row is off by {worst:.2e} of its values"


def cases() -> Iterator[Case]:
    """Every pair of sizes and options: few rows, of which threads share the columns, and blocks of rows; heads of attention's own
    kernel and of torch's."""
    factors = {
        "lengths": ((5,), (1,), (33, 1, 64, 40), (150,), (7, 0, 20)),
        "sizes": ((64, 4, 256), (96, 3, 80), (24, 2, 40), (72, 1, 48)),
        "layers": (1, 2),
        "x_dtype": FLOATS,
        "attention_dtype": FLOATS,
        "activation": ("gelu", None, *PLAIN[:1], *PLAIN[2:4], *GATED),
        "pre_norm": (False, True),
        "symmetric": (False, True),
        "bias": (True, False),
        "channel_scale": (False, True),
        "packed": (False, True),
        "key_lens": (False, True),
        "score_bias": (None, 3, 4),
        "apart": (False, True),
        "fused": (False, True),
        "rotated": (0, 8, 16),
        "rotary_apart": (False, True),
        "windows": ((), (3,), (NO_WINDOW, 20), (0, NO_WINDOW)),
        "first_norm": (True, False),
        "wide_norms": (False, True),
    }
    for row in pairwise(factors):
        h, heads, inner = row.pop("sizes")
        row["rotated"] = min(row["rotated"], h // heads)
        yield Case(h=h, heads=heads, inner=inner, **row)


#: What ModernBERT's layers have that BERT's have not.
MODERN: dict[str, Any] = {"activation": "gelu_mul", "pre_norm": True, "first_norm": False, "fused": True, "rotated": 12,
                          "windows": (NO_WINDOW, 16, 16), "bias": False}  # fmt: skip
#: Few rows, blocks of them, and a number between: by blocks with one thread, and with seven a product at a time.
THREADED_CASES = (
    Case((5, 2), 64, 4, 256, layers=2),
    Case((33, 1, 64, 40), 64, 4, 256, layers=2),
    Case((90, 200, 11, 300), 96, 3, 80, layers=3, attention_dtype=torch.bfloat16, pre_norm=True),
    Case((70,), 128, 2, 512, x_dtype=torch.bfloat16, attention_dtype=torch.bfloat16, activation="gelu_mul"),
    Case((5, 2), 64, 4, 256, layers=2, score_bias=3),
    Case((90, 200, 11, 300), 96, 3, 80, layers=2, attention_dtype=torch.bfloat16, score_bias=4),
    Case((5, 2), 64, 4, 256, layers=3, **MODERN),
    Case((90, 200, 11, 300), 96, 3, 80, layers=3, attention_dtype=torch.bfloat16, **MODERN),
    # Few rows of so many columns that seven threads share them, and the heads; q, k and v quantised alike, and not.
    Case((9, 0, 7), 256, 8, 512, layers=2),
    Case(
        (9, 1, 6),
        256,
        4,
        512,
        layers=2,
        x_dtype=torch.bfloat16,
        channel_scale=True,
        score_bias=3,
        key_lens=True,
        **{**MODERN, "fused": False},
    ),
    # Of 20 columns attention is torch's.
    Case((33, 1, 64, 40), 40, 2, 64, layers=3, key_lens=True, **MODERN),
)
#: A layer of MiniLM, of BERT base.
BENCHMARK_CASES = (
    Case((16,), 384, 12, 1536),
    Case((128,) * 8, 384, 12, 1536),
    Case((128,) * 8, 768, 12, 3072),
)
