"""dequant_activation, int8_gemm and int8_linear on the CPU: the reference's bits, and within a bound behind an activation."""

import os

import pytest
import torch
from every_backend import in_turn_of_triton, running
from processes import fork, two_threads
from rotation import in_parts, in_turn, whole

import forwardpass as fp
from forwardpass.ops.dequant_activation import cases as dequant_cases
from forwardpass.ops.int8_gemm import MAX_K, MAX_K_ZERO_POINT
from forwardpass.ops.int8_gemm import cases as gemm_cases
from forwardpass.ops.int8_linear import cases as linear_cases
from forwardpass.testing import assert_equal, poisoned_outputs

OPS = {
    "dequant_activation": dequant_cases,
    "int8_gemm": gemm_cases,
    "int8_linear": linear_cases,
}


@pytest.mark.parametrize(("case", "op"), [whole(cases.cases(), op) for op, cases in OPS.items()])
def test_cpu_against_reference(case, op, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = getattr(torch.ops.forwardpass, f"{getattr(case, 'op', op)}_cpu")(*args)
    OPS[op].assert_matches(got, args)


def test_int8_gemm_by_hand():
    a = torch.tensor([[1, -2, 3]], dtype=torch.int8)
    b = torch.tensor([[4, 5, 6], [-1, 0, 1]], dtype=torch.int8)
    one = torch.ones(1)
    y = fp.ops.int8_gemm(
        a, b, one * 0.5, torch.tensor([1.0, 2.0]), bias=torch.tensor([0.0, 10.0]), out_dtype=torch.float32
    )
    assert y.tolist() == [[6.0, 12.0]]
    z = torch.tensor([1], dtype=torch.int32)
    y = fp.ops.int8_gemm(a, b, one, one, out_dtype=torch.float32, a_zero_point=z)  # b_sum is computed
    assert y.tolist() == [[12.0 - 15.0, 2.0 - 0.0]]


def test_accumulators_are_exact_at_the_greatest_depth():
    k = MAX_K_ZERO_POINT
    a = torch.full((1, k), -128, dtype=torch.int8)
    b = torch.full((2, k), 127, dtype=torch.int8)
    b[1, 1] = -127
    one, z = torch.ones(1), torch.tensor([127], dtype=torch.int32)
    y = fp.ops.int8_gemm(a, b, one, one, out_dtype=torch.float32, a_zero_point=z)
    exact = (a.double() - 127) @ b.double().t()
    assert torch.equal(y, exact.float())


@pytest.mark.parametrize(("backend", "arch"), in_turn_of_triton())
@pytest.mark.parametrize("zero_point", [None, 127])
def test_sums_at_the_greatest_depth(backend, arch, zero_point):
    """Of -128 times -128, and with a zero point -255 times -128: one product more and, without one, int32 wraps."""
    k = MAX_K if zero_point is None else MAX_K_ZERO_POINT
    assert zero_point is not None or (k + 1) * 2**14 == 2**31
    assert k * 255 * 128 < 2**31 or zero_point is None
    a, b, one = torch.full((1, k), -128, dtype=torch.int8), torch.full((2, k), -128, dtype=torch.int8), torch.ones(1)
    z = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    with running(backend, arch):
        y = fp.ops.int8_gemm(a, b, one, one, out_dtype=torch.float32, a_zero_point=z)
        deeper = [torch.nn.functional.pad(x, (0, 1)) for x in (a, b)]
        with pytest.raises(ValueError, match=f"K must be at most {k}"):
            fp.ops.int8_gemm(*deeper, one, one, out_dtype=torch.float32, a_zero_point=z)
    assert y.tolist() == [[float(torch.tensor(k * (128 + (zero_point or 0)) * 128.0))] * 2]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("case", "op"), [p for op, cases in OPS.items() for p in in_parts([*cases.cases()][::9], 5, op)]
)
def test_opcheck(case, op):
    torch.library.opcheck(getattr(torch.ops.forwardpass, f"{getattr(case, 'op', op)}_cpu").default, case.arguments())


