"""Values, patterns and bounds of floating-point instructions."""

import math

import numpy as np
from floats import flush, value

# of each function: exact value, bound as (relative, absolute) of x and the exact value
APPROXIMATE = {
    "rcp": (lambda x: 1 / x, lambda x: (2**-23, 0)),
    "sqrt": (np.sqrt, lambda x: (2**-23, 0)),
    "rsqrt": (lambda x: 1 / np.sqrt(x), lambda x: (2**-22.9, 0)),
    "sin": (np.sin, lambda x: (0, np.where(abs(x) <= 2 * np.pi, 2**-20.5, 2**-14.7))),
    "cos": (np.cos, lambda x: (0, np.where(abs(x) <= 2 * np.pi, 2**-20.5, 2**-14.7))),
    "lg2": (
        np.log2,
        lambda x: (np.where((x >= 0.5) & (x <= 2), 0, 2**-22), np.where((x >= 0.5) & (x <= 2), 2**-22.6, 0)),
    ),
    "ex2": (np.exp2, lambda x: (2**-22.5, 0)),
    "tanh": (np.tanh, lambda x: (2**-11, 0)),
}


BOUNDS_16 = {("ex2", "f16"): (2**-9.9, 0), ("ex2", "bf16"): (2**-7, 0), ("tanh", "f16"): (0, 2**-10.987),
             ("tanh", "bf16"): (0, 2**-8)}  # fmt: skip


PATTERNS = [
    "rcp.approx.ftz?.f32", "sqrt.approx.ftz?.f32", "rsqrt.approx.ftz?.f32", "sin.approx.ftz?.f32", "cos.approx.ftz?.f32",
    "lg2.approx.ftz?.f32", "ex2.approx.ftz?.f32", "tanh.approx.f32", "tanh.approx.f16|f16x2", "tanh.approx.bf16|bf16x2",
    "ex2.approx.f16|f16x2", "ex2.approx.ftz.bf16|bf16x2",
]  # fmt: skip


def values_of(codes, f):
    return np.array([value(c, f) for c in codes.tolist()])


def assert_within(op, x, d, f, relative, absolute):
    """d, numbers of format f, are the function of x within the bounds, beyond those of the format."""
    function = APPROXIMATE[op.parts[0]][0]
    with np.errstate(all="ignore"):
        if op.has("ftz"):
            x = np.array([flush(v, f) for v in x.tolist()])
        y = function(x)
        largest, least = value(f.largest, f), math.ldexp(1.0, 1 - f.bias)
        margin = abs(y) * relative + absolute
        # a subnormal result is rounded to its own steps, or flushed
        step = math.ldexp(1.0, 1 - f.bias - f.mantissa)
        margin = margin + np.where(abs(y) < least, step, 0)
        flushed = op.has("ftz") & (d == 0) & (abs(y) <= least)
        over = np.isinf(d) & (abs(y) * (1 + relative) > largest * (1 - 2.0 ** -(f.mantissa + 2)))
        good = (abs(d - y) <= margin) | (d == y) | (np.isnan(d) & np.isnan(y)) | flushed
        good |= over & (np.sign(d) == np.sign(y))
    at = int(np.argmin(good))
    assert np.all(good), f"{op} of {x[at]!r} gave {d[at]!r}, not {y[at]!r}"
