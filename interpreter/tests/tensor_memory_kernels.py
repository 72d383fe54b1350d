"""Kernels of one CTA, or a pair, around tensor memory: what is loaded into shared and tensor memory, a body, and the cells
that it leaves."""

import numpy as np
import tensor_cores as tc
import torch

import gpuless

SHARED = 160 * 1024
LANES = 128
#: bytes of the swizzle -> its code in a descriptor of tcgen05
SWIZZLES = {0: 0, 128: 2, 64: 4, 32: 6}
VERSION = 1 << 46

KERNEL = """.version 8.7
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 space[];
.visible .entry k(.param .u64 image, .param .u32 chunks, .param .u64 cells, .param .u64 out)
.reqntid 128
{{
  .reg .b32 %r<160>; .reg .b64 %d<16>; .reg .pred %p<8>; .reg .b16 %h<4>;
  .reg .b32 %base, %bar, %tm, %mine, %lane, %t, %rank; .reg .pred %one, %lead;
  ld.param.u64 %d0, [image]; ld.param.u32 %r2, [chunks]; ld.param.u64 %d1, [cells]; ld.param.u64 %d2, [out];
  mov.u32 %t, %tid.x; mov.u32 %base, space; add.u32 %bar, %base, {barrier};
  mov.u32 %rank, %cluster_ctarank;
  mul.lo.u32 %r0, %rank, %r2; mad.wide.u32 %d0, %r0, 16, %d0;
  mul.lo.u32 %r0, %rank, {columns}; mad.wide.u32 %d1, %r0, 512, %d1; mad.wide.u32 %d2, %r0, 512, %d2;
  mad.wide.u32 %d1, %t, 4, %d1; mad.wide.u32 %d2, %t, 4, %d2;
  mad.wide.u32 %d0, %t, 16, %d0; mad.lo.u32 %r3, %t, 16, %base;
  setp.eq.u32 %one, %t, 0; setp.eq.and.u32 %lead, %rank, 0, %one; setp.lt.u32 %p1, %t, 32;
  @%one mbarrier.init.shared::cta.b64 [%bar], 1;
  fence.mbarrier_init.release.cluster;
  @%p1 tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%bar+8], 512;
  @%p1 tcgen05.relinquish_alloc_permit.cta_group::{group}.sync.aligned;
  mov.u32 %r4, %t;
IN:
  setp.ge.u32 %p0, %r4, %r2; @%p0 bra DONE;
  ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%d0]; st.shared.v4.b32 [%r3], {{%r5, %r6, %r7, %r8}};
  add.u32 %r4, %r4, 128; add.u32 %r3, %r3, 2048; add.u64 %d0, %d0, 2048;
  bra IN;
DONE:
  bar.sync 0;
  ld.shared.b32 %tm, [%bar+8];
  shr.u32 %lane, %t, 5; shl.b32 %lane, %lane, 21; add.u32 %mine, %tm, %lane;
  {load}
  tcgen05.wait::st.sync.aligned;
  fence.proxy.async; {meet}
  {body}
  {store}
  {meet}
  @%p1 tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %tm, 512;
  {meet}
  ret;
}}
"""
WAIT = "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p0, [%bar], 0;\n@!%p0 bra WAIT;\ntcgen05.fence::after_thread_sync;\n"
COMMIT = "@%one tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%bar];\n" + WAIT
COMMIT_PAIR = (
    "mov.b16 %h0, 3;\n@%lead tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster"
    ".multicast::cluster.b64 [%bar], %h0;\n" + WAIT
)
MEET = {1: "bar.sync 0;", 2: "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"}


def braces(first, count):
    return "{" + ", ".join(f"%r{first + k}" for k in range(count)) + "}"


def text(body, columns, group=1):
    load = "".join(f"ld.global.b32 %r20, [%d1 + {512 * c}]; tcgen05.st.sync.aligned.32x32b.x1.b32 [%mine + {c}], {{%r20}};\n"
                   for c in range(columns))  # fmt: skip
    store = "".join(
        f"tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r20}}, [%mine + {c}]; tcgen05.wait::ld.sync.aligned;"
        f" st.global.b32 [%d2 + {512 * c}], %r20;\n"
        for c in range(columns)
    )
    fields = {"barrier": SHARED - 64, "columns": columns, "group": group, "meet": MEET[group]}
    return KERNEL.format(load=load, store=store, body=body, **fields)


