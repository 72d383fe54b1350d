"""wgmma.mma_async against matrices in numpy: every shape and type, layout, transpose, sign, and A from registers."""

import numpy as np
import pytest
import tensor_cores as tc
from rows import row, seed_of, spellings
from wgmma_kernels import (
    Operand,
    d_from_registers,
    d_to_registers,
    instruction,
    launch,
    parts_of,
)
from wgmma_rows import FENCE, HEAD, INTEGER, multiply, order, shapes

pytestmark = pytest.mark.interpreted

N_ALL = [8 * i for i in range(1, 33)]


F16 = HEAD + shapes(order(N_ALL), 16) + ".f16|f32.f16.f16"
BF16 = HEAD + shapes(order(N_ALL), 16) + ".f32.bf16.bf16"
TF32 = HEAD + shapes(order(N_ALL), 8) + ".f32.tf32.tf32"
FP8 = HEAD + shapes(order(N_ALL), 32) + ".f16|f32.e4m3|e5m2.e4m3|e5m2"
REST = "wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned"


def operands(op, rng, exact):
    n, k, d_type, a_type, b_type = parts_of(op)
    return (tc.encode(tc.random_matrix(rng, (64, k), a_type, exact), a_type),
            tc.encode(tc.random_matrix(rng, (k, n), b_type, exact), b_type),
            tc.encode(tc.random_matrix(rng, (64, n), d_type, exact), d_type))  # fmt: skip


def check(op, rng, exact=True, **how):
    _, _, d_type, a_type, b_type = parts_of(op)
    a, b, c = operands(op, rng, exact)
    if a_type == "tf32":
        a = a | rng.integers(0, 1 << 13, a.shape, dtype=np.uint32)
    got = multiply(op, a, b, c, rng, **how)
    x, y, z = tc.decode(a, a_type), tc.decode(b, b_type), tc.decode(c, d_type)
    signs, scale = how.get("signs", (1, 1)), how.get("scale", 1)
    x, z = x * signs[0] * signs[1], z * scale
    if exact:
        assert np.array_equal(got, tc.product(x, y, z, d_type, "satfinite" in op))
    else:
        error = np.abs(tc.decode(got, d_type) - (x @ y + z))
        assert (error <= tc.error_bound(x, y, z, d_type)).all()


def each_shape(pattern):
    """One spelling of every shape, and of every other modifier somewhere."""
    by_shape = {}
    for op in spellings(pattern):
        if op.count("satfinite") < 2:
            by_shape.setdefault(op.split(".")[4], []).append(op)
    return [ops[i % len(ops)] for i, ops in enumerate(by_shape.values())]


def small(pattern):
    """Every spelling for N = 16 and 24, with .satfinite in each of its two places."""
    return [
        op for op in spellings(pattern) if op.split(".")[4][:7] in ("m64n16k", "m64n24k") and op.count("satfinite") < 2
    ]


@row(F16, BF16, TF32, FP8, INTEGER, *REST)
@pytest.mark.parametrize("op", [op for p in (F16, BF16, TF32, FP8, INTEGER) for op in each_shape(p)])
def test_every_shape(op):
    rng = np.random.default_rng(seed_of(op))
    signs = (1, 1) if "s32" in op else tuple(int(x) for x in rng.choice([-1, 1], 2))
    check(
        op,
        rng,
        True,
        register_a=bool(rng.integers(2)),
        signs=signs,
        scale=int(rng.integers(2)),
        seed=int(rng.integers(9)),
    )


@pytest.mark.parametrize("op", [op for p in (F16, BF16, TF32, FP8, INTEGER) for op in small(p)])
def test_every_type(op):
    rng = np.random.default_rng(seed_of(op))
    for register_a in False, True:
        check(op, rng, True, register_a=register_a)
        if "s32" not in op:
            check(op, rng, False, register_a=register_a, signs=(-1, 1))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("n", [8, 72, 256])
def test_layouts(n, swizzle, mn_major, wide):
    op = f"{HEAD}m64n{n}k16.f32.f16.f16"
    rng = np.random.default_rng(n + swizzle)
    skips = range(max(swizzle // 32, 1)) if swizzle and not mn_major else [0]
    for skip in skips:
        for phase in range(8) if swizzle else [0]:

            def layout(bits, at=0):
                return Operand(bits, swizzle, mn_major, wide, skip, at + 128 * phase)  # noqa: B023

            check(op, rng, a_layout=layout, b_layout=layout)
            if n == 256 or skip != skips[-1]:
                break


def test_saturation():
    op = f"{HEAD}m64n8k32.s32.u8.u8"
    a, b = np.full((64, 32), 255, np.uint8), np.full((32, 8), 255, np.uint8)
    c = np.full((64, 8), 2**31 - 10, np.uint32)
    rng = np.random.default_rng(0)
    assert (multiply(op + ".satfinite", a, b, c, rng) == 2**31 - 1).all()
    assert (multiply(op, a, b, c, rng) == (2**31 - 10 + 32 * 255 * 255) % 2**32).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_of_operations_in_groups(seed):
    # four operations on one accumulator, two on another, waits of 1 and 0; in between a group that is empty
    op = f"{HEAD}m64n16k16.f32.bf16.bf16"
    rng = np.random.default_rng(seed)
    a = [tc.encode(tc.random_matrix(rng, (64, 16), "bf16", True), "bf16") for _ in range(4)]
    b = [tc.encode(tc.random_matrix(rng, (16, 16), "bf16", True), "bf16") for _ in range(4)]
    c = tc.encode(tc.random_matrix(rng, (64, 16), "f32", True), "f32")
    image = np.full(16384, 0xFF, np.uint8)
    whole_a, whole_b = np.concatenate(a, 1), np.concatenate([x.T for x in b], 1)
    left, right = Operand(whole_a, 128, pattern=8192), Operand(whole_b, 128)
    left.place(image)
    right.place(image)
    step = "add.u64 %a_desc, %a_desc, 2; add.u64 %b_desc, %b_desc, 2;"
    one = instruction(op)
    other = instruction(op, d="copy")
    zero = " ".join(f"mov.b32 %copy{i}, 0;" for i in range(8))
    add = " ".join(f"add.f32 %acc{i}, %acc{i}, %copy{i};" for i in range(8))
    commit = "wgmma.commit_group.sync.aligned;"
    body = f"""{zero} {FENCE} {one} {step} {one} {commit} {step} {other} {commit} {commit}
               wgmma.wait_group.sync.aligned 2; {FENCE} {one} {step} {one} {other} {commit}
               wgmma.wait_group.sync.aligned 0; {add}"""
    got = launch(
        op, body, image, left.descriptor(), right.descriptor(), d_registers=d_to_registers(c, "f32"), seed=seed
    )
    x, y = [tc.decode(m, "bf16") for m in a], [tc.decode(m, "bf16") for m in b]
    products = [p @ q for p, q in zip(x, y)]
    expected = tc.decode(c, "f32") + products[0] + products[1] + products[2] + products[3] + products[2] + products[3]
    assert np.array_equal(tc.decode(d_from_registers(got, 16, "f32"), "f32"), expected)
