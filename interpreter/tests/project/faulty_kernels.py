"""Tests of a project whose kernels have faults that a GPU would not tell: test_pytest_gpu.py runs them with --gpu."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def unmasked_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i), mask=i < n)


@triton.jit
def shift_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i - 1, mask=(i > 0) & (i < n), other=0.0), mask=i < n)


@triton.jit
def shift_left_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + 1, mask=i + 1 < n, other=0.0), mask=i < n)


def unmasked(n):
    x = torch.randn(n, device="cuda")
    out = torch.empty_like(x)
    unmasked_kernel[(triton.cdiv(n, 128),)](x, out, n, BLOCK=128)
    assert torch.equal(out, x)


def shift(in_place):
    x = torch.ones(500, device="cuda")
    out = x if in_place else torch.empty_like(x)
    shift_kernel[(4,)](x, out, 500, BLOCK=128)
    return out.sum().item()


def test_whole_blocks():
    unmasked(256)


def test_unmasked():
    unmasked(300)


def test_caught():
    with contextlib.suppress(Exception):  # the project's own mistake does not hide the finding
        unmasked(300)


@pytest.mark.gpu_expects("out_of_bounds", kernel="unmasked_", reason="reported upstream")
def test_expected():
    unmasked(300)


@pytest.mark.gpu_expects("out_of_bounds", kernel="unmasked_", reason="reported upstream")
def test_expected_compiled():
    def function(x):
        out = torch.empty_like(x)
        unmasked_kernel[(triton.cdiv(300, 128),)](x, out, 300, BLOCK=128)
        return out

    torch.compile(function, fullgraph=True)(torch.randn(300, device="cuda") + 1)


@pytest.mark.gpu_expects("out_of_bounds", kernel="unmasked_", reason="reported upstream")
def test_expected_replayed():
    x, graph = torch.randn(300, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unmasked_kernel[(triton.cdiv(300, 128),)](x, torch.empty_like(x), 300, BLOCK=128)
    graph.replay()


@pytest.mark.gpu_ignores("out_of_bounds", reason="reported upstream")
def test_ignored():
    unmasked(300)


@pytest.mark.gpu_expects("race", reason="gone since")
def test_expected_in_vain():
    unmasked(256)


def test_race():
    shift(in_place=True)


def test_overwritten():
    """A block overwrites what the one before it has yet to read: which shows where blocks do not begin in order."""
    x = torch.ones(500, device="cuda")
    shift_left_kernel[(4,)](x, x, 500, BLOCK=128)


@pytest.mark.gpu_expects("race", reason="of one schedule alone")
def test_overwritten_as_expected():
    test_overwritten()


def test_of_the_first_schedule_alone(gpu_seed):
    if gpu_seed == 0:
        unmasked(300)
    else:
        unmasked(256)


def test_mended_race():
    assert shift(in_place=False) == 499


def test_without_the_gpu():
    assert torch.ones(1).item() == 1


def test_long():
    x = torch.ones(1 << 26, device="cuda")
    unmasked_kernel[(1 << 19,)](x, x, 1 << 26, BLOCK=128)
