"""Asynchronous stores, copies and reductions between the CTAs of a cluster, and reductions in global memory."""

import re

import numpy as np
import pytest
import torch
from cluster_kernels import BYTES, MBARRIER, SEEDS, SYNC, WAIT, launch, reported, words
from ptx import integers
from rows import row

import gpuless

pytestmark = pytest.mark.interpreted


# ---- st.async and red.async ----


@row(f"st.async.weak?.shared::cluster?.{BYTES}.v2|v4?.b32|b64|u32|u64|s32|s64|f32|f64")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("form", "value", "bytes_"),
    [("b32", "%r4", 4), ("v2.u32", "{%r4, %r5}", 8), ("v4.b32", "{%r4, %r5, %r4, %r5}", 16), ("b64", "%rd4", 8),
     ("v2.s64", "{%rd4, %rd4}", 16), ("f32", "%f4", 4)],
)  # fmt: skip
def test_st_async(form, value, bytes_, seed):
    weak = ".weak" if seed % 2 else ""
    body = (
        f"""
    {MBARRIER.format(1)}
    @%p8 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], {64 * bytes_};
    add.u32 %r4, %r34, 1000; add.u32 %r5, %r34, 2000; mov.b64 %rd4, {{%r4, %r5}}; mov.b32 %f4, %r4;
    mad.lo.u32 %r1, %t, {bytes_}, %s;
    add.u32 %r6, %r1, 64;
    mapa.shared::cluster.u32 %r1, %r6, %r32;
    mapa.shared::cluster.u32 %r2, %s, %r32;
    st.async{weak}.shared::cluster.{BYTES}.{form} [%r1], {value}, [%r2];
    {WAIT.format(0)}
    mul.lo.u32 %r8, %r34, {bytes_}; cvt.u64.u32 %rd1, %r8; add.u64 %rd1, %rd1, %a0;
    """
        + "\n".join(f"ld.shared.u32 %r7, [%r6+{k}]; st.global.u32 [%rd1+{k}], %r7;" for k in range(0, bytes_, 4))
        + SYNC
    )
    y = words(128 * bytes_ // 4)
    launch(body, y, seed=seed)
    thread = np.array([*range(64, 128), *range(64)])
    pair = np.stack([thread + 1000, thread + 2000], 1)
    expected = np.tile(pair, (1, 2))[:, : bytes_ // 4] if bytes_ > 4 else pair[:, :1]
    assert (y.numpy().reshape(128, -1) == expected).all()


OPERATIONS = {
    "add": lambda a, b: a + b, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "inc": lambda a, b: np.where(a >= b, 0, a + 1),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - 1),
}  # fmt: skip
NUMPY = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64}
DISTRIBUTED = [("add", "u32"), ("add", "s32"), ("add", "u64"), ("min", "u32"), ("min", "s32"), ("max", "u32"),
               ("max", "s32"), ("inc", "u32"), ("dec", "u32"), ("and", "b32"), ("or", "b32"), ("xor", "b32")]  # fmt: skip


