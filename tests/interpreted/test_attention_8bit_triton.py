"""attention_8bit in Triton, as compiled: every case of both operations, and the integers they multiply."""

import dataclasses
import math

import mutant_attention
import pytest
import torch
from every_backend import not_in_turn, on_each
from named_options import attention_8bit_arguments
from rotation import whole

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.attention import bucket
from forwardpass.ops.attention import cases as attention
from forwardpass.ops.attention_8bit import cases
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]


def taken(case):
    return case.dtype != torch.float32 and bucket(*case.dims)


def of_few_kernels():
    """attention's, in few kernels; rotated or not by the head dim, as each way is kernels of its own."""
    for case in attention.cases(few_kernels=True):
        yield cases.of_attention(case, case.dims[0] != 96)


CASES = [c for c in of_few_kernels() if taken(c)]
REST = [c for c in cases.cases() if taken(c) and c not in CASES]
REFUSED = [c for c in cases.cases() if not taken(c)]
#: those that take every path of attention's kernels: tiles at edges, maxima that grow, cu_seqlens that are wrong
PATHS = [
    cases.of_attention(case, True)
    for case in (*mutant_attention.plain(torch.float16, 64, 40), *mutant_attention.general(torch.bfloat16, 64, 40))
]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_89", "sm_120")
FP8 = [dataclasses.replace(c, products="fp8") for c in CASES + PATHS]


#: Of the norm. Scores of these cases are small, so that few probabilities move by a step of e4m3: one that is rounded twice fails.
CLOSE = {**cases.CLOSE, "fp8": 1e-3}


def run(arch, op, args, seed=0, guard=True):
    with fp.interpret(arch, seed=seed, guard=guard) as device, fp.use_backend("triton"):
        got = dispatch.operations[op](*args)
    assert device.findings == []
    return got


def with_lse(arch, q, k, v, guard=True, **options):
    """attention_8bit_with_lse by the names of its options."""
    args = attention_8bit_arguments(q, k, v, **options)
    return run(arch, "attention_8bit_with_lse", args, guard=guard), args


def out_of_turn(*architectures):
    """Each of the cases below compiles a kernel, for some seconds."""
    return [arch for arch in architectures if not_in_turn(arch, architectures)]


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        *on_each(ARCHITECTURES, CASES, 160, slow=("sm_89", "sm_120")),
        *on_each(ARCHITECTURES, PATHS, 64, slow=("sm_89", "sm_120", *out_of_turn("sm_80", "sm_90a"))),
        *on_each(("sm_90a", "sm_89", "sm_120"), FP8, 160, slow=("sm_120", *out_of_turn("sm_90a", "sm_89"))),
        *(whole(REST, arch, which="of cuda", marks=[pytest.mark.slow]) for arch in ("sm_80", "sm_90a")),
    ],
)
def test_kernel(case, arch, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(run(arch, case.op, args, seed), args, CLOSE[case.products])


def test_what_no_kernel_takes_is_refused():
    with fp.interpret("sm_80"), fp.use_backend("triton"):
        for case in REFUSED:
            with pytest.raises(fp.Unsupported):
                dispatch.operations[case.op](*case.arguments())
        with pytest.raises(fp.Unsupported, match='use dtype="int8"'):
            dispatch.operations[FP8[0].op](*FP8[0].arguments())


@pytest.mark.every(2)
def test_a_sequence_has_its_bits_whatever_is_beside_it():
    """Each in a batch, packed, and alone; with NaN in a neighbour."""
    lengths = ((130, 300), (1, 257), (5, 0), (127, 127), (66, 191))
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths)]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(int(s[-1]), h, 64, generator=g).half() for s, h in zip((*starts, starts[1]), (4, 2, 2)))
    k[starts[1][1] + 3, 1, 5] = torch.nan
    (o, lse), _ = with_lse("sm_80", q, k, v, causal=True, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    for b in range(len(lengths)):
        rows, keys = (slice(int(s[b]), int(s[b + 1])) for s in starts)
        (alone, alone_lse), _ = with_lse("sm_80", q[None, rows], k[None, keys], v[None, keys], causal=True)
        assert_equal(o[rows], alone[0], f"o of {b}")
        assert_equal(lse[:, rows].contiguous(), alone_lse[0], f"lse of {b}")
        assert bool(o[rows].isnan().any()) == (b == 1)


def test_rows_of_a_sequence_without_keys_are_zero_and_their_sink():
    """Nothing is quantised for it, and what is not written is NaN here."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 64, generator=g).half() for n in (70, 65, 65))
    starts = [torch.tensor(n, dtype=torch.int32) for n in ([0, 67, 70], [0, 65, 65])]
    sinks = torch.tensor([0.5, -1.25])
    (o, lse), args = with_lse("sm_80", q, k, v, sinks=sinks, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    cases.assert_matches((o, lse), args)
    assert not o[67:].any()
    torch.testing.assert_close(lse[:, 67:], sinks[:, None].expand(2, 3))


@pytest.mark.every(3)
def test_sums_of_a_block_are_exact():
    """Products of one sign, 255 * 127 * 64, and 127 * 127 * 256: what an accumulator holds at most."""
    n, d = 64, 256
    q = torch.full((1, 3, 1, d), -127.0).half()
    k = torch.cat([torch.full((1, n // 2, 1, d), x) for x in (-127.0, 127.0)], 1).half()  # whose mean is 0
    v = torch.full((1, n, 1, d), 127.0).half()
    for sign in (1, -1):
        (o, lse), _ = with_lse("sm_80", q, sign * k, sign * v, rotates=False, scale=1e-9)
        assert (o - sign * 127.0).abs().max() < 0.1
        (_, lse), _ = with_lse("sm_80", q, sign * k, v, rotates=False, scale=1.0)
        torch.testing.assert_close(lse, torch.full_like(lse, 127.0**2 * d + math.log(n / 2)), rtol=1e-6, atol=0)


@pytest.mark.every(3)
def test_rows_without_keys():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).half() for n in (200, 150, 150))
    v[0, 149, 1, 3] = torch.nan  # which rows without keys do not see
    sinks = torch.tensor([1.5, -torch.inf])
    for options in (
        {"causal": True},  # the first fifty rows stand before all keys
        {"mask": torch.arange(200).ge(50).reshape(200, 1)},
        {"mask": torch.where(torch.arange(200) < 50, torch.finfo(torch.float32).min, 0.0).reshape(200, 1)},
    ):
        (o, lse), _ = with_lse("sm_80", q, k, v, **options)
        assert not o[:, :50].any() and o[:, 50:].any(-1).all()
        assert lse[:, :, :50].isneginf().all() and lse[:, :, 50:].isfinite().all()
        (o, lse), _ = with_lse("sm_80", q, k, v, sinks=sinks, **options)
        assert not o[:, :50, 0].any() and o[:, 50:].any(-1).all()
        assert lse[0, 0, :50].tolist() == pytest.approx([1.5] * 50) and lse[0, 1, :50].isneginf().all()


def test_large_scores_and_rows_of_zeros():
    """A score far above its sequence's others is one whole probability."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 2, 64, generator=g).half() for _ in range(3))
    q[0, 100] = 0
    k[0, 20, 0] = 0
    for times in (1, 100):
        cases.assert_matches(*with_lse("sm_80", (q * times), (k * times), v, causal=True))
    q, k = (x * 0.01 for x in (q, k))
    cases.assert_matches(*with_lse("sm_80", q, k, v, scale=3e4))


@pytest.mark.every(2)
@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", "int8"), ("sm_90a", "fp8")])
@torch.inference_mode()
def test_scales_of_the_softmax_that_are_far_from_1(arch, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 2, 64, generator=g).bfloat16() for _ in range(3))
    q[0, 7] = 0
    for scale, times in ((1e-38, 2.0**-100), (1e-30, 2.0**50), (1e7, 1.0), (1e7, 2.0**40), (1e30, 1.0)):
        of_k = 50 if scale == 1e-38 else times
        cases.assert_matches(*with_lse(arch, q * times, k * of_k, v, causal=True, scale=scale, dtype=dtype))


