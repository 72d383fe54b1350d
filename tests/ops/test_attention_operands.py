"""quantize_attention, and attention_8bit of what it returns: the bits of attention_8bit of q, k and v."""

import contextlib
import dataclasses

import pytest
import torch
from rotation import in_parts

import forwardpass as fp
from forwardpass.dispatch import operations
from forwardpass.ops.attention import bucket
from forwardpass.ops.attention_8bit import AttentionOperands, cases, reference
from forwardpass.testing import assert_equal, poisoned_outputs

FIELDS = ("q", "q_scale", "q_shift", "k", "k_scale", "v", "v_scale", "v_block_scale")
CASES = list(cases.cases())
#: a kind of each: packed, with a mask, with sinks and without, of several heads to a kv head, and cu_seqlens that are wrong
FEW = [
    cases.Case((70, 300), (64, 64), heads=(4, 2), causal=True, lse=True, layout="unaligned"),
    cases.Case((130, 150), (40, 40), torch.bfloat16, packed=True, lse=True, sinks="float32", causal=True),
    cases.Case((40, 90), (192, 128), torch.bfloat16, mask="dtype bij", softcap=8.0, lse=True, rotates=False),
    cases.Case(
        (40, 70), packed=True, batch=3, lse=True, awkward=False, cu_seqlens=((0, 40, 80, 120), (0, 70, 140, 139))
    ),
    cases.Case((5, 0), packed=True, lse=True),
    cases.Case((5, 7), batch=0, lse=True),
    cases.Case((5, 0), lse=True, sinks="float32"),
]
FP8 = [dataclasses.replace(case, products="fp8") for case in FEW[:3]]


@contextlib.contextmanager
def on(backend, arch=None):
    """Of a GPU's kernels also: no finding."""
    with poisoned_outputs(), fp.use_backend(backend), contextlib.ExitStack() as stack:
        device = stack.enter_context(fp.interpret(arch, seed=0, guard=True)) if arch else None
        yield
    assert device is None or device.findings == []


def public(case):
    """The arguments of a case by their public names: (q, k, v), those of quantize_attention, and those of the call."""
    args = dict(zip(operations["attention_8bit"].parameters, case.arguments()))
    window = args.pop("window_left"), args.pop("window_right")
    args["rotate"] = args.pop("rotates")
    of_both = {n: args[n] for n in ("dtype", "rotate", "cu_seqlens_q", "cu_seqlens_k")}
    return [args.pop(n) for n in "qkv"], of_both, {**args, "window": window}


def assert_same_bits(case, backend, arch=None):
    tensors, of_both, options = public(case)
    with on(backend, arch):
        expected = fp.ops.attention_8bit_with_lse(*tensors, **options)
        x = fp.ops.quantize_attention(*tensors, **of_both)
        got = fp.ops.attention_8bit_with_lse(x, **options)
        without_lse = fp.ops.attention_8bit(x, **options)
    for a, b, name in zip((*got, without_lse), (*expected, expected[0]), ("o", "lse", "o without lse")):
        assert_equal(a, b, name)
    return x


