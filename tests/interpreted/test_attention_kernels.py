"""attention's kernels, as compiled: every case of both operations on each backend and architecture that has one."""

import itertools
import re

import pytest
import torch
from every_backend import on_each
from rotation import in_parts, in_turn, paired, whole

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.attention import bucket, cases, reference
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

#: of each backend the architectures with code of their own, of which one is not slow
KERNELS = [
    pytest.param((implementation, arch), marks=p.marks)
    for implementation, archs in (("cuda", ("sm_80", "sm_90a")), ("triton", ("sm_80", "sm_90a")))
    for p in in_turn(archs)
    for arch in p.values
]
#: what sm_89 runs of Triton differs from sm_80 in how it was compiled alone
SLOW_KERNELS = [
    pytest.param(k, marks=pytest.mark.slow) for k in (("triton", "sm_89"), ("cuda", "sm_120"), ("triton", "sm_120"))
]
CASES, FEW_KERNELS = list(cases.cases()), list(cases.cases(few_kernels=True))
#: (rows, keys) of packed sequences (varlen): of several tiles, on both sides of their edges, and of none
LENGTHS = ((130, 300), (0, 64), (1, 257), (127, 127), (128, 65), (5, 0), (200, 64), (0, 0), (66, 191))


@pytest.fixture(params=KERNELS + SLOW_KERNELS, ids="-".join)
def kernel(request):
    """(backend, architecture)"""
    return request.param


def run(kernel, op, args, seed=0, checks=True):
    implementation, arch = kernel
    with fp.interpret(arch, seed=seed, checks=checks) as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        got = dispatch.operations[op](*args)
    assert device.findings == []
    if args[0].numel() and args[1].numel():
        assert device.counters["launches"] in (1, 2)  # where blocks share a tile's keys, another one adds their parts
    return got


def with_lse(kernel, q, k, v, checks=True, **options):
    """attention_with_lse by the names of its options."""
    names = dispatch.operations["attention"].parameters[3:]
    defaults = {"causal": False, "softcap": 0.0, "batch_invariant": False}
    assert options.keys() <= set(names)
    args = (q, k, v, *(options.get(n, defaults.get(n)) for n in names))
    return run(kernel, "attention_with_lse", args, checks=checks)


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softcap_of_large_scores(kernel, dtype):
    """Scores all over the cap's curve: the log-sum-exp is as exact as without one. A tanh within 2^-11 leaves it off by 2e-2."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).to(dtype) for n in (48, 200, 200))
    q, k = 20 * q, 2 * k
    args = (q, k, v, None, True, None, None, 50.0, None, None, None, None, None, False)
    _, exact = reference.attention_with_lse(q.double(), k.double(), v.double(), *args[3:])
    assert exact[0, :, -1].min() > 49  # nearly the cap: where the curve is flat
    o, lse = run(kernel, "attention_with_lse", args)
    assert (lse - exact).abs().max() < 2e-5
    cases.assert_matches((o, lse), args)


def reason_of_refusal(case):
    """The code of the Reason for which no kernel takes a case, by what the contract says; None: one does."""
    if case.dtype == torch.float32:
        return "dtype"
    return None if bucket(*case.dims) else "head_dim"


def launches():
    """Triton, which takes two seconds to compile a kernel, has cases with few of them; in `make test-all` CUDA's too."""
    refused, of_cuda = ([c for c in CASES if bool(reason_of_refusal(c)) == is_refused] for is_refused in (True, False))
    of_triton = [c for c in FEW_KERNELS if not reason_of_refusal(c)]
    yield from on_each(("sm_80", "sm_90a", "sm_120"), of_cuda, 12, "cuda")
    yield from on_each(("sm_80", "sm_90a", "sm_89", "sm_120"), of_triton, 160, "triton", slow=("sm_89",))
    rest = [c for c in of_cuda if c not in of_triton]
    for arch in ("sm_80", "sm_89", "sm_90a", "sm_120"):
        yield whole(rest, "triton", arch, which="of cuda", marks=[pytest.mark.slow])
        yield from (whole(refused, implementation, arch, which="refused") for implementation in ("cuda", "triton"))


@pytest.mark.parametrize(("case", "implementation", "arch"), list(launches()))
def test_kernel(case, implementation, arch, seed):
    args = case.arguments(seed=seed)
    operation = dispatch.operations[case.op]
    if code := reason_of_refusal(case):
        with fp.interpret(arch), fp.use_backend(implementation):
            reason = operation.why_not(implementation, *args)
            assert reason.code == code
            with pytest.raises(fp.Unsupported, match=re.escape(str(reason))):
                operation(*args)
        return
    cases.assert_matches(run((implementation, arch), case.op, args, seed), args)


def packed(dim, seed=0, dtype=torch.float16):
    """q, k and v of sequences of LENGTHS, and where these begin."""
    g = torch.Generator().manual_seed(seed)
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*LENGTHS)]
    sizes = (int(starts[0][-1]), 4), (int(starts[1][-1]), 2), (int(starts[1][-1]), 2)
    return [torch.randn(n, heads, dim, generator=g).to(dtype) for n, heads in sizes], starts


