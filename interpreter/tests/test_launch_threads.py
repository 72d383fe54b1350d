"""The threads that help a launch: results and findings are those of one thread, and they outlive launches, not forks."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from cluster_kernels import START, SYNC
from ptx import kernel

import gpuless
from gpuless import core

pytestmark = pytest.mark.interpreted

THREADS = (1, 2, 3, 8)
SEEDS = range(4)
# Two warps exchange words of shared memory; the blocks from %a1 on have no barrier in between.
EXCHANGE = """
mov.u32 %r3, %ctaid.x;
shl.b32 %r1, %t, 2;
add.u32 %r2, %s, %r1;
add.u32 %r4, %r3, %t;
st.shared.u32 [%r2], %r4;
cvt.u32.u64 %r5, %a1;
setp.lt.u32 %p1, %r3, %r5;
@%p1 bar.sync 0;
xor.b32 %r6, %r1, 128;
add.u32 %r6, %r6, %s;
ld.shared.u32 %r7, [%r6];
mad.lo.u32 %r8, %r3, 64, %t;
mul.wide.u32 %rd1, %r8, 4;
add.u64 %rd1, %rd1, %a0;
st.global.u32 [%rd1], %r7;
"""


def outcomes(body, arguments, **launched):
    """What each number of threads has in store for each seed: the finding's text, and the instructions counted."""
    results = []
    for threads in THREADS:
        for seed in SEEDS:
            with gpuless.gpu("sm_90a", seed=seed, threads=threads) as device:
                args = arguments()
                try:
                    gpuless.Module(kernel(body, args, block=64))["k"].launch(block=64, args=args, **launched)
                    said = args[0].tolist(), device.counters["warp_instructions"]
                except gpuless.Finding as f:
                    said = str(f), f.block
            results.append(said)
    assert all(r == results[k % len(SEEDS)] for k, r in enumerate(results))
    return results


@pytest.mark.parametrize("blocks", [1, 2, 3, 40])
def test_a_grid(blocks):
    for first_wrong in (0, blocks // 2, blocks):
        results = outcomes(EXCHANGE, lambda: (torch.zeros(blocks, 64, dtype=torch.int32), first_wrong), grid=blocks)  # noqa: B023
        if first_wrong < blocks:
            # the first one in the order in which they begin, which odd seeds turn around
            expected = [(blocks - 1 if k % 2 else first_wrong, 0, 0) for k in range(len(results))]
            assert [block for _, block in results] == expected
        else:
            assert results[0][0][-1] == [blocks - 1 + (t ^ 32) for t in range(64)]


@pytest.mark.parametrize("right", [True, False])
def test_clusters(right):
    # each CTA reads the word that its neighbour has in shared memory
    body = f"""{START}
    st.shared.u32 [%r33], %r34;
    {SYNC if right else ""}
    mapa.shared::cluster.u32 %r5, %r33, %r32;
    ld.shared::cluster.u32 %r6, [%r5];
    {SYNC}
    st.global.u32 [%rd30], %r6;
    """
    results = outcomes(body, lambda: [torch.zeros(12 * 64, dtype=torch.int32)], grid=12, cluster=2)
    if right:
        assert results[0][0] == [
            block * 64 + t for pair in range(6) for block in (2 * pair + 1, 2 * pair) for t in range(64)
        ]
    else:
        assert all(isinstance(said, str) for said, _ in results)


def test_launches_of_several_host_threads():
    """They share the helpers."""
    y = torch.zeros(4, 16 * 64, dtype=torch.int32)
    with gpuless.gpu("sm_90a", threads=3) as device:
        module = gpuless.Module(kernel(EXCHANGE, (y, 16), block=64))
        with device.running() as scope:
            scope.add_tensor(y, "y")
            errors = []

            def launch(row):
                one = core.Dim3(1, 1, 1)
                packed = bytes(ctypes.c_uint64(row.data_ptr())) + bytes(ctypes.c_uint64(16))
                for _ in range(25):
                    errors.append(
                        core.load().gpuless_module_launch(
                            module.handle, b"k", core.Dim3(16, 1, 1), core.Dim3(64, 1, 1), one, 0, packed, 16, False
                        )
                    )

            hosts = [threading.Thread(target=launch, args=(row,)) for row in y]
            for h in hosts:
                h.start()
            for h in hosts:
                h.join()
    assert errors == [0] * 100
    expected = torch.tensor([[block + (t ^ 32) for t in range(64)] for block in range(16)], dtype=torch.int32)
    assert all(torch.equal(row.view(16, 64), expected) for row in y)


def test_a_fork_makes_its_own():
    script = f"""
    import os
    import torch
    import gpuless
    from ptx import kernel

    EXCHANGE = {EXCHANGE!r}
    y = torch.zeros(8 * 64, dtype=torch.int32)
    with gpuless.gpu("sm_90a", threads=4):
        module = gpuless.Module(kernel(EXCHANGE, (y, 8), block=64))
        module["k"].launch(8, 64, (y, 8))
        expected = y.clone()
        child = os.fork()
        y.zero_()
        module["k"].launch(8, 64, (y, 8))
        assert torch.equal(y, expected)
        if not child:
            os._exit(len(os.listdir("/proc/self/task")) < 4)
        assert os.waitpid(child, 0)[1] == 0
    """
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("blocks", [1, 263, 264, 265, 700])
def test_every_block_runs_once(blocks):
    # Of 1024 threads an H100 holds 264 at once: so many begin in another order with odd seeds.
    body = """
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd1, %rd1, %a0;
    setp.eq.u32 %p0, %t, 0;
    @%p0 red.global.add.u32 [%rd1], 1;"""
    for seed in range(2):
        counts = torch.zeros(blocks, dtype=torch.int32)
        with gpuless.gpu("sm_90a", seed=seed, threads=2):
            gpuless.Module(kernel(body, [counts], block=1024))["k"].launch(blocks, 1024, [counts])
        assert torch.equal(counts, torch.ones(blocks, dtype=torch.int32))