def assert_operands_of_the_reference(x, case, k_scale_bits=24):
    """Integers bit for bit, and all scales but the keys', of which a kernel may have fewer bits; sums in another order."""
    tensors, of_both, _ = public(case)
    with on("reference"):
        expected = fp.ops.quantize_attention(*tensors, **of_both)
    for name in FIELDS:
        a, b = (getattr(y, name) for y in (x, expected))
        if case.products == "fp8" and name == "v_block_scale":
            assert a is b is None
            continue
        assert a.is_contiguous() and (a.shape, a.dtype) == (b.shape, b.dtype), name
        if name == "q_shift":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3, equal_nan=True)
        elif name == "k_scale":
            torch.testing.assert_close(
                a, b, rtol=2.0 ** -(k_scale_bits - 2) * (k_scale_bits < 24), atol=0, equal_nan=True
            )
        elif a.dtype.itemsize == 1:
            assert_equal(a.view(torch.uint8), b.view(torch.uint8), name)
        else:
            assert_equal(a, b, name)
    assert (x.dtype, x.rotate, x.out_dtype) == (case.products, case.rotates, case.dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", in_parts(FEW + CASES, 8))
def test_same_bits(case, backend):
    without_nan = dataclasses.replace(case, awkward=False)
    assert_operands_of_the_reference(assert_same_bits(without_nan, backend), without_nan)
    assert_same_bits(case, backend)


@pytest.mark.every(2)
@pytest.mark.parametrize("case", FEW + FP8)
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90a", marks=pytest.mark.slow)])
@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_same_bits_on_a_gpu(case, backend, arch):
    if case.products == "fp8" and (arch == "sm_80" or backend == "cuda"):
        arch = "sm_89"
    assert bucket(*case.dims)
    case = dataclasses.replace(
        case, awkward=case.awkward and not case.packed
    )  # elsewhere: NaN of sequences nobody reads
    assert_operands_of_the_reference(assert_same_bits(case, backend, arch), case, 22 if backend == "cuda" else 24)


def operands(dtype="int8", **options):
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((5, 4), (7, 2), (7, 2)))
    with fp.use_backend("reference"):
        return fp.ops.quantize_attention(q, k, v, dtype=dtype, **options)


def test_what_they_are():
    """Scores and values of the operands are those of q, k and v but for rounding."""
    q, k, v = torch.randn(3, 2, 9, 4, 32).double().unbind(0)
    k += 3
    x = fp.ops.quantize_attention(*(y.float() for y in (q, k, v)))
    scores = torch.einsum("bihd,bjhd->bhij", x.q.double(), x.k.double())
    scores = scores * x.q_scale.transpose(1, 2)[..., None] * x.k_scale.transpose(1, 2)[..., None, :]
    scores = scores + x.q_shift.transpose(1, 2)[..., None]
    exact = torch.einsum("bihd,bjhd->bhij", q, k)
    assert (scores - exact).norm() < 0.01 * exact.norm()
    values = x.v.double() * x.v_scale[:, None] * x.v_block_scale[..., None]
    assert (values - v).abs().max() <= v.abs().max() / 254


def of_a_cache(
    of_token=True, page=None, rows=40, lengths=(300, 120), head_dim=64, value_dim=None, dtype=torch.float16, seed=0
):
    """(q, cache, what attention_decode takes by name): as append_kv has written it, with numbers behind the lengths."""
    batch, room, heads, value_dim = len(lengths), 320, 2, value_dim or head_dim
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, h, d, generator=g).to(dtype)
               for n, h, d in ((rows, 4, head_dim), (room, heads, head_dim), (room, heads, value_dim)))  # fmt: skip
    v *= torch.logspace(-1, 1, room)[torch.randperm(room, generator=g), None, None].to(dtype)  # tokens' scales differ
    pages, size = (batch, room) if page is None else (batch * room // page, page)
    caches = [
        torch.randint(-127, 128, (pages, size, heads, d), dtype=torch.int8, generator=g) for d in (head_dim, value_dim)
    ]
    scales = [torch.ones(pages, size, heads) if of_token else x.abs().amax((0, 1, 3)).float() / 127 for x in (k, v)]
    table = None if page is None else torch.randperm(pages, generator=g).int().reshape(batch, -1)
    full = torch.full((batch,), room, dtype=torch.int32)
    fp.ops.append_kv(k, v, *caches, full, block_table=table, k_scale=scales[0], v_scale=scales[1])
    given = {"k_scale": scales[0], "v_scale": scales[1], "block_table": table}
    return q, (*caches, torch.tensor(lengths, dtype=torch.int32)), given


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("backend", "arch"),
    [("reference", None), ("cpu", None), ("cuda", "sm_80"), ("cuda", "sm_90a"), ("triton", "sm_80")],
)
@pytest.mark.parametrize("of_token", [False, True])
@pytest.mark.parametrize("page", [None, 16])
def test_an_int8_cache_is_operands(backend, arch, of_token, page):
    """As append_kv has written it, contiguous and in pages, with scales of heads and of tokens."""
    q, cache, given = of_a_cache(of_token, page)
    with fp.use_backend("reference"):
        exact, exact_lse = fp.ops.attention_decode_with_lse(q, *cache, window=(200, None), **given)
    with on(backend, arch) if arch else on(backend):
        x = AttentionOperands.of_cache(q, *cache, **given)
        o, lse = fp.ops.attention_8bit_with_lse(x, rotate=False, causal=True, window=(200, None))
    assert (o.shape, o.dtype) == (exact.shape, q.dtype) and (lse.shape, lse.dtype) == (exact_lse.shape, torch.float32)
    assert (o - exact).float().norm() < 0.02 * exact.float().norm()
    assert (lse - exact_lse).norm() < 2e-3 * exact_lse.norm()


