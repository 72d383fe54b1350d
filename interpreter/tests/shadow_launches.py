"""Launches of a few warps, asked for what they report in every schedule."""

from ptx import kernel

import gpuless

SEEDS = range(8)


# %r0 = the warp, %r1 = the lane, %p0: warp 0, %p1: warp 1
WARPS = """
shr.u32 %r0, %t, 5;
and.b32 %r1, %t, 31;
setp.eq.u32 %p0, %r0, 0;
setp.eq.u32 %p1, %r0, 1;
"""


def launch(body, *args, grid=1, block=64, seeds=SEEDS, shared=4096):
    """The findings' kinds and messages over the seeds; empty where there was none."""
    module = None
    found = []
    for seed in seeds:
        with gpuless.gpu("sm_90a", seed=seed):
            module = module or gpuless.Module(kernel(WARPS + body, args, block=block, shared=shared))
            try:
                module["k"].launch(grid, block, args)
            except gpuless.Finding as f:
                found.append(f)
    return found


def silent(body, *args, **options):
    found = launch(body, *args, **options)
    assert not found, found[0]


def always(kinds, body, *args, **options):
    """A finding of one of the kinds with every seed, of the first kind with some; that one. Which it is the schedule decides."""
    found = launch(body, *args, **options)
    assert len(found) == len(options.get("seeds", SEEDS)), "a seed found nothing"
    assert kinds.split()[0] in {f.kind for f in found} <= set(kinds.split()), [str(f) for f in found]
    return next(f for f in found if f.kind == kinds.split()[0])
