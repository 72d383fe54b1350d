"""mma.sync against matrices in numpy: every shape and type, exact where sums are exact, within the error of fp32 elsewhere."""

import os
import subprocess
import sys

import numpy as np
import ptx
import pytest
import tensor_cores as tc
import torch
from mma_rows import mma
from rows import row, seed_of, spellings

import gpuless

pytestmark = pytest.mark.interpreted

FLOATS = [
    "mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k8|m16n8k16.row.col.f16.f16.f16.f16",
    "mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k4|m16n8k8.row.col.f32.tf32.tf32.f32",
    "mma.sync.aligned.m16n8k16|m16n8k32.row.col.f32.e4m3|e5m2.e4m3|e5m2.f32",
    "mma.sync.aligned.m16n8k16|m16n8k32.row.col.f16.e4m3|e5m2.e4m3|e5m2.f16",
    "mma.sync.aligned.m8n8k4|m16n8k4|m16n8k8|m16n8k16.row.col.rn?.f64.f64.f64.f64",
]
INTEGERS = [
    "mma.sync.aligned.m8n8k16|m16n8k16|m16n8k32.row.col.satfinite?.s32.s8|u8.s8|u8.s32",
    "mma.sync.aligned.m8n8k16|m16n8k16|m16n8k32.row.col.s32.s8|u8.s8|u8.s32.satfinite",
]
REFUSED = [
    "mma.sync.aligned.m8n8k4.row|col.row|col.f16|f32.f16.f16.f16|f32",
    "mma.sync.aligned.m8n8k32|m16n8k32|m16n8k64.row.col.satfinite?.s32.s4|u4.s4|u4.s32",
    "mma.sync.aligned.m8n8k128|m16n8k128|m16n8k256.row.col.s32.b1.b1.s32.xor|and.popc",
]


def operands(op, exact, warps=4):
    d_type, a_type, b_type, _ = tc.types_of(op)
    m, n, k = tc.mma_shape(op)
    rng = np.random.default_rng(seed_of(op))
    a = [tc.encode(tc.random_matrix(rng, (m, k), a_type, exact), a_type) for _ in range(warps)]
    b = [tc.encode(tc.random_matrix(rng, (k, n), b_type, exact), b_type) for _ in range(warps)]
    c = [tc.encode(tc.random_matrix(rng, (m, n), d_type, exact), d_type) for _ in range(warps)]
    if a_type == "tf32":  # bits that must not matter
        a = [x | rng.integers(0, 1 << 13, x.shape, dtype=np.uint32) for x in a]
    return a, b, c


@row(*FLOATS)
@pytest.mark.parametrize("op", [op for p in FLOATS for op in spellings(p)])
def test_floats(op):
    d_type, a_type, b_type, _ = tc.types_of(op)
    for exact in True, False:
        a, b, c = operands(op, exact)
        for got, x, y, z in zip(mma(op, a, b, c), a, b, c):
            x, y, z = tc.decode(x, a_type), tc.decode(y, b_type), tc.decode(z, d_type)
            if exact:
                assert np.array_equal(got, tc.product(x, y, z, d_type))
            else:
                error = np.abs(tc.decode(got, d_type) - (x @ y + z))
                bound = tc.error_bound(x, y, z, d_type) * (2.0**-29 if d_type == "f64" else 1)
                assert (error <= bound).all(), (error / bound).max()


@row(*INTEGERS)
@pytest.mark.parametrize("op", [op for p in INTEGERS for op in spellings(p)])
def test_integers(op):
    d_type, a_type, b_type, _ = tc.types_of(op)
    a, b, c = operands(op, exact=True)
    m, n, k = tc.mma_shape(op)
    # the largest and smallest sums that there are, on accumulators that they overflow
    extreme = [("s8", -128), ("u8", 255)]
    a.append(np.full((m, k), dict(extreme)[a_type]).astype(tc.INTEGERS[a_type]).view(np.uint8))
    b.append(np.full((k, n), dict(extreme)[b_type]).astype(tc.INTEGERS[b_type]).view(np.uint8))
    c.append(np.full((m, n), 2**31 - 5 if a_type == b_type else -(2**31) + 5).astype(np.int32).view(np.uint32))
    for got, x, y, z in zip(mma(op, a, b, c, threads=32), a, b, c):
        x, y, z = tc.decode(x, a_type), tc.decode(y, b_type), tc.decode(z, d_type)
        assert np.array_equal(got, tc.product(x, y, z, d_type, "satfinite" in op))


def test_nan_and_infinity():
    op = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    a, b, c = operands(op, exact=True, warps=4)
    a[0][3, 5], a[1][3, 5], b[1][5, :] = 0x7E00, 0x7C00, 0x3C00  # NaN; infinity times one
    c[2][4, 4] = 0xFF800000
    got = [tc.decode(x, "f32") for x in mma(op, a, b, c)]
    assert np.isnan(got[0][3]).all() and np.isfinite(np.delete(got[0], 3, 0)).all()
    assert (got[1][3] == np.inf).all() and got[2][4, 4] == -np.inf and np.isfinite(got[3]).all()


