"""attention_decode and its lse: every backend is far closer to fp64 than the same maths in 16 bits, and reads what a sequence has
alone."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from every_backend import EVERY_BACKEND, in_triton, in_turn_of_triton, on_cuda, running
from processes import fork, two_threads
from rotation import in_parts, paired, whole

import forwardpass as fp
from forwardpass.ops.attention_decode import OPERATION, WITH_LSE, cases, reference
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.testing import assert_equal, poisoned_outputs

CASES = list(cases.cases())


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


def run(args, backend):
    with poisoned_outputs(), fp.use_backend(backend):
        return OPERATION(*args)


def costs(case):
    """Whether its reference takes seconds."""
    return sum(case.lengths) * case.heads[0] * case.rows * case.dim > 2**25


@pytest.mark.parametrize(
    "case",
    [
        *in_parts([c for c in CASES if not costs(c)], 3),
        whole([c for c in CASES if costs(c)], label="costly", marks=[pytest.mark.slow]),
    ],
)
def test_backend(case, backend, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(run(args, backend), args)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (7, 1), (10, 1), (17, 1)], ids=str)
@pytest.mark.parametrize("cache", [None, torch.int8, E4M3], ids=str)
def test_rows_at_a_time(heads, cache):
    """Of pairs of bfloat16, where the CPU multiplies them: odd numbers of keys, and head dims of no whole vector."""
    for dim in (40, 33):
        args = cases.Case((0, 1, 15, 70), 1, dim, heads, cache=cache).arguments()
        cases.assert_matches(run(args, "cpu"), args)


@pytest.mark.every(2)
@pytest.mark.parametrize("cache", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize(("dim", "heads"), [(64, (7, 7)), (40, (15, 5)), (200, (5, 5)), (128, (30, 3))], ids=str)
def test_heads_that_are_taken_together(dim, heads, cache):
    """Give what each gives by itself: as many as are taken together, more, and numbers that do not divide a tile's keys."""
    for case in (
        cases.Case((700, 0, 1, 65), 1, dim, heads, cache=cache),
        cases.Case((130, 64), 2, dim, heads, torch.float32, cache, page=None, layout="heads first", scales="head"),
        cases.Case((1100, 3), 1, dim, heads, cache=cache, page=None, layout="apart", window=600),
    ):
        q, k, v, lengths, table, k_scale, v_scale, *options = args = case.arguments()
        got, group = run(args, "cpu"), heads[0] // heads[1]
        for h in range(heads[1]):
            one = slice(h, h + 1)
            scales = (s[..., one].contiguous() if case.scales == "head" else s[..., one] for s in (k_scale, v_scale))
            rows = slice(h * group, (h + 1) * group)
            alone = run((q[:, :, rows], k[:, :, one], v[:, :, one], lengths, table, *scales, *options), "cpu")
            assert_equal(got[:, :, rows].contiguous(), alone)


ON_GPU = [
    dataclasses.replace(c, lengths=tuple(min(n, 700) for n in c.lengths))
    for c in CASES
    if c.dtype != torch.float32 and c.dim <= 256
]
BY_HAND = [
    c for c in ON_GPU if not any(n * (c.cache or c.dtype).itemsize % 16 for n in (c.dim, c.value_dim or c.dim))
]  # else there is a reason


def interpreted(case, arch, seed, backend="triton", **options):
    args = case.arguments(seed=seed)
    options = {"strict": to_the_letter(case, backend, arch), **options}
    with fp.interpret(arch, seed=seed, guard=True, **options), fp.use_backend(backend), poisoned_outputs():
        return args, OPERATION(*args)


def to_the_letter(case, backend, arch):
    """False where Triton's wgmma reads what cp.async wrote without a fence.proxy.async between them, as CUTLASS's does: it depends
    on how it pipelines the loads, and has been seen where v has other columns than k. None: as the environment says."""
    return False if (backend, arch) == ("triton", "sm_90a") and case.value_dim else None


@pytest.mark.parametrize(("case", "arch"), in_triton(ON_GPU, 32))
def test_triton(case, arch, seed):
    args, got = interpreted(case, arch, seed)
    cases.assert_matches(got, args)


