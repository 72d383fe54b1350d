"""ldmatrix, stmatrix and movmatrix against indexing in numpy."""

import numpy as np
import pytest
import torch
from rows import row, run, seed_of, spellings

import gpuless

pytestmark = pytest.mark.interpreted

LOAD = "ldmatrix.sync.aligned.m8n8?.x1|x2|x4.trans?.m8n8?.shared|shared::cta?.b16"
STORE = "stmatrix.sync.aligned.m8n8?.x1|x2|x4.trans?.m8n8?.shared|shared::cta?.b16"
MOVE = "movmatrix.sync.aligned.m8n8.trans.b16"
NARROW = [
    "ldmatrix.sync.aligned.m8n16|m16n16.x1|x2|x4.trans?.shared|shared::cta?.b8x16?.b6x16_p32|b4x16_p64|b8",
    "stmatrix.sync.aligned.m16n8.x1|x2|x4.trans.shared|shared::cta?.b8",
]
BYTES = 8192

# out: 4 registers of 32 lanes. The rows' addresses come from memory, as offsets into shared memory.
KERNEL = """.version 8.7
.target {arch}
.address_size 64
.visible .entry k(.param .u64 image, .param .u64 rows, .param .u64 registers)
{{
  .shared .align 16 .b8 space[{bytes}];
  .reg .b32 %r<16>; .reg .b64 %d<8>; .reg .pred %p; .reg .b64 %generic; .reg .b32 %address, %base;
  ld.param.u64 %d0, [image]; ld.param.u64 %d1, [rows]; ld.param.u64 %d2, [registers];
  mov.u32 %r8, %tid.x; mov.u32 %base, space;
  mad.wide.u32 %d1, %r8, 4, %d1; mad.wide.u32 %d2, %r8, 4, %d2;
  mov.u32 %r9, 0;
IN:
  shl.b32 %r10, %r9, 7; mad.lo.s32 %r10, %r8, 4, %r10;
  cvt.u64.u32 %d3, %r10; add.u64 %d4, %d0, %d3; add.u32 %r11, %base, %r10;
  ld.global.b32 %r12, [%d4]; st.shared.b32 [%r11], %r12;
  add.u32 %r9, %r9, 1; setp.lt.u32 %p, %r9, {rounds}; @%p bra IN;
  bar.warp.sync 0xffffffff;
  ld.global.b32 %address, [%d1]; add.u32 %address, %address, %base;
  cvt.u64.u32 %generic, %address; cvta.shared.u64 %generic, %generic;
  {load}
  {body}
  {store}
  bar.warp.sync 0xffffffff;
  mov.u32 %r9, 0;
OUT:
  shl.b32 %r10, %r9, 7; mad.lo.s32 %r10, %r8, 4, %r10;
  cvt.u64.u32 %d3, %r10; add.u64 %d4, %d0, %d3; add.u32 %r11, %base, %r10;
  ld.shared.b32 %r12, [%r11]; st.global.b32 [%d4], %r12;
  add.u32 %r9, %r9, 1; setp.lt.u32 %p, %r9, {rounds}; @%p bra OUT;
  ret;
}}
"""


