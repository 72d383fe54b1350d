"""Triton's kernels of recall_bugs.py. BROKEN has the mistake of the project that the name says.

Needs: sm_80
"""

import triton
import triton.language as tl


@triton.jit
def rocm_triton_745(x, partial, lock, y, BROKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Stream-K: one program publishes its part of a sum by a lock, before all of its warps have stored theirs."""
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(partial + i, tl.load(x + i))  # HAZARD
        if not BROKEN:
            tl.debug_barrier()
        tl.atomic_xchg(lock, 1)
    else:
        while tl.atomic_cas(lock, 1, 1) != 1:
            pass
        tl.store(y + i, tl.load(partial + i) + tl.load(x + BLOCK + i))  # HAZARD


@triton.jit
def aiter_3132(x, y, BROKEN: tl.constexpr, BLOCK: tl.constexpr):
    """A histogram in global memory is read in another order than it was written in, by other warps."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))  # HAZARD
    if not BROKEN:
        tl.debug_barrier()
    tl.store(y + BLOCK + i, tl.load(y + BLOCK - 1 - i))  # HAZARD


@triton.jit
def fla_1082(x, y, columns, BROKEN: tl.constexpr, BLOCK: tl.constexpr):
    """The offset of a batch in 32 bits, in a tensor of more than 2^31 elements."""
    batch = tl.program_id(0) + 3
    if not BROKEN:
        batch = batch.to(tl.int64)
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + batch * columns + i))  # HAZARD


@triton.jit
def flash_attention_2789(x, y, m, BROKEN: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of the last rows is computed, and is not given to the store."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = i < m
    value = tl.load(x + i, rows)
    if BROKEN:
        tl.store(y + i, value)  # HAZARD
    else:
        tl.store(y + i, value, rows)


@triton.jit
def tensorrt_llm_17539(x, y, n, BROKEN: tl.constexpr, BLOCK: tl.constexpr):
    """A state is overwritten in another layout than it was read in, by warps that do not wait for each other."""
    i = tl.arange(0, BLOCK)
    old = tl.load(y + BLOCK - 1 - i)  # HAZARD
    if not BROKEN:
        tl.debug_barrier()
    tl.store(y + i, old + tl.load(x + i), i < n)  # HAZARD
