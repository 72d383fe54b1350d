"""norm_quantize, add_norm_quantize: every backend quantises values that are within fp32's error of the fp64 norm."""

import pytest
import torch
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.norm_quantize import ADD_NORM_QUANTIZE, NORM_QUANTIZE, cases, reference
from forwardpass.testing import apart, assert_equal, poisoned_outputs

CASES = list(cases.cases())


def run(name, args):
    with poisoned_outputs():
        return getattr(torch.ops.forwardpass, name)(*args)


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu_is_within_fp32_of_the_reference(case, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(run(f"{case.op}_cpu", args), args)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", [whole(c for c in CASES if c.residual)])
def test_the_norm_is_that_of_the_residual_it_returns(case, backend):
    args = case.arguments()
    with fp.use_backend(backend):
        q, scale, zero_point, residual_out = ADD_NORM_QUANTIZE(*args)
        expected = NORM_QUANTIZE(residual_out, *args[2:])
    for name, g, e in zip(("q", "scale", "zero_point"), (q, scale, zero_point), expected):
        assert_equal(g, e, name)
    assert_equal(residual_out, (args[0] + args[1]).contiguous(), "residual_out")


def test_reference_is_torchs_norm():
    x, w, b = torch.randn(5, 300), torch.randn(300), torch.randn(300)
    rms = torch.nn.functional.rms_norm(x.double(), (300,), w.double(), 1e-5)
    layer = torch.nn.functional.layer_norm(x.double(), (300,), w.double(), b.double(), 1e-5)
    torch.testing.assert_close(reference.normalize(x, w, 1e-5, "rms", None), rms, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.normalize(x, w, 1e-5, "layer", b), layer, rtol=1e-12, atol=1e-12)
    for kind, bias, expected in (("rms", None, rms), ("layer", b, layer)):
        q, s, _ = fp.ops.norm_quantize(x, w, 1e-5, torch.int8, kind=kind, bias=bias)
        assert ((q * s[:, None] - expected).abs() <= s[:, None] / 2 * 1.0001).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_adaptive_norm_is_that_of_a_diffusion_transformer(backend):
    """As its blocks write it, of chunks of one projection."""
    x = torch.randn(3, 5, 300)
    shift, scale, _ = torch.randn(3, 900).chunk(3, dim=1)
    expected = torch.nn.functional.layer_norm(x, (300,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    with fp.use_backend(backend):
        q, s, _ = fp.ops.norm_quantize(x, None, 1e-6, torch.int8, kind="layer", ada_scale=scale, ada_shift=shift)
        neither = fp.ops.norm_quantize(x, None, 1e-6, torch.int8, kind="layer")
        zeros = torch.zeros(3, 300)
        none_of_both = fp.ops.norm_quantize(x, None, 1e-6, torch.int8, kind="layer", ada_scale=zeros, ada_shift=zeros)
    assert ((q * s[..., None] - expected).abs() <= s[..., None] / 2 * 1.001).all()
    for g, e in zip(none_of_both, neither):
        assert torch.equal(g, e)


@pytest.mark.parametrize(
    ("x", "ada", "error", "words"),
    [
        (torch.ones(2, 3, 8), torch.ones(3, 8), ValueError, r"must be \[B, K\], \[2, 8\] for x \(2, 3, 8\).*expand it"),
        (torch.ones(2, 3, 8), torch.ones(2, 1, 8), ValueError, r"has shape \(2, 1, 8\)"),
        (torch.ones(2, 3, 8), torch.ones(8), ValueError, r"has shape \(8,\)"),
        (torch.ones(8), torch.ones(1, 8), ValueError, r"pass x.unsqueeze\(0\)"),
        (torch.ones(2, 3, 8), torch.ones(8, 2).t(), ValueError, "must have stride 1"),
        (torch.ones(2, 3, 8).half(), torch.ones(2, 8).bfloat16(), TypeError, "torch.float16 or torch.float32"),
    ],
)
@pytest.mark.parametrize("name", ["ada_scale", "ada_shift"])
def test_refusals_of_an_adaptive_norm(x, ada, error, words, name):
    with pytest.raises(error, match=f"norm_quantize: .*{name}.*{words}" if "unsqueeze" not in words else words):
        fp.ops.norm_quantize(x, None, 1e-6, torch.int8, **{name: ada})


def test_the_bound_can_fail():
    """An error of a few times what fp32 allows is found."""
    case = cases.Case((64, 384), torch.float32, kind="layer")
    args = case.arguments()
    wrong = list(args)
    wrong[2] = args[2] + 1e-3  # eps
    with pytest.raises(AssertionError):
        cases.assert_matches(run("norm_quantize_cpu", wrong), args)
    wrong = (args[0], args[1] * (1 + 1e-4), *args[2:])
    with pytest.raises(AssertionError):
        cases.assert_matches(run("norm_quantize_cpu", wrong), args)


def special_rows(dtype):
    x = torch.randn(5, 70)
    x[1] = 0
    x[2] = 59999.7
    x[3, 33] = float("nan")
    x[4, 69] = float("inf")
    return apart(x.to(dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_special_rows(backend, dtype, symmetric):
    with fp.use_backend(backend):
        for kind in ("rms", "layer"):
            x, options = special_rows(dtype), {"kind": kind, "symmetric": symmetric}
            q, scale, _ = fp.ops.norm_quantize(x, None, 1e-5, torch.int8, **options)
            assert scale.isnan().tolist() == [False, False, False, True, True]
            if symmetric:
                assert not q[1].any()
            if kind == "layer":  # no variance: all values are the bias, whatever the offset
                b = torch.linspace(-1, 1, 70)
                q, scale, _ = fp.ops.norm_quantize(special_rows(dtype), None, 1e-5, torch.int8, kind=kind, bias=b)
                assert_equal(q[1:3], fp.ops.quantize(b.expand(2, 70).contiguous(), torch.int8)[0])
        if dtype is torch.float32:  # the sum of squares overflows
            _, scale, _ = fp.ops.norm_quantize(torch.full((2, 70), 1e20), None, 1e-5, torch.int8)
            assert scale.isnan().all()


# opcheck takes NaN for a difference, and in fp16 the residual's row of extremes overflows
@pytest.mark.every(2)
@pytest.mark.parametrize(
    "case", in_parts([c for c in CASES if c.x_dtype is not torch.float16 or not c.residual][::4], 4)
)
def test_opcheck(case):
    torch.library.opcheck(getattr(torch.ops.forwardpass, f"{case.op}_cpu").default, case.arguments())


def test_compiles_whole():
    x, r, w = torch.randn(9, 33), torch.randn(9, 33), torch.randn(33)

    def f(x, r):
        q, s, z, r = fp.ops.add_norm_quantize(x, r, w, 1e-6, torch.int8, symmetric=False)
        q2, s2, _ = fp.ops.norm_quantize(r, w, 1e-6, torch.int8, kind="layer", bias=w)
        return (q.float() - z[:, None]) * s[:, None] + q2 * s2[:, None] + r

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x, r), f(x, r))


X, W = torch.ones(2, 3), torch.ones(3)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((X.double(), None, 1e-5, torch.int8), {}, TypeError, "float32, float16 or bfloat16, not torch.float64"),
        ((X, None, 1e-5, torch.uint8), {}, TypeError, "torch.int8 or torch.float8_e4m3fn, not torch.uint8"),
        ((X, W.half(), 1e-5, torch.int8), {}, TypeError, "weight must be a tensor of torch.float32, not torch.float16"),
        ((X.half(), W.bfloat16(), 1e-5, torch.int8), {}, TypeError, "torch.float16 or torch.float32, not torch.b"),
        ((X, torch.ones(2), 1e-5, torch.int8), {}, ValueError, "weight must be contiguous with 3 elements"),
        ((X, None, 1e-5, torch.int8), {"kind": "batch"}, ValueError, "'rms' or 'layer', not 'batch'"),
        ((X, None, 1e-5, torch.int8), {"bias": W}, ValueError, "an RMS norm has no bias"),
        ((X, None, 1e-5, torch.int8), {"bias": W.half(), "kind": "layer"}, TypeError, "bias must be a tensor"),
        ((X, None, -1e-5, torch.int8), {}, ValueError, "at least 0"),
        ((X, None, float("nan"), torch.int8), {}, ValueError, "finite"),
        ((X, None, 1e-5, torch.float8_e4m3fn), {"symmetric": False}, ValueError, "symmetric=True"),
        ((X, None, 1e-5, torch.int8), {"channel_scale": torch.ones(2)}, ValueError, "3 elements"),
        ((torch.ones(4, 3).t(), None, 1e-5, torch.int8), {}, ValueError, "contiguous"),
    ],
)
def test_refusals(args, kwargs, error, words):
    for op, call in ((fp.ops.norm_quantize, args), (fp.ops.add_norm_quantize, (args[0], X, *args[1:]))):
        with pytest.raises(error, match=words) as e:
            op(*call, **kwargs)
        assert "\n" not in str(e.value)
        assert str(e.value).startswith(f"{op.__name__}: ")


def test_eps_is_a_number():
    with pytest.raises(TypeError, match="eps must be a number, not Tensor"):
        fp.ops.norm_quantize(X, None, torch.ones(()), torch.int8)


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (torch.ones(3, 3), ValueError, r"shape of x, torch.float32 \(2, 3\), not torch.float32 \(3, 3\)"),
        (X.half(), ValueError, "dtype and shape of x"),
        (torch.ones(3, 2).t(), ValueError, "contiguous"),
        (None, TypeError, "residual must be a tensor, not NoneType"),
        (X.to("meta"), ValueError, "residual is on meta and x on cpu"),
    ],
)
def test_refuses_residual(residual, error, words):
    with pytest.raises(error, match=words):
        fp.ops.add_norm_quantize(X, residual, None, 1e-5, torch.int8)


def test_refuses_grad():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="inference_mode"):
        fp.ops.norm_quantize(X, weight, 1e-5, torch.int8)
    with torch.no_grad():
        fp.ops.norm_quantize(X, weight, 1e-5, torch.int8)
