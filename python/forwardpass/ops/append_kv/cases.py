"""Shapes and options of append_kv, for tests (awkward) and benchmarks (real models); every backend writes the reference's bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import assert_equal, pairwise
from ..attention_decode.cases import LAYOUTS, SCALES, Cache, as_bytes
from ..common.cache_layout import QUANTIZED
from ..common.quantized_rows import E4M3


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (0, 1, 15, 16, 17, 33)  # with the new tokens
    tokens: int = 1
    dim: int = 64
    heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None  # of the cache, None: of k
    page: int | None = 16  # None: contiguous
    scales: str = "token"  # of an 8-bit cache, one of SCALES
    rotary: str | None = None  # or "whole", "half" of the columns, "pairs"; cos and sin of k's dtype, "float32"
    q_heads: int = 0  # 0: without q
    norm: str | None = None  # of q and k, or "k" alone; weights of k's dtype, "float32"
    value_dim: int | None = None  # Dv, None: dim
    layout: str = "contiguous"
    awkward: bool = True  # rows of zeros and of extremes, rows of k and v apart in memory

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        batch, tokens, h, d = len(self.lengths), self.tokens, self.heads, self.dim
        dims = d, self.value_dim or d
        old_k, old_v = (torch.randn(batch, max(*self.lengths, 0, 1) + 5, h, n, generator=g) for n in dims)
        cache = Cache.build(
            old_k, old_v, self.lengths, self.page, self.cache or self.dtype, self.scales, self.layout, g
        )
        k, v = (torch.randn(batch, tokens, h, n, generator=g) for n in dims)
        if self.awkward:
            for x in (k, v):
                x[..., x.shape[-1] // 3] *= 37.0
                x[:1] *= 3e-7
                x[-1:, :, -1:] = 0.0
            k, v = torch.cat((k, v), -1)[..., :d], torch.cat((k, v), -1)[..., d:]
        cos, sin = None, None
        if self.rotary is not None:
            angle = 100 * torch.rand(batch, tokens, d // (1 if "whole" in self.rotary else 2), generator=g)
            rotary_dtype = torch.float32 if "float32" in self.rotary else self.dtype
            cos, sin = angle.cos().to(rotary_dtype), angle.sin().to(rotary_dtype)
            if "one" in self.rotary:
                cos, sin = cos[:1], sin[:1]
        q = q_out = q_norm = k_norm = None
        if self.q_heads:
            q = torch.randn(batch, tokens, self.q_heads, 2 * d if self.awkward else d, generator=g).to(self.dtype)[
                ..., :d
            ]
            q_out = torch.full(q.shape, torch.nan, dtype=self.dtype)
        if self.norm is not None:
            q_norm, k_norm = (
                (1 + torch.randn(d, generator=g)).to(torch.float32 if "float32" in self.norm else self.dtype)
                for _ in "qk"
            )
            q_norm = None if q is None or self.norm == "k" else q_norm
        if cache.k_scale is not None and self.scales == "token":
            cache.k_scale.fill_(torch.nan)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        args = (k.to(self.dtype), v.to(self.dtype), cache.k, cache.v, lengths, cache.block_table, cache.k_scale, cache.v_scale,
                cos, sin, q, q_out, q_norm, k_norm, 1e-6, "pairs" in (self.rotary or ""))  # fmt: skip
        return tuple(a.to(device) if isinstance(a, Tensor) and device != "cpu" else a for a in args)

    def bytes(self) -> int:
        """Each new row, of q too, read once and written once."""
        rows = len(self.lengths) * self.tokens
        q = 2 * self.q_heads * self.dim * self.dtype.itemsize
        scale = 8 if self.cache in QUANTIZED and self.scales == "token" else 0
        dims = self.dim + (self.value_dim or self.dim)
        each = dims * (self.dtype.itemsize + (self.cache or self.dtype).itemsize) + scale
        rotary = 0 if self.rotary is None else 2 * self.dim * self.dtype.itemsize
        return rows * (self.heads * each + rotary + q)


def whole(x: Tensor) -> Tensor:
    """All of the memory behind x."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """args with a copy of what is written, its layout and what it shares kept."""
    copies: dict[int, Tensor] = {}

    def copy(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        memory = copies.setdefault(x.untyped_storage().data_ptr(), whole(x).clone())
        return memory.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())

    return tuple(copy(a) if i in WRITTEN else a for i, a in enumerate(args))


#: By their places among the arguments.
WRITTEN = {2: "k_cache", 3: "v_cache", 6: "k_scale", 7: "v_scale", 11: "q_out"}


def assert_matches(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Arguments after a call, and after the reference's: the whole memory behind what was written has the same bits."""
    for i, name in WRITTEN.items():
        if actual[i] is not None:
            got, want = (as_bytes(whole(x[i])) for x in (actual, expected))
            assert_equal(got, want, name)


def cases() -> Iterator[Case]:
    """Every pair of options; float32, a head dim of no multiple of 8, a prompt, nothing at all."""
    yield Case(dtype=torch.float32, rotary="whole", page=None)
    yield Case((40, 3), 3, 7, 3, torch.float32, page=17, layout="apart")
    yield Case((70, 3, 65), 70, 64, rotary="whole")
    yield Case((9,), 2, 12, 1, torch.float16, torch.int8, rotary="half")
    yield Case((), page=None, q_heads=2)
    yield Case((9, 70), 3, 200, 1, torch.float32, rotary="half", q_heads=3, norm="qk")
    yield Case((9, 70), 2, 72, 2, torch.float32, rotary="half pairs", q_heads=3, norm="qk")
    yield Case((4,), 1, 3, 1, torch.float16, norm="k float32")
    factors: dict[str, tuple[Any, ...]] = {
        "tokens": (1, 2, 5),
        "dim": (64, 128, 256, 40),
        "heads": (2, 1, 5),
        "types": tuple(
            (t, c) for t in (torch.bfloat16, torch.float16, torch.float32) for c in (None, torch.int8, E4M3)
        ),
        "page": (None, 16, 64, 23, 1, 6),
        "value_dim": (None, 128, 24),
        "scales": SCALES,
        "rotary": (None, "whole", "half", "whole float32", "half float32 one", "whole pairs", "half pairs float32"),
        "layout": LAYOUTS,
        "q_heads": (0, 2, 7),
        "norm": (None, "qk", "qk float32", "k"),
    }
    for row in pairwise(factors):
        dtype, cache = row.pop("types")
        yield Case(**row, dtype=dtype, cache=cache)


def real(length: int, batch: int, heads: int, dim: int = 128, **options: Any) -> Case:
    return Case((length,) * batch, 1, dim, heads, awkward=False, **options)


#: Qwen2.5-0.5B; Llama-8B with pages, and an int8 cache; Qwen3-8B, whose heads have norms
BENCHMARK_CASES = (
    real(512, 1, 2, 64, dtype=torch.float32, page=None),
    real(2048, 16, 8, rotary="whole"),
    real(2048, 16, 8, rotary="whole", cache=torch.int8),
    real(2048, 16, 8, rotary="whole", cache=torch.int8, q_heads=32, norm="qk"),
)
