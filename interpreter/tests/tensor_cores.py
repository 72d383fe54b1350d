"""Models of the tensor cores, written from the PTX ISA's figures and formulas: element formats, which element of a matrix a
lane holds, and how fp8 products are added."""

import math

import numpy as np
import torch

BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1, "s32": 4, "f64": 8}
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
INTEGERS = {"s8": np.int8, "u8": np.uint8, "s32": np.int32}


def encode(values, type):
    """The bits of numbers, as unsigned integers of the type's size."""
    if type in INTEGERS:
        return np.asarray(values).astype(INTEGERS[type]).view(UNSIGNED[BYTES[type]])
    if type in TORCH:
        bits = torch.from_numpy(np.asarray(values, np.float32)).to(TORCH[type]).view(torch.uint8).numpy()
        return bits.view(UNSIGNED[BYTES[type]])
    return np.asarray(values, np.float64 if type == "f64" else np.float32).view(UNSIGNED[BYTES[type]])


def decode(bits, type):
    """The numbers behind bits, as float64 (integers: int64)."""
    bits = np.ascontiguousarray(bits)
    if type in INTEGERS:
        return bits.view(INTEGERS[type]).astype(np.int64)
    if type in TORCH:
        return torch.from_numpy(bits.view(np.uint8)).view(TORCH[type]).to(torch.float64).numpy()
    if type == "tf32":
        bits = bits & np.uint32(0xFFFFE000)  # the lower bits are not looked at
    with np.errstate(invalid="ignore"):  # NaN that signal
        return bits.view(np.float64 if type == "f64" else np.float32).astype(np.float64)


def random_matrix(rng, shape, type, exact):
    """Numbers at random. exact: small integers, of which every sum is exact in fp32 and f16."""
    if type == "s32":
        return rng.integers(-(2**31), 2**31, shape)
    if type in INTEGERS:
        return rng.integers(0 if type == "u8" else -128, 256 if type == "u8" else 128, shape)
    if exact:
        return rng.integers(-3, 4, shape).astype(np.float64)
    return rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, shape))


# ---- which element a lane holds: ISA 9.7.14.5.1 to 9.7.14.5.13; g = lane / 4, t = lane % 4, i counts a lane's elements ----


