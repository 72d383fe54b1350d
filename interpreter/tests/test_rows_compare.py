"""Comparison and selection; mov of registers, vectors, constants and clocks."""

from functools import partial

import numpy as np
import pytest
from floats import FORMATS, flush, value
from rows import DTYPES, Opcode, by_lane, random_values, row, run, sample, seed_of, spellings

pytestmark = pytest.mark.interpreted

T = -1
ORDERED = "eq|ne|lt|le|gt|ge"
FLOATING = ORDERED + "|equ|neu|ltu|leu|gtu|geu|num|nan"
COMBINED = ".and|or|xor?"
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def numbers(op, type, column):
    """Values to compare: integers as they are, floats after .ftz."""
    base = type.removesuffix("x2")
    if base in ("f16", "bf16"):
        column = np.array([value(c, FORMATS[base]) for c in column.tolist()])
    if op.has("ftz"):
        column = np.array([flush(float(x), FORMATS[base]) for x in column.tolist()])
    return column


def outcome(op, type, a, b):
    name = op.parts[1]
    name = UNSIGNED.get(name, name)
    a, b = numbers(op, type, a), numbers(op, type, b)
    unordered = (a != a) | (b != b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if len(name) == 3:
        return COMPARE[name[:2]](a, b) | unordered
    return COMPARE[name](a, b) & ~unordered


def combined(op, t, c):
    boolean = op.one_of(*COMBINE)
    return COMBINE[boolean](t, c) if boolean else t


SETP = [
    f"setp.eq|ne{COMBINED}.b16|b32|b64", f"setp.{ORDERED}{COMBINED}.u16|u32|u64|s16|s32|s64",
    f"setp.lo|ls|hi|hs{COMBINED}.u16|u32|u64", f"setp.{FLOATING}{COMBINED}.ftz?.f32", f"setp.{FLOATING}{COMBINED}.f64",
    f"setp.{FLOATING}{COMBINED}.ftz?.f16|f16x2", f"setp.{FLOATING}{COMBINED}.bf16|bf16x2",
]  # fmt: skip
SET = [
    f"set.eq|ne{COMBINED}.u32|s32|f32|f16|bf16.b16|b32|b64",
    f"set.{ORDERED}{COMBINED}.u32|s32|f32|f16|bf16.u16|u32|u64|s16|s32|s64",
    f"set.lo|ls|hi|hs{COMBINED}.u32|s32|f32|f16|bf16.u16|u32|u64",
    f"set.{FLOATING}{COMBINED}.ftz?.u32|s32|f32|f16.f32", f"set.{FLOATING}{COMBINED}.bf16.f32",
    f"set.{FLOATING}{COMBINED}.u32|s32|f32|f16|bf16.f64",
    f"set.{FLOATING}{COMBINED}.ftz?.u16|s16|u32|s32|f16.f16", f"set.{FLOATING}{COMBINED}.u16|s16|u32|s32|bf16.bf16",
    f"set.{FLOATING}{COMBINED}.ftz?.u32|s32|f16x2.f16x2", f"set.{FLOATING}{COMBINED}.u32|s32|bf16x2.bf16x2",
]  # fmt: skip


def close(type, rng, n=320):
    """Pairs of which many are equal, or one apart."""
    a, b = sample([type, type], rng, n)
    equal = rng.random(n) < 0.25
    b[equal] = a[equal]
    return a, b


def of_halves(type, function, a, b):
    """function on the lower and on the upper halves of packed values, or on the values twice."""
    if not type.endswith("x2"):
        return [function(a, b)] * 2
    return [function(a & 0xFFFF, b & 0xFFFF), function(a >> 16, b >> 16)]


@row(*SETP)
@pytest.mark.parametrize("pattern", SETP)
def test_setp(pattern):
    """One kernel for every comparison of a type: its outcomes by themselves, in pairs, and combined."""
    ops = [Opcode(o) for o in spellings(pattern)]
    for type in dict.fromkeys(op.type() for op in ops):
        rng = np.random.default_rng(seed_of(type))
        a, b = close(type, rng)
        c = rng.integers(0, 2, len(a)).astype(bool)
        body, expected = [], {}
        for n, op in enumerate(o for o in ops if o.type() == type):
            boolean, packed = op.one_of(*COMBINE), type.endswith("x2")
            low, high = of_halves(type, partial(outcome, op, type), a, b)
            if not packed:
                high = ~low
            for third, with_c in ((", %c", c), (", !%c", ~c)) if boolean else (("", c),):
                p, q = f"p{n}{'n' if '!' in third else ''}", f"q{n}{'n' if '!' in third else ''}"
                expected[p] = combined(op, low, with_c)
                if type in ("f16", "bf16"):  # one outcome only
                    body.append(f"{op} %{p}, %a, %b{third};")
                    continue
                body.append(f"{op} %{p}|%{q}, %a, %b{third};")
                expected[q] = combined(op, high, with_c)
            if not packed:
                body.append(f"{op} %s{n}, %a, %b{third};")
                expected[f"s{n}"] = combined(op, low, with_c)
        result = run("\n".join(body), dict(a=a, b=b, c=c), dict.fromkeys(expected, np.dtype(bool)))
        for name, e in expected.items():
            at = int(np.argmax(result[name] != e))
            assert np.array_equal(result[name], e), (name, body, a[at], b[at], c[at])


def test_setp_refusals():
    import gpuless

    a = np.zeros(32, np.uint32)
    for op, d, operands, why in (
        ("setp.eq.f16", "%p|%q", "%h, %h", "one outcome"),
        ("setp.eq.f16x2", "%p", "%a, %a", "two outcomes"),
        ("setp.lt.b32", "%p", "%a, %a", "not known"),
        ("setp.lo.s32", "%p", "%a, %a", "not known"),
        ("setp.ltu.s32", "%p", "%a, %a", "not known"),
        ("setp.lt.and.s32", "%p", "%a, %a", "operands"),
        ("setp.lt.s32", "_", "%a, %a", "must be a register"),
        ("setp.lt.s64", "%p", "%a, %a", "size"),
    ):
        with pytest.raises(gpuless.Finding, match=why):
            run(f".reg .pred %q; .reg .b16 %h; {op} {d}, {operands};", dict(a=a), dict(p=np.dtype(bool)))


@row(*SET)
@pytest.mark.parametrize("pattern", SET)
def test_set(pattern):
    ones = {
        "f32": 0x3F800000,
        "f16": 0x3C00,
        "bf16": 0x3F80,
        "f16x2": 0x3C00,
        "bf16x2": 0x3F80,
        "u16": 0xFFFF,
        "s16": 0xFFFF,
    }
    ops = [Opcode(o) for o in spellings(pattern)]
    for type in dict.fromkeys(op.type() for op in ops):
        rng = np.random.default_rng(seed_of(type))
        a, b = close(type, rng)
        c = rng.integers(0, 2, len(a)).astype(bool)
        body, expected = [], {}
        for n, op in enumerate(o for o in ops if o.type() == type):
            to = op.type(-2)
            low, high = of_halves(type, partial(outcome, op, type), a, b)
            low, high = combined(op, low, c), combined(op, high, c)
            yes = ones.get(to, 0xFFFF if type.endswith("x2") else 0xFFFFFFFF)
            d = np.where(low, yes, 0) | (np.where(high, yes << 16, 0) if type.endswith("x2") else 0)
            body.append(f"{op} %d{n}, %a, %b{', %c' if op.one_of(*COMBINE) else ''};")
            expected[f"d{n}"] = d.astype(np.uint16 if np.dtype(DTYPES[to]).itemsize == 2 else np.uint32)
        result = run("\n".join(body), dict(a=a, b=b, c=c), {n: e.dtype for n, e in expected.items()})
        for name, e in expected.items():
            assert np.array_equal(result[name], e), (name, body)


ANY = "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64"


def bits(column):
    return column.view(f"u{column.dtype.itemsize}")


def equal_bits(op, result, expected, *_):
    return bits(result) == bits(expected)


def select(op, a, b, c):
    if op.has("ftz"):
        c = numbers(op, "f32", c)
    with np.errstate(all="ignore"):
        return np.where(c >= 0, bits(a), bits(b)).view(a.dtype)


by_lane(f"selp.{ANY}", T, [T, T, "pred"], lambda op, a, b, c: np.where(c, bits(a), bits(b)).view(a.dtype),
        compare=equal_bits)  # fmt: skip
by_lane(f"slct.{ANY}.s32", 1, [1, 1, "s32"], select, compare=equal_bits)
by_lane(f"slct.ftz?.{ANY}.f32", -2, [-2, -2, "f32"], select, compare=equal_bits)
by_lane("mov.pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", T, [T], lambda op, a: a, compare=equal_bits)


@row(f"selp.{ANY}")
def test_selp_negated():
    a, b, c = sample(["b64", "b64", "pred"], np.random.default_rng(0))
    d = run("selp.b64 %d, %a, %b, !%c;", dict(a=a, b=b, c=c), dict(d=a.dtype))["d"]
    assert np.array_equal(d, np.where(c, b, a))


# ---- mov of vectors, of clocks, of constants ----


@row("mov.pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", "mov.b128")
@pytest.mark.parametrize(("whole", "parts"), [(16, 2), (32, 2), (32, 4), (64, 2), (64, 4)])
def test_mov_vectors(whole, parts):
    size = whole // parts
    rng = np.random.default_rng(whole + parts)
    part, dtype = np.dtype(f"u{max(size, 16) // 8}"), np.dtype(f"u{whole // 8}")
    a = random_values({16: "b16", 32: "b32", 64: "b64"}[whole], 64, rng).astype(dtype)
    names = [f"d{k}" for k in range(parts)]
    small = [f"%e{k}" for k in range(parts)] if size == 8 else [f"%{n}" for n in names]
    declare = "".join(f".reg .b8 {e};" for e in small) if size == 8 else ""
    spread = "".join(f"cvt.u16.u8 %{n}, {e};" for n, e in zip(names, small)) if size == 8 else ""
    vector, backwards = ("{" + ", ".join(v) + "}" for v in (small, small[::-1]))
    body = f"{declare} mov.b{whole} {vector}, %a; {spread} mov.b{whole} %w, {backwards};"
    result = run(body, dict(a=a), {**dict.fromkeys(names, part), "w": dtype})
    elements = [a >> dtype.type(k * size) & dtype.type(2**size - 1) for k in range(parts)]
    for e, n in zip(elements, names):
        assert np.array_equal(result[n], e), n
    packed = sum(e << dtype.type((parts - 1 - k) * size) for k, e in enumerate(elements))
    assert np.array_equal(result["w"], packed.astype(dtype))


def test_mov_sinks_and_swaps():
    a, b = sample(["b32", "b32"], np.random.default_rng(1))
    body = """.reg .b64 %x;
    mov.b64 %x, {%a, %b};
    mov.b64 {_, %d}, %x;
    mov.b64 {%e, _}, %x;
    mov.b64 {%b, %a}, %x;
    mov.b32 %f, %a;
    mov.b64 %x, {5, %b}; mov.b64 {%g, _}, %x;"""
    u32 = np.dtype(np.uint32)
    result = run(body, dict(a=a, b=b), dict(d=u32, e=u32, f=u32, g=u32))
    assert np.array_equal(result["d"], b) and np.array_equal(result["e"], a) and np.array_equal(result["f"], b)
    assert np.all(result["g"] == 5)


@row("mov.b128")
def test_mov_b128():
    a, b = sample(["b64", "b64"], np.random.default_rng(2))
    body = """.reg .b128 %x; .reg .b128 %y; .reg .b32 %w0; .reg .b32 %w1; .reg .b32 %w2; .reg .b32 %w3;
    mov.b128 %x, {%a, %b};
    mov.b128 %y, %x;
    mov.b128 {%e, %d}, %y;
    mov.b128 {_, %f}, %y;
    setp.ne.b32 %p, %lane, 1;
    @%p mov.b128 %x, {%b, %a};
    mov.b128 {%g, %h}, %x;"""
    u64 = np.dtype(np.uint64)
    result = run(".reg .pred %p;" + body, dict(a=a, b=b), dict.fromkeys("defgh", u64))
    lane = np.arange(len(a)) % 32 == 1
    for name, expected in dict(d=b, e=a, f=b, g=np.where(lane, a, b), h=np.where(lane, b, a)).items():
        assert np.array_equal(result[name], expected), name


def test_mov_predicate():
    a, b = sample(["pred", "pred"], np.random.default_rng(3))
    body = "mov.pred %d, 1; @%b mov.pred %d, %a; mov.pred %e, 0; @!%b mov.pred %e, %a;"
    result = run(body, dict(a=a, b=b), dict(d=np.dtype(bool), e=np.dtype(bool)))
    assert np.array_equal(result["d"], np.where(b, a, True))
    assert np.array_equal(result["e"], np.where(b, False, a))


@pytest.mark.parametrize(
    ("name", "size"), [("clock", 32), ("clock64", 64), ("globaltimer", 64), ("globaltimer_lo", 32)]
)
def test_clocks(name, size):
    """Later is more, and a run repeats."""
    dtype = np.dtype(f"u{size // 8}")
    body = f"mov.u{size} %d, %{name}; add.u32 %lane, %lane, 1; mov.u{size} %e, %{name};"
    first, again = (run(body, dict(a=np.zeros(64, np.uint32)), dict(d=dtype, e=dtype)) for _ in range(2))
    assert np.all(first["e"] > first["d"])
    assert np.array_equal(first["d"], again["d"])


@pytest.mark.parametrize(("literal", "type"), [("0f40490FDB", "f32"), ("3.5", "f32"), ("0d400921FB54442D18", "f64"), ("-7", "s32"),
                                           ("0x8000000000000000", "b64"), ("0x3C00", "b16")])  # fmt: skip
def test_immediates(literal, type):
    bits_of = {"0f40490FDB": 0x40490FDB, "3.5": 0x40600000, "0d400921FB54442D18": 0x400921FB54442D18, "-7": 2**32 - 7}
    expected = bits_of.get(literal) or int(literal, 16)
    dtype = np.dtype(f"u{np.dtype(DTYPES[type]).itemsize}")
    d = run(f"mov.{type} %d, {literal};", dict(a=np.zeros(32, np.uint32)), dict(d=dtype))["d"]
    assert np.all(d == expected)
