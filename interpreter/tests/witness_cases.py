"""The witnesses' launches, each with what it must give. Importing this needs no Triton: the kernels are an argument."""

import torch

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
M, N, K = 100, 80, 208  # no multiple of a tile; rows of 16 bytes
#: name -> (function of the kernels and a random generator, architectures)
CASES = {}


def case(architectures=ARCHITECTURES):
    """Registers a function of (kernels, random generator): it launches and compares."""

    def register(function):
        CASES[function.__name__] = (function, architectures)
        return function

    return register


def normal(generator, *shape):
    return torch.randn(shape, generator=generator)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_within(y, reference, bound):
    """Element by element; what was never written is NaN and outside of every bound."""
    wrong = ~((y.double() - reference).abs() <= bound)
    at = tuple(wrong.nonzero()[0].tolist()) if wrong.any() else ()
    assert not at, f"{int(wrong.sum())} of {wrong.numel()} differ; at {at}: {y[at]}, not {reference[at]} ± {bound[at]}"


def assert_product(y, a, b, roundoff):
    """a [M, K] · b [K, N] accumulated in fp32: 2^-19 of the sum of |a·b|, and the rounding to the output's type."""
    a, b = a.double(), b.double()
    assert_within(y, a @ b, 2.0**-19 * (a.abs() @ b.abs()) + roundoff * (a @ b).abs())