def launch(body, image, rows, registers, arch="sm_90a"):
    """Runs it on an image of shared memory; the image and the registers come back."""
    load = " ".join(f"ld.global.b32 %r{i}, [%d2 + {128 * i}];" for i in range(4))
    store = " ".join(f"st.global.b32 [%d2 + {128 * i}], %r{i};" for i in range(4))
    text = KERNEL.format(arch=arch, bytes=BYTES, rounds=BYTES // 128, load=load, body=body, store=store)
    arrays = [np.ascontiguousarray(x).copy() for x in (image, rows, registers)]
    with gpuless.gpu(arch):
        gpuless.Module(text)["k"].launch(1, 32, [torch.from_numpy(x.view(np.uint8)) for x in arrays])
    return arrays[0], arrays[2]


def random_case(op):
    rng = np.random.default_rng(seed_of(op))
    image = rng.integers(0, 1 << 16, BYTES // 2, dtype=np.uint16)
    rows = rng.permutation(BYTES // 16)[:32].astype(np.uint32) * 16
    registers = rng.integers(0, 1 << 32, (4, 32), dtype=np.uint32)
    return image, rows, registers


def address_of(op):
    return "[%address]" if "shared" in op else "[%generic]"


def once_shaped(pattern):
    return [op for op in spellings(pattern) if op.count("m8n8") == 1]


def lane_halves(matrix):
    """What each lane holds of an 8x8 matrix: elements 2 (lane % 4) and the next of row lane / 4."""
    return np.array([matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2] for lane in range(32)])


@row(LOAD)
@pytest.mark.parametrize("op", once_shaped(LOAD))
def test_ldmatrix(op):
    count = int(op.split(".x")[1][0])
    image, rows, registers = random_case(op)
    names = ", ".join(f"%r{i}" for i in range(count))
    after, got = launch(f"{op} {{{names}}}, {address_of(op)};", image, rows, registers)
    expected = registers.copy()
    for n in range(count):
        matrix = np.stack([image[rows[8 * n + r] // 2 :][:8] for r in range(8)])
        expected[n] = lane_halves(matrix.T if "trans" in op else matrix).copy().view(np.uint32).ravel()
    assert np.array_equal(got, expected) and np.array_equal(after, image)


@row(STORE)
@pytest.mark.parametrize("op", once_shaped(STORE))
def test_stmatrix(op):
    count = int(op.split(".x")[1][0])
    image, rows, registers = random_case(op)
    names = ", ".join(f"%r{i}" for i in range(count))
    after, got = launch(f"{op} {address_of(op)}, {{{names}}};", image, rows, registers)
    expected = image.copy()
    for n in range(count):
        halves = registers[n].copy().view(np.uint16).reshape(32, 2)
        matrix = np.zeros((8, 8), np.uint16)
        for lane in range(32):
            matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2] = halves[lane]
        for r in range(8):
            expected[rows[8 * n + r] // 2 :][:8] = (matrix.T if "trans" in op else matrix)[r]
    assert np.array_equal(after, expected) and np.array_equal(got, registers)


@row(MOVE)
def test_movmatrix():
    a = np.random.default_rng(0).integers(0, 1 << 32, 64, dtype=np.uint32)
    got = run(f"{MOVE} %d, %a;", {"a": a}, {"d": np.uint32})["d"]
    for warp in range(2):
        halves = a[32 * warp :][:32].copy().view(np.uint16).reshape(32, 2)
        matrix = np.zeros((8, 8), np.uint16)
        for lane in range(32):
            matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2] = halves[lane]
        assert np.array_equal(got[32 * warp :][:32].view(np.uint16).reshape(32, 2), lane_halves(matrix.T))


def finding(body, arch="sm_90a", rows=None):
    image, own, registers = random_case("finding")
    with pytest.raises(gpuless.Finding) as found:
        launch(body, image, own if rows is None else rows, registers, arch)
    return found.value


LOAD_4 = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%address];"


@row(*NARROW)
def test_refused():
    for op in "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8", "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8":
        error = finding(f"{op} {{%r0, %r1}}, [%address];")
        assert error.kind == "unsupported" and "sm_100" in error.message
    error = finding("ldmatrix.sync.aligned.x1.shared.b16 {%r0}, [%address];")
    assert error.kind == "unsupported" and ".m8n8 once" in error.message
    error = finding("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%address], {%r0};", arch="sm_80")
    assert error.kind == "unsupported" and "sm_90" in error.message
    error = finding("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%address];")
    assert error.kind == "unsupported" and "has 1 registers" in error.message


def test_addresses_are_checked():
    rows = np.arange(32, dtype=np.uint32) * 16
    rows[5] += 8
    error = finding(LOAD_4, rows=rows)
    assert error.kind == "misaligned" and error.lane == 5
    rows[5] = BYTES
    error = finding(LOAD_4, rows=rows)
    assert error.kind == "out_of_bounds" and error.lane == 5
    error = finding("ldmatrix.sync.aligned.m8n8.x1.b16 {%r0}, [%d0];")
    assert error.kind == "illegal" and "shared" in error.message
    # the rows that .x1 does not use are not looked at
    rows[8:] = 3
    rows[5] = 16
    image, _, registers = random_case("few")
    launch("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%address];", image, rows, registers)


RACE = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k()
{{
  .shared .align 16 .b8 space[512];
  .reg .b32 %r<8>; .reg .pred %p; .reg .b32 %address, %base;
  mov.u32 %r4, %tid.x; and.b32 %r5, %r4, 31; mov.u32 %base, space; mad.lo.u32 %address, %r5, 16, %base;
  setp.lt.u32 %p, %r4, 32;
  @%p st.shared.v4.b32 [%address], {{%r4, %r4, %r4, %r4}};
  bar.sync 0;
  @%p bra LOAD;
  {barrier}
  st.shared.b32 [%address], %r4;
  bra END;
LOAD:
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, [%address];
  {barrier}
END:
  ret;
}}
"""


def test_races_are_seen():
    # warp 1 overwrites what warp 0 loads
    for seed in range(4):
        with gpuless.gpu("sm_90a", seed=seed):
            gpuless.Module(RACE.format(barrier="bar.sync 1;"))["k"].launch(1, 64, [])
            with pytest.raises(gpuless.Finding, match="race"):
                gpuless.Module(RACE.format(barrier=""))["k"].launch(1, 64, [])