@pytest.mark.parametrize(("case", "arch"), on_cuda(BY_HAND, 8))
def test_cuda(case, arch, seed):
    args, got = interpreted(case, arch, seed, "cuda")
    cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("backend", "arch"), [("cuda", "sm_80"), ("cuda", "sm_90a"), ("triton", "sm_80"), ("triton", "sm_90a")], ids=str
)
def test_softcap_of_large_scores(backend, arch):
    """Beyond a cap of 50 all keys weigh alike, but for what tanh is off by, whose exponential that is."""
    args = list(cases.Case((300,), 2, 64, (4, 2), torch.float16, page=None, softcap=50.0).arguments())
    g = torch.Generator().manual_seed(1)
    args[0], args[1] = args[0].abs() * 8, (args[1].abs() + torch.rand(args[1].shape, generator=g)).to(torch.float16)
    exact = reference.attention_decode(args[0].double(), *args[1:])
    with fp.interpret(arch), fp.use_backend(backend):
        error = (OPERATION(*args).double() - exact).abs().max()
    assert error <= 2 * cases.ULP[torch.float16] * exact.abs().max()


#: What each backend has to give besides o, with every option that the lse depends on.
WITH_SUMS = (
    cases.Case((0, 1, 15, 300), 2, 64, (6, 2), page=6, sinks="float32", alibi="batch"),
    cases.Case((700, 40), 1, 128, (4, 4), torch.float16, torch.int8, page=1, window=70, value_dim=64),
    cases.Case((130, 17, 0), 19, 40, (4, 1), page=None, softcap=8.0, leftpad=(5, 20), value_dim=256),
    cases.Case(
        (300, 9), 5, 256, (2, 1), torch.float16, E4M3, page=16, scales="head", sinks="dtype", batch_invariant=True
    ),
)


@pytest.mark.every(2)
@pytest.mark.parametrize(("case", "backend"), paired(WITH_SUMS, EVERY_BACKEND))
def test_the_lse(case, backend, seed):
    """Beside the bits of o that attention_decode gives. Of several blocks, which share the keys of a head, too."""
    args = case.arguments(seed=seed)
    options = {"seed": seed, "multiprocessors": 2, "strict": to_the_letter(case, *backend)} if backend[1] else {}
    with running(*backend, **options):
        o, lse = WITH_LSE(*args)
        alone = OPERATION(*args)
    assert_equal(o, alone)
    cases.assert_matches((o, lse), args)


def test_parts_merge_by_their_lse(backend):
    """A prefix that all sequences share, once, and what each has of its own."""
    q, prefix, own = torch.randn(3, 1, 4, 16), torch.randn(2, 1, 50, 2, 16), torch.randn(2, 3, 9, 2, 16)
    lengths = torch.tensor([9, 1, 4], dtype=torch.int32)
    whole_cache = [torch.cat([prefix[i].expand(3, -1, -1, -1), own[i]], 1) for i in range(2)]
    with fp.use_backend(backend):
        expected = fp.ops.attention_decode(q, *whole_cache, lengths + 50)
        shared = [x.expand(3, -1, -1, -1) for x in prefix]
        parts = [fp.ops.attention_decode_with_lse(q, *shared, torch.full((3,), 50, dtype=torch.int32)),
                 fp.ops.attention_decode_with_lse(q, *own, lengths)]  # fmt: skip
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3).unsqueeze(-1)
    torch.testing.assert_close(sum(w * o for w, (o, _) in zip(weights, parts)), expected)


MANY_ROWS = (
    cases.Case((300, 40, 150), 56, 64, (2, 2), page=16),
    cases.Case((300, 0, 33, 200), 130, 128, (4, 2), torch.float16, page=1, sinks="float32"),
    cases.Case((200, 64), 64, 80, (4, 4), page=23, window=50, value_dim=48, layout="together"),
    cases.Case((150, 140), 129, 256, (2, 1), torch.float16, page=6, layout="apart", scale=0.3, batch_invariant=True),
    cases.Case((300, 70), 65, 64, (3, 1), page=None, layout="heads first"),
    cases.Case((190, 65), 56, 128, (2, 2), page=7, alibi="batch", sinks="dtype"),
    cases.Case((90, 300), 70, 192, (2, 2), torch.float16, page=64, softcap=8.0, value_dim=128, window=40, alibi="head"),
)