def a_element(m, k, type, g, t, i):
    if type == "f64":
        return (g, t) if m == 8 else (g + 8 * (i % 2), t + 4 * (i // 2))
    per = 4 // BYTES[type]  # elements of a register
    register, within = i // per, i % per
    return g + (8 * (register % 2) if m == 16 else 0), t * per + within + 4 * per * (register // 2)


def b_element(k, type, g, t, i):
    if type == "f64":
        return t + 4 * i, g
    per = 4 // BYTES[type]
    return t * per + i % per + 4 * per * (i // per), g


def c_element(g, t, i):
    return g + 8 * (i // 2), 2 * t + i % 2


def fragments(matrix, type, element, count):
    """Registers [count / elements of one][32 lanes] of a matrix of bits."""
    bits = np.empty((32, count), UNSIGNED[BYTES[type]])
    for lane in range(32):
        for i in range(count):
            bits[lane, i] = matrix[element(lane // 4, lane % 4, i)]
    return np.ascontiguousarray(bits.view(np.uint64 if type == "f64" else np.uint32).T)


def matrix_of(registers, type, element, shape):
    """The matrix of bits that registers hold."""
    bits = np.ascontiguousarray(registers.T).view(UNSIGNED[BYTES[type]])
    matrix = np.zeros(shape, bits.dtype)
    for lane in range(32):
        for i in range(bits.shape[1]):
            matrix[element(lane // 4, lane % 4, i)] = bits[lane, i]
    return matrix


def mma_shape(op):
    m, rest = op.split(".")[3][1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


def types_of(op):
    """Those of D, A, B and C."""
    return op.removesuffix(".satfinite").split(".")[-4:]


def mma_elements(op):
    """name of a matrix -> (its type, its shape, which element a lane holds)"""
    d_type, a_type, b_type, _ = types_of(op)
    m, n, k = mma_shape(op)
    return {
        "a": (a_type, (m, k), lambda g, t, i: a_element(m, k, a_type, g, t, i)),
        "b": (b_type, (k, n), lambda g, t, i: b_element(k, b_type, g, t, i)),
        "c": (d_type, (m, n), c_element),
    }


def mma_operands(op, a, b, c):
    """(body, inputs, outputs) for rows.kernel, of warps of matrices of bits: a [warps][m][k] and so on."""
    inputs, lists = {}, {}
    for (name, (type, (rows, columns), element)), matrices in zip(mma_elements(op).items(), (a, b, c)):
        registers = np.stack([fragments(x, type, element, rows * columns // 32) for x in matrices])
        for r in range(registers.shape[1]):
            inputs[f"{name}{r}"] = np.ascontiguousarray(registers[:, r].reshape(-1))
        lists[name] = "{" + ", ".join(f"%{name}{r}" for r in range(registers.shape[1])) + "}"
    outputs = {x.replace("c", "d"): t.dtype for x, t in inputs.items() if x[0] == "c"}
    d = "{" + ", ".join(f"%{x}" for x in outputs) + "}"
    return f"{op} {d}, {lists['a']}, {lists['b']}, {lists['c']};", inputs, outputs


def mma_matrices(op, name, registers):
    """The inverse for one of a, b and c, which is d too: matrices of bits [warps][rows][columns]."""
    type, shape, element = mma_elements(op)[name]
    by_warp = np.stack([v.reshape(-1, 32) for v in registers], axis=1)
    return np.stack([matrix_of(x, type, element, shape) for x in by_warp])


# ---- products ----


def product(a, b, c, d_type, satfinite=False):
    """A B + C of decoded numbers, exact, then rounded once to bits of d_type."""
    total = a @ b + c
    if d_type == "s32":
        total = np.clip(total, -(2**31), 2**31 - 1) if satfinite else total
        return total.astype(np.int64).astype(np.uint32)
    return encode(total, d_type)


def error_bound(a, b, c, d_type):
    """How far a sum in fp32, rounded to d_type at its end, may be from the exact one."""
    magnitude = np.abs(a) @ np.abs(b) + np.abs(c)
    bound = magnitude * (a.shape[1] + 1) * 2.0**-24
    return bound + (np.abs(a @ b + c) * 2.0**-11 + 2.0**-25 if d_type == "f16" else 0)


def significand_and_exponent(x, least):
    """x = significand * 2^exponent with 1 <= |significand| < 2; subnormal numbers have the least exponent, zero -126."""
    if x == 0:
        return 0.0, -126
    m, e = math.frexp(x)
    m, e = 2 * m, e - 1
    return (m, e) if e >= least else (m * 2.0 ** (e - least), least)


LEAST = {"e4m3": -6, "e5m2": -14, "f16": -14, "bf16": -126, "tf32": -126, "f32": -126}


def fused_add(a, b, c, a_type, b_type, d_type, fraction, mantissa):
    """One group of products on top of c, as MMA-Sim (arXiv 2511.10909, section 4) describes NVIDIA's tensor cores."""
    total = sum(x * y for x, y in zip(a, b)) + c
    if math.isnan(total) or math.isinf(total):
        return total
    terms = [significand_and_exponent(c, LEAST[d_type])]
    for x, y in zip(a, b):
        (sx, ex), (sy, ey) = significand_and_exponent(x, LEAST[a_type]), significand_and_exponent(y, LEAST[b_type])
        terms.append((sx * sy, ex + ey))
    largest = max(e for _, e in terms)
    units = sum(math.trunc(s * 2.0 ** (fraction + e - largest)) for s, e in terms)
    exact = units * 2.0 ** (largest - fraction)
    if d_type == "f16":
        with np.errstate(over="ignore"):
            return float(np.float64(exact).astype(np.float16))
    s, e = significand_and_exponent(exact, -126)
    return math.trunc(s * 2.0**mantissa) * 2.0 ** (e - mantissa) if exact else 0.0


def truncating_product(a, b, c, types, group, fraction, mantissa):
    """A B + C on the truncating accumulator, element by element."""
    a_type, b_type, d_type = types
    out = np.empty(c.shape)
    for row in range(c.shape[0]):
        for column in range(c.shape[1]):
            total = float(c[row, column])
            for k in range(0, a.shape[1], group):
                x, y = a[row, k : k + group].tolist(), b[k : k + group, column].tolist()
                total = fused_add(x, y, total, a_type, b_type, d_type, fraction, mantissa)
            out[row, column] = total
    return out


def same_bits(got, expected, type):
    """Equal bits, any NaN for a NaN."""
    nan = np.isnan(decode(expected, type))
    return np.array_equal(np.where(nan, 0, got), np.where(nan, 0, expected)) and np.isnan(decode(got, type))[nan].all()
