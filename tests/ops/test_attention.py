"""attention, attention_with_lse: every backend on CPU tensors is far closer to fp64 than the same maths in 16 bits."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from rotation import in_parts

import forwardpass as fp
from forwardpass.common import environment
from forwardpass.dispatch import operations
from forwardpass.ops.attention import ATTENTION, bucket, cases, faster_than_torch, reference
from forwardpass.testing import assert_equal, poisoned_outputs

CASES = list(cases.cases())


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


NONE = (None, False, None, None, 0.0, None, None, None, None, None, False)  # all that follows q, k and v


def run(case, args, backend):
    with poisoned_outputs(), fp.use_backend(backend):
        return operations[case.op](*args)


def takes(case, backend):
    return backend == "reference" or (not case.softcap and case.dims[0] == case.dims[1])


@pytest.mark.parametrize("case", in_parts(CASES, 4))
def test_backend(case, backend, seed):
    args = case.arguments(seed=seed)
    if not takes(case, backend):
        with pytest.raises(fp.Unsupported, match="torch's fused attention for CPUs"):
            run(case, args, backend)
        return
    # torch takes an exponential that is wrong by 2^-17 for 16-bit operands
    cases.assert_matches(run(case, args, backend), args, lse_bound=1e-3 if backend == "cpu" else 1e-5)


FLOAT32 = [dataclasses.replace(c, dtype=torch.float32) for c in CASES if takes(c, "cpu") and c.dtype != torch.float32]


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts(FLOAT32, 4))
def test_float32(case, seed):
    """What models on a CPU are in."""
    args = case.arguments(seed=seed)
    cases.assert_matches(run(case, args, "cpu"), args)


@pytest.mark.parametrize("dim", [16, 32, 48, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_head_dims_by_hand(dim, dtype, seed):
    """Odd numbers of keys, of which bfloat16 is multiplied in pairs; and one row."""
    for sizes in ((37, 45), (9, 259), (1, 33)):
        case = cases.Case(
            sizes, (dim, dim), dtype=dtype, heads=(4, 2), causal=True, mask="bool bhij", sinks="dtype", lse=True
        )
        args = case.arguments(seed=seed)
        cases.assert_matches(run(case, args, "cpu"), args, lse_bound=1e-3)


@pytest.mark.skipif(environment.cpu_tier() == "baseline", reason="without AVX2 nothing is by hand")
def test_what_is_by_hand():
    cpu = torch.device("cpu")
    for dim, rows, expected in ((16, 4, True), (128, 4, True), (256, 4, False), (40, 4, False), (64, 3, False)):
        assert faster_than_torch(cpu, torch.float32, dim, rows) == expected
    for dim, rows, expected in ((256, 1, True), (272, 4, False), (8, 4, False)):
        for dtype in (torch.float16, torch.bfloat16):
            assert faster_than_torch(cpu, dtype, dim, rows) == (expected and environment.cpu_tier() != "amx")
    assert not faster_than_torch(cpu, torch.float64, 64, 64)
    assert not faster_than_torch(torch.device("meta"), torch.float32, 64, 64)


@pytest.mark.skipif(environment.cpu_tier() in ("baseline", "amx"), reason="torch's rows depend on others")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_by_hand_do_not_depend_on_others(dtype):
    """Tiles, chunks and blocks of keys are in other places with fewer rows, heads or sequences."""
    q, k, v = (torch.randn(3, n, 2, 64).to(dtype) for n in (700, 1000, 1000))
    for options in ({}, {"causal": True}, {"window": (300, 20)}):
        o, lse = fp.ops.attention_with_lse(q, k, v, **options)
        for b, first in ((0, 0), (1, 1), (2, 695)):
            some, rest = q[b : b + 1, first:], (k[b : b + 1], v[b : b + 1])
            got_o, got_lse = fp.ops.attention_with_lse(some, *rest, **options)
            assert_equal(got_o[0], o[b, first:])
            assert_equal(got_lse[0], lse[b, :, first:].contiguous())


def formula(q, k, v, scale, causal, left, right, softcap, mask, slopes, sinks):
    """A row [D], its place and its head's keys at a time, in floats of Python: the contract word by word."""
    o, lse = (
        torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64),
        torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float64),
    )
    group = q.shape[2] // k.shape[2]
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        place, weights = i + k.shape[1] - q.shape[1], {}
        for j in range(k.shape[1]):
            s = (scale or q.shape[-1] ** -0.5) * float(q[b, i, h].double() @ k[b, j, h // group].double())
            if softcap:
                s = softcap * math.tanh(s / softcap)
            if slopes is not None:
                s -= float(slopes[b, h]) * abs(place - j)
            seen = (not causal or j <= place) and (left is None or j >= place - left)
            seen = seen and (right is None or j <= place + right)
            if mask is not None and mask.dtype == torch.bool:
                seen = seen and bool(mask[b, h, i, j])
            elif mask is not None:
                s += float(mask[b, h, i, j])
            if seen:
                weights[j] = math.exp(s)
        total = sum(weights.values()) + (0 if sinks is None else math.exp(sinks[h]))
        if total:
            lse[b, h, i] = math.log(total)
            o[b, i, h] = (
                sum((w * v[b, j, h // group].double() for j, w in weights.items()), torch.zeros(v.shape[-1])) / total
            )
    return o, lse


@pytest.mark.parametrize("seen", ["all", "causal", "window", "causal window", "bool", "additive"])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 6), (6, 3)])
def test_reference_is_the_formula(sizes, seen):
    g = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, n, h, d, generator=g) for n, h, d in ((sizes[0], 4, 5), (sizes[1], 2, 5), (sizes[1], 2, 3))
    )
    mask = {
        "bool": torch.rand(2, 4, *sizes, generator=g) < 0.6,
        "additive": torch.randn(2, 4, *sizes, generator=g),
    }.get(seen)
    left, right = (2, 1) if "window" in seen else (None, None)
    for scale, softcap, slopes, sinks in (
        (None, 0.0, None, None),
        (0.7, 1.5, torch.rand(2, 4, generator=g), torch.randn(4, generator=g)),
    ):
        args = (scale, "causal" in seen, left, right, softcap, mask, slopes, sinks)
        got = reference.attention_with_lse(q.double(), k.double(), v.double(), *args, None, None, False)
        for name, a, b in zip(("o", "lse"), got, formula(q, k, v, *args)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("sizes", [(4, 4), (3, 6), (6, 3), (1, 5)])
def test_every_window(sizes):
    """On the CPU a window that hides nothing makes no mask."""
    q, k, v = (torch.randn(1, n, 2, 8) for n in (sizes[0], sizes[1], sizes[1]))
    sides = (None, *range(7))
    for window in itertools.product(sides, sides):
        for causal in (False, True):
            got = fp.ops.attention_with_lse(q, k, v, window=window, causal=causal)
            with fp.use_backend("reference"):
                expected = fp.ops.attention_with_lse(q, k, v, window=window, causal=causal)
            torch.testing.assert_close(got, expected, msg=lambda m, w=window, c=causal: f"{w} causal={c}: {m}")


def test_a_large_mask_is_written_in_parts():
    case = cases.Case(
        (1500, 1499), (32, 32), torch.float32, 1, (2, 1), alibi="h", window=(700, 900), sinks="float32", lse=True
    )
    assert 2 * 1500 * 1499 > 2**22
    args = case.arguments()
    cases.assert_matches(run(case, args, "cpu"), args)


def test_reference_is_torchs_attention():
    q, k, v = (torch.randn(2, n, h, 40) for n, h in ((9, 6), (9, 2), (9, 2)))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    for backend in ("cpu", "reference"):
        with fp.use_backend(backend):
            got = fp.ops.attention(q, k, v, causal=True)
        torch.testing.assert_close(got, expected.transpose(1, 2).contiguous())


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_a_batch(backend, causal):
    """And where one of them is NaN, the others have the same bits."""
    lengths = [(3, 7), (0, 4), (5, 5), (2, 0), (6, 2)]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths)]
    q, k, v = (torch.randn(int(s[-1]), h, 16) for s, h in ((starts[0], 4), (starts[1], 2), (starts[1], 2)))
    slopes, sinks = torch.rand(5, 4), torch.randn(4)
    with fp.use_backend(backend):
        o, lse = fp.ops.attention_with_lse(
            q, k, v, causal=causal, alibi_slopes=slopes, sinks=sinks, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1]
        )
        for b in range(5):
            rows, keys = (slice(int(s[b]), int(s[b + 1])) for s in starts)
            alone = fp.ops.attention_with_lse(
                q[None, rows], k[None, keys], v[None, keys], causal=causal, alibi_slopes=slopes[b], sinks=sinks
            )
            assert_equal(o[rows], alone[0][0], f"o of {b}")
            torch.testing.assert_close(lse[:, rows], alone[1][0], rtol=0, atol=0)
        other = [x.clone() for x in (q, k, v)]
        rows, keys = (slice(int(s[2]), int(s[3])) for s in starts)
        for x in other:
            x[rows if x is other[0] else keys] = torch.nan
        spoiled = fp.ops.attention(
            *other, causal=causal, alibi_slopes=slopes, sinks=sinks, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1]
        )
    assert spoiled[rows].isnan().all()
    spoiled[rows] = o[rows]
    assert_equal(spoiled, o)