def prefills(case, arch, seed, backend="cuda", **options):
    """(arguments, o and the lse, by which kernels) of a GPU of one multiprocessor, where attention's own are faster for many."""
    args = case.arguments(seed=seed)
    options = {"guard": True, "multiprocessors": 1, "counters": True, **options}
    with fp.interpret(arch, seed=seed, **options) as device, fp.use_backend(backend), poisoned_outputs():
        result = WITH_LSE(*args)
        return args, result, {k.kernel.partition("<")[0].rpartition(" ")[2] for k in device.kernels()}


@pytest.mark.every(2)
@pytest.mark.parametrize(("case", "arch"), on_cuda(MANY_ROWS, 2))
def test_many_rows_of_cuda(case, arch, seed):
    """In attention's kernels, whose source of keys is a cache, paged or contiguous."""
    args, result, kernels = prefills(case, arch, seed)
    cases.assert_matches(result, args)
    assert len(kernels) == 1 and not any("decode" in k for k in kernels)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_rows_whatever_the_seed(seed):
    """Of the interpreter: warps in other orders, copies that end at other times."""
    case = cases.Case((150, 33), 65, 64, (2, 2), torch.float16, page=1, value_dim=32)
    args, result, kernels = prefills(case, "sm_80", seed)
    assert not any("decode" in k for k in kernels)
    cases.assert_matches(result, args)


@pytest.mark.parametrize(
    "case",
    [
        cases.Case((300, 40), 40, 64, (2, 2), cache=torch.int8, page=5),
        cases.Case((130, 200), 33, 128, (4, 2), torch.float16, E4M3, page=None, scales="tensor"),
        cases.Case((90, 200), 24, 64, (2, 1), leftpad=(80, 9), page=16),
    ],
    ids=str,
)
def test_many_rows_of_8_bits_or_padded(case, seed):
    """In decode's kernel, sixteen rows at a time."""
    args, result, kernels = prefills(case, "sm_80", seed, multiprocessors=2)
    cases.assert_matches(result, args)
    assert any("decode" in k for k in kernels)


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_batch_invariant_prefill_is_that_of_its_own(backend):
    case = cases.Case((150, 40, 64), 70, 64, (4, 2), torch.float16, page=6, batch_invariant=True)
    args = case.arguments()
    with fp.interpret("sm_80", multiprocessors=2, approximate=False), fp.use_backend(backend):
        together = OPERATION(*args)
        for b in range(3):
            assert_equal(OPERATION(*alone(args, b)), together[b : b + 1])


def test_bits_repeat(backend):
    case = cases.Case((1300, 0, 5), 2, 64, (6, 2), cache=torch.int8)
    args = case.arguments()
    first = run(args, backend)
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            if backend == "cpu":  # whatever the number of threads
                assert_equal(run(args, backend), first)
        finally:
            torch.set_num_threads(threads)
    assert_equal(run(args, backend), first)


@pytest.mark.every(2)
def test_bits_of_triton_repeat():
    case = cases.Case((300, 1, 0), 1, 64, (4, 2))
    _, first = interpreted(case, "sm_80", 0)
    args = case.arguments(seed=0)
    for seed in (1, 2):
        with fp.interpret("sm_80", seed=seed, approximate=False), fp.use_backend("triton"):
            a = OPERATION(*args)
        with fp.interpret("sm_80", seed=seed + 10, approximate=False), fp.use_backend("triton"):
            assert_equal(a, OPERATION(*args))
    assert first.isfinite().all()


def alone(args, b):
    """The arguments of sequence b by itself."""
    table = args[4]
    each = [a[b : b + 1] if isinstance(a, torch.Tensor) and i in (0, 3, 4, 13) else a for i, a in enumerate(args)]
    if isinstance(args[14], torch.Tensor) and args[14].dim() == 2:
        each[14] = args[14][b : b + 1]
    if table is None:
        each[1:3] = [a[b : b + 1] for a in args[1:3]]
        each[5:7] = [a[b : b + 1] if isinstance(a, torch.Tensor) and a.dim() == 3 else a for a in args[5:7]]
    return tuple(each)


