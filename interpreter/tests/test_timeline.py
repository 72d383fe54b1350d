"""The timeline's cycles equal what rates and latencies give by hand, and its parts add up."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from ptx import MBARRIER, ONE, WAIT, integers, kernel

import gpuless
from gpuless.latencies import LATENCIES, machine

pytestmark = pytest.mark.interpreted
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")


def recorded(
    body, *args, arch="sm_90a", grid=1, block=32, shared=4096, launches=1, cluster=1, programmatic=False, **options
):
    """The device, after the launches."""
    with gpuless.gpu(arch, timeline=True, **options) as device:
        k = gpuless.Module(kernel(body, args, arch, block, shared))["k"]
        for _ in range(launches):
            k.launch(grid, block, args, cluster=cluster, programmatic=programmatic)
    return device


def cycles(body, *args, **options):
    return recorded(body, *args, **options).timeline().cycles


def each(text, first, last, *args, before="", after="", **options):
    """Cycles that each further copy of the text takes, between so many and so many copies; {} is the copy's number."""
    few, many = (
        cycles(before + "".join(text.replace("{}", str(k)) for k in range(n)) + after, *args, **options)
        for n in (first, last)
    )
    return (many - few) / (last - first)


def waited(device):
    (k,) = device.timeline().kernels
    return k.waited


# ---- pipes ----

ONES = "".join(f"mov.f32 %f{k}, 0f3F800000;\n" for k in range(40))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dependent_fma(arch):
    """Four cycles, as Abdelkhalik et al. measured of a dependent float add on the A100."""
    assert each("fma.rn.f32 %f0, %f0, %f0, %f0;\n", 16, 64, before=ONES, arch=arch) == 4


INDEPENDENT = "".join(f"fma.rn.f32 %f{k}, %f{k}, %f{k}, %f{k};\n" for k in range(20))


@pytest.mark.parametrize(("arch", "interval"), [("sm_80", 2), ("sm_89", 1), ("sm_90a", 1)])
@pytest.mark.parametrize("warps", [1, 4, 8, 16])
def test_independent_fma(arch, interval, warps):
    """A scheduler's 16 lanes of floats take a warp instruction every other cycle on the A100, 32 one a cycle elsewhere; up
    to four warps have a scheduler each."""
    of_scheduler = (warps + 3) // 4
    assert each(INDEPENDENT, 5, 20, before=ONES, arch=arch, block=32 * warps) == 20 * interval * of_scheduler


def test_schedulers_issue_one_instruction_a_cycle():
    """Integers have 16 lanes of a scheduler, floats 32: two warps that do either by turns are bound by neither pipe alone."""
    body = "".join(f"fma.rn.f32 %f{k}, %f{k}, %f{k}, %f{k};\nadd.u32 %r{k}, %r{k}, 1;\n" for k in range(20))
    assert each(body, 5, 20, before=ONES, block=256) == 2 * 20 * 2


def test_special_functions_have_a_sixteenth_of_the_lanes():
    body = "".join(f"ex2.approx.ftz.f32 %f{k}, %f{k};\n" for k in range(20))
    assert each(body, 5, 20, before=ONES, block=128) == 20 * 8
    assert each("ex2.approx.ftz.f32 %f0, %f0;\n", 5, 20, before=ONES) == machine("sm_90a")["special function latency"]


