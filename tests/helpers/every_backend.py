"""What tests of an operation on every backend run, where all give the same bits."""

import pytest

import forwardpass as fp
from forwardpass.testing import poisoned_outputs


def on_cuda(cases, architectures=("sm_90a", "sm_80", "sm_89", "sm_120")):
    """(case, arch): each case on one architecture, in turn; the slow tests have the others."""
    return [
        pytest.param(case, arch, marks=[pytest.mark.slow] * (i % 4 != j), id=f"{arch} {case}")
        for i, case in enumerate(cases)
        for j, arch in enumerate(architectures)
    ]


def in_triton(cases):
    """One case of four; the slow tests have the others."""
    return [pytest.param(c, marks=[pytest.mark.slow] * (i % 4 > 0)) for i, c in enumerate(cases)]


def interpreted(operation, args, backend, arch, seed):
    """The result, of a run without a finding."""
    with poisoned_outputs(), fp.use_backend(backend), fp.interpret(arch, seed=seed, guard=True) as device:
        result = operation(*args)
    assert device.findings == []
    return result
