import torch

SIZES = {"n": (1, 900)}
WITHOUT = {"offset": "the caller aligns it"}


def inputs(n):
    return torch.randint(0, 16, (n,), dtype=torch.int32)


def reference(x):
    return torch.bincount(x, minlength=16).to(torch.int32)