def test_a_batch_invariant_row_is_that_of_its_own(backend):
    case = cases.Case((113, 203), (40, 40), torch.float32, 3, (4, 2), mask="dtype bij", alibi="bh", sinks="float32", lse=True,
                      batch_invariant=True)  # fmt: skip
    args = case.arguments()
    o, lse = run(case, args, backend)
    cases.assert_matches((o, lse), args)
    for b in range(3):
        own = [a[b : b + 1] if isinstance(a, torch.Tensor) and len(a) == 3 else a for a in args]
        for got, alone in zip((o, lse), run(case, own, backend)):
            assert_equal(got[b : b + 1], alone)


def test_rows_without_keys(backend):
    q, k, v = (torch.randn(1, n, 2, 8) for n in (6, 4, 4))
    sinks = torch.tensor([1.5, -torch.inf])
    with fp.use_backend(backend), poisoned_outputs():
        for options in (
            {"causal": True},  # the first two rows stand before all keys
            {"mask": torch.arange(6).ge(2).reshape(6, 1)},
            {"mask": torch.where(torch.arange(6) < 2, -torch.inf, 0.0).reshape(6, 1)},
            {"mask": torch.where(torch.arange(6) < 2, torch.finfo(torch.float32).min, 0.0).reshape(6, 1)},
            {"mask": torch.where(torch.arange(6) < 2, torch.finfo(torch.bfloat16).min, 0.0).reshape(6, 1)},
        ):
            o, lse = fp.ops.attention_with_lse(q, k, v, **options)
            assert not o[:, :2].any() and o[:, 2:].all()
            assert lse[:, :, :2].isneginf().all() and lse[:, :, 2:].isfinite().all()
            o, lse = fp.ops.attention_with_lse(q, k, v, sinks=sinks, **options)
            assert not o[:, :2].any() and o[:, 2:].all()
            assert lse[0, :, 0].tolist() == lse[0, :, 1].tolist() == sinks.tolist()
        for keys in (0, 4):
            o, lse = fp.ops.attention_with_lse(q[:, :0], k[:, :keys], v[:, :keys])
            assert o.shape == (1, 0, 2, 8) and lse.shape == (1, 2, 0)
        o, lse = fp.ops.attention_with_lse(q, k[:, :0], v[:, :0], sinks=sinks.bfloat16().float())
        assert not o.any() and lse[0, 0].tolist() == [1.5] * 6 and lse[0, 1].isneginf().all()


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 1.5, 0.1, -2.0])], ids=["", "sinks"])
@pytest.mark.parametrize("seen", ["all", "causal", "window", "mask"])
def test_nan_passes_through(backend, seen, sinks):
    window = (0, 0) if seen == "window" else (None, None)
    mask = torch.zeros(5, 5) if seen == "mask" else None
    for at in range(3):
        args = [torch.randn(1, 5, heads, 8) for heads in (4, 2, 2)]
        args[at][0, 3, 1, 2] = torch.nan  # of two heads' key or value
        with fp.use_backend(backend):
            got = fp.ops.attention_with_lse(*args, causal=seen == "causal", window=window, mask=mask, sinks=sinks)
        expected = reference.attention_with_lse(
            *args, None, seen == "causal", *window, 0.0, mask, None, sinks, None, None, False
        )
        # in rows that may not attend to it a NaN of a key or a value is either there or not
        rows = slice(3, 4) if at and seen in ("causal", "window") else slice(None)
        torch.testing.assert_close(got[0][:, rows], expected[0][:, rows], equal_nan=True)
        torch.testing.assert_close(got[1][:, :, rows], expected[1][:, :, rows], equal_nan=True)
        for head in (1,) if at == 0 else (2, 3):
            assert expected[0][0, 3, head, 2].isnan() and expected[1][0, head, 3].isnan() == (at < 2)
        assert not got[0][:, :, 0].isnan().any()