@pytest.mark.parametrize("shape", [(1, 40, 70), (70, 300, 130), (600, 2500, 64), (33, 5000, 40)], ids=str)
@pytest.mark.parametrize("zero_point", [False, True])
def test_gemm_quantize_is_gemm_then_quantize(shape, zero_point):
    """Of few rows, which threads share by columns, and of more columns than are multiplied at a time."""
    case = gemm_cases.Case(*shape, dequant_cases.EpilogueCase(zero_point="row" if zero_point else None), quantized=True)
    *shared, a_zero_point, b_sum = case.arguments()
    y = fp.ops.int8_gemm(*shared[:4], bias=shared[4], out_dtype=torch.float32, a_zero_point=a_zero_point, b_sum=b_sum)
    got = fp.ops.int8_gemm_quantize(*shared[:4], bias=shared[4], a_zero_point=a_zero_point, b_sum=b_sum)
    for g, e in zip(got, fp.ops.quantize(y, torch.int8)):
        assert_equal(g, e)
    with fp.use_backend("reference"):
        expected = fp.ops.int8_gemm_quantize(*shared[:4], bias=shared[4], a_zero_point=a_zero_point, b_sum=b_sum)
    for g, e in zip(got, expected):
        assert_equal(g, e)


def test_a_row_of_nan_and_of_zeros_have_scales():
    a, b, one = torch.zeros(40, 16, dtype=torch.int8), torch.ones(9, 16, dtype=torch.int8), torch.ones(1)
    a_scale = torch.ones(40)
    a_scale[1] = torch.nan
    q, scale = fp.ops.int8_gemm_quantize(a, b, a_scale, one)
    assert scale[1].isnan() and not scale[[0, 2, 39]].isnan().any() and (scale[0] > 0)
    assert not q[0].any()


def test_linear_is_quantize_then_gemm():
    x, w = torch.randn(5, 70), torch.randn(9, 70)
    wq, ws, _ = fp.ops.quantize(w, torch.int8)
    weight_sum = wq.sum(1, dtype=torch.int32)
    q, s, z = fp.ops.quantize(x, torch.int8, symmetric=False)
    two = fp.ops.int8_gemm(q, wq, s, ws, out_dtype=torch.float32, a_zero_point=z, b_sum=weight_sum)
    assert torch.equal(fp.ops.int8_linear(x, wq, ws, symmetric=False, weight_sum=weight_sum), two)


def test_bits_do_not_depend_on_the_batch():
    x, w = torch.randn(700, 130), torch.randn(33, 130)
    wq, ws, _ = fp.ops.quantize(w, torch.int8)
    whole = fp.ops.int8_linear(x, wq, ws)
    assert torch.equal(torch.cat([fp.ops.int8_linear(x[:1], wq, ws), fp.ops.int8_linear(x[1:], wq, ws)]), whole)


@pytest.mark.parametrize("activation", [None, "silu_mul"])
def test_bits_do_not_depend_on_the_threads(activation):
    """Which take parts of the columns where there are few rows."""
    x, w, threads = torch.randn(70, 1000), torch.randn(656, 1000), torch.get_num_threads()
    wq, ws, _ = fp.ops.quantize(w, torch.int8)
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(fp.ops.int8_linear(x, wq, ws, activation=activation))
    finally:
        torch.set_num_threads(threads)
    with fp.use_backend("reference"):
        reference = fp.ops.int8_linear(x, wq, ws, activation=activation)
    torch.testing.assert_close(results[0], reference, rtol=0 if activation is None else 1e-5, atol=1e-5)
    assert all(torch.equal(r, results[0]) for r in results)


def test_nan_stays():
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    wq, ws, _ = fp.ops.quantize(torch.randn(9, 64), torch.int8)
    for symmetric in (True, False):
        y = fp.ops.int8_linear(
            x, wq, ws, symmetric=symmetric, weight_sum=None if symmetric else wq.sum(1, dtype=torch.int32)
        )
        assert y.isnan().all(1).tolist() == [False, True, False]


def test_compiles_whole():
    x, w = torch.randn(5, 70), torch.randn(9, 70)
    wq, ws, _ = fp.ops.quantize(w, torch.int8)

    def f(t):
        return fp.ops.int8_linear(t, wq, ws, activation="gelu") * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


