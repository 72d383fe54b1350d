"""Conversions: every pair of types and every modifier; all codes of the narrow formats."""

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest
from floats import FORMATS, encode, flush, value
from rows import DTYPES, Opcode, by_lane, row, run, sample, seed_of

pytestmark = pytest.mark.interpreted

FROM, TO = -1, -2
INTEGERS = "u8|u16|u32|u64|s8|s16|s32|s64"
INTEGERS_16 = "u16|u32|u64|s16|s32|s64"
TO_INTEGRAL = "rni|rzi|rmi|rpi"
ROUNDED = "rn|rz|rm|rp"
CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def is_float(type):
    return type in FORMATS


def number(type, x):
    """The Python number of an element."""
    return value(x, FORMATS[type]) if is_float(type) else int(x)


def integral(x, mode):
    if not math.isfinite(x):
        return x
    n = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](x)  # round: ties to even
    return math.copysign(float(n), x)


def limits(type):
    n = int(type[1:])
    return (-(2 ** (n - 1)), 2 ** (n - 1) - 1) if type[0] == "s" else (0, 2**n - 1)


def convert(op, x):
    """The code, or the integer, that cvt makes of a number."""
    to, source = op.type(TO), op.type(FROM)
    mode = op.one_of("rni", "rzi", "rmi", "rpi")
    if is_float(source):
        if op.has("ftz") and source == "f32":
            x = flush(x, FORMATS["f32"])
        if mode:
            x = integral(x, mode)
    if not is_float(to):
        low, high = limits(to)
        if is_float(source):
            if math.isnan(x):
                wide = source == "f64" or to[1:] == "64"
                return 0 if not wide else low or 2 ** (int(to[1:]) - 1)
            return low if x < low else high if x > high else int(x)
        if op.has("sat"):
            return min(max(x, low), high)
        x &= 2 ** int(to[1:]) - 1
        return x - 2 ** int(to[1:]) if x > high else x
    if op.has("sat"):
        x = 0.0 if x != x or x <= 0 else min(x, 1)
    f = FORMATS[to]
    exact = x if isinstance(x, float) else Fraction(x)
    code = encode(exact, f, op.one_of("rn", "rz", "rm", "rp", default="rn"))
    if op.has("ftz") and to == "f32" and not code & 0x7F800000:
        code &= 0x80000000
    return code


def cvt(op, a):
    to, source = op.type(TO), op.type(FROM)
    codes = a.view(CODES[a.dtype.itemsize]) if is_float(source) else a
    made = [convert(op, number(source, x)) for x in codes.tolist()]
    if not is_float(to):
        return np.array(made, dtype=DTYPES[to])
    return np.array(made, dtype=CODES[np.dtype(DTYPES[to]).itemsize]).view(DTYPES[to])


def around_limits(op, rng):
    """Numbers around the limits of the destination too."""
    source, to = op.type(FROM), op.type(TO)
    a = sample([source], rng, 640)[0]
    if is_float(source) and not is_float(to):
        near = [
            s * (2.0**k + d)
            for k in (7, 8, 15, 16, 31, 32, 63, 64)
            for d in (-1.5, -1, -0.5, 0, 0.5, 1, 1.5)
            for s in (1, -1)
        ]
        codes = [encode(x, FORMATS[source]) for x in near]
        a.view(CODES[a.dtype.itemsize])[-len(codes) :] = codes
    return [a]


PATTERNS = [
    f"cvt.{INTEGERS}.{INTEGERS}", f"cvt.{TO_INTEGRAL}.ftz?.sat?.{INTEGERS}.f32", f"cvt.{TO_INTEGRAL}.sat?.{INTEGERS}.f16|f64",
    f"cvt.{TO_INTEGRAL}.{INTEGERS_16}.bf16", f"cvt.{ROUNDED}.ftz?.sat?.f32.{INTEGERS}",
    f"cvt.{ROUNDED}.sat?.f16|f64.{INTEGERS}", f"cvt.{ROUNDED}.bf16.{INTEGERS_16}", "cvt.rm|rp.ftz?.sat?.f16.f32",
    "cvt.rn|rz.ftz.sat?.f16.f32", "cvt.rn|rz.sat.f16.f32", "cvt.rm|rp.ftz?.bf16.f32", "cvt.rn|rz.ftz.bf16.f32",
    f"cvt.{ROUNDED}.sat?.f16.f64", f"cvt.{ROUNDED}.bf16.f64", f"cvt.{ROUNDED}?.bf16.f16", f"cvt.{ROUNDED}?.f16.bf16",
    f"cvt.{ROUNDED}.ftz?.sat?.f32.f64", "cvt.ftz?.sat?.f32.f16", "cvt.ftz?.sat?.f64.f32", "cvt.sat?.f64.f16",
    "cvt.ftz?.f32.bf16", "cvt.f64.bf16", f"cvt.{TO_INTEGRAL}?.ftz?.sat?.f32.f32", f"cvt.{TO_INTEGRAL}?.sat?.f64.f64",
    f"cvt.{TO_INTEGRAL}?.sat?.f16.f16", f"cvt.{TO_INTEGRAL}?.bf16.bf16",
]  # fmt: skip
for pattern in PATTERNS:
    by_lane(pattern, TO, [FROM], cvt, values=around_limits)


