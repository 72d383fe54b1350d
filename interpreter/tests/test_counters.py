"""Counters equal what can be derived by hand, and the modelled time is made of its terms."""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from ptx import MBARRIER, WAIT, integers, kernel

import gpuless
from gpuless import core
from gpuless.rates import RATES, rates
from gpuless.timing.model import PIPES

pytestmark = pytest.mark.interpreted


def counted(body, *args, arch="sm_90a", grid=1, block=32, shared=4096, launches=1, **options):
    """The device, after the launches."""
    with gpuless.gpu(arch, counters=True, **options) as device:
        k = gpuless.Module(kernel(body, args, arch, block, shared))["k"]
        for _ in range(launches):
            k.launch(grid, block, args)
    return device


def of(device, opcode):
    """The counts of the lines with this instruction."""
    total = gpuless.Counts()
    for line in device.profile():
        if line.text.startswith(opcode):
            total += line.counts
    return total


# ---- by hand ----


def transpose(stride):
    """32 x 32 words by one warp, through a tile whose rows are `stride` words apart."""
    return f"""
    mov.u32 %r0, 0;
    shl.b32 %r1, %t, 2;
    cvt.u64.u32 %rd0, %r1;
    add.u64 %rd1, %a0, %rd0;
    add.u32 %r2, %s, %r1;
    fill:
    ld.global.b32 %r3, [%rd1];
    st.shared.b32 [%r2], %r3;
    add.u64 %rd1, %rd1, 128;
    add.u32 %r2, %r2, {4 * stride};
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 32;
    @%p0 bra fill;
    bar.warp.sync 0xffffffff;
    mov.u32 %r0, 0;
    add.u64 %rd1, %a1, %rd0;
    mul.lo.u32 %r2, %t, {4 * stride};
    add.u32 %r2, %s, %r2;
    drain:
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%rd1], %r3;
    add.u64 %rd1, %rd1, 128;
    add.u32 %r2, %r2, 4;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 32;
    @%p0 bra drain;
    """


@pytest.mark.parametrize(
    ("stride", "conflict"),
    [
        # Lane t reads word 33 t + r, in bank (33 t + r) % 32 = (t + r) % 32: all different, one wavefront.
        (33, 1),
        # Word 34 t + r is in bank (2 t + r) % 32, which t and t + 16 share: two wavefronts.
        (34, 2),
        # Word 32 t + r is in bank r, for all 32.
        (32, 32),
    ],
)
def test_transpose(stride, conflict):
    x = integers(32, 32)
    y = torch.zeros_like(x)
    device = counted(transpose(stride), x, y, shared=32 * 4 * stride)
    assert torch.equal(y, x.T)
    (k,) = device.kernels()
    c = k.counts
    # 32 stores of a row of neighbouring words, one wavefront each, and 32 loads of a column.
    assert (c.wavefronts, c.ideal_wavefronts) == (32 + 32 * conflict, 64)
    stored, loaded = of(device, "st.shared"), of(device, "ld.shared")
    assert (stored.wavefronts, stored.conflict_ratio) == (32, 1)
    assert (loaded.wavefronts, loaded.conflict_ratio) == (32 * conflict, conflict)
    assert c.shared_read == c.shared_written == c.global_read == c.global_written == 4096
    # A row is 128 bytes, four sectors, and y's begin where a sector does too.
    assert (c.requests, c.sectors, c.sectors_per_request) == (64, 256, 4)
    assert (k.footprint_read, k.footprint_written) == (4096, 4096)
    # As the text has it: two parameters and the registers %t, %s before the body, the end of the kernel after it.
    assert c.instructions == {
        "constant load": 2, "global load": 32, "global store": 32, "shared load": 32, "shared store": 32,
        "move": 2 + 2, "barrier": 1, "conversion": 1,
        "integer": 2 + 3 + 2 * 32 * 3, "logic": 1, "compare": 64, "control": 64 + 1,
    }  # fmt: skip
    assert c.lanes == 32 * (c.issued - 2)  # the last branch of each loop is issued with no lane
    assert not c.waits and not c.macs


