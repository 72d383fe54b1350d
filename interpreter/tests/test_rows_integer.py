"""Integer arithmetic, bits, logic, shifts and prmt against Python's integers."""

import numpy as np
import pytest
from rows import DTYPES, Opcode, by_lane, resolve, row, run, sample, seed_of, spellings

pytestmark = pytest.mark.interpreted

T = -1  # the type at the opcode's end


def signed(type):
    return type[0] == "s"


def bits(type):
    return int(type.rstrip("x2")[1:]) if type.endswith("x2") else int(type[1:])


def wrap(x, type):
    """An integer as the type's register holds it."""
    n = bits(type)
    x &= (1 << n) - 1
    return x - (1 << n) if signed(type) and x >> (n - 1) else x


def scalar(function, type=T):
    """A model from a function (op, *Python integers) whose result wraps to the type."""

    def model(op, *columns):
        to = resolve(type, op)
        out = [wrap(function(op, *row), to) for row in zip(*(c.tolist() for c in columns))]
        return np.array(out, dtype=DTYPES[to])

    return model


def halves(function):
    """A model of a packed instruction from one of a half."""

    def model(op, *columns):
        type = op.type()[:3]
        out = []
        for values in zip(*(c.tolist() for c in columns)):
            low, high = ([wrap(x >> shift, type) for x in values] for shift in (0, 16))
            out.append(function(op, *low) & 0xFFFF | (function(op, *high) & 0xFFFF) << 16)
        return np.array(out, np.uint32)

    return model


def clamp(x, low, high):
    return max(low, min(high, x))


def clamp32(x):
    return clamp(x, -(2**31), 2**31 - 1)


def divide(a, b):  # towards zero; by zero all ones
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1


ALL = "u16|u32|u64|s16|s32|s64"
for name, function in {
    "add": lambda op, a, b: a + b,
    "sub": lambda op, a, b: a - b,
    "mul.lo": lambda op, a, b: a * b,
    "mul.hi": lambda op, a, b: a * b >> bits(op.type()),
    "div": lambda op, a, b: divide(a, b),
    "rem": lambda op, a, b: a - b * divide(a, b) if b else a,
    "min": lambda op, a, b: min(a, b),
    "max": lambda op, a, b: max(a, b),
}.items():
    by_lane(f"{name}.{ALL}", T, [T, T], scalar(function))
for name, function in {
    "mad.lo": lambda op, a, b, c: a * b + c,
    "mad.hi": lambda op, a, b, c: (a * b >> bits(op.type())) + c,
    "sad": lambda op, a, b, c: c + abs(a - b),
}.items():
    by_lane(f"{name}.{ALL}", T, [T, T, T], scalar(function))
by_lane("add.sat.s32", T, [T, T], scalar(lambda op, a, b: clamp32(a + b)))
by_lane("sub.sat.s32", T, [T, T], scalar(lambda op, a, b: clamp32(a - b)))
by_lane("mad.hi.sat.s32", T, [T, T, T], scalar(lambda op, a, b, c: clamp32((a * b >> 32) + c)))
by_lane("add.u16x2|s16x2", T, [T, T], halves(lambda op, a, b: a + b))
by_lane("min.u16x2", T, [T, T], halves(lambda op, a, b: min(a, b)))
by_lane("max.u16x2", T, [T, T], halves(lambda op, a, b: max(a, b)))
by_lane("min.relu?.s16x2", T, [T, T], halves(lambda op, a, b: max(min(a, b), 0) if op.has("relu") else min(a, b)))
by_lane("max.relu?.s16x2", T, [T, T], halves(lambda op, a, b: max(a, b, 0) if op.has("relu") else max(a, b)))
by_lane("min.relu.s32", T, [T, T], scalar(lambda op, a, b: max(min(a, b), 0)))
by_lane("max.relu.s32", T, [T, T], scalar(lambda op, a, b: max(a, b, 0)))
by_lane("abs.s16|s32|s64", T, [T], scalar(lambda op, a: abs(a)))
by_lane("neg.s16|s32|s64", T, [T], scalar(lambda op, a: -a))

WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def wide(op):
    return WIDER[op.type()]


by_lane("mul.wide.u16|u32|s16|s32", wide, [T, T], scalar(lambda op, a, b: a * b, wide))
by_lane("mad.wide.u16|u32|s16|s32", wide, [T, T, wide], scalar(lambda op, a, b, c: a * b + c, wide))


def low24(x, type):
    return wrap(x << 8, type) >> 8


def product24(op, a, b):
    return low24(a, op.type()) * low24(b, op.type()) >> (16 if op.has("hi") else 0)


by_lane("mul24.lo.u32|s32", T, [T, T], scalar(product24))
by_lane("mul24.hi.u32|s32", T, [T, T], scalar(product24))
by_lane("mad24.lo.u32|s32", T, [T, T, T], scalar(lambda op, a, b, c: wrap(product24(op, a, b), op.type()) + c))
by_lane("mad24.hi.u32|s32", T, [T, T, T], scalar(lambda op, a, b, c: wrap(product24(op, a, b), op.type()) + c))
by_lane("mad24.hi.sat.s32", T, [T, T, T], scalar(lambda op, a, b, c: clamp32(wrap(product24(op, a, b), "s32") + c)))


def elements(x, type, size):
    return [wrap(x >> at, f"{type[0]}{size}") for at in range(0, 32, size)]


def dot4(op, a, b, c):
    x, y = elements(a, op.type(1), 8), elements(b, op.type(2), 8)
    return c + sum(p * q for p, q in zip(x, y))


def dot2(op, a, b, c):
    x, y = elements(a, op.type(2), 16), elements(b, op.type(3), 8)
    return c + sum(p * q for p, q in zip(x, y[2:] if op.has("hi") else y))


by_lane("dp4a.u32|s32.u32|s32", "u32", ["u32", "u32", "u32"], scalar(dot4, "u32"))
by_lane("dp2a.lo|hi.u32|s32.u32|s32", "u32", ["u32", "u32", "u32"], scalar(dot2, "u32"))


# ---- extended precision ----

EXTENDED = [
    "add.cc.u32|s32|u64|s64", "addc.cc?.u32|s32|u64|s64", "sub.cc.u32|s32|u64|s64", "subc.cc?.u32|s32|u64|s64",
    "mad.lo.cc.u32|s32|u64|s64", "mad.hi.cc.u32|s32|u64|s64", "madc.lo.cc?.u32|s32|u64|s64",
    "madc.hi.cc?.u32|s32|u64|s64",
]  # fmt: skip


@row(*EXTENDED)
@pytest.mark.parametrize("op", [Opcode(o) for pattern in EXTENDED for o in spellings(pattern)], ids=str)
def test_extended(op):
    """Takes the carry of e + f where it takes one, and passes on its own, or that of e + f without .cc."""
    type, n = op.type(), bits(op.type())
    mad, minus = op.parts[0].startswith("mad"), op.parts[0].startswith("sub")
    inputs = dict(zip("abcef", sample([type] * 5, np.random.default_rng(seed_of(op)))))
    result = run(
        f"""add.cc.u{n} %e, %e, %f;
        {op} %d, %a, %b{", %c" if mad else ""};
        addc.u32 %carry, 0, 0;""",
        inputs, {"d": np.dtype(DTYPES[type]), "carry": np.dtype(np.uint32)},
    )  # fmt: skip
    mask = 2**n - 1
    for i, (a, b, c, e, f) in enumerate(zip(*(x.tolist() for x in inputs.values()))):
        before = (e & mask) + (f & mask) >> n
        taken = before if op.parts[0].endswith("c") else 0
        if mad:
            a, b = (a * b >> (n if op.has("hi") else 0)), c
        total = (a & mask) - (b & mask) - taken if minus else (a & mask) + (b & mask) + taken
        after = int(not 0 <= total <= mask) if op.has("cc") else before
        assert (result["d"][i], result["carry"][i]) == (wrap(total, type), after), (op, a, b, c, taken)