def test_a_lse_of_0_is_one(backend):
    """Which torch gives rows without keys too."""
    q, k, v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), torch.ones(1, 2, 1, 8)
    with fp.use_backend(backend):
        o, lse = fp.ops.attention_with_lse(q, k, v, mask=torch.tensor([[True, False], [False, False]]))
        assert (o[0, :, 0, 0].tolist(), lse[0, 0].tolist()) == ([1, 0], [0, -math.inf])
        assert fp.ops.attention_with_lse(q, k, v, causal=True)[1][0, 0].tolist() == [0, pytest.approx(math.log(2))]


def test_the_bound_can_fail():
    case = cases.Case((113, 203), causal=True, lse=True, dtype=torch.bfloat16)
    args = case.arguments()
    o, lse = run(case, args, "cpu")
    cases.assert_matches((o, lse), args, lse_bound=1e-3)
    torchs, _ = reference.attention_with_lse(*args, dtype=torch.bfloat16)
    spread = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).sign() * 2.0**-7
    for wrong, what in (
        ((torchs, lse), "o: "),  # the scores rounded to 16 bits
        ((o * (1 + spread).bfloat16(), lse), "o: mean error"),  # as if o were rounded to 7 bits
        ((o, lse * (1 + 2e-3)), "lse: "),
        ((o.transpose(1, 2).contiguous().transpose(1, 2), lse), "contiguous"),
        ((o.float(), lse), "o: torch.float32"),
        (run(case, (*args[:4], False, None, 1, *args[7:]), "cpu"), "o: "),  # causal, one to the right
    ):
        with pytest.raises(AssertionError, match=what):
            cases.assert_matches(wrong, args, lse_bound=1e-3)
    case = dataclasses.replace(case, sizes=(203, 113))
    args = case.arguments()
    o, lse = run(case, args, "cpu")
    o[0, 3] = 1e-4
    with pytest.raises(AssertionError, match=r"first at \(0, 3, 0, 0\): got 0.0001"):  # a row without keys
        cases.assert_matches((o, lse), args, lse_bound=1e-3)


