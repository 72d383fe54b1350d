"""Floating point formats for the tests' models, by exact rational arithmetic: nothing is shared with the interpreter."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    exponent: int
    mantissa: int
    nan: int
    infinities: bool = True
    #: every code is a number
    numbers: bool = False

    @property
    def bias(self):
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest(self):
        top = (2**self.exponent - 1) << self.mantissa  # infinity, where there is one
        if self.numbers:
            return self.sign() - 1
        return top - 1 if self.infinities else top | (2**self.mantissa - 2)

    def sign(self):
        return 1 << (self.exponent + self.mantissa)


FORMATS = {
    "f16": Format(5, 10, 0x7FFF), "bf16": Format(8, 7, 0x7FFF), "f32": Format(8, 23, 0x7FFFFFFF),
    "f64": Format(11, 52, 0x7FF8000000000000), "tf32": Format(8, 10, 0x3FFFF), "e4m3": Format(4, 3, 0x7F, infinities=False),
    "e5m2": Format(5, 2, 0x7F), "e2m1": Format(2, 1, 0x7, False, True), "e2m3": Format(2, 3, 0x1F, False, True),
    "e3m2": Format(3, 2, 0x1F, False, True),
}  # fmt: skip


def value(code, f):
    """The number behind a code, as a Python float (exact for every format here)."""
    code = int(code)
    sign = -1.0 if code & f.sign() else 1.0
    code &= f.sign() - 1
    if code > f.largest + f.infinities:
        return math.nan
    if f.infinities and code == f.largest + 1:
        return sign * math.inf
    exponent, mantissa = code >> f.mantissa, code & (2**f.mantissa - 1)
    if exponent:
        return sign * math.ldexp(2**f.mantissa + mantissa, exponent - f.bias - f.mantissa)
    return sign * math.ldexp(mantissa, 1 - f.bias - f.mantissa)


def encode(x, f, mode="rn", satfinite=False, relu=False):
    """The code of a float or a Fraction; of a zero Fraction, +0."""
    if isinstance(x, float) and math.isnan(x):
        return f.nan
    negative = math.copysign(1, x) < 0 if isinstance(x, float) else x < 0
    if relu and negative:
        return 0
    sign = f.sign() if negative else 0
    if isinstance(x, float) and math.isinf(x):
        return sign | (f.largest if satfinite else f.largest + 1 if f.infinities else f.nan)
    x = abs(Fraction(x))
    if x == 0:
        return sign
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if Fraction(2) ** exponent > x:
        exponent -= 1
    exponent = max(exponent, 1 - f.bias)
    steps = x / Fraction(2) ** (exponent - f.mantissa)
    n, rest = divmod(steps.numerator, steps.denominator)
    rest = Fraction(rest, steps.denominator)
    half = Fraction(1, 2)
    up = {"rn": rest > half or (rest == half and n & 1), "rna": rest >= half, "rz": False,
          "rm": negative and rest > 0, "rp": not negative and rest > 0}[mode]  # fmt: skip
    n += up
    # n steps at this exponent: the code counts on from the exponent's first number, into the next exponent if need be
    code = n + ((exponent + f.bias - 1) << f.mantissa)
    if code > f.largest:
        inwards = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        code = f.largest if satfinite or inwards else f.largest + 1 if f.infinities else f.nan
    return sign | code


def flush(x, f):
    """.ftz: a number below the normal ones becomes a zero of its sign."""
    return math.copysign(0.0, x) if x and abs(x) < math.ldexp(1.0, 1 - f.bias) else x


def exactly(op, args):
    """The exact result of op on finite floats: a Fraction, or a float for what has a sign of its own or is not finite."""
    if any(not math.isfinite(a) for a in args):
        with np.errstate(all="ignore"):
            a = [np.float64(x) for x in args]
            # products of finite numbers must not overflow here
            if op == "fma":
                product = a[0] * a[1] if not (np.isfinite(a[0]) and np.isfinite(a[1])) else np.float64(0)
                return float(product + a[2])
            return float({"add": lambda: a[0] + a[1], "sub": lambda: a[0] - a[1], "mul": lambda: a[0] * a[1],
                          "div": lambda: a[0] / a[1], "sqrt": lambda: np.sqrt(a[0]), "rcp": lambda: 1 / a[0]}[op]())  # fmt: skip
    x = [Fraction(a) for a in args]
    sign = [math.copysign(1.0, a) for a in args]
    if op in ("div", "rcp"):
        top, bottom = (Fraction(1), x[0]) if op == "rcp" else (x[0], x[1])
        s = sign[0] if op == "rcp" else sign[0] * sign[1]
        if bottom == 0:
            return math.nan if top == 0 else math.copysign(math.inf, s)
        return top / bottom or math.copysign(0.0, s)
    if op == "sqrt":
        if x[0] == 0:
            return args[0]
        return math.nan if x[0] < 0 else root(x[0])
    if op == "mul":
        return x[0] * x[1] or math.copysign(0.0, sign[0] * sign[1])
    if op == "sub":
        x[1], sign[1] = -x[1], -sign[1]
    a, b, s, t = (x[0] * x[1], x[2], sign[0] * sign[1], sign[2]) if op == "fma" else (x[0], x[1], sign[0], sign[1])
    if a + b == 0:
        # a sum of zeros of one sign keeps it, any other zero is +0, or -0 in rm
        return math.copysign(0.0, s) if a == 0 and s == t else None
    return a + b


def root(x):
    """A Fraction on the same side of every number of a format as the square root."""
    shift = 2 * max(0, 140 - (x.numerator.bit_length() - x.denominator.bit_length()) // 2)
    scaled = x * 2**shift
    whole = math.isqrt(scaled.numerator // scaled.denominator)
    odd = whole * whole != scaled
    return (Fraction(whole) + Fraction(int(odd), 2)) / Fraction(2) ** (shift // 2)


def compute(op, f, codes, mode="rn", ftz=False, sat=False, relu=False):
    """op on codes of format f, rounded once: what PTX says of add, sub, mul, fma, div, rcp and sqrt."""
    args = [value(c, f) for c in codes]
    if ftz:
        args = [flush(a, f) for a in args]
    x = exactly(op, args)
    if x is None:
        x = -0.0 if mode == "rm" else 0.0
    if sat:
        x = 0.0 if x != x or x <= 0 else min(x, 1)
    code = encode(x, f, mode, relu=relu)
    if ftz and not code & (f.sign() - 1) >> f.mantissa << f.mantissa:
        code &= f.sign()
    return code


def map_codes(function, *columns):
    """An array of codes from columns of codes."""
    return np.array([function(*row) for row in zip(*(c.tolist() for c in columns))], dtype=np.uint64)
