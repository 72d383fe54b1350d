"""permute_quantize: every backend gives the reference's bits."""

import pytest
import torch
from every_backend import in_triton, interpreted, on_cuda
from rotation import in_parts, paired, whole

import forwardpass as fp
from forwardpass.ops.common.experts import MOST_EXPERTS
from forwardpass.ops.permute_quantize import OPERATION, cases, reference
from forwardpass.testing import poisoned_outputs

CASES = list(cases.cases())


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        cases.assert_matches(torch.ops.forwardpass.permute_quantize_cpu(*args), args)


@pytest.mark.parametrize(("case", "arch"), on_cuda(CASES))
def test_cuda(case, arch, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(interpreted(OPERATION, args, "cuda", arch, seed), args)


@pytest.mark.parametrize(("case", "arch"), in_triton(CASES, 32))
def test_triton(case, arch, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(interpreted(OPERATION, args, "triton", arch, seed), args)


def test_reference_means_what_it_says():
    x = torch.tensor([[1.0, -2.0], [4.0, 1.0], [0.5, 0.25]])
    index = torch.tensor([[2, 0], [0, -1], [3, 2]])
    q, scale, offs, position = reference.permute_quantize(x, index, 3, torch.int8, None, None)
    assert offs.tolist() == [2, 2, 4]  # expert 0 has tokens 0 and 1, expert 2 tokens 0 and 2
    assert position.tolist() == [[2, 0], [1, -1], [-1, 3]]
    assert q.tolist() == [[64, -127], [127, 32], [64, -127], [127, 64], [0, 0], [0, 0]]
    assert scale.tolist() == pytest.approx([2 / 127, 4 / 127, 2 / 127, 0.5 / 127, 0, 0])


def test_groups_mean_what_they_say():
    x, index = torch.tensor([[1.0, -2.0, 4.0], [4.0, 1.0, 0.5]]), torch.tensor([[1, -1], [0, 1]])
    q, scale, offs, _ = reference.permute_quantize(x, index, 2, torch.int8, 2, None)
    assert offs.tolist() == [1, 3] and scale.stride() == (1, 4)
    assert q.tolist() == [[127, 32, 127], [64, -127, 127], [127, 32, 127], [0, 0, 0]]
    assert scale[:, 0].tolist() == pytest.approx([4 / 127, 2 / 127, 4 / 127, 0])
    assert scale[:, 1].tolist() == pytest.approx([0.5 / 127, 4 / 127, 0.5 / 127, 0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("group_size", [None, 128, 50])
def test_rows_are_those_of_quantize(group_size, dtype):
    case = cases.Case(65, 2, 8, 530, torch.float16, dtype, group_size=group_size, channel_scale=True)
    x, index, experts, dtype, group_size, channel = case.arguments()
    options = {"group_size": group_size, "channel_scale": channel}
    q, scale, offs, position = fp.ops.permute_quantize(x, index, experts, dtype, **options)
    expected, expected_scale, _ = fp.ops.quantize(x, dtype, **options)
    q, expected = q.view(torch.uint8), expected.view(torch.uint8)
    for choice in range(2):
        assert torch.equal(q[position[:, choice].long()], expected)
        assert torch.equal(scale[position[:, choice].long()], expected_scale)
    begin = 0
    for expert, end in enumerate(offs.tolist()):
        tokens = (index == expert).any(1).nonzero()[:, 0]
        assert torch.equal(q[begin:end], expected[tokens])
        begin = end


@pytest.mark.parametrize("case", in_parts(CASES[::7], 3))
def test_opcheck(case):
    if case.dtype == torch.int8:  # opcheck compares its inputs, and torch cannot compare e4m3
        torch.library.opcheck(torch.ops.forwardpass.permute_quantize_cpu.default, case.arguments())


X, INDEX = torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((X.double(), INDEX, 4, torch.int8), {}, TypeError, "float32, float16 or bfloat16"),
        ((X[None], INDEX, 4, torch.int8), {}, ValueError, r"x must be \[T, K\]"),
        ((X, [0, 1], 4, torch.int8), {}, TypeError, "int32 or int64 tensor, not list"),
        ((X, INDEX.float(), 4, torch.int8), {}, TypeError, "torch.int32 or torch.int64"),
        ((X, INDEX[:1], 4, torch.int8), {}, ValueError, r"index must be \[2, k\]"),
        ((X, torch.zeros(2, 4, dtype=torch.int32)[:, ::2], 4, torch.int8), {}, ValueError, "contiguous"),
        ((X, INDEX, 0, torch.int8), {}, ValueError, "from 1 to 512, not 0"),
        ((X, INDEX, 513, torch.int8), {}, ValueError, "from 1 to 512, not 513"),
        ((X, INDEX, 4, torch.uint8), {}, TypeError, "torch.int8 or torch.float8_e4m3fn"),
        ((X, INDEX, 4, torch.int8), {"channel_scale": torch.ones(2)}, ValueError, "3 elements"),
        (
            (X, INDEX, 4, torch.int8),
            {"group_size": 0},
            ValueError,
            "group_size must be a positive integer or None, not 0",
        ),
    ],
)
def test_refusals(args, kwargs, error, words):
    with pytest.raises(error, match=words) as e:
        fp.ops.permute_quantize(*args, **kwargs)
    assert "\n" not in str(e.value)


def choices_of_all(tokens, experts):
    """Eight of each token, some of them no expert."""
    index = torch.randint(-1, experts + 1, (tokens, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return torch.randn(tokens, 1), index, experts, torch.int8, None, None


def read_while_counting(args, backend):
    """Bytes that all kernels but the one that quantises read."""
    with fp.interpret("sm_80", checks=False, counters=True) as device, fp.use_backend(backend):
        if reason := fp.dispatch.interpreter().why_not(backend):
            pytest.skip(str(reason))
        got = OPERATION(*args)
    cases.assert_matches(got, args)
    kernels = [k for k in device.kernels() if backend == "cuda" or k.kernel != "permute_quantize_kernel"]
    return sum(32 * i.get("sectors", 0) for k in kernels for i in k.instructions if i["opcode"].startswith("ld.global"))


@pytest.mark.every(2)
@pytest.mark.interpreted
def test_counting_reads_no_more_than_in_proportion_to_the_choices():
    """A thread block for every 2048 choices would add up what all others have counted: 134 MB for this, 8.6 GB for 2^22."""
    assert read_while_counting(choices_of_all(2**16, MOST_EXPERTS), "cuda") < 80e6


@pytest.mark.every(2)
@pytest.mark.interpreted
def test_triton_reads_choices_as_often_whatever_the_experts():
    """By a program for each expert, which reads all choices twice, it is 269 MB for 64 KB of them."""
    assert read_while_counting(choices_of_all(2**11, MOST_EXPERTS), "triton") < 1e6


@pytest.mark.every(2)
@pytest.mark.interpreted
@pytest.mark.parametrize(("experts", "most"), paired([1, 31, 32, 200], [2, 3, 1024]))
def test_triton_of_several_slices(experts, most, monkeypatch):
    """One of few choices, the last one not full, and slices of several blocks."""
    triton_kernel = pytest.importorskip("forwardpass.ops.permute_quantize.triton_kernel")
    monkeypatch.setattr(triton_kernel, "MOST_SLICES", most)
    for tokens in (64, 65, 193):
        args = choices_of_all(tokens, experts)
        cases.assert_matches(interpreted(OPERATION, args, "triton", "sm_80", 0), args)