@pytest.mark.every(3)
def test_no_probability_is_256_of_255():
    """The byte of 256 would be that of 0. Scores beyond 2^15 have units of 2^-8 and less: what rounds a score once in one place and
    twice in another is then a part of a 255th."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 150, 2, 64, generator=g).half() * 2000 for _ in range(2))
    v = torch.ones(1, 150, 2, 64).half()
    for arch in ("sm_80", "sm_90a"):
        for options in ({}, {"causal": True}, {"alibi_slopes": torch.full((2,), 0.1)}):
            (o, _), _ = with_lse(arch, q, k, v, **options)
            torch.testing.assert_close(o, v, rtol=4e-3, atol=0)


def test_blocks_of_v_of_other_sizes():
    """Each block of 64 keys has its own scale of v."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 64, generator=g).half() for _ in range(3))
    v *= torch.tensor([1, 0.01, 30, 0.1, 3]).repeat_interleave(64)[:300, None, None]
    for options in ({}, {"causal": True}):
        cases.assert_matches(*with_lse("sm_80", q, k, v, **options))


@pytest.mark.every(2)
def test_a_peak_and_a_long_tail():
    """A key whose probability is a thousand times that of each of 4096 others leaves these what they add up to."""
    g = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 1, 64).half()
    q[..., 0] = 8.0
    k = torch.randn(1, 4096, 1, 64, generator=g).half() * 0.01
    k[0, 777, 0, 0] = 7.0  # times 8 and 1/8: e^7 = 1097
    v = torch.ones(1, 4096, 1, 64).half() + torch.randn(1, 4096, 1, 64, generator=g).half() * 0.1
    (o, lse), args = with_lse("sm_90a", q, k, v, rotates=False)
    cases.assert_matches((o, lse), args)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)))
    assert (o.double() - exact.transpose(1, 2)).norm() < 0.02 * exact.norm()


def test_rows_that_are_far_apart():
    """Strides beyond 32 bits: 8 GiB of keys, of which a few rows are ever touched."""
    memory = torch.UntypedStorage(8 * 2**30 + 2**16)
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (1, 65, 1, 64), (0, 2**26, 0, 1))
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 65, 64, generator=g).half().reshape(3, 1, 65, 1, 64)
    expected = with_lse("sm_80", q, k, v)[0][0]
    for n, near in enumerate((q, k, v)):
        far.copy_(near)
        given = [far if i == n else x for i, x in enumerate((q, k, v))]
        assert_equal(with_lse("sm_80", *given, guard=False)[0][0], expected)  # a guard copies all of the memory