def launch(body, image, cells, group=1, **options):
    """The cells [columns][lanes], of a pair [2][columns][lanes], after the body."""
    cells = np.ascontiguousarray(cells, np.uint32)
    out, image = np.zeros_like(cells), np.ascontiguousarray(image)
    args = [image, image.nbytes // group // 16, cells, out]
    with gpuless.gpu("sm_100a", **options) as device:
        gpuless.Module(text(body, cells.shape[-2], group))["k"].launch(
            group, 128, [torch.from_numpy(x.view(np.uint8)) if isinstance(x, np.ndarray) else int(x) for x in args],
            shared=SHARED, cluster=group,
        )  # fmt: skip
    assert device.findings == []
    return out


# ---- where shared memory holds what ----


class Operand:
    """Bits [rows along M or N][K] in the canonical layouts of the ISA (9.7.16.3, and as CuTe writes them), 32 bytes along K.

    swizzle: bytes; mn_major: the rows are contiguous; pairs: 128 bytes by 32 at a time, for M- or N-major tf32.
    """

    def __init__(self, bits, at=0, swizzle=0, mn_major=False, pairs=False):
        self.bits, self.start = bits, at
        size = bits.itemsize
        t = 16 // size
        rows, columns = bits.shape
        row = max(swizzle, 16)
        chunks = row // 16
        mn, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
        depth = 4 if pairs else 8
        if not mn_major and not swizzle:
            leading, stride = 128 * (rows // 8), 128
            offset = mn % 8 * 16 + mn // 8 * stride + k // t * leading + k % t * size
        elif not mn_major:
            leading, stride = 16, row * 8
            offset = mn % 8 * row + mn // 8 * stride + k * size
        elif not swizzle:
            stride, leading = 128 * (columns // 8), 128
            offset = mn % t * size + mn // t * stride + k % 8 * 16 + k // 8 * leading
        else:
            across = -(-rows // (t * chunks))
            leading, stride = row * depth, row * depth * across
            offset = (
                mn % t * size
                + mn // t % chunks * 16
                + mn // (t * chunks) * leading
                + k % depth * row
                + k // depth * stride
            )
        offset = offset + at
        if pairs:
            offset = offset ^ ((offset >> 7 & 3) << 5)
        elif swizzle:
            offset = offset ^ ((offset >> 7 & chunks - 1) << 4)
        self.offset, self.end = offset, int(offset.max()) + size
        encode = [(x & 0x3FFFF) >> 4 for x in (at, leading, stride)]
        mode = 1 if pairs else SWIZZLES[swizzle]
        self.descriptor = encode[0] | encode[1] << 16 | encode[2] << 32 | VERSION | mode << 61

    def place(self, image):
        for byte in range(self.bits.itemsize):
            image[self.offset + byte] = self.bits >> (8 * byte) & 0xFF


# ---- the instruction descriptor: ISA 9.7.16.4.2 ----

FORMATS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5, "u8": 0, "s8": 1}
RESULTS = {"f16": 0, "f32": 1, "s32": 2}


def instruction_descriptor(m, n, a, b, d, a_transposed=0, b_transposed=0, negate=0, saturate=0):
    return (RESULTS[d] << 4 | FORMATS[a] << 7 | FORMATS[b] << 10 | saturate << 3 | negate << 13 | a_transposed << 15
            | b_transposed << 16 | n // 8 << 17 | m // 16 << 24)  # fmt: skip


def scaled_descriptor(m, n, a, b, scale, a_byte=0, b_byte=0):
    return (b_byte << 4 | a << 7 | b << 10 | n // 8 << 17 | {"ue4m3": 0, "ue8m0": 1}[scale] << 23 | m // 16 << 24
            | a_byte << 29)  # fmt: skip


# ---- where tensor memory holds what: ISA 9.7.16.10.5 ----


def d_places(m, n, group=1, stationary=False):
    """CTA, lane and column of each element of D."""
    row, column = np.broadcast_arrays(np.arange(m)[:, None], np.arange(n)[None, :])
    if (
        stationary
    ):  # as CuTe's tmem_frg_ws: 32 rows have the quarters of their columns one below the other, 64 the halves
        width = n * m // 128
        return 0 * row, row + column // width * m, column % width
    cta, r = row // (m // group), row % (m // group)
    if m // group == 64 and group == 1:
        return cta, r // 16 * 32 + r % 16, column
    if m // group == 64:
        return cta, r + column // (n // 2) * 64, column % (n // 2)
    return cta, r, column


# ---- elements of 4 and 6 bits ----


def narrow_values(name):
    """The number behind each code."""
    bits, mantissa, bias = {"e2m1": (4, 1, 1), "e2m3": (6, 3, 1), "e3m2": (6, 2, 3)}[name]
    values = []
    for code in range(1 << bits):
        exponent, fraction = code >> mantissa & (1 << bits - 1 - mantissa) - 1, code & (1 << mantissa) - 1
        magnitude = (exponent > 0) + fraction / (1 << mantissa)
        values.append((-1 if code >> bits - 1 else 1) * magnitude * 2.0 ** (max(exponent, 1) - bias))
    return np.array(values)


def values_of(bits, name):
    return narrow_values(name)[bits] if name in ("e2m1", "e2m3", "e3m2") else tc.decode(bits, name)


def packed(codes, bits):
    """Codes [rows][16 k] as bytes [rows][16 k]: 16 of them close together at the beginning of 16 bytes."""
    rows, columns = codes.shape
    ones = (codes.reshape(rows, columns // 16, 16)[..., None] >> np.arange(bits) & 1).reshape(rows, columns // 16, -1)
    out = np.zeros((rows, columns // 16, 16), np.uint8)
    out[..., : 2 * bits] = np.packbits(ones.astype(np.uint8), axis=-1, bitorder="little")
    return out.reshape(rows, columns)
