"""mma.sync of sm_120a on elements of 4 and 6 bits, and with scales of blocks along K, against numpy."""

import itertools

import numpy as np
import pytest
import tensor_cores as tc
import torch
from rows import row, spellings
from tensor_memory_kernels import values_of

import gpuless

pytestmark = pytest.mark.interpreted

ELEMENTS = "e4m3|e5m2|e2m3|e3m2|e2m1"
CLOSE = "e2m1.e2m1.f32"
PLAIN = [f"mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.{ELEMENTS}.{ELEMENTS}.f32",
         f"mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32.{ELEMENTS}.{ELEMENTS}.f32"]  # fmt: skip
SCALED = "kind::mxf8f6f4.block_scale.scale_vec::1X?"
BYTES = [f"mma.sync.aligned.m16n8k32.row.col.{SCALED}.f32.{ELEMENTS}.{ELEMENTS}.f32.ue8m0",
         f"mma.sync.aligned.{SCALED}.m16n8k32.row.col.f32.{ELEMENTS}.{ELEMENTS}.f32.ue8m0"]  # fmt: skip
NIBBLES = [
    f"mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X?.f32.{CLOSE}.ue8m0",
    f"mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X?.m16n8k64.row.col.f32.{CLOSE}.ue8m0",
    f"mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.{CLOSE}.ue8m0",
    f"mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::2X.m16n8k64.row.col.f32.{CLOSE}.ue8m0",
    f"mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.{CLOSE}.ue4m3|ue8m0",
    f"mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.{CLOSE}.ue4m3|ue8m0",
]

TEXT = """.version 8.7
.target {target}
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out)
.reqntid 32
{{
.reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %d<4>; .reg .b16 %h<4>;
ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out]; mov.u32 %r15, %tid.x;
mad.wide.u32 %d0, %r15, 4, %d0; mad.wide.u32 %d1, %r15, 4, %d1;
{load}
mov.b16 %h0, {ids[0]}; mov.b16 %h1, {ids[1]};
{op} {{%f0, %f1, %f2, %f3}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%f4, %f5, %f6, %f7}}{scales};
{store}
ret;
}}
"""


def launch(op, registers, ids=(0, 0, 0, 0), scaled=True, target="sm_120a"):
    """D's registers from those of A, B, C and of both scales, [register][lane]."""
    load = "".join(f"ld.global.b32 %r{n}, [%d0+{128 * n}];" for n in range(6))
    load += "".join(f"ld.global.f32 %f{4 + n}, [%d0+{128 * (6 + n)}];" for n in range(4))
    load += "".join(f"ld.global.b32 %r{6 + n}, [%d0+{128 * (10 + n)}];" for n in range(2))
    scales = f", {{%r6}}, {{%h0, %h1}}, %r7, {{{ids[2]}, {ids[3]}}}" if scaled else ""
    store = "".join(f"st.global.f32 [%d1+{128 * n}], %f{n};" for n in range(4))
    out = np.zeros((4, 32), np.uint32)
    with gpuless.gpu("sm_120") as device:
        gpuless.Module(TEXT.format(target=target, load=load, ids=ids, op=op, scales=scales, store=store))["k"].launch(
            1, 32, [torch.from_numpy(x.view(np.uint8)) for x in (registers, out)]
        )
    assert device.findings == []
    return out


def fragments(codes, types, k):
    """A [16][k] and B [8][k] as registers: rows of 16 bytes, four lanes to a row (ISA 9.7.14.5.8 to 9.7.14.5.10)."""
    out = []
    for x, t in zip(codes, types):
        data = x[:, ::2] | x[:, 1::2] << 4 if k == 64 else x << 2 if t == "e2m1" else x
        words = np.ascontiguousarray(data.astype(np.uint8)).view(np.uint32)  # [rows][8]
        halves = [words[:, 4 * h : 4 * h + 4] for h in range(2)]
        for half in halves:
            out += [half[r : r + 8].reshape(32) for r in range(0, len(x), 8)]
    return out


