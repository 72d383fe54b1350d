"""Conversions that random bits round (cvt.rs): the ISA's rule in integers."""

import math

import numpy as np
import pytest
from floats import FORMATS, encode
from rows import by_lane, row, run, seed_of
from test_rows_cvt import interesting

pytestmark = pytest.mark.interpreted

SOURCES = "{{%a, %b, %c, %e}}"


def rounded(x, random, bits, f, satfinite, relu):
    """The ISA's words: the carry of an integer addition of random bits and the discarded bits rounds away from zero."""
    code = int(np.float32(x).view(np.uint32))
    negative, field, mantissa = code >> 31, code >> 23 & 0xFF, code & 0x7FFFFF
    if field == 0xFF:
        return encode(float(x), f, "rz", satfinite, relu)
    significand, exponent = (mantissa | 0x800000, field - 127) if field else (mantissa, -126)
    short = max(1 - f.bias - exponent, 0)  # a subnormal result drops more
    dropped = 23 - f.mantissa + short
    discarded = significand & ((1 << dropped) - 1)
    carry = ((discarded >> (dropped - bits)) + random) >> bits
    kept = (significand >> dropped) + carry
    # the leading one counts as an exponent
    result = kept + (0 if short else (exponent + f.bias - 1) << f.mantissa)
    if result > f.largest:
        result = f.largest if satfinite else f.largest + 1
    if relu and negative:
        return 0
    return result | (f.sign() if negative else 0)


def halves(op, a, b, random):
    name = op.type(-2).removesuffix("x2")
    bits = 13 if name == "f16" else 16
    mask = (1 << bits) - 1
    options = bits, FORMATS[name], op.has("satfinite"), op.has("relu")
    return np.array([rounded(x, r >> 16 & mask, *options) << 16 | rounded(y, r & mask, *options)
                     for x, y, r in zip(a, b, random.tolist())], np.uint32)  # fmt: skip


def values(count):
    """Random bits of zeros and of ones too, which carry nothing and all that they can."""

    def make(op, rng):
        a = interesting(op.type(-2)[:-2], rng, 512)
        random = rng.integers(0, 1 << 32, len(a), np.uint32)
        random[::8], random[1::8] = 0, 0xFFFFFFFF
        return [*(a[rng.permutation(len(a))] for _ in range(count)), random]

    return make


for name in ("f16x2", "bf16x2"):
    by_lane(
        f"cvt.rs.relu?.satfinite?.{name}.f32", "b32", ["f32", "f32", "b32"], halves, values=values(2), arch="sm_100a"
    )


def width(op):
    return 4 if op.type(-2) == "e2m1x4" else 8


def four(op, *arguments, randoms=None):
    """Each number with the random bits that `randoms` makes of all of them; without it, with none."""
    f = FORMATS[op.type(-2).removesuffix("x4")]
    *columns, random = arguments
    randoms = randoms or (lambda op, r: [0, 0, 0, 0])
    made = []
    for r, *numbers in zip(random.tolist(), *columns):
        code = 0
        for x, bits in zip(numbers, randoms(op, r)):
            code = code << width(op) | rounded(x, bits, 16, f, True, op.has("relu"))
        made.append(code)
    return np.array(made, np.uint16 if width(op) == 4 else np.uint32)


def neighbours(op, d, expected, *arguments):
    """Which random bits a number gets is not in the ISA's text: each is one of the two numbers around it."""
    up = four(op, *arguments, randoms=lambda op, r: [0xFFFF] * 4)
    good = np.ones(len(d), bool)
    for k in range(4):
        code, low, high = (v >> (k * width(op)) & (2 ** width(op) - 1) for v in (d, expected, up))
        good &= (code == low) | (code == high)
    return good


def reverse(bits):
    return int(f"{bits:016b}"[::-1], 2)


def our_order(op, r):
    upper, lower = r >> 16, r & 0xFFFF
    if width(op) == 4:
        upper, lower = (upper & 0xFF00) | lower >> 8, (upper & 0xFF) << 8 | (lower & 0xFF)
    return [reverse(upper), upper, reverse(lower), lower]


X4 = ("e4m3x4", "e5m2x4", "e2m3x4", "e3m2x4", "e2m1x4")
for name in X4:
    by_lane(f"cvt.rs.relu?.satfinite.{name}.f32", "b16" if name == "e2m1x4" else "b32", ["f32"] * 4 + ["b32"], four,
            values=values(4), compare=neighbours, arch="sm_100a", body=f"{{op}} %d, {SOURCES}, %f;")  # fmt: skip


@row(*(f"cvt.rs.relu?.satfinite.{name}.f32" for name in X4))
@pytest.mark.parametrize("name", X4)
def test_four_share_the_random_bits(name):
    from rows import Opcode

    op = Opcode(f"cvt.rs.satfinite.{name}.f32")
    inputs = dict(zip("abcef", values(4)(op, np.random.default_rng(seed_of(op)))))
    dtype = np.dtype(np.uint16 if width(op) == 4 else np.uint32)
    d = run(f"{op} %d, {SOURCES.format()}, %f;", inputs, dict(d=dtype), arch="sm_100a")["d"]
    assert np.array_equal(d, four(op, *inputs.values(), randoms=our_order))


@row("cvt.rs.relu?.satfinite.e4m3x4.f32")
def test_the_share_that_is_rounded_up():
    """1.03125 lies at a quarter between e4m3's 1 and 1.125: a quarter of all 16 bits rounds each of the four up."""
    r = np.arange(65536, dtype=np.uint32)
    x = np.full(len(r), 1.03125, np.float32)
    d = run(f"cvt.rs.satfinite.e4m3x4.f32 %d, {SOURCES.format()}, %f;".replace("%b", "%a").replace("%c", "%a").replace("%e", "%a"),
            dict(a=x, f=r << 16 | r), dict(d=np.dtype(np.uint32)), arch="sm_100a")["d"]  # fmt: skip
    assert all(np.count_nonzero(d >> (8 * k) & 0xFF == 0x39) == 16384 for k in range(4))


def test_spot_values():
    """By hand: the largest number of f16 and half a step more becomes infinity, or stays, as the random bits say."""
    a = np.array([65520.0, 65520.0, 65504.0, 1e9, 2.0**-25, 2.0**-25, -0.0, math.nan] * 4, np.float32)
    r = np.array([0, 0x1000, 0x1FFF, 0, 0xFFF, 0x1000, 0x1FFF, 0] * 4, np.uint32)
    body = "cvt.rs{}.f16x2.f32 %d, 0f3F800000, %a, %f;"
    expected = [0x7BFF, 0x7C00, 0x7BFF, 0x7C00, 0x0000, 0x0001, 0x8000, 0x7FFF]
    for sat in ("", ".satfinite"):
        d = run(body.format(sat), dict(a=a, f=r), dict(d=np.dtype(np.uint32)), arch="sm_100a")["d"][:8]
        finite = [min(e, 0x7BFF) if sat and e == 0x7C00 else e for e in expected]
        assert d.tolist() == [0x3C00 << 16 | e for e in finite], sat


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120"])
def test_targets(arch):
    import gpuless

    a = np.zeros(32, np.float32)
    with pytest.raises(gpuless.Finding, match=f"needs sm_100a or sm_103a, and this PTX is for {arch}:"):
        run("cvt.rs.bf16x2.f32 %d, %a, %a, 0;", dict(a=a), dict(d=np.dtype(np.uint32)), arch=arch)
