"""quantize: every backend gives the reference's bits."""

import pytest
import torch
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.quantize import OPERATION, cases, reference
from forwardpass.testing import poisoned_outputs

CASES = list(cases.cases())


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu_equals_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        cases.assert_matches(torch.ops.forwardpass.quantize_cpu(*args), args)


def test_reference_means_what_it_says():
    x = torch.tensor([[1.0, -2.0, 0.5, 4.0]])
    q, s, z = reference.quantize(x, torch.int8, None, None, None, True, None)
    assert q.tolist() == [[32, -64, 16, 127]]
    assert s.tolist() == pytest.approx([4 / 127])
    assert z.numel() == 0
    q, s, z = reference.quantize(x, torch.int8, None, None, None, False, None)
    assert s.tolist() == pytest.approx([6 / 255])
    assert z.tolist() == [-128 + 85]
    assert ((q.float() - z) * s - x).abs().max() <= s.item() / 2


@pytest.mark.parametrize("case", in_parts(CASES[::5], 4))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.quantize_cpu.default, case.arguments())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_not_finite_shows_in_the_scale(value, symmetric):
    x = torch.randn(3, 70)
    x[1, 33] = value
    for backend in ("cpu", "reference"):
        with fp.use_backend(backend):
            _, scale, _ = fp.ops.quantize(x, torch.int8, symmetric=symmetric)
        assert scale.isfinite().tolist() == [True, False, True]


def test_compiles_whole():
    x = torch.randn(9, 33)

    def f(t):
        q, s, z = fp.ops.quantize(t, torch.int8, symmetric=False)
        return (q.float() - z[:, None]) * s[:, None]

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        (
            (torch.ones(2, 3, dtype=torch.float64), torch.int8),
            {},
            TypeError,
            "float32, float16 or bfloat16, not torch.float64",
        ),
        ((torch.ones(2, 3), torch.uint8), {}, TypeError, "torch.int8 or torch.float8_e4m3fn, not torch.uint8"),
        (([1.0], torch.int8), {}, TypeError, "must be a tensor, not list"),
        ((torch.ones(()), torch.int8), {}, ValueError, "reshape"),
        ((torch.ones(4, 3).t(), torch.int8), {}, ValueError, "contiguous"),
        ((torch.ones(4, 3, 2)[:, :2].transpose(0, 1), torch.int8), {}, ValueError, "contiguous"),
        ((torch.ones(2, 3), torch.float8_e4m3fn), {"symmetric": False}, ValueError, "symmetric=True"),
        ((torch.ones(2, 3), torch.int8), {"group_size": 0}, ValueError, "positive integer"),
        ((torch.ones(2, 3), torch.int8), {"scale": torch.ones(2)}, ValueError, "1 elements"),
        ((torch.ones(2, 3), torch.int8), {"scale": torch.ones(1), "group_size": 2}, ValueError, "drop group_size"),
        ((torch.ones(2, 3), torch.int8), {"channel_scale": torch.ones(2)}, ValueError, "3 elements"),
        ((torch.ones(2, 3), torch.int8), {"zero_point": torch.ones(1, dtype=torch.int32)}, ValueError, "static scale"),
    ],
)
def test_refusals(args, kwargs, error, words):
    with pytest.raises(error, match=words) as e:
        fp.ops.quantize(*args, **kwargs)
    assert "\n" not in str(e.value)


def test_refuses_grad():
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference_mode"):
        fp.ops.quantize(x, torch.int8)
    with torch.no_grad():
        fp.ops.quantize(x, torch.int8)


def test_a_backend_asked_for_by_name_does_not_fall_back():
    with fp.use_backend("cuda"), pytest.raises(fp.Unsupported, match="CUDA tensors") as e:
        fp.ops.quantize(torch.ones(2, 3), torch.int8)
    assert e.value.reasons["cuda"].code == "device"


def test_the_backend_table_is_complete():
    assert list(fp.explain("quantize", torch.ones(2, 3), torch.int8)) == ["cuda", "triton", "cpu", "reference"]
    assert set(OPERATION.runs) == {"cuda", "triton", "cpu", "reference"}
