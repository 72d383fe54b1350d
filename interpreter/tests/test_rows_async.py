"""cp.async, mbarrier, fences and the like: what they do against a model, and what is reported when they are misused.

What is wrong is wrong in every schedule, so a few seeds look at the same fault.
"""

import numpy as np
import pytest
import torch
from ptx import assert_refused, finding, integers, run

pytestmark = pytest.mark.interpreted

SEEDS = range(6)

# ---- cp.async ----

# Thread t: source %rd0 = x + t * bytes, destination %r0 = memory + t * bytes; then its words go to y.
PLACES = """
mul.lo.u32 %r1, %t, {bytes};
cvt.u64.u32 %rd1, %r1;
add.u64 %rd0, %a0, %rd1;
add.u64 %rd2, %a1, %rd1;
add.u32 %r0, %s, %r1;
"""


def read_back(size):
    return "\n".join(f"ld.shared.b32 %r3, [%r0+{at}];\nst.global.b32 [%rd2+{at}], %r3;" for at in range(0, size, 4))


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize(
    "hint", ["", ".L2::64B", ".L2::128B", ".L2::256B", ".L2::cache_hint", ".L2::cache_hint.L2::128B"]
)
def test_cp_async(cache, size, hint, space):
    x, y = integers(32, size // 4), torch.zeros(32, size // 4, dtype=torch.int32)
    policy = ", %rd9" if "cache_hint" in hint else ""
    body = f"""{PLACES.format(bytes=size)}
    mov.b64 %rd9, 0;
    cp.async.{cache}.{space}.global{hint} [%r0], [%rd0], {size}{policy};
    cp.async.commit_group;
    cp.async.wait_group 0;
    {read_back(size)}"""
    for seed in SEEDS:
        run(body, x, y.zero_(), seed=seed, arch="sm_80")
        assert torch.equal(x, y)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize(("hint", "policy"), [("", ""), (".L2::cache_hint", ", %rd9")])
def test_cp_async_source_size(size, hint, policy):
    x, y = integers(32, size // 4), torch.zeros(32, size // 4, dtype=torch.int32)
    body = f"""{PLACES.format(bytes=size)}
    mov.b64 %rd9, 0;
    rem.u32 %r4, %t, {size + 1};
    cp.async.ca.shared.global{hint} [%r0], [%rd0], {size}, %r4{policy};
    cp.async.wait_all;
    {read_back(size)}"""
    run(body, x, y, arch="sm_80")
    expected = x.numpy().view(np.uint8).copy()
    for t in range(32):
        expected[t, t % (size + 1) :] = 0
    assert np.array_equal(y.numpy().view(np.uint8), expected)


@pytest.mark.parametrize("negated", [False, True])
def test_cp_async_ignore_source(negated):
    x, y = integers(32, 4), torch.zeros(32, 4, dtype=torch.int32)
    body = f"""{PLACES.format(bytes=16)}
    and.b32 %r4, %t, 1;
    setp.eq.u32 %p1, %r4, 1;
    cp.async.cg.shared.global [%r0], [%rd0], 16, {"!" * negated}%p1;
    cp.async.wait_all;
    {read_back(16)}"""
    run(body, x, y, arch="sm_80")
    expected = x.clone()
    expected[0 if negated else 1 :: 2] = 0
    assert torch.equal(y, expected)


def test_cp_async_of_no_bytes_may_point_anywhere():
    y = torch.ones(32, 4, dtype=torch.int32)
    run(
        f"""{PLACES.format(bytes=16)}
        mov.b64 %rd0, 16;
        mov.u32 %r4, 0;
        cp.async.cg.shared.global [%r0], [%rd0], 16, %r4;
        cp.async.wait_all;
        {read_back(16)}""",
        integers(32, 4), y, arch="sm_80",
    )  # fmt: skip
    assert not y.any()


# Two groups: words 0 to 31 and 32 to 63 of x; `wait` and a read of the words from `read` on.
GROUPS = """
shl.b32 %r1, %t, 2;
cvt.u64.u32 %rd1, %r1;
add.u64 %rd0, %a0, %rd1;
add.u64 %rd2, %a1, %rd1;
add.u32 %r0, %s, %r1;
cp.async.ca.shared.global [%r0], [%rd0], 4;
cp.async.commit_group;
cp.async.ca.shared.global [%r0+128], [%rd0+128], 4;
{commit}
{wait}
ld.shared.b32 %r3, [%r0+{read}];
st.global.b32 [%rd2], %r3;
"""
COMMIT = "cp.async.commit_group;"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("commit", "wait", "first", "second"),
    [
        (COMMIT, "cp.async.wait_group 0;", True, True),
        (COMMIT, "cp.async.wait_group 1;", True, False),
        (COMMIT, "cp.async.wait_group 2;", False, False),
        (COMMIT, "", False, False),
        ("", "cp.async.wait_group 0;", True, False),
        ("", "cp.async.wait_all;", True, True),
        (COMMIT + COMMIT, "cp.async.wait_group 1;", True, True),
    ],
)
def test_cp_async_groups(commit, wait, first, second, seed):
    for group, visible in enumerate((first, second)):
        x, y = integers(64), torch.zeros(32, dtype=torch.int32)
        body = GROUPS.format(commit=commit, wait=wait, read=128 * group)
        if visible:
            run(body, x, y, arch="sm_80", seed=seed)
            assert torch.equal(y, x[32 * group :][:32])
        else:
            assert finding(body, x, y, arch="sm_80", seed=seed).kind == "in_flight"


def test_cp_async_groups_belong_to_threads():
    # Odd threads commit once, even ones twice, so wait_group 1 covers the copies of the even ones alone.
    body = """
    shl.b32 %r1, %t, 2;
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd0, %a0, %rd1;
    add.u64 %rd2, %a1, %rd1;
    add.u32 %r0, %s, %r1;
    cp.async.ca.shared.global [%r0], [%rd0], 4;
    cp.async.commit_group;
    and.b32 %r4, %t, 1;
    setp.eq.u32 %p1, %r4, {parity};
    @!%p1 bra join;
    cp.async.commit_group;
    join:
    cp.async.wait_group 1;
    setp.eq.u32 %p2, %r4, 0;
    @!%p2 bra end;
    ld.shared.b32 %r3, [%r0];
    st.global.b32 [%rd2], %r3;
    end:
    """
    x, y = integers(32), torch.zeros(32, dtype=torch.int32)
    run(body.format(parity=0), x, y, arch="sm_80")
    assert torch.equal(y[::2], x[::2]) and not y[1::2].any()
    assert finding(body.format(parity=1), x, y, arch="sm_80").kind == "in_flight"


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_is_in_flight_for_the_others_too(seed):
    body = """
    shl.b32 %r1, %t, 2;
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd0, %a0, %rd1;
    add.u64 %rd2, %a1, %rd1;
    add.u32 %r0, %s, %r1;
    cp.async.ca.shared.global [%r0], [%rd0], 4;
    {wait}
    {barrier}
    xor.b32 %r1, %r1, 128;
    add.u32 %r0, %s, %r1;
    ld.shared.b32 %r3, [%r0];
    st.global.b32 [%rd2], %r3;
    """
    x, y = integers(64), torch.zeros(64, dtype=torch.int32)
    wait, barrier = "cp.async.wait_all;", "bar.sync 0;"
    run(body.format(wait=wait, barrier=barrier), x, y, arch="sm_80", block=64, seed=seed)
    assert torch.equal(y, torch.cat([x[32:], x[:32]]))
    no_barrier = finding(body.format(wait=wait, barrier=""), x, y, arch="sm_80", block=64, seed=seed)
    assert no_barrier.kind in ("race", "in_flight", "uninitialised")
    assert finding(body.format(wait="", barrier=barrier), x, y, arch="sm_80", block=64, seed=seed).kind == "in_flight"


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_over_what_is_being_read(seed):
    body = """
    setp.eq.u32 %p0, %t, 0;
    @%p0 st.shared.b32 [%s], 5;
    bar.sync 0;
    setp.ge.u32 %p1, %t, 32;
    @%p1 ld.shared.b32 %r3, [%s];
    {barrier}
    @%p0 cp.async.ca.shared.global [%s], [%a0], 4;
    cp.async.wait_all;
    """
    run(body.format(barrier="bar.sync 0;"), integers(4), arch="sm_80", block=64, seed=seed)
    assert finding(body.format(barrier=""), integers(4), arch="sm_80", block=64, seed=seed).kind in (
        "race",
        "in_flight",
    )


@pytest.mark.parametrize("size", [4, 8, 16])
def test_lanes_that_copy_to_one_place(size):
    """Within one instruction: what the first has sent on its way is in flight for the others."""
    body = f"""
    and.b32 %r1, %t, {{lanes}};
    mad.lo.u32 %r0, %r1, {size}, %s;
    cp.async.ca.shared.global [%r0], [%a0], {size};
    cp.async.wait_all;
    """
    for seed in SEEDS:
        run(body.format(lanes=31), integers(4), arch="sm_80", seed=seed)
        f = finding(body.format(lanes=15), integers(4), arch="sm_80", seed=seed)
        assert f.kind == "in_flight" and "shared 0x0..0x10, which the first is still writing" in f.message, f


def test_cp_async_that_is_never_waited_for():
    for seed in SEEDS:
        body = "setp.eq.u32 %p0, %t, 0;\n@%p0 cp.async.ca.shared.global [%s], [%a0], 4;"
        run(body, integers(4), arch="sm_80", seed=seed)


COPY = "setp.eq.u32 %p0, %t, 3;\n@%p0 cp.async.{};"


@pytest.mark.parametrize(
    ("copy", "kind"),
    [
        ("cg.shared.global [%s+8], [%a0], 16", "misaligned"),
        ("cg.shared.global [%s], [%a0+4], 16", "misaligned"),
        ("cg.shared.global [%s], [%a0+4], 16, 8", "misaligned"),
        ("cg.shared.global [%s+4096], [%a0], 16", "out_of_bounds"),
        ("cg.shared.global [%s], [%a0+256], 16", "out_of_bounds"),
        ("cg.shared.global [%s], [%a0+256], 16, 1", "out_of_bounds"),
        ("cg.shared.global [%s], [%a0], 16, 17", "illegal"),
        ("ca.shared.global [%s], [%a0], 4, 8", "illegal"),
    ],
)
def test_cp_async_misused(copy, kind):
    f = finding(COPY.format(copy), integers(64), arch="sm_80")
    assert (f.kind, f.lane) == (kind, 3), f


@pytest.mark.parametrize(
    ("copy", "why"),
    [
        ("cp.async.cg.shared.global [%s], [%a0], 8;", "16 bytes"),
        ("cp.async.ca.shared.global [%s], [%a0], 12;", "4, 8 or 16"),
        ("cp.async.ca.shared.global [%s], [%a0];", "cp-size"),
        ("cp.async.ca.shared.global.L2::cache_hint [%s], [%a0], 4;", "cache-policy"),
        ("cp.async.wait_group;", "number of groups"),
        ("cp.async.ca.shared.global.L2::32B [%s], [%a0], 4;", "not known"),
    ],
)
def test_cp_async_refused(copy, why):
    assert why in assert_refused(copy, integers(64), arch="sm_80")


# ---- mbarrier ----

INIT = """
setp.eq.u32 %p0, %t, 0;
@%p0 mbarrier.init.shared::cta.b64 [%s], {count};
bar.sync 0;
"""


@pytest.mark.parametrize("noinc", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_mbarrier_arrive(noinc, seed):
    # Warp 0 copies, both warps wait for the mbarrier. With noinc the 32 arrivals are counted, else they come on top.
    body = (
        INIT.format(count=32)
        + """
    shl.b32 %r1, %t, 2;
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd0, %a0, %rd1;
    add.u64 %rd2, %a1, %rd1;
    add.u32 %r0, %s, %r1;
    setp.ge.u32 %p1, %t, 32;
    @%p1 bra wait;
    cp.async.ca.shared.global [%r0+64], [%rd0], 4;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%s];
    wait:
    mbarrier.try_wait.parity.shared.b64 %p2, [%s], {parity};
    @!%p2 bra wait;
    and.b32 %r1, %r1, 127;
    add.u32 %r0, %s, %r1;
    ld.shared.b32 %r3, [%r0+64];
    st.global.b32 [%rd2], %r3;
    """
    )
    if not noinc:
        body = body.replace(".noinc.shared.b64 [%s];", ".shared.b64 [%s];\nmbarrier.arrive.shared.b64 %rd5, [%s];")
    x, y = integers(32), torch.zeros(64, dtype=torch.int32)
    run(body.replace("{parity}", "0"), x, y, block=64, seed=seed)
    assert torch.equal(y, torch.cat([x, x]))
    wrong = finding(body.replace("{parity}", "1"), x, y, block=64, seed=seed)
    assert wrong.kind in ("in_flight", "race", "uninitialised", "deadlock")


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_mbarrier_arrive_of_each_half_of_a_warp(other, seed):
    # Odd lanes arrive at one mbarrier, even ones at another. Warp 1 waits for one of them and reads what came with it.
    body = f"""
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%s], 16;
    @%p0 mbarrier.init.shared::cta.b64 [%s+8], 16;
    bar.sync 0;
    and.b32 %r1, %t, 31;
    and.b32 %r4, %r1, 1;
    shl.b32 %r1, %r1, 2;
    mad.lo.u32 %r4, %r4, 8, %s;
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd0, %a0, %rd1;
    add.u64 %rd2, %a1, %rd1;
    add.u32 %r0, %s, %r1;
    setp.ge.u32 %p1, %t, 32;
    @%p1 bra wait;
    cp.async.ca.shared.global [%r0+64], [%rd0], 4;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%r4];
    ret;
    wait:
    mbarrier.try_wait.parity.shared.b64 %p2, [%s], 0;
    @!%p2 bra wait;
    setp.{"ne" if other else "eq"}.u32 %p3, %r4, %s;
    @%p3 ld.shared.b32 %r3, [%r0+64];
    @%p3 st.global.b32 [%rd2], %r3;"""
    x, y = integers(32), torch.zeros(32, dtype=torch.int32)
    if other:
        assert finding(body, x, y, block=64, seed=seed).kind in ("in_flight", "race", "uninitialised")
    else:
        run(body, x, y, block=64, seed=seed)
        assert torch.equal(y[::2], x[::2]) and not y[1::2].any()


@pytest.mark.parametrize("seed", range(12))
def test_cp_async_waited_for_after_its_mbarrier_arrived(seed):
    # The mbarrier may have taken the copies in before the thread waits for them itself.
    body = (
        INIT.format(count=32)
        + """
    shl.b32 %r1, %t, 2;
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd0, %a0, %rd1;
    add.u64 %rd2, %a1, %rd1;
    add.u32 %r0, %s, %r1;
    cp.async.ca.shared.global [%r0+64], [%rd0], 4;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%s];
    mov.u32 %r5, 0;
    linger:
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 300;
    @%p1 bra linger;
    {wait}
    ld.shared.b32 %r3, [%r0+64];
    st.global.b32 [%rd2], %r3;
    """
    )
    x, y = integers(32), torch.zeros(32, dtype=torch.int32)
    run(body.replace("{wait}", "cp.async.wait_all;"), x, y, seed=seed)
    assert torch.equal(x, y)
    assert finding(body.replace("{wait}", ""), x, y, seed=seed).kind == "in_flight"


def test_mbarrier_states():
    # One thread, a count of 3 for two arrivals of 1 and 2: pending counts, and what tests say of each phase.
    y = torch.zeros(16, dtype=torch.int32)
    tests = """
    mbarrier.test_wait{form} %p1, [%s], {operand};
    selp.b32 %r1, 1, 0, %p1;
    st.global.b32 [%a0+{at}], %r1;
    """
    body = "setp.ne.u32 %p0, %t, 0;\n@%p0 ret;\nmbarrier.init.b64 [%rd30], 3;\n" + "".join(
        [
            "mbarrier.arrive.shared.b64 %rd1, [%s];\nmbarrier.pending_count.b64 %r1, %rd1;\nst.global.b32 [%a0], %r1;",
            tests.format(form=".shared.b64", operand="%rd1", at=4),
            tests.format(form=".parity.acquire.cta.shared::cta.b64", operand="0", at=8),
            tests.format(form=".parity.shared.b64", operand="1", at=12),
            "mbarrier.arrive.release.cta.shared::cta.b64 %rd2, [%s], 2;\n",
            "mbarrier.pending_count.b64 %r1, %rd2;\nst.global.b32 [%a0+16], %r1;",
            tests.format(form=".acquire.cluster.b64", operand="%rd2", at=20).replace("[%s]", "[%rd30]"),
            tests.format(form=".parity.relaxed.cluster.shared.b64", operand="0", at=24),
            tests.format(form=".parity.shared.b64", operand="1", at=28),
            "mbarrier.arrive_drop.shared.b64 %rd3, [%s];\nmbarrier.arrive.noComplete.shared.b64 %rd4, [%s], 1;",
            "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%s];",
            tests.format(form=".shared.b64", operand="%rd4", at=32),
            # The next phase expects two: one went with arrive_drop.
            "mbarrier.arrive.shared.b64 %rd5, [%s];\nmbarrier.pending_count.b64 %r1, %rd5;\nst.global.b32 [%a0+36], %r1;",
            "mbarrier.arrive.shared.b64 %rd5, [%s];",
            tests.format(form=".shared.b64", operand="%rd5", at=40),
            "mbarrier.inval.shared::cta.b64 [%s];\nst.shared.b32 [%s], 7;\nmov.u32 %r1, 9;\nst.global.b32 [%a0+44], %r1;",
        ]
    )
    body = "cvt.u64.u32 %rd30, %s;\ncvta.shared.u64 %rd30, %rd30;\n" + body
    run(body, y)
    assert y.tolist()[:12] == [3, 0, 0, 1, 2, 1, 1, 0, 1, 2, 1, 9]


def test_mbarrier_transactions():
    # The phase ends when the arrivals and the bytes are there, in either order.
    y = torch.zeros(8, dtype=torch.int32)
    look = (
        "mbarrier.test_wait.parity.shared.b64 %p1, [%s], {};\nselp.b32 %r1, 1, 0, %p1;\nst.global.b32 [%a0+{}], %r1;\n"
    )
    body = "setp.ne.u32 %p0, %t, 0;\n@%p0 ret;\nmbarrier.init.shared.b64 [%s], 1;\n" + "".join(
        [
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 48;\n", look.format(0, 0),
            "mbarrier.complete_tx.shared::cluster.relaxed.cluster.b64 [%s], 32;\n", look.format(0, 4),
            "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%s], 16;\n", look.format(0, 8),
            "mbarrier.complete_tx.shared.b64 [%s], 16;\nmbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%s], 16;\n",
            look.format(1, 12),
            "mbarrier.expect_tx.shared.b64 [%s], 16;\nmbarrier.arrive.shared.b64 %rd1, [%s];\n", look.format(1, 16),
            "mbarrier.complete_tx.shared.b64 [%s], 16;\n", look.format(1, 20),
            "mbarrier.arrive_drop.expect_tx.release.cta.shared::cta.b64 %rd1, [%s], 0;\n", look.format(0, 24),
        ]
    )  # fmt: skip
    run(body, y)
    assert y.tolist()[:7] == [0, 0, 1, 0, 0, 1, 1]


# Warp 0 writes and arrives, warp 1 waits and reads.
HANDOVER = (
    INIT.format(count=32)
    + """
shl.b32 %r1, %t, 2;
and.b32 %r1, %r1, 127;
add.u32 %r0, %s, %r1;
cvt.u64.u32 %rd1, %r1;
add.u64 %rd2, %a0, %rd1;
setp.ge.u32 %p1, %t, 32;
@%p1 bra wait;
st.shared.b32 [%r0+64], %t;
mbarrier.arrive{arrive}.shared{cta}.b64 %rd4, [%s];
ret;
wait:
mbarrier.{wait}.parity{semantics}.shared{cta}.b64 %p2, [%s], {parity}{hint};
@!%p2 bra wait;
ld.shared.b32 %r3, [%r0+64];
st.global.b32 [%rd2], %r3;
"""
)


def handover(arrive="", wait="try_wait", semantics="", cta="", parity=0, hint=""):
    return HANDOVER.format(arrive=arrive, wait=wait, semantics=semantics, cta=cta, parity=parity, hint=hint)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("wait", "hint"), [("try_wait", ""), ("try_wait", ", 1000"), ("test_wait", "")])
@pytest.mark.parametrize(
    ("arrive", "semantics", "cta"),
    [("", "", ""), (".release.cta", ".acquire.cta", "::cta"), (".release.cluster", ".acquire.cluster", "::cta")],
)
def test_mbarrier_hands_over(wait, hint, arrive, semantics, cta, seed):
    y = torch.zeros(32, dtype=torch.int32)
    run(handover(arrive, wait, semantics, cta, hint=hint), y, block=64, seed=seed)
    assert y.tolist() == list(range(32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "wrong",
    [{"arrive": ".relaxed.cta"}, {"semantics": ".relaxed.cta"}, {"parity": 1}],
    ids=["arrive", "wait", "parity"],
)
def test_mbarrier_hands_nothing_over(wrong, seed):
    f = finding(handover(**wrong), torch.zeros(32), block=64, seed=seed)
    # Who waits for the wrong parity passes too early, or comes too late and waits for a phase that never ends.
    assert f.kind in (("race", "uninitialised", "deadlock") if "parity" in wrong else ("race",))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
def test_mbarrier_deadlock(wait, seed):
    f = finding(handover(wait=wait).replace("[%s], 32;", "[%s], 33;"), torch.zeros(32), block=64, seed=seed)
    assert f.kind == "deadlock" and wait in f.message


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarrier_init_is_a_write(seed):
    body = handover().replace("bar.sync 0;", "")
    assert finding(body, torch.zeros(32), block=64, seed=seed).kind in ("race", "mbarrier", "uninitialised")


@pytest.mark.parametrize("seed", SEEDS)
def test_try_wait_reaches_its_time_limit(seed):
    # nobody arrives: who looks once goes on, who loops never does
    look = """
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared.b64 [%s], 1;
    bar.sync 0;
    again: mbarrier.try_wait.parity.shared.b64 %p1, [%s], 0;
    {}selp.u32 %r1, 1, 0, %p1;
    @%p0 st.global.u32 [%a0], %r1;
    """
    y = torch.full((1,), 7, dtype=torch.int32)
    run(look.format(""), y, block=96, seed=seed)
    assert y.item() == 0
    assert finding(look.format("@!%p1 bra again;\n"), y, block=96, seed=seed).kind == "deadlock"


@pytest.mark.parametrize("seed", range(20))
def test_cp_async_arrivals_complete_in_any_order(seed):
    # warp 0 is two copies ahead: an mbarrier each, and the second may have the first copy landed
    y = torch.zeros(32, dtype=torch.int32)
    body = """
    setp.eq.u32 %p0, %t, 0;
    setp.lt.u32 %p1, %t, 32;
    @%p0 mbarrier.init.shared.b64 [%s], 32;
    @%p0 mbarrier.init.shared.b64 [%s+8], 32;
    bar.sync 0;
    and.b32 %r1, %t, 31;
    shl.b32 %r1, %r1, 2;
    cvt.u64.u32 %rd1, %r1;
    add.u32 %r1, %r1, %s;
    add.u64 %rd2, %rd1, %a0;
    add.u64 %rd3, %rd1, %a1;
    @!%p1 bra WAIT;
    cp.async.ca.shared.global [%r1+128], [%rd2], 4;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%s];
    cp.async.ca.shared.global [%r1+256], [%rd2], 4;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%s+8];
    ret;
    WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%s], 0;
    @!%p2 bra WAIT;
    ld.shared.b32 %r2, [%r1+128];
    st.global.b32 [%rd3], %r2;
    """
    run(body, torch.arange(1, 33, dtype=torch.int32), y, block=64, seed=seed)
    assert y.tolist() == list(range(1, 33))


ONE = "setp.ne.u32 %p0, %t, 0;\n@%p0 ret;\n"
START = ONE + "mbarrier.init.shared.b64 [%s], 2;\n"


@pytest.mark.parametrize(
    ("body", "kind", "why"),
    [
        (ONE + "mbarrier.init.shared.b64 [%s], 0;", "mbarrier", "1 to 2^20 - 1"),
        (ONE + "mbarrier.init.shared.b64 [%s], 1048576;", "mbarrier", "1 to 2^20 - 1"),
        (ONE + "mbarrier.init.shared.b64 [%s+4], 1;", "misaligned", "8 bytes"),
        (ONE + "mbarrier.init.shared.b64 [%s+4096], 1;", "out_of_bounds", ""),
        (ONE + "mbarrier.arrive.shared.b64 %rd1, [%s];", "mbarrier", "init has not run"),
        (ONE + "mbarrier.inval.shared.b64 [%s];", "mbarrier", "init has not run"),
        (ONE + "mbarrier.test_wait.parity.shared.b64 %p1, [%s], 0;", "mbarrier", "init has not run"),
        (ONE + "mov.u64 %rd1, %a0;\nmbarrier.init.b64 [%rd1], 1;", "illegal", "shared memory"),
        (START + "mbarrier.init.shared.b64 [%s], 2;", "mbarrier", "inval"),
        (START + "mbarrier.inval.shared.b64 [%s];\nmbarrier.arrive.shared.b64 %rd1, [%s];", "mbarrier", "inval"),
        (START + "st.shared.b32 [%s+4], 0;", "mbarrier", "mbarrier object"),
        (START + "ld.shared.b32 %r1, [%s+4];", "mbarrier", "mbarrier object"),
        (START + "mbarrier.arrive.shared.b64 %rd1, [%s], 3;", "mbarrier", "too many"),
        (START + "mbarrier.arrive.shared.b64 %rd1, [%s], 0;", "mbarrier", "1 to 2^20 - 1"),
        (START + "mbarrier.expect_tx.shared.b64 [%s], 8;\nmbarrier.arrive.shared.b64 %rd1, [%s], 2;\n"
         "mbarrier.arrive.shared.b64 %rd1, [%s];", "mbarrier", "waiting for 8 bytes"),
        (START + "mbarrier.arrive.noComplete.shared.b64 %rd1, [%s], 2;", "mbarrier", "noComplete"),
        (START + "mbarrier.arrive_drop.noComplete.release.cta.shared::cta.b64 %rd1, [%s], 2;", "mbarrier", "noComplete"),
        (START + "mbarrier.expect_tx.shared.b64 [%s], 1048576;", "mbarrier", "tx-count"),
        (START + "mbarrier.complete_tx.shared.b64 [%s], 1048576;", "mbarrier", "tx-count"),
        (START + "mbarrier.test_wait.parity.shared.b64 %p1, [%s], 2;", "illegal", "parity"),
        (START + "mov.b64 %rd1, 1;\nmbarrier.test_wait.shared.b64 %p1, [%s], %rd1;", "mbarrier", "state"),
        (START + "mbarrier.arrive.shared.b64 %rd1, [%s], 2;\nmbarrier.arrive.shared.b64 _, [%s], 2;\n"
         "mbarrier.test_wait.shared.b64 %p1, [%s], %rd1;", "mbarrier", "preceding"),
        (START + "mbarrier.init.shared.b64 [%s+8], 2;\nmbarrier.arrive.shared.b64 %rd1, [%s];\n"
         "mbarrier.test_wait.shared.b64 %p1, [%s+8], %rd1;", "mbarrier", "state"),
    ],
)  # fmt: skip
def test_mbarrier_misused(body, kind, why):
    f = finding(body, torch.zeros(4))
    assert f.kind == kind and why in f.message, f


@pytest.mark.parametrize(
    "body",
    [
        "mbarrier.init.shared.b64 [%s];",
        "mbarrier.inval.shared.b64 [%s], 1;",
        "mbarrier.arrive.expect_tx.shared.b64 _, [%s];",
        "mbarrier.arrive.noComplete.shared.b64 %rd1, [%s];",
        "mbarrier.arrive.shared.b64 [%s];",
        "mbarrier.test_wait.parity.shared.b64 %p1, [%s], 0, 10;",
        "mbarrier.try_wait.parity.shared.b64 %p1, [%s];",
        "mbarrier.expect_tx.shared.b64 [%s];",
        "mbarrier.pending_count.b64 %r1;",
        "cp.async.mbarrier.arrive.shared.b64 _, [%s];",
    ],
)
def test_mbarrier_refused(body):
    assert_refused(body)