@pytest.mark.parametrize("page", [None, 16])
def test_a_batch_invariant_row_is_that_of_its_own(backend, page):
    case = cases.Case(
        (1100, 3, 600), 2, 64, (4, 2), cache=torch.int8, page=page, batch_invariant=True, leftpad=(0, 0, 37)
    )
    args = case.arguments()
    together = run(args, backend)
    for b in range(3):
        assert_equal(run(alone(args, b), backend), together[b : b + 1])


ON_GPUS = [("cuda", "sm_80"), ("cuda", "sm_90a"), ("triton", "sm_80"), ("triton", "sm_90a")]


def widened(args, columns):
    """With a table of so many columns more, none of which is read."""
    table = torch.nn.functional.pad(args[4], (0, columns), value=-1)
    return (*args[:4], table, *args[5:])


@pytest.mark.every(2)
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize(("backend", "arch"), in_turn_of_triton(ON_GPUS))
def test_a_batch_invariant_row_of_a_gpu_is_that_of_its_own(backend, arch, page, monkeypatch):
    """In a cache of any size: sequences of one part, of parts of the least size, and of larger ones. Also where a batch has more
    rows than the second kernel gives a block each."""
    triton_kernel = pytest.importorskip("forwardpass.ops.attention_decode.triton_kernel")
    machine_of = triton_kernel.machine_of
    for processors in (4, 12):
        # which is the interpreter's, whatever it is told
        machine = functools.partial(
            lambda n, device: dataclasses.replace(machine_of(device), multiprocessors=n), processors
        )
        monkeypatch.setattr(triton_kernel, "machine_of", machine)
        case = cases.Case((4300, 3, 2200, 600), 2, 64, (4, 2), torch.float16, page=page, batch_invariant=True)
        args = case.arguments()
        with fp.interpret(arch, approximate=False, multiprocessors=processors), fp.use_backend(backend):
            together = OPERATION(*args)
            for b, length in enumerate(case.lengths):
                own = alone(args, b)
                if page is None:
                    own = (own[0], *(x[:, :length] for x in own[1:3]), *own[3:])
                    assert_equal(OPERATION(*own), together[b : b + 1])
                else:
                    for columns in (0, 900):
                        assert_equal(OPERATION(*widened(own, columns)), together[b : b + 1])
        cases.assert_matches(together, args)


