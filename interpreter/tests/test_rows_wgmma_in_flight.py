"""What is wrong while a wgmma.mma_async is under way, each beside its right twin: registers, shared memory, warps,
descriptors."""

import numpy as np
import pytest
import tensor_cores as tc
from rows import row
from wgmma_flight import IMAGE, LEFT, ONE, ONE_REGISTERS, OP, RIGHT, A, B, C, finding, run
from wgmma_kernels import instruction
from wgmma_rows import FENCE, HEAD, INTEGER, WAIT, order, shapes

import gpuless

pytestmark = pytest.mark.interpreted

BINARY = INTEGER.split(".s32")[0].replace("k32", "k256").replace(".satfinite?", "") + ".s32.b1.b1.and.popc"
SPARSE = (
    "wgmma.mma_async.sp.sync.aligned." + shapes(order([8 * i for i in range(1, 33)]), 16, 32, 64)
    + ".satfinite?.f16|f32|s32.f16|bf16|tf32|e4m3|e5m2|s8|u8.f16|bf16|tf32|e4m3|e5m2|s8|u8.satfinite?"
)  # fmt: skip
SEEDS = range(5)
PRODUCT = tc.decode(A, "f16") @ tc.decode(B, "f16")
LEFT.place(IMAGE)
RIGHT.place(IMAGE)
COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT_ALL = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("seed", SEEDS)
def test_registers_in_flight(seed):
    assert np.array_equal(run(f"{FENCE} {ONE} {WAIT}", seed), PRODUCT + tc.decode(C, "f32"))
    for early, what in (
        ("add.f32 %acc0, %acc0, %acc1;", "reads an accumulator"),
        ("st.global.b32 [%d2], %acc3;", "reads an accumulator"),
        ("mov.b32 %acc2, 0;", "writes an accumulator"),
        ("cvt.u64.u32 %d3, %acc1;", "reads an accumulator"),
    ):
        run(f"{FENCE} {ONE} {WAIT} {early}", seed)
        for before in (
            early + WAIT,
            COMMIT + early + WAIT_ALL,
            COMMIT + COMMIT + "wgmma.wait_group.sync.aligned 2;" + early,
        ):
            error = finding(f"{FENCE} {ONE} {before}", seed)
            assert error.kind == "in_flight" and what in error.message and OP in error.message
    # of A: neither written nor read, but a second operation may use it too, and so may a mov
    for early, what in (
        ("mov.b32 %a1, 0;", "writes a register of A"),
        ("add.u32 %r5, %a2, 1;", "reads a register of A"),
    ):
        run(f"{FENCE} {ONE_REGISTERS} {WAIT} {early}", seed)
        error = finding(f"{FENCE} {ONE_REGISTERS} {COMMIT} {early} {WAIT_ALL}", seed)
        assert error.kind == "in_flight" and what in error.message
    twice = f"{FENCE} {ONE_REGISTERS} mov.b32 %r5, %a1; {ONE_REGISTERS} {WAIT}"
    assert np.array_equal(run(twice, seed), 2 * PRODUCT + tc.decode(C, "f32"))


@pytest.mark.parametrize("seed", SEEDS)
def test_waiting_for_what_was_not_committed(seed):
    error = finding(f"{FENCE} {ONE} {WAIT_ALL}", seed)  # the store that follows
    assert error.kind == "in_flight" and "st.global" in error.instruction


def moves(to, source):
    return " ".join(f"mov.b32 %{to}{i}, %{source}{i};" for i in range(4))


@pytest.mark.parametrize("seed", SEEDS)
def test_moved_accumulators(seed):
    c, add = tc.decode(C, "f32"), " ".join(f"add.f32 %acc{i}, %acc{i}, %copy{i};" for i in range(4))
    # a copy holds the value of its moment: one product, while the register itself goes on to two
    assert np.array_equal(run(f"{FENCE} {ONE} {moves('copy', 'acc')} {ONE} {WAIT} {add}", seed), 3 * PRODUCT + 2 * c)
    # an operation on the copy goes on from there, and the original keeps its value
    two = instruction(OP, d="copy")
    assert np.array_equal(
        run(f"{FENCE} {ONE} {moves('copy', 'acc')} {two} {two} {WAIT} {add}", seed), 4 * PRODUCT + 2 * c
    )
    # a loop whose accumulators change their names every time, as nvcc writes it
    loop = f"{moves('copy', 'acc')} {two} {moves('acc', 'copy')} {COMMIT} wgmma.wait_group.sync.aligned 1;"
    assert np.array_equal(run(f"{FENCE} {loop * 3} {WAIT_ALL}", seed), 3 * PRODUCT + c)
    # overwriting a copy is no error, using one is
    run(f"{FENCE} {ONE} {moves('copy', 'acc')} mov.b32 %copy1, 0; add.u32 %copy2, %r0, 1; {WAIT}", seed)
    error = finding(f"{FENCE} {ONE} {moves('copy', 'acc')} add.u32 %r5, %copy2, 1; {WAIT}", seed)
    assert error.kind == "in_flight" and "add.u32" in error.instruction
    partly = "setp.lt.u32 %p, %r0, 7; @%p mov.b32 %r5, %acc1;"
    assert finding(f"{FENCE} {ONE} {partly} {WAIT}", seed).kind == "in_flight"