@pytest.mark.every(2)
@pytest.mark.parametrize("seen", [{}, {"causal": True}, {"window_left": 70, "window_right": 3}], ids=str)
def test_packed_sequences_are_a_batch(kernel, seen):
    """A sequence has the bits that it has alone, whatever its neighbours are, and NaN stays where it is."""
    (q, k, v), starts = packed(32)
    cu = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    g = torch.Generator().manual_seed(1)
    for extra in ({}, {"alibi_slopes": torch.rand(len(LENGTHS), 4, generator=g), "sinks": torch.randn(4, generator=g)}):
        options = {**seen, **extra}
        o, lse = with_lse(kernel, q, k, v, **options, **cu)
        for b in range(len(LENGTHS)):
            rows, keys = (slice(int(s[b]), int(s[b + 1])) for s in starts)
            own = {"alibi_slopes": extra["alibi_slopes"][b]} if extra else {}
            alone = with_lse(kernel, q[None, rows], k[None, keys], v[None, keys], **{**options, **own})
            assert_equal(o[rows], alone[0][0], f"o of {b}")
            # without a key it is the sink, which no kernel need have touched
            torch.testing.assert_close(lse[:, rows], alone[1][0], rtol=0 if LENGTHS[b][1] else 1e-6, atol=0)
        rows, keys = (slice(int(s[3]), int(s[4])) for s in starts)
        spoiled = [x.clone() for x in (q, k, v)]
        for x in spoiled:
            x[rows if x is spoiled[0] else keys] = torch.nan
        got = with_lse(kernel, *spoiled, **options, **cu)
        assert got[0][rows].isnan().all() and got[1][:, rows].isnan().all()
        got[0][rows], got[1][:, rows] = o[rows], lse[:, rows]
        assert_equal(got[0], o, "o beside NaN")
        assert_equal(got[1], lse, "lse beside NaN")


@pytest.mark.every(2)
def test_many_sequences(kernel):
    """More than a kernel looks at at once, most of them short, and empty ones at both ends."""
    lengths = [(0, 0)] + [(b % 4, (b * 7) % 5) for b in range(300)] + [(150, 10), (0, 3), (0, 0)]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths)]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(int(s[-1]), 1, 32, generator=g).half() for s in (starts[0], starts[1], starts[1]))
    args = (q, k, v, None, True, None, None, 0.0, None, None, None, *starts, False)
    cases.assert_matches(run(kernel, "attention_with_lse", args), args)


@pytest.mark.every(2)
@pytest.mark.parametrize(("arch", "causal"), paired(["sm_80", "sm_89", "sm_90a"], [True, False]))
def test_more_heads_than_run_together(arch, causal):
    """Groups of 32, of which every second one has its tiles in the opposite order, the last one few."""
    case = cases.Case((260, 200), (64, 64), batch=5, heads=(14, 14), causal=causal, lse=True)
    args = case.arguments()
    cases.assert_matches(run(("cuda", arch), "attention_with_lse", args), args)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("dim", "seen"), paired([64, 96, 128, 256], [{}, {"causal": True}, {"window_left": 70, "window_right": 3}])
)
def test_a_tile_has_the_same_bits_after_others(dim, seen):
    """A persistent block's tiles, among them some without keys, have the bits of each in a block of its own."""
    (q, k, v), starts = packed(dim)
    args = (q, k, v, None, seen.get("causal", False), seen.get("window_left"), seen.get("window_right"), 0.0)
    args += (None, None, torch.tensor([1.0, -1.0, 0.0, 2.0]), *starts, False)
    alone = run(("cuda", "sm_90a"), "attention_with_lse", args)
    cases.assert_matches(alone, args)
    for multiprocessors in (1, 3):
        with fp.interpret("sm_90a", multiprocessors=multiprocessors) as device, fp.use_backend("cuda"):
            got = dispatch.operations["attention_with_lse"](*args)
        assert device.findings == []
        for x, y in zip(got, alone):
            assert_equal(x, y)


@pytest.mark.every(2)
def test_a_row_has_the_same_bits_in_every_batch(kernel):
    case = cases.Case((130, 300), (40, 40), batch=3, heads=(4, 2), mask="dtype bij", alibi="bh", sinks="float32", lse=True,
                      batch_invariant=True, causal=True)  # fmt: skip
    args = case.arguments()
    o, lse = run(kernel, case.op, args)
    cases.assert_matches((o, lse), args)
    for b in range(3):
        own = [a[b : b + 1] if isinstance(a, torch.Tensor) and len(a) == 3 else a for a in args]
        for got, alone in zip((o, lse), run(kernel, case.op, own)):
            assert_equal(got[b : b + 1], alone)


