"""w8a16_gemm on the CPU, against fp64."""

import pytest
import torch

from forwardpass.activations import element_bound, is_gated, separate_gate_up
from forwardpass.testing import assert_close, poisoned_outputs
from forwardpass.w8a16_gemm import cases, reference

CASES = list(cases.cases())
ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_against_reference(case, seed):
    x, w, w_scale, bias, activation = case.arguments(seed=seed)
    with poisoned_outputs():
        got = torch.ops.forwardpass.w8a16_gemm_cpu(x, w, w_scale, bias, activation)
    assert got.dtype == x.dtype
    y = reference.w8a16_gemm(x.double(), w, w_scale, bias, None)
    exact = reference.w8a16_gemm(x.double(), w, w_scale, bias, activation)
    # an fp32 sum of K products in any order is within K 2^-24 of the sum of their magnitudes, and 3 more roundings follow
    weight = reference.dequantize_weight(w, w_scale)
    size = x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.abs())
    error = size * (case.k + 4) * 2.0**-24
    gate, up = separate_gate_up(y, -1) if is_gated(activation) else (y, None)
    errors = separate_gate_up(error, -1) if is_gated(activation) else (error, 0.0)
    bound = element_bound(activation, gate, up, *errors)
    least = {torch.float16: 2.0**-25}.get(x.dtype, 0.0)
    assert_close(got, exact, bound * (1 + ULP[x.dtype]) + ULP[x.dtype] * exact.abs() + least)


def test_opcheck():
    for case in [c for c in CASES if c.w_dtype == torch.int8][
        ::7
    ]:  # opcheck compares its inputs, and torch cannot compare e4m3
        torch.library.opcheck(torch.ops.forwardpass.w8a16_gemm_cpu.default, case.arguments())