@pytest.mark.parametrize("type", ["e4m3", "e5m2", "bf16", "tf32"])
def test_nan_of_other_types(type):
    k = {1: 32, 2: 16, 4: 8}[tc.BYTES[type]]
    op = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{type}.{type}.f32"
    a, b, c = operands(op, exact=True)
    nan = {"e4m3": 0x7F, "e5m2": 0x7D, "bf16": 0x7FC0, "tf32": 0x7FC00000}[type]
    sign = 1 << 8 * tc.BYTES[type] - 1
    a[0][3, 5], a[1][3, 5], b[2][1, 7] = nan, nan | sign, nan
    got = [tc.decode(x, "f32") for x in mma(op, a, b, c)]
    assert np.isnan(got[0][3]).all() and np.isnan(got[1][3]).all() and np.isnan(got[2][:, 7]).all()
    assert np.isfinite(np.delete(got[0], 3, 0)).all() and np.isfinite(got[2][:, :7]).all() and np.isfinite(got[3]).all()


def test_subnormal_elements_count():
    for op, type in (("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "f16"),
                     ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32", "e4m3"),
                     ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "bf16")):  # fmt: skip
        a, b, c = operands(op, exact=True)
        rng = np.random.default_rng(1)
        width = 8 * tc.BYTES[type]
        a = [(rng.integers(0, 8, x.shape) | rng.integers(0, 2, x.shape) << width - 1).astype(x.dtype) for x in a]
        c = [np.zeros_like(x) for x in c]
        _, a_type, b_type, _ = tc.types_of(op)
        for got, x, y in zip(mma(op, a, b, c), a, b):
            expected = tc.decode(x, a_type) @ tc.decode(y, b_type)
            assert np.array_equal(tc.decode(got, "f32"), expected) and np.abs(expected).any()


@pytest.mark.parametrize("types", ["f32.f16.f16.f32", "f16.f16.f16.f16"])
def test_registers_that_are_two_operands(types):
    """D may be any of the registers that are read, in any order."""
    words = torch.tensor(np.random.default_rng(5).standard_normal((10, 64)), dtype=torch.float16).view(torch.int32)
    load = "".join(f"ld.global.b32 %r{k}, [%rd1+{128 * k}];\n" for k in range(10))
    a, b, c = "{%r0, %r1, %r2, %r3}", "{%r4, %r5}", [f"%r{k}" for k in range(6, 10 if types[:3] == "f32" else 8)]

    def product(*d):
        d, out = d[: len(c)], torch.zeros(len(c), 32, dtype=torch.int32)
        store = "".join(f"st.global.b32 [%rd2+{128 * k}], {r};\n" for k, r in enumerate(d))
        places = "mul.wide.u32 %rd0, %t, 4;\nadd.u64 %rd1, %a0, %rd0;\nadd.u64 %rd2, %a1, %rd0;\n"
        multiply = f"mma.sync.aligned.m16n8k16.row.col.{types} {{{', '.join(d)}}}, {a}, {b}, {{{', '.join(c)}}};\n"
        ptx.run(places + load + multiply + store, words, out)
        return out

    expected = product("%r10", "%r11", "%r12", "%r13")
    for registers in [(6, 7, 8, 9), (7, 6, 9, 8), (9, 8, 7, 6), (2, 3, 0, 1), (4, 5, 3, 6), (8, 9, 4, 2)]:
        assert torch.equal(product(*(f"%r{k}" for k in registers)), expected), registers


def launch_error(body, arch="sm_90a", threads=32):
    text = f""".version 8.7
.target {arch}
.address_size 64
.visible .entry k()
{{
  .reg .b32 %r<40>; .reg .f32 %f<8>; .reg .b16 %h<8>; .reg .b64 %d<8>; .reg .pred %p;
  {body}
  ret;
}}
"""
    with pytest.raises(gpuless.Finding) as found, gpuless.gpu(arch):
        gpuless.Module(text)["k"].launch(1, threads, [])
    return found.value


@row(*REFUSED)
def test_refused():
    rest = "{%r0}, {%r1}, {%r2}, {%r3};"
    for op, why in (
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32", "m16n8k16"),
        ("mma.sync.aligned.m8n8k32.row.col.s32.s4.u4.s32", "4-bit"),
        ("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc", "1-bit"),
    ):
        error = launch_error(f"{op} {rest}")
        assert error.kind == "unsupported" and why in error.message and op in error.message
    fp8 = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
    registers = "{%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3};"
    error = launch_error(f"{fp8} {registers}", arch="sm_80")
    assert error.kind == "unsupported" and "sm_89" in error.message and "sm_80" in error.message
    error = launch_error(f"{fp8} {registers.replace(', %r3', '')}")
    assert "has 3 registers" in error.message and "needs 4" in error.message


def test_part_of_a_warp():
    registers = "{%f0, %f1, %f2, %f3}, {%r0, %r1}, {%r2}, {%f0, %f1, %f2, %f3};"
    op = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
    error = launch_error(f"mov.u32 %r9, %tid.x; setp.lt.u32 %p, %r9, 20; @%p {op} {registers}")
    assert error.kind == "barrier" and "20 are here" in error.message


@pytest.mark.skipif("GPULESS_ISA" in os.environ, reason="is what that test runs")
def test_the_kernels_for_avx2():
    """Processors with AVX-512 do not take them of themselves; the choice falls when the library loads."""
    pick = "test_floats or test_integers or test_subnormal or test_registers"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", pick]
    made = subprocess.run(command, env={**os.environ, "GPULESS_ISA": "avx2"}, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-3000:]
