"""32-bit offsets that overflow on their way to an address: found where the value reaches it, and nowhere else."""

import subprocess
import sys

import pytest
import torch
from ptx import kernel

import gpuless

pytestmark = pytest.mark.interpreted

#: 65536 * 65537 is 65536 in 32 bits
A, B, WRAPPED = 65536, 65537, 65536
PRODUCT = "mul.lo.s32 %r3, %r1, %r2;\n"
SIZES = "cvt.u32.u64 %r1, %a1;\ncvt.u32.u64 %r2, %a2;\n"
ADDRESS = "mul.wide.s32 %rd1, %r3, 4;\nadd.s64 %rd2, %a0, %rd1;\n"
STORE = "st.global.u32 [%rd2], 7;\n"


def found(body, a=A, b=B, largest=0, words=2 * WRAPPED, findings="collect"):
    """%r1 and %r2 are the two numbers, %a0 the address of so many words. What overflows."""
    x = torch.zeros(words, dtype=torch.int32)
    text = kernel(SIZES + body, (x, a, b))
    with gpuless.gpu("sm_80", findings=findings, largest=largest) as device:
        gpuless.Module(text)["k"].launch(1, 32, [x, a, b])
    return [f for f in device.findings if f.kind == "overflow"]


def line_of(n, body):
    """Of the kernel around the body."""
    return kernel(SIZES + body, (torch.zeros(1), 0, 0)).splitlines()[n - 1]


@pytest.mark.parametrize(
    ("body", "origin"),
    [
        (PRODUCT + ADDRESS + STORE, "mul.lo"),
        ("mul.lo.u32 %r3, %r1, %r2;\ncvt.s64.s32 %rd1, %r3;\nshl.b64 %rd1, %rd1, 2;\nadd.s64 %rd2, %rd1, %a0;\n" + STORE, "mul.lo"),
        ("mad.lo.s32 %r3, %r1, %r2, %t;\n" + ADDRESS + STORE, "mad.lo"),
        (PRODUCT + "add.s32 %r3, %r3, %t;\n" + ADDRESS + STORE, "mul.lo"),
        (PRODUCT + "mul.wide.u32 %rd1, %r3, 4;\nadd.s64 %rd2, %a0, %rd1;\n" + STORE, "mul.lo"),
        (PRODUCT + "mad.wide.s32 %rd2, %r3, 4, %a0;\n" + STORE, "mul.lo"),
        (PRODUCT + ADDRESS + "ld.global.u32 %r4, [%rd2+4];\n", "mul.lo"),
        (PRODUCT + ADDRESS + "atom.global.add.u32 %r4, [%rd2], 1;\n", "mul.lo"),
        (PRODUCT + ADDRESS + "cp.async.ca.shared.global [%s], [%rd2], 4;\ncp.async.wait_all;\n", "mul.lo"),
        ("shl.b32 %r3, %r1, 16;\nor.b32 %r3, %r3, %t;\nadd.s32 %r3, %r3, 3;\n" + ADDRESS + STORE, "shl"),
        ("shl.b32 %r4, %r1, 15;\nadd.s32 %r3, %r4, %r4;\n" + ADDRESS + STORE, "shl"),  # 2^31 is not fit already
        ("shl.b32 %r4, %r1, 14;\nadd.s32 %r3, %r4, %r4;\nadd.s32 %r3, %r3, %r3;\n" + ADDRESS + STORE, "add.s32 %r3, %r4"),
        (PRODUCT + "setp.gt.s32 %p1, %t, 3;\nselp.b32 %r3, %r3, 0, %p1;\nmov.b32 %r5, %r3;\nmov.b32 %r3, %r5;\n" + ADDRESS + STORE,
         "mul.lo"),
        (PRODUCT + ADDRESS + "mov.b64 %rd3, %rd2;\ncvta.to.global.u64 %rd2, %rd3;\n" + STORE, "mul.lo"),
        ("sub.s32 %r3, -2147483647, %r1;\n" + ADDRESS + STORE, "sub"),
        # a pointer that runs: the sixty-fourth sum of 2^26 is one too many
        ("mov.u32 %r3, 0;\nmov.u32 %r4, 0;\nloop:\nadd.s32 %r3, %r3, 67108864;\nadd.s32 %r4, %r4, 1;\n"
         "setp.lt.s32 %p1, %r4, 64;\n@%p1 bra loop;\n" + ADDRESS + STORE, "add"),
    ],
)  # fmt: skip
def test_a_value_that_wrapped_reaches_an_address(body, origin):
    (f,) = found(body)
    assert f.kind == "overflow", f
    assert any(word in f.instruction for word in ("st.global", "ld.global", "atom.global", "cp.async")), f
    assert line_of(f.other_ptx_line, body).startswith(origin), f


def test_it_comes_before_what_follows_from_it():
    """Of an offset that leaves the tensor the first finding is its cause, with both numbers."""
    with pytest.raises(gpuless.Finding, match="offset of this address is 4900000000 and does not fit") as e:
        found(PRODUCT + ADDRESS + STORE, 70000, 70000, findings="raise")
    assert e.value.kind == "overflow" and "make 605032704 of it" in e.value.message and e.value.lane == 0


