"""The tests of the instruction table: which test covers which row, and one-instruction kernels for those that work by lane.

`@row(pattern, ...)` names the rows of a test function that looks at them in its own way. `by_lane(pattern, ...)` declares
a row by its operands and a numpy model; test_rows.py runs every spelling of its pattern. Its last test compares what was
named with the table, so that no row goes without.
"""

import dataclasses
import importlib
import itertools
import pathlib
import zlib
from collections.abc import Callable

import numpy as np
import torch

import gpuless

#: pattern -> tests
covered: dict[str, list[str]] = {}
lanewise: list["ByLane"] = []


def row(*patterns):
    """Decorates a test function with the rows that it covers."""

    def mark(test):
        for pattern in patterns:
            covered.setdefault(pattern, []).append(test.__name__)
        return test

    return mark


def spellings(pattern):
    """Every opcode that a pattern of the table matches."""
    slots = [(s.rstrip("?").split("|") + ([""] if s.endswith("?") else [])) for s in pattern.split(".")]
    return [".".join(filter(None, choice)) for choice in itertools.product(*slots)]


class Opcode(str):
    """An opcode as models see it."""

    def __init__(self, text):
        self.parts = text.split(".")

    def has(self, modifier):
        return modifier in self.parts

    def one_of(self, *modifiers, default=None):
        return next((m for m in modifiers if m in self.parts), default)

    def type(self, i=-1):
        return self.parts[i]


@dataclasses.dataclass
class ByLane:
    pattern: str
    #: of the destination and of each source: a type, the number of the opcode's part that is the type, or a function of it
    destination: str | int | Callable
    sources: list
    #: from an Opcode and the sources' values to the destination's. Numbers of 16-bit and packed types are their bits.
    model: Callable
    #: from an Opcode and the number of sources to their values, where random and edge values will not do
    values: Callable | None = None
    #: from an Opcode, results, expected and the sources' values to which results are good; without it, equal bits are
    compare: Callable | None = None
    arch: str = "sm_90a"
    isa: str = "8.7"  #: the PTX ISA that has the instruction
    #: the instruction within a kernel, where its operands are not plain registers
    body: str = ""


def by_lane(pattern, destination, sources, model, **more):
    covered.setdefault(pattern, []).append("by_lane")
    lanewise.append(ByLane(pattern, destination, sources, model, **more))


# ---- values ----

DTYPES = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.uint16,
    "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32,
    "f32x2": np.uint64, "bf16x2": np.uint32, "u16x2": np.uint32, "s16x2": np.uint32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64, "e4m3x2": np.uint16, "e5m2x2": np.uint16, "tf32": np.uint32, "pred": np.bool_,
    "e2m1x2": np.uint16, "e2m3x2": np.uint16, "e3m2x2": np.uint16, "ue8m0x2": np.uint16,
}  # fmt: skip
F16_EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00,
             0x7FFF, 0xFE01]  # fmt: skip
BF16_EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0,
              0x7FFF, 0xFFC1]  # fmt: skip
F32_EDGES = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x3F800000, 0xBF800000,
             0x3F7FFFFF, 0x3F800001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x4F000000,
             0xCF000000, 0x4F800000, 0x3F000000, 0x3FC00000, 0x40200000, 0x477FF000, 0x38800000, 0x33000000]  # fmt: skip
F64_EDGES = [0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.0, -1.0, 1.7976931348623157e308, np.inf, -np.inf, np.nan,
             0.5, 1.5, 2.5, 2.0**31, -(2.0**31), 2.0**63, 2.0**64, 65520.0, 3.4028235677973366e38, 2.0**-149, 1e-46]  # fmt: skip


