"""w8a16_gemm on the CPU, against fp64."""

import pytest
import torch

from forwardpass import dispatch
from forwardpass.ops.w8a16_gemm import cases
from forwardpass.testing import poisoned_outputs

CASES = list(cases.cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_against_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = torch.ops.forwardpass.w8a16_gemm_cpu(*args)
    cases.assert_matches(got, args)


def test_gpus_take_16_bit_activations(monkeypatch):
    monkeypatch.setitem(dispatch.devices.WHY_NOT, "cuda", lambda device: None)
    gpu = torch.device("cuda", 0)
    assert dispatch.only_reference_on("w8a16_gemm", gpu, torch.float32)
    assert not dispatch.only_reference_on("w8a16_gemm", gpu, torch.bfloat16)
    assert not dispatch.only_reference_on("int8_linear", gpu, torch.float32)


def test_opcheck():
    for case in [c for c in CASES if c.w_dtype == torch.int8][
        ::7
    ]:  # opcheck compares its inputs, and torch cannot compare e4m3
        torch.library.opcheck(torch.ops.forwardpass.w8a16_gemm_cpu.default, case.arguments())
