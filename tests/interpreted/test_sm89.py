"""What an L40S or a 4090 runs of operations that have no code for 8.9: the kernels for 8.0, by tiles that fit its shared memory."""

import pytest
from rotation import in_turn

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.attention import cases as attention
from forwardpass.ops.attention_decode import cases as attention_decode
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.int8_grouped_gemm import cases as int8_grouped_gemm

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

MODULES = {
    "attention": attention, "attention_decode": attention_decode, "int8_gemm": int8_gemm, "int8_grouped_gemm": int8_grouped_gemm,
}  # fmt: skip


def some(name, count):
    """Cases from all over the list."""
    cases = list(MODULES[name].cases())
    return [(name, cases[i * len(cases) // count]) for i in range(count)]


@pytest.mark.parametrize(("name", "case"), in_turn([pair for name in MODULES for pair in some(name, 12)], 2), ids=str)
def test_kernel(name, case):
    args = case.arguments()
    operation = dispatch.operations[getattr(case, "op", name)]
    with fp.interpret("sm_89") as device, fp.use_backend("cuda"):
        if reason := dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        if reason := operation.why_not("cuda", *args):
            assert reason.code in ("alignment", "dtype", "head_dim")
            return
        MODULES[name].assert_matches(operation(*args), args)
    assert device.findings == []
