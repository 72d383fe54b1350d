"""Every documented limit of every operation, once: its last value, the one beyond, and what each backend does there.

tests/ops/test_limits.py runs them, and docs/limits.md has the table that `table()` makes of them::

    PYTHONPATH=tests/helpers python -m limits    # writes it
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matching import cases_of

from forwardpass.dispatch import BACKENDS, operations
from forwardpass.ops.attention_8bit import MAX_COLUMNS
from forwardpass.ops.common.experts import MOST_EXPERTS, MOST_ROWS
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_conv2d import MOST_DEPTHWISE_COLUMNS, MOST_SIDE
from forwardpass.ops.int8_gemm import MAX_K, MAX_K_ZERO_POINT

RIGHT, REFUSED, NAN = "right", "refused", "NaN"
BEGIN, END = "<!-- limits: written by tests/helpers/limits.py -->\n", "<!-- limits: to here -->\n"
PAGE = pathlib.Path(__file__).parents[2] / "docs/limits.md"
GPU, CPU = ("cuda", "triton"), ("cpu", "reference")


@dataclass(frozen=True)
class Limit:
    op: str
    of: str  # what is limited
    last: Any  # the last value that is right; without one it cannot be tried
    beyond: Any  # None: there is no limit, and `last` is where one might be expected
    make: Callable[[Any], tuple[Any, ...]]  # of a value: the arguments, in the schema's order
    then: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict.fromkeys(BACKENDS, REFUSED))
    refuses_last: tuple[str, ...] = ()  # backends with a narrower limit
    nan_rows: torch.Tensor | None = (
        None  # bool, broadcast over the result [..., N]: the rows that are NaN where `then` says so
    )
    tried: bool = True  # False: `last` takes too much memory
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.op}, {self.of}"


def refused_by(*backends: str) -> dict[str, str]:
    """The others compute it."""
    return {b: REFUSED if b in backends else RIGHT for b in BACKENDS}


#: What only the device knows, so that nobody can refuse it.
ON_DEVICE = dict.fromkeys(BACKENDS, NAN)


def case(op: str, **options: Any) -> tuple[Any, ...]:
    cases = cases_of(operations[op])
    return cases.Case(**options).arguments()


def replaced(op: str, args: tuple[Any, ...], **values: Any) -> tuple[Any, ...]:
    """args, the last of which may be missing, with some of them, by name, in place of theirs."""
    names = operations[op].parameters[: len(args)]
    assert values.keys() <= set(names), (op, values.keys())
    return tuple(values.get(name, a) for name, a in zip(names, args, strict=True))


# ---- integer depths: operands whose sum of products is the largest


def int8_depth(k: int) -> tuple[Any, ...]:
    args = case("int8_gemm", m=2, n=16, k=k)
    return replaced("int8_gemm", args, a=torch.full((2, k), -128, dtype=torch.int8), b=full_weight(16, k))


def convolution_depth(k: int) -> tuple[Any, ...]:
    args = case("int8_conv2d", images=(1, 1, 2), channels=k, out_channels=16, kernel=(1, 1), padding=(0, 0))
    full = {
        name: full_weight(*a.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) for name, a in zip(("x", "weight"), args)
    }
    return replaced("int8_conv2d", args, **full)


def convolution_height(side: int) -> tuple[Any, ...]:
    return case("int8_conv2d", images=(1, side, 2), channels=16, out_channels=16, kernel=(side, 1), padding=(0, 0))


def depthwise_columns(columns: int) -> tuple[Any, ...]:
    return case("int8_conv2d", images=(1, 2, columns), channels=1, out_channels=1, groups=16, kernel=(1, 2), padding=(0, 0),
                dilation=(1, columns - 1))  # fmt: skip


def full_weight(*shape: int) -> torch.Tensor:
    return torch.full(shape, -128, dtype=torch.int8)


def int8_depth_zero_point(k: int) -> tuple[Any, ...]:
    """a - a_zero_point is 255."""
    args = case("int8_gemm", m=2, n=16, k=k, epilogue=EpilogueCase(zero_point="row"))
    b = full_weight(16, k)
    return replaced(
        "int8_gemm", args, a=torch.full((2, k), 127, dtype=torch.int8), b=b, b_sum=b.sum(1, dtype=torch.int32),
        a_zero_point=torch.full((2,), -128, dtype=torch.int32),
    )  # fmt: skip


def grouped_depth(k: int) -> tuple[Any, ...]:
    args = case("int8_grouped_gemm", counts=(2, 0, 1), n=16, k=k)
    a = torch.full((args[0].shape[0], k), -128, dtype=torch.int8)
    return replaced("int8_grouped_gemm", args, a=a, b=full_weight(3, 16, k))


def grouped_depth_zero_point(k: int) -> tuple[Any, ...]:
    args = case("int8_grouped_gemm", counts=(2, 0, 1), n=16, k=k, epilogue=EpilogueCase(zero_point="row"))
    a, b = torch.full((args[0].shape[0], k), 127, dtype=torch.int8), full_weight(3, 16, k)
    zero_point = torch.full((a.shape[0],), -128, dtype=torch.int32)
    return replaced("int8_grouped_gemm", args, a=a, b=b, b_sum=b.sum(2, dtype=torch.int32), a_zero_point=zero_point)


def linear_depth(symmetric: bool) -> Callable[[int], tuple[Any, ...]]:
    return lambda k: case("int8_linear", lead=(2,), n=16, k=k, symmetric=symmetric)


# ---- experts

GROUPED = ("int8_grouped_gemm", "fp8_grouped_gemm", "w8a16_grouped_gemm")


def grouped(op: str, counts: tuple[int, ...], **options: Any) -> tuple[Any, ...]:
    return case(op, counts=counts, n=16, k=16, beyond=0, **options)


def experts_of(op: str) -> Callable[[int], tuple[Any, ...]]:
    """Some with a row, the last one among them."""
    return lambda experts: grouped(op, tuple(int(e % 100 == (experts - 1) % 100) for e in range(experts)))


def no_expert(op: str) -> Callable[[int], tuple[Any, ...]]:
    """Of one expert's arguments the first `experts`."""

    def make(experts: int) -> tuple[Any, ...]:
        args = grouped(op, (3,))
        of_each = {"b", "weight", "b_scale", "weight_scale", "offs", "bias", "b_sum"}
        few = {n: a[:experts] for n, a in zip(operations[op].parameters, args) if n in of_each and a is not None}
        return replaced(op, args, **few)

    return make


