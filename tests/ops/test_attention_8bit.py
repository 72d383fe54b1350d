"""attention_8bit, attention_8bit_with_lse: how far 8 bits are from attention, and that the CPU's integers are the reference's."""

import dataclasses
import math

import pytest
import torch
from rotation import in_parts

import forwardpass as fp
from forwardpass.common.models.compare import relative_error
from forwardpass.dispatch import operations
from forwardpass.ops.attention import reference as attention
from forwardpass.ops.attention_8bit import cases, reference
from forwardpass.testing import assert_equal, poisoned_outputs

CASES = list(cases.cases())
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "reference")
#: (backend, dtype) that there are
PRODUCTS = (("cpu", "int8"), ("reference", "int8"), ("reference", "fp8"))
#: of the output's norm, against float64, and the worst row's cosine: (int8, fp8)
BARS = {"normal": (0.015, 0.04), "outliers": (0.02, 0.035), "peaked": (0.026, 0.04)}
COSINES = {"normal": (0.999, 0.998), "outliers": (0.998, 0.998), "peaked": (0.998, 0.997)}


def run(args, lse=True, backend="cpu"):
    with poisoned_outputs(), fp.use_backend(backend):
        return operations["attention_8bit_with_lse" if lse else "attention_8bit"](*args)


def options(rotates=True, dtype="int8", **given):
    """What follows q, k and v in the schema."""
    names = operations["attention_8bit"].parameters[5:16]
    defaults = {"causal": False, "softcap": 0.0, "batch_invariant": False}
    assert given.keys() <= set(names)
    return dtype, rotates, *(given.get(name, defaults.get(name)) for name in names)


# ---- what 8 bits lose