@pytest.mark.parametrize(
    "body",
    [
        PRODUCT,  # goes nowhere
        PRODUCT + ADDRESS,  # no access
        PRODUCT + ADDRESS + "setp.lt.s32 %p1, %t, 0;\n@%p1 " + STORE,  # none by a lane that has it
        PRODUCT + "and.b32 %r3, %r3, 1023;\n" + ADDRESS + STORE,  # hashes
        PRODUCT + "shr.u32 %r3, %r3, 20;\n" + ADDRESS + STORE,
        PRODUCT + "rem.u32 %r3, %r3, 1000;\n" + ADDRESS + STORE,
        PRODUCT + "xor.b32 %r3, %r3, %t;\nand.b32 %r3, %r3, 255;\n" + ADDRESS + STORE,
        PRODUCT + "mov.u32 %r3, %t;\n" + ADDRESS + STORE,  # replaced
        PRODUCT + "st.global.u32 [%a0], %r3;\n",  # a value
        "mul.wide.s32 %rd1, %r1, %r2;\nsub.s64 %rd1, %rd1, 4294967296;\nshl.b64 %rd1, %rd1, 2;\nadd.s64 %rd2, %a0, %rd1;\n" + STORE,
        # it comes back: signed sums, and unsigned ones beyond 2^31
        "add.s32 %r4, %r1, 2147483647;\nsub.s32 %r3, %r4, 2147483647;\n" + ADDRESS + STORE,
        "add.u32 %r3, %r1, 2147483647;\ncvt.u64.u32 %rd1, %r3;\nsub.s64 %rd1, %rd1, 2147483647;\nadd.s64 %rd2, %a0, %rd1;\n"
        "st.global.u8 [%rd2], 7;\n",
        # -1 is no large number, and neither are lanes that do not take part
        "sub.s32 %r3, %t, 1;\nadd.s32 %r3, %r3, 1;\nmul.wide.u32 %rd1, %r3, 4;\nadd.s64 %rd2, %a0, %rd1;\n" + STORE,
        "mov.u32 %r3, 1;\nsetp.lt.s32 %p1, %t, 0;\n@%p1 mul.lo.s32 %r3, %r1, %r2;\n" + ADDRESS + STORE,
        # the addresses of shared memory have 32 bits
        "mul.lo.s32 %r3, %r1, %r2;\nsub.u32 %r3, %r3, %r1;\nadd.u32 %r3, %r3, %s;\nst.shared.u32 [%r3], 1;\n",
    ],
)  # fmt: skip
def test_what_is_right_is_silent(body):
    assert found(body) == []
    assert found(ADDRESS.replace("%r3", "%t") + STORE) == []


SMALL = "mad.lo.s32 %r3, %r1, %r2, %t;\n" + ADDRESS + STORE


def test_at_a_small_size_for_a_large_one():
    """1000 rows of 100 in half a megabyte: in 32 GB offsets are 65536 times larger."""
    assert found(SMALL, 1000, 100) == []
    (f,) = found(SMALL, 1000, 100, largest="32GB")
    assert f.kind == "overflow" and "65536 times larger" in f.message and "offset of this address is 10000" in f.message
    assert "mad.lo.s32" in f.message or f.other_ptx_line
    assert found(SMALL, 1000, 100, largest="4GB") == []  # 100000 * 8192 fits
    assert found(SMALL, 1000, 100, largest=str(2**20)) == []
    unsigned = SMALL.replace("mul.wide.s32", "mul.wide.u32")
    assert found(SMALL, 1000, 100, largest="12GB") and found(unsigned, 1000, 100, largest="12GB") == []


@pytest.mark.parametrize(
    "body",
    [
        "mul.wide.s32 %rd3, %r1, %r2;\nshl.b64 %rd1, %rd3, 2;\nadd.s64 %rd2, %a0, %rd1;\n" + STORE,  # in 64 bits
        "add.s32 %r3, %t, 100;\n" + ADDRESS + STORE,  # a column
        PRODUCT + "rem.s32 %r3, %r3, 30;\n" + ADDRESS + STORE,
        PRODUCT + "st.global.u32 [%a0], %r3;\n",
    ],
)
def test_what_stays_small_or_is_wide_is_silent(body):
    assert found(body, 1000, 100, largest="32GB") == []


def test_sizes_are_checked():
    for wrong in ("much", "32XB", -1, "1.5GB", 2**63):
        with (
            pytest.raises(ValueError, match="largest is a number of bytes, such as 34359738368 or '32GB'"),
            gpuless.gpu(largest=wrong),
        ):
            pass


SCRIPT = """
import torch, triton, triton.language as tl

@triton.jit
def touch(x, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = row.to(tl.int64) if WIDE else row
    offset = row * stride  # HAZARD
    tl.store(x + offset, tl.load(x + offset) + 1)

n = 2**33
x = torch.zeros(n, dtype=torch.uint8, device="cuda")
for wide in WIDES:
    touch[(8,)](x, n // 1024, WIDE=wide, BLOCK=128)
"""


def test_triton(tmp_path):
    """A tensor of 2^33 elements, of which 1024 are touched; and the same kernel on a small one."""
    for wides, n, options, status in (
        ("[True]", "2**33", [], 0),
        ("[False]", "2**33", [], 3),
        ("[True]", "2**20", ["--largest=8GB"], 0),
        ("[False]", "2**20", [], 0),
        ("[False]", "2**20", ["--largest=8GB"], 3),
    ):
        script = tmp_path / f"touch{status}.py"
        script.write_text(SCRIPT.replace("WIDES", wides).replace("2**33", n))
        command = [sys.executable, "-m", "gpuless", "run", "--gpu=sm_90a", *options, script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, (wides, n, options, done.stderr)
        assert ("overflow: " in done.stderr) == (status == 3)
        if status:
            line = 1 + script.read_text().splitlines().index("    offset = row * stride  # HAZARD")
            assert f"touch3.py:{line}" in done.stderr, done.stderr