def test_every_pair_of_sizes_and_head_dims_is_there():
    pairwise = [c for c in CASES if c.dtype != torch.float32]
    assert {(s, d) for s in cases.SIZES for d in cases.DIMS} <= {(c.sizes, c.dims) for c in pairwise}
    assert {(m, d) for m in cases.MASKS for d in cases.DIMS} <= {(c.mask, c.dims) for c in pairwise}
    assert {(lay, True) for lay in cases.LAYOUTS} <= {(c.layout, c.packed) for c in pairwise}
    assert all(bucket(*d) for d in cases.DIMS)


def test_scores_are_counted():
    case = cases.Case((5, 7), causal=True, window=(2, None), heads=(3, 1), batch=2, dims=(32, 32))
    assert case.scores() == 2 * 3 * 5 * 3
    assert cases.Case((7, 5), causal=True).scores() == 2 * 2 * (1 + 2 + 3 + 4 + 5)
    assert case.flops() == 2 * case.scores() * 64


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts([c for c in CASES if takes(c, "cpu") and not c.packed][::4], 5))
def test_opcheck(case):
    torch.library.opcheck(getattr(torch.ops.forwardpass, f"{case.op}_cpu").default, case.arguments())


def test_opcheck_of_packed_sequences():
    case = cases.Case((9, 33), packed=True, lse=True, awkward=False)
    torch.library.opcheck(torch.ops.forwardpass.attention_with_lse_cpu.default, case.arguments())


