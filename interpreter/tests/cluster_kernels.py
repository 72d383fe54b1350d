"""Kernels of clusters: what every test of them begins with, and how they are launched."""

import pytest
import torch
from ptx import kernel

import gpuless

SEEDS = range(10)
BYTES = "mbarrier::complete_tx::bytes"
#: %r30: rank, %r31: CTAs of the cluster, %r32: the next CTA's rank, %p8: thread 0, %rd30: the thread's word of %a0 by CTA
#: and thread, %r33: the word of the thread in shared memory
START = """
mov.u32 %r30, %cluster_ctarank;
mov.u32 %r31, %cluster_nctarank;
add.u32 %r32, %r30, 1;
rem.u32 %r32, %r32, %r31;
setp.eq.u32 %p8, %t, 0;
mov.u32 %r34, %ctaid.x;
mov.u32 %r35, %ntid.x;
mad.lo.u32 %r34, %r34, %r35, %t;
mul.wide.u32 %rd30, %r34, 4;
add.u64 %rd30, %rd30, %a0;
shl.b32 %r33, %t, 2;
add.u32 %r33, %r33, %s;
"""
SYNC = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
#: One mbarrier at %s with one arrival, known to the cluster.
MBARRIER = f"@%p8 mbarrier.init.shared::cta.b64 [%s], {{}};\nfence.mbarrier_init.release.cluster;\n{SYNC}"
WAIT = "wait{0}:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [%s], {0};\n@!%p1 bra wait{0};\n"


def launch(body, *args, cluster=2, grid=None, block=64, seed=0, shared=4096, checks=True, arch="sm_90a"):
    with gpuless.gpu(arch, seed=seed, checks=checks):
        module = gpuless.Module(kernel(START + body, args, arch, block, shared))
        module["k"].launch(grid or cluster, block, args, cluster=cluster)


def reported(body, *args, kinds, seeds=SEEDS, **options):
    """Every seed reports one of the kinds; the first seed's finding."""
    found = []
    for seed in seeds:
        with pytest.raises(gpuless.Finding) as caught:
            launch(body, *args, seed=seed, **options)
        found.append(caught.value)
    assert {f.kind for f in found} <= set(kinds.split()), [str(f) for f in found]
    return found[0]


def outcome(body, *args, **options):
    """The finding, if there is one."""
    try:
        launch(body, *args, **options)
    except gpuless.Finding as f:
        return f
    return None


def words(n):
    return torch.zeros(n, dtype=torch.int32)
