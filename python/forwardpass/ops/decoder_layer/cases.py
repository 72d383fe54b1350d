"""Shapes and options of decoder_layer, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import pairwise
from ..common.activations import GATED, PLAIN, interleave_gate_up, is_gated
from ..common.quantized_rows import E4M3, FLOATS
from ..encoder_layer import Int8Weight
from ..encoder_layer.cases import OF_ROW, STEP, TOTAL
from ..int8_linear import pack_int8_weight
from ..quantize.reference import quantize
from . import DecoderWeights, W8a16Weight, flat, reference

#: Keys that a cache has room for beyond those that a case has in it.
ROOM = 5


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  #: keys of each sequence, the new tokens included
    tokens: int
    h: int
    heads: int
    kv_heads: int
    columns: int  #: of a head
    inner: int
    layers: int = 1
    dtype: torch.dtype = torch.float32
    activation: str | None = "silu_mul"
    symmetric: bool = False
    bias: bool = False
    channel_scale: bool = False
    packed: bool = False
    scales: str | None = None  #: "row" or "group": weights alone are in 8 bits, as W8A16Linear has them; None: int8
    weight_dtype: torch.dtype = torch.int8  #: with scales
    rotated: int | None = None  #: columns; None: all; 0: none
    leftpad: bool = False
    heads_first: bool = True  #: in the memory of the caches, as transformers has them
    apart: bool = False  #: rows of x
    wide_norms: bool = True  #: in float32; False: in `dtype`

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        q, kv, batch = self.heads * self.columns, self.kv_heads * self.columns, len(self.lengths)

        def weight_only(n: int, k: int, gated: bool) -> W8a16Weight:
            group = None if self.scales == "row" else 128
            values = torch.randn(n, k, generator=g) / k**0.5
            w, scale, _ = quantize(values, self.weight_dtype, None, None, group, True, None)
            if gated:
                w, scale = (interleave_gate_up(t[: n // 2], t[n // 2 :]) for t in (w, scale))
            bias = torch.randn(n, generator=g).to(device) / 4 if self.bias else None
            return W8a16Weight(w.to(device), scale.contiguous().to(device), bias)

        def linear(n: int, k: int, gated: bool = False) -> Int8Weight | W8a16Weight:
            if self.scales is not None:
                return weight_only(n, k, gated)
            w, scale, _ = quantize(torch.randn(n, k, generator=g) / k**0.5, torch.int8, None, None, None, True, None)
            if gated:
                w, scale = (interleave_gate_up(t[: n // 2], t[n // 2 :]) for t in (w, scale))
            bias = torch.randn(n, generator=g) / 4 if self.bias else None
            total = None if self.symmetric else w.sum(1, dtype=torch.int32)
            channel = torch.rand(k, generator=g) + 0.5 if self.channel_scale else None
            packed = pack_int8_weight(w, verify=False) if self.packed and device == "cpu" else None
            on_device = [t if t is None else t.to(device) for t in (bias, total, channel, packed)]
            return Int8Weight(w.to(device), scale.to(device), *on_device)

        def norm() -> Tensor:
            return (torch.rand(self.h, generator=g) + 0.5).to(device, torch.float32 if self.wide_norms else self.dtype)

        def caches() -> list[Tensor]:
            room = max((*self.lengths, self.tokens)) + ROOM
            shape = (batch, self.kv_heads, room) if self.heads_first else (batch, room, self.kv_heads)
            values = [torch.randn(*shape, self.columns, generator=g) for _ in range(self.layers)]
            tensors = [t.to(device, self.dtype) for t in values]
            return [t.transpose(1, 2) for t in tensors] if self.heads_first else tensors

        gated = is_gated(self.activation)
        weights = [
            DecoderWeights(
                linear(q + 2 * kv, self.h), linear(self.h, q), linear(self.inner * (1 + gated), self.h, gated),
                linear(self.h, self.inner), norm(), norm(),
            )
            for _ in range(self.layers)
        ]  # fmt: skip
        x = torch.randn(batch, self.tokens, 2 * self.h if self.apart else self.h, generator=g).to(device, self.dtype)
        rotated = self.columns if self.rotated is None else self.rotated
        angles = torch.rand(batch, self.tokens, rotated // 2, generator=g).repeat(1, 1, 2) * 6
        rotary = [t.to(device) if rotated else None for t in (angles.cos(), angles.sin())]
        seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        padding = [min(i % 3, n - 1) for i, n in enumerate(self.lengths, 1)]
        leftpad = torch.tensor(padding, dtype=torch.int32, device=device).clamp(min=0) if self.leftpad else None
        return (x[..., : self.h], caches(), caches(), seq_lens, flat(weights), self.heads, *rotary, 1e-6, self.activation, None,
                leftpad, self.scales is not None)  # fmt: skip

    def bytes(self) -> int:
        """Weights, and the keys and values."""
        q, kv, gate = self.heads * self.columns, self.kv_heads * self.columns, 1 + is_gated(self.activation)
        weights = self.h * (2 * q + 2 * kv + (1 + gate) * self.inner)
        return self.layers * (weights + 2 * kv * sum(self.lengths) * self.dtype.itemsize)

    def flops(self) -> int:
        q, kv, gate = self.heads * self.columns, self.kv_heads * self.columns, 1 + is_gated(self.activation)
        products = len(self.lengths) * self.tokens * self.h * (2 * q + 2 * kv + (1 + gate) * self.inner)
        return 2 * self.layers * (products + 2 * q * self.tokens * sum(self.lengths))


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With caches of their own, of the same strides."""
    x, k_caches, v_caches, *rest = args
    return (x, [t.clone() for t in k_caches], [t.clone() for t in v_caches], *rest)


