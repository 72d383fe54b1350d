import torch

SIZES = {"rows": (1, 9), "cols": (1, 300)}


def inputs(rows, cols):
    return torch.randn(rows, cols)


def reference(x):
    return torch.softmax(x, -1)
