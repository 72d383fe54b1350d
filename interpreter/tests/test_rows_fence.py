"""The barrier of a cluster of one CTA, griddepcontrol, setmaxnreg and fences that have nothing to do here."""

import pytest
import torch
from ptx import assert_refused, finding, run

pytestmark = pytest.mark.interpreted

SEEDS = range(6)

# Every thread writes a word and reads that of its mirror image.
MIRROR = """
shl.b32 %r1, %t, 2;
sub.u32 %r2, 508, %r1;
add.u32 %r1, %s, %r1;
add.u32 %r2, %s, %r2;
cvt.u64.u32 %rd1, %t;
shl.b64 %rd1, %rd1, 2;
add.u64 %rd1, %a0, %rd1;
st.shared.b32 [%r1], %t;
{barrier}
ld.shared.b32 %r3, [%r2];
st.global.b32 [%rd1], %r3;
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("arrive", "wait"),
    [("", ""), (".aligned", ".aligned"), (".release", ".acquire"), (".release.aligned", ".acquire.aligned")],
)
def test_cluster_barrier(arrive, wait, seed):
    y = torch.zeros(128, dtype=torch.int32)
    barrier = f"barrier.cluster.arrive{arrive};\nbarrier.cluster.wait{wait};\n"
    run(MIRROR.format(barrier=barrier), y, block=128, seed=seed)
    assert y.tolist() == list(range(127, -1, -1))
    run(MIRROR.format(barrier=barrier * 3), y, block=128, seed=seed)
    f = finding(MIRROR.format(barrier=barrier.split("\n")[0]), y, block=128, seed=seed)
    assert f.kind in ("race", "uninitialised")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aligned", ["", ".aligned"])
def test_cluster_barrier_relaxed(aligned, seed):
    y = torch.zeros(128, dtype=torch.int32)
    barrier = f"barrier.cluster.arrive.relaxed{aligned};\nbarrier.cluster.wait{aligned};\n"
    assert finding(MIRROR.format(barrier=barrier), y, block=128, seed=seed).kind == "race"


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_barrier_does_not_wait_for_threads_that_exit(seed):
    body = """
    setp.ge.u32 %p1, %t, 40;
    @%p1 ret;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    setp.ge.u32 %p1, %t, 32;
    @%p1 ret;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    setp.eq.u32 %p2, %t, 0;
    @%p2 st.global.b32 [%a0], 7;
    """
    y = torch.zeros(1, dtype=torch.int32)
    run(body, y, block=128, seed=seed)
    assert y.item() == 7


@pytest.mark.parametrize(
    ("barrier", "kind", "why"),
    [
        ("barrier.cluster.wait;", "barrier", "no barrier.cluster.arrive"),
        ("barrier.cluster.arrive;\nbarrier.cluster.arrive;", "barrier", "second time"),
        ("barrier.cluster.arrive;\nbarrier.cluster.wait;\nbarrier.cluster.wait;", "barrier", "no barrier.cluster.arrive"),
        ("setp.lt.u32 %p1, %t, 32;\n@%p1 bra past;\nbarrier.cluster.arrive;\nbarrier.cluster.wait;\npast:\nbar.sync 0;",
         "deadlock", "barrier.cluster.wait"),
    ],
)  # fmt: skip
def test_cluster_barrier_misused(barrier, kind, why):
    for seed in SEEDS:
        f = finding(barrier, torch.zeros(1), block=128, seed=seed)
        assert f.kind == kind and why in f.message, f


NOTHING = [
    "griddepcontrol.launch_dependents;",
    "griddepcontrol.wait;",
    "fence.mbarrier_init.release.cluster;",
    "fence.proxy.alias;",
    "membar.proxy.alias;",
    "setmaxnreg.dec.sync.aligned.u32 24;\nsetmaxnreg.inc.sync.aligned.u32 256;",
]


@pytest.mark.parametrize("body", NOTHING)
def test_runs(body):
    y = torch.zeros(1, dtype=torch.int32)
    run(body + "\nsetp.eq.u32 %p2, %t, 0;\n@%p2 st.global.b32 [%a0], 7;", y, block=128)
    assert y.item() == 7


def test_setmaxnreg_belongs_to_a_warpgroup():
    # The first 32 * n threads take one path: whole warpgroups may differ, and the warps of one may not.
    body = """
    setp.lt.u32 %p1, %t, {threads};
    @%p1 bra fewer;
    setmaxnreg.inc.sync.aligned.u32 232;
    bra join;
    fewer:
    setmaxnreg.dec.sync.aligned.u32 40;
    join:
    """
    for seed in SEEDS:
        run(body.format(threads=128), block=256, seed=seed)
        f = finding(body.format(threads=64), block=256, seed=seed)
        assert f.kind == "barrier" and "warpgroup" in f.message
    f = finding("setp.lt.u32 %p1, %t, 5;\n@%p1 setmaxnreg.dec.sync.aligned.u32 40;", block=128)
    assert f.kind == "barrier" and "every thread of the warp" in f.message


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("setmaxnreg.dec.sync.aligned.u32 16;", "24 to 256"),
        ("setmaxnreg.dec.sync.aligned.u32 264;", "24 to 256"),
        ("setmaxnreg.inc.sync.aligned.u32 100;", "multiple of 8"),
        ("setmaxnreg.inc.sync.aligned.u32 %r1;", "constant"),
        ("fence.proxy.texture;", "not known"),
        ("membar.proxy.async;", "not known"),
        ("fence.acq_rel.cta 1;", "no operands"),
    ],
)
def test_refused(body, why):
    assert why in assert_refused(body)