@pytest.mark.every(2)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_compiles_whole(backend, dynamic):
    q, k, v, mask = torch.randn(2, 9, 4, 33), torch.randn(2, 12, 2, 33), torch.randn(2, 12, 2, 33), torch.randn(9, 12)

    def f(q, k, v, mask):
        o, lse = fp.ops.attention_with_lse(q, k, v, causal=True, window=(5, None), mask=mask)
        return fp.ops.attention(o, k, v, scale=0.5) + lse.sum()

    with fp.use_backend(backend):
        torch.compiler.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(q, k, v, mask), f(q, k, v, mask), rtol=1e-6, atol=1e-6)


def test_explain():
    q, k = torch.randn(2, 4, 2, 40, dtype=torch.float16), torch.randn(2, 9, 2, 40, dtype=torch.float16)[..., 1:]
    text = str(fp.explain("attention", q[..., 1:], k, k, causal=True))
    assert "strides (720, 80, 40, 1) and the first byte of k are not all multiples of 16 bytes" in text
    assert "the cpu backend writes one" in text
    with fp.interpret("sm_80"):
        table = fp.explain("attention", q[..., 1:], k, k)
        assert table["cuda"].code == table["triton"].code == "head_dim"
        assert "multiples of 8 from 32 to 256, or 192 with 128 of v, not 39 with 39" in str(table)
        assert "head dim 40 runs as 64 in CUDA and Triton kernels: 1.60 times the work" in str(
            fp.explain("attention", q, q, q)
        )
        assert fp.explain("attention", q.float(), q.float(), q.float())["cuda"].code == "dtype"
        assert ATTENTION.why_not("cuda", q.float()).code == "dtype"
    table = fp.explain("attention", q, q, q, softcap=30.0)
    assert (table.backend, table["cpu"].code) == ("reference", "softcap")
    assert fp.explain("attention", q, q, q[..., :32])["cpu"].code == "head_dim"


PADDED = "head dim {} runs as {} in {}: {:.2f} times the work"
BOTH, CUDA, TRITON = "CUDA and Triton kernels", "CUDA kernels with a mask, ALiBi or softcap", "Triton kernels"


@pytest.mark.parametrize(
    ("dims", "plain", "modified"),
    [
        ((64, 64), [], []),
        ((40, 40), [(40, 64, BOTH, 1.6)], [(40, 64, BOTH, 1.6)]),
        ((96, 96), [], [(96, 128, CUDA, 4 / 3)]),
        ((72, 72), [(72, 96, BOTH, 4 / 3)], [(72, 128, CUDA, 16 / 9), (72, 96, TRITON, 4 / 3)]),
        ((192, 192), [], [(192, 256, CUDA, 4 / 3)]),
        ((192, 128), [], [("192 with 128 of v", 256, CUDA, 1.6)]),
        ((320, 320), [], []),
    ],
    ids=str,
)
def test_explain_says_in_which_kernel_a_head_dim_runs(dims, plain, modified):
    """Score modifiers have CUDA kernels of three head dims; Triton compiles what is called."""
    q, v = (torch.zeros(1, 4, 2, d, dtype=torch.float16) for d in dims)
    slopes, mask = torch.ones(2), torch.zeros(4, 4)
    for options, expected in (
        ({}, plain),
        ({"softcap": 9.0}, modified),
        ({"alibi_slopes": slopes}, modified),
        ({"mask": mask}, modified),
    ):
        notes = re.findall(r"\[(head dim .*? the work)\]", str(fp.explain("attention", q, q, v, **options)))
        assert notes == [PADDED.format(*words) for words in expected]


