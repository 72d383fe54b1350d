"""Kernels of test_triton_driver.py: small, one thing each."""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n)
    y = tl.load(y_ptr + i, i < n)
    tl.store(out_ptr + i, x + y, i < n)


@triton.jit(do_not_specialize=["least32", "most64", "least64", "all64"])
def arguments(
    out_ptr, one, sixteen, least32, most64, least64, all64, half, flag, nothing, pair, BLOCK: tl.constexpr
):  # fmt: skip
    tl.store(out_ptr + 0, one)
    tl.store(out_ptr + 1, sixteen)
    tl.store(out_ptr + 2, least32)
    tl.store(out_ptr + 3, most64)
    tl.store(out_ptr + 4, least64)
    tl.store(out_ptr + 5, all64)
    tl.store(out_ptr + 6, half)
    tl.store(out_ptr + 7, flag)
    tl.store(out_ptr + 8, nothing is None)
    tl.store(out_ptr + 9, pair[0])
    tl.store(out_ptr + 10, pair[1])
    tl.store(out_ptr + 11, BLOCK)
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, tl.zeros((16,), tl.float64), i > 11)


@triton.jit
def scale_by_half(x_ptr, factor: tl.float16, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, i < n) * factor.to(tl.float32), i < n)


@triton.jit
def scale_by_bfloat16(x_ptr, factor: tl.bfloat16, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, i < n) * factor.to(tl.float32), i < n)


@triton.jit
def shared_sum(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def sum_of_pointers(table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    b = tl.load(table_ptr + 1).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + i, tl.load(a + i, i < n) + tl.load(b + i, i < n), i < n)


@triton.jit
def copy_by_descriptor(x_desc, y_desc, BM: tl.constexpr, BN: tl.constexpr):
    at = [tl.program_id(0) * BM, tl.program_id(1) * BN]
    y_desc.store(at, x_desc.load(at))


@triton.jit
def copy_by_descriptor_made_in_the_kernel(x_ptr, y_ptr, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, [rows, columns], [columns, 1], [BM, BN])
    y_desc = tl.make_tensor_descriptor(y_ptr, [rows, columns], [columns, 1], [BM, BN])
    at = [tl.program_id(0) * BM, tl.program_id(1) * BN]
    y_desc.store(at, x_desc.load(at))
