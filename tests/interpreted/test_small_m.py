"""The GEMV of up to four rows and w8a16_gemm's kernel, as compiled: splits, bytes and bank conflicts."""

import pytest
import torch

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

GATED = EpilogueCase(activation="silu_mul")


def run(name, args, arch, **options):
    """(what the operation returns, the device with its counters)."""
    with fp.interpret(arch, counters=True, **options) as device, fp.use_backend("cuda"):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        got = dispatch.operations[name](*args)
    assert device.findings == []
    return got, device


MODULES = {"int8_gemm": int8_gemm, "w8a16_gemm": w8a16_gemm, "fp8_gemm": fp8_gemm}
DEEP = 3 * 8192 + 200
SPLIT = [
    ("int8_gemm", int8_gemm.Case(3, 32, DEEP, GATED), "sm_80"),
    ("w8a16_gemm", w8a16_gemm.Case((4,), 33, DEEP, scales="block"), "sm_80"),
    ("w8a16_gemm", w8a16_gemm.Case((1,), 16, DEEP, w_dtype=E4M3, activation="gelu_mul"), "sm_89"),
    ("fp8_gemm", fp8_gemm.Case(2, 288, DEEP, GATED, blocks=True), "sm_89"),
    ("fp8_gemm", fp8_gemm.Case(4, 130, DEEP, blocks=True), "sm_90a"),
]


@pytest.mark.parametrize(("name", "case", "arch"), SPLIT, ids=str)
def test_few_columns_of_a_great_depth_are_split(name, case, arch, seed):
    args = case.arguments(seed=seed)
    got, device = run(name, args, arch, seed=seed)
    MODULES[name].assert_matches(got, args)
    (gemv,) = device.kernels("gemv_kernel")
    (sums,) = device.kernels("dequant_activation_kernel")
    assert gemv.grid[0] == -(-case.n // 16) * 3 and sums.launches == 1


EXACT = [  # one row of a layer: the operation, its arguments, bytes of a number of x
    ("int8_gemm", int8_gemm.Case(1, 64, 2048, EpilogueCase(bias=None), ("contiguous", "contiguous")), 1),
    ("fp8_gemm", fp8_gemm.Case(4, 64, 2048, EpilogueCase(bias=None), layouts=("contiguous", "contiguous")), 1),
    ("w8a16_gemm", w8a16_gemm.Case((4,), 64, 2048, bias=False, layout="contiguous"), 2),
]


@pytest.mark.parametrize(("name", "case", "size"), EXACT, ids=str)
def test_the_weight_is_read_once_in_whole_sectors(name, case, size):
    args = case.arguments()
    x, n, k = args[0].contiguous(), case.n, case.k
    _, device = run(name, (x, *args[1:]), "sm_90a")
    (gemv,) = device.kernels("gemv_kernel")
    weight = [i for i in gemv.instructions if "no_allocate" in i["opcode"]]
    assert sum(i.get("sectors", 0) for i in weight) == n * k // 32
    assert sum(i.get("requests", 0) for i in weight) == n * k // 512  # 16 bytes a lane
    least = n * k + x.shape[0] * k * size
    assert least <= gemv.footprint_read <= least + 2048  # scales, and the parameters' sectors


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
def test_the_main_loop_has_no_bank_conflicts(x_dtype):
    for m in (16, 64, 128):
        case = w8a16_gemm.Case((m,), 128, 512, x_dtype=x_dtype)
        _, device = run("w8a16_gemm", case.arguments(), "sm_80")
        (kernel,) = device.kernels("UpconvertingMmaMainloop")
        loads = [i for i in kernel.instructions if i.get("wavefronts") and "/epilogue/" not in i["inner_file"]]
        assert {i["opcode"].split(".")[0] for i in loads} == {"ld", "cp"}
        assert sum(i["wavefronts"] for i in loads) == sum(i["ideal_wavefronts"] for i in loads)