def edges(type):
    dtype = np.dtype(DTYPES[type])
    if type in ("f16", "bf16"):
        return np.array(F16_EDGES if type == "f16" else BF16_EDGES, np.uint16)
    if type in ("f16x2", "bf16x2", "f32x2"):
        one = edges(type[:-2])
        one, bits = one.view(f"u{one.itemsize}").astype(dtype), dtype.type(4 * dtype.itemsize)
        return (one[:, None] | one[None, ::-1] << bits).ravel()
    if type == "f32":
        return np.array(F32_EDGES, np.uint32).view(np.float32)
    if type == "f64":
        return np.array(F64_EDGES)
    if type == "pred":
        return np.array([False, True])
    info = np.iinfo(dtype)
    near = [0, 1, 2, 3, 7, 8, 15, 16, 24, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256]
    return np.array([n for n in [*near, -1, -2, -128, info.min, info.min + 1, info.max, info.max - 1, info.max // 2]
                     if info.min <= n <= info.max], dtype)  # fmt: skip


def random_values(type, n, rng):
    """A third of them bits at random, the others of a few binades around 1, or small integers."""
    dtype = np.dtype(DTYPES[type])
    if type == "pred":
        return rng.integers(0, 2, n).astype(bool)
    bits = rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8).view(dtype)
    near = np.ldexp(rng.standard_normal(n), rng.integers(-8, 9, n))
    if type == "f32":
        return np.where(rng.random(n) < 0.33, bits, near.astype(np.float32))
    if type == "f64":
        return np.where(rng.random(n) < 0.33, bits, near)
    if type == "f16":
        return np.where(rng.random(n) < 0.33, bits, near.astype(np.float16).view(np.uint16))
    if type == "bf16":
        return np.where(rng.random(n) < 0.33, bits, (near.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    if type in ("f16x2", "bf16x2", "f32x2"):
        halves = random_values(type[:-2], 2 * n, rng).astype(DTYPES[type[:-2]])
        halves = halves.view(f"u{halves.itemsize}").astype(dtype)
        return halves[:n] | halves[n:] << dtype.type(4 * dtype.itemsize)
    return np.where(rng.random(n) < 0.5, bits, rng.integers(0, 70, n).astype(dtype))


def sample(types, rng, n=640):
    """Edge values against each other, then random ones."""
    columns = []
    for type in types:
        values = random_values(type, n, rng)
        edge = edges(type)
        return_to = n // 2
        values[:return_to] = edge[rng.integers(0, len(edge), return_to)]
        columns.append(values)
    if len(types) == 1:
        columns[0][: min(n, len(edges(types[0])))] = edges(types[0])[:n]
    return columns


# ---- kernels ----


def register(dtype):
    dtype = np.dtype(dtype)
    return ".pred" if dtype == np.bool_ else f".b{max(16, 8 * dtype.itemsize)}"


def kernel(body, inputs, outputs, name="k"):
    """An entry of a thread per element: `body` computes %names of outputs from %names of inputs; %lane is free to use.

    inputs, outputs: name -> dtype. Predicates are bytes in memory.
    """
    lines = [".reg .b64 %at, %thread64; .reg .b32 %thread, %block, %lane; .reg .b16 %byte;"]
    lines += [f".reg {register(t)} %{n}; .reg .b64 %at_{n};" for n, t in {**inputs, **outputs}.items()]
    lines += ["mov.u32 %thread, %tid.x; mov.u32 %block, %ctaid.x; mov.u32 %lane, %ntid.x;",
              "mad.lo.s32 %thread, %block, %lane, %thread; mov.u32 %lane, %laneid;"]  # fmt: skip
    for n, t in {**inputs, **outputs}.items():
        size = np.dtype(t).itemsize
        lines.append(f"ld.param.u64 %at_{n}, [{n}]; mad.wide.u32 %at_{n}, %thread, {size}, %at_{n};")
    for n, t in inputs.items():
        if np.dtype(t) == np.bool_:
            lines.append(f"ld.global.u8 %byte, [%at_{n}]; setp.ne.u16 %{n}, %byte, 0;")
        else:
            lines.append(f"ld.global.b{8 * np.dtype(t).itemsize} %{n}, [%at_{n}];")
    lines.append(body)
    for n, t in outputs.items():
        if np.dtype(t) == np.bool_:
            lines.append(f"selp.u16 %byte, 1, 0, %{n}; st.global.u8 [%at_{n}], %byte;")
        else:
            lines.append(f"st.global.b{8 * np.dtype(t).itemsize} [%at_{n}], %{n};")
    parameters = ", ".join(f".param .u64 {n}" for n in {**inputs, **outputs})
    text = "\n  ".join(lines)
    return f".visible .entry {name}({parameters})\n{{\n  {text}\n  ret;\n}}\n"


def module(*kernels, arch="sm_90a", isa="8.7"):
    return f".version {isa}\n.target {arch}\n.address_size 64\n" + "\n".join(kernels)


def run(body, inputs, outputs, threads=128, arch="sm_90a", **options):
    """The outputs, name -> array, of `body` on inputs, name -> array of one length, a multiple of 32.

    options: of gpuless.gpu; .approx results are exact unless they say so.
    """

    n = len(next(iter(inputs.values())))
    dtypes = {name: a.dtype for name, a in inputs.items()}
    text = module(kernel(body, dtypes, outputs), arch=arch)
    made = {name: np.zeros(n, t) for name, t in outputs.items()}
    tensors = [torch.from_numpy(np.ascontiguousarray(a).view(np.uint8)) for a in [*inputs.values(), *made.values()]]
    while n % threads:
        threads //= 2
    assert threads >= 32
    with gpuless.gpu(arch, **{"approximate": False, **options}):
        gpuless.Module(text)["k"].launch(n // threads, threads, tensors)
    return made


NAMES = "abcefg"


def body_of(spec, op):
    if spec.body:
        return spec.body.format(op=op)
    return f"{op} %d, {', '.join('%' + n for n in NAMES[: len(spec.sources)])};"


def resolve(type, op):
    return type if isinstance(type, str) else op.type(type) if isinstance(type, int) else type(op)


def types_of(spec, op):
    return resolve(spec.destination, op), [resolve(t, op) for t in spec.sources]


def seed_of(text):
    return zlib.crc32(text.encode())


def same(result, expected, type):
    """Equal bits; of NaN, those that the ISA calls canonical, and any of fp64's."""
    result, expected = np.asarray(result), np.asarray(expected).astype(DTYPES[type])
    if type == "f64":
        return (result.view(np.uint64) == expected.view(np.uint64)) | (np.isnan(result) & np.isnan(expected))
    if type == "f32":
        bits = np.where(np.isnan(expected), np.uint32(0x7FFFFFFF), expected.view(np.uint32))
        return result.view(np.uint32) == bits
    return result == expected


def check(spec, op):
    """Runs one spelling against the model."""
    destination, sources = types_of(spec, op)
    rng = np.random.default_rng(seed_of(op))
    values = spec.values(op, rng) if spec.values else sample(sources, rng)
    with np.errstate(all="ignore"):
        expected = spec.model(op, *values)
    inputs = dict(zip(NAMES, values))
    result = run(body_of(spec, op), inputs, {"d": np.dtype(DTYPES[destination])}, arch=spec.arch)["d"]
    with np.errstate(all="ignore"):
        good = spec.compare(op, result, expected, *values) if spec.compare else same(result, expected, destination)
    if not np.all(good):
        at = int(np.argmin(good))
        shown = ", ".join(f"{n}={v[at]!r}" for n, v in inputs.items())
        raise AssertionError(
            f"{op}: {shown} gave {result[at]!r}, not {expected[at]!r}; {np.sum(~good)} of {len(good)} differ"
        )


def import_all():
    """Every test module of rows, for what they declare."""
    folder = pathlib.Path(__file__).parent
    for path in sorted((*folder.glob("test_rows_*.py"), *folder.glob("test_cluster*.py"))):
        importlib.import_module(path.stem)
