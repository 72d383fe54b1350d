"""unpermute: every backend gives the reference's bits."""

import pytest
import torch
from every_backend import in_triton, interpreted, on_cuda
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.unpermute import OPERATION, cases, reference
from forwardpass.testing import assert_equal, poisoned_outputs

CASES = list(cases.cases())


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        cases.assert_matches(torch.ops.forwardpass.unpermute_cpu(*args), args)


@pytest.mark.parametrize(("case", "arch"), on_cuda(CASES))
def test_cuda(case, arch, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(interpreted(OPERATION, args, "cuda", arch, seed), args)


@pytest.mark.parametrize(("case", "arch"), in_triton(CASES))
def test_triton(case, arch, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(interpreted(OPERATION, args, "triton", arch, seed), args)


def test_reference_means_what_it_says():
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    position = torch.tensor([[2, 0], [-1, 1], [3, -5]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 2.0], [7.0, 0.5], [1.0, 1.0]])
    assert reference.unpermute(y, position, weights).tolist() == [[4.5, 7.0], [1.5, 2.0], [0.0, 0.0]]


def test_it_undoes_permute_quantize():
    x = torch.randn(40, 48)
    index = torch.rand(40, 16).topk(4).indices
    q, scale, _, position = fp.ops.permute_quantize(x, index, 16, torch.int8)
    rows = q.float() * scale[:, None]
    expected, expected_scale, _ = fp.ops.quantize(x, torch.int8)
    weights = torch.full((40, 4), 0.25)  # exact, in any order
    assert_equal(fp.ops.unpermute(rows, position, weights), expected.float() * expected_scale[:, None])


@pytest.mark.parametrize("case", in_parts(CASES[::7], 3))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.unpermute_cpu.default, case.arguments())


Y, POSITION, WEIGHTS = torch.ones(4, 3, dtype=torch.float16), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((Y.int(), POSITION, WEIGHTS), TypeError, "float32, float16 or bfloat16"),
        ((Y[0], POSITION, WEIGHTS), ValueError, r"y must be \[rows, N\]"),
        ((Y, [0], WEIGHTS), TypeError, "must be tensors, and are list and Tensor"),
        ((Y, POSITION, WEIGHTS[:1]), ValueError, r"of one shape \[T, k\]"),
        ((Y, POSITION.long(), WEIGHTS), TypeError, "torch.int32, not torch.int64"),
        ((Y, POSITION, WEIGHTS.bfloat16()), TypeError, "torch.float32 or torch.float16, not torch.bfloat16"),
        ((Y, POSITION.t(), WEIGHTS), ValueError, "contiguous"),
    ],
)
def test_refusals(args, error, words):
    with pytest.raises(error, match=words) as e:
        fp.ops.unpermute(*args)
    assert "\n" not in str(e.value)
