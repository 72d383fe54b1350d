"""Tensor copies against numpy, tensor maps and their limits, and what is reported when they are misused."""

import ctypes
import math
import re

import numpy as np
import pytest
import torch
from ptx import MBARRIER, ONE, WAIT, copied, finding, integers, run
from tensor_maps import in_shared_memory, noise, raw

import gpuless
from gpuless import core
from gpuless.memory.tensor_maps import encode

pytestmark = pytest.mark.interpreted

SEEDS = range(6)


def box_of(x, box, at, steps=None, fill=0):
    """The elements of a box at a coordinate, outermost dimension first; and which of them are in the tensor."""
    steps = [*(steps or [1] * x.ndim)]
    steps[-1] = 1  # the innermost one is ignored
    axes = [a + s * np.arange(math.ceil(n / s)) for n, a, s in zip(box, at, steps)]
    inside = np.ones((), dtype=bool)
    for axis, size in zip(axes, x.shape):
        inside = inside[..., None] & (axis >= 0) & (axis < size)
    values = x[np.ix_(*[np.clip(a, 0, n - 1) for a, n in zip(axes, x.shape)])]
    return np.where(inside, values, np.array(fill, dtype=x.dtype)), inside, axes


LOAD = "cp.async.bulk.tensor.{rank}d.{space}.global{mode}.mbarrier::complete_tx::bytes{hint}"


def load_body(rank, at, size, base, space="shared::cluster", mode="", hint=""):
    opcode = LOAD.format(rank=rank, space=space, mode=mode, hint=hint)
    coordinates = ", ".join(str(c) for c in at[::-1])
    return f"""{MBARRIER}
    mov.b64 %rd9, 0;
    @%p0 cp.async.bulk.prefetch.tensor.{rank}d.L2.global{mode}{hint} [%a0, {{{coordinates}}}]{", %rd9" * bool(hint)};
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], {size};
    @%p0 {opcode} [%s+{base}], [%a0, {{{coordinates}}}], [%s]{", %rd9" * bool(hint)};
    {WAIT.format(0)}
    {copied(f"%s+{base}", "%a1", size // 4, "out")}"""


TILES = [
    # shape, dtype, box, coordinate, swizzle, element strides, base
    ((300,), torch.uint8, (256,), (7,), 0, None, 128),
    ((5,), torch.float64, (16,), (-3,), 0, None, 128),
    ((9, 40), torch.float16, (4, 64), (-2, -5), 128, None, 1024),
    ((9, 40), torch.float16, (12, 64), (3, 17), 128, None, 128),
    ((9, 40), torch.float16, (12, 64), (3, 17), (128, 32), None, 1024),
    ((20, 33), torch.float32, (16, 32), (7, 20), (128, 32), None, 128),
    ((20, 33), torch.bfloat16, (16, 32), (7, 9), 64, None, 512),
    ((20, 33), torch.float32, (16, 16), (7, 20), 64, None, 640),
    ((20, 33), torch.int8, (32, 32), (-4, 3), 32, None, 256),
    ((20, 33), torch.float8_e4m3fn, (9, 32), (-4, 3), 32, None, 384),
    ((3, 6, 24), torch.int32, (2, 3, 8), (2, 4, -3), 32, None, 1024),
    ((2, 3, 4, 10), torch.int16, (2, 2, 3, 8), (-1, 2, 1, 5), 0, None, 128),
    ((2, 2, 3, 4, 10), torch.uint16, (1, 3, 2, 5, 16), (1, -1, 2, -1, -3), 0, None, 128),
    ((2, 2, 3, 4, 10), torch.int64, (2, 1, 2, 2, 4), (0, 0, 2, 3, 8), 32, None, 1024),
    ((40, 24), torch.float16, (10, 16), (-3, 2), 0, (4, 1), 128),
    ((9, 9, 16), torch.float32, (7, 8, 16), (-1, 1, 3), 64, (2, 3, 1), 1024),
    ((40, 24), torch.float16, (10, 16), (1000, 2), 0, None, 128),
    ((40, 24), torch.float16, (10, 16), (-2147483648, 2147483647), 0, None, 128),
]


