"""fp8_gemm, fp8_gemm_quantize and fp8_linear: the reference, and that the comparison passes and fails what it should."""

import pytest
import torch
from rotation import in_parts, whole
from tensor_cores import tensor_core_product
from triton_version import triton_version

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.activations import interleave_gate_up
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.fp8_gemm import cases as gemm_cases
from forwardpass.ops.fp8_linear import cases as linear_cases
from forwardpass.testing import assert_equal

MODULES = {"fp8_gemm": gemm_cases, "fp8_linear": linear_cases}
CASES = {name: list(module.cases()) for name, module in MODULES.items()}


def operation(name, case):
    return dispatch.operations[getattr(case, "op", name)]


def outputs(result):
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.every(2)
@pytest.mark.parametrize(("case", "name"), [whole(of, name) for name, of in CASES.items()])
def test_reference_is_what_the_comparison_expects(case, name, seed):
    args = case.arguments(seed=seed)
    MODULES[name].assert_matches(operation(name, case)(*args), args)


@pytest.mark.parametrize(("case", "name"), [whole(of, name) for name, of in CASES.items()])
def test_fakes_are_like_what_is_returned(case, name):
    op, args = operation(name, case), case.arguments()
    for real, fake in zip(outputs(op(*args)), outputs(op.fake(*args)), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize(("case", "name"), [p for name, of in CASES.items() for p in in_parts(of[::17], 6, name)])
def test_opcheck(case, name, implementation):
    """Of the schemas and fakes, on meta tensors: it compares its inputs, and torch cannot compare e4m3."""
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in case.arguments()]
    op = getattr(torch.ops.forwardpass, f"{operation(name, case).name}_{implementation}").default
    torch.library.opcheck(op, args)


def e4m3(*rows):
    return torch.tensor(rows, dtype=torch.float32).to(E4M3)


ONE = torch.ones(1)


def test_gemm_by_hand():
    a, b = e4m3([1, -2, 3]), e4m3([4, 5, 6], [-1, 0, 1])
    y = fp.ops.fp8_gemm(
        a, b, ONE / 2, torch.tensor([1.0, 2.0]), bias=torch.tensor([0.0, 10.0]), out_dtype=torch.float32
    )
    assert y.tolist() == [[6.0, 12.0]]
    q, scale = fp.ops.fp8_gemm_quantize(a, b, ONE / 2, torch.tensor([1.0, 2.0]), bias=torch.tensor([0.0, 10.0]))
    assert (q.float() * scale).tolist() == [[6.0, 12.0]]
    y = fp.ops.fp8_gemm(a, b, ONE, ONE, out_dtype=torch.int8, out_scale=ONE * 4, activation="relu")
    assert y.tolist() == [[3, 0]]  # 12 / 4, and 2 / 4, a tie, to even


