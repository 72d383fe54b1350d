"""Tensors without elements: every operation on every backend gives what the reference gives, or refuses them as it does."""

import contextlib

import pytest
import torch

import forwardpass as fp
from forwardpass.ops.common.quantized_rows import E4M3, empty_scales
from forwardpass.testing import assert_equal

BACKENDS = [
    ("cpu", None),
    *((name, arch) for name in ("cuda", "triton") for arch in ("sm_80", "sm_89", "sm_90a")),
]
F16, F32, I8, I32 = torch.float16, torch.float32, torch.int8, torch.int32
ONE = torch.ones(1)


def int8(m, n, k):
    return torch.ones(m, k, dtype=I8), torch.ones(n, k, dtype=I8)


def experts(n, k):
    """Two: b, a_scale, b_scale."""
    return torch.ones(2, n, k, dtype=I8), ONE, torch.ones(2, n)


def fp8(m, n, k):
    return torch.ones(m, k).to(E4M3), torch.ones(n, k).to(E4M3)


def blocks(m, n, k):
    a, b = fp8(m, n, k)
    return a, b, empty_scales(a, (m,), -(-k // 128), F32).fill_(1), torch.ones(-(-n // 128), -(-k // 128))


#: of M rows, N columns and K
GEMMS = {
    "int8_gemm": lambda m, n, k: fp.ops.int8_gemm(
        *int8(m, n, k), ONE, torch.ones(n), bias=torch.ones(n), out_dtype=F16
    ),
    "int8_gemm asymmetric": lambda m, n, k: fp.ops.int8_gemm(
        *int8(m, n, k), ONE, ONE, out_dtype=I8, out_scale=ONE, a_zero_point=torch.ones(m, dtype=I32)
    ),
    "int8_gemm gated": lambda m, n, k: fp.ops.int8_gemm(*int8(m, n, k), ONE, ONE, activation="silu_mul", out_dtype=F32),
    "int8_grouped_gemm": lambda m, n, k: fp.ops.int8_grouped_gemm(
        torch.ones(m, k, dtype=I8),
        *experts(n, k),
        torch.tensor([min(m, 1), m], dtype=I32),
        bias=torch.ones(2, n),
        out_dtype=F16,
    ),
    "int8_grouped_gemm of each": lambda m, n, k: fp.ops.int8_grouped_gemm(
        torch.ones(2, m, k, dtype=I8), *experts(n, k), torch.tensor([0, m], dtype=I32), out_dtype=F32
    ),
    "int8_linear": lambda m, n, k: fp.ops.int8_linear(torch.ones(m, k, dtype=F16), int8(m, n, k)[1], torch.ones(n)),
    "fp8_gemm": lambda m, n, k: fp.ops.fp8_gemm(*fp8(m, n, k), ONE, torch.ones(n), out_dtype=F16),
    "fp8_gemm of blocks": lambda m, n, k: fp.ops.fp8_gemm(*blocks(m, n, k), out_dtype=F16),
    "fp8_grouped_gemm": lambda m, n, k: fp.ops.fp8_grouped_gemm(
        fp8(m, n, k)[0],
        torch.ones(2, n, k).to(E4M3),
        ONE,
        torch.ones(2, n),
        torch.tensor([min(m, 1), m], dtype=I32),
        out_dtype=F16,
    ),
    "int8_gemm_quantize": lambda m, n, k: fp.ops.int8_gemm_quantize(*int8(m, n, k), ONE, torch.ones(n)),
    "fp8_gemm_quantize": lambda m, n, k: fp.ops.fp8_gemm_quantize(*fp8(m, n, k), ONE, torch.ones(n)),
    "fp8_gemm_quantize of rows": lambda m, n, k: fp.ops.fp8_gemm_quantize(
        *fp8(m, n, k), ONE, torch.ones(n), group_size=None
    ),
    "fp8_gemm_quantize of blocks": lambda m, n, k: fp.ops.fp8_gemm_quantize(*blocks(m, n, k)),
    "fp8_linear": lambda m, n, k: fp.ops.fp8_linear(torch.ones(m, k, dtype=F16), fp8(m, n, k)[1], torch.ones(n)),
    "w8a16_gemm": lambda m, n, k: fp.ops.w8a16_gemm(
        torch.ones(m, k, dtype=F16), int8(m, n, k)[1], torch.ones(n), bias=torch.ones(n)
    ),
    "w8a16_grouped_gemm": lambda m, n, k: fp.ops.w8a16_grouped_gemm(
        torch.ones(m, k, dtype=F16), int8(m, n, k)[1][None], torch.ones(1, n), torch.full((1,), m, dtype=I32)
    ),
    "w8a16_gemm of blocks": lambda m, n, k: fp.ops.w8a16_gemm(
        torch.ones(m, k, dtype=F16), fp8(m, n, k)[1], torch.ones(n, -(-k // 128))
    ),
}
#: of M rows and K columns
ROWS = {
    "quantize": lambda m, k: fp.ops.quantize(torch.ones(m, k, dtype=F16), I8, symmetric=False),
    "quantize in groups": lambda m, k: fp.ops.quantize(torch.ones(m, k, dtype=F16), E4M3, group_size=128),
    "norm_quantize": lambda m, k: fp.ops.norm_quantize(torch.ones(m, k, dtype=F16), torch.ones(k), 1e-5, I8),
    "add_norm_quantize": lambda m, k: fp.ops.add_norm_quantize(
        torch.ones(m, k, dtype=F16), torch.ones(m, k, dtype=F16), torch.ones(k), 1e-5, I8
    ),
    "activation_quantize": lambda m, k: fp.ops.activation_quantize(torch.ones(m, k, dtype=F16), "silu_mul", I8),
    "permute_quantize": lambda m, k: fp.ops.permute_quantize(
        torch.ones(m, k, dtype=F16), torch.zeros(m, 2, dtype=torch.int64), 4, I8
    ),
    "permute_quantize of no choices": lambda m, k: fp.ops.permute_quantize(
        torch.ones(m, k, dtype=F16), torch.zeros(m, 0, dtype=I32), 4, E4M3
    ),
    "unpermute": lambda m, k: fp.ops.unpermute(
        torch.ones(2 * m, k, dtype=F16), torch.zeros(m, 2, dtype=I32), torch.ones(m, 2)
    ),
    "dequant_activation": lambda m, k: fp.ops.dequant_activation(
        torch.ones(m, k, dtype=I32), ONE, torch.ones(k), out_dtype=F16
    ),
}


def padded(batch, rows, keys, heads, dim):
    q, k, v = (torch.ones(batch, n, heads, dim, dtype=F16) for n in (rows, keys, keys))
    return fp.ops.attention_with_lse(q, k, v, causal=True, sinks=torch.ones(heads))


def packed(batch, rows, keys, heads, dim):
    """Of the first sequence are all rows and keys."""
    q, k, v = (torch.ones(n, heads, dim, dtype=F16) for n in (rows, keys, keys))
    starts = [torch.tensor([0, *[n] * batch], dtype=I32) for n in (rows, keys)]
    return fp.ops.attention_with_lse(q, k, v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])


CALLS = {
    **{f"{name} {sizes}": (f, sizes) for name, f in GEMMS.items()
       for sizes in ((0, 16, 32), (3, 0, 32), (200, 0, 300), (3, 16, 0), (0, 0, 32), (0, 0, 0))},
    **{f"{name} {sizes}": (f, sizes) for name, f in ROWS.items() for sizes in ((0, 16), (3, 0), (0, 0))},
    **{f"{f.__name__} attention {sizes}": (f, sizes) for f in (padded, packed)
       for sizes in ((0, 5, 5, 2, 64), (2, 0, 5, 2, 64), (2, 5, 0, 2, 64), (2, 0, 0, 2, 64), (2, 5, 5, 0, 64), (2, 5, 5, 2, 0))
       if f is padded or sizes[0]},
    "packed attention of no sequence": (packed, (0, 0, 0, 2, 64)),
}  # fmt: skip


def outcome(call, sizes, backend, arch=None):
    """What is returned, or the refusal's type and words; None where the backend has no such operation."""
    with fp.interpret(arch) if arch else contextlib.nullcontext() as device, fp.use_backend(backend):
        try:
            got = call(*sizes)
        except fp.Unsupported:
            return None
        except (ValueError, TypeError) as e:
            return type(e), str(e)
    assert device is None or device.findings == []
    return got if isinstance(got, tuple) else (got,)


@pytest.mark.every(3)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("call", "sizes"), CALLS.values(), ids=CALLS)
def test_all_backends_agree(call, sizes):
    expected = outcome(call, sizes, "reference")
    for backend, arch in BACKENDS:
        got = outcome(call, sizes, backend, arch)
        if got is None:
            continue
        what = f"{backend} {arch or ''}"
        if not isinstance(expected[0], torch.Tensor):
            assert got == expected, what
            continue
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b, what)
