"""How tensor cores of Ada and Hopper add products of e4m3, in torch."""

import torch
from torch import Tensor


def exponent(v: Tensor, least: int) -> Tensor:
    return torch.where(v == 0, -126.0, v.abs().clamp(min=1e-300).log2().floor().clamp(min=least))


def truncated(v: Tensor, unit: Tensor) -> Tensor:
    return (v / unit).trunc() * unit


def tensor_core_product(a: Tensor, b: Tensor, depth: int | None) -> Tensor:
    """a [M, K] times b [N, K] transposed as Hopper's tensor cores add, by the description of MMA-Sim (arXiv 2511.10909): 32
    products and the accumulator are cut to 13 bits below the largest exponent among them, their sum to 13 bits below its own.
    depth: every so many of K such a sum is added to one in fp32 and begins anew; None: never."""
    a, b = a.double(), b.double()
    a_exponent, b_exponent = exponent(a, -6), exponent(b, -6)
    total = torch.zeros(len(a), len(b), dtype=torch.float32)
    acc = torch.zeros_like(total, dtype=torch.float64)
    for k in range(0, a.shape[1], 32):
        span = slice(k, k + 32)
        products = a[:, None, span] * b[None, :, span]
        largest = (a_exponent[:, None, span] + b_exponent[None, :, span]).amax(-1)
        unit = torch.exp2(torch.maximum(largest, exponent(acc, -126)) - 13)
        acc = truncated(products, unit[..., None]).sum(-1) + truncated(acc, unit)
        acc = truncated(acc, torch.exp2(exponent(acc, -126) - 13))
        if depth is not None and (k + 32) % depth == 0:
            total, acc = total + acc.float(), torch.zeros_like(acc)
    return total + acc.float()
