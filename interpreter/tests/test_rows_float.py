"""fp32, fp64, f16 and bf16: arithmetic, signs, minima, approximations, comparison and selection.

Results of one rounding are compared with exact rational arithmetic (floats.py), bit for bit.
"""

import math

import numpy as np
import pytest
import torch
from float_rows import APPROXIMATE, BOUNDS_16, PATTERNS, assert_within, values_of
from floats import FORMATS, compute, encode, flush, map_codes, value
from rows import DTYPES, Opcode, by_lane, random_values, row, run, sample, seed_of, spellings

import gpuless

pytestmark = pytest.mark.interpreted

T = -1
ROUNDINGS = ("rn", "rz", "rm", "rp")
CODES = {"f32": np.uint32, "f64": np.uint64, "f16": np.uint16, "bf16": np.uint16}


def one(type):  # f16x2 -> f16, f32x2 -> f32
    return type.removesuffix("x2")


def by_code(function, type=T):
    """A model from a function (op, format, *codes) -> code, for one value to a register or two."""

    def model(op, *columns):
        name = op.type(type)
        f = FORMATS[one(name)]
        codes = CODES[one(name)]
        if not name.endswith("x2"):
            columns = [c.view(codes) for c in columns]
            return map_codes(lambda *x: function(op, f, *x), *columns).astype(codes).view(DTYPES[name])
        pair = np.uint64 if name == "f32x2" else np.uint32
        bits, columns = pair(4 * pair().itemsize), [c.view(pair) for c in columns]
        low = map_codes(lambda *x: function(op, f, *x), *(c & ((pair(1) << bits) - pair(1)) for c in columns))
        high = map_codes(lambda *x: function(op, f, *x), *(c >> bits for c in columns))
        return (low | high << np.uint64(bits)).astype(pair)

    return model


def modifiers(op):
    return dict(mode=op.one_of(*ROUNDINGS, default="rn"), ftz=op.has("ftz"), sat=op.has("sat"), relu=op.has("relu"))


def rounded(name):
    return by_code(lambda op, f, *codes: compute(name, f, codes, **modifiers(op)))


MODES = "rn|rz|rm|rp"
for name, n in {"add": 2, "sub": 2, "mul": 2}.items():
    by_lane(f"{name}.{MODES}?.ftz?.sat?.f32", T, [T] * n, rounded(name))
    by_lane(f"{name}.{MODES}?.f64", T, [T] * n, rounded(name))
    by_lane(f"{name}.rn?.ftz?.sat?.f16|f16x2", T, [T] * n, rounded(name))
    by_lane(f"{name}.rn?.bf16|bf16x2", T, [T] * n, rounded(name))
for name in ("fma", "mad"):
    by_lane(f"{name}.{MODES}.ftz?.sat?.f32", T, [T] * 3, rounded("fma"))
    by_lane(f"{name}.{MODES}.f64", T, [T] * 3, rounded("fma"))
by_lane("fma.rn.ftz?.sat?.f16|f16x2", T, [T] * 3, rounded("fma"))
by_lane("fma.rn.ftz?.relu.f16|f16x2", T, [T] * 3, rounded("fma"))
by_lane("fma.rn.relu?.bf16|bf16x2", T, [T] * 3, rounded("fma"))
for name, n in {"div": 2, "rcp": 1, "sqrt": 1}.items():
    by_lane(f"{name}.{MODES}.ftz?.f32", T, [T] * n, rounded(name))
    by_lane(f"{name}.{MODES}.f64", T, [T] * n, rounded(name))


def out_of_bounds(op, f, a, b, c):
    return 0 if 0xFFFF in (a, b) else compute("fma", f, (a, b, c), relu=op.has("relu"))


def out_of_bounds_values(op, rng):
    columns = sample([op.type()] * 3, rng)
    for c in columns[:2]:
        c[rng.random(len(c)) < 0.2] |= 0xFFFF
    return columns


by_lane("fma.rn.oob.relu?.f16|f16x2|bf16|bf16x2", T, [T] * 3, by_code(out_of_bounds), values=out_of_bounds_values)

# ---- what a second rounding would spoil ----