@pytest.mark.parametrize("page", [None, 64])
def test_what_of_a_cache_is_kept(page):
    """k's integers and scales, and v's of heads, whose blocks then have the scale 1; of tokens v is that of quantize_attention."""
    for of_token in (False, True):
        q, (k_cache, v_cache, lengths), given = of_a_cache(of_token, page)
        x = AttentionOperands.of_cache(q, k_cache, v_cache, lengths, **given)
        scales = [s if of_token else s.expand(k_cache.shape[:3]) for s in (given["k_scale"], given["v_scale"])]
        for b, (begin, n) in enumerate(zip(x.cu_seqlens_k.tolist(), lengths.tolist())):
            pages = [b] if page is None else given["block_table"][b].tolist()
            k, v, k_scale, v_scale = (torch.cat([t[i] for i in pages])[:n] for t in (k_cache, v_cache, *scales))
            mine = slice(begin, begin + n)
            assert_equal(x.k[mine], k)
            assert_equal(x.k_scale[mine], k_scale.contiguous())
            if of_token:
                values = (v * v_scale[..., None]).transpose(0, 1)
                v, of_channel, of_block = reference.values_to_8bit(values, "int8")
                assert_equal(x.v[mine].float(), v.transpose(0, 1).contiguous())
                assert_equal(x.v_scale[b], of_channel[:, 0])
                assert_equal(x.v_block_scale[mine], of_block[..., 0].T.contiguous())
            else:
                assert_equal(x.v[mine], v)
                assert_equal(x.v_scale[b], given["v_scale"][:, None].expand(2, 64).contiguous())
                assert x.v_block_scale[mine].eq(1).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_cache_of_e4m3_products_and_options(backend):
    """dtype="fp8" rounds v to e4m3; sinks, ALiBi and softcap as attention_decode has them; other columns of v."""
    q, cache, given = of_a_cache(page=32, head_dim=96, value_dim=64, dtype=torch.float32)
    options = {"sinks": torch.tensor([0.5, 1.0, -torch.inf, 2.0]), "softcap": 20.0}
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    exact = fp.ops.attention_decode(q, *cache, **given, alibi_slopes=slopes, **options)
    for dtype, bound in (("int8", 0.02), *([("fp8", 0.05)] if backend == "reference" else [])):
        with on(backend):
            x = AttentionOperands.of_cache(q, *cache, **given, dtype=dtype)
            o = fp.ops.attention_8bit(x, dtype=dtype, rotate=False, causal=True, alibi_slopes=slopes, **options)
        assert (o - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lengths_and_pages_that_are_none(backend):
    """Rows are NaN as attention_decode's are: of lengths below 0 and beyond the cache, and where a key has no page. Others, and
    sequences of no keys, are what they are alone."""
    q, (k_cache, v_cache, _), given = of_a_cache(page=16, lengths=(300, 120, 0, 64, 100, 50), dtype=torch.float32)
    lengths = torch.tensor([300, -1, 0, 10**6, 100, 50], dtype=torch.int32)
    table = given.pop("block_table")
    table[0, 2], table[4, 5], table[5, 4:] = -1, 10**6, -7  # keys 32 to 47 and 80 to 95; and none that counts
    cache = k_cache, v_cache, lengths
    with on(backend):
        x = AttentionOperands.of_cache(q, *cache, block_table=table, **given)
        for window in (None, (20, None)):
            o = fp.ops.attention_8bit(x, rotate=False, causal=True, window=window)
            expected = fp.ops.attention_decode(q, *cache, block_table=table, window=window, **given)
            assert torch.equal(o.isnan(), expected.isnan()) and o[[1, 3]].isnan().all() and not o[2].any()
            assert o[0].isnan().all() if window is None else o[0].isfinite().all()
            assert (o - expected).nan_to_num(0).norm() < 0.02 * expected.nan_to_num(0).norm()


def test_one_scale_for_a_whole_cache():
    q, cache, _ = of_a_cache(False, dtype=torch.float32)
    one = {"k_scale": torch.tensor([0.03]), "v_scale": torch.tensor([0.05])}
    two = {name: scale.expand(2).contiguous() for name, scale in one.items()}
    for dtype in ("int8", "fp8"):
        x, y = (AttentionOperands.of_cache(q, *cache, **scales, dtype=dtype) for scales in (one, two))
        for name in FIELDS[: None if dtype == "int8" else -1]:
            assert_equal(*(getattr(t, name).view(torch.int8) if getattr(t, name).dtype == torch.float8_e4m3fn else
                           getattr(t, name) for t in (x, y)), name)  # fmt: skip


def test_refusals_of_a_cache():
    q, (k_cache, v_cache, lengths), given = of_a_cache()
    x = AttentionOperands.of_cache(q, k_cache, v_cache, lengths, **given)
    of_cache = AttentionOperands.of_cache
    e4m3 = [t.to(torch.float8_e4m3fn) for t in (k_cache, v_cache)]
    starts = x.cu_seqlens_q
    for call, error, text in (
        (lambda: of_cache(q, *e4m3, lengths, **given), TypeError, "the cache must be int8.*use attention_decode"),
        (lambda: of_cache(q, k_cache.half(), v_cache.half(), lengths, k_scale=None, v_scale=None), TypeError, "must be int8"),
        (lambda: of_cache(q, k_cache, v_cache, lengths.long(), **given), TypeError, "seq_lens must be an int32"),
        (lambda: of_cache(q, k_cache[:, :30], v_cache[:, :30], lengths, k_scale=given["k_scale"][:, :30],
                          v_scale=given["v_scale"][:, :30]), ValueError, "q has 40 rows .* room for 30 keys"),
        (lambda: of_cache(q, k_cache, v_cache, lengths, **given, dtype="int4"), ValueError, "dtype is 'int8' or 'fp8'"),
        (lambda: of_cache(q[0], k_cache, v_cache, lengths, **given), ValueError, "q must be .B, S, heads, D."),
        (lambda: fp.ops.attention_8bit(x, rotate=False, cu_seqlens_q=starts, cu_seqlens_k=starts), ValueError, "of a cache"),
        (lambda: fp.ops.attention_8bit(x, rotate=True), ValueError, "quantised with rotate=False"),
        (lambda: fp.ops.attention_8bit(x, rotate=False, mask=torch.ones(1, 1).bool()), ValueError, "mask"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            call()


@pytest.mark.every(2)
def test_a_cache_compiles_whole():
    def f(q, k_cache, v_cache, lengths, table, k_scale, v_scale):
        x = AttentionOperands.of_cache(
            q, k_cache, v_cache, lengths, k_scale=k_scale, v_scale=v_scale, block_table=table
        )
        return fp.ops.attention_8bit(x, rotate=False, causal=True)

    q, cache, given = of_a_cache(page=16, dtype=torch.float32)
    args = (q, *cache, given["block_table"], given["k_scale"], given["v_scale"])
    with fp.use_backend("cpu"):
        assert_equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))


def test_compiles_whole():
    def f(q, k, v):
        x = fp.ops.quantize_attention(q, k, v)
        return fp.ops.attention_8bit(x, causal=True)

    args = torch.randn(3, 2, 9, 4, 32).unbind(0)
    with fp.use_backend("cpu"):
        assert_equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_opcheck(backend):
    x = operands()
    given = [x.q, x.k, x.v, "int8", True, None, False, None, None, 0.0, *[None] * 5, False, x.q_scale, x.q_shift, x.k_scale,
             x.v_scale, x.v_block_scale, torch.float16]  # fmt: skip
    if backend != "cpu":
        given = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in given]
    for name in ("attention_8bit", "attention_8bit_with_lse"):
        torch.library.opcheck(getattr(torch.ops.forwardpass, f"{name}_{backend}").default, tuple(given))


