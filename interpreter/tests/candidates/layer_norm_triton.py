"""Layer norm: `right_...` are right, `wrong_...` are what verify has to refuse."""

import torch
import triton
import triton.language as tl


@triton.jit
def normalise(
    x, weight, bias, y, strides, of_weight, of_bias, cols, eps,
    BLOCK: tl.constexpr, NAIVE: tl.constexpr, UNBIASED: tl.constexpr, BIAS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < cols
    row = tl.load(x + tl.program_id(0) * strides + i, mask=inside, other=0.0)
    mean = tl.sum(row, 0) / cols
    if NAIVE:
        variance = tl.sum(row * row, 0) / cols - mean * mean
    elif TAIL:  # the masked elements count as -mean
        variance = tl.sum((row - mean) * (row - mean), 0) / cols
    else:
        off = tl.where(inside, row - mean, 0.0)
        variance = tl.sum(off * off, 0) / (cols - 1 if UNBIASED else cols)
    result = (row - mean) / tl.sqrt(variance + eps)
    result *= tl.load(weight + i * of_weight, mask=inside, other=0.0)
    if BIAS:
        result += tl.load(bias + i * of_bias, mask=inside, other=0.0)
    tl.store(y + tl.program_id(0) * cols + i, result, mask=inside)


def _launch(x, weight, bias, eps=1e-5, naive=False, unbiased=False, with_bias=True, tail=False, block=None):
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normalise[(len(x),)](
        x, weight, bias, y, x.stride(0), weight.stride(0), bias.stride(0), x.shape[1], eps,
        BLOCK=block or triton.next_power_of_2(x.shape[1]), NAIVE=naive, UNBIASED=unbiased, BIAS=with_bias, TAIL=tail,
    )  # fmt: skip
    return y


def right_two_passes(x, weight, bias):
    return _launch(x, weight, bias)


def right_contiguous(x, weight, bias):
    return _launch(x, weight.contiguous(), bias.contiguous())


def right_larger_block(x, weight, bias):
    return _launch(x, weight, bias, block=512)


def wrong_naive_variance(x, weight, bias):
    return _launch(x, weight, bias, naive=True)


def wrong_unbiased(x, weight, bias):
    return _launch(x, weight, bias, unbiased=True)


def wrong_no_bias(x, weight, bias):
    return _launch(x, weight, bias, with_bias=False)


def wrong_swapped(x, weight, bias):
    return _launch(x, bias, weight)


def wrong_eps(x, weight, bias):
    return _launch(x, weight, bias, eps=1e-3)


def wrong_tail(x, weight, bias):
    return _launch(x, weight, bias, tail=True)


def wrong_block(x, weight, bias):
    """One block of 256 for up to 400 columns."""
    return _launch(x, weight, bias, block=256)


def wrong_in_bfloat16(x, weight, bias):
    return _launch(x.to(torch.bfloat16), weight, bias).to(torch.float32)


def wrong_weight_strides(x, weight, bias):
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normalise[(len(x),)](
        x, weight, bias, y, x.stride(0), 1, 1, x.shape[1], 1e-5, BLOCK=triton.next_power_of_2(x.shape[1]),
        NAIVE=False, UNBIASED=False, BIAS=True, TAIL=False,
    )  # fmt: skip
    return y


def wrong_written_weight(x, weight, bias):
    """Leaves the weight scaled."""
    y = _launch(x, weight, bias)
    double[(1,)](weight, len(weight), weight.stride(0), BLOCK=triton.next_power_of_2(len(weight)))
    return y


@triton.jit
def double(x, n, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i * stride, 2 * tl.load(x + i * stride, mask=i < n), mask=i < n)


def wrong_rest_is_torchs(x, weight, bias):
    """The kernel normalises, torch does the rest."""
    one, zero = torch.ones(x.shape[1], device=x.device), torch.zeros(x.shape[1], device=x.device)
    return _launch(x, one, zero) * weight + bias