def strided(stride, width=4, offset=0):
    register, vector = ("%r2", "") if width == 4 else ("{%r2, %r3, %r4, %r5}", ".v4")
    return f"""
    mul.lo.u32 %r1, %t, {stride};
    cvt.u64.u32 %rd0, %r1;
    add.u64 %rd0, %a0, %rd0;
    ld.global{vector}.b32 {register}, [%rd0+{offset}];
    """


@pytest.mark.parametrize(
    ("stride", "width", "offset", "sectors"),
    [
        (4, 4, 0, 4),  # 32 lanes x 4 bytes = 128 bytes
        (4, 4, 4, 5),  # the same across a sector's boundary
        (8, 4, 0, 8),  # every other word of 256 bytes
        (32, 4, 0, 32),  # a sector a lane
        (64, 4, 0, 32),  # and not more with every other sector
        (0, 4, 0, 1),
        (16, 16, 0, 16),  # 512 bytes
        (32, 16, 16, 32),
    ],
)
def test_strided_global_read(stride, width, offset, sectors):
    x = torch.zeros(4096, dtype=torch.uint8)
    device = counted(strided(stride, width, offset), x)
    (k,) = device.kernels()
    c = of(device, "ld.global")
    assert (c.requests, c.sectors, c.global_read) == (1, sectors, 32 * width)
    assert (k.footprint_read, k.footprint_written) == (32 * sectors, 0)
    assert c.global_written == 0


def test_lanes_that_take_turns_at_two_sectors():
    x = torch.zeros(4096, dtype=torch.uint8)
    c = of(counted("and.b32 %t, %t, 1;\n" + strided(64), x), "ld.global")
    assert (c.requests, c.sectors, c.global_read) == (1, 2, 128)


@pytest.mark.parametrize(
    ("instruction", "stride", "actual", "ideal"),
    [
        ("ld.shared.b16 %h0", 2, 1, 1),  # 16 words, each of two lanes
        ("ld.shared.b32 %r2", 0, 1, 1),  # one word of all
        ("ld.shared.b32 %r2", 8, 2, 1),  # banks 2 t % 32, of t and t + 16
        ("ld.shared.v2.b32 {%r2, %r3}", 8, 2, 2),  # two phases of 16 lanes x 2 words
        ("ld.shared.v2.b32 {%r2, %r3}", 16, 4, 2),  # banks 4 t % 32, of t and t + 8 in a phase
        ("ld.shared.v4.b32 {%r2, %r3, %r4, %r5}", 16, 4, 4),  # four phases of 8 lanes x 4 words
        ("ld.shared.v4.b32 {%r2, %r3, %r4, %r5}", 0, 4, 4),
        ("ld.shared.v4.b32 {%r2, %r3, %r4, %r5}", 128, 32, 4),  # all 8 lanes of a phase in banks 0 to 3
        ("@%p0 ld.shared.v4.b32 {%r2, %r3, %r4, %r5}", 128, 5, 1),  # of lanes 0 to 4, in one phase
    ],
)
def test_wavefronts(instruction, stride, actual, ideal):
    body = f"""
    setp.lt.u32 %p0, %t, 5;
    mad.lo.u32 %r1, %t, {stride}, %s;
    {instruction}, [%r1];
    """
    c = counted(body, checks=False).kernels()[0].counts  # of memory that nobody wrote
    assert (c.wavefronts, c.ideal_wavefronts) == (actual, ideal)


ZEROS = """
    mov.u32 %r0, 0;
    shl.b32 %r1, %t, 4;
    add.u32 %r1, %s, %r1;
    st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};
    st.shared.v4.b32 [%r1+2048], {%r0, %r0, %r0, %r0};
    fence.proxy.async;
    bar.sync 0;
"""