def test_what_ptxas_makes_nothing_of_is_free():
    free = "mov.u32 %r1, %r2;\ncvt.u64.u32 %rd1, %r1;\ncvta.to.global.u64 %rd2, %a0;\nbra next{};\nnext{}:\n"
    assert each(free, 1, 20, torch.zeros(4)) == 0


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("add.u64 %rd1, %rd0, %rd2;", 2),  # with carry
        ("mul.wide.u32 %rd3, %r0, 4; add.u64 %rd1, %rd0, %rd3;", 1),  # IMAD.WIDE
        ("shl.b32 %r1, %r0, 2; add.u32 %r2, %r1, %r3;", 1),  # LEA
        ("add.u32 %r1, %r0, %r2; add.u32 %r4, %r1, %r3;", 1),  # IADD3
        ("and.b32 %r1, %r0, %r2; or.b32 %r4, %r1, %r3;", 1),  # LOP3
        ("and.b32 %r1, %r0, %r2; or.b32 %r4, %r1, %r3; xor.b32 %r5, %r1, %r0;", 3),  # used twice
        ("div.u32 %r1, %r0, %r2;", 20),
    ],
)
def test_instructions_become_others(text, slots):
    zeros = "".join(f"mov.u32 %r{k}, 1;\nmov.u64 %rd{k}, 1;\n" for k in range(6))
    (k,) = recorded(zeros + text).timeline().kernels
    before = recorded(zeros).timeline().kernels[0]
    assert sum(i["slots"] for i in k.record["instructions"]) == slots + sum(
        i["slots"] for i in before.record["instructions"]
    )


def test_loads_go_early():
    """Two loads in turn with what uses them: both are under way before the first is used, as ptxas has it; not past a barrier,
    and not past a store to the same space."""
    x = torch.zeros(1024)
    body = (
        "ld.global.f32 %f1, [%a0];\nadd.f32 %f2, %f1, %f1;\n{}ld.global.f32 %f3, [%a0+2048];\nadd.f32 %f4, %f3, %f3;\n"
    )
    latency = machine("sm_90a")["DRAM latency"]
    none = cycles("", x)
    for between, loads in (("", 1), ("bar.sync 0;\n", 2), ("st.global.f32 [%a0+1024], %f2;\n", 2)):
        assert cycles(body.replace("{}", between), x) - none == pytest.approx(loads * latency, rel=0.1)


# ---- memory ----


def chase(n, load="ld.global.u64"):
    return "mov.u64 %rd0, %a0;\n" + f"{load} %rd0, [%rd0];\n" * n


def chain_of_pointers(n, stride):
    """Each points to the next, `stride` bytes on."""
    x = torch.zeros(n * stride // 8, dtype=torch.int64)
    x[:: stride // 8] = x.data_ptr() + stride * (torch.arange(n) + 1)
    return x


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pointer_chase(arch):
    """The same word again is in L1, or in L2 for those who pass L1 by; what nobody has touched is in DRAM."""
    m = machine(arch)
    itself = torch.zeros(4, dtype=torch.int64)
    itself[:] = itself.data_ptr()
    one = {
        load: [cycles(chase(n, load), itself, arch=arch) for n in (2, 3, 4)]
        for load in ("ld.global.u64", "ld.global.cg.u64")
    }
    for load, level in (("ld.global.u64", "L1 latency"), ("ld.global.cg.u64", "L2 latency")):
        two, three, four = one[load]
        assert (three - two, four - three) == (m[level], m[level])
    far = chain_of_pointers(64, 256)
    few, many = (cycles(chase(n), far, arch=arch) for n in (8, 24))
    assert many - few == 16 * m["DRAM latency"]


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (128, 32)])
def test_shared_memory_takes_its_wavefronts(stride, wavefronts):
    """Lane l's word holds its own address: a chase, whose lanes fall in one bank where the stride is 128 bytes."""
    before = f"mul.lo.u32 %r0, %t, {stride};\nadd.u32 %r0, %s, %r0;\nst.shared.b32 [%r0], %r0;\n"
    latency = machine("sm_90a")["shared latency"]
    assert each("ld.shared.b32 %r0, [%r0];\n", 2, 10, before=before) == latency + wavefronts - 1
    # independent ones follow each other through the port
    independent = "".join(f"ld.shared.b32 %r{k}, [%r0];\n" for k in range(1, 11))
    assert each(independent, 20, 60, before=before, block=32) == 10 * wavefronts