TIERS = torch.ops.forwardpass._cpu_tiers().split(",")


@pytest.mark.parametrize("tier", in_turn(["sse", "AVX2", *sorted({"amx", "avx512_vnni"} - set(TIERS))]))
def test_a_tier_that_is_not_there_is_refused(tier):
    limit = {name: value for name, value in os.environ.items() if name == "ATEN_CPU_CAPABILITY"}  # of TIERS
    *_, sentence = fork.run(
        "import forwardpass", env=two_threads({"FORWARDPASS_CPU": tier, **limit})
    ).stderr.splitlines()
    assert sentence == (
        f"ValueError: FORWARDPASS_CPU is one of {', '.join(TIERS)} here, not {tier!r}: unset it for the last of them"
    )


X, W, ONE = torch.ones(2, 32), torch.ones(16, 32, dtype=torch.int8), torch.ones(1)
SUM, ZERO = torch.ones(16, dtype=torch.int32), torch.ones(1, dtype=torch.int32)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fp.ops.int8_linear(X, W.float(), ONE), TypeError, "weight must be an int8 tensor"),
        (lambda: fp.ops.int8_linear(X[:, :31], W, ONE), ValueError, r"must be \[N, 31\]"),
        (lambda: fp.ops.int8_linear(X, W, ONE, symmetric=False), ValueError, "weight_sum"),
        (lambda: fp.ops.int8_linear(X, W, ONE, weight_sum=SUM), ValueError, "weight_sum"),
        (lambda: fp.ops.int8_linear(X, W, ONE, bias=torch.ones(3)), ValueError, "16 elements"),
        (lambda: fp.ops.int8_linear(X, W, ONE, activation="swish"), ValueError, "silu"),
        (lambda: fp.ops.int8_linear(X, W[:10], ONE, activation="silu_mul"), ValueError, "multiple of 16"),
        (lambda: fp.ops.int8_linear(X, W, ONE, out_dtype=torch.int8), TypeError, "int8_gemm"),
        (lambda: fp.ops.int8_linear(X, W, ONE.half()), TypeError, "float32"),
        (lambda: fp.ops.int8_linear(X.to("meta"), W, ONE), ValueError, "is on cpu and x on meta"),
        (lambda: fp.ops.int8_gemm(W, W, ONE, ONE, out_dtype=torch.int8), ValueError, "out_scale"),
        (lambda: fp.ops.int8_gemm(W, W, ONE, ONE, out_dtype=torch.float32, out_scale=ONE), ValueError, "out_scale"),
        (lambda: fp.ops.int8_gemm(W, W, ONE, ONE, out_dtype=torch.float32, b_sum=SUM), ValueError, "a_zero_point"),
        (lambda: fp.ops.int8_gemm(X, W, ONE, ONE, out_dtype=torch.float32), TypeError, "a must be an int8"),
        (lambda: fp.ops.int8_gemm(torch.ones(1, 131072, dtype=torch.int8), torch.ones(1, 131072, dtype=torch.int8), ONE, ONE,
                                  out_dtype=torch.float32), ValueError, "split K"),
        (lambda: fp.ops.dequant_activation(W, ONE, ONE, out_dtype=torch.float32), TypeError, "int32, float32, float16 or bfloat16"),
        (lambda: fp.ops.dequant_activation(X, ONE, ONE, out_dtype=torch.float32, a_zero_point=ZERO, b_sum=SUM),
         ValueError, "int32"),
        (lambda: fp.ops.dequant_activation(W.int(), ONE, ONE, out_dtype=torch.float32, a_zero_point=ZERO), ValueError, "b_sum"),
        (lambda: fp.ops.w8a16_gemm(X, X, ONE), TypeError, "int8 or float8"),
        (lambda: fp.ops.w8a16_gemm(X, W, torch.ones(16, 2)), ValueError, r"\[16, 1\]"),
    ],
)  # fmt: skip
def test_refusals(call, error, words):
    with pytest.raises(error, match=words) as e:
        call()
    assert "\n" not in str(e.value)
