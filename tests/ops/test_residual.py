"""The residual of the GEMMs' epilogue: what it computes, what is refused. The cases of each operation run it on each backend."""

import pytest
import torch
from every_backend import in_turn_of_triton, running

import forwardpass as fp
from forwardpass.dispatch import operations
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm

BF16 = torch.bfloat16
MODULES = {"int8_gemm": int8_gemm, "fp8_gemm": fp8_gemm, "w8a16_gemm": w8a16_gemm}
M, N, K = 5, 32, 64
ONE = torch.ones(1)
A, B = torch.ones(M, K, dtype=torch.int8), torch.ones(N, K, dtype=torch.int8)
A8, B8 = A.to(E4M3), B.to(E4M3)
X = torch.ones(M, K, dtype=BF16)
#: f(residual, **options) of each operation, of which every product is K
OPERATIONS = {
    "dequant_activation": lambda r, **o: fp.ops.dequant_activation(
        torch.full((M, N), K, dtype=torch.int32), ONE, ONE, residual=r, **{"out_dtype": BF16, **o}
    ),
    "int8_gemm": lambda r, **o: fp.ops.int8_gemm(A, B, ONE, ONE, residual=r, **{"out_dtype": BF16, **o}),
    "int8_linear": lambda r, **o: fp.ops.int8_linear(X, B, ONE, residual=r, **o),
    "fp8_gemm": lambda r, **o: fp.ops.fp8_gemm(A8, B8, ONE, ONE, residual=r, **{"out_dtype": BF16, **o}),
    "fp8_linear": lambda r, **o: fp.ops.fp8_linear(X, B8, ONE, residual=r, **o),
    "w8a16_gemm": lambda r, **o: fp.ops.w8a16_gemm(X, B, ONE, residual=r, **o),
}
NO_CPU = ("fp8_gemm", "fp8_linear")


def runs():
    for name in OPERATIONS:
        for param in in_turn_of_triton():
            backend, arch = param.values
            if name in NO_CPU and (backend == "cpu" or arch == "sm_80"):
                continue
            yield pytest.param(name, backend, arch, marks=param.marks)


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "backend", "arch"), list(runs()))
def test_it_is_added_before_the_one_rounding(name, backend, arch):
    """64 + 0.375 is 64.375, of which bfloat16 has 64.5; the product alone and 63.625 + 0.375 are exact. Each row has its own,
    and a row's columns too, so that none is another's."""
    r = torch.arange(M * N).reshape(M, N) % 8 / 8 + torch.arange(M)[:, None] * 16
    apart = torch.full((M, N + 8), torch.nan)
    apart[:, :N] = r
    with running(backend, arch):
        for residual in (r.to(BF16), apart.to(BF16)[:, :N], r[3].to(BF16).expand(M, N)):
            before = residual.clone()
            y = OPERATIONS[name](residual, bias=torch.full((N,), 0.1))
            assert torch.equal(residual, before)
            # within a rounding of bfloat16; sums of quantised inputs are a few ulps of fp32 off
            torch.testing.assert_close(y.double(), K + 0.1 + residual.double(), rtol=2.0**-8, atol=0)


@pytest.mark.every(2)
@pytest.mark.parametrize("activation", ["relu", "silu_mul"])
@pytest.mark.parametrize(("name", "backend", "arch"), [r for r in runs() if r[1] != "triton"])
def test_it_is_added_behind_the_activation(name, backend, arch, activation):
    columns = N // 2 if activation == "silu_mul" else N
    r = torch.full((M, columns), -8.0, dtype=BF16)
    with running(backend, arch):
        y = OPERATIONS[name](r, activation=activation)
    expected = K * K - 8 if activation == "silu_mul" else K - 8
    torch.testing.assert_close(y.double(), torch.full((M, columns), float(expected)).double(), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_refusals(name):
    def refused(error, match, residual, **options):
        with pytest.raises(error, match=f"{name}: residual {match}"):
            OPERATIONS[name](residual, **options)

    good = torch.zeros(M, N, dtype=BF16)
    refused(TypeError, "must be a tensor of torch.bfloat16, as the output is, not torch.float32", good.float())
    refused(TypeError, "must be a tensor of torch.bfloat16, as the output is, not int", 1)
    refused(ValueError, r"must have the output's shape, \[5, 32\], and has \[32\]: expand it", good[0])
    refused(ValueError, r"must have the output's shape, \[5, 16\], and has \[5, 32\]", good, activation="silu_mul")
    refused(ValueError, "is on meta and the input on cpu", good.to("meta"))
    with pytest.raises(ValueError, match="last dimension of residual must have stride 1"):
        OPERATIONS[name](good.t().contiguous().t())


@pytest.mark.parametrize("name", ["dequant_activation", "int8_gemm", "fp8_gemm"])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_eight_bit_outputs_have_none(name, dtype):
    with pytest.raises(ValueError, match="residual goes with out_dtype float32, float16 or bfloat16"):
        OPERATIONS[name](torch.zeros(M, N), out_dtype=dtype, out_scale=ONE)


@pytest.mark.parametrize("name", ["int8_grouped_gemm", "fp8_grouped_gemm", "w8a16_grouped_gemm", "fp8_gemm_quantize"])
def test_others_have_no_such_argument(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'residual'"):
        getattr(fp.ops, name)(residual=torch.zeros(1))


def test_an_empty_output_takes_an_empty_residual():
    for shape in ((0, N), (2, 0, N)):
        a, r = torch.empty((*shape[:-1], K), dtype=torch.int8), torch.empty(shape)
        assert fp.ops.int8_gemm(a, B, ONE, ONE, out_dtype=torch.float32, residual=r).shape == shape


def test_a_graph_has_it():
    r = torch.randn(M, N)

    def f(residual):
        return fp.ops.int8_gemm(A, B, ONE, ONE, out_dtype=torch.float32, residual=residual) * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(r), (K + r) * 2)
    y = fp.ops.int8_gemm(*(t.to("meta") for t in (A, B, ONE, ONE)), out_dtype=BF16, residual=r.to("meta", BF16))
    assert (y.shape, y.dtype) == ((M, N), BF16)


#: (operation, architecture, rows): of each way in which a kernel of CUDA makes outputs, and of split-K
LAYOUTS = [
    ("int8_gemm", "sm_80", 130), ("int8_gemm", "sm_90a", 130), ("int8_gemm", "sm_90a", 20), ("fp8_gemm", "sm_89", 130),
    ("fp8_gemm", "sm_90a", 130), ("w8a16_gemm", "sm_80", 70), ("w8a16_gemm", "sm_90a", 20), ("w8a16_gemm", "sm_90a", 60),
    ("w8a16_gemm", "sm_90a", 130), ("w8a16_gemm", "sm_90a", 520), ("int8_gemm", "sm_80", 3),
]  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.interpreted
@pytest.mark.parametrize("activation", [None, "silu_mul"])
@pytest.mark.parametrize(("name", "arch", "m"), LAYOUTS)
def test_every_layout_adds_it(name, arch, m, activation):
    """Aligned to 16 bytes and not; the last tile's rows and columns are beyond the output."""
    cases = MODULES[name]
    for dtype, layout, k in ((BF16, "contiguous", 48), (torch.float16, "aligned", 600), (BF16, "apart", 48)):
        if name == "w8a16_gemm":
            case = cases.Case((m,), 272, k, dtype, activation=activation, residual=layout)
        else:
            case = cases.Case(m, 272, k, EpilogueCase(activation=activation, out_dtype=dtype, residual=layout))
        args = case.arguments()
        with running("cuda", arch, multiprocessors=4):
            cases.assert_matches(operations[name](*args), args)