# What is filled in for elements outside of the tensor.
NAN = {torch.float16: 0x7FFF, torch.bfloat16: 0x7FFF, torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}
FILLED = [(*tile, "zero") for tile in TILES] + [(*tile, "nan") for tile in TILES if tile[1] in NAN]


@pytest.mark.parametrize(("shape", "dtype", "box", "at", "swizzle", "steps", "base", "fill"), FILLED)
def test_tensor_load(shape, dtype, box, at, swizzle, steps, base, fill):
    x = noise(shape, dtype, pitch=1)
    expected, *_ = box_of(raw(x), box, at, steps, NAN[dtype] if fill == "nan" else 0)
    y = torch.zeros(expected.nbytes // 4, dtype=torch.int32)
    tmap = gpuless.tensor_map(x, box, swizzle, fill, steps)
    for seed in SEEDS:
        run(load_body(len(shape), at, expected.nbytes, base), tmap, y.zero_(), shared=base + expected.nbytes, seed=seed)
        assert np.array_equal(y.numpy().view(np.uint8), in_shared_memory(expected, base, swizzle))


@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
@pytest.mark.parametrize(("mode", "hint"), [("", ""), (".tile", ""), ("", ".L2::cache_hint")])
def test_tensor_load_spellings(space, mode, hint):
    x = noise((8, 64), torch.float16)
    y = torch.zeros(256, dtype=torch.int32)
    run(load_body(2, (0, 0), 1024, 1024, space, mode, hint), gpuless.tensor_map(x, (8, 64), 128), y)
    assert np.array_equal(y.numpy().view(np.uint8), in_shared_memory(raw(x), 1024, 128))


def test_tensor_map_in_global_memory():
    x, y = noise((8, 64), torch.float16), torch.zeros(256, dtype=torch.int32)
    aligned = torch.zeros(256, dtype=torch.uint8)
    aligned = aligned[-aligned.data_ptr() % 64 :][:128]
    aligned.copy_(torch.frombuffer(bytearray(gpuless.tensor_map(x, (8, 64)).encode(x)), dtype=torch.uint8))
    body = load_body(2, (0, 0), 1024, 1024)
    run(body + "mov.u64 %rd1, %a2;", aligned, y, x)
    assert np.array_equal(y.numpy().view(np.int16).reshape(8, 64), raw(x))
    wrong = torch.zeros(256, dtype=torch.uint8)
    assert finding(body + "mov.u64 %rd1, %a2;", wrong[-wrong.data_ptr() % 64 :][:128], y, x).kind == "illegal"
    assert finding(body + "mov.u64 %rd1, %a2;", wrong[-wrong.data_ptr() % 64 + 32 :][:128], y, x).kind == "misaligned"


class RawMap(gpuless.TensorMap):
    """One that gpuless.tensor_map does not make."""

    def __init__(self, tensor, **how):
        self.tensor, self.how = tensor, how

    def encode(self, tensor):
        size = tensor.element_size()
        return encode(address=tensor.data_ptr(), shape=tensor.shape, strides=[s * size for s in tensor.stride()], fill=0,
                      swizzle=0, **self.how)  # fmt: skip


@pytest.mark.parametrize(("data_type", "flush", "tf32"), [(10, True, False), (11, False, True), (12, True, True)])
def test_tensor_load_rounds(data_type, flush, tf32):
    bits = [0, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0x7F7FFFFF,
            0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC12345]  # fmt: skip
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).reshape(1, 16)
    expected = []
    for b in bits:
        if flush and not b & 0x7F800000:
            b &= 0x80000000
        if tf32 and b & 0x7F800000 != 0x7F800000:
            kept, rest = b & ~0x1FFF, b & 0x1FFF
            b = kept + 0x2000 * (rest > 0x1000 or (rest == 0x1000 and bool(kept & 0x2000)))
        expected.append(b)
    y = torch.zeros(16, dtype=torch.int32)
    run(load_body(2, (0, 0), 64, 128), RawMap(x, data_type=data_type, box=(1, 16)), y)
    assert [v % 2**32 for v in y.tolist()] == expected


