"""Shapes and options of attention and attention_with_lse, for tests (awkward) and benchmarks (real models), and how close a
backend has to come."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import assert_close, pairwise
from . import bucket, reference

#: half a unit in the last place, relative; of float32 eight, as the sums are no wider, and are in another order
ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-21}
#: of the operands; see Case.operand
LAYOUTS = ("contiguous", "transposed", "apart", "unaligned", "expanded")
#: of the mask; the letters are the axes that it has, of batch, head, row and key
MASKS = (None, "bool bhij", "bool bj", "bool ij", "float32 hij", "dtype bij", "dtype hj")
Dims = tuple[int, int]


@dataclass(frozen=True)
class Case:
    sizes: Dims  # Sq, Sk
    dims: Dims = (64, 64)  # D, Dv
    dtype: torch.dtype = torch.float16
    batch: int = 2
    heads: Dims = (2, 2)  # H, Hk
    scale: float | None = None
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    mask: str | None = None  # or one of MASKS
    alibi: str | None = None  # or "h", "bh"
    sinks: str | None = None  # or "float32", "dtype"
    packed: bool = False  # varlen: packed sequences and cu_seqlens
    cu_seqlens: tuple[tuple[int, ...], ...] = ()  # of q and of k, in place of what says where the sequences are
    layout: str = "contiguous"
    lse: bool = False
    batch_invariant: bool = False
    awkward: bool = True  # K with outliers and a bias of its channels, rows without keys, poison; else normal data

    @property
    def op(self) -> str:
        return "attention_with_lse" if self.lse else "attention"

    def lengths(self) -> list[Dims]:
        """(rows, keys) of each sequence; packed ones are of several lengths, and some have no rows or no keys."""
        if not self.packed:
            return [self.sizes] * self.batch
        (rows, keys), (more_rows, more_keys) = self.sizes, (-(-self.sizes[0] // 3), self.sizes[1] // 2 + 1)
        return [(rows, keys), (0, 7), (3, 0), (more_rows, more_keys)] if self.awkward else [self.sizes] * self.batch

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order."""
        g = torch.Generator().manual_seed(seed)
        (h, hk), (d, dv) = self.heads, self.dims
        lengths = self.lengths()
        rows, keys = (max((n[i] for n in lengths), default=self.sizes[i]) for i in (0, 1))
        q, k, v = (
            torch.randn(len(lengths), n, heads, dim, generator=g)
            for n, heads, dim in ((rows, h, d), (keys, hk, d), (keys, hk, dv))
        )
        if self.awkward:
            k += 2 * torch.randn(hk, d, generator=g)  # softmax does not see it, sums of products do
            k[..., d // 3] *= 12.0
        cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.packed:
            # Of the second sequence nobody reads the keys, of the third nobody the rows: their neighbours must not either.
            q, k, v = (self._pack(x, [n[i > 0] for n in lengths]) for i, x in enumerate((q, k, v)))
            starts = [torch.tensor([0, *n]).cumsum(0) for n in zip(*lengths)]
            of_q, of_k = map(torch.tensor, self.cu_seqlens) if self.cu_seqlens else starts
            cu_seqlens = of_q.int().to(device), of_k.int().to(device)
        q, k, v = (self.operand(x.to(self.dtype), i > 0, device) for i, x in enumerate((q, k, v)))
        slopes = 2.0 ** -(8 * torch.rand(max(1, len(lengths)), h, generator=g) + 0.5)
        sinks = 2 * torch.randn(h, generator=g) + 1
        return (
            q,
            k,
            v,
            self.scale,
            self.causal,
            *self.window,
            self.softcap,
            self._mask(g, device),
            {None: None, "h": slopes[0].to(device), "bh": slopes.to(device)}[self.alibi],
            {None: None, "float32": sinks.to(device), "dtype": sinks.to(device, self.dtype)}[self.sinks],
            *cu_seqlens,
            self.batch_invariant,
        )

    def _pack(self, x: Tensor, lengths: list[int]) -> Tensor:
        parts = [x[b, :n] for b, n in enumerate(lengths)]
        if self.awkward:
            parts[1], parts[2] = (torch.full_like(p, torch.nan) for p in parts[1:3])
        return torch.cat(parts)

    def operand(self, x: Tensor, expandable: bool, device: str) -> Tensor:
        """x [..., row, head, dim] in one of LAYOUTS, NaN in front of it, behind it, and wherever else there is room: one
        element behind the other; heads before rows; heads and rows apart, as where q, k and v come of one matrix; the same
        where nothing is a multiple of 16 bytes; and, of k and v, one for the whole batch."""
        if not self.awkward:
            return x.to(device)
        expanded = expandable and self.layout == "expanded" and x.dim() == 4
        shape = (
            *x.shape[:-3],
            *(x.shape[n] for n in ((-2, -3) if self.layout == "transposed" else (-3, -2))),
            x.shape[-1],
        )
        if expanded:
            shape = (1, *shape[1:])
        between = {"apart": 8, "unaligned": 3}.get(self.layout, 0)
        strides = [1]
        for n in shape[:0:-1]:
            strides.insert(0, strides[0] * n + between)
        first = 1 if self.layout == "unaligned" else 64
        size = strides[0] * max(1, shape[0]) + 64
        memory = torch.full((first + size,), torch.nan, dtype=x.dtype, device=device)
        y = memory.as_strided(shape, strides, first)
        if self.layout == "transposed":
            y = y.transpose(-2, -3)
        y.copy_(x[:1] if expanded else x)
        return y.expand(x.shape) if expanded else y

    def _mask(self, g: torch.Generator, device: str) -> Tensor | None:
        """The mask that the case names (one of MASKS): seven of ten keys may be attended to, by one row none."""
        if self.mask is None:
            return None
        kind, axes = self.mask.split()
        sizes = dict(zip("bhij", (self.batch, self.heads[0], *self.sizes)))
        allowed = torch.rand([sizes[a] if a in axes else 1 for a in "bhij"], generator=g) < 0.7
        if "i" in axes:
            allowed[..., self.sizes[0] // 2, :] = False
        if kind == "bool":
            return allowed.to(device)
        dtype = self.dtype if kind == "dtype" else torch.float32
        values = torch.randn(allowed.shape, generator=g).to(dtype)
        least = torch.finfo(dtype).min if dtype != torch.float16 else -torch.inf
        values[~allowed & (torch.rand(allowed.shape, generator=g) < 0.5)] = -torch.inf
        return values.masked_fill(~allowed & ~values.isneginf(), least).to(device)

    def scores(self) -> int:
        """Pairs of a row and a key, of all heads, that causal and window let through."""
        right = 0 if self.causal else self.window[1]
        total = 0
        for rows, keys in self.lengths():
            place = torch.arange(rows) + keys - rows
            first = torch.zeros_like(place) if self.window[0] is None else (place - self.window[0]).clamp(min=0)
            last = torch.full_like(place, keys - 1) if right is None else (place + right).clamp(max=keys - 1)
            total += int((last - first + 1).clamp(min=0).sum())
        return total * self.heads[0]

    def flops(self) -> int:
        """Operations of the two products, q k^T and p v."""
        return 2 * self.scores() * sum(self.dims)

    def bytes(self) -> int:
        """Each operand read once, the output written once."""
        (h, hk), (d, dv) = self.heads, self.dims
        rows, keys = (sum(n) for n in zip(*self.lengths()))
        mask = 0
        if self.mask is not None:
            kind, axes = self.mask.split()
            sizes = dict(zip("bhij", (self.batch, h, *self.sizes)))
            mask = math.prod(sizes[a] for a in axes) * {"bool": 1, "float32": 4, "dtype": self.dtype.itemsize}[kind]
        return (rows * h + keys * hk) * (d + dv) * self.dtype.itemsize + mask + 4 * rows * h * self.lse


def assert_matches(actual: Tensor | tuple[Tensor, Tensor], args: tuple[Any, ...], lse_bound: float = 1e-5) -> None:
    """actual is what a backend may return for args: o, or o and lse.

    The yardstick is the error of the same maths in plain torch at q's dtype, scores and probabilities rounded to it, against
    fp64. A kernel that keeps its scores in float32 is far below: half of it is allowed besides the rounding of o itself, on
    average and at worst. Twice it and one and a half times it are allowed with a softcap, whose tanh is of approximate
    instructions, on a GPU, whose float32 sums are not the interpreter's, and for float32, in which torch's scores are no coarser.
    The lse is within lse_bound, relative or, where it is less than 1, absolute.
    """
    o, lse = actual if isinstance(actual, tuple) else (actual, None)
    loose = o.device.type != "cpu" or args[7] > 0 or o.dtype == torch.float32
    times_max, times_mean = (2.0, 1.5) if loose else (0.5, 0.5)
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    q, wide = args[0], tuple(a.double() for a in args[:3])
    exact, exact_lse = reference.attention_with_lse(*wide, *args[3:])
    torchs, _ = functools.partial(reference.attention_with_lse, dtype=q.dtype)(*args)
    if (o.shape, o.dtype) != (exact.shape, q.dtype) or not o.is_contiguous():
        raise AssertionError(f"o: {o.dtype} {o.shape} {o.stride()}, expected {q.dtype} {exact.shape}, contiguous")
    error = (torchs.double() - exact).abs().nan_to_num()
    size = exact.abs().nan_to_num()
    if exact.numel():
        limit = times_max * error.max() + ULP[q.dtype] * size.max()
        no_keys = (exact_lse == -torch.inf) | (exact == 0).all(-1).transpose(-1, -2)  # without a sink, and with one
        bound = torch.where(no_keys.transpose(-1, -2).unsqueeze(-1), 0, limit)
        assert_close(o, exact, bound.expand_as(exact), "o")
        mean, least = (o.cpu().double() - exact).abs().nan_to_num().mean(), ULP[q.dtype] * size.mean() / 2
        if not mean <= times_mean * error.mean() + least:
            raise AssertionError(
                f"o: mean error {mean:.3e}, torch's in {q.dtype} {error.mean():.3e}, and {least:.1e} of rounding"
            )
    if lse is not None:
        if lse.dtype != torch.float32 or not lse.is_contiguous():
            raise AssertionError(f"lse: {lse.dtype} {lse.stride()}, expected torch.float32, contiguous")
        assert_close(lse, exact_lse, lse_bound * exact_lse.abs().clamp(min=1), "lse")


#: (sq, sk) and (D, Dv) of which each pair occurs: both sides of every tile and bucket
SIZES = ((1, 1), (1, 128), (3, 799), (113, 203), (239, 1), (128, 217), (256, 512), (1024, 1023))
DIMS = (*((d, d) for d in (32, 40, 64, 72, 96, 128, 192, 256)), (192, 128))


def triton_kernel(row: Mapping[str, Any]) -> dict[str, Any]:
    """What it is compiled for, as far as a row of `pairwise` tells: the bucket, the dtype, and whether scores are modified."""
    constants: dict[str, Any] = {"dtype": row["dtype"]} if "dtype" in row else {}
    if "dims" in row:
        constants["bucket"] = bucket(*row["dims"])
    plain = {"masked": (None, "packed"), "softcap": (0.0,), "alibi": (None,)}
    modified = [row[name] not in values for name, values in plain.items() if name in row]
    if any(modified) or len(modified) == len(plain):
        constants["general"] = any(modified)
    return constants


def cases(few_kernels: bool = False) -> Iterator[Case]:
    """Every pair of sizes and options. The first ones are what no kernel takes: float32, and other head dims. few_kernels: in few
    of Triton's kernels."""
    yield Case((113, 203), (64, 64), torch.float32, heads=(4, 2), causal=True, lse=True)
    yield Case(
        (128, 217), (7, 7), torch.float32, window=(9, 70), alibi="bh", sinks="float32", layout="unaligned", lse=True
    )
    yield Case((239, 1), (96, 96), torch.float32, mask="float32 bij", sinks="float32", layout="apart", lse=True)
    yield Case((3, 799), (64, 64), torch.float32, packed=True, causal=True, lse=True, layout="transposed")
    yield Case((113, 203), (320, 320), torch.bfloat16, mask="bool bhij")
    yield Case((113, 203), (576, 512), torch.bfloat16, heads=(4, 1), causal=True, lse=True)
    for n in ((0, 5), (5, 0)):
        yield Case(n, sinks="float32", lse=True)
        yield Case(n, batch=0, lse=True)
        yield Case(n, packed=True)
    # more tiles than a GPU has multiprocessors: a block of some kernels computes one after the other
    yield Case((5, 300), heads=(4, 2), batch=50, causal=True, lse=True)
    yield Case((30, 40), (128, 128), torch.bfloat16, heads=(48, 2), packed=True, lse=True)
    # groups of heads that are no power of two, and of an odd number
    yield Case((5, 70), heads=(12, 4), causal=True, lse=True)
    yield Case((9, 130), (128, 128), torch.bfloat16, batch=1, heads=(28, 4), causal=True)
    yield Case((9, 70), (64, 64), torch.float32, batch=1, heads=(28, 4), causal=True)
    factors = {
        "sizes": SIZES,
        "dims": DIMS,
        "dtype": (torch.float16, torch.bfloat16),
        "heads": ((2, 2), (3, 1), (4, 2), (6, 2)),
        "masked": (*MASKS, "packed"),  # a mask and packed sequences do not go together
        "window": ((None, None), (70, None), (None, 50), (9, 70), (0, 0)),
        "causal": (False, True),
        "softcap": (0.0, 8.0),
        "alibi": (None, "h", "bh"),
        "sinks": (None, "float32", "dtype"),
        "scale": (None, 0.3),
        "layout": LAYOUTS,
        "lse": (True, False),
        "batch_invariant": (False, True),
    }
    for row in pairwise(factors, kernels=[triton_kernel] if few_kernels else ()):
        masked = row.pop("masked")
        rows, keys = row["sizes"]
        mask, packed = (None, True) if masked == "packed" else (masked, False)
        yield Case(**row, mask=mask, packed=packed, batch=1 if rows * keys > 2**18 else 2)


def real(sizes: Dims, dim: int, batch: int, heads: Dims, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Case:
    return Case(sizes, (dim, dim), dtype, batch, heads, awkward=False, **options)


#: MiniLM (float32, and 16 bits), BERT-large without and with padding, ViT-L/16 at 384, Llama-8B's prompt, Mistral-7B's window,
#: GPT-OSS-20B
BENCHMARK_CASES = (
    real((128, 128), 32, 8, (12, 12), torch.float32),
    real((128, 128), 32, 8, (12, 12)),
    real((512, 512), 64, 1, (16, 16), lse=True),
    real((512, 512), 64, 4, (16, 16), mask="bool bj"),
    real((577, 577), 64, 4, (16, 16)),
    real((2048, 2048), 128, 1, (32, 8), causal=True),
    real((8192, 8192), 128, 1, (32, 8), causal=True, window=(4095, None)),
    real((2048, 2048), 64, 1, (64, 8), causal=True, window=(127, None), sinks="dtype"),
)
