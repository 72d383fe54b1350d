"""clusterlaunchcontrol: clusters that take over the work of others of their grid. Each work is done once, by whatever seed."""

import pytest
import torch
from ptx import finding
from rows import row

import gpuless

pytestmark = pytest.mark.interpreted

#: Each CTA adds one to its element, then to those of the CTAs that its cluster cancels, and counts its works.
KERNEL = """.version 8.7
.target {arch}
.address_size 64
.shared .align 16 .b8 memory[64];
.visible .entry k(.param .u64 done, .param .u64 begun)
.reqntid 32
{{
.reg .b32 %r<24>; .reg .b64 %d<8>; .reg .b128 %q; .reg .pred %p<4>;
ld.param.u64 %d0, [done]; ld.param.u64 %d1, [begun];
mov.u32 %r0, %tid.x; mov.u32 %r1, memory; add.u32 %r2, %r1, 16; mov.u32 %r3, %cluster_ctarank;
mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y; mov.u32 %r6, 0; mov.u32 %r12, %nctaid.x;
setp.eq.u32 %p0, %r0, 0; setp.eq.and.u32 %p3, %r3, 0, %p0;
@%p0 mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
@%p0 atom.global.add.u32 %r7, [%d1], 1;
WORK:
mad.lo.u32 %r7, %r5, %r12, %r4; mad.wide.u32 %d2, %r7, 4, %d0;
@%p0 atom.global.add.u32 %r8, [%d2], 1;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
@%p3 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes{everywhere}.b128 [%r1], [%r2];
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], %r6; @!%p1 bra WAIT;
xor.b32 %r6, %r6, 1;
ld.shared.b128 %q, [%r1];
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q;
@!%p2 bra DONE;
{query}
add.u32 %r4, %r4, %r3;
fence.proxy.async; bra WORK;
DONE: ret;
}}
"""
EACH = " ".join(
    f"clusterlaunchcontrol.query_cancel.get_first_ctaid::{x}.b32.b128 {r}, %q;" for x, r in (("x", "%r4"), ("y", "%r5"))
)
QUERIES = ["clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r4, %r5, %r9, _}, %q;", EACH]


@row("clusterlaunchcontrol.try_cancel.async.shared::cta?.mbarrier::complete_tx::bytes.multicast::cluster::all?.b128",
     "clusterlaunchcontrol.query_cancel.is_canceled.pred.b128", "clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128",
     "clusterlaunchcontrol.query_cancel.get_first_ctaid::x|get_first_ctaid::y|get_first_ctaid::z.b32.b128")  # fmt: skip
@pytest.mark.parametrize("query", QUERIES, ids=["all", "each"])
@pytest.mark.parametrize("size", [1, 2])
def test_every_work_is_done_once(size, query):
    text = KERNEL.format(arch="sm_100a", everywhere=".multicast::cluster::all" * (size > 1), query=query)
    counts = set()
    for seed in range(5):
        for threads in (1, 2):
            done, begun = torch.zeros((6, 8), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            with gpuless.gpu("sm_100a", seed=seed, threads=threads) as device:
                gpuless.Module(text)["k"].launch((8, 6, 1), 32, [done, begun], cluster=(size, 1, 1))
            assert device.findings == [] and (done == 1).all()
            assert 4 <= begun.item() < 48  # some work was taken over
            counts.add((seed, begun.item()))
    assert len(counts) == 5 and len({n for _, n in counts}) > 1  # as the seed has it, not the threads


def test_what_is_wrong():
    ask = QUERIES[0]
    text = "mov.b64 %rd1, 0; mov.b64 %rd2, 0; .reg .b128 %q; mov.b128 %q, {%rd1, %rd2};\n" + ask
    assert "has cancelled nothing" in finding(text, arch="sm_100a").message
    text = "mov.b64 %rd1, 1; .reg .b128 %q; mov.b128 %q, {%rd1, %rd1};\n"
    text += (
        "mov.b64 %rd2, -1; mov.b128 %q, {%rd1, %rd2}; clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p1, %q;"
    )
    assert "no answer of try_cancel" in finding(text, arch="sm_100a").message
    assert "needs sm_100" in finding(text, arch="sm_90a").message
