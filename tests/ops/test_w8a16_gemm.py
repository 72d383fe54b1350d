"""w8a16_gemm on the CPU, against fp64."""

import subprocess
import sys

import pytest
import torch
from processes import two_threads
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


# Every number of rows by which tiles differ, beside what is left of columns and of K.
_FEW_ROWS = """
import itertools
import torch
from forwardpass.common import environment
from forwardpass.ops.w8a16_gemm.cases import E4M3, Case, assert_matches
from forwardpass.testing import poisoned_outputs

sizes = itertools.cycle(itertools.product((1, 3, 4, 17, 38, 130), (1, 7, 16, 63, 64, 65, 130, 257, 515, 576)))
x_dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
layouts = itertools.cycle(("contiguous", "apart", "aligned", "shifted"))
activations = itertools.cycle((None, None, None, "gelu", "relu"))
for m, w_dtype, scales in itertools.product((*range(1, 18), 48, 49), (torch.int8, E4M3), ("column", "tensor", "block")):
    n, k = next(sizes)
    case = Case((m,), n, k, next(x_dtypes), w_dtype, scales, m % 2 == 0, next(activations), next(layouts))
    args = case.arguments(seed=m)
    with poisoned_outputs():
        got = torch.ops.forwardpass.w8a16_gemm_cpu(*args)
    try:
        assert_matches(got, args)
    except AssertionError as e:
        raise AssertionError(case) from e
print(environment.cpu_tier())
"""


@pytest.mark.parametrize("tier", torch.ops.forwardpass._cpu_tiers().split(","))
def test_few_rows_on_every_tier(tier):
    run = subprocess.run([sys.executable, "-c", _FEW_ROWS], capture_output=True, text=True,
                         env=two_threads({"FORWARDPASS_CPU": tier}))  # fmt: skip
    assert run.stdout.strip() == tier, run.stderr


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
@pytest.mark.parametrize("case", in_parts([c for c in CASES if c.w_dtype == torch.int8][::7], 4))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.w8a16_gemm_cpu.default, case.arguments())
