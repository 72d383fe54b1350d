"""The kernels of the memory-bound operations, as compiled: every case of every operation, CUDA and Triton, on each architecture.

`make test` runs a part of the cases, on each architecture another one. Triton's code for them hardly knows the architecture: of
these cases' PTX for sm_80 98 % is letter for letter that for sm_89, of that 96 % the one for sm_90, `.target` apart (Triton 3.7.1).
"""

import pytest
from every_backend import on_each
from rotation import whole

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.activation_quantize import cases as activation_quantize
from forwardpass.ops.dequant_activation import cases as dequant_activation
from forwardpass.ops.norm_quantize import cases as norm_quantize
from forwardpass.ops.quantize import cases as quantize
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")
MODULES = {
    "activation_quantize": activation_quantize,
    "dequant_activation": dequant_activation,
    "norm_quantize": norm_quantize,
    "quantize": quantize,
}
CASES = [(name, case) for name, module in MODULES.items() for case in module.cases()]


def check(name, case, implementation, arch, seed):
    args = case.arguments(seed=seed)
    operation = dispatch.operations[getattr(case, "op", name)]
    with fp.interpret(arch, seed=seed) as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        MODULES[name].assert_matches(operation(*args), args)
    assert device.findings == []
    assert (device.counters["launches"] > 0) == (args[0].numel() > 0)


LAUNCHES = [
    p
    for name, module in MODULES.items()
    for implementation, parts in (("cuda", 4), ("triton", 60))
    for p in on_each(ARCHITECTURES, module.cases(), parts, name, implementation)
]


@pytest.mark.parametrize(("case", "name", "implementation", "arch"), LAUNCHES)
def test_kernel(case, name, implementation, arch, seed):
    check(name, case, implementation, arch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize(("case", "name"), [whole(module.BENCHMARK_CASES, name) for name, module in MODULES.items()])
def test_kernel_on_a_real_layer(case, name, implementation):
    check(name, case, implementation, "sm_90a", 0)


def longest_rows():
    """Of each operation, for each input type, the case with the most columns: (name, case). Each is a kernel of its own."""
    chosen = {}
    for name, case in CASES:
        kernel = getattr(case, "op", name), getattr(case, "x_dtype", None) or case.acc_dtype
        if kernel not in chosen or case.shape[-1] > chosen[kernel][1].shape[-1]:
            chosen[kernel] = name, case
    return list(chosen.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize(("name", "case"), longest_rows(), ids=str)
def test_no_false_alarm_in_20_seeds(name, case, implementation, arch):
    """And the same bits at every seed."""
    args, expected = case.arguments(), None
    for seed in range(20):
        with fp.interpret(arch, seed=seed, approximate=False) as device, fp.use_backend(implementation):
            if reason := fp.dispatch.interpreter().why_not(implementation):
                pytest.skip(str(reason))
            got = dispatch.operations[getattr(case, "op", name)](*args)
        assert device.findings == []
        assert device.counters["launches"] > 0
        got = got if isinstance(got, tuple) else (got,)
        expected = expected or got
        for g, e in zip(got, expected):
            assert_equal(g, e)
