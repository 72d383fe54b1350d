"""The gate of adaLN-Zero in the epilogue of the products, `ada_gate[b] * y + residual`: what it computes, what is refused."""

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

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MODULES = {"int8_gemm": int8_gemm, "fp8_gemm": fp8_gemm, "w8a16_gemm": w8a16_gemm}
B, T, N, K = 3, 5, 48, 64
ONE = torch.ones(1)
G = torch.Generator().manual_seed(0)
X = torch.randn(B, T, K, generator=G)
A, A_SCALE, _ = fp.ops.quantize(X, torch.int8)
W, W_SCALE, _ = fp.ops.quantize(torch.randn(N, K, generator=G), torch.int8)
A8, A8_SCALE, _ = fp.ops.quantize(X, E4M3)
W8, W8_SCALE, _ = fp.ops.quantize(torch.randn(N, K, generator=G), E4M3)
ACC = (A.double() @ W.double().t()).to(torch.int32)
#: f(dtype of x and of the output, **options)
OPERATIONS = {
    "dequant_activation": lambda d, **o: fp.ops.dequant_activation(ACC, A_SCALE, W_SCALE, out_dtype=d, **o),
    "int8_gemm": lambda d, **o: fp.ops.int8_gemm(A, W, A_SCALE, W_SCALE, out_dtype=d, **o),
    "int8_linear": lambda d, **o: fp.ops.int8_linear(X, W, W_SCALE, out_dtype=d, **o),
    "fp8_gemm": lambda d, **o: fp.ops.fp8_gemm(A8, W8, A8_SCALE, W8_SCALE, out_dtype=d, **o),
    "fp8_linear": lambda d, **o: fp.ops.fp8_linear(X, W8, W8_SCALE, out_dtype=d, **o),
    "w8a16_gemm": lambda d, **o: fp.ops.w8a16_gemm(X.to(d), W, W_SCALE, **o),
}
NO_CPU = ("fp8_gemm", "fp8_linear")


def runs():
    for name in OPERATIONS:
        for param in in_turn_of_triton():
            backend, arch = param.values
            if name not in NO_CPU or not (backend == "cpu" or arch == "sm_80"):
                yield pytest.param(name, backend, arch, marks=param.marks)


def parts(dtype):
    """A residual, and gates in the layouts that models have: columns of a tensor, alone, one for all, at an odd address."""
    g = torch.Generator().manual_seed(1)
    r = torch.randn(B, T, N, generator=g).to(dtype)
    six = torch.randn(B, 6 * N, generator=g).to(dtype)
    odd = torch.full((B, N + 3), torch.nan, dtype=dtype)
    odd[:, 1 : N + 1] = six[:, :N]
    return r, (six.chunk(6, 1)[2], six[:, :N].contiguous(), six[:1, :N].expand(B, N), odd[:, 1 : N + 1])


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "backend", "arch"), list(runs()))
def test_each_step_is_rounded_to_float32_once(name, backend, arch):
    """As float32 outputs of the same backend, times the gate, plus the residual; of w8a16_gemm, whose outputs are of x's dtype,
    within a rounding. A gate of ones changes no bit."""
    bias = torch.linspace(-1, 1, N)
    with running(backend, arch):
        for dtype in (BF16, F32) if name != "w8a16_gemm" or backend in ("cpu", "reference") else (BF16, F16):
            r, gates = parts(dtype)
            y = OPERATIONS[name](F32 if name != "w8a16_gemm" else dtype, bias=bias)
            for gate in gates:
                got = OPERATIONS[name](dtype, bias=bias, residual=r, ada_gate=gate)
                expected = (y.float() * gate.float()[:, None] + r.float()).to(dtype)
                assert got.dtype == dtype and got.is_contiguous()
                if name == "w8a16_gemm":
                    off = {BF16: 2.0**-7, F16: 2.0**-10, F32: 1e-5}[dtype]
                    torch.testing.assert_close(
                        got, expected, rtol=off, atol=off * float(y.abs().max() * gate.abs().max())
                    )
                else:
                    assert torch.equal(got, expected)
            plain = OPERATIONS[name](dtype, bias=bias, residual=r)
            assert torch.equal(
                OPERATIONS[name](dtype, bias=bias, residual=r, ada_gate=torch.ones_like(gates[1])), plain
            )


