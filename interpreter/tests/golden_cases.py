"""The instructions whose results are recorded on a GPU, each as a kernel with its data, and how far the interpreter may differ.

The data are random, with edge cases for what works by lane, and for tensor cores with what tells one accumulator from
another: sums of one sign, sums that cancel, and terms of very different sizes.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import numpy as np
import rows
import tensor_cores as tc
from float_rows import APPROXIMATE, BOUNDS_16, PATTERNS, assert_within, values_of
from floats import FORMATS
from rows import DTYPES, Opcode, kernel, module, sample, spellings
from wgmma_kernels import SHARED, Operand, d_from_registers, d_to_registers, instruction, parts_of, prepare

#: architecture of the interpreter -> compute capability
CAPABILITIES = {"sm_80": 80, "sm_89": 89, "sm_90a": 90}


@dataclasses.dataclass
class Case:
    name: str
    text: str  # a module with the entry k
    arguments: list  # in the parameters' order: arrays, which are read and written in place, and numpy numbers
    results: list[int]  # which of the arguments are results
    #: from this case's arguments before the launch, the GPU's results and the interpreter's: AssertionError where they differ
    compare: Callable
    block: int = 128
    grid: int = 1
    shared: int = 0
    options: dict = dataclasses.field(default_factory=dict)  # of gpuless.gpu
    #: of what tensor cores do: the types of A, B and D, and from arguments and results (A, B, C, D) as matrices of bits
    types: tuple | None = None
    matrices: Callable | None = None


def generator(text):
    return np.random.default_rng(zlib.crc32(text.encode()))


# ---- by lane ----


def equal_bits(name, arguments, recorded, ours):
    for r, o in zip(recorded, ours):
        r, o = (x.view(f"u{x.itemsize}") if x.dtype != bool else x for x in (r, o))
        wrong = np.nonzero(r != o)[0]
        if len(wrong):
            i = int(wrong[0])
            given = ", ".join(hex(int(a.view(f"u{a.itemsize}")[i])) for a in arguments if a.shape == r.shape)
            raise AssertionError(f"{name}: element {i}, operands and space for results {given}: the GPU gave {int(r[i]):#x}, "
                                 f"the interpreter {int(o[i]):#x}; {len(wrong)} of {r.size} differ")  # fmt: skip


def lanes(name, body, inputs, outputs, compare, arch, **more):
    n = len(next(iter(inputs.values())))
    block = next(t for t in (128, 64, 32) if n % t == 0)
    text = module(kernel(body, {k: a.dtype for k, a in inputs.items()}, outputs), arch=arch)
    arguments = [np.ascontiguousarray(a) for a in inputs.values()] + [np.zeros(n, t) for t in outputs.values()]
    results = list(range(len(inputs), len(arguments)))
    return Case(name, text, arguments, results, functools.partial(compare, name), block, n // block, **more)


#: pattern, and the compute capability from which there is such an instruction
LANEWISE = [
    ("add.rn|rz|rm|rp.ftz?.f32", 80), ("add.rn.ftz?.sat.f32", 80), ("mul.rn|rz|rm|rp.ftz?.f32", 80),
    ("fma.rn|rz|rm|rp.ftz?.f32", 80), ("fma.rn.ftz?.sat.f32", 80), ("div|rcp|sqrt.rn|rz.ftz?.f32", 80), ("fma.rn.f64", 80),
    ("add|mul.rn.ftz?.sat?.f16x2", 80), ("fma.rn.ftz?.sat?.f16x2", 80), ("fma.rn.ftz?.relu.f16x2", 80),
    ("fma.rn.relu?.bf16x2", 80), ("add|sub|mul.rn.bf16x2", 90), ("fma.rn.oob.relu?.f16x2|bf16x2", 90),
    ("min|max.ftz?.NaN?.f32", 80), ("min|max.NaN?.xorsign.abs.f32", 86), ("min|max.ftz?.NaN?.f16x2", 80),
    ("min|max.NaN?.bf16x2", 80), ("min|max.f64", 80), ("abs|neg.ftz?.f32", 80),
    ("cvt.rn|rz|rm|rp.sat?.f32.s32", 80), ("cvt.rni|rzi|rmi|rpi.ftz?.s32|u32.f32", 80), ("cvt.rzi.s64|u64|s8|u16.f32", 80),
    ("cvt.rni.sat.s8|u8.f32", 80), ("cvt.rni.s32.f16", 80), ("cvt.rni|rmi.ftz?.sat?.f32.f32", 80), ("cvt.ftz?.sat?.f32.f16", 80),
    ("cvt.rn|rz.f16|bf16|f16x2|bf16x2.f32", 80), ("cvt.rn|rz.relu.f16x2|bf16x2.f32", 80), ("cvt.rn|rz.ftz.sat.f16.f32", 80),
    ("cvt.f32.bf16", 90), ("cvt.rna.tf32.f32", 80), ("cvt.rn|rz.relu?.tf32.f32", 90),
    ("cvt.rn.satfinite.relu?.e4m3x2|e5m2x2.f32", 89), ("cvt.rn.satfinite.relu?.e4m3x2|e5m2x2.f16x2", 89),
    ("cvt.rn.relu?.f16x2.e4m3x2|e5m2x2", 89), ("cvt.pack.sat.s8|u8.s32.b32", 80),
    ("dp4a.u32|s32.u32|s32", 80), ("dp2a.lo|hi.s32.u32", 80), ("prmt.b32.f4e|b4e|rc8|ecl|ecr|rc16?", 80),
    ("shf.l|r.clamp|wrap.b32", 80), ("bfe.u32|s32|s64", 80), ("bfi.b32", 80), ("bfind.shiftamt?.s32", 80), ("fns.b32", 80),
    ("szext.clamp|wrap.s32", 80), ("sad.s32", 80), ("mul.hi.s32", 80),
]  # fmt: skip


MOST = 1024  # elements of a case by lane


@functools.cache
def specifications():
    """opcode -> what the row tests know of its operands"""
    rows.import_all()
    return {op: spec for spec in rows.lanewise for op in spellings(spec.pattern)}


def lane_case(op, arch):
    spec = specifications()[op]
    destination, sources = rows.types_of(spec, op)
    rng = generator(" ".join(sources))  # the same for all that take them: the file has each array once
    values = spec.values(op, rng) if spec.values else sample(sources, rng)
    n = len(values[0])
    if n > MOST:  # spread over all of them, in odd steps: of all codes every low byte is there
        values = [v[np.arange(MOST) * (n // MOST | 1) % n] for v in values]
    inputs = dict(zip(rows.NAMES, values))

    def compare(name, arguments, recorded, ours):
        if spec.compare:  # it leaves something open: both are held to it
            given = [a.view(v.dtype) for a, v in zip(arguments, values)]
            with np.errstate(all="ignore"):
                expected = spec.model(op, *given)
            for who, (d,) in (("the GPU", recorded), ("the interpreter", ours)):
                good = spec.compare(op, d.view(expected.dtype), expected, *given)
                assert np.all(good), f"{name}: {who} gave {d[np.argmin(good)]!r}, element {np.argmin(good)}"
        else:
            equal_bits(name, arguments, recorded, ours)

    return lanes(op, rows.body_of(spec, op), inputs, {"d": np.dtype(DTYPES[destination])}, compare, arch)


def approximate_case(op, arch):
    """Both within the ISA's bound of the exact value; the file keeps the GPU's own."""
    type = op.type()
    f = FORMATS[type.removesuffix("x2")]
    if type == "f32":
        rng = generator("approximate")
        a = np.concatenate([sample(["f32"], rng, 1024)[0], rng.uniform(-20, 20, 1024).astype(np.float32)])
        with np.errstate(invalid="ignore"):
            bounds = APPROXIMATE[op.parts[0]][1](a.astype(np.float64))
    else:
        a = np.arange(0, 65536, 16, dtype=np.uint16) + np.arange(4096, dtype=np.uint16) % 16
        bounds = BOUNDS_16[op.parts[0], type.removesuffix("x2")]

    def numbers(x):
        with np.errstate(invalid="ignore"):
            return x.astype(np.float64) if type == "f32" else values_of(x, f)

    def compare(name, arguments, recorded, ours):
        for (d,) in (recorded, ours):
            assert_within(op, numbers(arguments[0]), numbers(d), f, *bounds)

    return lanes(str(op), f"{op} %d, %a;", {"a": a}, {"d": a.dtype}, compare, arch)


# ---- lop3, redux, atomics: bodies of their own ----


def bodies(capability):
    """name -> (body, inputs, outputs)"""
    u32 = np.dtype(np.uint32)
    a, b, c = sample(["u32", "u32", "u32"], generator("u32 u32 u32"))
    for table in (0x00, 0x96, 0xCA, 0xE8, 0xFE, 0x35):
        yield f"lop3.b32 {table:#x}", f"lop3.b32 %d, %a, %b, %c, {table};", dict(a=a, b=b, c=c), dict(d=u32)
    for op in ("add.s32", "add.u32", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32"):
        # by a part of the warp, too: those lanes whose bit is set
        body = (f".reg .pred %p; redux.sync.{op} %d, %a, -1; mov.b32 %e, 9; shr.u32 %lane, 0x0F0F1234, %lane; "
                f"and.b32 %lane, %lane, 1; setp.ne.b32 %p, %lane, 0; @%p redux.sync.{op} %e, %a, 0x0F0F1234;")  # fmt: skip
        yield f"redux.sync.{op}", body, dict(a=a), dict(d=u32, e=u32)
    for space in ("global", "shared"):
        for op, type, since in (
            ("add.f32", "f32", 80),
            ("add.noftz.f16x2", "f16x2", 80),
            ("add.noftz.bf16x2", "bf16x2", 90),
        ):
            if capability < since:
                continue
            x, y = sample([type, type], generator(f"{type} {type}"))
            if space == "global":
                body = f"atom.global.{op} %d, [%at_a], %b; ld.global.b32 %e, [%at_a];"
            else:  # a thread has its own four bytes
                body = (f".shared .align 4 .b32 words[128]; .reg .b32 %word; mov.u32 %word, %tid.x; shl.b32 %word, %word, 2; "
                        f"mov.u32 %lane, words; add.u32 %word, %word, %lane; st.shared.b32 [%word], %a; "
                        f"atom.shared.{op} %d, [%word], %b; ld.shared.b32 %e, [%word];")  # fmt: skip
            yield f"atom.{space}.{op}", body, dict(a=x, b=y), dict(d=x.dtype, e=x.dtype)


# ---- tensor cores ----


def numbers(kind, rng, shapes, types):
    """(A, B, C) of a kind, as numbers: before they are rounded to their types."""
    a, b, c = (tc.random_matrix(rng, s, t, exact=False) for s, t in zip(shapes, types))
    if kind == "one sign":
        return np.abs(a), np.abs(b), np.abs(c)
    if kind == "cancelling":  # pairs along K that nearly cancel, in steps of their types
        a[:, 1::2], b[1::2] = -a[:, ::2] * (1 + 0.125 * rng.integers(0, 2, a[:, ::2].shape)), b[::2]
    if kind == "of many sizes":
        reach = {"f16": 6, "e4m3": 4, "e5m2": 6}.get(types[0], 14)
        a, b = (x * np.exp2(rng.integers(-reach, reach // 2 + 1, x.shape)) for x in (a, b))
        c = c * np.exp2(rng.integers(-16, 5, c.shape))
    if kind == "large accumulator":
        c = c * np.exp2(rng.integers(6, 12 if types[2] == "f16" else 20, c.shape))
    if kind == "sparse":  # one product that is large, and others whose last bits it may shift out
        a, b = a * 2.0**-3, b * 2.0**-3
        a[np.arange(a.shape[0]), rng.integers(0, a.shape[1], a.shape[0])] *= 2.0**7
        c *= 2.0**-4
    return a, b, c


FLOAT_KINDS = ("random", "one sign", "cancelling", "of many sizes", "large accumulator", "sparse", "not finite")
NOT_FINITE = {"f16": (0x7C00, 0xFC00, 0x7E00), "bf16": (0x7F80, 0xFF80, 0x7FC0), "e5m2": (0x7C, 0xFC, 0x7E), "e4m3": (0x7F,),
              "tf32": (0x7F800000, 0xFF800000, 0x7FC00000)}  # fmt: skip


def operands(kind, rng, shapes, types):
    """(A, B, C) as bits."""
    if "s32" in types:
        a, b, c = (tc.encode(tc.random_matrix(rng, s, t, exact=True), t) for s, t in zip(shapes, types))
        if kind == "extreme":  # sums that leave the accumulator
            a[:], b[:] = (tc.encode(np.full(1, -128 if t == "s8" else 255), t)[0] for t in types[:2])
            c[:] = (2**31 - 5) if types[0] == types[1] else (2**31 + 5)
        return a, b, c
    made = numbers(kind, rng, shapes, types)
    if types[2] == "f16":
        made = (*made[:2], np.clip(made[2], -6e4, 6e4))
    a, b, c = (tc.encode(x, t) for x, t in zip(made, types))
    if kind == "not finite" and types[0] in NOT_FINITE:
        for x, t in ((a, types[0]), (b, types[1])):
            x[rng.random(x.shape) < 0.02] = rng.choice(NOT_FINITE[t])
    return a, b, c


def same_products(types, matrices):
    """Integers, and fp8 with its truncating accumulator: bit by bit. Elsewhere hardware adds in an order and with a precision of
    its own, and the interpreter does not claim its bits: both are within the error of the exact sum."""
    a_type, b_type, d_type = types

    def within(name, who, x, y, z, bits):
        exact = x @ y + z
        # of a term no more than 2^-23 of the largest is lost, and as much again of the sum
        bound = (np.abs(x) @ np.abs(y) + np.abs(z)) * (x.shape[1] + 2) * 2.0 ** (-52 if d_type == "f64" else -22)
        if d_type == "f16":
            bound = bound + np.abs(exact) * 2.0**-10 + 2.0**-24
        d = tc.decode(bits, d_type)
        good = (np.abs(d - exact) <= bound) | (d == exact) | (np.isnan(d) & np.isnan(exact))
        if d_type == "f16":
            good |= np.isinf(d) & (np.abs(exact) > 65000) & (np.sign(d) == np.sign(exact))
        assert np.all(good), f"{name}, {who}: {describe(bits, tc.encode(exact, d_type), d_type, ~good)}"

    def compare(name, arguments, recorded, ours):
        for i, (a, b, c, theirs, mine) in enumerate(zip(*matrices(arguments, recorded), matrices(arguments, ours)[3])):
            where = f"{name}, matrix {i}"
            if d_type == "s32" or a_type in ("e4m3", "e5m2"):
                same = tc.same_bits(mine, theirs, d_type) if d_type != "s32" else np.array_equal(mine, theirs)
                assert same, f"{where}, the interpreter's and the GPU's: {describe(mine, theirs, d_type)}"
                continue
            given = tc.decode(a, a_type), tc.decode(b, b_type), tc.decode(c, d_type)
            with np.errstate(all="ignore"):
                within(where, "the GPU", *given, theirs)
                within(where, "the interpreter", *given, mine)

    return compare


def describe(got, expected, type, wrong=None):
    wrong = got != expected if wrong is None else wrong
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (f"{int(wrong.sum())} of {wrong.size} differ, first at {at}: {tc.decode(got[at], type)} and "
            f"{tc.decode(expected[at], type)}, {int(got[at]):#x} and {int(expected[at]):#x}")  # fmt: skip


def options_of(a_type):
    return {"truncating": a_type in ("e4m3", "e5m2")}


#: pattern, and the compute capability from which there is such an instruction
MMA = [
    ("mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.f16.f16.f32", 80),
    ("mma.sync.aligned.m16n8k8|m16n8k16.row.col.f16.f16.f16.f16", 80),
    ("mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.bf16.bf16.f32", 80),
    ("mma.sync.aligned.m16n8k4|m16n8k8.row.col.f32.tf32.tf32.f32", 80),
    ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", 80),
    ("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64", 90),
    ("mma.sync.aligned.m16n8k16|m16n8k32.row.col.satfinite?.s32.s8|u8.s8|u8.s32", 80),
    ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3|e5m2.e4m3|e5m2.f32", 89),
    ("mma.sync.aligned.m16n8k32.row.col.f16.e4m3|e5m2.e4m3|e5m2.f16", 89),
]


def mma_case(op, arch):
    d_type, a_type, b_type, _ = op.split(".")[-4:]
    m, n, k = tc.mma_shape(op)
    types, shapes = (a_type, b_type, d_type), ((m, k), (k, n), (m, n))
    kinds = ("random", "extreme") if d_type == "s32" else FLOAT_KINDS
    data = [operands(kind, generator(f"{kind} {shapes} {types}"), shapes, types) for kind in kinds]
    body, inputs, outputs = tc.mma_operands(op, *([x[i] for x in data] for i in range(3)))

    def matrices(arguments, results):
        of = {name: [x for n, x in zip(inputs, arguments) if n[0] == name] for name in "abc"}
        return *(tc.mma_matrices(op, name, of[name]) for name in "abc"), tc.mma_matrices(op, "c", results)

    compare = same_products(types, matrices)
    return lanes(op, body, inputs, outputs, compare, arch, options=options_of(a_type), types=types,
                 matrices=matrices)  # fmt: skip


WGMMA = ["m64n8k16.f32|f16.f16.f16", "m64n8k16.f32.bf16.bf16", "m64n8k8.f32.tf32.tf32",
         "m64n8k32.f32|f16.e4m3.e4m3", "m64n8k32.f32.e5m2.e4m3|e5m2", "m64n8k32.s32.s8|u8.s8"]  # fmt: skip


def wgmma_case(op, kind):
    n, k, d_type, a_type, b_type = parts_of(op)
    types = a_type, b_type, d_type
    a, b, c = operands(kind, generator(f"{kind} {op}"), ((64, k), (k, n), (64, n)), types)
    right = Operand(np.ascontiguousarray(b.T))
    left = Operand(a, pattern=-(-right.end // 1024) * 1024)
    image = np.zeros(-(-left.end // 16) * 16, np.uint8)
    left.place(image)
    right.place(image)
    body = (
        f"wgmma.fence.sync.aligned; {instruction(op)} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    )
    text, arguments, _ = prepare(
        op, body, image, left.descriptor(), right.descriptor(), d_registers=d_to_registers(c, d_type)
    )

    def matrices(arguments, results):
        image, d = arguments[0], arguments[-1]
        x, y = left.taken_from(image), right.taken_from(image).T
        return [x], [y], [d_from_registers(d, n, d_type)], [d_from_registers(results[0], n, d_type)]

    name = f"{op}, {kind}"
    compare = functools.partial(same_products(types, matrices), name)
    return Case(
        name, text, arguments, [len(arguments) - 1], compare, 128, 1, SHARED, options_of(a_type), types, matrices
    )


def cases(arch):
    """Every case of an architecture; their names are unique."""
    capability = CAPABILITIES[arch]
    for pattern, since in LANEWISE:
        if capability >= since:
            for op in spellings(pattern):
                yield lane_case(Opcode(op), arch)
    for pattern in PATTERNS:
        for op in map(Opcode, spellings(pattern)):
            packed, bf16 = op.type().endswith("x2"), op.type() == "bf16"
            if not packed and (not bf16 or capability >= 90):
                yield approximate_case(op, arch)
    for name, body, inputs, outputs in bodies(capability):
        yield lanes(name, body, inputs, outputs, equal_bits, arch)
    for pattern, since in MMA:
        if capability >= since:
            for op in spellings(pattern):
                yield mma_case(op, arch)
    if arch == "sm_90a":
        for pattern in WGMMA:
            for op in spellings("wgmma.mma_async.sync.aligned." + pattern):
                for kind in ("random", "extreme") if ".s32." in op else FLOAT_KINDS:
                    yield wgmma_case(op, kind)