def check(op, types, k, block, scale, rng, ids=(0, 0, 0, 0)):
    codes = []
    for r, t in zip((16, 8), types):
        width = {"e2m1": 4, "e2m3": 6, "e3m2": 6}.get(t)
        codes.append(
            rng.integers(0, 1 << width, (r, k)) if width else tc.encode(tc.random_matrix(rng, (r, k), t, True), t)
        )
    c = rng.integers(-8, 9, (16, 8)).astype(np.float32)
    lane = np.arange(32)
    c_registers = [c[lane // 4 + 8 * (n // 2), lane % 4 * 2 + n % 2].view(np.uint32) for n in range(4)]
    blocks = k // block if block else 1
    low, high = (122, 133) if scale == "ue8m0" else (0x28, 0x50)
    scales = [rng.integers(low, high, (r, blocks)) for r in (16, 8)]
    holders = rng.integers(0, 1 << 32, (2, 32), dtype=np.uint32)  # what is not asked for must not matter
    byte_a, thread_a, byte_b, thread_b = ids
    for g in range(8):
        for n in range(blocks):
            for holder, at, byte, value in ((0, g * 4 + 2 * thread_a, byte_a, scales[0][g, n]),
                                            (0, g * 4 + 2 * thread_a + 1, byte_a, scales[0][g + 8, n]),
                                            (1, g * 4 + thread_b, byte_b, scales[1][g, n])):  # fmt: skip
                shift = 8 * (byte + n)
                holders[holder, at] = holders[holder, at] & ~np.uint32(0xFF << shift) | np.uint32(int(value) << shift)
    registers = np.stack([x.view(np.uint32) for x in (*fragments(codes, types, k), *c_registers, *holders)])
    got = launch(op, registers, ids, bool(block)).view(np.float32)
    x, y = (values_of(code, t) for code, t in zip(codes, types))
    if block:
        number = (
            (lambda b: np.exp2(b - 127.0)) if scale == "ue8m0" else (lambda b: tc.decode(b.astype(np.uint8), "e4m3"))
        )
        x, y = (v * np.repeat(number(s), block, 1) for v, s in zip((x, y), scales))
    expected = x @ y.T + c
    bound = 2.0**-20 * (np.abs(x) @ np.abs(y.T) + np.abs(c))
    result = np.stack([got[n] for n in range(4)])
    places = [(lane // 4 + 8 * (n // 2), lane % 4 * 2 + n % 2) for n in range(4)]
    for n, (r, col) in enumerate(places):
        assert (np.abs(result[n] - expected[r, col]) <= bound[r, col]).all()


ALL = ELEMENTS.split("|")


@row(*PLAIN, *BYTES)
@pytest.mark.parametrize("types", list(itertools.product(ALL, ALL)), ids="-".join)
def test_elements_in_bytes(types):
    rng = np.random.default_rng(ALL.index(types[0]) * 5 + ALL.index(types[1]))
    a, b = types
    check(f"mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.{a}.{b}.f32", types, 32, 0, "ue8m0", rng)
    check(f"mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32.{a}.{b}.f32", types, 32, 0, "ue8m0", rng)
    for vec, ids in (("", (0, 0, 0, 0)), (".scale_vec::1X", (3, 1, 2, 3)), (".scale_vec::1X", (1, 0, 3, 2))):
        check(f"mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale{vec}.f32.{a}.{b}.f32.ue8m0", types, 32, 32,
              "ue8m0", rng, ids)  # fmt: skip
        check(f"mma.sync.aligned.kind::mxf8f6f4.block_scale{vec}.m16n8k32.row.col.f32.{a}.{b}.f32.ue8m0", types, 32, 32,
              "ue8m0", rng, ids)  # fmt: skip


@row(*NIBBLES)
@pytest.mark.parametrize("pattern", NIBBLES)
def test_elements_of_4_bits(pattern):
    rng = np.random.default_rng(0)
    for op in spellings(pattern):
        block, scale = (16 if "4X" in op else 32), op.rpartition(".")[2]
        for ids in [(0, 0, 0, 0), (0, 1, 0, 3)] if block == 16 else [(2, 1, 0, 1), (0, 0, 2, 2)]:
            check(op, ("e2m1", "e2m1"), 64, block, scale, rng, ids)


def test_what_is_wrong():
    op = f"mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.{CLOSE}.ue8m0"
    registers = np.zeros((12, 32), np.uint32)
    for ids in ((1, 0, 0, 0), (4, 0, 0, 0), (0, 2, 0, 0), (0, 0, 0, 4)):
        with pytest.raises(gpuless.Finding, match="byte-id is a multiple of their number"):
            launch(op, registers, ids)
    with pytest.raises(gpuless.Finding, match="needs sm_120a, and this PTX is for sm_120"):
        launch(op, registers, target="sm_120")