def test_buckets():
    assert [bucket(d, d) for d in (24, 32, 64, 72, 136, 200, 256, 264)] == [
        None, (64, 64), (64, 64), (96, 96), (192, 192), (256, 256), (256, 256), None,
    ]  # fmt: skip
    assert bucket(192, 128) == (192, 128)
    assert bucket(576, 512) is bucket(128, 64) is bucket(100, 100) is None


X, Y = torch.ones(2, 3, 4, 8), torch.ones(2, 5, 2, 8)
P, CU = torch.ones(3, 4, 8), torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((None, Y, Y), {}, TypeError, "q must be a tensor, not NoneType"),
        ((X.double(), Y, Y), {}, TypeError, "q must be float16, bfloat16 or float32, not torch.float64"),
        ((X.half(), Y, Y), {}, TypeError, "k must have the dtype of q, torch.float16, not torch.float32"),
        ((X, Y, Y.to("meta")), {}, ValueError, "v is on meta and q on cpu"),
        ((X, Y, Y[0]), {}, ValueError, r"v must be \[B, Sk, Hk, Dv\] without cu_seqlens, and has shape \(5, 2, 8\)"),
        ((X, Y, Y), {"cu_seqlens_q": CU, "cu_seqlens_k": CU}, ValueError, r"q must be \[Tq, H, D\] with cu_seqlens"),
        ((X, Y[..., :0], Y), {}, ValueError, "k must have a head and a column"),
        ((X, Y.transpose(1, 3), Y), {}, ValueError, r"last dimension of k must have stride 1, not 16: pass k.contiguous\(\)"),
        ((X, Y, Y[:, :4]), {}, ValueError, "k and v must have the same keys and heads"),
        ((X, Y[..., :7], Y), {}, ValueError, "q and k must have the same last dimension"),
        ((X, Y[:1], Y[:1]), {}, ValueError, "of one batch size, and q has 2 and k 1"),
        ((X[:, :, :3], Y, Y), {}, ValueError, "heads of q must be a multiple of those of k and v, and are 3 and 2"),
        ((X, Y, Y), {"scale": 0.0}, ValueError, "scale must be positive and finite in float32, not 0.0"),
        ((X, Y, Y), {"scale": torch.ones(())}, TypeError, "scale must be a number, not Tensor"),
        ((X, Y, Y), {"softcap": -1.0}, ValueError, "softcap must be finite and at least 0"),
        ((X, Y, Y), {"softcap": None}, TypeError, "softcap must be a number, not NoneType"),
        ((X, Y, Y), {"causal": 1}, TypeError, "causal must be True or False, not 1"),
        ((X, Y, Y), {"batch_invariant": None}, TypeError, "batch_invariant must be True or False, not None"),
        ((X, Y, Y), {"window": 5}, TypeError, r"window must be \(left, right\) or None, not 5"),
        ((X, Y, Y), {"window": (-1, 0)}, ValueError, "at least 0, not -1: None is unlimited"),
        ((X, Y, Y), {"window": (1.5, 0)}, TypeError, "an integer or None, not 1.5"),
        ((X, Y, Y), {"mask": torch.ones(3, 5).int()}, TypeError, "q's dtype, torch.float32, not torch.int32"),
        ((X, Y, Y), {"mask": torch.ones(3, 5).half()}, TypeError, "not torch.float16"),
        ((X, Y, Y), {"mask": torch.ones(2, 5)}, ValueError, r"broadcast to .* here \[2, 4, 3, 5\], and has shape \(2, 5\)"),
        ((X, Y, Y), {"mask": torch.ones(1, 1, 1, 1, 1)}, ValueError, "must broadcast"),
        ((X, Y, Y), {"mask": torch.ones(3, 5, device="meta")}, ValueError, "mask is on meta"),
        ((P, P, P), {"mask": torch.ones(1), "cu_seqlens_q": CU, "cu_seqlens_k": CU}, ValueError, "does not go with cu_seq"),
        ((X, Y, Y), {"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes must be contiguous with 4 elements"),
        ((X, Y, Y), {"alibi_slopes": torch.ones(4, 2)}, ValueError, r"must be \[4\] or \[2, 4\], and has shape \(4, 2\)"),
        ((X, Y, Y), {"alibi_slopes": torch.ones(4).half()}, TypeError, "alibi_slopes must be a tensor of torch.float32"),
        ((X, Y, Y), {"sinks": torch.ones(2)}, ValueError, "sinks must be contiguous with 4 elements"),
        ((X, Y, Y), {"sinks": torch.ones(4).half()}, TypeError, "sinks must be a tensor of torch.float32, not torch.float16"),
        ((P, P, P), {"cu_seqlens_k": CU}, ValueError, "go together, and only cu_seqlens_k was given"),
        ((P, P, P), {"cu_seqlens_q": CU.long(), "cu_seqlens_k": CU}, TypeError, "cu_seqlens_q must be an int32 tensor"),
        ((P, P, P), {"cu_seqlens_q": CU, "cu_seqlens_k": CU[:1]}, ValueError, "as many elements"),
        ((P, P, P), {"cu_seqlens_q": CU[:0], "cu_seqlens_k": CU}, ValueError, r"must be contiguous \[B \+ 1\]"),
        ((P, P, P), {"cu_seqlens_q": CU.to("meta"), "cu_seqlens_k": CU}, ValueError, "cu_seqlens_q is on meta"),
    ],
)  # fmt: skip
def test_refusals(args, kwargs, error, words):
    for op in (fp.ops.attention, fp.ops.attention_with_lse):
        with pytest.raises(error, match=words) as e:
            op(*args, **kwargs)
        assert "\n" not in str(e.value)
        assert str(e.value).startswith(f"{op.__name__}: ")