def allocated(function):
    """The bytes of the largest allocation that function() makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    results = profile.profiler.kineto_results  # events() sums up what is allocated and freed within an operation
    return max(e.nbytes() for e in results.events() if e.name() == "[memory]")


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_workspace_follows_from_the_machine(backend):
    """Not from what a table has room for: parts of a fixed size took 273 MB for 64 sequences, 8 heads, 128k keys."""
    args = cases.Case((300, 17), 1, 64, (4, 2), torch.float16, batch_invariant=True).arguments()
    wide = [widened(args, columns) for columns in (2**8, 2**14, 2**17)]
    with fp.interpret("sm_90a") as device, fp.use_backend(backend):
        sizes = [allocated(lambda call=call: OPERATION(*call)) for call in wide]
    results, floats = 2 * 4, 64 + 2  # of sequences and heads, and what a part of each leaves
    assert sizes[0] <= sizes[1] == sizes[2] <= 4 * results * floats * 132, device


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("backend", "arch"), [("cpu", None), ("cuda", "sm_80"), ("cuda", "sm_90a"), ("triton", "sm_80")], ids=str
)
def test_padding_is_as_if_the_sequence_began_behind_it(backend, arch, window):
    """Bit by bit: keys are divided from the first that counts."""
    case = cases.Case((300, 41), 2, 64, (6, 2), window=window, page=None, batch_invariant=True, leftpad=(37, 16))
    args = case.arguments()
    with fp.interpret(arch, approximate=False) if arch else contextlib.nullcontext(), fp.use_backend(backend):
        together = OPERATION(*args)
        for b, padding in enumerate(case.leftpad):
            q, k, v, length, *options = alone(args, b)
            rest = OPERATION(q, k[:, padding:], v[:, padding:], length - padding, *options[:-2], None, None)
            assert_equal(rest, together[b : b + 1])


def test_reference_is_attention():
    """Of the keys that a sequence has, causal."""
    case = cases.Case((5, 40, 17), 3, 16, (4, 2), torch.float32, window=20, sinks="float32", softcap=5.0)
    args = case.arguments()
    got = run(args, "reference")
    q, k_cache, v_cache, lengths, table = args[:5]
    for b, n in enumerate(lengths.tolist()):
        k, v = (torch.cat([c[p] for p in table[b] if p >= 0])[None, :n] for c in (k_cache, v_cache))
        with fp.use_backend("reference"):
            expected = fp.ops.attention(q[b : b + 1], k, v, causal=True, window=(20, None), softcap=5.0, sinks=args[11])
        torch.testing.assert_close(got[b : b + 1], expected)


def test_rows_before_the_first_key(backend):
    q, cache = torch.ones(3, 4, 2, 8), torch.ones(3, 6, 1, 8)
    o = run(
        (q, cache, cache, torch.tensor([0, 2, 4], dtype=torch.int32), *(None,) * 6, 0.0, None, False, None, None),
        backend,
    )
    assert o.any(-1).all(-1).tolist() == [[False] * 4, [False, False, True, True], [True] * 4]
    sinks = torch.full((2,), 8**0.5)  # as much as each key's score
    o = run(
        (q, cache, cache, torch.tensor([0, 2, 4], dtype=torch.int32), *(None,) * 6, 0.0, sinks, False, None, None),
        backend,
    )
    torch.testing.assert_close(o[1, :, 0, 0], torch.tensor([0, 0, 1 / 2, 2 / 3]))


def test_nan_passes_through(backend):
    for at in range(3):
        case = cases.Case((40, 30), 2, 16, (4, 2), torch.float32, page=None, awkward=False)
        args = case.arguments()
        args[at][0, 1 if at == 0 else 20, 1, 2] = torch.nan
        got, expected = run(args, backend), reference.attention_decode(*args)
        assert expected.isnan().any() and not expected[1].isnan().any()
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_the_bound_can_fail():
    case = cases.Case((300, 40), 2, 64, (4, 2))
    args = case.arguments()
    o = run(args, "cpu")
    cases.assert_matches(o, args)
    later = (*args[:3], args[3] - 1, *args[4:])
    for wrong in (
        reference.attention_decode(*args, dtype=torch.bfloat16),
        o * 1.02,
        run(later, "cpu"),
        run((*args[:8], 30, *args[9:]), "cpu"),
    ):
        with pytest.raises(AssertionError, match="o: "):
            cases.assert_matches(wrong, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts([c for c in CASES if not costs(c) and c.cache != E4M3][::6], 2))
def test_opcheck(case):
    """Of dtypes that torch's own check can compute with."""
    torch.library.opcheck(torch.ops.forwardpass.attention_decode_cpu.default, case.arguments())


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_compiles_whole(backend):
    case = cases.Case((20, 3), 1, 16, (4, 2), torch.float32, torch.int8)
    args = case.arguments()
    with fp.use_backend(backend):
        for dynamic in (False, True):
            torch.compiler.reset()
            compiled = torch.compile(lambda *a: OPERATION(*a) * 2, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            torch.testing.assert_close(compiled(*args), OPERATION(*args) * 2)


def test_a_step_compiles_whole():
    """What is appended is seen: the graph keeps the order."""

    def step(k, v, q, k_cache, v_cache, lengths):
        fp.ops.append_kv(k, v, k_cache, v_cache, lengths)
        return fp.ops.attention_decode(q, k_cache, v_cache, lengths)

    k, v, q = (torch.randn(2, 1, h, 16) for h in (2, 2, 4))
    lengths = torch.tensor([3, 1], dtype=torch.int32)
    caches = [torch.randn(2, 2, 5, 2, 16) for _ in range(2)]
    eager = [c.clone() for c in caches]
    expected = step(k, v, q, *(c[0] for c in eager), lengths)
    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(k, v, q, *(c[0] for c in caches), lengths)
    torch.testing.assert_close(got, expected)
    assert_equal(caches[0], eager[0])


def test_explain():
    args = cases.Case().arguments()
    table = fp.explain("attention_decode", *args[:4], block_table=args[4])
    assert (table.backend, table["cuda"].code) == ("cpu", "device")
    with fp.interpret("sm_80"):
        assert fp.explain("attention_decode", *args[:4], block_table=args[4]).backend == "cuda"
        narrow = cases.Case(dim=40, cache=torch.int8).arguments()
        table = fp.explain("attention_decode", *narrow[:4], block_table=narrow[4], k_scale=narrow[5], v_scale=narrow[6])
        assert (table.backend, table["cuda"].code) == ("triton", "alignment")
        wide = cases.Case(dim=320).arguments()
        assert fp.explain("attention_decode", *wide[:4], block_table=wide[4])["triton"].code == "head_dim"
        single = cases.Case(dtype=torch.float32).arguments()
        assert fp.explain("attention_decode", *single[:4], block_table=single[4])["triton"].code == "dtype"


Q, CACHE = torch.ones(2, 1, 4, 8), torch.zeros(2, 4, 2, 8)
LENGTHS = torch.tensor([3, 1], dtype=torch.int32)
PAGES, TABLE = torch.zeros(3, 16, 2, 8), torch.tensor([[0, -1], [2, 1]], dtype=torch.int32)
ONE, INT8 = torch.ones(1), CACHE.to(torch.int8)


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((None, CACHE, CACHE, LENGTHS), {}, TypeError, "q must be a tensor, not NoneType"),
        ((Q.double(), CACHE, CACHE, LENGTHS), {}, TypeError, "q must be float16, bfloat16 or float32, not torch.float64"),
        ((Q[0], CACHE, CACHE, LENGTHS), {}, ValueError, r"q must be \[B, S, heads, D\], and has shape \(1, 4, 8\)"),
        ((Q[:, :0], CACHE, CACHE, LENGTHS), {}, ValueError, r"q must have a row for each sequence, and has shape \(2, 0, 4, 8\)"),
        ((Q.transpose(2, 3), CACHE, CACHE, LENGTHS), {}, ValueError, r"last dimension of q must have stride 1, not 8"),
        ((Q, CACHE.half(), CACHE, LENGTHS), {}, TypeError, "k_cache must be a tensor of q's dtype, torch.float32, int8 or "
         "float8_e4m3fn, not torch.float16"),
        ((Q, CACHE, INT8, LENGTHS), {}, ValueError, "k_cache and v_cache must have one shape without columns and one dtype"),
        ((Q, CACHE, CACHE[:, :3], LENGTHS), {}, ValueError, "k_cache and v_cache must have one shape without columns"),
        ((Q, CACHE, CACHE[..., :0], LENGTHS), {}, ValueError, r"v_cache must be \[B, L, Hk, Dv\], and has shape \(2, 4, 2, 0\)"),
        ((Q, CACHE, CACHE.to("meta"), LENGTHS), {}, ValueError, "v_cache is on meta and q on cpu"),
        ((Q, CACHE[..., :7], CACHE, LENGTHS), {}, ValueError, r"k_cache must be \[B, L, Hk, 8\], and has shape \(2, 4, 2, 7\)"),
        ((Q, CACHE.transpose(2, 3).contiguous().transpose(2, 3), CACHE, LENGTHS), {}, ValueError, "last dimension of k_cache"),
        ((Q[:, :, :3], CACHE, CACHE, LENGTHS), {}, ValueError, "must be a multiple of the cache's, and are 3 and 2"),
        ((Q, CACHE[:1], CACHE[:1], LENGTHS), {}, ValueError, "without a block_table k_cache must be of q's batch size, 2"),
        ((Q, CACHE, CACHE, LENGTHS.long()), {}, TypeError, r"seq_lens must be an int32 tensor, not torch.int64: use .int\(\)"),
        ((Q, CACHE, CACHE, [3, 1]), {}, TypeError, "seq_lens must be an int32 tensor, not list"),
        ((Q, CACHE, CACHE, LENGTHS[:1]), {}, ValueError, r"seq_lens must be contiguous \[2\], and has shape \(1,\)"),
        ((Q, CACHE, CACHE, LENGTHS.to("meta")), {}, ValueError, "seq_lens is on meta and q on cpu: move one of them"),
        ((Q, PAGES, PAGES, LENGTHS), {"block_table": TABLE.long()}, TypeError, "block_table must be an int32 tensor"),
        ((Q, PAGES, PAGES, LENGTHS), {"block_table": TABLE[:1]}, ValueError, r"block_table must be \[2, n\]"),
        ((Q, PAGES, PAGES, LENGTHS), {"block_table": TABLE.t()}, ValueError, "last dimension of block_table must have stride 1"),
        ((Q, PAGES[:, :0], PAGES[:, :0], LENGTHS), {"block_table": TABLE}, ValueError, r"k_cache must be \[P, page, Hk, 8\], and"),
        ((Q, INT8, INT8, LENGTHS), {}, TypeError, "k_scale must be a float32 tensor for a cache of torch.int8, not NoneType"),
        ((Q, INT8, INT8, LENGTHS), {"k_scale": ONE, "v_scale": torch.ones(3)}, ValueError, r"v_scale must be \[1\], \[2\] or "
         r"\[2, 4, 2\], and has shape \(3,\)"),
        ((Q, CACHE, CACHE, LENGTHS), {"k_scale": ONE}, ValueError, "k_scale goes with an int8 or float8_e4m3fn cache"),
        ((Q, CACHE, CACHE, LENGTHS), {"scale": 0.0}, ValueError, "scale must be positive and finite in float32, not 0.0"),
        ((Q, CACHE, CACHE, LENGTHS), {"softcap": -1.0}, ValueError, "softcap must be finite and at least 0"),
        ((Q, CACHE, CACHE, LENGTHS), {"window": 5}, TypeError, r"window must be \(left, right\) or None, not 5"),
        ((Q, CACHE, CACHE, LENGTHS), {"window": (-1, 0)}, ValueError, "each side of window must be at least 0, not -1"),
        ((Q, CACHE, CACHE, LENGTHS), {"sinks": torch.ones(3)}, ValueError, "sinks must be contiguous with 4 elements"),
        ((Q, CACHE, CACHE, LENGTHS), {"batch_invariant": 1}, TypeError, "batch_invariant must be True or False, not 1"),
        ((Q, CACHE, CACHE, LENGTHS), {"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes must be contiguous with 4"),
        ((Q, CACHE, CACHE, LENGTHS), {"alibi_slopes": torch.ones(1, 4)}, ValueError, "alibi_slopes must be contiguous with 8"),
        ((Q, CACHE, CACHE, LENGTHS), {"alibi_slopes": torch.ones(4).half()}, TypeError, "alibi_slopes must be a tensor of"),
        ((Q, CACHE, CACHE, LENGTHS), {"leftpad": [0, 1]}, TypeError, r"leftpad must be an int32 tensor, not list: use .int\(\)"),
        ((Q, CACHE, CACHE, LENGTHS), {"leftpad": LENGTHS.long()}, TypeError, "leftpad must be an int32 tensor, not torch.int64"),
        ((Q, CACHE, CACHE, LENGTHS), {"leftpad": LENGTHS[:1]}, ValueError, r"leftpad must be contiguous \[2\], and has shape"),
        ((Q, CACHE, CACHE, LENGTHS), {"leftpad": LENGTHS.to("meta")}, ValueError, "leftpad is on meta and q on cpu: move one"),
    ],
)  # fmt: skip
def test_refusals(args, options, error, words):
    with pytest.raises(error, match=words) as raised:
        fp.ops.attention_decode(*args, **options)
    assert len(str(raised.value).splitlines()) == 1