def test_accumulators_of_another_shape():
    other = instruction(f"{HEAD}m64n16k16.f32.f16.f16")
    assert "same shape" in finding(f"{FENCE} {ONE} {other} {WAIT}").message
    shuffled = ONE.replace("%acc0, %acc1", "%acc1, %acc0")
    assert "same shape" in finding(f"{FENCE} {ONE} {shuffled} {WAIT}").message
    both = ONE_REGISTERS.replace("{%a0", "{%acc0")
    assert finding(f"{FENCE} {both} {WAIT}").kind == "in_flight"


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory(seed):
    # A and B are written by other threads than read them, and by the generic proxy
    assert finding(f"{FENCE} {ONE} {WAIT}", seed, publish="fence.proxy.async;").kind == "race"
    error = finding(f"{FENCE} {ONE} {WAIT}", seed, publish="bar.sync 0;")
    assert error.kind == "race" and "fence.proxy.async" in error.message and OP in error.instruction
    # overwritten before the wait, after it
    write = "st.shared.b32 [%base + 4096], %r0; st.shared.b32 [%base], %r0;"
    one_writes = f"setp.eq.u32 %p, %r0, 0; @%p {write.split(';')[0]};"
    run(f"{FENCE} {ONE} {WAIT} bar.sync 0; {one_writes}", seed)
    error = finding(f"{FENCE} {ONE} {COMMIT} bar.sync 0; {one_writes} {WAIT_ALL}", seed)
    assert error.kind in ("in_flight", "race")  # the operation's reads came first, or the write did
    assert finding(f"{FENCE} {ONE} {COMMIT} {one_writes} {WAIT_ALL}", seed).kind in ("in_flight", "race")
    own_row = "setp.eq.u32 %p, %r0, 0; @%p st.shared.b32 [%base], %r0;"
    error = finding(f"fence.proxy.async; {FENCE} {ONE} {COMMIT} {own_row} {WAIT_ALL}", seed)
    assert error.kind in ("in_flight", "race") and "fence" not in error.message  # none would help
    # one wait covers what all four warps read
    run(f"{FENCE} {ONE} {WAIT} {one_writes}", seed)
    assert finding(f"{FENCE} {ONE} {WAIT}", seed, a_desc=LEFT.descriptor() + (9000 >> 4)).kind == "uninitialised"


def test_a_warp_needs_to_know_of_its_own_rows_of_a_alone():
    # each warp writes its rows of A again and publishes them to itself: no barrier in between
    own = "shr.u32 %r5, %r0, 5; and.b32 %r6, %r0, 31; shl.b32 %r5, %r5, 9; mad.lo.u32 %r5, %r6, 16, %r5; add.u32 %r5, %r5, %base;"
    again = f"{own} ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%r5]; bar.sync 0; st.shared.v4.b32 [%r5], {{%r6, %r7, %r8, %r9}};"
    fence = "fence.proxy.async; bar.warp.sync 0xffffffff;"
    for seed in SEEDS:
        assert np.array_equal(run(f"{again} {fence} {FENCE} {ONE} {WAIT}", seed), PRODUCT + tc.decode(C, "f32"))
        other = again.replace("add.u32 %r5, %r5, %base;", "xor.b32 %r5, %r5, 512; add.u32 %r5, %r5, %base;")
        assert finding(f"{other} {fence} {FENCE} {ONE} {WAIT}", seed).kind == "race"
        b = again.replace(
            "add.u32 %r5, %r5, %base;", "and.b32 %r5, %r5, 255; add.u32 %r5, %r5, 4096; add.u32 %r5, %r5, %base;"
        )
        only = "setp.lt.u32 %p, %r0, 16; @!%p bra SKIP;"
        error = finding(f"{only} {b.replace('bar.sync 0;', '')} SKIP: {fence} {FENCE} {ONE} {WAIT}", seed)
        assert error.kind == "race"