def test_refusals():
    x = operands()
    q = torch.randn(2, 5, 4, 16)
    for call, error, text in (
        (lambda: fp.ops.attention_8bit(x, q, q), TypeError, "k and v go with a tensor q"),
        (lambda: fp.ops.attention_8bit(q), TypeError, "k must be a tensor, not NoneType"),
        (lambda: fp.ops.attention_8bit(x, rotate=False), ValueError, "quantised with rotate=True, and rotate is False"),
        (lambda: fp.ops.attention_8bit(x, dtype="fp8"), ValueError, "quantised with dtype='int8', and dtype is 'fp8'"),
        (lambda: fp.ops.attention_8bit(x, dtype="int4"), ValueError, "dtype is 'int8' or 'fp8', not 'int4'"),
        (lambda: fp.ops.quantize_attention(q, q, q, dtype="int4"), ValueError, "quantize_attention: dtype is"),
        (lambda: fp.ops.quantize_attention(q, q[:1], q), ValueError, "quantize_attention: k and v must have the same"),
        (lambda: fp.ops.attention_8bit(x, mask=torch.ones(3, 3)), ValueError, "mask must broadcast"),
        (lambda: fp.ops.attention_8bit(x, sinks=torch.ones(4).half()), TypeError, "sinks"),
    ):
        with pytest.raises(error, match=text):
            call()
    for change, error, text in (
        ({"q": x.q.float()}, TypeError, "q of the operands must be a tensor of torch.int8, not torch.float32"),
        ({"v": x.v.to(torch.float8_e4m3fn)}, TypeError, "v of the operands must be a tensor of torch.int8"),
        ({"k_scale": None}, TypeError, "k_scale of the operands must be a tensor of torch.float32, not NoneType"),
        ({"q_scale": x.q_scale[:, :4]}, ValueError, "q_scale of the operands must be .2, 5, 4., contiguous"),
        (
            {"v_scale": x.v_scale.mT.contiguous().mT},
            ValueError,
            "v_scale of the operands must be .2, 2, 16., contiguous",
        ),
        ({"v_block_scale": None}, TypeError, "v_block_scale of the operands must be a tensor of torch.float32"),
        ({"v_block_scale": x.v_block_scale[:, :1]}, ValueError, "v_block_scale of the operands must be .2, 7, 2."),
        ({"k": x.k[:, :5].contiguous()}, ValueError, "k_scale of the operands must be .2, 5, 2."),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype of the operands must be float16"),
        ({"q": x.q.to("meta")}, ValueError, "on meta, and is"),
    ):
        with pytest.raises(error, match=f"attention_8bit: {text}" if text[0] != "o" else text):
            fp.ops.attention_8bit(dataclasses.replace(x, **change))
    with_block_scale = dataclasses.replace(operands("fp8"), v_block_scale=x.v_block_scale)
    with pytest.raises(TypeError, match="v_block_scale of the operands is of int8 alone"):
        fp.ops.attention_8bit(with_block_scale, dtype="fp8")
    with fp.use_backend("cpu"), pytest.raises(fp.Unsupported, match="no CPU multiplies e4m3"):
        fp.ops.attention_8bit(operands("fp8"), dtype="fp8")
    with fp.interpret("sm_80"), fp.use_backend("triton"), pytest.raises(fp.Unsupported, match="q is float32"):
        fp.ops.attention_8bit(x)
    assert isinstance(x, AttentionOperands) and reference.BLOCK == 64