@pytest.mark.parametrize("a_in_registers", [False, True])
def test_wgmma(a_in_registers):
    # A: 64 x 16 f16 and B: 16 x 64 f16, 2048 bytes each, without a swizzle: 128 bytes between core matrices along K,
    # 256 along M and N.
    strides = 128 >> 4 << 16 | 256 >> 4 << 32
    acc = ", ".join(f"%f{i}" for i in range(32))
    a = "{%r4, %r5, %r6, %r7}, %rd1, 1, 1, 1, 0" if a_in_registers else "%rd0, %rd1, 1, 1, 1, 0, 0"
    body = f"""
    {"".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(32))}
    {"".join(f"mov.b32 %r{i}, 0;" for i in range(4, 8))}
    {ZEROS}
    mov.b64 %rd2, {strides};
    shr.b32 %r2, %s, 4;
    cvt.u64.u32 %rd0, %r2;
    or.b64 %rd0, %rd0, %rd2;
    add.u64 %rd1, %rd0, {2048 >> 4};
    mov.u32 %r3, 0;
    setp.eq.u32 %p1, %r3, 0;
    wgmma.fence.sync.aligned;
    loop:
    wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {{{acc}}}, {a.replace("%rd1, 1,", "%rd1, %p1,")};
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p0, %r3, 3;
    @%p0 bra loop;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    """
    (k,) = counted(body, block=128).kernels()
    c = k.counts
    # Three operations, each issued by four warps.
    assert c.instructions["wgmma"] == 3 * 4
    assert c.instructions["wgmma wait"] == 3 * 4  # fence, commit, wait
    assert c.macs == {"wgmma f16": 3 * 64 * 64 * 16}
    # An operation reads B once, and A unless it is in registers.
    assert c.matrix_shared == 3 * 2048 * (1 if a_in_registers else 2)
    # Only the stores of zeros: 16 bytes a lane are four phases of eight lanes, 128 bytes each.
    assert (c.wavefronts, c.ideal_wavefronts) == (4 * 2 * 4, 4 * 2 * 4)


def test_mma_and_ldmatrix():
    body = f"""
    {ZEROS}
    and.b32 %r1, %t, 15;
    mul.lo.u32 %r1, %r1, 32;
    add.u32 %r1, %s, %r1;
    shr.b32 %r2, %t, 4;
    mad.lo.u32 %r1, %r2, 16, %r1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r1];
    mov.f32 %f0, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
      {{%f1, %f2, %f3, %f4}}, {{%r4, %r5, %r6, %r7}}, {{%r4, %r5}}, {{%f0, %f0, %f0, %f0}};
    @!%p0 mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
      {{%r8, %r9, %r10, %r11}}, {{%r4, %r5, %r6, %r7}}, {{%r4, %r5}}, {{%r0, %r0, %r0, %r0}};
    """
    device = counted("setp.lt.u32 %p0, %t, 64;\n" + body, block=128)
    (k,) = device.kernels()
    # Of four warps, two execute the second product; all of them issue it.
    assert k.counts.instructions["mma"] == 8
    assert k.counts.macs == {"mma f16": 4 * 16 * 8 * 16, "mma s8": 2 * 16 * 8 * 32}
    # Rows of 16 bytes, 32 apart: of the eight of a matrix, rows r and r + 4 share their banks.
    c = of(device, "ldmatrix")
    assert (c.wavefronts, c.ideal_wavefronts, c.shared_read) == (4 * 4 * 2, 4 * 4, 4 * 512)


