"""Activations in Triton, as csrc/device/activation.cuh has them in CUDA: fp32, the name a constant of the kernel.

The same bounds: erf is libdevice's, tl.exp is ex2.approx, and fp32 division is div.full (2 ulp). From e^-|z|, which
cannot overflow, so that -infinity times 0 is NaN, as in torch's fp64 formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def times_sigmoid(x, z):
    """x / (1 + e^-z), where z has the sign of x."""
    e = tl.exp(-tl.abs(z))
    return x * (tl.where(x < 0, e, 1.0) / (1.0 + e))


@triton.jit
def hard_swish(x):
    """x relu6(x + 3) / 6, the same operations as in C++, and so the same bits."""
    shifted = x + 3.0
    return x * (tl.where(shifted < 0, 0.0, tl.where(shifted > 6, 6.0, shifted)) * 0.1666666716337204)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of fp32 x, or that of a gate; NAME is None or one of forwardpass.activations."""
    if NAME == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif NAME == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif NAME == "hard_swish":
        x = hard_swish(x)
    elif NAME == "gelu" or NAME == "gelu_mul":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh" or NAME == "gelu_tanh_mul":
        x = times_sigmoid(x, x * (x * x * 0.07135481627260025 + 1.5957691216057308))
    elif NAME == "silu" or NAME == "silu_mul":
        x = times_sigmoid(x, x)
    else:
        tl.static_assert(NAME is None)
    return x
