"""wgmma in PTX: its shapes, its operands in shared memory, a launch of one."""

import numpy as np
from wgmma_kernels import (
    Operand,
    a_to_registers,
    d_from_registers,
    d_to_registers,
    has_transposes,
    instruction,
    launch,
    parts_of,
)

N_INTEGER = [8, 16, 24, 32, *range(48, 257, 16)]


def shapes(ns, *ks):
    return "|".join(f"m64n{n}k{k}" for k in ks for n in ns)


def order(ns):
    """As the table writes them: 8 to 32, multiples of 16, then the others."""
    return [n for n in ns if n <= 32] + [n for n in ns if n > 32 and n % 16 == 0] + [n for n in ns if n > 32 and n % 16]


HEAD = "wgmma.mma_async.sync.aligned."


INTEGER = HEAD + shapes(order(N_INTEGER), 32) + ".satfinite?.s32.s8|u8.s8|u8.satfinite?"


WAIT = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


FENCE = "wgmma.fence.sync.aligned;"


def random_layout(rng, bits, transposes, at):
    swizzle = int(rng.choice([0, 32, 64, 128]))
    mn_major = bool(transposes and rng.integers(2))
    skip = int(rng.integers(max(swizzle // 32, 1))) if swizzle and not mn_major else 0
    pattern = -(-at // 1024) * 1024 + (128 * int(rng.integers(8)) if swizzle and rng.integers(4) == 0 else 0)
    return Operand(bits, swizzle, mn_major, bool(rng.integers(2)), skip, pattern)


def multiply(op, a, b, c, rng=None, a_layout=None, b_layout=None, register_a=False, signs=(1, 1), scale=1, **options):
    """The bits of D of one operation on matrices of bits: a [64][k], b [k][n], c [64][n]."""
    n, _, d_type, a_type, _ = parts_of(op)
    b = np.ascontiguousarray(b.T)
    b_operand = b_layout(b) if b_layout else random_layout(rng, b, has_transposes(op), 0)
    end = -(-b_operand.end // 1024) * 1024
    a_operand = None if register_a else a_layout(a, end) if a_layout else random_layout(rng, a, has_transposes(op), end)
    image = np.zeros(-(-(a_operand or b_operand).end // 16) * 16, np.uint8)
    # what no operand covers holds NaN and must not be read
    image[:] = 0xFF
    b_operand.place(image)
    registers = None
    if register_a:
        registers = a_to_registers(a, a_type)
    else:
        a_operand.place(image)
    body = instruction(op, register_a, *signs, transpose_a=int(not register_a and a_operand.mn_major),
                       transpose_b=int(b_operand.mn_major))  # fmt: skip
    got = launch(op, f"{FENCE} {body} {WAIT}", image, 0 if register_a else a_operand.descriptor(), b_operand.descriptor(),
                 scale, registers, d_to_registers(c, d_type), **options)  # fmt: skip
    return d_from_registers(got, n, d_type)
