"""The GEMMs' kernels, as compiled: every case of every operation, CUDA and Triton, on each architecture.

FP8 sums are cut as Hopper's and Ada's tensor cores cut them; `make test-all` adds the same with exact ones. `make test` runs a part
of the cases, on each architecture another one. Triton takes about a second to compile a GEMM, so its cases cover the same pairs in
few kernels; `make test-all` adds CUDA's cases, and Triton's kernels for int8 weights on sm_89, whose PTX is letter for letter that
for sm_80, `.target` apart.
"""

import re

import pytest
import torch
from every_backend import OF_TRITON, cuda_and_triton, not_in_turn, on_each
from rotation import paired, whole

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.fp8_linear import cases as fp8_linear
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.int8_linear import cases as int8_linear
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")
IMPLEMENTATIONS = ("cuda", "triton")
FP8 = {"fp8_gemm": fp8_gemm, "fp8_linear": fp8_linear}
MODULES = {"int8_gemm": int8_gemm, "int8_linear": int8_linear, "w8a16_gemm": w8a16_gemm, **FP8}
CASES = {name: list(module.cases()) for name, module in MODULES.items()}
FEW_KERNELS = {name: list(module.cases(few_kernels=True)) for name, module in MODULES.items()}


def reason_of_refusal(operation, args, arch):
    """The code of the Reason for which no kernel takes these arguments, by what the contracts say; None: one does."""
    if operation.name.startswith("fp8") and arch == "sm_80":
        return "no_fp8"
    if operation.name == "w8a16_gemm" and args[0].dtype == torch.float32:
        return "dtype"
    return None


def check(name, case, implementation, arch, seed, truncating):
    args = case.arguments(seed=seed)
    operation = dispatch.operations[getattr(case, "op", name)]
    with fp.interpret(arch, seed=seed, truncating=truncating) as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        reason = operation.why_not(implementation, *args)
        assert (reason and reason.code) == reason_of_refusal(operation, args, arch)
        if reason:
            with pytest.raises(fp.Unsupported, match=re.escape(str(reason))):
                operation(*args)
            return
        got = operation(*args)
    MODULES[name].assert_matches(got, args, **({"truncating": truncating} if name in FP8 else {}))
    assert device.findings == []
    assert (device.counters["launches"] > 0) == (args[0].numel() > 0)


def is_refused(name, case):
    """Wherever it runs."""
    return name == "w8a16_gemm" and case.x_dtype == torch.float32


def launches():
    """Triton's cases with few kernels, and in `make test-all` CUDA's too."""
    for name in MODULES:
        of_cuda, of_triton = ([c for c in cases[name] if not is_refused(name, c)] for cases in (CASES, FEW_KERNELS))
        yield from on_each(ARCHITECTURES, of_cuda, 12, name, "cuda")
        # of sm_89, where all but what has e4m3 is sm_80's code, and of sm_120 one in turn
        slow = [arch for arch in ("sm_89", "sm_120") if not_in_turn(arch, ("sm_89", "sm_120"))]
        slow = slow if name in FP8 else ["sm_89", *slow]
        yield from on_each(ARCHITECTURES, of_triton, OF_TRITON, name, "triton", slow=slow)
        refused = [c for c in {**dict.fromkeys(CASES[name]), **dict.fromkeys(FEW_KERNELS[name])} if is_refused(name, c)]
        rest = [c for c in of_cuda if c not in of_triton]
        for arch in ARCHITECTURES:
            yield whole(rest, name, "triton", arch, which="of cuda", marks=[pytest.mark.slow])
            if refused:
                yield from (whole(refused, name, i, arch, which="refused") for i in IMPLEMENTATIONS)


@pytest.mark.parametrize(("case", "name", "implementation", "arch"), list(launches()))
def test_kernel(case, name, implementation, arch, seed):
    check(name, case, implementation, arch, seed, truncating=name in FP8)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize(("case", "name"), [whole(CASES[name], name) for name in FP8])
def test_fp8_kernel_with_exact_sums(case, name, implementation, arch):
    check(name, case, implementation, arch, 0, truncating=False)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("implementation", "case", "arch"),
    cuda_and_triton(on_each(("sm_89", "sm_90a"), fp8_gemm.PROMOTION_CASES, 2), ("sm_89", "sm_90a"), at=1),
)
def test_sums_are_promoted(case, arch, implementation, seed):
    """Of one sign, 512 and 4096 deep: without promotion they are out of bounds, as tests/ops/test_fp8_gemm.py shows."""
    check("fp8_gemm", case, implementation, arch, seed, truncating=True)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("implementation", "arch", "w_dtype"),
    cuda_and_triton(paired(ARCHITECTURES, (torch.int8, E4M3)), ARCHITECTURES),
)
def test_weights_are_upconverted_exactly(w_dtype, implementation, arch, seed):
    """All 256 in each byte of a word, NaN and denormals included, which no random weight is."""
    codes = torch.arange(-128, 128, dtype=torch.int8)
    w = torch.einsum("ij,n->inj", torch.eye(4, dtype=torch.int8), codes).reshape(1024, 4).view(w_dtype)
    operation, one = dispatch.operations["w8a16_gemm"], torch.ones(1)
    # Triton compiles a kernel for each: of the second seed, in `make test-all`, each pair, else each type and each height
    heights = ((1,), (65,)) if implementation == "triton" and seed == 0 else ((1, 65), (1, 65))
    with fp.interpret(arch, seed=seed) as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        for dtype, of_type in zip((torch.float16, torch.bfloat16), heights, strict=True):
            for rows in of_type:
                got = operation(torch.ones(rows, 4, dtype=dtype), w, one, None, None)
                assert_equal(got, codes.view(w_dtype).to(dtype).repeat(rows, 4))
    assert device.findings == []


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("implementation", "arch", "name"),
    cuda_and_triton(paired(ARCHITECTURES, ("int8_gemm", "fp8_gemm", "w8a16_gemm")), ARCHITECTURES),
)
def test_rows_may_be_one_and_the_same(name, implementation, arch):
    """An operand of stride 0, which `expand` makes."""
    dtype = {"int8_gemm": torch.int8, "fp8_gemm": E4M3, "w8a16_gemm": torch.bfloat16}[name]
    x = (torch.arange(160) % 7 - 3).to(dtype).expand(17, 160)
    w, one = torch.randint(-9, 9, (33, 160)).to(torch.int8 if name == "w8a16_gemm" else dtype), torch.ones(1)
    options = (None, None) if name == "w8a16_gemm" else (None, None, torch.float32, None)
    scales = (one,) if name == "w8a16_gemm" else (one, one)
    args = (x, w, *scales, *options, *((None, None) if name == "int8_gemm" else ()))
    operation = dispatch.operations[name]
    with fp.interpret(arch) as device, fp.use_backend(implementation):
        if operation.why_not(implementation, *args):
            return  # test_kernel has the reason
        MODULES[name].assert_matches(operation(*args), args)
    assert device.findings == []


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("name", MODULES)
def test_kernel_on_a_real_layer(name, implementation):
    """The smallest: MiniLM's."""
    case = min(MODULES[name].BENCHMARK_CASES, key=lambda c: c.flops())
    check(name, case, implementation, "sm_90a", 0, truncating=name in FP8)
