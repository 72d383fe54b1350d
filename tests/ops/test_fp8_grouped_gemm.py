"""fp8_grouped_gemm: on a CPU the bits of fp8_gemm called expert by expert, what its arguments may be, its schemas."""

import itertools

import pytest
import torch
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_grouped_gemm import OPERATION, cases
from forwardpass.testing import assert_equal

CASES = list(cases.cases())
COUNTS = (0, 1, 3, 64, 65, 300)
BF16 = EpilogueCase(out_dtype=torch.bfloat16)


def assert_expert_by_expert(got, args):
    """Bits of fp8_gemm for each expert's rows, zeros for those of none."""
    rows = got.flatten(0, -2)
    of_none = torch.ones(len(rows), dtype=torch.bool)
    for where, (*operands, bias, activation, out_dtype, out_scale) in cases.expert_arguments(args):
        expected = fp.ops.fp8_gemm(
            *operands, bias=bias, activation=activation, out_dtype=out_dtype, out_scale=out_scale
        )
        assert_equal(rows[where], expected, f"rows from {where.start} on")
        of_none[where] = False
    assert not rows[of_none].float().any()


@pytest.mark.every(2)
@pytest.mark.parametrize("case", [whole(CASES)])
def test_against_fp8_gemm(case, seed):
    args = case.arguments(seed=seed)
    got = OPERATION(*args)
    cases.assert_matches(got, args)
    assert_expert_by_expert(got, args)


@pytest.mark.parametrize("experts", [1, 8, 60])
@pytest.mark.parametrize("room", [None, 303])
@pytest.mark.parametrize("blocks", [False, True])
def test_counts_of_every_kind_beside_each_other(experts, room, blocks):
    counts = tuple(itertools.islice(itertools.cycle((*COUNTS[1:], 0)), experts))
    counts = tuple(n if n < 300 or e < 8 else 0 for e, n in enumerate(counts))
    epilogue = EpilogueCase(activation="silu_mul", out_dtype=torch.bfloat16)
    args = cases.Case(counts, 32, 140, epilogue, blocks=blocks, room=room).arguments()
    assert_expert_by_expert(OPERATION(*args), args)


@pytest.mark.parametrize("blocks", [False, True])
def test_comparison_fails_on_a_fault(blocks):
    args = cases.Case((3, 0, 70, 5), 130, 257, blocks=blocks).arguments()
    a, b, a_scale, b_scale, offs, *options = args
    later = (offs + 1).clamp(max=len(a))
    for faulty in (
        (a, b, a_scale, b_scale, later, *options),
        (a, b, a_scale, b_scale.roll(1, 0), offs, *options),
        (a, b.view(torch.int8).roll(1, 0).view(E4M3), a_scale, b_scale, offs, *options),
    ):
        with pytest.raises(AssertionError, match=r"differ|not below|not 0"):
            cases.assert_matches(OPERATION(*faulty), args)


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("case", in_parts(CASES[::17], 4))
def test_opcheck(case, implementation):
    """Of the schemas and fakes, on meta tensors: it compares its inputs, and torch cannot compare e4m3."""
    op = getattr(torch.ops.forwardpass, f"fp8_grouped_gemm_{implementation}").default
    torch.library.opcheck(op, [a.to("meta") if isinstance(a, torch.Tensor) else a for a in case.arguments()])


A, B, ONE = torch.ones(4, 160).to(E4M3), torch.ones(3, 16, 160).to(E4M3), torch.ones(1)
ROOM, SCALE = torch.ones(3, 2, 160).to(E4M3), torch.ones(3, 16)
GROUPS, BLOCKS = fp.ops.quantize(torch.ones(4, 160), E4M3, group_size=128)[1], torch.ones(3, 1, 2)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


OFFS = ints(1, 1, 4)


def call(a=A, b=B, a_scale=ONE, b_scale=SCALE, offs=OFFS, out_dtype=torch.float32, **options):
    return fp.ops.fp8_grouped_gemm(a, b, a_scale, b_scale, offs, out_dtype=out_dtype, **options)


REFUSALS = [
    (lambda: call(A.float()), TypeError, "a must be a float8_e4m3fn"),
    (lambda: call(b=B.float()), TypeError, "b must be a float8_e4m3fn"),
    (lambda: call(A[0]), ValueError, r"a must be \[S, K\] or \[E, max_m, K\]"),
    (lambda: call(b=B[0]), ValueError, r"b must be \[E, N, 160\]"),
    (lambda: call(ROOM[:2], offs=ints(1, 1)), ValueError, r"b must be \[2, N, 160\]"),
    (lambda: call(b_scale=torch.ones(16)), ValueError, r"b_scale must be contiguous \[3, 16\]"),
    (lambda: call(b_scale=SCALE.half()), TypeError, "b_scale must be a tensor of torch.float32"),
    (lambda: call(b_scale=1.0), TypeError, "b_scale must be a float32 tensor, not float"),
    (lambda: call(a_scale=torch.ones(3)), ValueError, "a_scale must be contiguous with 4 elements"),
    (lambda: call(a_scale=1.0), TypeError, "a_scale must be a float32 tensor, not float"),
    (lambda: call(a_scale=GROUPS), ValueError, "a_scale must be contiguous with 4 elements"),
    (lambda: call(b_scale=BLOCKS), ValueError, r"a_scale must be \[4, 2\], as b_scale is of blocks"),
    (lambda: call(a_scale=torch.ones(4, 2), b_scale=BLOCKS), ValueError, "rows contiguous and its groups"),
    (lambda: call(a_scale=GROUPS, b_scale=torch.ones(3, 2, 1)), ValueError, r"b_scale must be contiguous \[3, 1, 2\]"),
    (lambda: call(a_scale=GROUPS, b_scale=BLOCKS, activation="silu_mul"), ValueError, r"b_scale must be contiguous \[3, 2, 1, 2\]"),
    (lambda: call(bias=torch.ones(16)), ValueError, r"bias must be contiguous \[3, 16\]"),
    (lambda: call(offs=OFFS.long()), TypeError, "offs must be a tensor of torch.int32"),
    (lambda: call(offs=OFFS[:2]), ValueError, r"offs must be contiguous \[3\]"),
    (lambda: call(activation="swish"), ValueError, "silu"),
    (lambda: call(b=B[:, :10].contiguous(), b_scale=torch.ones(3, 10), activation="silu_mul"), ValueError, "multiple of 16"),
    (lambda: call(out_dtype=torch.int8), ValueError, "out_scale"),
]  # fmt: skip


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS)
def test_refusals(refused, error, words):
    with pytest.raises(error, match=words) as e:
        refused()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("arch", "code"), [("sm_80", "no_fp8"), ("sm_89", None), ("sm_90a", None)])
def test_needs_a_gpu_that_multiplies_fp8(arch, code):
    with fp.interpret(arch):
        table = fp.explain("fp8_grouped_gemm", A, B, ONE, SCALE, OFFS, out_dtype=torch.float32)
    for name in ("cuda", "triton"):
        assert (table[name] and table[name].code) == code
