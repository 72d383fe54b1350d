import torch

SIZES = {"rows": (1, 6), "cols": (2, 400)}


def inputs(rows, cols):
    return torch.randn(rows, cols), torch.randn(cols), torch.randn(cols)


def reference(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias
