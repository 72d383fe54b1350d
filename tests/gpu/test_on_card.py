"""Every case of every operation that has a CUDA or a Triton kernel, its benchmarks' too, on the GPU of this machine."""

import importlib
import re

import pytest
import torch

from forwardpass import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

#: package -> its cases
MODULES = {
    op.package.split(".")[-1]: importlib.import_module(f"{op.package}.cases") for op in dispatch.operations.values()
}
#: one awkward case in so many runs under compute-sanitizer, which makes a launch a hundred times as long
SMOKE = 12


def cases():
    """The awkward ones and those of real layers."""
    for name, module in MODULES.items():
        for i, case in enumerate(module.cases()):
            yield pytest.param(name, case, id=f"{name}-{case}", marks=pytest.mark.smoke if i % SMOKE == 0 else ())
        for case in module.BENCHMARK_CASES:
            yield pytest.param(name, case, id=f"{name}-{case}")


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize(("name", "case"), list(cases()))
def test_kernel(name, case, implementation, seed):
    args, module = case.arguments("cuda", seed=seed), MODULES[name]
    operation = dispatch.operations[getattr(case, "op", name)]
    with dispatch.use_backend(implementation):
        if reason := operation.why_not(implementation, *args):  # FP8 on an A100
            with pytest.raises(dispatch.Unsupported, match=re.escape(str(reason))):
                operation(*args)
            return
        check(operation, module, args)


def check(operation, module, args, call=lambda operation, args: operation(*args)):
    """What `call` returns; of an operation that writes into its arguments, all of the memory behind them."""
    if operation.writes:
        got = module.copied(args)
        expected = module.copied(tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
        call(operation, got)
        operation.runs["reference"](*expected)
        module.assert_matches(got, expected)
        return
    got = call(operation, args)
    results = got if isinstance(got, tuple) else (got,)
    assert all(t.is_cuda for t in results if isinstance(t, torch.Tensor))
    truncating = {"truncating": True} if operation.name.startswith("fp8") else {}
    module.assert_matches(got, args, **truncating)


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