@pytest.mark.parametrize("activation", ["relu", "silu_mul"])
@pytest.mark.parametrize(("name", "backend", "arch"), [r for r in runs() if r.values[1] != "triton"])
def test_it_follows_the_activation(name, backend, arch, activation):
    n = N // 2 if activation == "silu_mul" else N
    r, gates = parts(BF16)
    r, gate = r[..., :n], gates[0][:, :n]
    with running(backend, arch):
        y = OPERATIONS[name](BF16, activation=activation).float()
        got = OPERATIONS[name](BF16, activation=activation, residual=r, ada_gate=gate)
    expected = y * gate.float()[:, None] + r.float()
    torch.testing.assert_close(
        got.float(), expected, rtol=2.0**-7, atol=2.0**-7 * float(y.abs().max() * gate.abs().max())
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_refusals(name):
    r, (gate, *_) = parts(BF16)

    def refused(error, match, ada_gate, residual=r, **options):
        with pytest.raises(error, match=f"{name}: ada_gate {match}"):
            OPERATIONS[name](BF16, residual=residual, ada_gate=ada_gate, **options)

    refused(ValueError, r"goes with a residual, as ada_gate \* y \+ residual", gate, residual=None)
    refused(TypeError, "must be a tensor of torch.bfloat16, as the output is, not torch.float32", gate.float())
    refused(TypeError, "must be a tensor of torch.bfloat16, as the output is, not float", 1.0)
    refused(
        ValueError, r"must be \[B, N\], \[3, 48\] for an output \[3, 5, 48\], and has shape \[48\]: expand", gate[0]
    )
    refused(ValueError, r"must be \[B, N\], \[3, 48\].*has shape \[3, 1, 48\]", gate[:, None])
    refused(ValueError, r"must be \[B, N\], \[3, 24\]", gate, residual=r[..., :24].contiguous(), activation="silu_mul")
    refused(ValueError, "is on meta and the input on cpu", gate.to("meta"))
    with pytest.raises(ValueError, match="last dimension of ada_gate must have stride 1"):
        OPERATIONS[name](BF16, residual=r, ada_gate=gate.t().contiguous().t())


def test_an_output_without_samples_is_refused():
    r = torch.zeros(N)
    with pytest.raises(
        ValueError, match=r"ada_gate is one row a sample of an output \[B, ..., N\], and this is \[48\]"
    ):
        fp.ops.int8_gemm(A[0, 0], W, ONE, ONE, out_dtype=F32, residual=r, ada_gate=r[None])


@pytest.mark.parametrize(
    "name", ["int8_conv2d", "int8_grouped_gemm", "fp8_grouped_gemm", "w8a16_grouped_gemm", "int8_gemm_quantize"]
)
def test_others_have_no_such_argument(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'ada_gate'"):
        getattr(fp.ops, name)(ada_gate=torch.zeros(1))


def test_empty_outputs():
    for shape in ((0, 4, N), (2, 0, N)):
        a, r, gate = torch.empty((*shape[:-1], K), dtype=torch.int8), torch.empty(shape), torch.empty(shape[0], N)
        assert fp.ops.int8_gemm(a, W, ONE, ONE, out_dtype=F32, residual=r, ada_gate=gate).shape == shape


def test_a_graph_has_it():
    r, (gate, *_) = parts(F32)

    def f(residual, gate):
        return fp.ops.int8_linear(X, W, W_SCALE, residual=residual, ada_gate=gate) * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(r, gate), f(r, gate))


@pytest.mark.parametrize("rows", [1, 7, 40, 600])
def test_a_cpu_takes_rows_and_columns_in_parts(rows):
    """More rows than a thread takes at a time, more columns than a block, few rows that read the weight as it is."""
    g = torch.Generator().manual_seed(2)
    x, n = torch.randn(4, rows, K, generator=g), 1040
    w, scale, _ = fp.ops.quantize(torch.randn(n, K, generator=g), torch.int8)
    r, gate = torch.randn(4, rows, n, generator=g), torch.randn(4, n, generator=g)
    y = fp.ops.int8_linear(x, w, scale)
    assert torch.equal(fp.ops.int8_linear(x, w, scale, residual=r, ada_gate=gate), y * gate[:, None] + r)


#: (operation, architecture, rows of each of two samples): of each way in which a kernel of CUDA makes outputs, and of split-K
LAYOUTS = [
    ("int8_gemm", "sm_80", 65), ("int8_gemm", "sm_90a", 65), ("int8_gemm", "sm_90a", 10), ("fp8_gemm", "sm_89", 65),
    ("fp8_gemm", "sm_90a", 65), ("w8a16_gemm", "sm_80", 35), ("w8a16_gemm", "sm_90a", 30), ("w8a16_gemm", "sm_90a", 260),
    ("int8_gemm", "sm_80", 2),
]  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.interpreted
@pytest.mark.parametrize("activation", [None, "silu_mul"])
@pytest.mark.parametrize(("name", "arch", "m"), LAYOUTS)
def test_every_layout_multiplies_by_it(name, arch, m, activation):
    """Aligned to 16 bytes and not; samples end within a tile, and the last tile's rows and columns are beyond the output."""
    cases = MODULES[name]
    for dtype, layout, k in ((BF16, "contiguous", 48), (F16, "aligned", 600), (BF16, "apart", 48)):
        if name == "w8a16_gemm":
            case = cases.Case((2, m), 272, k, dtype, activation=activation, residual=layout, ada_gate=True)
        else:
            options = EpilogueCase(activation=activation, out_dtype=dtype, residual=layout, ada_gate=True)
            case = cases.Case(2 * m, 272, k, options)
        args = case.arguments()
        assert args[-1].shape[0] == 2
        with running("cuda", arch, multiprocessors=4):
            cases.assert_matches(operations[name](*args), args)
