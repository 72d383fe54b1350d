"""What the tests of fp.Pipeline share: small models and functions, and that no thread stays."""

import gc
import threading

import pytest
import torch
from torch import nn

TIMEOUT = 20.0  # of what would otherwise hang: a deadlock fails a test, and a slow machine does not


class Double(nn.Module):
    """Doubles; remembers what it was called with, and refuses negative values."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.batches = []

    def forward(self, x):
        if (x < 0).any():
            raise ArithmeticError("negative")
        self.batches.append(x.tolist())
        return self.weight * x


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    gc.collect()
    threads = [t for t in threading.enumerate() if t not in before and t.name.startswith("forwardpass")]
    for t in threads:
        t.join(TIMEOUT)
    assert not [t for t in threads if t.is_alive()]


def number(i):
    return torch.tensor([float(i)])


def ours():
    return [t for t in threading.enumerate() if t.name.startswith("forwardpass")]


def fails_at(stage):
    def preprocess(i):
        if i == 2 and stage == "preprocess":
            raise KeyError("lost")
        return number(-1 if i == 2 and stage == "forward" else i)

    def postprocess(x):
        if x.item() == 4.0 and stage == "postprocess":
            raise OSError("full")
        return x.item()

    return preprocess, postprocess


class Held:
    """A forward that waits at its first batch until it is let go."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, model, x):
        self.begun.set()
        assert self.go.wait(TIMEOUT)
        return model(x)