COPY = """
mov.u32 %r0, %ctaid.x;
mad.lo.u32 %r0, %r0, 256, %t;
mul.wide.u32 %rd0, %r0, 16;
add.u64 %rd1, %a0, %rd0;
add.u64 %rd2, %a1, %rd0;
ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
st.global.v4.b32 [%rd2], {%r1, %r2, %r3, %r4};
"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_copy_moves_at_the_bandwidth_of_dram(arch):
    """Many waves: each moves its bytes at the multiprocessor's share of DRAM; latencies hide behind other CTAs."""
    m = machine(arch)
    multiprocessors = {"sm_80": 108, "sm_89": 142, "sm_90a": 132}[arch]
    blocks = 64
    x = torch.zeros(multiprocessors * blocks * 4096, dtype=torch.uint8)
    (k,) = (
        recorded(COPY, x, torch.zeros_like(x), arch=arch, grid=multiprocessors * blocks, block=256).timeline().kernels
    )
    share = m["DRAM"] * 1e3 / m["clock"] * m["DRAM efficiency"] / multiprocessors
    moved = blocks * 2 * 4096 / share
    assert k.busy["DRAM"] * k.cycles == pytest.approx(moved, rel=1e-3)
    assert moved < k.cycles < 1.15 * moved + 2 * m["DRAM latency"]


# ---- tensor cores ----

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f{0}, %f{1}, %f{2}, %f{3}}}, {{%r0, %r1, %r2, %r3}}, {{%r0, %r1}}, "
MMA += "{{%f{0}, %f{1}, %f{2}, %f{3}}};\n"
ZEROS = "".join(f"mov.f32 %f{k}, 0f00000000;\nmov.b32 %r{k}, 0;\n" for k in range(40))


@pytest.mark.parametrize(
    ("arch", "latency", "interval"), [("sm_80", 33, 8), ("sm_89", 33, 16), ("sm_90a", 31.72, 6.36)]
)
def test_mma(arch, latency, interval):
    """m16n8k16 in f16: a chain waits for each result, as Sun et al. measured on the A100 (33 cycles); ten chains of a
    warp keep its tensor core busy."""
    chain = MMA.format(0, 1, 2, 3)
    assert each(chain, 4, 16, before=ZEROS, arch=arch) == pytest.approx(latency, abs=0.5)
    chains = "".join(MMA.format(*range(4 * k, 4 * k + 4)) for k in range(10))
    assert each(chains, 4, 16, before=ZEROS, arch=arch, block=128) == pytest.approx(10 * interval, rel=0.01)


def test_warps_take_turns_at_a_tensor_core(tmp_path):
    """Of eight warps two share each: none is done before the others are."""
    products = "".join(MMA.format(*range(k % 10 * 4, k % 10 * 4 + 4)) for k in range(40))
    device = recorded(ZEROS + products, arch="sm_80", block=256)
    device.timeline().save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ends = {}
    for e in events:
        if e["ph"] == "X" and e["tid"] >= 2:
            ends[e["tid"]] = max(ends.get(e["tid"], 0.0), e["ts"] + e["dur"])
    assert len(ends) == 8 and max(ends.values()) - min(ends.values()) < 20 / 1410  # us


