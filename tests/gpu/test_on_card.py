"""Every case of every operation that has a CUDA or a Triton kernel, its benchmarks' too, on the GPU of this machine."""

import re

import pytest
import torch
from matching import cases_of, check
from rotation import whole

from forwardpass import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

#: package -> its cases
MODULES = {op.package.split(".")[-1]: cases_of(op) for op in dispatch.operations.values() if "cuda" in op.compiled}
#: one awkward case in so many runs under compute-sanitizer, which makes a launch a hundred times as long
SMOKE = 12


def cases():
    """The awkward ones and those of real layers."""
    for name, module in MODULES.items():
        awkward = list(module.cases())
        yield whole(awkward[::SMOKE], name, which="smoke", marks=[pytest.mark.smoke])
        yield whole([c for i, c in enumerate(awkward) if i % SMOKE], name, which="awkward")
        yield whole(module.BENCHMARK_CASES, name, which="real")


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize(("case", "name"), list(cases()))
def test_kernel(case, name, implementation, seed):
    args = case.arguments("cuda", seed=seed)
    operation = dispatch.operations[getattr(case, "op", name)]
    with dispatch.use_backend(implementation):
        if reason := operation.why_not(implementation, *args):  # FP8 on an A100
            with pytest.raises(dispatch.Unsupported, match=re.escape(str(reason))):
                operation(*args)
            return
        # tensor cores of Ada and Hopper add FP8's products with fewer bits than float32 has
        check(operation, args, **({"truncating": True} if name.startswith("fp8") else {}))


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
    MODULES["quantize"].assert_matches(got, (torch.full((4096, 4096), 3.0), torch.int8, None, None, None, True, None))
