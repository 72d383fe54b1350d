"""RMS norm in bfloat16: `right_...` are right, `wrong_...` are what verify has to refuse."""

import torch
import triton
import triton.language as tl


@triton.jit
def normalise(x, weight, y, stride, of_weight, cols, eps, BLOCK: tl.constexpr, ROOT: tl.constexpr, SUM: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * stride + i, mask=i < cols, other=0.0).to(tl.float32)
    w = tl.load(weight + i * of_weight, mask=i < cols, other=0.0).to(tl.float32)
    mean = tl.sum(row * row, 0) / (1 if SUM else cols)
    scale = tl.math.rsqrt(mean + eps) if ROOT else 1 / tl.sqrt(mean + eps)
    tl.store(y + tl.program_id(0) * cols + i, (row * scale * w).to(y.dtype.element_ty), mask=i < cols)


def _launch(x, weight, eps, root=True, total=False, block=None):
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normalise[(len(x),)](
        x, weight, y, x.shape[1], weight.stride(0), x.shape[1], eps,
        BLOCK=block or triton.next_power_of_2(x.shape[1]), ROOT=root, SUM=total,
    )  # fmt: skip
    return y


def right_rsqrt(x, weight, eps):
    return _launch(x, weight, eps)


def right_division(x, weight, eps):
    return _launch(x, weight, eps, root=False)


def right_larger_block(x, weight, eps):
    return _launch(x, weight, eps, block=512)


def wrong_sum(x, weight, eps):
    return _launch(x, weight, eps, total=True)


def wrong_no_eps(x, weight, eps):
    return _launch(x, weight, 0.0)