TENSOR_STORE = """
{copy}
fence.proxy.async;
bar.sync 0;
setp.eq.u32 %p0, %t, 0;
@!%p0 bra join;
cp.async.bulk.tensor.{rank}d.global.shared::cta{mode}.bulk_group{hint} [%a1, {{{at}}}], [%s+{base}]{policy};
cp.async.bulk.commit_group;
cp.async.bulk.wait_group{read} 0;
join:
"""


def store_body(rank, at, size, base, mode="", hint="", read=""):
    return TENSOR_STORE.format(
        copy=copied("%a0", f"%s+{base}", size // 4, "in"), rank=rank, at=", ".join(str(c) for c in at[::-1]), base=base,
        mode=mode, hint=hint, policy=", 0" if hint else "", read=read,
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype", "box", "at", "swizzle", "steps", "base"), TILES)
def test_tensor_store(shape, dtype, box, at, swizzle, steps, base):
    y = noise(shape, dtype, pitch=1)
    expected = raw(y).copy()
    _, inside, axes = box_of(expected, box, at, steps)
    x = noise(inside.shape, dtype).contiguous().flip(0).contiguous()
    inner = np.ix_(*[a[(a >= 0) & (a < n)] for a, n in zip(axes, shape)])
    expected[inner] = raw(x)[inside].reshape(expected[inner].shape)
    given = torch.from_numpy(in_shared_memory(raw(x), base, swizzle))
    original = y.clone()
    for seed in SEEDS:
        y.copy_(original)
        tmap = gpuless.tensor_map(y, box, swizzle, element_strides=steps)
        run(store_body(len(shape), at, given.numel(), base), given, tmap, shared=base + given.numel(), seed=seed)
        assert np.array_equal(raw(y), expected)


@pytest.mark.parametrize(("mode", "hint", "read"), [(".tile", "", ".read"), ("", ".L2::cache_hint", "")])
def test_tensor_store_spellings(mode, hint, read):
    x, y = integers(64), torch.zeros(2, 32, dtype=torch.int32)
    run(store_body(2, (0, 0), 256, 128, mode, hint, read), x, gpuless.tensor_map(y, (2, 32)))
    assert torch.equal(y.flatten(), x)


def test_tensor_store_reads_no_more_than_is_stored():
    # The box hangs over by its last two rows, which nothing has written.
    y = torch.zeros(2, 32, dtype=torch.int32)
    x = integers(64)
    body = store_body(2, (0, 0), 256, 128)
    run(body, x, gpuless.tensor_map(y, (4, 32)))
    assert torch.equal(y.flatten(), x)
    assert finding(body, x, gpuless.tensor_map(torch.zeros(3, 32), (4, 32))).kind == "uninitialised"


@pytest.mark.parametrize(
    ("rank", "base", "box", "swizzle", "kind", "why"),
    [
        (3, 128, (8, 32), 0, "illegal", "rank 2"),
        (2, 64, (8, 32), 0, "misaligned", "128 bytes"),
        (2, 3200, (8, 32), 0, "out_of_bounds", ""),
        (2, 1024, (8, 8), 64, "unsupported", "narrower"),
    ],
)
def test_tensor_load_misused(rank, base, box, swizzle, kind, why):
    x, y = torch.zeros(8, 32), torch.zeros(256, dtype=torch.int32)
    f = finding(load_body(rank, (0,) * rank, 1024, base), gpuless.tensor_map(x, box, swizzle), y)
    assert f.kind == kind and why in f.message, f


def test_tensor_map_of_memory_that_is_not_there():
    # Rows 0 to 7 are an argument; the map says 16.
    x, y = torch.zeros(16, 32), torch.zeros(256, dtype=torch.int32)

    class Longer(gpuless.TensorMap):
        def __init__(self, tensor):
            self.tensor = tensor

        def encode(self, tensor):
            return encode(tensor.data_ptr(), 7, (16, 32), (128, 4), (8, 32), 0, 0)

    short = torch.zeros(8, 32)
    run(load_body(2, (0, 0), 1024, 1024), Longer(short), y)
    f = finding(load_body(2, (8, 0), 1024, 1024), Longer(short), y)
    assert f.kind == "out_of_bounds" and "argument 0" in f.message, f
    run(load_body(2, (8, 0), 1024, 1024), Longer(x), y)


GOOD = {"data_type": 6, "shape": (20, 64), "strides": (128, 2), "box": (8, 64), "swizzle": 3, "fill": 0}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"data_type": 16}, "CUtensorMapDataType"),
        ({"data_type": -1}, "CUtensorMapDataType"),
        ({"data_type": 13, "box": (8, 24)}, "multiple of 16"),
        ({"data_type": 13, "shape": (64, 63)}, "must be even"),
        ({"data_type": 14}, "boxDim[0] 128"),
        ({"data_type": 15, "shape": (64, 128), "box": (8, 64)}, "boxDim[0] 128"),
        ({"data_type": 15, "shape": (64, 128), "box": (8, 128), "strides": (112, 1)}, "multiples of 32"),
        ({"data_type": 14, "shape": (64, 128), "box": (8, 128), "swizzle": 2}, "none or of 128"),
        ({"shape": (), "strides": (), "box": ()}, "1 to 5"),
        ({"shape": (2,) * 6, "strides": (128,) * 6, "box": (2,) * 6}, "1 to 5"),
        ({"shape": (0, 64)}, "globalDim[1]"),
        ({"shape": (2**32 + 1, 64)}, "globalDim[1]"),
        ({"strides": (120, 2)}, "globalStrides[0]"),
        ({"strides": (2**40, 2)}, "globalStrides[0]"),
        ({"box": (0, 64)}, "boxDim[1]"),
        ({"box": (257, 64)}, "boxDim[1]"),
        ({"box": (8, 60)}, "multiple of 16"),
        ({"box": (8, 72)}, "swizzle's 128"),
        ({"swizzle": 2}, "swizzle's 64"),
        ({"swizzle": 1}, "swizzle's 32"),
        ({"swizzle": 4, "box": (8, 72)}, "swizzle's 128"),
        ({"swizzle": 5}, "flips 8 bytes"),
        ({"swizzle": 6}, "64-byte atoms"),
        ({"swizzle": 7}, "CUtensorMapSwizzle"),
        ({"fill": 2}, "CUtensorMapFloatOOBfill"),
        ({"fill": 1, "data_type": 1}, "floating-point"),
        ({"element_strides": (9, 1)}, "elementStrides[1]"),
        ({"element_strides": (0, 1)}, "elementStrides[1]"),
        ({"element_strides": (1, 0)}, "elementStrides[0]"),
        ({"element_strides": (65537, 1)}, "elementStrides[1]"),
        ({"address": 8}, "aligned to 16"),
        ({"address": 0}, "null"),
    ],
)
def test_tensor_map_limits(change, why):
    encode(address=4096, **GOOD)
    with pytest.raises(ValueError, match=re.escape(why)):
        encode(**{"address": 4096, **GOOD, **change})