# ---- bits ----


def bfind(op, a):
    n = bits(op.type())
    a = ~a if a < 0 else a
    at = a.bit_length() - 1
    return -1 if at < 0 else n - 1 - at if op.has("shiftamt") else at


def fns(op, mask, base, offset):
    offset = wrap(offset, "s32")
    if offset == 0:
        return base if mask >> base & 1 else -1
    order = range(base, 32) if offset > 0 else range(base, -1, -1)
    set_bits = [at for at in order if mask >> at & 1]
    return set_bits[abs(offset) - 1] if abs(offset) <= len(set_bits) else -1


def fns_values(op, rng):
    mask, base, _ = sample(["u32"] * 3, rng)
    return [mask, base % 32, rng.integers(-34, 35, len(mask)).astype(np.int32).view(np.uint32)]


def bfe(op, a, b, c):
    type, top = op.type(), bits(op.type()) - 1
    position, length = b & 255, c & 255
    sign = 0 if type[0] == "u" or length == 0 else a >> min(position + length - 1, top) & 1
    return sum((a >> (position + i) & 1 if i < length and position + i <= top else sign) << i for i in range(top + 1))


def bfi(op, a, b, c, d):
    top = bits(op.type()) - 1
    position, length = c & 255, d & 255
    for i in range(min(length, top + 1 - position)):
        b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def szext(op, a, b):
    b &= 2**32 - 1
    n = b % 32 if op.has("wrap") else min(b, 32)
    return wrap(a, f"{op.type()[0]}{n}") if n else 0


def bmsk(op, a, b):
    a, b = (a % 32, b % 32) if op.has("wrap") else (min(a, 32), min(b, 32))
    return ((1 << b) - 1) << a


by_lane("popc.b32|b64", "u32", [T], scalar(lambda op, a: a.bit_count(), "u32"))
by_lane("clz.b32|b64", "u32", [T], scalar(lambda op, a: bits(op.type()) - a.bit_length(), "u32"))
by_lane("bfind.u32|u64|s32|s64", "u32", [T], scalar(bfind, "u32"))
by_lane("bfind.shiftamt.u32|u64|s32|s64", "u32", [T], scalar(bfind, "u32"))
by_lane("fns.b32", T, [T, T, T], scalar(fns), values=fns_values)
by_lane("brev.b32|b64", T, [T], scalar(lambda op, a: int(f"{a:0{bits(op.type())}b}"[::-1], 2)))
by_lane("bfe.u32|u64|s32|s64", T, [T, "u32", "u32"], scalar(bfe))
by_lane("bfi.b32|b64", T, [T, T, "u32", "u32"], scalar(bfi))
by_lane("szext.clamp.u32|s32", T, [T, T], scalar(szext))
by_lane("szext.wrap.u32|s32", T, [T, T], scalar(szext))
by_lane("bmsk.clamp.b32", T, [T, T], scalar(bmsk))
by_lane("bmsk.wrap.b32", T, [T, T], scalar(bmsk))

# ---- logic and shifts ----

for name, function in {
    "and": lambda op, a, b: a & b,
    "or": lambda op, a, b: a | b,
    "xor": lambda op, a, b: a ^ b,
}.items():
    by_lane(f"{name}.pred|b16|b32|b64", T, [T, T],
            lambda op, a, b, f=function: f(op, a, b))  # fmt: skip
by_lane("not.pred|b16|b32|b64", T, [T], lambda op, a: ~a)
by_lane("cnot.b16|b32|b64", T, [T], lambda op, a: a == 0)


