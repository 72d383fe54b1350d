"""What one process checks on one tier of the CPU, which is chosen as forwardpass is imported. It prints the tier::

FORWARDPASS_CPU=avx2 python -m cpu_tiers 4 int8_gemm w8a16_gemm    # a quarter of the cases
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys

import torch
import unseen_keys
from processes import by_threads
from rotation import some_of

import forwardpass as fp
from forwardpass.common import environment
from forwardpass.dispatch import operations
from forwardpass.ops.attention import cases as attention_cases
from forwardpass.ops.attention_8bit import cases as attention_8bit_cases
from forwardpass.ops.attention_decode import cases as decode_cases
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.common.rotation import SIZES
from forwardpass.ops.decoder_layer import cases as decoder_cases
from forwardpass.ops.encoder_layer import cases as encoder_cases
from forwardpass.ops.int8_conv2d import cases as conv_cases
from forwardpass.ops.int8_gemm import cases as int8_gemm_cases
from forwardpass.ops.int8_linear import cases as int8_linear_cases
from forwardpass.ops.w8a16_gemm import cases as w8a16_cases
from forwardpass.ops.w8a16_grouped_gemm import cases as grouped_cases
from forwardpass.testing import poisoned_outputs

#: (M, N, K)
SHAPES = [
    (1, 1, 1), (5, 300, 1024), (70, 300, 1024), (130, 17, 4100), (31, 40, 70), (64, 16, 64), (97, 2, 131071), (3, 3, 131071),
    *((m, (1, 4, 19, 34)[m % 4], (63, 65, 577, 130, 16)[m % 5]) for m in (*range(2, 18), 32, 33)),
]  # fmt: skip


def exact_sums(shapes):
    for m, n, k in shapes:
        g = torch.Generator().manual_seed(k)
        a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=g) for rows in (m, n))
        a[0], b[0] = -128, -128  # 2^14 a product, 2^24 in 1024 of them
        as_weights = (torch.randn(n, k, generator=g) * 40).clamp(-127, 127).to(torch.int8)
        for weight in (b, torch.full_like(b, 127), as_weights):
            exact_products(a, weight)


def exact_products(a, b):
    exact, one = (a.long() @ b.long().t()).float(), torch.ones(1)
    got = fp.ops.int8_gemm(a, b, one, one, out_dtype=torch.float32)
    assert torch.equal(got, exact), (a.shape, b.shape)
    if a.shape[1] > 65536:
        return
    static = {"scale": one, "zero_point": torch.zeros(1, dtype=torch.int32), "symmetric": False}
    for packed in (None, fp.ops.pack_int8_weight(b)):
        got = fp.ops.int8_linear(a.float(), b, one, **static, weight_sum=b.sum(1, dtype=torch.int32), packed=packed)
        assert torch.equal(got, exact), (a.shape, b.shape, packed is None)


def check(op, module, cases, seed=lambda case: 0, **how):
    """The operation's own kernels for the CPU, on each case."""
    for case in cases:
        args = case.arguments(seed=seed(case))
        with poisoned_outputs():
            got = getattr(torch.ops.forwardpass, f"{getattr(case, 'op', op)}_cpu")(*args)
        try:
            module.assert_matches(got, args, **how)
        except AssertionError as e:
            raise AssertionError(str(case)) from e


def int8_gemm(parts):
    exact_sums(SHAPES)
    check("int8_gemm", int8_gemm_cases, some_of(int8_gemm_cases.cases(), parts))
    check("int8_linear", int8_linear_cases, some_of(int8_linear_cases.cases(), parts))


def int8_conv2d(parts):
    check("int8_conv2d", conv_cases, some_of(conv_cases.cases(), parts))
    check("int8_conv2d", conv_cases, some_of(conv_cases.depthwise_cases(), parts))


def small_convolutions():
    """Of few multiplications, for instructions that are emulated: in blocks of pixels, and of few pixels."""
    sizes = (((1, 5, 9), 20, 17, (3, 3)), ((2, 4, 3), 7, 3, (2, 1)), ((1, 6, 6), 64, 33, (1, 1)))
    check("int8_conv2d", conv_cases, [conv_cases.Case(images, *rest) for images, *rest in sizes])