@pytest.mark.parametrize("gated", [False, True])
def test_blocks_are_products_of_their_own(gated):
    m, n, k = 5, 272, 300
    x, w = torch.randn(m, k), torch.randn(n, k) * 100
    a, a_scale, _ = fp.ops.quantize(x, E4M3, group_size=128)
    halves = [w[: n // 2], w[n // 2 :]] if gated else [w]
    b = [h.to(E4M3) for h in halves]
    b_scale = [torch.rand(-(-len(h) // 128), 3) + 0.5 for h in halves]
    y = []
    for part, s in zip(b, b_scale):
        y.append(torch.zeros(m, len(part), dtype=torch.float64))
        for column in range(len(part)):
            for kb in range(3):
                span = slice(128 * kb, 128 * kb + 128)
                dot = (a[:, span].double() * part[column, span].double()).sum(1)
                y[-1][:, column] += dot * a_scale[:, kb].double() * s[column // 128, kb].double()
    if gated:
        got = fp.ops.fp8_gemm(a, interleave_gate_up(*b), a_scale, torch.stack(b_scale), activation="silu_mul",
                              out_dtype=torch.float32)  # fmt: skip
        expected = torch.nn.functional.silu(y[0]) * y[1]
    else:
        got = fp.ops.fp8_gemm(a, b[0], a_scale, b_scale[0], out_dtype=torch.float32)
        expected = y[0]
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_linear_is_quantize_then_gemm():
    x, w = torch.randn(5, 300), torch.randn(16, 300)
    wq, ws, _ = fp.ops.quantize(w, E4M3)
    blocks, smooth, static = torch.rand(1, 3) / 50, torch.rand(300) + 0.5, ONE / 100
    for weight_scale, options in (
        (ws, {}),
        (ONE / 50, {"channel_scale": smooth}),
        (ws, {"scale": static}),
        (blocks, {}),
    ):
        q, s, _ = fp.ops.quantize(x, E4M3, group_size=128 if weight_scale.dim() == 2 else None, **options)
        two = fp.ops.fp8_gemm(q, wq, s, weight_scale, out_dtype=torch.float32)
        assert torch.equal(fp.ops.fp8_linear(x, wq, weight_scale, **options), two)
        assert (two - x @ w.t()).norm() < 0.9 * two.norm() or weight_scale is not ws


def test_quantize_is_gemm_then_quantize():
    case = gemm_cases.Case(17, 272, 130, quantized=True)
    args = case.arguments()
    y = fp.ops.fp8_gemm(*args[:4], bias=args[4], out_dtype=torch.float32)
    expected = fp.ops.quantize(y, E4M3, group_size=128)
    for got, e in zip(fp.ops.fp8_gemm_quantize(*args[:4], bias=args[4]), expected):
        assert_equal(got, e)
    for got, e in zip(fp.ops.fp8_gemm_quantize(*args[:4], bias=args[4], group_size=None), fp.ops.quantize(y, E4M3)):
        assert_equal(got, e)


@pytest.mark.parametrize("case", [c for c in gemm_cases.PROMOTION_CASES if not c.blocks], ids=str)
def test_same_signs_tell_whether_an_accumulator_is_promoted(case, seed):
    """With block scales there is no other way: each 128 of K are scaled on their own."""
    args = case.arguments(seed=seed)
    a, b, a_scale, b_scale, bias, activation, out_dtype, *_ = args
    assert (bias, activation, out_dtype) == (None, None, torch.float32)
    scale = a_scale[:, None] * b_scale
    y = {promoted: tensor_core_product(a, b, 128 if promoted else None) * scale for promoted in (True, False)}
    gemm_cases.assert_matches(y[True], args, truncating=True)
    with pytest.raises(AssertionError, match="differ"):
        gemm_cases.assert_matches(y[False], args, truncating=True)
    with pytest.raises(AssertionError, match="differ"):  # nor is the truncating one taken for an exact one
        gemm_cases.assert_matches(y[True], args)


def one_column_less(args):
    a = args[0].clone()
    a[..., -1] = 0
    return (a, *args[1:])


def next_scale(args):
    return (*args[:3], args[3].roll(1, -1), *args[4:])


def last_row_off(args):
    a_scale = args[2].clone()
    a_scale[-1] *= 1.01
    return (*args[:2], a_scale, *args[3:])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("fault", [one_column_less, next_scale, last_row_off], ids=lambda f: f.__name__)
def test_comparison_fails_on_a_fault(fault, quantized):
    for blocks in (False, True):
        case = gemm_cases.Case(65, 130, 257, blocks=blocks, quantized=quantized)
        args = case.arguments()
        if fault is last_row_off and blocks:
            continue
        with pytest.raises(AssertionError, match=r"differ|not below"):
            gemm_cases.assert_matches(operation("fp8_gemm", case)(*fault(args)), args)


def test_a_wrong_row_does_not_hide_behind_a_larger_one():
    exact = torch.ones(2, 64, dtype=torch.float64)
    exact[0] *= 1e4
    got = exact.clone()
    got[1] *= 1.3
    with pytest.raises(AssertionError, match=r"a row.*not below 1e-5"):
        gemm_cases.assert_rows_close(got, exact, torch.tensor([False, False]))


def test_nan_stays():
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    wq, ws, _ = fp.ops.quantize(torch.randn(9, 64), E4M3)
    assert fp.ops.fp8_linear(x, wq, ws).isnan().all(1).tolist() == [False, True, False]
    q, s, _ = fp.ops.quantize(x, E4M3)
    scale = fp.ops.fp8_gemm_quantize(q, wq, s, ws)[1]
    assert scale.isnan().tolist() == [[False], [True], [False]]


def test_empty_and_meta():
    for shape in ((0, 64), (2, 0, 64)):
        a, w = torch.empty(shape).to(E4M3), torch.ones(32, 64).to(E4M3)
        s = torch.empty(shape[:-1])
        assert fp.ops.fp8_gemm(a, w, s, ONE, out_dtype=torch.float16).shape == (*shape[:-1], 32)
        q, scale = fp.ops.fp8_gemm_quantize(a, w, s, ONE)
        assert (q.shape, scale.shape) == ((*shape[:-1], 32), (*shape[:-1], 1))
        assert fp.ops.fp8_linear(torch.empty(shape), w, ONE, activation="silu_mul").shape == (*shape[:-1], 16)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in gemm_cases.Case(5, 16, 130).arguments()]
    y = fp.ops.fp8_gemm(*meta[:4], out_dtype=torch.bfloat16)
    assert (y.shape, y.device.type) == ((5, 16), "meta")


@pytest.mark.every(2)
def test_compiles_whole():
    torch.compiler.reset()
    x, w = torch.randn(5, 300), torch.randn(16, 300)
    wq, ws, _ = fp.ops.quantize(w, E4M3)

    def f(t):
        y = fp.ops.fp8_linear(t, wq, ws, activation="gelu")
        q, s, _ = fp.ops.quantize(y, E4M3, group_size=128)
        return fp.ops.fp8_gemm_quantize(q, wq[:, :16], s, ONE.reshape(1, 1))[1] * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_refuses_grad():
    wq, ws, _ = fp.ops.quantize(torch.randn(9, 64), E4M3)
    with pytest.raises(RuntimeError, match="inference_mode"):
        fp.ops.fp8_linear(torch.randn(3, 64, requires_grad=True), wq, ws)


def test_explain_says_what_an_unaligned_operand_costs():
    args = gemm_cases.Case(5, 16, 130, layouts=("apart", "shifted")).arguments()
    table = fp.explain("fp8_gemm", *args[:4], out_dtype=torch.float16)
    assert table.backend == "reference"
    assert table["cpu"].code == "not_written"
    for name in ("cuda", "triton"):
        assert table[name].code == ("device" if name in gemm_cases.FP8_GEMM.compiled else "not_written")
    assert "rows of a 135 bytes apart" in str(table)
    assert "copy it, 720 bytes" in str(table)  # 5 rows of 144
    assert "the first byte of b" in str(table)
    aligned = gemm_cases.Case(5, 16, 130).arguments()
    assert "copy" not in str(fp.explain("fp8_gemm", *aligned[:4], out_dtype=torch.float16))


A, W, SCALES = torch.ones(4, 160).to(E4M3), torch.ones(32, 160).to(E4M3), torch.ones(4)
GROUPS = fp.ops.quantize(torch.ones(4, 160), E4M3, group_size=128)[1]
BLOCKS, X = torch.ones(1, 2), torch.ones(4, 160)
GEMM = {"out_dtype": torch.float32}


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fp.ops.fp8_gemm(X, W, ONE, ONE, **GEMM), TypeError, "a must be a float8_e4m3fn tensor"),
        (lambda: fp.ops.fp8_gemm(A, X, ONE, ONE, **GEMM), TypeError, "b must be a float8_e4m3fn tensor"),
        (lambda: fp.ops.fp8_gemm(A.to(torch.float8_e5m2), W, ONE, ONE, **GEMM), TypeError, "e5m2: see fp.ops.quantize"),
        (lambda: fp.ops.fp8_gemm(A[:, :128], W, ONE, ONE, **GEMM), ValueError, r"b must be \[N, 128\]"),
        (lambda: fp.ops.fp8_gemm(A.t(), W, ONE, ONE, **GEMM), ValueError, "stride 1"),
        (lambda: fp.ops.fp8_gemm(A, W, 1.0, ONE, **GEMM), TypeError, "a_scale must be a float32 tensor"),
        (lambda: fp.ops.fp8_gemm(A, W, ONE, 1.0, **GEMM), TypeError, "b_scale must be a float32 tensor"),
        (lambda: fp.ops.fp8_gemm(A, W, torch.ones(3), ONE, **GEMM), ValueError, "4 elements"),
        (lambda: fp.ops.fp8_gemm(A, W, ONE, torch.ones(31), **GEMM), ValueError, "32 elements"),
        (lambda: fp.ops.fp8_gemm(A, W, GROUPS, ONE, **GEMM), ValueError, "a_scale .* is of groups"),
        (lambda: fp.ops.fp8_gemm(A, W, SCALES, BLOCKS, **GEMM), ValueError, r"a_scale must be \[4, 2\], as b_scale is of blocks"),
        (lambda: fp.ops.fp8_gemm(A, W, torch.ones(4, 2), BLOCKS, **GEMM), ValueError, "rows contiguous and its groups"),
        (lambda: fp.ops.fp8_gemm(A, W, GROUPS.double(), BLOCKS, **GEMM), TypeError, "a_scale must be a float32"),
        (lambda: fp.ops.fp8_gemm(A, W, GROUPS, torch.ones(2, 1), **GEMM), ValueError, r"128 x 128 blocks must be \[1, 2\]"),
        (lambda: fp.ops.fp8_gemm(A, W, GROUPS, torch.ones(2, 1).t(), **GEMM, activation="silu_mul"),
         ValueError, r"must be \[2, 1, 2\]"),
        (lambda: fp.ops.fp8_gemm(A, W, GROUPS, BLOCKS.half(), **GEMM), TypeError, "b_scale must be a tensor of torch.float32"),
        (lambda: fp.ops.fp8_gemm(A, W.to("meta"), ONE, ONE, **GEMM), ValueError, "b is on meta and a on cpu"),
        (lambda: fp.ops.fp8_gemm(A, W, ONE, ONE, **GEMM, activation="swish"), ValueError, "silu"),
        (lambda: fp.ops.fp8_gemm(A, W[:8], ONE, ONE, **GEMM, activation="silu_mul"), ValueError, "multiple of 16"),
        (lambda: fp.ops.fp8_gemm(A, W, ONE, ONE, **GEMM, bias=torch.ones(3)), ValueError, "32 elements"),
        (lambda: fp.ops.fp8_gemm(A, W, ONE, ONE, **GEMM, out_scale=ONE), ValueError, "out_scale"),
        (lambda: fp.ops.fp8_gemm(A, W, ONE, ONE, out_dtype=E4M3), ValueError, "out_scale"),
        (lambda: fp.ops.fp8_gemm(A, W, ONE, ONE, out_dtype=torch.float64), TypeError, "not torch.float64"),
        (lambda: fp.ops.fp8_gemm_quantize(A, W, ONE, ONE, group_size=64), ValueError, "must be 128, or None for rows, not 64"),
        (lambda: fp.ops.fp8_linear(A, W, ONE), TypeError, "x must be float32"),
        (lambda: fp.ops.fp8_linear(X, W, ONE, out_dtype=E4M3), TypeError, "fp8_gemm"),
        (lambda: fp.ops.fp8_linear(X, W, BLOCKS, scale=ONE), ValueError, "static scale goes with"),
        (lambda: fp.ops.fp8_linear(X, W, ONE, scale=torch.ones(4)), ValueError, "1 elements"),
        (lambda: fp.ops.fp8_linear(X, W, ONE, channel_scale=torch.ones(4)), ValueError, "160 elements"),
        (lambda: fp.ops.fp8_linear(X.to("meta"), W, ONE), ValueError, "is on cpu and x on meta"),
    ],
)  # fmt: skip
def test_refusals(call, error, words):
    with pytest.raises(error, match=words) as e:
        call()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("arch", "code"), [("sm_80", "no_fp8"), ("sm_89", None), ("sm_90a", None)])
def test_needs_a_gpu_that_multiplies_fp8(arch, code):
    with fp.interpret(arch):
        table = fp.explain("fp8_gemm", A, W, ONE, ONE, **GEMM)
        for name in ("cuda", "triton"):
            expected = code if name in gemm_cases.FP8_GEMM.compiled else "not_written"
            assert (table[name] and table[name].code) == expected
        if code:
            assert table.backend == "reference"
        if code and "cuda" in gemm_cases.FP8_GEMM.compiled:
            with fp.use_backend("cuda"), pytest.raises(fp.Unsupported, match=r'sm_89.*precision="int8"'):
                fp.ops.fp8_gemm(A, W, ONE, ONE, **GEMM)


@pytest.mark.every(2)
@pytest.mark.skipif(
    triton_version() == "3.6",
    reason="Triton 3.6 gives tcgen05.commit an offset in shared memory where the ISA has a generic address",
)
def test_of_a_b200_it_is_tritons(monkeypatch):
    """PTX for sm_90 runs there with FP8's mma.sync emulated; Triton compiles tcgen05."""
    with fp.interpret("sm_100a"):
        monkeypatch.setitem(dispatch.interpreter()._why_not, "cuda", None)  # as on the card itself
        table = fp.explain("fp8_gemm", A, W, ONE, ONE, **GEMM)
        assert table["cuda"].code == "emulated_fp8" and "slower than bf16" in str(table["cuda"])
        assert table.backend == "triton"
        assert fp.nn.Fp8Linear.why_not(torch.nn.Linear(64, 64)) is None
        for op in ("fp8_linear", "fp8_grouped_gemm", "fp8_gemm_quantize"):
            assert dispatch.operations[op].why_not_on("cuda", A.device).code == "emulated_fp8"
        got = fp.ops.fp8_gemm(A, W, ONE, ONE, **GEMM)
    gemm_cases.assert_matches(got, (A, W, ONE, ONE, None, None, GEMM["out_dtype"], None))