@pytest.mark.parametrize(
    ("offset", "interleave", "promotion", "error", "why"),
    [(32, 0, 0, 1, "aligned to 64"), (0, 1, 0, 801, "interleaved"), (0, 2, 0, 801, "interleaved"), (0, 3, 0, 1, "Interleave"),
     (0, 0, 4, 1, "L2promotion"), (0, 0, 3, 0, "")],
)  # fmt: skip
def test_tensor_map_encode(offset, interleave, promotion, error, why):
    api, memory = core.load(), ctypes.create_string_buffer(256)
    aligned = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64 + offset
    n64, n32 = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    given = api.gpuless_tensor_map_encode_tiled(
        aligned, 6, 2, 4096, n64(64, 20), n64(128, 0), n32(64, 8), n32(1, 1), interleave, 0, promotion, 0
    )
    assert given == error and why in api.gpuless_tensor_map_error().decode()


# ---- tensormap.* ----

FIELDS = [
    ("global_address", "b64", "%a2"), ("rank", "b32", "1"), ("box_dim", "b32", "0, 32"), ("box_dim", "b32", "1, 8"),
    ("global_dim", "b32", "0, 32"), ("global_dim", "b32", "1, 6"), ("global_stride", "b64", "0, 128"),
    ("element_stride", "b32", "0, 1"), ("element_stride", "b32", "1, 1"), ("elemtype", "b32", "7"),
    ("interleave_layout", "b32", "0"), ("swizzle_mode", "b32", "3"), ("fill_mode", "b32", "1"),
]  # fmt: skip