@pytest.mark.parametrize("seed", SEEDS)
def test_every_warp_needs_to_know_of_b(seed):
    # a bulk copy brings B again; its mbarrier is waited for by every warp, or by the first alone
    copy = """{{ .reg .b64 %state; .reg .pred %done;
      setp.ne.u32 %p, %r0, 0; @%p bra READY;
      mbarrier.init.shared.b64 [%base + 8192], 1; fence.mbarrier_init.release.cluster; fence.proxy.async;
      mbarrier.arrive.expect_tx.shared.b64 %state, [%base + 8192], 256;
      ld.param.u64 %d3, [image]; add.u64 %d3, %d3, 4096; add.u32 %r5, %base, 4096; add.u32 %r6, %base, 8192;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%d3], 256, [%r6];
    READY: bar.sync 0; {who}
    WAIT: mbarrier.try_wait.parity.shared.b64 %done, [%base + 8192], 0; @!%done bra WAIT;
    GO: }}"""
    everyone, first = copy.format(who=""), copy.format(who="setp.ge.u32 %p, %r0, 32; @%p bra GO;")
    assert np.array_equal(run(f"{everyone} {FENCE} {ONE} {WAIT}", seed), PRODUCT + tc.decode(C, "f32"))
    assert np.array_equal(run(f"{first} bar.sync 0; {FENCE} {ONE} {WAIT}", seed), PRODUCT + tc.decode(C, "f32"))
    assert finding(f"{first} {FENCE} {ONE} {WAIT}", seed).kind in ("in_flight", "race")


def test_warps_of_a_warpgroup():
    assert "four warps" in finding(f"{FENCE} {ONE} {WAIT}", threads=96).message
    skip = "setp.lt.u32 %p, %r0, 32; @%p bra SKIP;"
    assert finding(f"{skip} {FENCE} {ONE} {WAIT} SKIP:").kind == "deadlock"
    error = finding(f"{FENCE} setp.lt.u32 %p, %r0, 32; @%p bra OTHER; {ONE} bra END; OTHER: {ONE} END: {WAIT}")
    assert error.kind == "illegal" and "different operations" in error.message
    error = finding(f"setp.lt.u32 %p, %r0, 20; @%p {ONE} {WAIT}")
    assert error.kind == "barrier"
    for change, what in (
        ("setp.lt.u32 %p, %r0, 32; @%p add.u64 %b_desc, %b_desc, 1;", "descriptor differs between the warps"),
        ("setp.lt.u32 %p, %r0, 32; @%p mov.pred %scale, 0;", "scale-d differs between the warps"),
        ("setp.eq.u32 %p, %r0, 40; @%p add.u64 %a_desc, %a_desc, 1;", "differs between the lanes"),
        ("setp.eq.u32 %p, %r0, 40; @%p mov.pred %scale, 0;", "differs between the lanes"),
    ):
        error = finding(f"{change} {FENCE} {ONE} {WAIT}")
        assert error.kind == "illegal" and what in error.message


def test_descriptors():
    a, b = LEFT.descriptor(), RIGHT.descriptor()
    for bad, what in ((a | 1 << 14, "outside its fields"), (a | 1 << 53, "outside its fields"),
                      (a & ~(3 << 62) | 1 << 49, "base offset needs a swizzle")):  # fmt: skip
        error = finding(f"{FENCE} {ONE} {WAIT}", a_desc=bad)
        assert error.kind == "illegal" and what in error.message
    error = finding(f"{FENCE} {ONE} {WAIT}", b_desc=b, a_desc=a, shared=8192 - 4096 + 128)
    assert error.kind == "out_of_bounds"


@row(BINARY, SPARSE)
def test_refused():
    binary = "wgmma.mma_async.sync.aligned.m64n8k256.s32.b1.b1.and.popc {%acc0}, %a_desc, %b_desc, %scale;"
    sparse = (
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%acc0}, %a_desc, %b_desc, %r0, 0, %scale, 1, 1, 0, 0;"
    )
    for bad, what in (
        (binary, "single bits"),
        (sparse, "sparse"),
        (ONE.replace("1, 1, 0, 0;", "1, 2, 0, 0;"), "1 or -1"),
        (ONE.replace("1, 1, 0, 0;", "1, 1, 0, 2;"), "0 or 1"),
        (ONE.replace("1, 1, 0, 0;", "1, 1;"), "operands"),
        (ONE.replace("%acc3}", "_}"), "not _"),
        ("wgmma.wait_group.sync.aligned 8;", "0 to 7"),
    ):
        error = finding(bad)
        assert error.kind == "unsupported" and what in error.message, error.message


def test_another_architecture():

    text = ".version 8.7\n.target sm_89\n.address_size 64\n.visible .entry k() { wgmma.fence.sync.aligned; ret; }"
    with gpuless.gpu("sm_89"), pytest.raises(gpuless.Finding, match="needs sm_90a"):
        gpuless.Module(text)["k"].launch(1, 128, [])