def assert_matches(actual: Tensor, after: tuple[Any, ...], args: tuple[Any, ...]) -> None:
    """actual, and the caches in `after`, are what every backend makes of args."""
    expected_args = copied(args)
    expected = reference.decoder_layer(*expected_args)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.is_contiguous()
    layers = len(args[1])
    _assert_near(actual.flatten(0, 1), expected.flatten(0, 1), layers, "the result")
    for name, i in (("k_cache", 1), ("v_cache", 2)):
        for layer, (got, want) in enumerate(zip(after[i], expected_args[i])):
            new = want.ne(args[i][layer]).flatten(2).any(2)
            assert torch.equal(got[~new], args[i][layer][~new]), f"{name} was written where no token is new"
            _assert_near(got[new].flatten(1), want[new].flatten(1), layer + 1, name)


def _assert_near(actual: Tensor, expected: Tensor, layers: int, name: str) -> None:
    """Rows, to the errors that encoder_layer's cases state."""
    got, want = actual.double(), expected.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: other rows are NaN"
    got, want = got.nan_to_num(0), want.nan_to_num(0)
    off, sizes = (got - want).norm(dim=1), want.norm(dim=1)
    if not len(off):
        return
    rounded = 2 * (STEP * torch.finfo(expected.dtype).eps) ** 0.5 if expected.dtype != torch.float32 else 0.0
    worst = (off / sizes.clamp(min=1e-30)).max().item()
    total = (off.norm() / sizes.norm().clamp(min=1e-30)).item()
    assert total <= layers * (TOTAL + rounded), (
        f"{name}: off by {total:.2e} of all values, the worst row by {worst:.2e}"
    )
    assert worst <= layers * (OF_ROW + 3 * rounded), f"{name}: the worst row is off by {worst:.2e} of its values"


def cases() -> Iterator[Case]:
    """Every pair of sizes and options: steps, few tokens and many, which go by blocks of rows; heads of attention's own kernel and
    of others; keys in several parts."""
    factors = {
        "rows": (((5,), 1), ((9, 1, 30), 1), ((20, 8), 8), ((600, 300), 2), ((40,), 40), ((33, 40, 20), 20), ((150,), 130)),
        "sizes": ((64, 4, 2, 16, 96), (96, 3, 1, 32, 80), (40, 2, 2, 24, 48)),
        "layers": (1, 2),
        "dtype": FLOATS,
        "activation": ("silu_mul", None, *PLAIN[1:3], *GATED[1:]),
        "symmetric": (False, True),
        "bias": (False, True),
        "channel_scale": (False, True),
        "packed": (False, True),
        "scales": (None, "row", None, "group"),
        "weight_dtype": (torch.int8, E4M3),
        "rotated": (None, 0, 8),
        "leftpad": (False, True),
        "heads_first": (True, False),
        "apart": (False, True),
        "wide_norms": (False, True),
    }  # fmt: skip
    for row in pairwise(factors):
        (lengths, tokens), (h, heads, kv_heads, columns, inner) = row.pop("rows"), row.pop("sizes")
        yield Case(lengths, tokens, h, heads, kv_heads, columns, inner, **row)


#: Steps, blocks of rows of which some have rows of two sequences, heads that attention_rows has no kernel for, long caches, weights
#: alone in 8 bits.
_SMALL, _WIDER = (64, 4, 2, 16, 96), (256, 4, 1, 64, 512)
THREADED_CASES = (
    Case((9, 1, 300), 1, *_SMALL, layers=2),
    Case((50, 45, 40), 40, *_SMALL, layers=2),
    Case((70, 40), 40, 40, 2, 2, 20, 48, layers=2),
    Case((50, 45, 40), 40, *_SMALL, layers=2, dtype=torch.bfloat16, leftpad=True),
    Case((2000, 1), 1, *_SMALL),
    Case((9, 1, 300), 1, *_SMALL, layers=2, scales="row"),
    Case((50, 45, 40), 40, *_SMALL, layers=2, scales="group"),
    Case((17,), 17, *_WIDER, dtype=torch.float16),
    Case((40,), 40, *_WIDER, scales="group"),
    Case((9, 4), 3, *_WIDER, scales="group", weight_dtype=E4M3),
)
#: Ten layers of SmolLM2-135M, as fewer would stay in a cache: steps of one sequence and of four, prompts.
_SMOLLM2 = (576, 9, 3, 64, 1536, 10)
BENCHMARK_CASES = (
    Case((17,), 1, *_SMOLLM2),
    Case((513,), 1, *_SMOLLM2),
    Case((513,) * 4, 1, *_SMOLLM2),
    Case((16,), 16, *_SMOLLM2),
    # of one layer: in ten of random weights the roundings that fall on the other side grow to .03 of the values, more than a
    # benchmark's guard lets through
    Case((512,), 512, *_SMOLLM2[:-1]),
)