def operands(kind, d, keys, rows=256):
    """[1, n, 1, d] float64: normal; three channels of q and k 12 times as large; q three times as large, so that few keys count."""
    g = torch.Generator().manual_seed(d + keys)
    q, k, v = (torch.randn(1, n, 1, d, generator=g, dtype=torch.float64) for n in (rows, keys, keys))
    if kind == "outliers":
        for channel in (1, d // 3, d // 2):
            k[..., channel] *= 12
    return (3 * q if kind == "peaked" else q), k, v


@pytest.mark.every(2)
@pytest.mark.parametrize(("backend", "dtype"), PRODUCTS)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kind", BARS)
def test_error(kind, d, backend, dtype):
    q, k, v = operands(kind, d, 1024)
    exact = attention.attention(q, k, v, *options()[2:])
    o = run((q.float(), k.float(), v.float(), *options(dtype=dtype)), False, backend)
    assert relative_error(o, exact) <= BARS[kind][dtype == "fp8"]
    assert torch.cosine_similarity(o.double(), exact, -1).min() >= COSINES[kind][dtype == "fp8"]


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", ["normal", "peaked"])
def test_error_of_many_keys(kind):
    """A channel's largest value grows with the keys: with one scale for a channel alone these are .0156 and .0257."""
    q, k, v = operands(kind, 128, 131072)
    of_keys = (torch.softmax(rows @ k[0, :, 0].T / 128**0.5, -1) for rows in q[0, :, 0].split(64))
    exact = torch.cat([p @ v[0, :, 0] for p in of_keys])
    o = run((q.float(), k.float(), v.float(), *options()), False)
    assert relative_error(o[0, :, 0], exact) <= BARS[kind][0]


@pytest.mark.parametrize(("backend", "dtype"), PRODUCTS)
def test_small_values_beside_large_ones(backend, dtype):
    """Sixty-four keys of v that are a thousandth of the others have all steps for themselves."""
    q, k, v = operands("normal", 64, 192, 192)
    v[:, 64:128] /= 1000
    given = {"window_left": 63, "window_right": 0}  # row 127 sees keys 64 to 127
    o = run((q.float(), k.float(), v.float(), *options(dtype=dtype, **given)), False, backend)[0, 127, 0]
    exact = attention.attention(q, k, v, *options(**given)[2:])[0, 127, 0]
    assert relative_error(o, exact) <= BARS["normal"][dtype == "fp8"] * 1.5


@pytest.mark.parametrize(("backend", "dtype"), PRODUCTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_channel_with_a_nan_leaves_others_their_scale(value, backend, dtype):
    q, k, v = (x.float() for x in operands("normal", 64, 100, 9))
    v[..., 3] = 0
    without = run((q, k, v, *options(dtype=dtype)), False, backend)
    v[0, 70, 0, 3] = value
    o = run((q, k, v, *options(dtype=dtype)), False, backend)
    assert o[..., 3].isnan().all()
    others = torch.arange(64) != 3
    assert_equal(o[..., others], without[..., others])


def test_outliers_need_the_rotation():
    """What the bar of outliers is for: the same scores without it are far off."""
    q, k, v = operands("outliers", 64, 1024)
    exact = attention.attention(q, k, v, *options()[2:])
    errors = [relative_error(run((q.float(), k.float(), v.float(), *options(r)), False), exact) for r in (True, False)]
    assert errors[0] <= 0.02 < errors[1]


@pytest.mark.parametrize(("backend", "dtype"), PRODUCTS)
def test_a_peak_and_a_long_tail(backend, dtype):
    """A peak of 1 and 16 thousand keys at a thousandth of it, which sum to 16: in steps of a 255th of the row's largest each of
    them would be 0. Of the peak's own block of 64 keys at most 63 / 510 of the peak is lost; in e4m3 nothing but rounding."""
    keys, d = 16384, 64
    q, k = torch.zeros(1, 1, 1, d), torch.zeros(1, keys, 1, d)
    mask = torch.full((1, keys), -math.log(1000.0))
    peak = 100
    mask[0, peak] = 0
    v = torch.zeros(1, keys, 1, d)
    v[:, :, 0, 0], v[:, peak, 0, 1] = 1, 1
    o, lse = run((q, k, v, *options(mask=mask, dtype=dtype)), True, backend)
    total = 1 + (keys - 1) / 1000
    assert lse.item() == pytest.approx(math.log(total), abs=1e-5)
    lost = (1 - o[0, 0, 0, 0].item()) * total
    if dtype == "int8":
        assert 0 <= lost <= 63 / 510
    else:
        assert abs(lost) <= 63 / 1000 / 16
    assert o[0, 0, 0, 1].item() == pytest.approx(1 / total, rel=1e-5)


@pytest.mark.parametrize(("backend", "dtype"), PRODUCTS)
@pytest.mark.parametrize("value", [1.0, -3.0, 0.0])
def test_a_row_of_constant_v_is_that_constant(value, backend, dtype):
    """But for the rounding of the probabilities, as a row is divided by their sum before it."""
    q, k, _ = operands("normal", 64, 300, 20)
    v = torch.full((1, 300, 1, 64), value)
    o = run((q.float(), k.float(), v, *options(dtype=dtype)), False, backend)
    torch.testing.assert_close(o, torch.full_like(o, value), rtol=4e-3 if dtype == "int8" else 1e-2, atol=0)


# ---- the CPU's integers


@pytest.mark.parametrize("case", in_parts(CASES, 4))
def test_backend(case, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(run(args, case.lse), args)


FLOAT32 = [dataclasses.replace(c, dtype=torch.float32) for c in CASES if c.dtype != torch.float32]


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts(FLOAT32, 8))
def test_float32(case, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(run(args, case.lse), args)


def each_key_alone(q, k, v, **given):
    """(o, lse), [keys, ...]: of each row against one key, whose probability is 1."""
    n = k.shape[1]
    batch = [x.expand(n, -1, -1, -1) for x in (q, k, v)]
    return run((*batch, *options(mask=torch.eye(n, dtype=torch.bool).reshape(n, 1, 1, n), **given)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("d", [64, 40, 7, 192])
def test_scores_are_the_references_integers(d, rotates, dtype):
    """The log-sum-exp of a single key is its score, from which the integer follows; k's centre is 0, as half of the keys are the
    others with the other sign. One step more in q or k, and a product is another number."""
    g = torch.Generator().manual_seed(d)
    q, half = (torch.randn(1, n, 2, d, generator=g).mul(64).round().div(64) for n in (9, 32))
    half[..., d // 2] *= 8
    q, k = q.to(dtype), torch.cat([half, -half], 1).to(dtype)
    _, lse = each_key_alone(q, k, torch.zeros(1, 64, 2, 8, dtype=dtype), rotates=rotates, scale=0.01)
    x = reference.quantize(q[0], k[0], torch.zeros(64, 2, 8, dtype=dtype), rotates)
    assert not x.shift.any()
    expected = x.q.double() @ x.k.double().transpose(1, 2)  # [heads, rows, keys]
    unit = (x.k_scale.transpose(1, 2) * (x.q_scale * 0.01)).double()
    got = lse.permute(1, 2, 0).double() / unit
    assert_equal(got.round().contiguous(), expected)
    assert (got - expected).abs().max() < 0.25  # so that rounding hides no step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dv", [64, 7, 136])
def test_values_are_the_references_integers(dv, dtype):
    """The output of a single key is its value in 8 bits."""
    v = torch.randn(1, 70, 2, dv, generator=torch.Generator().manual_seed(dv)).to(dtype)
    o, _ = each_key_alone(torch.zeros(1, 1, 2, 8, dtype=dtype), torch.zeros(1, 70, 2, 8, dtype=dtype), v)
    x = reference.quantize(torch.zeros(1, 2, 8), torch.zeros(70, 2, 8), v[0], True)
    got = (o[:, 0].transpose(0, 1).double() / (x.v_scale * x.v_block_scale)).round()  # [heads, keys, columns]
    assert_equal(got.contiguous(), x.v.double().contiguous())


def test_sums_of_products_are_exact():
    """255 * 127 * 64 of one sign: in 16 bits, or as floats of 16 bits, they would not be."""
    n = 64
    o, _ = run((torch.zeros(1, 5, 1, 8), torch.zeros(1, n, 1, 8), torch.full((1, n, 1, 40), 127.0), *options()))
    torch.testing.assert_close(o, torch.full_like(o, 127.0), rtol=1e-6, atol=0)
    q = torch.full((1, 3, 1, 256), -127.0)
    k = torch.cat([torch.full((1, 32, 1, 256), -127.0), torch.full((1, 32, 1, 256), 127.0)], 1)  # whose mean is 0
    _, lse = each_key_alone(q, k, torch.zeros(1, 64, 1, 8), rotates=False, scale=1.0)
    torch.testing.assert_close(lse[0], torch.full((1, 3), 127.0**2 * 256), rtol=1e-6, atol=0)


def test_values_too_small_for_a_scale_are_0():
    q, k, v = (torch.full((1, 5, 2, 16), x) for x in (1.0, 1.0, 1e-38))
    for backend, dtype in PRODUCTS:
        o, lse = run((q, k, v, *options(dtype=dtype)), True, backend)
        assert not o.any() and lse.isfinite().all()


# ---- e4m3


def test_values_and_probabilities_are_e4m3():
    """By hand: v of 448ths of its channel's largest, p of 448ths of the largest of 64 keys, both to the nearest of three bits."""
    v = torch.zeros(1, 65, 1, 2)
    v[0, 0, 0], v[0, 64, 0] = (
        torch.tensor([448.0, 1.0]),
        torch.tensor([21.0, 0.3]),
    )  # 21 lies between 20 and 22, to even
    mask = torch.full((1, 65), -torch.inf)
    mask[0, 0], mask[0, 1], mask[0, 64] = 0, math.log(17 / 448), -20  # 17 between 16 and 18
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 65, 1, 2)
    o, lse = run((q, k, v, *options(dtype="fp8", mask=mask)), True, "reference")
    total = 1 + 17 / 448 + math.exp(-20)
    assert lse.item() == pytest.approx(math.log(total), rel=1e-6)
    small = math.exp(-20)  # of a block of its own, so a whole unit of it
    expected = [(448 + small * 20) / total, (1 + small * 128 / 448) / total]
    assert o.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    v[0, 1, 0, 0] = 448.0
    o, _ = run((q, k, v, *options(dtype="fp8", mask=mask)), True, "reference")
    assert o.flatten().tolist()[0] == pytest.approx((448 + 16 + small * 20) / total, rel=1e-6)


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts(CASES, 8))
def test_fp8_is_near_int8(case):
    """Every option: another rounding of the same scores."""
    args = case.arguments()
    names = operations["attention_8bit"].parameters
    at = names.index("dtype")
    (o8, lse8), (o, lse) = (run((*args[:at], t, *args[at + 1 :]), True, "reference") for t in ("int8", "fp8"))
    assert_equal(lse.nan_to_num(7, 8, 9), lse8.nan_to_num(7, 8, 9))
    assert_equal(o.isnan(), o8.isnan())
    assert relative_error(o.nan_to_num(), o8.nan_to_num()) < 0.06


# ---- what users of other packages lost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_that_sageattention_drops(dtype):
    """`attn_mask` is among the arguments that its function for torch's scaled_dot_product_attention ignores: padding was read."""
    q, k, v = (torch.randn(2, 40, 2, 64).to(dtype) for _ in range(3))
    padding = torch.arange(40).reshape(1, 1, 1, 40) < torch.tensor([40, 23]).reshape(2, 1, 1, 1)
    for mask in (padding, torch.where(padding, 0.0, -torch.inf), torch.where(padding, 0.0, -torch.inf).to(dtype)):
        o, lse = run((q, k, v, *options(mask=mask)))
        cases.assert_matches((o, lse), (q, k, v, *options(mask=mask)))
        exact = attention.attention(*(x.double() for x in (q, k, v)), *options(mask=padding)[2:])
        assert relative_error(o, exact) < 0.03
        loud = v.clone()
        loud[1, 23:] *= -1  # of the same channels' range
        assert_equal(run((q, k, loud, *options(mask=mask)))[0], o)


def test_strides_beyond_2_31_elements():
    """Offsets of 32 bits wrap: in views of a fused QKV, and of V. The memory is reserved and hardly touched."""
    step, n, d = 2**31 // 3 + 1000, 5, 64
    memory = torch.empty(4 * step + 2 * d, dtype=torch.bfloat16)
    q, k, v = (torch.randn(1, n, 1, d).bfloat16() for _ in range(3))
    far = []
    for i, x in enumerate((k, v)):
        far.append(memory.as_strided((1, n, 1, d), (5 * step, step, d, 1), i * d))
        far[-1].copy_(x)
    assert (n - 1) * far[0].stride(1) > 2**31
    for a, b in zip(run((q, *far, *options(causal=True))), run((q, k, v, *options(causal=True)))):
        assert_equal(a, b)
    for a, b in zip(run((far[0], *far, *options())), run((k, k, v, *options()))):
        assert_equal(a, b)


# ---- rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_others(dtype):
    """Tiles and chunks are in other places with fewer rows, heads or sequences; threads take chunks."""
    q, k, v = (torch.randn(3, n, 2, 64).to(dtype) for n in (300, 400, 400))
    for given in ({}, {"causal": True}, {"window_left": 130, "window_right": 20}):
        o, lse = run((q, k, v, *options(**given)))
        for b, first in ((0, 0), (1, 1), (2, 295)):
            some = run((q[b : b + 1, first:], k[b : b + 1], v[b : b + 1], *options(**given)))
            assert_equal(some[0][0], o[b, first:])
            assert_equal(some[1][0], lse[b, :, first:].contiguous())


@pytest.mark.parametrize(("backend", "dtype"), PRODUCTS)
def test_rows_without_keys(backend, dtype):
    q, k, v = (torch.randn(1, n, 2, 8) for n in (6, 4, 4))
    sinks = torch.tensor([1.5, -torch.inf])
    lowest = torch.finfo(torch.float32).min
    for given in (
        {"causal": True},  # the first two rows stand before all keys
        {"mask": torch.arange(6).ge(2).reshape(6, 1)},
        {"mask": torch.where(torch.arange(6) < 2, lowest, 0.0).reshape(6, 1)},
    ):
        o, lse = run((q, k, v, *options(dtype=dtype, **given)), True, backend)
        assert not o[:, :2].any() and o[:, 2:].any(-1).all()
        assert lse[:, :, :2].isneginf().all() and lse[:, :, 2:].isfinite().all()
        o, lse = run((q, k - k.mean(1, keepdim=True), v, *options(dtype=dtype, sinks=sinks, **given)), True, backend)
        assert not o[:, :2].any()
        torch.testing.assert_close(lse[0, :, 0], sinks)
    o, lse = run((q, k[:, :0], v[:, :0], *options(dtype=dtype, sinks=sinks)), True, backend)
    assert not o.any() and lse[0, 0].tolist() == [1.5] * 6 and lse[0, 1].isneginf().all()


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 1.5])], ids=["", "sinks"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinities_are_where_the_reference_has_them(value, sinks):
    for place in range(3):
        args = [torch.randn(2, 70, 2, 8) for _ in range(3)]
        args[place][0, 66, 1, 2] = value
        for given in ({}, {"causal": True}, {"window_left": 3, "window_right": 0}, {"softcap": 5.0}):
            call = (*args, *options(sinks=sinks, **given))
            got, expected = run(call), run(call, True, "reference")
            for a, b in zip(got, expected):
                assert_equal(a.isnan(), b.isnan())
            assert got[0][0, 66, 1].isnan().any() and not got[0][1].isnan().any()


def test_the_bound_can_fail():
    case = dataclasses.replace(CASES[0], sinks="float32")
    args = case.arguments()
    o, lse = run(args)
    cases.assert_matches((o, lse), args)
    for wrong, what in (
        ((o * 1.004, lse), "o: off by"),
        ((o, lse * 1.004), "lse: off by"),
        ((o.half(), lse), "o: torch.float16"),
        (run((*args[:4], not args[4], *args[5:])), "off by"),
    ):
        with pytest.raises(AssertionError, match=what):
            cases.assert_matches(wrong, args)


# ---- as an operation


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts([c for c in CASES if not c.packed][::4], 5))
def test_opcheck(case):
    torch.library.opcheck(getattr(torch.ops.forwardpass, f"{case.op}_cpu").default, case.arguments())


@pytest.mark.every(2)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    q, k, v, mask = torch.randn(2, 9, 4, 33), torch.randn(2, 12, 2, 33), torch.randn(2, 12, 2, 33), torch.randn(9, 12)

    def f(q, k, v, mask):
        o, lse = fp.ops.attention_8bit_with_lse(q, k, v, causal=True, window=(5, None), mask=mask)
        return fp.ops.attention_8bit(o, k, v, scale=0.5, rotate=False) + lse.sum()

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with fp.use_backend("cpu"):
        torch.testing.assert_close(compiled(q, k, v, mask), f(q, k, v, mask), rtol=0, atol=0)


def test_arguments_are_refused():
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="attention_8bit: dtype is 'int8' or 'fp8', not 'int4'"):
        fp.ops.attention_8bit(q, q, q, dtype="int4")
    with pytest.raises(TypeError, match="attention_8bit_with_lse: rotate must be True or False, not 1"):
        fp.ops.attention_8bit_with_lse(q, q, q, rotate=1)
    for scale in (1e-60, 1e60):
        with pytest.raises(ValueError, match="attention_8bit: scale must be positive and finite in float32, not 1e"):
            fp.ops.attention_8bit(q, q, q, scale=scale)
    with pytest.raises(ValueError, match="attention_8bit: k must be"):
        fp.ops.attention_8bit(q, q[0], q)
    with fp.use_backend("cpu"), pytest.raises(fp.Unsupported, match='cpu: no CPU multiplies e4m3; use dtype="int8"'):
        fp.ops.attention_8bit(q, q, q, dtype="fp8")