def test_the_compiled_ops_refuse_too():
    op = torch.ops.forwardpass.attention_cpu
    for args, words in (
        ((X, Y, Y[..., :7], *NONE), "has no softcap, and v has the columns of q"),
        ((X[:, :, :3], Y, Y, *NONE), "must be a multiple"),
        ((X, Y, Y[:, :4], *NONE), "v .* keys, kv_heads"),
        ((X, Y, Y, -1.0, *NONE[1:]), "scale must be positive"),
        ((X, Y, Y, *NONE[:2], -1, *NONE[3:]), "at least 0"),
        ((X, Y, Y, *NONE[:5], torch.ones(2, 5), *NONE[6:]), "does not broadcast"),
        ((X, Y, Y, *NONE[:8], CU, *NONE[9:]), "go together"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*args)


def test_refuses_grad():
    q = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="inference_mode"):
        fp.ops.attention(q, Y, Y)
    with torch.no_grad():
        fp.ops.attention(q, Y, Y)


@pytest.mark.parametrize("case", in_parts([c for c in CASES if math.prod(c.sizes) <= 30_000], 4))
def test_the_reference_takes_a_head_at_a_time_where_scores_are_many(case, monkeypatch):
    """32 heads of 8192 rows and keys would be several matrices of 17 GB."""
    args = case.arguments()
    monkeypatch.setattr(reference, "MOST_SCORES", 2**27)
    together = reference.attention_with_lse(*(a.double() if i < 3 else a for i, a in enumerate(args)))
    monkeypatch.setattr(reference, "MOST_SCORES", 0)
    by_head = reference.attention_with_lse(*(a.double() if i < 3 else a for i, a in enumerate(args)))
    for one, other in zip(together, by_head, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
