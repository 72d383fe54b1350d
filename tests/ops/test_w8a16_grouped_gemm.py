"""w8a16_grouped_gemm on the CPU and in Triton: for each expert's rows what w8a16_gemm gives."""

import pytest
import torch
from every_backend import on_each
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.w8a16_grouped_gemm import OPERATION, cases
from forwardpass.testing import assert_equal, poisoned_outputs

CASES = list(cases.cases())
GPU_CASES = [c for c in CASES if c.x_dtype != torch.float32]


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu_against_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = torch.ops.forwardpass.w8a16_grouped_gemm_cpu(*args)
    cases.assert_matches(got, args)


@pytest.mark.parametrize(("case", "arch"), on_each(("sm_80", "sm_89", "sm_90a"), GPU_CASES, len(GPU_CASES)))
def test_triton(case, arch, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs(), fp.use_backend("triton"), fp.interpret(arch, seed=seed, guard=True) as device:
        cases.assert_matches(OPERATION(*args), args)
    assert device.findings == []


def test_groups_of_columns_are_not_for_cuda():
    args = cases.Case((3, 0), 16, 200, groups=True).arguments()
    with (
        fp.interpret("sm_80"),
        fp.use_backend("cuda"),
        pytest.raises(fp.Unsupported, match=r"a scale for each row.*Triton"),
    ):
        OPERATION(*args)


@pytest.mark.parametrize("room", [None, 50])
@pytest.mark.parametrize("w_dtype", [torch.int8, E4M3], ids=str)
def test_bits_of_few_rows_are_those_of_w8a16_gemm(w_dtype, room):
    """With any number of threads."""
    case = cases.Case((0, 1, 3, 16, 0, 4, 2), 272, 515, torch.float16, w_dtype, room=room, groups=room is None)
    x, w, weight_scale, _, bias, _ = args = case.arguments()
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            with poisoned_outputs():
                rows, begin = OPERATION(*args).flatten(0, -2), 0
            for e, count in enumerate(case.counts):
                begin = begin if room is None else e * room
                own_rows = slice(begin, begin + count)
                expected = fp.ops.w8a16_gemm(x.flatten(0, -2)[own_rows], w[e], weight_scale[e], bias=bias[e])
                assert_equal(rows[own_rows], expected, f"expert {e}")
                begin += count
    finally:
        torch.set_num_threads(threads)


def test_weights_of_experts_without_rows_are_not_read():
    """Nor those beyond: what is read of a NaN shows in a product with 0."""
    case = cases.Case((0, 2, 0, 60, 0), 33, 70, torch.float32, E4M3, bias=False)
    x, w, weight_scale, offs, bias, activation = args = case.arguments()
    expected = OPERATION(*args)
    w = w.clone()
    for e in (0, 2, 4):
        w[e].view(torch.uint8).fill_(0x7F)
    assert_equal(OPERATION(x, w, weight_scale, offs, bias, activation), expected)


@pytest.mark.parametrize(
    "case", in_parts([c for c in CASES if c.w_dtype == torch.int8][::9], 3)
)  # it cannot compare e4m3
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.w8a16_grouped_gemm_cpu.default, case.arguments())


X, W, SCALE = torch.ones(4, 32), torch.ones(3, 16, 32, dtype=torch.int8), torch.ones(3, 16)
OFFS = torch.tensor([1, 1, 4], dtype=torch.int32)


def call(x=X, weight=W, weight_scale=SCALE, offs=OFFS, **options):
    return fp.ops.w8a16_grouped_gemm(x, weight, weight_scale, offs, **options)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSALS = [
    (lambda: call(X.double()), TypeError, "float32, float16 or bfloat16"),
    (lambda: call(X[0]), ValueError, r"x must be \[S, K\] or \[E, max_m, K\]"),
    (lambda: call(weight=W.float()), TypeError, "int8 or float8_e4m3fn tensor, not torch.float32"),
    (lambda: call(weight=W[0]), ValueError, r"weight must be \[E, N, 32\]"),
    (lambda: call(torch.ones(2, 5, 32), offs=ints(1, 1)), ValueError, r"weight must be \[2, N, 32\]"),
    (lambda: call(weight_scale=torch.ones(16)), ValueError, r"weight_scale must be contiguous \[3, 16\]"),
    (lambda: call(weight_scale=SCALE.half()), TypeError, "weight_scale must be a tensor of torch.float32"),
    (lambda: call(weight_scale=torch.ones(3, 16, 2)), ValueError, r"weight_scale must be contiguous \[3, 16, 1\]"),
    (lambda: call(weight_scale=0.1), TypeError, "weight_scale must be a float32 tensor, not float"),
    (lambda: call(bias=torch.ones(16)), ValueError, r"bias must be contiguous \[3, 16\]"),
    (lambda: call(offs=OFFS.long()), TypeError, "offs must be a tensor of torch.int32"),
    (lambda: call(activation="swish"), ValueError, "silu"),
    (lambda: call(weight=W[:, :10].contiguous(), weight_scale=SCALE[:, :10].contiguous(), activation="silu_mul"),
     ValueError, "multiple of 16"),
]  # fmt: skip


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS)
def test_refusals(refused, error, words):
    with pytest.raises(error, match=words) as e:
        refused()
    assert "\n" not in str(e.value)