#: in the last one a tile's first row sees all keys of a block but for the last
@pytest.mark.every(2)
@pytest.mark.parametrize("sizes", in_parts([(129, 384), (300, 131), (64, 257), (70, 196)], 4))
def test_windows_at_the_edges_of_tiles(kernel, sizes):
    """Which keys are whole blocks, which are at an edge and which are none changes within a step of a side."""
    case = cases.Case(sizes, (32, 32), batch=1, heads=(1, 1), lse=True, sinks="float32")
    q, k, v, *_ = case.arguments()
    sides = (None, 0, 1, 63, 64, 65, 127, 128, 129, 255)
    pairs = [(left, right, False) for left, right in itertools.product(sides, sides)]
    some = [p for n, p in enumerate(pairs) if n % 3 == sizes[0] % 3 or None in p]
    # causal, a row sees nothing on its right, whatever the window says
    for left, right, causal in (*some, *((left, None, True) for left in sides), (64, 255, True)):
        args = (q, k, v, None, causal, left, right, 0.0, *(None,) * 5, False)
        try:
            cases.assert_matches(run(kernel, case.op, args), args)
        except AssertionError as e:
            raise AssertionError(f"window {left}, {right} causal {causal}: {e}") from e


def test_rows_without_keys(kernel):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 32, generator=g).half() for n in (200, 150, 150))
    sinks = torch.tensor([1.5, -torch.inf])
    for options in (
        {"causal": True},  # the first fifty rows stand before all keys
        {"mask": torch.arange(200).ge(50).reshape(200, 1)},
        {"mask": torch.where(torch.arange(200) < 50, -torch.inf, 0.0).reshape(200, 1)},
        {"mask": torch.where(torch.arange(200) < 50, torch.finfo(torch.float32).min, 0.0).reshape(200, 1)},
    ):
        o, lse = with_lse(kernel, q, k, v, **options)
        assert not o[:, :50].any() and o[:, 50:].all()
        assert lse[:, :, :50].isneginf().all() and lse[:, :, 50:].isfinite().all()
        o, lse = with_lse(kernel, q, k, v, sinks=sinks, **options)
        assert not o[:, :50].any() and o[:, 50:].all()
        assert lse[0, 0, :50].tolist() == pytest.approx([1.5] * 50) and lse[0, 1, :50].isneginf().all()
    o, lse = with_lse(kernel, q, k[:, :0], v[:, :0], sinks=sinks.half())
    assert not o.any() and lse[0, 0].tolist() == [1.5] * 200 and lse[0, 1].isneginf().all()
    o, lse = with_lse(kernel, q, k[:, :0], v[:, :0])
    assert not o.any() and lse.isneginf().all()


@pytest.mark.parametrize("seen", ["all", "window", "mask"])
def test_nan_passes_through(kernel, seen):
    options = {"window_left": 100} if seen == "window" else {"mask": torch.zeros(150, 150)} if seen == "mask" else {}
    for at in range(3):
        g = torch.Generator().manual_seed(at)
        args = [torch.randn(1, 150, heads, 32, generator=g).half() for heads in (4, 2, 2)]
        args[at][0, 3, 1, 2] = torch.nan  # of two heads' key or value
        o, lse = with_lse(kernel, *args, **options)
        rows = slice(3, 4) if at == 0 or seen == "window" else slice(None)
        heads = slice(1, 2) if at == 0 else slice(2, 4)
        assert o[0, rows, heads, 2].isnan().all()
        assert bool(lse[0, heads, rows].isnan().all()) == (at < 2)
        assert not o[0, :, 0].isnan().any() and not lse[0, 0].isnan().any()


def test_rows_that_are_far_apart(kernel):
    """Farther than a tile's offsets reach: 4 GiB, of which a few rows are ever touched."""
    memory = torch.UntypedStorage(4 * 2**30 + 2**16)
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (1, 65, 1, 32), (0, 2**25, 0, 1))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 65, 32, generator=g).half()
    q, k, v = x.reshape(3, 1, 65, 1, 32)
    far.copy_(k)
    assert_equal(with_lse(kernel, q, far, v)[0], with_lse(kernel, q, k, v)[0])


@pytest.mark.every(2)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(kernel, packed):
    if kernel[0] == "cuda":
        pytest.skip(
            "the interpreter knows the operation's arguments, not opcheck's copies; attention_cpu has the same schema"
        )
    case = cases.Case((33, 70), (40, 40), causal=True, sinks="dtype", lse=True, packed=packed, awkward=False)
    operation, args = dispatch.operations[case.op], case.arguments()
    run(kernel, case.op, args)  # registers Triton's
    with fp.interpret(kernel[1]):
        torch.library.opcheck(operation.runs[kernel[0]], args)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_64k_keys(kernel, dtype):
    case = cases.Case((3, 65539), (64, 64), dtype, 1, (2, 1), causal=True, lse=True)
    args = case.arguments()
    cases.assert_matches(run(kernel, case.op, args), args)


@pytest.mark.slow
def test_kernel_on_a_real_layer(kernel):
    case = min((c for c in cases.BENCHMARK_CASES if not reason_of_refusal(c)), key=lambda c: c.flops())
    args = case.arguments()
    cases.assert_matches(run(kernel, case.op, args), args)
