"""Every case of every operation that has a CUDA or a Triton kernel, its benchmarks' too, on the GPU of this machine."""

import re

import pytest
import torch

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
from forwardpass.ops.permute_quantize import cases as permute_quantize
from forwardpass.ops.quantize import cases as quantize
from forwardpass.ops.unpermute import cases as unpermute
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm
from forwardpass.ops.w8a16_grouped_gemm import cases as w8a16_grouped_gemm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

MODULES = {
    "activation_quantize": activation_quantize,
    "attention": attention,
    "dequant_activation": dequant_activation,
    "fp8_gemm": fp8_gemm,
    "fp8_grouped_gemm": fp8_grouped_gemm,
    "fp8_linear": fp8_linear,
    "int8_gemm": int8_gemm,
    "int8_grouped_gemm": int8_grouped_gemm,
    "int8_linear": int8_linear,
    "norm_quantize": norm_quantize,
    "permute_quantize": permute_quantize,
    "quantize": quantize,
    "unpermute": unpermute,
    "w8a16_gemm": w8a16_gemm,
    "w8a16_grouped_gemm": w8a16_grouped_gemm,
}
#: one case in so many runs under compute-sanitizer, which makes a launch a hundred times as long
SMOKE = 12


def cases():
    """The awkward ones and those of real layers."""
    for name, module in MODULES.items():
        for i, case in enumerate([*module.cases(), *module.BENCHMARK_CASES]):
            marks = pytest.mark.smoke if i % SMOKE == 0 else ()
            yield pytest.param(name, case, id=f"{name}-{case}", marks=marks)


def test_every_operation_is_here():
    assert {op.package.split(".")[-1] for op in dispatch.operations.values()} == set(MODULES)


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize(("name", "case"), list(cases()))
def test_kernel(name, case, implementation, seed):
    args = case.arguments("cuda", seed=seed)
    operation = dispatch.operations[getattr(case, "op", name)]
    with dispatch.use_backend(implementation):
        if reason := operation.why_not(implementation, *args):  # FP8 on an A100
            with pytest.raises(dispatch.Unsupported, match=re.escape(str(reason))):
                operation(*args)
            return
        got = operation(*args)
    assert all(t.is_cuda for t in got if isinstance(t, torch.Tensor))
    MODULES[name].assert_matches(got, args, **({"truncating": True} if name.startswith("fp8") else {}))


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_on_another_stream(implementation):
    """An operation goes to the current stream: there it waits for what makes its argument."""
    x = torch.zeros(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), dispatch.use_backend(implementation):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        got = dispatch.operations["quantize"](x, torch.int8, None, None, None, True, None)
    stream.synchronize()
    quantize.assert_matches(got, (torch.full((4096, 4096), 3.0), torch.int8, None, None, None, True, None))
