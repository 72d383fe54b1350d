"""cp.async: copies that come after others, by other lanes of the warp or in the place of one that is over."""

import pytest
import torch
from ptx import finding, integers, run

pytestmark = pytest.mark.interpreted

SEEDS = range(6)

# Lane l of each warp: source %rd0 = x + 4 l, destination %r0 = memory + 4 l, result %rd2 = y + 4 l.
PLACES = """
and.b32 %r1, %t, 31;
shl.b32 %r1, %r1, 2;
cvt.u64.u32 %rd1, %r1;
add.u64 %rd0, %a0, %rd1;
add.u64 %rd2, %a1, %rd1;
add.u32 %r0, %s, %r1;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_groups_of_other_lanes(seed):
    """Half a warp has committed its copy, the other half, which copied before, has not."""
    x, y = integers(32), torch.zeros(32, dtype=torch.int32)
    body = f"""{PLACES}
    setp.lt.u32 %p1, %t, 16;
    @%p1 cp.async.ca.shared.global [%r0], [%rd0], 4;
    @!%p1 cp.async.ca.shared.global [%r0], [%rd0], 4;
    @!%p1 cp.async.commit_group;
    cp.async.wait_group 0;
    @{{}}%p1 ld.shared.b32 %r3, [%r0];
    @{{}}%p1 st.global.b32 [%rd2], %r3;"""
    run(body.format("!", "!"), x, y, seed=seed)
    assert torch.equal(y[16:], x[16:]) and not y[:16].any()
    assert finding(body.format("", ""), x, y, seed=seed).kind == "in_flight"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("copies", "reads", "kinds"),
    [
        # What the warp did before an earlier copy was there, an mbarrier that follows a later one says nothing of.
        (
            """st.shared.b32 [%r0+256], %t;
            cp.async.ca.shared.global [%r0+64], [%rd0], 4;
            cp.async.wait_all;
            mov.u32 %r5, 0;
            linger:
            add.u32 %r5, %r5, 1;
            setp.lt.u32 %p1, %r5, 300;
            @%p1 bra linger;
            cp.async.ca.shared.global [%r0+512], [%rd0], 4;
            cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%s];""",
            256,
            ("race",),
        ),
        # Nor does one that follows the earlier copy say anything of the later, though it arrive when that has begun.
        (
            """cp.async.ca.shared.global [%r0+64], [%rd0], 4;
            cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%s];
            cp.async.wait_all;
            cp.async.ca.shared.global [%r0+512], [%rd0], 4;""",
            512,
            ("in_flight", "race", "uninitialised"),
        ),
    ],
)
def test_a_copy_is_not_the_one_before(copies, reads, kinds, seed):
    body = f"""
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%s], 32;
    bar.sync 0;
    {PLACES}
    setp.ge.u32 %p1, %t, 32;
    @%p1 bra wait;
    {copies}
    ret;
    wait:
    mbarrier.try_wait.parity.shared.b64 %p2, [%s], 0;
    @!%p2 bra wait;
    ld.shared.b32 %r3, [%r0+{reads}];
    st.global.b32 [%rd2], %r3;"""
    assert finding(body, integers(32), torch.zeros(32, dtype=torch.int32), block=64, seed=seed).kind in kinds