def few_rows():
    """Every number of rows by which tiles differ, beside what is left of columns and of K."""
    sizes = itertools.cycle(itertools.product((1, 3, 4, 17, 38, 130), (1, 7, 16, 63, 64, 65, 130, 257, 515, 576)))
    x_dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    layouts = itertools.cycle(("contiguous", "apart", "aligned", "shifted"))
    activations = itertools.cycle((None, None, None, "gelu", "relu"))
    for m, w_dtype, scales in itertools.product(
        (*range(1, 18), 48, 49), (torch.int8, E4M3), ("column", "tensor", "block")
    ):
        n, k = next(sizes)
        yield w8a16_cases.Case(
            (m,), n, k, next(x_dtypes), w_dtype, scales, m % 2 == 0, next(activations), next(layouts)
        )


def w8a16_gemm(parts):
    check("w8a16_gemm", w8a16_cases, some_of(few_rows(), parts), seed=lambda case: case.lead[0])


def w8a16_grouped_gemm(parts):
    check("w8a16_grouped_gemm", grouped_cases, some_of(grouped_cases.cases(), parts))


def attention(parts):
    """AVX-512 without VNNI: bfloat16 is multiplied as floats, not in pairs."""
    own = [case for case in attention_cases.cases() if case.softcap == 0 and case.dims == (64, 64)]
    for case in some_of(own, parts):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            args = dataclasses.replace(case, dtype=dtype).arguments()
            with fp.use_backend("cpu"):
                attention_cases.assert_matches(operations[case.op](*args), args, lse_bound=1e-3)
    if environment.cpu_tier() != "baseline":  # where attention is torch's
        unseen_keys.attention()


