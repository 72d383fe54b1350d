"""w8a16_gemm on the CPU, against fp64."""

import pytest
import torch
from rotation import in_parts, whole

from forwardpass import dispatch
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.w8a16_gemm import cases
from forwardpass.testing import poisoned_outputs

CASES = list(cases.cases())


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu_against_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = torch.ops.forwardpass.w8a16_gemm_cpu(*args)
    cases.assert_matches(got, args)


def test_e4m3_weights_are_exact():
    """Every value, in few rows and in many; a NaN spoils its own column of the output."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3)
    finite, eye, one = values[~values.float().isnan()].repeat(19, 1), torch.eye(254), torch.ones(1)
    for x in (eye[:1], eye[100:104], eye[3:18], eye):
        y = torch.ops.forwardpass.w8a16_gemm_cpu(x, finite, one, None, None)
        assert torch.equal(y, x @ finite.float().t())
        for nan in (0x7F, 0xFF):
            w = finite.clone()
            w[7, 200] = values[nan]
            y = torch.ops.forwardpass.w8a16_gemm_cpu(x, w, one, None, None)
            assert y.isnan().any(0).nonzero().tolist() == [[7]] and bool(y[:, 7].isnan().all())


def test_gpus_take_16_bit_activations(monkeypatch):
    monkeypatch.setitem(dispatch.devices.WHY_NOT, "cuda", lambda device: None)
    gpu = torch.device("cuda", 0)
    assert dispatch.only_reference_on("w8a16_gemm", gpu, torch.float32)
    assert not dispatch.only_reference_on("w8a16_gemm", gpu, torch.bfloat16)
    assert not dispatch.only_reference_on("int8_linear", gpu, torch.float32)


# opcheck compares its inputs, and torch cannot compare e4m3
@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts([c for c in CASES if c.w_dtype == torch.int8][::7], 4))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.w8a16_gemm_cpu.default, case.arguments())