def test_cp_async():
    # Lanes 0 to 15 copy 16 bytes, lanes 16 to 23 copy 8 of 16, the others nothing; all write 16 bytes.
    body = """
    shl.b32 %r1, %t, 4;
    cvt.u64.u32 %rd0, %r1;
    add.u64 %rd0, %a0, %rd0;
    add.u32 %r2, %s, %r1;
    mov.u32 %r3, 16;
    setp.ge.u32 %p0, %t, 16;
    @%p0 mov.u32 %r3, 8;
    setp.ge.u32 %p0, %t, 24;
    @%p0 mov.u32 %r3, 0;
    cp.async.cg.shared.global [%r2], [%rd0], 16, %r3;
    cp.async.wait_all;
    """
    device = counted(body, torch.zeros(512, dtype=torch.uint8))
    c = of(device, "cp.async.cg")
    assert (c.requests, c.sectors, c.global_read) == (1, 24 * 16 // 32, 16 * 16 + 8 * 8)
    assert (c.wavefronts, c.ideal_wavefronts, c.shared_written) == (4, 4, 512)
    assert device.kernels()[0].footprint_read == 24 * 16
    assert device.kernels()[0].counts.instructions["async copy"] == 2
    # A guard that is off issues the instruction with no lane.
    assert of(device, "mov.u32").lanes < 32 * of(device, "mov.u32").issued


def test_tma():
    x = integers(64, 64)
    device = counted(
        MBARRIER + """
        @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 4096;
        @%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%s+1024], [%a0, {%r30, %r31}], [%s];
        """.replace("%r30", "48").replace("%r31", "40") + WAIT.format(0),
        gpuless.tensor_map(x, box=(32, 32)),
        shared=8192,
    )  # fmt: skip
    (k,) = device.kernels()
    # The box begins at row 40 and column 48 of 64 x 64: 24 rows of 16 words are there, the rest of the 4096 bytes is fill.
    assert (k.counts.bulk_read, k.counts.bulk_shared, k.counts.bulk_written) == (24 * 16 * 4, 4096, 0)
    assert k.footprint_read == 24 * 16 * 4
    assert k.counts.requests == 0
    assert k.counts.instructions["TMA"] == 1


@pytest.mark.parametrize(("lanes", "last", "boxes"), [(1, 0, 1), (32, 0, 1), (32, 8, 2)])
def test_a_store_of_one_box_by_several_lanes_is_one(lanes, last, boxes):
    x = integers(64, 64)
    device = counted(
        f"""
        shl.b32 %r1, %t, 2;
        add.u32 %r1, %s, %r1;
        st.shared.u32 [%r1], %t;
        fence.proxy.async.shared::cta;
        bar.warp.sync 0xffffffff;
        setp.lt.u32 %p0, %t, {lanes};
        setp.eq.u32 %p1, %t, 31;
        selp.u32 %r2, {last}, 0, %p1;
        mov.u32 %r3, 0;
        @%p0 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%a0, {{%r3, %r2}}], [%s];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        """,
        gpuless.tensor_map(x, box=(8, 4)),
        shared=128,
    )
    (k,) = device.kernels()
    assert (k.counts.bulk_written, k.counts.bulk_shared) == (boxes * 128, boxes * 128)


def test_generic_addresses_and_atomics():
    x = torch.zeros(64, dtype=torch.int32)
    body = """
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %s, %r1;
    cvt.u64.u32 %rd0, %r2;
    cvta.shared.u64 %rd0, %rd0;
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd1, %a0, %rd1;
    st.b32 [%rd0], %t;
    setp.lt.u32 %p0, %t, 8;
    selp.b64 %rd2, %rd1, %rd0, %p0;
    ld.b32 %r3, [%rd2];
    red.global.add.u32 [%rd1], %r3;
    bar.warp.sync 0xffffffff;
    atom.shared.add.u32 %r4, [%s], 1;
    """
    device = counted(body, x)
    stored, loaded, red, atom = (of(device, op) for op in ("st.b32", "ld.b32", "red.", "atom."))
    assert (stored.wavefronts, stored.shared_written, stored.requests) == (1, 128, 0)
    # Eight lanes in one sector of global memory, 24 in shared.
    assert (loaded.requests, loaded.sectors, loaded.global_read, loaded.shared_read) == (1, 1, 32, 96)
    assert loaded.wavefronts == 1
    assert (red.requests, red.sectors, red.global_read, red.global_written) == (1, 4, 128, 128)
    assert (atom.shared_read, atom.shared_written, atom.wavefronts) == (128, 128, 0)
    assert red.instructions == {"atomic": 1} and loaded.instructions == {"generic load": 1}


# ---- waits ----


@pytest.mark.parametrize("seed", range(4))
def test_barrier_waits(seed):
    # Whoever comes last goes through, the others find themselves blocked once: nothing else happens meanwhile.
    (k,) = counted("bar.sync 0;", block=128, seed=seed).kernels()
    assert k.counts.waits == {"barrier": 3}
    assert k.counts.instructions["barrier"] == 4


def test_mbarrier_waits():
    found = [of(counted(MBARRIER + "@%p0 mbarrier.arrive.shared::cta.b64 _, [%s];\n" + WAIT.format(0), block=64, seed=seed),
                "mbarrier.try_wait").waits["mbarrier"] for seed in range(8)]  # fmt: skip
    assert max(found) > 0  # the warp that does not arrive may have to wait


# ---- of many ----


def everything(device):
    """What does not depend on the schedule."""
    return [
        [{name: n for name, n in i.items() if name != "waits"} for i in k.instructions] for k in device.kernels()
    ], [(k.footprint_read, k.footprint_written) for k in device.kernels()]


def test_seed_and_threads_do_not_matter():
    x = integers(32, 32)
    made = [
        counted(transpose(34), x, torch.zeros_like(x), grid=9, shared=32 * 4 * 34, checks=False, **how)
        for how in ({}, {"seed": 1}, {"seed": 2, "threads": 1}, {"seed": 3, "threads": 3})
    ]
    first = everything(made[0])
    assert first[0][0]
    for other in made[1:]:
        assert everything(other) == first
    assert made[0].kernels()[0].counts.wavefronts == 9 * 96


def test_launches_add_up_and_shapes_are_apart():
    with gpuless.gpu("sm_80", counters=True) as device, gpuless.gpu("sm_80", counters=True) as other:
        k = gpuless.Module(kernel("bar.sync 0;", (), "sm_80", 32))["k"]
        k.launch(2, 32, ())
        k.launch(2, 32, ())
        k.launch(3, 32, ())
    assert device.kernels() == []
    assert [(k.grid, k.launches, k.counts.instructions["barrier"]) for k in other.kernels()] == [
        ((2, 1, 1), 2, 4),
        ((3, 1, 1), 1, 3),
    ]
    assert sum(line.counts.instructions["barrier"] for line in other.profile()) == 7
    assert other.profile("no such kernel") == []


def test_off_by_default():
    with gpuless.gpu("sm_90a") as device:
        gpuless.Module(kernel("bar.sync 0;", ()))["k"].launch(1, 32, ())
    assert json.loads(core.load().gpuless_profile_json(0)) == []
    with pytest.raises(ValueError, match="counters=True"):
        device.profile()


def test_a_module_may_go():
    device = counted(strided(4), torch.zeros(4096, dtype=torch.uint8))  # its module has gone by now
    assert [line.counts.sectors for line in device.profile() if line.counts.requests] == [4]


def test_every_row_has_a_class():
    table = pathlib.Path(__file__).parents[1] / "csrc/instruction_class.cpp"
    whole = set(re.findall(r'\{"([\d.]+)", "", ', table.read_text()))
    for row in core.rows():
        parts = row["section"].split(".")
        assert any(".".join(parts[:n]) in whole for n in range(3, len(parts) + 1)), row


# ---- the model ----


def test_model_of_a_copy():
    x = torch.zeros(1 << 14, dtype=torch.int32)
    body = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r1, %r1, 128, %t;
    shl.b32 %r1, %r1, 4;
    cvt.u64.u32 %rd0, %r1;
    add.u64 %rd1, %a0, %rd0;
    add.u64 %rd2, %a1, %rd0;
    ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1];
    st.global.v4.b32 [%rd2], {%r2, %r3, %r4, %r5};
    """
    device = counted(body, x, torch.empty_like(x), arch="sm_80", grid=32, block=128, launches=2)
    (m,) = device.model()
    assert m.launches == 2
    assert m.terms["DRAM"] == pytest.approx(2 * 2 * 65536 / 2039e9)
    assert m.terms["L2"] == pytest.approx(2 * 2 * 65536 / (5120 * 1410e6))
    # 128 warps with 2 loads of parameters, mad, shl, cvt, 2 adds, 2 accesses, ret; 32 CTAs on 108 multiprocessors.
    assert m.terms["issue"] == pytest.approx(2 * 4 * 10 / 4 / 1410e6)
    assert m.terms["integer"] == pytest.approx(2 * 4 * 4 * 32 / 64 / 1410e6)
    assert m.terms["shared memory and L1"] == pytest.approx(2 * 4 * 2 * 512 / 128 / 1410e6)
    assert (m.binding, m.seconds) == ("DRAM", m.terms["DRAM"])
    assert str(m).startswith("modelled ") and "bound by DRAM" in str(m)


def test_model_terms_add_up():
    x = integers(32, 32)
    with gpuless.gpu("sm_90a", counters=True, checks=False) as device:  # every CTA writes the same
        y = torch.zeros_like(x)
        k = gpuless.Module(kernel(transpose(32), (x, y), shared=4096))["k"]
        for grid in (1, 132, 133):
            k.launch(grid, 32, (x, y))
    one, full, more = device.model()
    for m in (one, full, more):
        assert m.seconds == max(m.terms.values()) == m.terms[m.binding]
        assert set(m.terms) == {*PIPES, "issue", "tensor cores", "shared memory and L1", "L2", "DRAM"}
        assert all(s >= 0 and math.isfinite(s) for s in m.terms.values())
    # (32 + 32 * 32) wavefronts of 128 bytes, and 64 requests of four sectors, at 128 bytes a clock
    assert one.binding == "shared memory and L1"
    assert one.seconds == pytest.approx((32 + 32 * 32 + 64) / 1830e6)
    # A multiprocessor for each CTA, and then one with two.
    assert full.seconds == pytest.approx(one.seconds) and more.seconds == pytest.approx(2 * one.seconds)


def test_rates_have_sources():
    for name, unit, values, source in RATES:
        assert len(values) == len(core.ARCHITECTURES) and unit and source, name
    for arch in core.ARCHITECTURES:
        assert {*PIPES, "issue", "L2", "DRAM", "shared memory", "clock"} <= set(rates(arch))
    # The peaks that the white papers print, in TFLOPS: multiprocessors x clock x MAC x 2.
    peaks = {"sm_80": (108, 312), "sm_90a": (132, 989.4), "sm_100a": (148, 2250), "sm_120": (188, 503.8)}
    for arch, (multiprocessors, peak) in peaks.items():
        r = rates(arch)
        assert multiprocessors * r["clock"] * r["mma f16"] * 2 / 1e6 == pytest.approx(peak, rel=0.001)


# ---- the report ----

SCRIPT = """
import gpuless, torch, sys
x = torch.zeros(32, 32, dtype=torch.int32)
gpuless.Module(open(sys.argv[1]).read())["k"].launch(1, 32, (x, x))
print("done")
"""


def test_report(tmp_path):
    source = tmp_path / "tile.cu"
    source.write_text("first\nthe column, read\nlast\n")
    text = kernel(transpose(34), (0, 0), shared=32 * 4 * 34)
    text = text.replace("ld.shared", ".loc 1 2 0\nld.shared").replace("st.global", ".loc 1 3 0\nst.global")
    ptx = tmp_path / "k.ptx"
    ptx.write_text(text + f'\n.file 1 "{source}"\n')
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "gpuless", "report"]
    kept = tmp_path / "counts.json"
    done = subprocess.run([*command, "--json", kept, script, ptx], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("done\n")
    (line,) = [line.split() for line in done.stdout.splitlines() if "the column, read" in line]
    # one instruction: loads by every lane, two wavefronts each
    assert line == ["tile.cu:2", "32", "32.0", "64", "(2.00)", "the", "column,", "read"]
    assert "modelled " in done.stdout
    again = subprocess.run([*command, kept], capture_output=True, text=True)
    assert again.stdout == done.stdout.removeprefix("done\n")
    missing = subprocess.run([*command, tmp_path / "none.py"], capture_output=True, text=True)
    assert missing.returncode == 2 and "there is no" in missing.stderr
