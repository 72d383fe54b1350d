"""What the tests of loads, stores and atomics share."""

import numpy as np
import torch
from ptx import run

# slots of the table's patterns
SCOPE = "cta|cluster|gpu|sys"
STATE_SPACE = "shared|shared::cta|shared::cluster|global"

# thread t: %rd0 = a0 + t * bytes, %rd1 = a1 + t * bytes, %r0 = memory + t * bytes
PLACES = """
mul.wide.u32 %rd2, %t, {bytes};
add.u64 %rd0, %a0, %rd2;
add.u64 %rd1, %a1, %rd2;
mad.lo.u32 %r0, %t, {bytes}, %s;
"""
NUMPY = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f32": np.uint32, "f64": np.uint64,
}  # fmt: skip
# registers are at least as wide as the type
WIDTHS = [(k, w) for k, t in NUMPY.items() for w in (16, 32, 64) if np.dtype(t).itemsize * 8 <= w]
REGISTER = {16: "h", 32: "r", 64: "rd"}


def randoms(n, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())


def as_numpy(t, dtype):
    return t.numpy().view(dtype)


def run_numpy(body, *arrays, **options):
    """Runs it on copies of the arrays, which it returns."""
    tensors = [tensor(a) for a in arrays]
    run(body, *tensors, **options)
    return [as_numpy(t, a.dtype) for t, a in zip(tensors, arrays)]


def aligned(size, to=128):
    whole = torch.zeros(size + to, dtype=torch.uint8)
    return whole[-whole.data_ptr() % to :][:size]
