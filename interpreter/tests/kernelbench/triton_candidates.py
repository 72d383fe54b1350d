"""Answers to softmax_problem.py and linear_problem.py in Triton, right ones and wrong ones."""

import threading

import torch
import torch.nn as nn
import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x, y, columns, STEP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    i = tl.arange(0, BLOCK)
    largest = -float("inf")
    for begin in range(0, columns, BLOCK):
        v = tl.load(x + row + begin + i, mask=begin + i < columns, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(v, 0))
    total = 0.0
    for begin in range(0, columns, BLOCK):
        v = tl.load(x + row + begin + i, mask=begin + i < columns, other=-float("inf"))
        total += tl.sum(tl.exp(v - largest), 0)
    for begin in range(0, columns, BLOCK):
        v = tl.load(x + row + begin + i, mask=begin + i < columns)
        tl.store(y + row + begin + i, tl.exp(v - largest) / total, mask=begin + i < columns + STEP)


def softmax(x, step=0):
    y = torch.empty_like(x)
    softmax_kernel[(x.shape[0],)](x, y, x.shape[1], STEP=step, BLOCK=256)
    return y


class RightSoftmax(nn.Module):
    def forward(self, x):
        return softmax(x)


class WrongOverrun(nn.Module):
    """The last row's store writes an element too many."""

    def forward(self, x):
        return softmax(x, step=1)


class WrongZeros(nn.Module):
    """A uniform input gives elements that are nearly zero."""

    def forward(self, x):
        softmax(x)
        return torch.zeros_like(x)


class WrongReference(nn.Module):
    def forward(self, x):
        softmax(x)
        return torch.softmax(x, dim=1)


class WrongThread(nn.Module):
    """torch computes in a thread of its own."""

    def forward(self, x):
        y = softmax(x)
        thread = threading.Thread(target=lambda: y.copy_(torch.softmax(x, dim=1)))
        thread.start()
        thread.join()
        return y


class WrongRemembered(nn.Module):
    """The result of the first call with this shape."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def forward(self, x):
        if x.shape not in self.results:
            self.results[x.shape] = softmax(x)
        softmax(x)
        return self.results[x.shape].clone()


@triton.jit
def linear_kernel(x, w, b, y, m, n, k, w_row, w_column, slope, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, k, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        xs = tl.load(x + rows[:, None] * k + i, mask=(rows[:, None] < m) & (i < k), other=0.0)
        at = columns * w_row + i[:, None] * w_column
        ws = tl.load(w + at, mask=(columns < n) & (i[:, None] < k), other=0.0)
        total += tl.dot(xs, ws, input_precision="ieee")
    if BIAS:
        total += tl.load(b + columns, mask=columns < n, other=0.0)
    total = tl.where(total < 0, total * slope, total)
    tl.store(y + rows[:, None] * n + columns, total, mask=(rows[:, None] < m) & (columns < n))


class RightLinear(nn.Module):
    bias = True

    def __init__(self, in_features, out_features, negative_slope):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.slope = negative_slope

    def forward(self, x):
        return self.product(x, self.linear.weight)

    def product(self, x, w):
        y = x.new_empty(len(x), len(w))
        grid = triton.cdiv(len(x), 32), triton.cdiv(len(w), 32)
        linear_kernel[grid](
            x, w, self.linear.bias, y, *y.shape, x.shape[1], *w.stride(), self.slope, BIAS=self.bias, BLOCK=32
        )  # fmt: skip
        return y


class RightTransposed(RightLinear):
    """The weights are laid out anew at the first call, and kept."""

    turned = None

    def forward(self, x):
        if self.turned is None:
            self.turned = self.linear.weight.t().contiguous()
        return self.product(x, self.turned.t())


class WrongBias(RightLinear):
    bias = False


class WrongWeights(RightLinear):
    """Its weights are not the model's: they are drawn in another order."""

    def __init__(self, in_features, out_features, negative_slope):
        torch.randn(1)
        super().__init__(in_features, out_features, negative_slope)
