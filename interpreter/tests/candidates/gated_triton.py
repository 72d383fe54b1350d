"""relu(x) * y: `right_...` are right, `wrong_...` are what verify has to refuse."""

import torch
import triton
import triton.language as tl


@triton.jit
def flat(x, y, z, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n)
    else:
        a, b = tl.load(x + i), tl.load(y + i)
    tl.store(z + i, tl.where(a < 0, 0.0, a) * b, mask=i < n)


@triton.jit
def loses_nan(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n)
    tl.store(z + i, tl.maximum(a, 0.0) * b, mask=i < n)


@triton.jit
def strided(x, y, z, cols, xr, xc, yr, yc, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    for first in range(0, cols, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = tl.load(x + row * xr + i * xc, mask=i < cols)
        b = tl.load(y + row * yr + i * yc, mask=i < cols)
        tl.store(z + row * cols + i, tl.where(a < 0, 0.0, a) * b, mask=i < cols)


@triton.jit
def by_programs(x, y, z, n, BLOCK: tl.constexpr):
    for first in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n)
        tl.store(z + i, tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL) * b, mask=i < n)


def _flat(x, y, kernel=flat, count=None, blocks=0, **constants):
    x, y = x.contiguous(), y.contiguous()
    z = torch.empty_like(x)
    n = x.numel() if count is None else count(x.numel())
    kernel[(blocks or triton.cdiv(x.numel(), 128),)](x, y, z, n, BLOCK=128, **constants)
    return z


def right_flat(x, y):
    return _flat(x, y, MASKED=True)


def right_by_programs(x, y):
    return _flat(x, y, by_programs, blocks=3)


def right_strided(x, y):
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strided[(len(x),)](x, y, z, x.shape[1], *x.stride(), *y.stride(), BLOCK=64)
    return z


def right_in_two_halves(x, y):
    """Both launches write into one output."""
    x, y = x.contiguous(), y.contiguous()
    z = torch.empty_like(x)
    half = len(x) // 2
    for a, b, c in ((x[:half], y[:half], z[:half]), (x[half:], y[half:], z[half:])):
        if a.numel():
            flat[(triton.cdiv(a.numel(), 128),)](a, b, c, a.numel(), BLOCK=128, MASKED=True)
    return z


def wrong_loses_nan(x, y):
    return _flat(x, y, loses_nan)


def wrong_unmasked(x, y):
    return _flat(x, y, MASKED=False)


def wrong_last_element(x, y):
    return _flat(x, y, count=lambda n: n - 1, MASKED=True)


def wrong_one_block(x, y):
    return _flat(x, y, blocks=1, MASKED=True)


def wrong_first_half_again(x, y):
    return torch.cat([right_flat(x, y)[: len(x) // 2]] * 2 + [right_flat(x, y)[-1:]])[: len(x)].contiguous()
