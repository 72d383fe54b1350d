"""What an RTX 50, a PRO 6000 or a DGX Spark runs: the portable kernels, whose machine code is made of the PTX for sm_90, and
Triton's. Some cases of every operation; the others are in `make test-all`.
"""

import itertools

import pytest

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.activation_quantize import cases as activation_quantize
from forwardpass.ops.attention import cases as attention
from forwardpass.ops.dequant_activation import cases as dequant_activation
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.fp8_grouped_gemm import cases as fp8_grouped_gemm
from forwardpass.ops.fp8_linear import cases as fp8_linear
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.int8_grouped_gemm import cases as int8_grouped_gemm
from forwardpass.ops.int8_linear import cases as int8_linear
from forwardpass.ops.norm_quantize import cases as norm_quantize
from forwardpass.ops.quantize import cases as quantize
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

MODULES = {
    "activation_quantize": activation_quantize, "attention": attention, "dequant_activation": dequant_activation,
    "fp8_gemm": fp8_gemm, "fp8_grouped_gemm": fp8_grouped_gemm, "fp8_linear": fp8_linear, "int8_gemm": int8_gemm,
    "int8_grouped_gemm": int8_grouped_gemm, "int8_linear": int8_linear,
    "norm_quantize": norm_quantize, "quantize": quantize, "w8a16_gemm": w8a16_gemm,
}  # fmt: skip


def some(name, count):
    """Cases from all over the list."""
    cases = list(MODULES[name].cases())
    return [cases[i * len(cases) // count] for i in range(count)]


def launches():
    for name, (implementation, count) in itertools.product(MODULES, (("cuda", 4), ("triton", 1))):
        for case in some(name, count):
            yield pytest.param(name, case, implementation)


@pytest.mark.parametrize(("name", "case", "implementation"), list(launches()), ids=str)
def test_kernel(name, case, implementation):
    args = case.arguments()
    operation = dispatch.operations[getattr(case, "op", name)]
    with fp.interpret("sm_120") as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation) or operation.why_not(implementation, *args):
            assert reason.code in ("dtype", "head_dim", "not_built")
            return
        MODULES[name].assert_matches(operation(*args), args)
    assert device.findings == []