def built_on_device(fields, after=""):
    replaced = "".join(
        f"@%p0 tensormap.replace.tile.{f}.shared::cta.b1024.{t} [%s+256], {value};\n" for f, t, value in fields
    )
    return f"""
    shl.b32 %r1, %t, 2;
    add.u32 %r1, %s, %r1;
    st.shared.b32 [%r1+256], 0;
    bar.warp.sync -1;
    setp.eq.u32 %p0, %t, 0;
    {replaced}
    bar.warp.sync -1;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%a0], [%s+256], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%a0], 128;
    {load_body(2, (2, 0), 1024, 1024)}
    {after}"""


def test_tensor_map_built_on_the_device():
    made = torch.zeros(256, dtype=torch.uint8)
    made = made[-made.data_ptr() % 64 :][:128]
    x, y = integers(6, 32), torch.zeros(256, dtype=torch.int32)
    run(built_on_device(FIELDS), made, y, x)
    expected = np.full((8, 32), 0x7FFFFFFF, np.int32)
    expected[:4] = x[2:]
    assert np.array_equal(y.numpy().view(np.uint8), in_shared_memory(expected, 1024, 128))
    for left_out in ("rank", "box_dim", "global_dim", "element_stride"):
        assert finding(built_on_device([f for f in FIELDS if f[0] != left_out]), made, y, x).kind == "illegal"


@pytest.mark.parametrize(("code", "name"), [(10, "bf16"), (9, "f64"), (8, "f32.ftz"), (6, "f16"), (2, "u32")])
def test_tensor_map_element_types(code, name):
    # By the bytes that are loaded, and by the NaNs of those that take the fill.
    size = {"bf16": 2, "f16": 2, "f64": 8}.get(name, 4)
    fields = [("elemtype", "b32", str(code)) if f[0] == "elemtype" else f for f in FIELDS]
    fields = [("box_dim", "b32", f"0, {128 // size}") if f[2] == "0, 32" and f[0] == "box_dim" else f for f in fields]
    fields = [
        ("global_dim", "b32", f"0, {128 // size}") if f[2] == "0, 32" and f[0] == "global_dim" else f for f in fields
    ]
    made = torch.zeros(256, dtype=torch.uint8)
    made = made[-made.data_ptr() % 64 :][:128]
    x, y = integers(6, 32), torch.zeros(256, dtype=torch.int32)
    if name == "u32":
        assert "floating-point" in finding(built_on_device(fields), made, y, x).message
        return
    run(built_on_device(fields), made, y, x)
    nan = {2: [0x7FFF7FFF], 4: [0x7FFFFFFF], 8: [-1, 0x7FFFFFFF]}[size]
    expected = np.tile(np.array(nan, np.int64).astype(np.int32), (8, 32 // len(nan)))
    expected[:4] = x[2:] if name != "f32.ftz" else 0  # small integers are subnormal floats
    assert np.array_equal(y.numpy().view(np.uint8), in_shared_memory(expected, 1024, 128))


def test_tensor_map_is_replaced_in_global_memory():
    x, z = integers(8, 32), integers(8, 32).flip(0).contiguous()
    y = torch.zeros(256, dtype=torch.int32)
    made = torch.zeros(256, dtype=torch.uint8)
    made = made[-made.data_ptr() % 64 :][:128]
    for space in (".global", ""):
        made.copy_(torch.frombuffer(bytearray(gpuless.tensor_map(x, (8, 32)).encode(x)), dtype=torch.uint8))
        replace = f"tensormap.replace.tile.global_address{space}.b1024.b64 [%a0], %a2;"
        run(ONE + f"@%p0 {replace}\nbar.sync 0;\n" + load_body(2, (0, 0), 1024, 1024), made, y.zero_(), z)
        assert torch.equal(y.reshape(8, 32), z)