def launch_matmul(kernel, a, b, c, acc, **tile):
    def grid(meta):
        return -(-M // meta["BM"]), -(-N // meta["BN"])

    kernel[grid](a, b, c, M, N, K, a.stride(0), *b.stride(), c.stride(0), acc, **tile)


TILE = {"BM": 64, "BN": 64, "BK": 64, "num_stages": 3}


@case()
def int8_matmul(kernels, generator):
    a, b = (torch.randint(-128, 128, (n, K), dtype=torch.int8, generator=generator) for n in (M, N))
    c = torch.full((M, N), 7, dtype=torch.int32)
    launch_matmul(kernels.matmul, a, b.T, c, kernels.tl.int32, **TILE)
    assert torch.equal(c, a.int() @ b.int().T)


@case(["sm_89", "sm_90a"])  # Triton refuses e4m3 before sm_89
def fp8_matmul(kernels, generator):
    a, b = (normal(generator, n, K).to(torch.float8_e4m3fn) for n in (M, N))
    c = poisoned(M, N)
    launch_matmul(kernels.matmul, a, b.T, c, kernels.tl.float32, **TILE)
    assert_product(c, a, b.T, 2.0**-23)


@case(["sm_90a"])  # TMA
def fp8_descriptor_matmul(kernels, generator):
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b = (normal(generator, n, K).to(torch.float8_e4m3fn) for n in (M, N))
    c = poisoned(M, N)
    a_desc, b_desc, c_desc = (TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c))
    kernels.descriptor_matmul[-(-M // 64), -(-N // 64)](a_desc, b_desc, c_desc, K, **TILE)
    assert_product(c, a, b.T, 2.0**-23)


@case()
def bf16_matmul(kernels, generator):
    a, b = normal(generator, M, K).bfloat16(), normal(generator, K, N).bfloat16()
    c = poisoned(M, N, dtype=torch.bfloat16)
    launch_matmul(kernels.matmul, a, b, c, kernels.tl.float32, **TILE)
    assert_product(c, a, b, 2.0**-8)


@case(["sm_90a"])  # wgmma with N of 128 and 256, and operands of several swizzled columns
def wide_matmul(kernels, generator):
    for n in (128, 256):
        a, b = normal(generator, 80, 256).bfloat16(), normal(generator, 80, n).bfloat16()
        a = torch.nn.functional.pad(a, (0, 0, 0, 48))  # K of 128, two steps
        b = torch.nn.functional.pad(b, (0, 0, 0, 48))
        c = poisoned(256, n)
        compiled = kernels.transposed_matmul[2, 1](a, b, c, 256, n, 128, BM=128, BN=n, BK=64, num_warps=4, num_stages=2)
        assert f"wgmma.mma_async.sync.aligned.m64n{n}k16" in compiled.asm["ptx"]
        assert_product(c, a.T, b, 2.0**-23)


@case(["sm_90a"])  # TMA
def tile_of_5d(kernels, generator):
    """Tiles that hang over each end of each dimension are filled with zeros, or with NaNs."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, box = (3, 4, 5, 6, 24), (2, 2, 4, 2, 16)
    x = normal(generator, *shape)
    for padding, fill in (("zero", 0.0), ("nan", float("nan"))):
        wide = torch.nn.functional.pad(x, (16, 16) * 5, value=fill)
        descriptor = TensorDescriptor(x, list(shape), list(x.stride()), list(box), padding)
        for at in ((0, 0, 0, 0, 0), (-1, 3, 2, -1, 12), (2, -1, -3, 5, -4), (1, 2, 1, 4, 8)):
            y = torch.full((2 * 2 * 4 * 2 * 16,), 7.0)
            kernels.tile_of_5d[1,](descriptor, y, *at, BLOCK=y.numel())
            expected = wide[tuple(slice(16 + i, 16 + i + n) for i, n in zip(at, box))].reshape(-1)
            assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())


@case()
def autotuned_bf16_matmul(kernels, generator):
    kernel = kernels.autotuned_matmul
    kernel.cache.clear()
    a, b = normal(generator, M, K).bfloat16(), normal(generator, K, N).bfloat16()
    c = poisoned(M, N)
    launch_matmul(kernel, a, b, c, kernels.tl.float32)
    assert_product(c, a, b, 2.0**-23)
    assert kernel.best_config in kernel.configs
    assert len(kernel.configs_timings) == len(kernel.configs)
    assert all(
        0 < t < float("inf") for timings in kernel.configs_timings.values() for t in timings
    )  # inf: it did not run


def causal_attention(kernels, generator, dtype):
    heads, n, d = 2, 144, 64
    q, k, v = (normal(generator, heads, n, d).to(dtype) for _ in range(3))
    o = poisoned(heads, n, d, dtype=dtype)
    kernels.attention[-(-n // 64), heads](q, k, v, o, d**-0.5, n, *q.stride()[:2], D=d, BM=64, BN=64)

    def plain(dtype):
        scores = q.to(dtype) @ k.to(dtype).mT * d**-0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        return (scores.softmax(-1) @ v.to(dtype)).double()

    reference = plain(torch.float64)
    error, of_torch = (o.double() - reference).abs(), (plain(dtype) - reference).abs()
    u = torch.finfo(dtype).eps / 2
    assert error.max() <= 0.5 * of_torch.max() + u * reference.abs().max()
    assert error.mean() <= 0.5 * of_torch.mean() + u * reference.abs().mean() / 2


@case()
def fp16_attention(kernels, generator):
    causal_attention(kernels, generator, torch.float16)


@case()
def bf16_attention(kernels, generator):
    causal_attention(kernels, generator, torch.bfloat16)


@case()
def softmax(kernels, generator):
    x = 4 * normal(generator, 5, 999)
    y = poisoned(5, 999)
    kernels.softmax[(5,)](x, y, 999, 999, BLOCK=1024)
    reference = x.double().softmax(-1)
    assert_within(y, reference, 1e-5 * reference)


@case()
def layer_norm(kernels, generator):
    n = 1100
    x, weight, bias = 3 * normal(generator, 4, n) + 2, normal(generator, n), normal(generator, n)
    y = poisoned(4, n)
    kernels.layer_norm[(4,)](x, y, weight, bias, n, n, 1e-5, BLOCK=512)
    reference = torch.nn.functional.layer_norm(x.double(), (n,), weight.double(), bias.double(), 1e-5)
    assert_within(y, reference, 1e-5 * (1 + reference.abs()))


@case()
def histogram(kernels, generator):
    x = torch.randint(0, 7, (1000,), dtype=torch.int32, generator=generator)  # few bins: lanes collide
    counts = torch.zeros(7, dtype=torch.int32)
    kernels.histogram[(4,)](x, counts, 1000, BLOCK=256)
    assert torch.equal(counts, x.bincount(minlength=7).int())


@case()
def split_k_matmul(kernels, generator):
    a = torch.randint(-8, 9, (64, 256), generator=generator).half()  # whole numbers: the order of the sums is no matter
    b = torch.randint(-8, 9, (256, 64), generator=generator).half()
    c = torch.zeros(64, 64)
    kernels.split_k_matmul[1, 1, 4](a, b, c, 64, 256, BM=64, BN=64, BK=64)
    assert torch.equal(c, a.float() @ b.float())


@case()
def sum_by_the_last(kernels, generator):
    x = torch.randint(-8, 9, (6, 4, 256), generator=generator).float()
    partial, finished, y = poisoned(6, 256), torch.zeros(1, dtype=torch.int32), poisoned(256)
    kernels.sum_by_the_last[(6,)](x, partial, finished, y, BLOCK=256, PROGRAMS=6)
    assert torch.equal(y, x.sum((0, 1)))