def attention_decode(parts):
    """Every number of rows that is multiplied at a time, without pairs of bfloat16."""
    heads = itertools.cycle(((2, 2), (4, 2), (3, 1), (7, 1), (10, 1), (17, 1)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for cache in (None, torch.int8, E4M3, None, torch.int8):
            h = next(heads)
            softcap = 8.0 if h[1] == 1 else 0.0
            case = decode_cases.Case((0, 1, 15, 70), 1, 40, h, dtype, cache, softcap=softcap, window=66)
            args = case.arguments()
            with fp.use_backend("cpu"):
                decode_cases.assert_matches(operations["attention_decode"](*args), args)

    rows_alone()
    unseen_keys.attention_decode()


def rows_alone():
    """A row's bits are those of the row by itself, with however many rows it is computed: a decoder's threads share a prompt."""
    for dtype, cache in ((torch.float32, None), (torch.float32, torch.int8), (torch.bfloat16, E4M3)):
        case = decode_cases.Case((300,), 7, 40, (3, 1), dtype, cache, page=None)
        with fp.use_backend("cpu"):
            q, k, v, seq_lens, *rest = case.arguments()
            together = operations["attention_decode"](q, k, v, seq_lens, *rest)
            for first, last in ((0, 1), (1, 3), (3, 4), (4, 7)):
                part = (q[:, first:last].contiguous(), k, v, seq_lens - (case.rows - last), *rest)
                got = operations["attention_decode"](*part)
                assert torch.equal(got, together[:, first:last]), (dtype, cache, first, last)


def attention_8bit(parts):
    """Each tier has products of bytes of its own."""
    for case in some_of(attention_8bit_cases.cases(), 2 * parts):
        args = case.arguments()
        with poisoned_outputs(), fp.use_backend("cpu"):
            attention_8bit_cases.assert_matches(operations[case.op](*args), args)
    n = 64
    q, k = torch.full((1, 3, 1, 256), -127.0), torch.full((1, n, 1, 256), 127.0)
    k[:, : n // 2] = -127  # whose mean is 0
    mask = torch.eye(n, dtype=torch.bool).reshape(n, 1, 1, n)
    q, k = (x.expand(n, -1, -1, -1) for x in (q, k))
    _, lse = fp.ops.attention_8bit_with_lse(q, k, k, rotate=False, scale=1.0, mask=mask)
    sign = torch.where(torch.arange(n) < n // 2, 1.0, -1.0).reshape(n, 1, 1)
    torch.testing.assert_close(lse, sign.expand(n, 1, 3) * 127.0**2 * 256, rtol=1e-6, atol=0)


def print_attention_8bit():
    """The tier, and for each of a few calls, which are few instructions to emulate, a digest of what it returns."""
    print(environment.cpu_tier())
    calls = (
        ((20, 70), (40, 24), {"causal": True}),
        ((70, 70), (64, 64), {"causal": True, "heads": (6, 2)}),  # rows see fewer keys than those of the tile before
        ((33, 130), (64, 64), {"window": (40, 10), "softcap": 8.0}),
        ((17, 64), (128, 80), {"mask": "float32 bhij", "rotates": False}),
        ((5, 200), (84, 96), {"packed": True, "sinks": "float32"}),
        ((20, 70), (40, 24), {"alibi": "h", "causal": True}),
    )
    for shape, dims, given in calls:
        case = attention_8bit_cases.Case(
            shape, dims, torch.float32, **{"batch": 1, "heads": (2, 1), "lse": True, **given}
        )
        args = case.arguments()
        with poisoned_outputs(), fp.use_backend("cpu"):
            got = operations[case.op](*args)
        attention_8bit_cases.assert_matches(got, args)
        print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in got)).hexdigest())


def encoder_layer(parts):
    check("encoder_layer", encoder_cases, some_of(encoder_cases.cases(), parts))
    encoder_by_threads(encoder_cases.THREADED_CASES)


def encoder_by_threads(cases):
    for case in cases:
        args = case.arguments()
        first, *others = by_threads(lambda: torch.ops.forwardpass.encoder_layer_cpu(*args))  # noqa: B023
        assert all(torch.equal(y, first) for y in others), case


def decoder_layer_of(args):
    """The result, and the arguments with the caches that it changed."""
    changed = decoder_cases.copied(args)
    with poisoned_outputs():
        return operations["decoder_layer"].runs["cpu"](*changed), changed


def decoder_layer(parts):
    for case in some_of(decoder_cases.cases(), parts):
        args = case.arguments()
        try:
            decoder_cases.assert_matches(*decoder_layer_of(args), args)
        except AssertionError as e:
            raise AssertionError(str(case)) from e
    decoder_by_threads(decoder_cases.THREADED_CASES)
    unseen_keys.decoder_layer()


def decoder_by_threads(cases):
    for case in cases:
        args = case.arguments()
        results = [[y, *after[1], *after[2]] for y, after in by_threads(lambda: decoder_layer_of(args))]  # noqa: B023
        for got in results:
            assert all(map(torch.equal, got, results[0])), case


def few_rows_by_threads():
    """Layers of few instructions, where these are emulated."""
    encoder_by_threads(encoder_cases.THREADED_CASES[:1])
    decoder_by_threads(decoder_cases.THREADED_CASES[:1])


def rotation(parts):
    """Each width of vectors has lanes of its own; of all the bits are the reference's."""
    quantize = operations["quantize"].runs
    for size, symmetric in itertools.product(SIZES, (True, False)):
        x, channel = torch.randn(5, 3 * size).bfloat16(), torch.rand(3 * size) + 0.25
        args = (x, torch.int8, None, None, None, symmetric, channel, size)
        for got, expected in zip(quantize["cpu"](*args), quantize["reference"](*args)):
            assert torch.equal(got, expected), (size, symmetric)


GEMMS = (int8_gemm, int8_conv2d, encoder_layer, decoder_layer, w8a16_gemm, w8a16_grouped_gemm)
OF_WIDTHS = (attention, attention_8bit, attention_decode, rotation)


def main(parts, *names):
    for name in names:
        globals()[name](int(parts))
    print(environment.cpu_tier())


if __name__ == "__main__":
    main(*sys.argv[1:])