def rows_of_experts(op: str) -> Callable[[int], tuple[Any, ...]]:
    """Room for as many rows of each expert; the first expert and the last have one. What it is to have all of them, which takes
    minutes, is in tests/interpreted/test_grouped_gemm_limits.py."""
    counts = (1, *(0,) * (MOST_EXPERTS - 2), 1)
    return lambda rows: case(op, counts=counts, n=1, k=16, beyond=0, room=rows // MOST_EXPERTS)


def with_ends(op: str, ends: Callable[[Any], list[int]], **options: Any) -> Callable[[Any], tuple[Any, ...]]:
    """10 rows of 3 experts, or room for 10 of each, whose ends, or counts, are ends(value)."""

    def make(value: Any) -> tuple[Any, ...]:
        args = grouped(op, (4, 0, 6), **options)
        return replaced(op, args, offs=torch.tensor(ends(value), dtype=torch.int32))

    return make


def expert_limits() -> Iterator[Limit]:
    for op in GROUPED:
        yield Limit(op, "experts, at most", MOST_EXPERTS, MOST_EXPERTS + 1, experts_of(op))
        yield Limit(op, "experts, at least", 1, 0, no_expert(op))
        yield Limit(op, "rows, at most", MOST_ROWS, MOST_ROWS + MOST_EXPERTS, rows_of_experts(op), slow=True)
        from_end = torch.arange(10) >= 4
        yield Limit(op, "ends, at most the rows", 10, 11, with_ends(op, lambda end: [4, 4, end]), ON_DEVICE,
                    nan_rows=from_end)  # fmt: skip
        yield Limit(op, "ends, at least the one before", 4, 3, with_ends(op, lambda end: [4, end, 10]), ON_DEVICE,
                    nan_rows=torch.arange(10) >= 3)  # fmt: skip
        room = {"room": 10}
        of_second = (torch.arange(3) == 1)[:, None]
        yield Limit(op, "counts, at most max_m", 10, 11, with_ends(op, lambda n: [4, n, 6], **room), ON_DEVICE,
                    nan_rows=of_second)  # fmt: skip
        yield Limit(op, "counts, at least", 0, -1, with_ends(op, lambda n: [4, n, 6], **room), ON_DEVICE,
                    nan_rows=of_second)  # fmt: skip


# ---- attention


def attention_dims(
    make_dims: Callable[[int], tuple[int, int]], op: str = "attention", sizes: tuple[int, int] = (5, 70)
) -> Callable[[int], tuple[Any, ...]]:
    return lambda d: case(op, sizes=sizes, dims=make_dims(d), batch=1)


def meta_rows(rows: int) -> tuple[Any, ...]:
    """Of no memory: what has too many rows is refused before it is looked at."""
    args = case("attention", sizes=(1, 1), batch=1, heads=(1, 1))
    shape = (1, rows, 1, 32)
    return replaced("attention", args, **{n: torch.empty(shape, dtype=torch.float16, device="meta") for n in "qkv"})


def least_scale(op: str) -> Limit:
    """float32's least number, and what is rounded to 0. All scores are nearly 0, and a row's values their mean."""
    return Limit(op, "log2 of scale, at least", -149, -151,
                 lambda n: case(op, sizes=(5, 70), batch=1, scale=2.0**n))  # fmt: skip


def attention_heads(op: str) -> Callable[[int], tuple[Any, ...]]:
    args = case(op, sizes=(5, 70), batch=1, heads=(4, 2))
    return lambda heads: replaced(op, args, q=args[0][:, :, :heads])


def boundary(op: str, name: str, at: int) -> Callable[[int], tuple[Any, ...]]:
    """Of three packed sequences of 5 rows and 70 keys each."""
    args = case(op, sizes=(5, 70), batch=3, packed=True, awkward=False)
    cu_seqlens = args[operations[op].parameters.index(name)]

    def make(value: int) -> tuple[Any, ...]:
        changed = cu_seqlens.clone()
        changed[at] = value
        return replaced(op, args, **{name: changed})

    return make


def boundary_limits(op: str) -> Iterator[Limit]:
    """A number that falls, or the one before it, is wrong: of three sequences none is known. Otherwise the first two are."""
    every, of_last = torch.ones(15, 1, dtype=torch.bool), (torch.arange(15) >= 10)[:, None]
    for name, one, rows in (("cu_seqlens_q", 5, "rows"), ("cu_seqlens_k", 70, "keys")):
        yield Limit(op, f"{name}, at most the {rows}", 3 * one, 3 * one + 1, boundary(op, name, 3), ON_DEVICE,
                    nan_rows=of_last)  # fmt: skip
        yield Limit(
            op, f"{name}, at least the one before", one, one - 1, boundary(op, name, 2), ON_DEVICE, nan_rows=every
        )
        yield Limit(op, f"{name}, where it begins", 0, 1, boundary(op, name, 0), ON_DEVICE, nan_rows=every)
    yield Limit(op, "cu_seqlens_q, at least the rows in the end", 15, 12, boundary(op, "cu_seqlens_q", 3), ON_DEVICE,
                nan_rows=(torch.arange(15) >= 12)[:, None])  # fmt: skip


def attention_limits() -> Iterator[Limit]:
    gpu = refused_by(*GPU)
    yield Limit("attention", "head dim, at least", 32, 24, attention_dims(lambda d: (d, d)), gpu)
    yield Limit("attention", "head dim, at most", 256, 264, attention_dims(lambda d: (d, d)), gpu)
    yield Limit("attention", "head dim, a multiple of 8", 40, 36, attention_dims(lambda d: (d, d)), gpu)
    yield Limit("attention", "head dim of v beside 192", 128, 120, attention_dims(lambda d: (192, d)),
                refused_by("cpu", *GPU), refuses_last=("cpu",))  # fmt: skip
    yield Limit("attention", "heads of q, a multiple of those of k", 4, 3, attention_heads("attention"))
    yield least_scale("attention")
    yield Limit("attention", "rows or keys, at most", 2**30, 2**30 + 1, meta_rows, tried=False)
    yield from boundary_limits("attention")
    yield Limit("attention", "batch times heads, more than a grid has in y", 2**16, None,
                lambda n: case("attention", sizes=(1, 1), dims=(32, 32), batch=n // 16, heads=(16, 16), awkward=False),
                slow=True)  # fmt: skip


def attention_8bit_limits() -> Iterator[Limit]:
    op = "attention_8bit"
    columns = attention_dims(lambda d: (d, 32), op, (1, 3))
    yield Limit(op, "head dim of q and k", MAX_COLUMNS, MAX_COLUMNS + 1, columns, refuses_last=GPU)
    for limited, last, beyond in (("at least", 32, 24), ("at most", 256, 264), ("a multiple of 8", 40, 36)):
        yield Limit(op, f"head dim, {limited}", last, beyond, attention_dims(lambda d: (d, d), op), refused_by(*GPU))
    yield Limit(op, "heads of q, a multiple of those of k", 4, 3, attention_heads(op))
    yield least_scale(op)
    yield from boundary_limits(op)


# ---- the cache of keys and values


def decode(**options: Any) -> tuple[Any, ...]:
    return case("attention_decode", **{"lengths": (17, 40, 3), "heads": (2, 1), "awkward": False, **options})


def decode_limits() -> Iterator[Limit]:
    op = "attention_decode"
    yield from on_device_limits(op, decode)
    yield Limit(op, "rows of q, at least", 1, 0, decode_rows)
    yield Limit(op, "rows of q, more than decode's kernel takes together", 17, None, decode_rows)
    yield Limit(op, "head dim, at most", 256, 264, lambda d: decode(dim=d), refused_by(*GPU))
    yield Limit(op, "columns of v, at most", 256, 264, lambda d: decode(value_dim=d), refused_by(*GPU))
    yield Limit(op, "bytes of a row of the cache, a multiple of 16", 16, 8, lambda b: decode(dim=b // 2, page=None),
                refused_by("cuda"))  # fmt: skip
    yield Limit(op, "tokens of a page, at least", 1, 0, no_tokens("attention_decode", decode))
    yield Limit(op, "heads of q, a multiple of the cache's", 4, 3, decode_heads)


#: The second of three sequences, of [B, S, H].
SECOND = (torch.arange(3) == 1)[:, None, None]


def on_device_limits(op: str, make: Callable[..., tuple[Any, ...]]) -> Iterator[Limit]:
    """Of sequences' lengths and pages, which attention_decode and append_kv read alike. make(**options): arguments."""
    names = operations[op].parameters

    def of_second(name: str, **options: Any) -> Callable[[int], tuple[Any, ...]]:
        def made(value: int) -> tuple[Any, ...]:
            args = make(**options)
            changed = args[names.index(name)].clone()
            changed[1] = value
            return replaced(op, args, **{name: changed})

        return made

    def page_of_second(value: int) -> tuple[Any, ...]:
        """The page of its last token; if there is such a page, the two pages are exchanged."""
        args = make(page=16)
        k, v, table = (args[names.index(n)].clone() for n in ("k_cache", "v_cache", "block_table"))
        before = int(table[1, (40 - 1) // 16])
        if 0 <= value < len(k):
            table[table == value] = before
            for cache in (k, v):
                cache[[before, value]] = cache[[value, before]]
        table[1, (40 - 1) // 16] = value
        return replaced(op, args, k_cache=k, v_cache=v, block_table=table)

    room = make(page=None)[names.index("k_cache")].shape[1]
    pages = len(make(page=16)[names.index("k_cache")])
    nan = {"then": ON_DEVICE, "nan_rows": SECOND}
    yield Limit(op, "seq_lens, at most the rows of the cache", room, room + 1, of_second("seq_lens", page=None), **nan)
    yield Limit(op, "seq_lens, at least", 0, -1, of_second("seq_lens", page=None), **nan)
    yield Limit(op, "pages in use, at most the last one", pages - 1, pages, page_of_second, **nan)
    yield Limit(op, "pages in use, at least", 0, -1, page_of_second, **nan)
    if op == "attention_decode":
        yield Limit(op, "leftpad, at least", 0, -1, of_second("leftpad", page=None, leftpad=(1,)), **nan)


def no_tokens(op: str, make: Callable[..., tuple[Any, ...]]) -> Callable[[int], tuple[Any, ...]]:
    """Pages of one token, of which `tokens` are taken."""
    names = operations[op].parameters

    def taken(tokens: int) -> tuple[Any, ...]:
        args = make(page=1)
        return replaced(op, args, **{name: args[names.index(name)][:, :tokens] for name in ("k_cache", "v_cache")})

    return taken


def decode_rows(rows: int) -> tuple[Any, ...]:
    args = decode(rows=1)
    return replaced("attention_decode", args, q=args[0].expand(-1, rows, -1, -1) if rows else args[0][:, :0])


def decode_heads(heads: int) -> tuple[Any, ...]:
    args = decode(heads=(4, 2))
    return replaced("attention_decode", args, q=args[0][:, :, :heads])


def append(**options: Any) -> tuple[Any, ...]:
    return case("append_kv", **{"lengths": (17, 40, 3), "q_heads": 2, **options})


def append_limits() -> Iterator[Limit]:
    op = "append_kv"
    yield from on_device_limits(op, append)
    yield Limit(op, "tokens of a page, at least", 1, 0, no_tokens(op, append))
    yield Limit(op, "columns of rotary, at most D", 64, 66, rotary)
    yield Limit(op, "columns of rotary, at least", 2, 0, rotary)
    yield Limit(op, "columns of rotary, an even number", 2, 3, rotary)
    yield Limit(op, "heads, more than a grid has in y", 2**16, None,
                lambda n: case(op, lengths=(1,), heads=n, dim=8, page=None, awkward=False), slow=True)  # fmt: skip


def rotary(columns: int) -> tuple[Any, ...]:
    args = case("append_kv", lengths=(17, 40), rotary="whole")
    names = operations["append_kv"].parameters
    wide = {n: torch.cat([args[names.index(n)]] * 2, -1)[..., :columns].contiguous() for n in ("cos", "sin")}
    return replaced("append_kv", args, **wide)


# ---- rows


def row_limits() -> Iterator[Limit]:
    def group(op: str, **options: Any) -> Callable[[int], tuple[Any, ...]]:
        return lambda n: replaced(op, case(op, **options), group_size=n)

    yield Limit("quantize", "group_size, at least", 1, 0, group("quantize", shape=(3, 40)))
    yield Limit("activation_quantize", "group_size, at least", 1, 0, group("activation_quantize", shape=(3, 40)))
    yield Limit("permute_quantize", "group_size, at least", 1, 0,
                group("permute_quantize", tokens=5, choices=2, experts=4, columns=40))  # fmt: skip
    yield Limit("permute_quantize", "num_experts, at most", MOST_EXPERTS, MOST_EXPERTS + 1, num_experts)
    yield Limit("permute_quantize", "num_experts, at least", 1, 0, num_experts)
    yield Limit("permute_quantize", "choices, at most", 2**30, 2**30 + 1, meta_choices, tried=False)
    yield Limit("norm_quantize", "eps, at least", 0.0, -1e-9, eps("norm_quantize"))
    yield Limit("add_norm_quantize", "eps, at least", 0.0, -1e-9, eps("add_norm_quantize"))
    yield Limit("activation_quantize", "columns of gate and up, a multiple of 2", 32, 31, gated_halves)
    yield Limit("activation_quantize", "columns of interleaved8, a multiple of 16", 32, 24, interleaved)
    yield Limit("unpermute", "a position that is a row", -1, None, positions)
    for op in ("quantize", "norm_quantize", "add_norm_quantize", "activation_quantize"):
        yield Limit(op, "columns, of many blocks", 2**17 + 1, None, long_rows(op))


def long_rows(op: str) -> Callable[[int], tuple[Any, ...]]:
    options = {"residual": True} if op == "add_norm_quantize" else {}
    options |= {"activation": "gelu"} if op == "activation_quantize" else {}
    return lambda columns: case(op, shape=(1, columns), **options)


def num_experts(experts: int) -> tuple[Any, ...]:
    args = case("permute_quantize", tokens=5, choices=2, experts=max(experts, 1), columns=40)
    return replaced("permute_quantize", args, num_experts=experts)


def meta_choices(choices: int) -> tuple[Any, ...]:
    args = case("permute_quantize", tokens=1, choices=1, experts=4, columns=16)
    index = torch.empty(1, choices, dtype=torch.int32, device="meta")
    return replaced("permute_quantize", args, x=args[0].to("meta"), index=index)


def eps(op: str) -> Callable[[float], tuple[Any, ...]]:
    options = {"residual": True} if op == "add_norm_quantize" else {}
    return lambda value: replaced(op, case(op, shape=(3, 40), **options), eps=value)


def gated_halves(columns: int) -> tuple[Any, ...]:
    x = torch.randn(3, columns).half()
    return replaced("activation_quantize", case("activation_quantize", shape=(3, 16)), x=x)


def interleaved(columns: int) -> tuple[Any, ...]:
    x = torch.randn(3, columns).half()
    return replaced("activation_quantize", case("activation_quantize", shape=(3, 16), layout="interleaved8"), x=x)


def positions(position: int) -> tuple[Any, ...]:
    args = case("unpermute", tokens=5, choices=3, columns=40)
    there = args[1].clone()
    there[2, 1] = position
    return replaced("unpermute", args, position=there)


# ---- products


def product_limits() -> Iterator[Limit]:
    yield Limit("int8_gemm", "K", MAX_K, MAX_K + 1, int8_depth)
    yield Limit("int8_gemm", "K with a_zero_point", MAX_K_ZERO_POINT, MAX_K_ZERO_POINT + 1, int8_depth_zero_point)
    for zero_point, last in ((None, MAX_K), ("row", MAX_K_ZERO_POINT)):
        of = "K" if zero_point is None else "K with a_zero_point"
        yield Limit("int8_gemm_quantize", of, last, last + 1, quantized_depth(zero_point))
    yield Limit("int8_conv2d", "K", MAX_K, MAX_K + 1, convolution_depth)
    yield Limit("int8_conv2d", "rows of weight", MOST_SIDE, MOST_SIDE + 1, convolution_height, refused_by("cuda"))
    yield Limit("int8_conv2d", "columns of a depthwise window, dilated", MOST_DEPTHWISE_COLUMNS, MOST_DEPTHWISE_COLUMNS + 1,
                depthwise_columns, refused_by("cpu", *GPU), refuses_last=GPU)  # fmt: skip
    yield Limit("int8_linear", "K", MAX_K, MAX_K + 1, linear_depth(True))
    yield Limit("int8_linear", "K with symmetric=False", MAX_K_ZERO_POINT, MAX_K_ZERO_POINT + 1, linear_depth(False))
    yield Limit("int8_grouped_gemm", "K", MAX_K, MAX_K + 1, grouped_depth)
    yield Limit("int8_grouped_gemm", "K with a_zero_point", MAX_K_ZERO_POINT, MAX_K_ZERO_POINT + 1,
                grouped_depth_zero_point)  # fmt: skip
    for op, options in (
        ("int8_gemm", {}),
        ("int8_gemm_quantize", {"quantized": True}),
        ("fp8_gemm", {}),
        ("fp8_gemm_quantize", {"quantized": True}),
    ):
        yield Limit(op, "N with a gate, a multiple of 16", 32, 24, gated(op, **options))
    yield Limit("fp8_gemm_quantize", "group_size", 128, 64, fp8_group)
    yield Limit("dequant_activation", "N with a gate, a multiple of 16", 32, 24, gated_sums)


def quantized_depth(zero_point: str | None) -> Callable[[int], tuple[Any, ...]]:
    epilogue = EpilogueCase(zero_point=zero_point)
    return lambda k: case("int8_gemm", m=2, n=16, k=k, epilogue=epilogue, quantized=True)


def fp8_group(size: int) -> tuple[Any, ...]:
    return replaced("fp8_gemm_quantize", case("fp8_gemm", m=3, n=32, k=40, quantized=True), group_size=size)


def gated_sums(columns: int) -> tuple[Any, ...]:
    return replaced("dequant_activation", case("dequant_activation", shape=(3, columns)), activation="silu_mul")


def gated(op: str, **options: Any) -> Callable[[int], tuple[Any, ...]]:
    def make(n: int) -> tuple[Any, ...]:
        args = case(op, m=3, n=n, k=40, **options)
        return replaced(op, args, activation="silu_mul")

    return make


LIMITS = [
    *product_limits(),
    *expert_limits(),
    *row_limits(),
    *attention_limits(),
    *attention_8bit_limits(),
    *decode_limits(),
    *append_limits(),
]


def table() -> str:
    """As docs/limits.md has it."""
    backends = ("reference", "cpu", *GPU)
    lines = [f"| operation | limit | last | beyond | {' | '.join(backends)} |", "|" + "---|" * 8]
    for limit in (limit for limit in LIMITS if limit.beyond is not None):
        has = operations[limit.op].compiled
        then = [limit.then[b] if b == "reference" or b in has else "no kernel" for b in backends]
        lines.append(f"| `{limit.op}` | {limit.of} | {limit.last} | {limit.beyond} | {' | '.join(then)} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