@row("fma.rn.relu?.bf16|bf16x2", f"fma.{MODES}.ftz?.sat?.f32", f"fma.{MODES}.f64", "fma.rn.ftz?.sat?.f16|f16x2")
@pytest.mark.parametrize("type", ["bf16", "f16", "f32", "f64"])
def test_fma_rounds_once(type):
    """Products halfway between two numbers, and a c too small to be seen next to them, which decides."""
    f = FORMATS[type]
    rng = np.random.default_rng(1)
    n, p = 2048, rng.integers(1, f.mantissa + 1, 2048)
    # (1 + 2^-p)(1 + 2^-q) with p + q = mantissa + 1: its last bit is half a unit
    scale = [math.ldexp(rng.choice([1.0, -1.0]), int(e)) for e in rng.integers(-3, 4, n)]
    a = np.array([encode((1 + math.ldexp(1, -int(k))) * s, f) for k, s in zip(p, scale)])
    b = np.array([encode(1 + math.ldexp(1, int(k) - f.mantissa - 1), f) for k in p])
    c = np.array([int(x) | int(s) * f.sign() for x, s in zip(rng.integers(0, 4, n), rng.integers(0, 2, n))])
    a, b, c = (x.astype(CODES[type]) for x in (a, b, c))
    d = run(f"fma.rn.{type} %d, %a, %b, %c;", dict(a=a, b=b, c=c), dict(d=a.dtype))["d"]
    assert np.array_equal(d, map_codes(lambda *x: compute("fma", f, x), a, b, c))


@row("mul.rn?.bf16|bf16x2")
def test_bf16_products_that_fp32_cannot_hold():
    f = FORMATS["bf16"]
    rng = np.random.default_rng(2)
    a = (random_values("bf16", 4096, rng) & 0x807F | rng.integers(0, 130, 4096) << 7).astype(np.uint16)
    b = (random_values("bf16", 4096, rng) & 0x807F | rng.integers(0, 130, 4096) << 7).astype(np.uint16)
    d = run("mul.rn.bf16 %d, %a, %b;", dict(a=a, b=b), dict(d=a.dtype))["d"]
    assert np.array_equal(d, map_codes(lambda *x: compute("mul", f, x), a, b))


def test_subnormals_whatever_the_caller_does_with_them():
    a = np.full(512, 1e-40, np.float32)
    torch.set_flush_denormal(True)
    try:
        d = run("add.f32 %d, %a, %a;", dict(a=a), dict(d=a.dtype))["d"]
        kept = (torch.full((1,), 2.0**-126) / 2).item()
    finally:
        torch.set_flush_denormal(False)
    assert d.view(np.uint32).tolist() == [2 * int(a.view(np.uint32)[0])] * 512
    assert kept == 0, "the caller's setting must outlive the launch"


# ---- signs, minima and maxima ----


def sign_operation(op, f, a):
    if op.has("ftz") and not math.isnan(value(a, f)):
        a = encode(flush(value(a, f), f), f)
    return a & ~f.sign() if op.parts[0] == "abs" else a ^ f.sign()


def any_nan(op, result, expected, *values):
    """Signs of NaN are left open."""
    f = FORMATS[op.type()]
    nan = np.array([math.isnan(value(v, f)) for v in values[0].view(CODES[op.type()]).tolist()])
    return (result.view(CODES[op.type()]) == expected.view(CODES[op.type()])) | nan


for name in ("abs", "neg"):
    by_lane(f"{name}.ftz?.f32", T, [T], by_code(sign_operation), compare=any_nan)
    by_lane(f"{name}.f64", T, [T], by_code(sign_operation))
    by_lane(f"{name}.ftz?.f16|f16x2", T, [T], by_code(sign_operation))
    by_lane(f"{name}.bf16|bf16x2", T, [T], by_code(sign_operation))


def extreme(op, f, a, b):
    x, y = value(a, f), value(b, f)
    if op.has("ftz"):
        x, y = (flush(v, f) for v in (x, y))
    sign = (a ^ b) & f.sign()
    if op.has("xorsign"):
        x, y = abs(x), abs(y)
    nans = math.isnan(x) + math.isnan(y)
    if nans == 2 or (nans and op.has("NaN")):
        return f.nan
    if nans:
        d = y if math.isnan(x) else x
    else:
        d = (min if op.parts[0] == "min" else max)((x, y), key=lambda v: (v, math.copysign(1, v)))
    return encode(d, f) | (sign if op.has("xorsign") else 0)


for name in ("min", "max"):
    by_lane(f"{name}.ftz?.NaN?.f32", T, [T, T], by_code(extreme))
    by_lane(f"{name}.ftz?.NaN?.xorsign.abs.f32", T, [T, T], by_code(extreme))
    by_lane(f"{name}.f64", T, [T, T], by_code(extreme))
    by_lane(f"{name}.ftz?.NaN?.f16|f16x2", T, [T, T], by_code(extreme))
    by_lane(f"{name}.ftz?.NaN?.xorsign.abs.f16|f16x2", T, [T, T], by_code(extreme))
    by_lane(f"{name}.NaN?.bf16|bf16x2", T, [T, T], by_code(extreme))
    by_lane(f"{name}.NaN?.xorsign.abs.bf16|bf16x2", T, [T, T], by_code(extreme))