@row(f"cvt.sat.{INTEGERS}.{INTEGERS}")
@pytest.mark.parametrize("source", INTEGERS.split("|"))
def test_saturating(source):
    import gpuless

    for to in INTEGERS.split("|"):
        op = Opcode(f"cvt.sat.{to}.{source}")
        a = around_limits(op, np.random.default_rng(seed_of(op)))[0]
        arguments = f"{op} %d, %a;", dict(a=a), dict(d=np.dtype(DTYPES[to]))
        (low, high), (least, most) = limits(to), limits(source)
        if low <= least and most <= high:
            with pytest.raises(gpuless.Finding, match="has every number of the source"):
                run(*arguments)
        else:
            assert np.array_equal(run(*arguments)["d"], cvt(op, a)), op


@row(f"cvt.{INTEGERS}.{INTEGERS}", f"cvt.{TO_INTEGRAL}.ftz?.sat?.{INTEGERS}.f32")
def test_wider_registers():
    """A register may be wider than the type: the result fills it by its sign, and a source gives its lower bits."""
    a = sample(["s64"], np.random.default_rng(0))[0]
    x = sample(["f32"], np.random.default_rng(1))[0]
    body = """cvt.s8.s64 %d, %a; cvt.u8.u64 %e, %a; cvt.s64.s8 %f, %a; cvt.rzi.s8.f32 %g, %x; cvt.rzi.u16.f32 %h, %x;
    cvt.s16.u16 %i, %a;"""
    i64, i32 = np.dtype(np.int64), np.dtype(np.int32)
    result = run(body, dict(a=a, x=x), dict(d=i64, e=i64, f=i64, g=i32, h=i32, i=i64))
    with np.errstate(invalid="ignore"):
        whole = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0)
    low8 = a.astype(np.int8)
    expected = dict(d=low8, e=a.astype(np.uint8), f=low8, g=np.clip(whole, -128, 127), h=np.clip(whole, 0, 65535),
                    i=a.astype(np.int16))  # fmt: skip
    for name, e in expected.items():
        assert np.array_equal(result[name], e.astype(result[name].dtype)), name


# ---- f16, bf16, tf32, and the formats of 8 bits and fewer ----


def narrow(op, name, column):
    f = FORMATS[name]
    mode = op.one_of("rn", "rz", "rna", default="rn")
    made = [encode(x, f, mode, op.has("satfinite"), op.has("relu")) for x in column.astype(np.float64).tolist()]
    return np.array(made, np.uint32)


def interesting(name, rng, n=2048):
    """fp32 numbers at, halfway between and just beside those of a format, and random ones."""
    f = FORMATS[name]
    codes = rng.integers(0, f.largest, n)
    low, high = (np.array([value(c + k, f) for c in codes.tolist()], np.float64) for k in (0, 1))
    at = ((low + high) / 2).astype(np.float32)
    bits = at.view(np.uint32) + rng.integers(-1, 2, n).astype(np.uint32)
    near = np.where(rng.random(n) < 0.2, low.astype(np.float32), bits.view(np.float32)) * rng.choice([-1, 1], n).astype(
        np.float32
    )
    return np.concatenate([near, sample(["f32"], rng, 640)[0]]).astype(np.float32)


def width(name):
    """Bits that one number of two takes."""
    return 16 if name in ("f16", "bf16") else 4 if name == "e2m1" else 8


def to_narrow(op, *columns):
    name = op.type(TO).removesuffix("x2")
    codes = [narrow(op, name, c) for c in columns]
    if len(codes) == 2:
        return codes[0] << width(name) | codes[1]
    if name == "tf32":
        nan = np.isnan(columns[0])
        return np.where(nan, np.uint32(0x7FFFFFFF), codes[0] << 13)
    return codes[0]


def narrow_values(count):
    def values(op, rng):
        a = interesting(op.type(TO).removesuffix("x2"), rng)
        return [a, a[rng.permutation(len(a))]][:count]

    return values