_DEBUG = """
import contextlib, pytest, torch
import forwardpass as fp
from forwardpass.ops.common import cache_layout
from forwardpass.testing import assert_equal
q, k, lengths = torch.ones(2, 1, 4, 64).half(), torch.ones(2, 1, 2, 64).half(), torch.tensor([3, 1], dtype=torch.int32)
static, pages = torch.zeros(2, 4, 2, 64).half(), torch.zeros(3, 16, 2, 64).half()
table = torch.tensor([[0, -1], [2, 1]], dtype=torch.int32)
cases = (
    (static, lengths + 2, None, "seq_lens must be from 0 to 4, the rows of the cache, and of sequence 0 is 5"),
    (static, lengths - 2, None, "of sequence 1 is -1"),
    (pages, lengths + 30, table, "from 0 to 32, the tokens of the 2 pages in block_table, and of sequence 0 is 33"),
    (pages, lengths + 14, table, "entry 1 of sequence 0, of 17 tokens, is -1"),
    (pages, lengths, table + 1, "entry 0 of sequence 1, of 1 tokens, is 3"),
)
for arch, backend in (("sm_90a", "cuda"), ("sm_80", "triton"), (None, "cpu"), (None, "reference")):
    with fp.interpret(arch) if arch else contextlib.nullcontext(), fp.use_backend(backend):
        for cache, wrong, names, words in cases:
            right = torch.tensor([3, 20 if names is not None else 1], dtype=torch.int32)
            fp.ops.append_kv(k, k, cache, cache.clone(), right, block_table=table if names is not None else None)
            fp.ops.attention_decode(q, cache, cache, right, block_table=table if names is not None else None)
            caches, before = (cache, cache + 1), (cache.clone(), cache + 1)
            for _ in range(2):
                with pytest.raises(ValueError, match=words):
                    fp.ops.attention_decode(q, *caches, wrong, block_table=names)
                with pytest.raises(ValueError, match=words):
                    fp.ops.append_kv(k, k, *caches, wrong, block_table=names)
            for now, then in zip(caches, before):
                assert_equal(now, then)
        fp.ops.attention_decode(q, static, static, lengths, leftpad=lengths)
        with pytest.raises(ValueError, match="leftpad must be at least 0, and of sequence 1 is -1"):
            fp.ops.attention_decode(q, static, static, lengths, leftpad=lengths - 2)
        # a page that no row sees may be gone
        gone, longer = torch.tensor([[0, -1], [-1, 1]], dtype=torch.int32), torch.tensor([3, 30], dtype=torch.int32)
        for window, padding in (((13, None), 0), (None, 16)):
            fp.ops.attention_decode(q, pages, pages, longer, block_table=gone, window=window, leftpad=lengths * 0 + padding)
        for window, padding in (((14, None), 0), (None, 15)):
            with pytest.raises(ValueError, match="entry 0 of sequence 1, of 30 tokens, is -1"):
                fp.ops.attention_decode(q, pages, pages, longer, block_table=gone, window=window, leftpad=lengths * 0 + padding)
torch.cuda.is_current_stream_capturing = lambda: True
class OnGpu:
    device, is_cuda = torch.device("cuda", 0), True
with pytest.raises(RuntimeError, match="append_kv: FORWARDPASS_DEBUG=1 reads lengths on the host, which a graph that is captured"):
    cache_layout.check_lengths("append_kv", static, OnGpu(), None)
"""


