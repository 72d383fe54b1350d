"""Kernels of one warpgroup around wgmma.mma_async, and the layouts of its operands as the PTX ISA's tables have them."""

import functools

import numpy as np
import tensor_cores as tc
import torch

import gpuless

SHARED = 128 * 1024
#: bytes of the swizzle -> its code in a descriptor
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}

KERNEL = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 space[];
.visible .entry k(.param .u64 image, .param .u32 chunks, .param .u64 a_desc, .param .u64 b_desc, .param .u32 scale,
                  .param .u64 a_registers, .param .u64 d_registers)
{{
  .reg .b32 %r<16>; .reg .b64 %d<8>; .reg .pred %p, %scale; .reg .b64 %a_desc, %b_desc; .reg .b32 %base;
  .reg .b32 %a<4>; .reg .b32 %acc<128>; .reg .b32 %copy<128>;
  ld.param.u64 %d0, [image]; ld.param.u64 %a_desc, [a_desc]; ld.param.u64 %b_desc, [b_desc];
  ld.param.u32 %r1, [scale]; setp.ne.u32 %scale, %r1, 0; ld.param.u32 %r2, [chunks];
  ld.param.u64 %d1, [a_registers]; ld.param.u64 %d2, [d_registers];
  mov.u32 %r0, %tid.x; mov.u32 %base, space;
  mad.wide.u32 %d1, %r0, 4, %d1; mad.wide.u32 %d2, %r0, 4, %d2;
  mad.wide.u32 %d0, %r0, 16, %d0; mad.lo.u32 %r3, %r0, 16, %base;
  mov.u32 %r4, %r0;
IN:
  setp.ge.u32 %p, %r4, %r2; @%p bra DONE;
  ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%d0]; st.shared.v4.b32 [%r3], {{%r5, %r6, %r7, %r8}};
  add.u32 %r4, %r4, 128; add.u32 %r3, %r3, 2048; add.u64 %d0, %d0, 2048;
  bra IN;
DONE:
  {publish}
  {load}
  {body}
  {store}
  ret;
}}
"""
PUBLISH = "fence.proxy.async; bar.sync 0;"


def parts_of(op):
    """shape and types: (n, k, d, a, b)"""
    words = [w for w in op.split(".") if w != "satfinite"]
    n, k = (int(x) for x in words[4][4:].split("k"))
    return n, k, *words[5:8]


def registers_of(n, d_type):
    return n // 4 if d_type == "f16" else n // 2


def braces(name, count):
    return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"


def has_transposes(op):
    return parts_of(op)[3] in ("f16", "bf16")


def instruction(op, register_a=False, scale_a=1, scale_b=1, transpose_a=0, transpose_b=0, d="acc"):
    n, _, d_type, _, _ = parts_of(op)
    words = [
        braces(d, registers_of(n, d_type)),
        braces("a", 4) if register_a else "%a_desc",
        "%b_desc",
        "%scale",
    ]
    if d_type != "s32":
        words += [str(scale_a), str(scale_b)]
    if has_transposes(op):
        words += ([] if register_a else [str(transpose_a)]) + [str(transpose_b)]
    return f"{op} {', '.join(words)};"


def prepare(op, body, image=(), a_desc=0, b_desc=0, scale=1, a_registers=None, d_registers=None, publish=PUBLISH):
    """(module, arguments, D's registers [register][thread], which are the last argument) of a kernel whose body has the
    accumulators of `op` in %acc0 and on. Arrays are read and written in place; numbers have the parameters' sizes."""
    n, _, d_type, _, _ = parts_of(op)
    count = registers_of(n, d_type)
    load = " ".join(f"ld.global.b32 %acc{i}, [%d2 + {512 * i}];" for i in range(count))
    load += " ".join(f"ld.global.b32 %a{i}, [%d1 + {512 * i}];" for i in range(4))
    store = " ".join(f"st.global.b32 [%d2 + {512 * i}], %acc{i};" for i in range(count))
    image = np.zeros(16, np.uint8) if len(image) == 0 else image
    a = np.zeros((4, 128), np.uint32) if a_registers is None else a_registers
    d = np.zeros((count, 128), np.uint32) if d_registers is None else d_registers.copy()
    text = KERNEL.format(publish=publish, load=load, body=body, store=store)
    numbers = np.uint32(len(image) // 16), np.uint64(a_desc), np.uint64(b_desc), np.uint32(scale)
    return text, [image, *numbers, a, d], d


def launch(op, body, image=(), a_desc=0, b_desc=0, scale=1, a_registers=None, d_registers=None, publish=PUBLISH, threads=128,
           shared=SHARED, **options):  # fmt: skip
    """Runs the body; D's registers [register][thread] come back."""
    text, arguments, d = prepare(op, body, image, a_desc, b_desc, scale, a_registers, d_registers, publish)
    with gpuless.gpu("sm_90a", **options):
        gpuless.Module(text)["k"].launch(
            1, threads, [torch.from_numpy(x.view(np.uint8)) if isinstance(x, np.ndarray) else int(x) for x in arguments],
            shared=shared,
        )  # fmt: skip
    return d


# ---- where lanes hold what: ISA 9.7.15.5.1.1 ----


@functools.cache
def d_indices(n):
    """rows and columns [element][thread] of D"""
    thread, i = np.arange(128), np.arange(n // 2)[:, None]
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


def d_to_registers(matrix, d_type):
    rows, columns = d_indices(matrix.shape[1])
    elements = matrix[rows, columns]
    if d_type == "f16":
        elements = elements[0::2].astype(np.uint32) | elements[1::2].astype(np.uint32) << 16
    return np.ascontiguousarray(elements.astype(np.uint32))


def d_from_registers(registers, n, d_type):
    rows, columns = d_indices(n)
    elements = registers
    if d_type == "f16":
        elements = np.empty((n // 2, 128), np.uint16)
        elements[0::2], elements[1::2] = registers & 0xFFFF, registers >> 16
    matrix = np.zeros((64, n), elements.dtype)
    matrix[rows, columns] = elements
    return matrix


def a_to_registers(matrix, a_type):
    k = matrix.shape[1]
    warps = [tc.fragments(matrix[16 * w : 16 * w + 16], a_type, lambda g, t, i: tc.a_element(16, k, a_type, g, t, i), k // 2)
             for w in range(4)]  # fmt: skip
    return np.concatenate(warps, axis=1)


# ---- where shared memory holds what: the canonical layouts of ISA 9.7.15.5.1.2.1.3 ----


class Operand:
    """A matrix of bits [rows along M or N][K] in shared memory: `place` writes it into an image, `descriptor` says where.

    swizzle: bytes; mn_major: the rows are contiguous; wide: which of the two strides is the larger one; skip: steps of the
    instruction's K before this one in the same rows (K-major with a swizzle); pattern: where the swizzle's pattern begins.
    """

    def __init__(self, bits, swizzle=0, mn_major=False, wide=False, skip=0, pattern=0):
        self.bits, self.swizzle, self.mn_major, self.pattern = bits, swizzle, mn_major, pattern
        size = bits.itemsize
        t = 16 // size
        rows, columns = bits.shape
        tiles, row, atom = rows // 8, max(swizzle, 16), max(swizzle, 16) * 8
        chunks = row // 16
        mn, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
        if not mn_major:
            if not swizzle:
                self.leading, self.stride = (128 * tiles, 128) if wide else (128, 256)
                offset = (mn % 8 * t + k % t) * size + mn // 8 * self.stride + k // t * self.leading
            else:
                self.leading, self.stride = 16, atom * (2 if wide else 1)
                offset = mn % 8 * row + mn // 8 * self.stride + (k + skip * columns) * size
        elif not swizzle:
            self.leading, self.stride = (128 * tiles, 128) if wide else (128, 256)
            offset = (mn % t + k % 8 * t) * size + mn // t * self.stride + k // 8 * self.leading
        else:
            across = -(-tiles // chunks)
            self.leading, self.stride = (2 * atom, atom) if wide else (atom, atom * across)
            offset = (mn % t) * size + mn // t % chunks * 16 + mn // (t * chunks) * self.leading
            offset = offset + k % 8 * row + k // 8 * self.stride
        self.start = pattern + int(offset[0, 0])
        self.offset = pattern + (offset ^ ((offset >> 7) % chunks << 4) if swizzle else offset)
        self.end = int(self.offset.max()) + size

    def place(self, image):
        for byte in range(self.bits.itemsize):
            image[self.offset + byte] = self.bits >> (8 * byte) & 0xFF

    def taken_from(self, image):
        bits = np.zeros(self.bits.shape, self.bits.dtype)
        for byte in range(bits.itemsize):
            bits |= image[self.offset + byte].astype(bits.dtype) << np.array(8 * byte, bits.dtype)
        return bits

    def descriptor(self):
        encode = [(x & 0x3FFFF) >> 4 for x in (self.start, self.leading, self.stride)]
        base = self.pattern >> 7 & 7 if self.swizzle and self.pattern % (self.swizzle * 8) else 0
        return encode[0] | encode[1] << 16 | encode[2] << 32 | base << 49 | SWIZZLES[self.swizzle] << 62