for name in ("f16", "bf16"):
    for modifier in ("relu?.satfinite?", "satfinite.relu"):
        by_lane(f"cvt.rn|rz.{modifier}.{name}.f32", TO, ["f32"], to_narrow, values=narrow_values(1))
        by_lane(f"cvt.rn|rz.{modifier}.{name}x2.f32", TO, ["f32", "f32"], to_narrow, values=narrow_values(2))
by_lane("cvt.rna.satfinite?.tf32.f32", TO, ["f32"], to_narrow, values=narrow_values(1))
by_lane("cvt.rn.relu?.tf32.f32", TO, ["f32"], to_narrow, values=narrow_values(1))
by_lane("cvt.rz.relu?.tf32.f32", TO, ["f32"], to_narrow, values=narrow_values(1))


def half_values(op, rng):
    """All of f16, in both halves."""
    codes = np.arange(65536, dtype=np.uint32)
    return [codes | codes[::-1] << 16]


def from_halves(op, a):
    table = to_narrow(op, np.array([value(c, FORMATS["f16"]) for c in range(65536)]))
    return table[a >> 16] << width(op.type(TO).removesuffix("x2")) | table[a & 0xFFFF]


def from_narrow(op, a):
    name = op.type(FROM).removesuffix("x2")
    codes = 2 * FORMATS[name].sign()
    to = FORMATS[op.type(TO).removesuffix("x2")]
    made = [encode(value(c, FORMATS[name]), to, "rn", op.has("satfinite"), op.has("relu")) for c in range(codes)]
    table = np.array(made, np.uint32)
    return table[a >> width(name)] << 16 | table[a & (2 ** width(name) - 1)]


HALVES, BF16_HALVES = "relu?.f16x2", "relu?.satfinite?.bf16x2"
NARROW = {"arch": "sm_100a"}
NEW = {"arch": "sm_100a", "isa": "9.2"}
for name in ("e4m3x2", "e5m2x2"):
    by_lane(f"cvt.rn.satfinite.relu?.{name}.f32", TO, ["f32", "f32"], to_narrow, values=narrow_values(2))
    by_lane(f"cvt.rn.satfinite.relu?.{name}.f16x2", TO, [FROM], from_halves, values=half_values)
    for form, target in ((HALVES, {}), (BF16_HALVES, NEW)):
        by_lane(f"cvt.rn.{form}.{name}", TO, [FROM], from_narrow,
                values=lambda op, rng: [np.arange(65536, dtype=np.uint16)], **target)  # fmt: skip


# A pair of e2m1 has a register of 8 bits, which no kernel can store.
TO_BYTE = "{{.reg .b8 %code; {op} %code, %a, %b; mov.b16 %d, {{%code, 0}};}}"
FROM_BYTE = "{{.reg .b8 %code, %none; mov.b16 {{%code, %none}}, %a; {op} %d, %code;}}"
by_lane("cvt.rn.satfinite.relu?.e2m1x2.f32", TO, ["f32", "f32"], to_narrow, values=narrow_values(2), arch="sm_100a",
        body=TO_BYTE)  # fmt: skip
by_lane("cvt.rn.satfinite.relu?.e2m1x2.f16x2", TO, [FROM], from_halves, values=half_values, arch="sm_100a",
        body=TO_BYTE.replace(", %b", ""))  # fmt: skip
for form, target in ((HALVES, NARROW), (BF16_HALVES, NEW)):
    by_lane(f"cvt.rn.{form}.e2m1x2", TO, [FROM], from_narrow, values=lambda op, rng: [np.arange(256, dtype=np.uint16)],
            body=FROM_BYTE, **target)  # fmt: skip
for name in ("e2m3x2", "e3m2x2"):
    by_lane(
        f"cvt.rn.satfinite.relu?.{name}.f32", TO, ["f32", "f32"], to_narrow, values=narrow_values(2), arch="sm_100a"
    )
    for form, target in ((HALVES, NARROW), (BF16_HALVES, NEW)):
        by_lane(f"cvt.rn.{form}.{name}", TO, [FROM], from_narrow, **target,
                values=lambda op, rng: [np.add.outer(np.arange(64) << 8, np.arange(64)).ravel().astype(np.uint16)])  # fmt: skip


POWERS = [2.0 ** (code - 127) for code in range(255)]


