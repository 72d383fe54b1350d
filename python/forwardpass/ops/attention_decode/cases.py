"""Shapes and options of attention_decode, for tests (awkward) and benchmarks (real models), and how close a backend has to come."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import assert_close, pairwise
from ..attention.cases import ULP
from ..common.cache_layout import QUANTIZED
from ..common.quantized_rows import E4M3, quantize_values
from . import reference

Dims = tuple[int, int]
#: of the caches; see `Cache`
LAYOUTS = ("contiguous", "apart", "heads first", "together")
SCALES = ("token", "head", "tensor")


@dataclass
class Cache:
    """Caches of sequences' keys [B, T, Hk, D] and values [B, T, Hk, Dv], what is before leftpad and beyond a sequence's length
    poisoned: NaN, or 127 and a NaN scale.

    In pages, these are in any order, those of no sequence poisoned too, and entries of the table before a sequence's first page and
    beyond its last one -1. Layouts: contiguous; rows and heads 8 elements apart; heads before rows, as caches of transformers; k
    and v in one tensor, a sequence or page of v behind each of k, as views that overlap where there are pages."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    @classmethod
    def build(
        cls, k: Tensor, v: Tensor, lengths: tuple[int, ...], page: int | None, dtype: torch.dtype, scales: str, layout: str,
        g: torch.Generator, leftpad: tuple[int, ...] = (),
    ) -> Cache:  # fmt: skip
        batch, room, heads, _ = k.shape
        dims = k.shape[-1], v.shape[-1]
        table, size = None, room
        if page is not None:
            used, size = [-(-n // page) for n in lengths], page
            pages = torch.randperm(sum(used) + 2, generator=g)
            table = torch.full((batch, max(1, -(-room // page) + 1)), -1, dtype=torch.int32)
            for b, n in enumerate(used):
                table[b, :n] = pages[sum(used[:b]) : sum(used[: b + 1])]
                table[b, : (min(leftpad[b], lengths[b]) // page if leftpad else 0)] = -1
        count = batch if page is None else sum(used) + 2
        if layout == "together":
            both = poisoned(2 * count, size, heads, max(dims), dtype=dtype)
            memory = [both[::2], both[1::2]] if table is None else [both[:-1], both[1:]]
            memory = [x[..., :dim] for x, dim in zip(memory, dims)]
            table = table if table is None else torch.where(table < 0, table, 2 * table)
        elif layout == "apart":
            memory = [poisoned(count, size, heads, dim + 16, dtype=dtype)[..., :dim] for dim in dims]
        elif layout == "heads first":
            memory = [poisoned(count, heads, size, dim, dtype=dtype).transpose(1, 2) for dim in dims]
        else:
            memory = [poisoned(count, size, heads, dim, dtype=dtype) for dim in dims]
        scale: list[Tensor | None] = [None, None]
        for i, x in enumerate((k, v)):
            if dtype not in QUANTIZED:
                stored = x.to(dtype)
            elif scales == "token":
                stored, dynamic, _ = quantize_values(x.reshape(-1, x.shape[-1]), dtype)
                scale[i] = torch.full(memory[i].shape[:3], torch.nan)
            else:
                most = x.abs().amax((0, 1, 3)) if scales == "head" else x.abs().max().reshape(1)
                static = most.clamp(min=1e-3) / (127 if dtype == torch.int8 else 448)
                stored = x / static.unsqueeze(-1)
                stored = stored.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else stored.to(dtype)
                scale[i] = static
            stored = stored.reshape(x.shape)
            for b, n in enumerate(lengths):
                begin = leftpad[b] if leftpad else 0
                for first in range(begin // size * size, n, size):
                    to = b if table is None else int(table[b, first // size])
                    rows = slice(max(first, begin), min(first + size, n))
                    there = slice(rows.start - first, rows.stop - first)
                    as_bytes(memory[i])[to, there] = as_bytes(stored)[b, rows]
                    if dtype in QUANTIZED and scales == "token":
                        scale[i][to, there] = dynamic.reshape(x.shape[:3])[b, rows]  # type: ignore[index]
        return cls(memory[0], memory[1], table, *scale)


def as_bytes(x: Tensor) -> Tensor:
    """What is assigned and compared where a dtype has no such operation."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.empty(shape, dtype=dtype)
    as_bytes(x).fill_(127 if x.element_size() == 1 else torch.nan)
    return x


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (0, 1, 15, 16, 17, 300)
    rows: int = 1  # Sq
    dim: int = 64
    heads: Dims = (4, 2)  # H, Hk
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None  # of the cache, None: of q
    page: int | None = 16  # None: contiguous
    scales: str = "token"  # of an 8-bit cache, one of SCALES
    scale: float | None = None
    window: int | None = None  # to the left
    softcap: float = 0.0
    sinks: str | None = None  # or "float32", "dtype"
    layout: str = "contiguous"
    batch_invariant: bool = False
    leftpad: tuple[int, ...] = ()  # of the first sequences, the others' being 0; none: not given
    seq_lens: tuple[int, ...] = ()  # what is given in place of lengths, which the cache has
    pages: tuple[tuple[int, int, int], ...] = ()  # (sequence, column, what the table then says there)
    value_dim: int | None = None  # Dv, None: dim
    alibi: str | None = None  # or "head", "batch": slopes of each head, or of each sequence's too
    awkward: bool = True  # K with outliers and a bias of its channels; else normal data
    lse: bool = False

    @property
    def op(self) -> str:
        return "attention_decode_with_lse" if self.lse else "attention_decode"

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        (h, hk), d, batch = self.heads, self.dim, len(self.lengths)
        room = max(*self.lengths, 0, 1) + (7 if self.awkward else 0)
        q = torch.randn(batch, self.rows, h, d, generator=g)
        k, v = (torch.randn(batch, room, hk, n, generator=g) for n in (d, self.value_dim or d))
        if self.awkward:
            k += 2 * torch.randn(hk, d, generator=g)
            k[..., d // 3] *= 12.0
        leftpad = self.paddings()
        cache = Cache.build(
            k, v, self.lengths, self.page, self.cache or self.dtype, self.scales, self.layout, g,
            tuple(max(n, 0) for n in leftpad),
        )  # fmt: skip
        for b, column, named in self.pages:
            assert cache.block_table is not None
            cache.block_table[b, column] = named
        sinks = 2 * torch.randn(h, generator=g) + 1
        slopes = torch.rand(batch, h, generator=g) / 8
        seq_lens = torch.tensor(self.seq_lens or self.lengths, dtype=torch.int32)
        return tuple(
            a.to(device) if isinstance(a, Tensor) else a
            for a in (
                q.to(self.dtype), cache.k, cache.v, seq_lens, cache.block_table,
                cache.k_scale, cache.v_scale, self.scale, self.window, None, self.softcap,
                {None: None, "float32": sinks, "dtype": sinks.to(self.dtype)}[self.sinks], self.batch_invariant,
                torch.tensor(leftpad, dtype=torch.int32) if self.leftpad else None,
                {None: None, "head": slopes.mean(0), "batch": slopes}[self.alibi],
            )
        )  # fmt: skip

    def paddings(self) -> tuple[int, ...]:
        return (*self.leftpad, *(0,) * len(self.lengths))[: len(self.lengths)]

    def keys(self) -> int:
        """Those that any row of any sequence sees."""
        most = max(self.lengths, default=0) if self.window is None else self.window + self.rows
        return sum(max(min(n - padding, most), 0) for n, padding in zip(self.lengths, self.paddings()))

    def flops(self) -> int:
        return 2 * self.keys() * self.rows * self.heads[0] * (self.dim + (self.value_dim or self.dim))

    def bytes(self) -> int:
        """Each key and value that is seen once, q and the output once."""
        dims = self.dim + (self.value_dim or self.dim)
        element = (self.cache or self.dtype).itemsize
        scale = 4 if (self.cache in QUANTIZED and self.scales == "token") else 0
        new = len(self.lengths) * self.rows * self.heads[0] * dims * self.dtype.itemsize
        return (
            self.keys() * self.heads[1] * (dims * element + 2 * scale)
            + new
            + 4 * len(self.lengths) * self.rows * self.heads[0] * self.lse
        )


def assert_matches(
    actual: Tensor | tuple[Tensor, Tensor], args: tuple[Any, ...], lse_bound: float | None = None
) -> None:
    """actual is what a backend may return for args, o, or o and lse; bounds as in attention's cases, with the same dequantised
    operands. The lse is within lse_bound, relative or, where it is less than 1, absolute; None: 1e-5, and of 8 bits what q is
    rounded to.

    The yardstick is the error of the same maths in plain torch at q's dtype; half of it is allowed besides the rounding of the
    output, twice with a softcap, on a GPU and for float32.
    """
    o, lse = actual if isinstance(actual, tuple) else (actual, None)
    loose = o.device.type != "cpu" or args[10] > 0 or o.dtype == torch.float32
    times_max, times_mean = (2.0, 1.5) if loose else (0.5, 0.5)
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    q, seq_lens, leftpad = args[0], args[3], args[13]
    exact, exact_lse = reference.attention_decode_with_lse(q.double(), *args[1:])
    torchs = functools.partial(reference.attention_decode, dtype=q.dtype)(*args)
    if (o.shape, o.dtype) != (exact.shape, q.dtype) or not o.is_contiguous():
        raise AssertionError(f"{o.dtype} {o.shape} {o.stride()}, expected {q.dtype} {exact.shape}, contiguous")
    if not exact.numel():
        return
    error, size = (torchs.double() - exact).abs().nan_to_num(), exact.abs().nan_to_num()
    # rows that see no key
    first = torch.zeros_like(seq_lens) if leftpad is None else leftpad
    none = (seq_lens[:, None] - q.shape[1] + torch.arange(q.shape[1]) < first[:, None])[:, :, None, None]
    limit = torch.where(none, 0, times_max * error.max() + ULP[q.dtype] * size.max())
    assert_close(o, exact, limit.expand_as(exact), "o")
    mean, least = (o.cpu().double() - exact).abs().nan_to_num().mean(), ULP[q.dtype] * size.mean() / 2
    if args[1].dtype in QUANTIZED:
        # A probability times a scale is rounded: one error for all columns, of which a row that sees one key has no average.
        least *= 1.5
    if not mean <= times_mean * error.mean() + least:
        raise AssertionError(
            f"o: mean error {mean:.3e}, torch's in {q.dtype} {error.mean():.3e}, and {least:.1e} of rounding"
        )
    if lse is not None:
        if lse.dtype != torch.float32 or not lse.is_contiguous():
            raise AssertionError(f"lse: {lse.dtype} {lse.stride()}, expected torch.float32, contiguous")
        if lse_bound is None:
            lse_bound = 4e-3 if args[1].dtype in QUANTIZED and q.dtype != torch.float32 else 1e-5
        assert_close(lse, exact_lse, lse_bound * exact_lse.abs().clamp(min=1), "lse")


SOME = (0, 1, 15, 16, 17, 300)
#: of a batch, each
LENGTHS = (SOME, (5000,), (130, 0, 4095), (17,))
#: none; of SOME's sequences: nothing, all, more than all, in a block of keys, at the edge of one, beyond it
LEFTPADS = ((), (0, 1, 16, 7, 16, 260), (64, 0, 2100), (16, 3))
FACTORS: dict[str, tuple[Any, ...]] = {
    "lengths": LENGTHS,
    "rows": (1, 2, 5, 8, 19),
    "dim": (64, 128, 256, 40),
    "value_dim": (None, 128, 24),
    "heads": ((2, 2), (6, 2), (8, 1), (32, 2)),
    "types": tuple((t, c) for t in (torch.bfloat16, torch.float16) for c in (None, torch.int8, E4M3)),
    "page": (None, 16, 64, 256, 23, 1, 6),
    "scales": SCALES,
    "layout": LAYOUTS,
    "scale": (None, 0.3),
    "window": (None, 70, 0),
    "softcap": (0.0, 8.0),
    "sinks": (None, "float32", "dtype"),
    "batch_invariant": (False, True),
    "leftpad": LEFTPADS,
    "alibi": (None, "head", "batch"),
}


def cases() -> Iterator[Case]:
    """Every pair of sizes and options; and what no kernel of a GPU takes: float32, head dims of no multiple of 8."""
    yield Case(dtype=torch.float32, rows=2, sinks="float32")
    yield Case((4095, 3), dtype=torch.float32, cache=torch.int8, page=None, heads=(8, 1), dim=128)
    yield Case((130, 1), 3, 7, (6, 3), torch.float32, page=17, layout="apart", window=9)
    yield Case((1000, 20), 8, 320, (2, 1), page=64)
    yield Case((300, 40, 9), 40, 48, (3, 1), torch.float32, page=3, value_dim=20, alibi="batch", sinks="float32")
    yield Case((), page=None)
    yield Case((0, 0), 3)
    yield Case((300, 300, 300), dim=64, heads=(9, 3), page=None, layout="heads first", leftpad=(0, 35, 299))
    for row in pairwise(FACTORS):
        dtype, cache = row.pop("types")
        yield Case(**row, dtype=dtype, cache=cache)


def real(
    length: int, batch: int, heads: Dims, dim: int = 128, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Case:
    options = {"page": None, **options}
    return Case((length,) * batch, 1, dim, heads, dtype, awkward=False, **options)


#: Qwen2.5-0.5B, Llama-8B (also with pages, and 8-bit caches), Llama-2-7B without GQA, GPT-OSS-20B's window
BENCHMARK_CASES = (
    real(2048, 1, (14, 2), 64, torch.float32),
    real(2048, 1, (32, 8)),
    real(2048, 16, (32, 8)),
    real(2048, 16, (32, 8), page=16),
    real(2048, 1, (32, 8), cache=torch.int8),
    real(2048, 16, (32, 8), cache=torch.int8, scales="tensor"),
    real(2048, 1, (32, 8), cache=E4M3, scales="head"),
    real(2048, 1, (32, 32)),
    real(2048, 16, (32, 8), page=16, lse=True),
    real(2048, 4, (64, 8), 64, window=127, sinks="dtype"),
)
