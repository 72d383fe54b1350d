"""The truncating fp8 accumulator, bit by bit against MMA-Sim's rules, and what it loses."""

import numpy as np
import pytest
import tensor_cores as tc
from mma_rows import mma
from wgmma_kernels import Operand, d_from_registers, instruction, launch, parts_of
from wgmma_rows import FENCE, HEAD, WAIT, multiply

pytestmark = pytest.mark.interpreted

#: architecture -> group of K, fraction bits, mantissa bits of mma.sync
MMA = {"sm_89": (16, 13, 13), "sm_90a": (32, 25, 23)}


def wild(rng, shape, type):
    """Any code that is a number: subnormals, zeros and the largest ones too."""
    bits = rng.integers(0, 256, shape, dtype=np.uint8)
    bits[~np.isfinite(tc.decode(bits, type))] = 0
    bits[rng.random(shape) < 0.1] = 0
    return bits


def accumulator(rng, shape, d_type):
    values = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 12, shape))
    values[rng.random(shape) < 0.2] = 0
    if d_type == "f32":  # subnormal ones, which stay where products are zero, and the largest
        values = np.where(rng.random(shape) < 0.2, np.sign(values) * np.exp2(rng.uniform(-149, -120, shape)), values)
        values = np.where(rng.random(shape) < 0.1, np.sign(values) * np.exp2(rng.uniform(120, 127.9, shape)), values)
    return tc.encode(values, d_type)


@pytest.mark.parametrize("d_type", ["f32", "f16"])
@pytest.mark.parametrize("b_type", ["e4m3", "e5m2"])
@pytest.mark.parametrize("a_type", ["e4m3", "e5m2"])
@pytest.mark.parametrize("k", [16, 32])
@pytest.mark.parametrize("arch", MMA)
def test_mma(arch, k, a_type, b_type, d_type):
    op = f"mma.sync.aligned.m16n8k{k}.row.col.{d_type}.{a_type}.{b_type}.{d_type}"
    rng = np.random.default_rng(k)
    group, fraction, mantissa = MMA[arch]
    a = [wild(rng, (16, k), a_type) for _ in range(2)]
    b = [wild(rng, (k, 8), b_type) for _ in range(2)]
    c = [accumulator(rng, (16, 8), d_type) for _ in range(2)]
    b[1][:, 0] = 0  # a column without products
    for got, x, y, z in zip(mma(op, a, b, c, arch=arch, truncating=True), a, b, c):
        x, y, z = tc.decode(x, a_type), tc.decode(y, b_type), tc.decode(z, d_type)
        expected = tc.truncating_product(x, y, z, (a_type, b_type, d_type), min(group, k), fraction, mantissa)
        with np.errstate(over="ignore"):
            assert tc.same_bits(got, tc.encode(expected, d_type), d_type)


@pytest.mark.parametrize("op", [f"{HEAD}m64n{n}k32.{d}.{a}.{b}" for n, d, a, b in (
    (8, "f32", "e4m3", "e4m3"), (24, "f32", "e5m2", "e4m3"), (16, "f16", "e4m3", "e5m2"), (8, "f16", "e5m2", "e5m2"))])  # fmt: skip
@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_wgmma(op, signs):
    n, k, d_type, a_type, b_type = parts_of(op)
    rng = np.random.default_rng(n)
    a, b = wild(rng, (64, k), a_type), wild(rng, (k, n), b_type)
    c = accumulator(rng, (64, n), d_type)
    got = multiply(op, a, b, c, rng, signs=signs, truncating=True)
    x, y, z = tc.decode(a, a_type) * signs[0] * signs[1], tc.decode(b, b_type), tc.decode(c, d_type)
    with np.errstate(over="ignore"):
        expected = tc.encode(tc.truncating_product(x, y, z, (a_type, b_type, d_type), 32, 13, 13), d_type)
    assert tc.same_bits(got, expected, d_type)
    exact = multiply(op, a, b, c, rng, signs=signs)
    assert d_type == "f16" or not np.array_equal(got, exact)


def test_nan_and_infinity():
    op = "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e4m3.f32"
    a, b, c = np.full((16, 32), 0x3C, np.uint8), np.full((32, 8), 0x38, np.uint8), np.zeros((16, 8), np.uint32)
    a[1, 3], a[2, 3], a[3, 3] = 0x7F, 0x7C, 0xFC  # NaN, infinities
    a[4, 3], b[3, 4] = 0x7C, 0  # infinity times zero
    c[5, 5] = 0x7F800000
    got = mma(op, [a], [b], [c], arch="sm_89", truncating=True)[0]
    assert (got[1] == 0x7FFFFFFF).all() and got[4, 4] == 0x7FFFFFFF
    value = tc.decode(got, "f32")
    assert (value[2, :4] == np.inf).all() and (value[3, :4] == -np.inf).all() and value[5, 5] == np.inf
    assert np.isfinite(value[[0, *range(6, 16)]]).all()


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_other_types_are_not_truncated(type):
    op = f"mma.sync.aligned.m16n8k16.row.col.f32.{type}.{type}.f32"
    rng = np.random.default_rng(0)
    a, b = (tc.encode(rng.standard_normal(s), type) for s in ((16, 16), (16, 8)))
    c = tc.encode(rng.standard_normal((16, 8)), "f32")
    assert np.array_equal(mma(op, [a], [b], [c]), mma(op, [a], [b], [c], truncating=True))


@pytest.mark.parametrize("k", [512, 4096])
def test_sums_of_one_sign_lose(k):
    """A long sum of one sign, never promoted: the largest loss here is 2^-7.1 of the sum at K = 512 and 2^-3.8 at 4096."""
    op = f"{HEAD}m64n8k32.f32.e4m3.e4m3"
    rng = np.random.default_rng(0)
    a = tc.encode(np.abs(rng.standard_normal((64, k))), "e4m3")
    b = tc.encode(np.abs(rng.standard_normal((k, 8))), "e4m3")
    image = np.zeros(64 * 1024, np.uint8)
    losses = {}
    steps = 16  # of 32 elements, as much as shared memory holds beside the other operand
    body = FENCE + " ".join(
        f"{instruction(op)} add.u64 %a_desc, %a_desc, 128; add.u64 %b_desc, %b_desc, 16;" for _ in range(steps)
    )
    for truncating in False, True:
        d = np.zeros((4, 128), np.uint32)
        for first in range(0, k, 32 * steps):
            left, right = [], []
            for step in range(steps):
                part = slice(first + 32 * step, first + 32 * step + 32)
                left.append(Operand(np.ascontiguousarray(a[:, part]), pattern=2048 * step))
                right.append(Operand(np.ascontiguousarray(b[part].T), pattern=32768 + 256 * step))
            for operand in left + right:
                operand.place(image)
            d = launch(
                op,
                body + WAIT,
                image,
                left[0].descriptor(),
                right[0].descriptor(),
                d_registers=d,
                truncating=truncating,
            )
        got = tc.decode(d_from_registers(d, 8, "f32"), "f32")
        exact = tc.decode(a, "e4m3") @ tc.decode(b, "e4m3")
        losses[truncating] = np.max((exact - got) / exact)
    assert abs(losses[False]) < 2.0**-19
    assert losses[True] > (2.0**-8 if k == 512 else 2.0**-5)