def numbers(type, n, seed):
    """Bits at random, small numbers among them, so that inc and dec wrap too."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, n * np.dtype(NUMPY[type]).itemsize, dtype=np.uint8).view(NUMPY[type])
    return np.where(rng.random(n) < 0.5, bits, rng.integers(0, 4, n).astype(NUMPY[type]))


def as_tensor(values):
    return torch.from_numpy(values.view(f"i{values.itemsize}").copy())


@row(
    f"red.async.relaxed.cluster.shared::cluster?.{BYTES}.add.u32|s32|u64",
    f"red.async.relaxed.cluster.shared::cluster?.{BYTES}.min|max.u32|s32",
    f"red.async.relaxed.cluster.shared::cluster?.{BYTES}.inc|dec.u32",
    f"red.async.relaxed.cluster.shared::cluster?.{BYTES}.and|or|xor.b32",
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("operation", "type"), DISTRIBUTED)
def test_red_async(operation, type, seed):
    # CTA 1 reduces words of CTA 0.
    old, value = numbers(type, 64, 2 * seed), numbers(type, 64, 2 * seed + 1)
    size = old.itemsize
    r, a = ("%r5", "%r6") if size == 4 else ("%rd5", "%rd6")
    body = f"""
    mad.lo.u32 %r1, %t, {size}, %s; add.u32 %r1, %r1, 64;
    mul.wide.u32 %rd1, %t, {size}; add.u64 %rd2, %rd1, %a0; add.u64 %rd3, %rd1, %a1;
    ld.global.b{8 * size} {r}, [%rd2]; ld.global.b{8 * size} {a}, [%rd3];
    st.shared.b{8 * size} [%r1], {r};
    {MBARRIER.format(1)}
    setp.eq.u32 %p2, %r30, 0;
    @%p2 bra first;
    mapa.shared::cluster.u32 %r1, %r1, 0; mapa.shared::cluster.u32 %r2, %s, 0;
    red.async.relaxed.cluster.shared::cluster.{BYTES}.{operation}.{type} [%r1], {a}, [%r2];
    bra end;
    first:
    @%p8 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], {64 * size};
    {WAIT.format(0)}
    ld.shared.b{8 * size} {r}, [%r1];
    st.global.b{8 * size} [%rd2], {r};
    end:
    {SYNC}"""
    x, y = as_tensor(old), as_tensor(value)
    launch(body, x, y, seed=seed)
    assert (x.numpy().view(NUMPY[type]) == OPERATIONS[operation](old, value)).all()


# ---- bulk copies to other CTAs, and reductions ----

COPY = """
mad.lo.u32 %r33, %t, 16, %s; add.u32 %r33, %r33, 64;
mul.wide.u32 %rd1, %r34, 16; add.u64 %rd1, %rd1, {source};
ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd1];
st.shared.v4.u32 [%r33], {{%r4, %r5, %r6, %r7}};
fence.proxy.async;
"""


@row(
    f"cp.async.bulk.shared::cluster.shared::cta.{BYTES}",
    f"cp.reduce.async.bulk.shared::cluster.shared::cta.{BYTES}.and|or|xor.b32",
    f"cp.reduce.async.bulk.shared::cluster.shared::cta.{BYTES}.add.u32|s32|u64",
    f"cp.reduce.async.bulk.shared::cluster.shared::cta.{BYTES}.min|max.u32|s32",
    f"cp.reduce.async.bulk.shared::cluster.shared::cta.{BYTES}.inc|dec.u32",
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("operation", "type"), [("", "b32"), *DISTRIBUTED])
def test_bulk_to_the_other_cta(operation, type, seed):
    # 1024 bytes of CTA 1 go to CTA 0, into a place of their own or over what is there.
    x = numbers(type, 2048 // np.dtype(NUMPY[type]).itemsize, seed)
    old, value = x[: len(x) // 2], x[len(x) // 2 :]
    opcode = f"cp.reduce.async.bulk.shared::cluster.shared::cta.{BYTES}.{operation}.{type}"
    if not operation:
        opcode = f"cp.async.bulk.shared::cluster.shared::cta.{BYTES}"
    at = 64 if operation else 2048
    body = f"""
    {COPY.format(source="%a0")}
    {MBARRIER.format(1)}
    setp.eq.u32 %p2, %r30, 0;
    @%p2 bra first;
    add.u32 %r1, %s, {at}; mapa.shared::cluster.u32 %r1, %r1, 0; mapa.shared::cluster.u32 %r2, %s, 0;
    @%p8 {opcode} [%r1], [%s+64], 1024, [%r2];
    bra end;
    first:
    @%p8 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 1024;
    {WAIT.format(0)}
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r33+{at - 64}];
    st.global.v4.u32 [%rd1], {{%r4, %r5, %r6, %r7}};
    end:
    {SYNC}"""
    y = as_tensor(x)
    launch(body, y, seed=seed)
    expected = OPERATIONS[operation](old, value) if operation else value
    assert (y.numpy().view(NUMPY[type])[: len(old)] == expected).all()


GLOBAL = [
    *((o, t) for o in ("and", "or", "xor") for t in ("b32", "b64")),
    *(("add", t) for t in ("u32", "s32", "u64", "f32", "f64")),
    *((f"{o}", t) for o in ("min", "max") for t in ("u32", "s32", "u64", "s64", "f16", "bf16")),
    ("inc", "u32"), ("dec", "u32"), ("add.noftz", "f16"), ("add.noftz", "bf16"),
]  # fmt: skip
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint?"


def reduced(operation, type, seed, n):
    """old, value, expected: 2048 bytes each of tensors."""
    if type in FLOATS:
        g = torch.Generator().manual_seed(seed)
        old, value = (torch.randint(-64, 65, (n,), generator=g).to(FLOATS[type]) / 8 for _ in range(2))
        result = {"add": torch.add, "min": torch.minimum, "max": torch.maximum}[operation](old, value)
        return old, value, result
    old, value = numbers(type, n, 2 * seed), numbers(type, n, 2 * seed + 1)
    return as_tensor(old), as_tensor(value), as_tensor(OPERATIONS[operation](old, value).astype(NUMPY[type]))


def size_of(type):
    return int(re.sub(r"\D", "", type)) // 8


@row(
    f"{REDUCE}.and|or|xor.b32|b64",
    f"{REDUCE}.add.u32|s32|u64|f32|f64",
    f"{REDUCE}.add.noftz.f16|bf16",
    f"{REDUCE}.min|max.u32|s32|u64|s64|f16|bf16",
    f"{REDUCE}.inc|dec.u32",
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("operation", "type"), GLOBAL)
def test_bulk_reductions_in_global_memory(operation, type, seed):
    old, value, expected = reduced(operation.split(".")[0], type, seed, 1024 // size_of(type))
    hint, policy = (".L2::cache_hint", ", 0") if seed else ("", "")
    body = f"""
    {COPY.format(source="%a0")}
    bar.sync 0;
    @%p8 cp.reduce.async.bulk.global.shared::cta.bulk_group{hint}.{operation}.{type} [%a1], [%s+64], 1024{policy};
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;"""
    launch(body, value, old, cluster=1, seed=seed)
    assert torch.equal(old, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_reductions_of_several_ctas_add_up(seed):
    x, y = integers(4, 256), words(256)
    body = f"""
    {COPY.format(source="%a0")}
    bar.sync 0;
    @%p8 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%a1], [%s+64], 1024;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;"""
    launch(body, x, y, cluster=1, grid=4, seed=seed)
    assert torch.equal(y, x.sum(0).to(torch.int32))


TENSOR_TYPES = {"u32": torch.int32, "u64": torch.int64, **FLOATS}


@row(
    "cp.reduce.async.bulk.tensor.1d|2d|3d|4d|5d.global.shared::cta.add|min|max|inc|dec|and|or|xor.tile?.bulk_group"
    ".L2::cache_hint?"
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("operation", "type"),
    [("add", "s32"), ("add", "f32"), ("add", "f16"), ("add", "bf16"), ("add", "f64"), ("min", "s32"), ("max", "s64"),
     ("max", "bf16"), ("min", "f16"), ("and", "s32"), ("or", "s64"), ("xor", "s32")],
)  # fmt: skip
def test_tensor_reductions(operation, type, seed):
    # Two boxes of 8 rows of 64 bytes, the second half outside the tensor.
    size = size_of(type)
    width = 64 // size
    old, value, result = (t.reshape(16, width) for t in reduced(operation, type, seed, 1024 // size))
    y = old[:12].clone()
    tile = ".tile" if seed else ""
    body = f"""
    {COPY.format(source="%a0")}
    bar.sync 0;
    @%p8 cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}{tile}.bulk_group [%a1, {{0, 0}}], [%s+128];
    @%p8 cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}{tile}.bulk_group [%a1, {{0, 8}}], [%s+640];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;"""
    body = body.replace("%r33, 64", "%r33, 128")
    launch(body, value, gpuless.tensor_map(y, box=(8, width)), cluster=1, seed=seed)
    assert torch.equal(y, result[:12])


def test_a_tensor_reduction_that_is_none():
    y = torch.zeros(16, 16)
    body = f"""
    {COPY.format(source="%a0").replace("%r33, 64", "%r33, 128")}
    bar.sync 0;
    @%p8 cp.reduce.async.bulk.tensor.2d.global.shared::cta.min.bulk_group [%a1, {{0, 0}}], [%s+128];"""
    f = reported(body, torch.zeros(256), gpuless.tensor_map(y, box=(8, 16)), kinds="illegal", cluster=1, seeds=[0])
    assert ".min" in f.message
