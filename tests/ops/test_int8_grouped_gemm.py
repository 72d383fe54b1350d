"""int8_grouped_gemm: the bits of int8_gemm called expert by expert, on a CPU and by the kernels, as compiled."""

import itertools

import pytest
import torch
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.common.experts import MOST_EXPERTS
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_grouped_gemm import OPERATION, cases
from forwardpass.testing import assert_equal, poisoned_outputs

CASES = list(cases.cases())
COUNTS = (0, 1, 3, 64, 65, 1000)
BF16 = EpilogueCase(out_dtype=torch.bfloat16)


def by_int8_gemm(args, expert, rows):
    a, b, a_scale, b_scale, _, bias, activation, out_dtype, out_scale, zero_point, b_sum = args

    def of_rows(v):
        return v if v is None or v.numel() == 1 else v.flatten()[rows]

    return fp.ops.int8_gemm(
        a.flatten(0, -2)[rows], b[expert], of_rows(a_scale), b_scale[expert], bias=None if bias is None else bias[expert],
        activation=activation, out_dtype=out_dtype, out_scale=out_scale, a_zero_point=of_rows(zero_point),
        b_sum=None if b_sum is None else b_sum[expert],
    )  # fmt: skip


def assert_expert_by_expert(got, case, args):
    """Bits of int8_gemm for each expert's rows, zeros for those of none."""
    rows, begin = got.flatten(0, -2), 0
    for e, count in enumerate(case.counts):
        begin = begin if case.room is None else e * case.room
        if count:
            assert_equal(rows[begin : begin + count], by_int8_gemm(args, e, slice(begin, begin + count)), f"expert {e}")
        begin += count
        end = begin if case.room is None else (e + 1) * case.room
        assert not rows[begin:end].float().any(), f"expert {e}"
    assert case.room is not None or not rows[begin:].float().any()


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu_against_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = torch.ops.forwardpass.int8_grouped_gemm_cpu(*args)
    cases.assert_matches(got, args)


@pytest.mark.parametrize("experts", [1, 8, 60])
@pytest.mark.parametrize("room", [None, 1003])
@pytest.mark.parametrize("activation", [None, "silu_mul"])
def test_bits_are_those_of_int8_gemm(experts, room, activation):
    """Of counts of every kind beside each other, with any number of threads."""
    counts = tuple(itertools.islice(itertools.cycle((*COUNTS[1:], 0)), experts))
    counts = tuple(n if n < 1000 or e < 8 else 0 for e, n in enumerate(counts))
    case = cases.Case(
        counts, 32, 70, EpilogueCase(activation=activation, out_dtype=torch.bfloat16, zero_point="row"), room=room
    )
    args, threads = case.arguments(), torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            with poisoned_outputs():
                assert_expert_by_expert(OPERATION(*args), case, args)
    finally:
        torch.set_num_threads(threads)


def test_one_token():
    """Of eight experts, among others without a row."""
    for experts in (8, 60, MOST_EXPERTS):
        counts = tuple(int(e % (experts // 8) == 0 and e < experts // 8 * 8) for e in range(experts))
        case = cases.Case(counts, 48, 96, EpilogueCase(out_dtype=torch.float16), beyond=0)
        args = case.arguments()
        assert sum(counts) == 8
        assert_expert_by_expert(OPERATION(*args), case, args)


@pytest.mark.parametrize("room", [None, 5])
def test_b_sum_is_computed(room):
    case = cases.Case((3, 0, 4), 20, 40, EpilogueCase(zero_point="tensor"), room=room)
    a, b, a_scale, b_scale, offs, bias, _, out_dtype, _, zero_point, b_sum = args = case.arguments()
    got = fp.ops.int8_grouped_gemm(
        a, b, a_scale, b_scale, offs, bias=bias, out_dtype=out_dtype, a_zero_point=zero_point
    )
    assert b_sum is not None
    assert_equal(got, OPERATION(*args))


def test_compiles_whole():
    args = cases.Case((3, 0, 4), 20, 40, BF16).arguments()
    assert_equal(
        torch.compile(lambda: OPERATION(*args) * 2, fullgraph=True, backend="aot_eager")(), OPERATION(*args) * 2
    )


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts(CASES[::9], 4))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.int8_grouped_gemm_cpu.default, case.arguments())


A, B, ONE = torch.ones(4, 32, dtype=torch.int8), torch.ones(3, 16, 32, dtype=torch.int8), torch.ones(1)
SCALE, OFFS, ROOM = (
    torch.ones(3, 16),
    torch.tensor([1, 1, 4], dtype=torch.int32),
    torch.ones(3, 2, 32, dtype=torch.int8),
)


def call(a=A, b=B, a_scale=ONE, b_scale=SCALE, offs=OFFS, out_dtype=torch.float32, **options):
    return fp.ops.int8_grouped_gemm(a, b, a_scale, b_scale, offs, out_dtype=out_dtype, **options)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSALS = [
    (lambda: call(A.float()), TypeError, "a must be an int8"),
    (lambda: call(A[0]), ValueError, r"a must be \[S, K\] or \[E, max_m, K\]"),
    (lambda: call(b=B[0]), ValueError, r"b must be \[E, N, 32\]"),
    (lambda: call(A[:, :31].contiguous()), ValueError, r"b must be \[E, N, 31\]"),
    (lambda: call(ROOM[:2], offs=ints(1, 1)), ValueError, r"b must be \[2, N, 32\]"),
    (lambda: call(b=B.expand(200, 3, 16, 32).reshape(600, 16, 32), b_scale=torch.ones(600, 16), offs=OFFS[:1].expand(600)),
     ValueError, "1 to 512 experts, and has 600"),
    (lambda: call(b_scale=torch.ones(16)), ValueError, r"b_scale must be contiguous \[3, 16\]"),
    (lambda: call(b_scale=SCALE.half()), TypeError, "b_scale must be a tensor of torch.float32"),
    (lambda: call(a_scale=torch.ones(3)), ValueError, "a_scale must be contiguous with 4 elements"),
    (lambda: call(bias=torch.ones(16)), ValueError, r"bias must be contiguous \[3, 16\]"),
    (lambda: call(bias=SCALE.double()), TypeError, "bias must be a tensor of torch.float32 or torch.float16"),
    (lambda: call(b_sum=SCALE.int()), ValueError, "a_zero_point"),
    (lambda: call(offs=OFFS.long()), TypeError, "offs must be a tensor of torch.int32"),
    (lambda: call(offs=OFFS[:2]), ValueError, r"offs must be contiguous \[3\]"),
    (lambda: call(activation="swish"), ValueError, "silu"),
    (lambda: call(b=B[:, :10].contiguous(), b_scale=torch.ones(3, 10), activation="silu_mul"), ValueError, "multiple of 16"),
    (lambda: call(out_dtype=torch.int8), ValueError, "out_scale"),
    (lambda: call(torch.ones(1, 131072, dtype=torch.int8), torch.ones(3, 16, 131072, dtype=torch.int8)), ValueError, "split K"),
]  # fmt: skip


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS)
def test_refusals(refused, error, words):
    with pytest.raises(error, match=words) as e:
        refused()
    assert "\n" not in str(e.value)
