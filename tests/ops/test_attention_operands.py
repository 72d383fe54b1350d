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

FIELDS = ("q", "q_scale", "q_shift", "k", "k_scale", "v", "v_scale")
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
    values = x.v.double() * x.v_scale[:, None]
    assert (values - v).abs().max() <= v.abs().max() / 254


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("of_token", [False, True])
def test_an_int8_cache_is_operands(backend, of_token):
    """As append_kv has written it: k with a scale for each head or each token and head, v with one for each head."""
    (batch, rows, room, heads, dim), lengths = (2, 4, 300, 2, 64), torch.tensor([300, 120], dtype=torch.int32)
    q, k, v = (torch.randn(batch, n, h, dim) for n, h in ((rows, 4), (room, heads), (room, heads)))
    k_cache, v_cache = torch.zeros(2, batch, room, heads, dim, dtype=torch.int8)
    k_scale, v_scale = (x.abs().amax((0, 1, 3)) / 127 for x in (k, v))
    if of_token:
        k_scale, v_scale = torch.zeros(batch, room, heads), torch.zeros(batch, room, heads)
    full = torch.full_like(lengths, room)
    fp.ops.append_kv(k, v, k_cache, v_cache, full, k_scale=k_scale, v_scale=v_scale)
    if of_token:  # v once more: operands have one scale for all of its tokens
        v_scale = v.abs().amax((0, 1, 3)) / 127
        v_cache = (v / v_scale[:, None]).round().to(torch.int8)
    values = v_cache * v_scale[:, None]
    keys = k_cache * (k_scale if of_token else k_scale.expand(batch, room, heads))[..., None]
    exact = fp.ops.attention_decode(q, keys, values, lengths)
    q8, q_scale, _ = fp.ops.quantize(q, torch.int8)
    x = AttentionOperands(
        q8, q_scale, torch.zeros_like(q_scale), k_cache, k_scale.expand(batch, room, heads).contiguous(), v_cache,
        v_scale[:, None].expand(batch, heads, dim).contiguous(), "int8", rotate=False, out_dtype=q.dtype,
    )  # fmt: skip
    seen = torch.arange(room) < (lengths[:, None] - rows + 1 + torch.arange(rows))[..., None]  # as attention_decode
    with on(backend):
        o = fp.ops.attention_8bit(x, rotate=False, mask=seen[:, None])
    assert (o - exact).norm() < 0.015 * exact.norm()


def test_compiles_whole():
    def f(q, k, v):
        x = fp.ops.quantize_attention(q, k, v)
        return fp.ops.attention_8bit(x, causal=True)

    args = torch.randn(3, 2, 9, 4, 32).unbind(0)
    with fp.use_backend("cpu"):
        assert_equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_opcheck(backend):
    x = operands()
    given = [x.q, x.k, x.v, "int8", True, None, False, None, None, 0.0, *[None] * 5, False, x.q_scale, x.q_shift, x.k_scale,
             x.v_scale, torch.float16]  # fmt: skip
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
        ({"k": x.k[:, :5].contiguous()}, ValueError, "k_scale of the operands must be .2, 5, 2."),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype of the operands must be float16"),
        ({"q": x.q.to("meta")}, ValueError, "on meta, and is"),
    ):
        with pytest.raises(error, match=f"attention_8bit: {text}" if text[0] != "o" else text):
            fp.ops.attention_8bit(dataclasses.replace(x, **change))
    with fp.use_backend("cpu"), pytest.raises(fp.Unsupported, match="no CPU multiplies e4m3"):
        fp.ops.attention_8bit(operands("fp8"), dtype="fp8")
    with fp.interpret("sm_80"), fp.use_backend("triton"), pytest.raises(fp.Unsupported, match="q is float32"):
        fp.ops.attention_8bit(x)
    assert isinstance(x, AttentionOperands) and reference.BLOCK == 64