def wgmma(n, repeats, of=1, a_in_registers=False):
    """So many groups of `of` products of one warpgroup, each waited for."""
    strides = 128 >> 4 << 16 | 256 >> 4 << 32
    acc = ", ".join(f"%acc{i}" for i in range(n // 2))
    a = "{%r4, %r5, %r6, %r7}, %rd1, %p1, 1, 1, 0" if a_in_registers else "%rd0, %rd1, %p1, 1, 1, 0, 0"
    one = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {{{acc}}}, {a};\n"
    wait = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    return (
        f"""
    .reg .f32 %acc<{n // 2}>;
    {"".join(f"mov.f32 %acc{i}, 0f00000000;" for i in range(n // 2))}
    {"".join(f"mov.b32 %r{i}, 0;" for i in range(4, 8))}
    mov.b64 %rd2, {strides};
    shr.b32 %r2, %s, 4;
    cvt.u64.u32 %rd0, %r2;
    or.b64 %rd0, %rd0, %rd2;
    mov.u64 %rd1, %rd0;
    mov.u32 %r3, 0;
    setp.eq.u32 %p1, %r3, 1;
    """
        + f"wgmma.fence.sync.aligned;\n{one * of}{wait}" * repeats
    )


@pytest.mark.parametrize(
    ("n", "a_in_registers", "interval"),
    # 64 x n x 16 products at 2048 a cycle; 64 rows of A and n of B, 32 bytes each, at 128 a cycle
    [(256, False, 128), (128, False, 64), (64, False, 32), (32, False, 24), (32, True, 16)],
)
def test_wgmma(n, a_in_registers, interval):
    options = {"block": 128, "shared": 32768, "checks": False}
    few, many = (cycles(wgmma(n, 2, of, a_in_registers), **options) for of in (8, 24))
    assert (many - few) / (2 * 16) == interval
    # a group that is waited for costs the latency besides
    once, twice = (cycles(wgmma(n, repeats, 8, a_in_registers), **options) for repeats in (2, 3))
    latency = machine("sm_90a")["wgmma latency"]
    assert 8 * interval + latency <= twice - once <= 8 * interval + latency + 16


# ---- waiting ----


def test_a_barrier_waits_for_the_last_warp():
    """One warp of four computes a chain, and the others wait for it."""
    chain = "fma.rn.f32 %f0, %f0, %f0, %f0;\n" * 100
    body = f"{ONES}\nsetp.ge.u32 %p0, %t, 32;\n@%p0 bra meet;\n{chain}meet:\nbar.sync 0;\n"
    device = recorded(body, block=128)
    (k,) = device.timeline().kernels
    assert k.waited["barrier"] == pytest.approx(3 * 400, rel=0.1)
    assert k.lines()[0].waited.most_common(1)[0][0] in ("barrier", "dependency")


def test_a_copy_is_waited_for():
    body = """
    shl.b32 %r1, %t, 4;
    cvt.u64.u32 %rd0, %r1;
    add.u64 %rd0, %a0, %rd0;
    add.u32 %r2, %s, %r1;
    cp.async.cg.shared.global [%r2], [%rd0], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    """
    (k,) = recorded(body, torch.zeros(512, dtype=torch.uint8)).timeline().kernels
    assert k.waited["copy"] == pytest.approx(machine("sm_90a")["DRAM latency"] + 16, abs=32)


def test_a_bulk_copy_is_waited_for_at_its_mbarrier():
    x = integers(64, 64)
    body = (
        MBARRIER
        + "mov.u32 %r30, 0;\n@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 4096;\n"
        + "@%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%s+1024], "
        + "[%a0, {%r30, %r30}], [%s];\n"
        + WAIT.format(0)
    )
    m = machine("sm_90a")
    for seed in range(4):  # whose failed looks at the mbarrier are as many as the schedule makes them
        device = recorded(body, gpuless.tensor_map(x, box=(32, 32)), block=64, shared=8192, seed=seed)
        (k,) = device.timeline().kernels
        # The two warps wait alike. 4096 bytes at the rate of one multiprocessor.
        one = m["TMA interval"] + m["TMA latency"] + m["DRAM latency"] + 4096 / m["L2 of a multiprocessor"]
        assert k.waited["mbarrier"] == pytest.approx(2 * one, rel=0.05)


def test_clusters_wait_for_each_other():
    chain = "fma.rn.f32 %f0, %f0, %f0, %f0;\n" * 100
    body = f"""
    {ONES}
    mov.u32 %r0, %cluster_ctarank;
    setp.ne.u32 %p0, %r0, 0;
    @!%p0 bra meet;
    {chain}
    meet:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    (k,) = recorded(body, grid=2, cluster=2).timeline().kernels
    assert k.waited["barrier"] == pytest.approx(400 + 2 * machine("sm_90a")["cluster latency"], rel=0.1)


# ---- the device ----

WORK = ONES + INDEPENDENT * 40


def test_waves():
    """CTAs that fill the issue slots: as many at once as fit share the time, the rest comes after."""
    one = cycles(WORK, grid=132, block=512)
    assert cycles(WORK, grid=132 * 2, block=512) > 1.6 * one  # beside each other on one multiprocessor
    assert cycles(WORK, grid=132 + 1, block=512) == cycles(WORK, grid=132 * 2, block=512)
    many = recorded(WORK, grid=132 * 16, block=512).timeline().kernels[0]
    assert many.resident < many.clusters == 16
    assert many.cycles == pytest.approx(16 * 800 * 4, rel=0.1)


@pytest.mark.parametrize("grid", [1, 2, 131, 132])
def test_the_busiest_multiprocessor_counts(grid):
    """The last CTA has ten times the work of the others."""
    body = f"""
    {ONES}
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, 1;
    setp.eq.u32 %p0, %r0, {grid - 1};
    @%p0 mov.u32 %r1, 10;
    loop:
    {"fma.rn.f32 %f0, %f0, %f0, %f0;" * 50}
    sub.u32 %r1, %r1, 1;
    setp.ne.u32 %p0, %r1, 0;
    @%p0 bra loop;
    """
    assert cycles(body, grid=grid) == pytest.approx(2000 + 300, rel=0.1)


@pytest.mark.parametrize(
    ("arch", "length"),
    [
        ("sm_90a", lambda n, last: (last - n) // 132),  # the longest first
        ("sm_90a", lambda n, last: n // 132),
        ("sm_90a", lambda n, last: n * 5 % 13),
        ("sm_80", lambda n, last: (last - n) // 132),  # of 132 CTAs, on 108 multiprocessors
        ("sm_80", lambda n, last: 60 * (n == last // 2)),  # one, which no recorded multiprocessor has
    ],
)
def test_ctas_of_different_lengths(arch, length):
    """Few CTAs of a multiprocessor are recorded, and stand for those that are longer or shorter too. 1024 threads issue all
    that a multiprocessor can, which has two such CTAs: at most so many are late at the end."""
    grid = 132 * 12
    lengths = torch.tensor([1 + length(n, grid - 1) for n in range(grid)], dtype=torch.int32)
    body = f"""
    mov.f32 %f0, 0f3F800000;
    mov.u32 %r0, %ctaid.x;
    mul.wide.u32 %rd0, %r0, 4;
    add.u64 %rd0, %rd0, %a0;
    ld.global.u32 %r1, [%rd0];
    loop:
    {"fma.rn.f32 %f0, %f0, %f0, %f0;" * 100}
    sub.u32 %r1, %r1, 1;
    setp.ne.u32 %p0, %r1, 0;
    @%p0 bra loop;
    """
    (k,) = recorded(body, lengths, arch=arch, grid=grid, block=1024, checks=False).timeline().kernels
    one = 8 * 100 * (2 if arch == "sm_80" else 1)  # eight warps of a scheduler
    fair, longest = int(lengths.sum()) * one / {"sm_80": 108, "sm_90a": 132}[arch], int(lengths.max()) * one
    assert k.resident == 2
    assert max(fair, longest) < k.cycles < 1.05 * fair + 2 * longest + 2000


def test_a_counter_hands_out_tiles_to_all_that_are_there():
    """A persistent kernel whose CTAs take the next tile when they have done one: 64 tiles of 25 thousand instructions."""
    counter, taken = (torch.zeros(n, dtype=torch.int32) for n in (1, 16))
    body = f"""
    {ONES}
    mov.u32 %r0, 0;
    tile:
    atom.relaxed.gpu.global.add.u32 %r1, [%a0], 1;
    setp.ge.u32 %p0, %r1, 64;
    @%p0 bra done;
    add.u32 %r0, %r0, 1;
    mov.u32 %r2, 500;
    work:
    {"fma.rn.f32 %f0, %f0, %f0, %f0;" * 50}
    sub.u32 %r2, %r2, 1;
    setp.ne.u32 %p0, %r2, 0;
    @%p0 bra work;
    bra.uni tile;
    done:
    mov.u32 %r3, %ctaid.x;
    mul.wide.u32 %rd0, %r3, 4;
    add.u64 %rd0, %rd0, %a1;
    st.global.u32 [%rd0], %r0;
    """
    recorded(body, counter, taken, grid=16, block=1, threads=1)
    assert taken.sum() == 64 and taken.min() >= 3 and taken.max() <= 5


def test_residents_can_be_said():
    device = recorded("fma.rn.f32 %f0, %f0, %f0, %f0;\n" * 400, grid=132 * 4, block=32)
    assert device.timeline(resident=1).cycles > 3.5 * device.timeline(resident=4).cycles
    slow, fast = (device.timeline(clock=c) for c in (915, None))
    assert slow.cycles == fast.cycles and slow.seconds - 1.5e-6 == pytest.approx(2 * (fast.seconds - 1.5e-6))


def test_dependent_launches_hide_what_comes_before_their_wait():
    body = "fma.rn.f32 %f0, %f0, %f0, %f0;\n" * 200 + "griddepcontrol.wait;\n"
    plain, programmatic = (recorded(body, launches=3, programmatic=p).timeline().kernels[0] for p in (False, True))
    assert plain.launches == 3 and plain.dependency_cycle > 800
    assert plain.seconds == 3 * (plain.cycles / 1830e6 + 1.5e-6)
    assert programmatic.seconds == pytest.approx(plain.seconds - 3 * (1.5e-6 + plain.dependency_cycle / 1830e6))


def test_dependent_launches_begin_when_they_are_let_and_have_room():
    def after(body, **options):
        x = torch.zeros(4096, dtype=torch.uint8)
        (k,) = recorded(body, x, launches=2, programmatic=True, **options).timeline().kernels
        return k.after_cycles, k.cycles - k.dependency_cycle

    work = "fma.rn.f32 %f0, %f0, %f0, %f0;\n" * 200
    body = work + "ld.global.u32 %r0, [%a0];\ngriddepcontrol.wait;\nadd.u32 %r0, %r0, %r0;\n" + work
    late, alone = after(body)
    assert late == alone > 1000  # the load's latency, from L2
    let = "griddepcontrol.launch_dependents;\n" + body
    early, alone = after(let)
    assert early < 800 + 50 and alone == late
    crowded, alone = after(let, grid=132, block=32, shared=120 << 10)
    assert crowded == alone


# ---- what is said of it ----


def mixed():
    x = torch.zeros(132 * 8 * 4096, dtype=torch.uint8)
    return COPY + "bar.sync 0;\n", x, torch.zeros_like(x)


def test_seed_and_threads_do_not_matter():
    body, x, y = mixed()
    results = []
    for seed, threads in ((0, 1), (0, 2), (7, 2)):
        (k,) = recorded(body, x, y, grid=132 * 8, block=256, seed=seed, threads=threads).timeline().kernels
        results.append((k.cycles, k.waited, k.busy, k.record["spans"]))
    assert results[0] == results[1] == results[2]


def test_table_and_trace(tmp_path):
    body, x, y = mixed()
    timeline = recorded(body, x, y, grid=132 * 8, block=256).timeline()
    text = str(timeline)
    assert text.startswith("modelled ") and "DRAM" in text
    assert max(map(len, text.splitlines())) <= 100
    timeline.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (k,) = timeline.kernels
    slices = [e for e in events if e["ph"] == "X"]
    assert slices and max(e["ts"] + e["dur"] for e in slices) <= k.cycles / k.clock + 1e-6
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"tensor cores", "block 0, warp 0", "block 3, warp 7"} <= threads
    for thread in range(len(threads)):  # what one warp does, it does one after the other
        of_thread = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == thread)
        assert all(b[0] >= a[1] - 1e-9 for a, b in itertools.pairwise(of_thread))


SCRIPT = """
import gpuless, torch, sys
x = torch.zeros(4096, dtype=torch.uint8)
gpuless.Module(open(sys.argv[1]).read())["k"].launch(1, 256, (x, torch.zeros_like(x)))
"""


def test_report(tmp_path):
    """Of a program, through the environment, as its own process gives it."""
    x = torch.zeros(4096, dtype=torch.uint8)
    text = kernel(COPY, (x, x), block=256)
    (tmp_path / "k.ptx").write_text(text)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "gpuless",
        "report",
        "--timeline",
        "--trace",
        tmp_path / "trace.json",
    ]
    done = subprocess.run([*command, tmp_path / "script.py", tmp_path / "k.ptx"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with gpuless.gpu("sm_90a", timeline=True) as device:
        gpuless.Module(text)["k"].launch(1, 256, (x, torch.zeros_like(x)))
    device.timeline().save_trace(tmp_path / "own.json")
    assert str(device.timeline()) in done.stdout
    assert (tmp_path / "trace.json").read_text() == (tmp_path / "own.json").read_text()
    (tmp_path / "counts.json").write_text("[]")
    refused = subprocess.run([*command, tmp_path / "counts.json"], capture_output=True, text=True)
    assert refused.returncode == 2 and "the program itself" in refused.stderr


def test_counts_are_the_same_as_without():
    body, x, y = mixed()
    with gpuless.gpu("sm_90a", counters=True) as device:
        gpuless.Module(kernel(body, (x, y), block=256))["k"].launch(132 * 8, 256, (x, y))
    (plain,), (with_timeline,) = device.kernels(), recorded(body, x, y, grid=132 * 8, block=256).kernels()
    assert plain == with_timeline


def test_kernels_are_told_apart():
    with gpuless.gpu("sm_90a", timeline=True) as device:
        k = gpuless.Module(kernel(ONE, ()))["k"]
        for grid in (1, 2, 2):
            k.launch(grid, 32, ())
    assert [k.launches for k in device.timeline().kernels] == [1, 2]
    assert device.timeline("nothing").kernels == []
    assert str(device.timeline("nothing")) == "no kernel was launched"


def test_off_by_default():
    with gpuless.gpu("sm_90a", counters=True) as device:
        gpuless.Module(kernel("", ()))["k"].launch(1, 32, ())
    with pytest.raises(ValueError, match="timeline=True"):
        device.timeline()


def test_refusals():
    device = recorded(ONE)
    for options in ({"resident": -1}, {"clock": 0}):
        with pytest.raises(ValueError, match="resident is 0 or more clusters"):
            device.timeline(**options)
    # more than 2**25 instructions
    long = "loop:\nadd.u32 %r0, %r0, 1;\nsetp.lt.u32 %p0, %r0, 12000000;\n@%p0 bra loop;\n"
    device = recorded("mov.u32 %r0, 0;\n" + long)
    with pytest.raises(gpuless.Finding, match="launch a smaller problem"):
        device.timeline()


def test_a_launch_with_a_finding_is_not_timed():
    with gpuless.gpu("sm_90a", timeline=True) as device:
        x = torch.zeros(4)
        with pytest.raises(gpuless.Finding):
            gpuless.Module(kernel("ld.global.f32 %f0, [%a0+16];\n", (x,)))["k"].launch(1, 32, (x,))
    assert device.timeline().kernels == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_figure_has_a_source(arch):
    assert all(source for *_, source in LATENCIES)
    assert len({name for name, *_ in LATENCIES}) == len(LATENCIES)
    assert machine(arch)["clock"] > 0 and machine(arch, 1000)["clock"] == 1000