by_lane("copysign.f32|f64", T, [T, T], by_code(lambda op, f, a, b: a & f.sign() | b & ~f.sign()),
        compare=lambda op, d, e, *_: d.view(CODES[op.type()]) == e.view(CODES[op.type()]))  # fmt: skip


def has_property(op, a):
    least = np.finfo(a.dtype).tiny
    subnormal = (a != 0) & (np.abs(a) < least)
    return {"finite": np.isfinite(a), "infinite": np.isinf(a), "number": ~np.isnan(a), "notanumber": np.isnan(a),
            "normal": np.isfinite(a) & ~subnormal, "subnormal": subnormal}[op.type(1)]  # fmt: skip


for name in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
    by_lane(f"testp.{name}.f32|f64", "pred", [T], has_property)

# ---- approximations: exact to the final rounding without noise, within the ISA's bound with it ----


def widened(a):
    """fp32 to fp64, signalling NaN included."""
    with np.errstate(invalid="ignore"):
        return a.astype(np.float64)


@row(*PATTERNS)
@pytest.mark.parametrize("op", [Opcode(o) for p in PATTERNS for o in spellings(p)], ids=str)
def test_approximate(op):
    type = op.type()
    f = FORMATS[one(type)]
    rng = np.random.default_rng(seed_of(op))
    if type == "f32":
        a = np.concatenate([sample(["f32"], rng, 1024)[0], rng.uniform(-20, 20, 1024).astype(np.float32)])
        x = widened(a)
        relative, absolute = APPROXIMATE[op.parts[0]][1](x)
    else:
        a = np.arange(65536, dtype=np.uint16)
        x = values_of(a, f)
        relative, absolute = BOUNDS_16[op.parts[0], one(type)]
    held = (a.astype(np.uint32) | a.astype(np.uint32)[::-1] << 16) if type.endswith("x2") else a

    def results(**options):
        d = run(f"{op} %d, %a;", dict(a=held), dict(d=held.dtype), **options)["d"]
        if type.endswith("x2"):
            assert np.array_equal(d & 0xFFFF, d[::-1] >> 16)
            d = (d & 0xFFFF).astype(np.uint16)
        return d

    def numbers(d):
        return widened(d) if type == "f32" else values_of(d, f)

    exact = results(approximate=False)
    ulp = 2.0 ** -(f.mantissa + 1)
    assert_within(op, x, numbers(exact), f, 1.01 * ulp, 2e-9 if op.parts[0] in ("lg2", "sin", "cos") else 0)
    noisy = [results(approximate=True, seed=s) for s in (1, 2, 1)]
    for d in noisy:
        assert_within(op, x, numbers(d), f, relative, absolute)
    same = [np.array_equal(n.view(np.uint8), noisy[0].view(np.uint8)) for n in noisy]
    assert same == [True, False, True], "the error must follow from the seed"
    assert not np.array_equal(exact.view(np.uint8), noisy[0].view(np.uint8))


@row("div.full.ftz?.f32", "div.approx.ftz?.f32")
@pytest.mark.parametrize("op", ["div.full.f32", "div.full.ftz.f32", "div.approx.f32", "div.approx.ftz.f32"])
def test_divide(op):
    op = Opcode(op)
    rng = np.random.default_rng(seed_of(op))
    a, b = sample(["f32", "f32"], rng, 4096)
    noisy = [
        run(f"{op} %d, %a, %b;", dict(a=a, b=b), dict(d=a.dtype), approximate=s > 0, seed=s)["d"] for s in range(3)
    ]
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        least = float(np.finfo(np.float32).tiny)
        if op.has("ftz"):
            x, y = (np.where(abs(v) < least, np.copysign(0, v), v) for v in (x, y))
        q = x / y
        huge = op.has("approx") & (abs(y) > 2.0**126) & np.isfinite(y)
        q = np.where(huge, np.where(np.isfinite(x), np.copysign(0, q), np.nan), q)
        for d in noisy:
            d = d.astype(np.float64)
            good = (abs(d - q) <= 2.0**-22 * abs(q) / 2) | (d == q) | np.isnan(d) & np.isnan(q)
            good |= abs(q) < least * 1.001 if op.has("ftz") else (abs(q) < least) & (abs(d - q) <= 2.0**-149)
            good |= np.isinf(d) & (abs(q) > 3.4e38) & (np.sign(d) == np.sign(q))
            assert np.all(good), (op, a[np.argmin(good)], b[np.argmin(good)], d[np.argmin(good)])
    assert not np.array_equal(noisy[1], noisy[2])