@row("and.pred|b16|b32|b64", "or.pred|b16|b32|b64", "xor.pred|b16|b32|b64", "not.pred|b16|b32|b64")
def test_negated_predicates():
    a, b = sample(["pred", "pred"], np.random.default_rng(0))
    body = "and.pred %x, %a, !%b; or.pred %y, !%a, %b; xor.pred %z, !%a, !%b; not.pred %v, !%a;"
    result = run(body, dict(a=a, b=b), dict.fromkeys("xyzv", np.dtype(bool)))
    for name, expected in dict(x=a & ~b, y=~a | b, z=a ^ b, v=a).items():
        assert np.array_equal(result[name], expected), name


def lop3(table, a, b, c):
    # the table's bit 4a + 2b + c: its lowest bit is the entry of 0, 0, 0
    d = np.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            term = [x if entry >> k & 1 else ~x for k, x in ((2, a), (1, b), (0, c))]
            d |= term[0] & term[1] & term[2]
    return d


@row("lop3.b32", "lop3.and|or.b32")
@pytest.mark.parametrize("first", range(0, 256, 32))
def test_lop3(first):
    a, b, c, q = sample(["b32", "b32", "b32", "pred"], np.random.default_rng(first))
    a[:64] = b[:64] = c[:64] = 0
    tables = range(first, first + 32)
    body = "".join(f"lop3.b32 %d{t}, %a, %b, %c, {t};" for t in tables)
    result = run(body, dict(a=a, b=b, c=c), {f"d{t}": np.dtype(np.uint32) for t in tables})
    for t in tables:
        assert np.array_equal(result[f"d{t}"], lop3(t, a, b, c)), t
    body = f"""lop3.and.b32 %d|%x, %a, %b, %c, {first + 5}, %q;
    lop3.or.b32 _|%y, %a, %b, %c, {first + 5}, !%q;"""
    outputs = dict(d=np.dtype(np.uint32), x=np.dtype(bool), y=np.dtype(bool))
    result = run(body, dict(a=a, b=b, c=c, q=q), outputs)
    d = lop3(first + 5, a, b, c)
    assert np.array_equal(result["d"], d)
    assert np.array_equal(result["x"], (d != 0) & q)
    assert np.array_equal(result["y"], (d != 0) | ~q)


def shift(op, a, n):
    width = bits(op.type())
    n &= 2**32 - 1
    return a << min(n, width) if op.parts[0] == "shl" else a >> min(n, width)


def funnel(op, a, b, c):
    n = c % 32 if op.has("wrap") else min(c, 32)
    both = b << 32 | a
    return both << n >> 32 if op.has("l") else both >> n


by_lane("shl.b16|b32|b64", T, [T, "u32"], scalar(shift))
by_lane("shr.b16|b32|b64|u16|u32|u64|s16|s32|s64", T, [T, "u32"], scalar(shift))
for direction in "lr":
    for mode in ("clamp", "wrap"):
        by_lane(f"shf.{direction}.{mode}.b32", T, [T, T, T], scalar(funnel))

# ---- prmt: the ISA's tables, most significant byte first ----

PRMT = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def prmt(op, a, b, c):
    source = (b << 32 | a).to_bytes(8, "little")
    if op.type() in PRMT:
        return int.from_bytes(bytes(source[int(n)] for n in PRMT[op.type()][c & 3]), "big")
    out = []
    for k in range(4):
        control = c >> 4 * k & 15
        byte = source[control & 7]
        out.append((255 if byte & 128 else 0) if control & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def prmt_values(op, rng):
    a, b, _ = sample(["b32"] * 3, rng)
    return [a, b, rng.integers(0, 2**32, len(a), dtype=np.uint32)]


by_lane("prmt.b32", "b32", ["b32"] * 3, scalar(prmt, "b32"), values=prmt_values)
for mode in PRMT:
    by_lane(f"prmt.b32.{mode}", "b32", ["b32"] * 3, scalar(prmt, "b32"), values=prmt_values)