def test_nothing_but_the_cpu_has_kernels_for_it():
    q = torch.randn(1, 3, 2, 8)
    assert fp.explain("attention_8bit", q, q, q).backend == "cpu"
    assert fp.explain("attention_8bit", q, q, q, dtype="fp8").backend == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_a_scale_that_underflows_beside_a_rows(backend):
    """q's scales times the softmax's are 0 in float32: all scores are 0 as far as it can say."""
    q, k, v = (torch.randn(1, 40, 2, 64).bfloat16() for _ in range(3))
    even = v.mean(1, keepdim=True).expand_as(v)
    with fp.use_backend(backend):
        for scale in (1e-20, 1e-38, 2.0**-149):
            got = fp.ops.attention_8bit(q * 1e-28, k * 50, v, scale=scale)
            torch.testing.assert_close(got, even, rtol=0, atol=0.02)


@pytest.mark.parametrize("scale", [1e-30, 1e7, 1e30])
@pytest.mark.parametrize("times", [1.0, 2.0**40])
def test_far_scores(scale, times):
    q, k, v = (torch.randn(1, 150, 2, 64).bfloat16() for _ in range(3))
    args = (q * times, k * (times if scale < 1e30 else 1 / times), v, *options(scale=scale, causal=True))
    cases.assert_matches(run(args), args)