def upper(x):
    """fp64 without the lower half of its bits, and without subnormals."""
    x = (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    return np.where(abs(x) < np.finfo(np.float64).tiny, np.copysign(0, x), x)


by_lane("rcp.approx.ftz.f64", T, [T], lambda op, a: upper(1 / upper(a)))
by_lane("rsqrt.approx.ftz.f64", T, [T], lambda op, a: upper(1 / np.sqrt(upper(a))))
by_lane("rsqrt.approx.f64", T, [T], lambda op, a: 1 / np.sqrt(a),
        compare=lambda op, d, e, a: (abs(d - e) <= 2.0**-51 * abs(e)) | (d == e) | np.isnan(e) & np.isnan(d))  # fmt: skip


# ---- fp16 and bf16 operands in fp32 arithmetic: sm_100 and later ----


def mixed(name):
    """Of the codes of the same numbers in fp32."""
    single = np.dtype(DTYPES["f32"])

    def wide(column, type):
        if column.dtype == single:
            return column.view(np.uint32)
        halves = column.astype(np.uint32) << 16 if type == "bf16" else column.view(np.float16).astype(single)
        return halves.view(np.uint32)

    def model(op, *columns):
        codes = (wide(c, op.type(T)) for c in columns)
        options = modifiers(op) | {"ftz": False, "relu": False}
        one_by_one = map_codes(lambda *x: compute(name, FORMATS["f32"], x, **options), *codes)
        return one_by_one.astype(np.uint32).view(single)

    return model


for name, sources in {"add": [T, "f32"], "sub": [T, "f32"], "fma": [T, T, "f32"]}.items():
    by_lane(f"{name}.{MODES}{'?' * (name != 'fma')}.sat?.f32.f16|bf16", "f32", sources, mixed(name), arch="sm_120")


# ---- what sm_100 and later have: pairs of fp32, and minima and maxima of three ----

LATER = [
    (f"{name}.{MODES}{'?' * (n == 2)}.ftz?.f32x2", n, rounded(name))
    for name, n in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3))
]
LATER += [
    (f"{name}.ftz?.NaN?.f32", 3, by_code(lambda op, f, a, b, c: extreme(op, f, extreme(op, f, a, b), c)))
    for name in ("min", "max")
]


@row(*(pattern for pattern, _, _ in LATER))
@pytest.mark.parametrize(("pattern", "sources", "model"), LATER, ids=lambda x: x if isinstance(x, str) else None)
def test_rows_of_later_architectures(pattern, sources, model):
    for op in map(Opcode, spellings(pattern)):
        type = op.type(T)
        columns = sample([type] * sources, np.random.default_rng(seed_of(str(op))))
        inputs = dict(zip("abc", columns))
        body = f"{op} %d, {', '.join(f'%{n}' for n in inputs)};"
        made = run(body, inputs, {"d": np.dtype(DTYPES[type])}, arch="sm_120")["d"]
        expected = model(op, *columns)
        assert np.array_equal(made.view(expected.dtype).view(np.uint8), expected.view(np.uint8)), op
        with pytest.raises(gpuless.Finding, match="needs sm_100 or higher"):
            run(body, inputs, {"d": np.dtype(DTYPES[type])})


@pytest.mark.parametrize(
    "instruction",
    ["add.f16 {h}, {h}, {h}", "fma.rn.f16x2 %d, %d, %d, %d", "max.bf16x2 %d, %d, %c", "cvt.rni.s32.f32 %d, %d",
     "cvt.f32.f16 %d, {h}", "cvt.u32.s32 %d, %c"],
)  # fmt: skip
def test_lanes_that_are_off_keep_what_they_had(instruction):
    """Of an instruction that computes every lane: what it writes may be what it reads."""
    a, c, on = sample(["b32", "b32", "pred"], np.random.default_rng(5))
    assert 0 < on.sum() < on.size
    into, out_of = "cvt.u16.u32 %half, %d;", "cvt.u32.u16 %d, %half;" * instruction.startswith("add")
    text = instruction.format(h="%half")

    def result(guard):
        body = f".reg .b16 %half; mov.b32 %d, %a; {into} {guard} {text}; {out_of}"
        return run(body, dict(a=a, c=c, on=on), dict(d=np.dtype(np.uint32)))["d"]

    kept = a & 0xFFFF if out_of else a
    assert np.array_equal(result("@%on"), np.where(on, result(""), kept))
