"""Witnesses that no one here wrote: the PTX of Triton's compiler gives the right answers, without a false alarm.

Plain launches on CPU tensors. One seed of the schedule in `make test`, 20 in `make test-all`. Shapes are shared, as
compiling a specialisation costs more than running it.
"""

import importlib.util

import pytest
import torch
from witness_cases import CASES

import gpuless

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.fixture(scope="module")
def kernels():
    import witness_kernels

    return witness_kernels


SEEDS = [pytest.param([0], id="0"), pytest.param(range(1, 20), id="1-19", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(
    ("name", "architecture"), [(name, a) for name, (_, supported) in CASES.items() for a in supported]
)
def test_witness(kernels, name, architecture, seeds):
    for seed in seeds:
        with gpuless.gpu(architecture, seed=seed):
            CASES[name][0](kernels, torch.Generator().manual_seed(seed))