def e8m0(op, x):
    """The code of a number's magnitude: 2^(code - 127), of NaN and, unless it saturates, of what is too large 255."""
    if math.isnan(x):
        return 255
    code = bisect.bisect_left(POWERS, abs(x)) if op.has("rp") else max(bisect.bisect_right(POWERS, abs(x)) - 1, 0)
    return min(code, 254) if op.has("satfinite") else 255 if math.isinf(x) else code


def to_e8m0(op, *columns):
    made = [np.array([e8m0(op, x) for x in c.astype(np.float64).tolist()]) for c in columns]
    return made[0] << 8 | made[1]


def halves_to_e8m0(op, a):
    table = np.array([e8m0(op, value(c, FORMATS["bf16"])) for c in range(65536)])
    return table[a >> 16] << 8 | table[a & 0xFFFF]


def near_powers(op, rng):
    bits = (np.arange(256)[:, None] << 23) + np.array([-1, 0, 1, 0x3FFFFF, 0x400000, 0x400001])
    a = (bits.astype(np.uint32) ^ (rng.integers(0, 2, bits.shape).astype(np.uint32) << 31)).view(np.float32).ravel()
    return [a, a[rng.permutation(len(a))]]


by_lane("cvt.rz|rp.satfinite?.ue8m0x2.f32", TO, ["f32", "f32"], to_e8m0, values=near_powers, arch="sm_100a")
by_lane("cvt.rz|rp.satfinite?.ue8m0x2.bf16x2", TO, [FROM], halves_to_e8m0, values=half_values, arch="sm_100a")
by_lane("cvt.rn.bf16x2.ue8m0x2", TO, [FROM],
        lambda op, a: np.array([0x40, *range(0x80, 0x7F80, 0x80), 0x7FFF], np.uint32)[np.stack([a >> 8, a & 0xFF])].T @ [65536, 1],
        values=lambda op, rng: [np.arange(65536, dtype=np.uint16)], arch="sm_100a")  # fmt: skip


def test_narrow_spot_values():
    """Known by heart, not by the model: every number of e2m1, ties between them to even, and what is beyond."""
    numbers = {0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7, 0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4,
               3.5: 6, 5.0: 6, 5.1: 7, 1e9: 7, -math.inf: 15, math.nan: 7, -0.25: 8, -6.0: 15}  # fmt: skip
    a = np.array(list(numbers) + [0.0] * (32 - len(numbers)), np.float32)
    body = TO_BYTE.format(op="cvt.rn.satfinite.e2m1x2.f32").replace("%b", "0f40C00000")
    d = run(body, dict(a=a), dict(d=np.dtype(np.uint16)), arch="sm_100a")["d"]
    assert d[: len(numbers)].tolist() == [code << 4 | 7 for code in numbers.values()]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120"])
def test_narrow_targets(arch):
    import gpuless

    a = np.zeros(32, np.float32)
    with pytest.raises(gpuless.Finding, match=f"needs sm_100a or sm_120a, and this PTX is for {arch}:"):
        run("cvt.rn.satfinite.e2m3x2.f32 %d, %a, %a;", dict(a=a), dict(d=np.dtype(np.uint16)), arch=arch)


def test_e4m3_spot_values():
    """Known by heart, not by the model: 448 is the largest, ties go to even, NaN is 0x7f, below 2^-10 is nothing."""
    cases = {448.0: 0x7E, 1e9: 0x7E, -math.inf: 0xFE, 464.0: 0x7E, 1.0: 0x38, 1.0625: 0x38, 1.1875: 0x3A, 2**-9: 0x01,
             2**-10: 0x00, 1.5 * 2**-10: 0x01, -0.0: 0x80, math.nan: 0x7F}  # fmt: skip
    a = np.array(list(cases) + [0.0] * (32 - len(cases)), np.float32)
    d = run("cvt.rn.satfinite.e4m3x2.f32 %d, %a, 0f00000000;", dict(a=a), dict(d=np.dtype(np.uint16)))["d"] >> 8
    assert d[: len(cases)].tolist() == list(cases.values())


# ---- cvt.pack ----


def pack(op, a, b, c=None):
    low, high = limits(op.type(3))
    n = int(op.type(3)[1:])
    mask = 2**n - 1
    d = (np.clip(a, low, high).astype(np.int64) & mask) << n | np.clip(b, low, high).astype(np.int64) & mask
    if c is not None:
        d |= c.astype(np.int64) << 2 * n
    return (d & 0xFFFFFFFF).astype(np.uint32)


by_lane("cvt.pack.sat.u16|s16.s32", "u32", ["s32", "s32"], pack)
by_lane("cvt.pack.sat.u8|s8|u4|s4|u2|s2.s32.b32", "u32", ["s32", "s32", "b32"], pack)