@pytest.mark.every(3)
def test_lengths_are_looked_at_where_that_is_asked_for():
    """On every backend, in every call, and nothing is written."""
    done = fork.run(_DEBUG, env=two_threads({"FORWARDPASS_DEBUG": "1"}))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "options", [{}, {"window": 70}, {"page": 16}, {"cache": torch.int8}, {"batch_invariant": True}], ids=str
)
def test_what_is_read(options):
    """Keys that a row sees, each once, and q; besides them lengths, tables and sectors that are read in part."""
    case = cases.Case((1000, 700, 40), 1, 128, (8, 2), **{"page": None, "leftpad": (437, 0, 39), **options})
    args = case.arguments()
    with fp.interpret("sm_90a", counters=True) as device, fp.use_backend("cuda"):
        OPERATION(*args)
    (counts,) = device.kernels("attention_decode_kernel")
    assert 0 <= counts.footprint_read - (case.bytes() - args[0].nbytes) < 1024


@pytest.mark.parametrize("cache", [None, torch.int8, E4M3], ids=str)
def test_offsets_are_64_bits(cache):
    """A page 5 GiB from the first, of memory that is never touched in between."""
    dtype = cache or torch.bfloat16
    step = 2**32 + 2**20
    memory = torch.empty(2 * step, dtype=dtype)
    pages = memory.as_strided((2, 16, 1, 64), (step, 64, 64, 1))
    small = torch.randn(2, 16, 1, 64).to(dtype)
    pages[:] = small
    q, lengths = torch.randn(1, 1, 2, 64).bfloat16(), torch.tensor([27], dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    scale = {} if cache is None else {"k_scale": ONE, "v_scale": ONE}
    expected = fp.ops.attention_decode(q, small, small, lengths, block_table=table, **scale)
    assert_equal(fp.ops.attention_decode(q, pages, pages, lengths, block_table=table, **scale), expected)
