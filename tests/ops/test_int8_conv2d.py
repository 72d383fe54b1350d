"""int8_conv2d on the CPU: the reference's bits, and within a bound behind an activation."""

import dataclasses

import pytest
import torch
from rotation import in_parts, some_of, whole
from torch.nn import functional as F

import forwardpass as fp
from forwardpass.dispatch import operations
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_conv2d import LEAST_GROUP, cases
from forwardpass.ops.int8_gemm import MAX_K
from forwardpass.testing import assert_equal, poisoned_outputs

RUNS = operations["int8_conv2d"].runs
ONE = torch.ones(1)
INT8 = torch.int8


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def images(*shape, seed=0):
    return last(torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=INT8))


@pytest.mark.parametrize("case", [whole(cases.cases())])
def test_cpu_against_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = RUNS["cpu"](*args)
    cases.assert_matches(got, args)


@pytest.mark.parametrize("case", [whole(cases.depthwise_cases())])
def test_depthwise_against_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = RUNS["cpu"](*args)
    cases.assert_matches(got, args)


def test_reference_is_the_convolution_of_torch():
    """Narrow groups included, which other backends leave, and depthwise ones, which GPUs leave."""
    for groups, channels, out in ((1, 7, 5), (3, 2, 4), (12, 1, 1)):
        x, w = images(2, channels * groups, 6, 7), images(out * groups, channels, 3, 2)
        scale, bias = torch.rand(out * groups), torch.randn(out * groups)
        geometry = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": groups}
        with fp.use_backend("reference"):
            y = fp.ops.int8_conv2d(
                x, w, torch.tensor([0.5, 2.0]), scale, bias=bias, out_dtype=torch.float32, **geometry
            )
        exact = F.conv2d(x.double(), w.double(), **geometry) * scale.double().reshape(-1, 1, 1)
        exact = exact * torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1) + bias.reshape(-1, 1, 1)
        torch.testing.assert_close(y, exact.float(), rtol=1e-6, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_by_hand():
    x = last(torch.tensor([[[[1, 2], [3, 4]], [[0, 0], [0, 1]]]], dtype=INT8))
    w = last(torch.tensor([[[[1, 0], [0, -1]], [[0, 0], [0, 2]]]], dtype=INT8))
    y = fp.ops.int8_conv2d(x, w, ONE * 0.5, ONE, bias=ONE, padding=(1, 0), out_dtype=torch.float32)
    # rows: above the image alone, the image, below it
    assert y.tolist() == [[[[0.5 * -2 + 1], [0.5 * (1 - 4 + 2) + 1], [0.5 * 3 + 1]]]]
    r = torch.full_like(y, -3.0)
    named = {"bias": ONE, "padding": (1, 0), "out_dtype": torch.float32, "activation": "relu", "residual": r}
    after = fp.ops.int8_conv2d(x, w, ONE * 0.5, ONE, **named)
    before = fp.ops.int8_conv2d(x, w, ONE * 0.5, ONE, **named, residual_first=True)
    assert torch.equal(after, y.relu() - 3)
    assert torch.equal(before, (y - 3).relu())


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3)])
def test_sums_at_the_greatest_depth(kernel):
    """Of -128 times -128: one product more, and int32 wraps."""
    k = MAX_K // kernel[1] * kernel[1]
    x, w = (last(torch.full((1, k // kernel[1], 1, kernel[1]), -128, dtype=INT8)) for _ in range(2))
    y = fp.ops.int8_conv2d(x, w, ONE, ONE, out_dtype=torch.float32)
    assert y.tolist() == [[[[float(k * 128 * 128)]]]]
    x, w = (last(F.pad(t, (0, 0, 0, 0, 0, 1))) for t in (x, w))
    with pytest.raises(ValueError, match=f"K must be at most {MAX_K}"):
        fp.ops.int8_conv2d(x, w, ONE, ONE, out_dtype=torch.float32)


def test_the_last_depth_beyond_is_refused_below_python_too():
    x = last(torch.zeros(1, MAX_K + 1, 1, 1, dtype=INT8))
    with pytest.raises(RuntimeError, match="could overflow int32"):
        RUNS["cpu"](x, x, ONE, ONE, (1, 1), (0, 0), (1, 1), 1, None, None, torch.float32, None)


def test_outputs_in_int8_are_the_next_convolution_s_images():
    """Twenty channels: their pixels are 32 bytes apart, and what lies between is nobody's."""
    x, w, v = images(2, 16, 9, 9), images(20, 16, 3, 3, seed=1), images(24, 20, 3, 3, seed=2)
    scale = torch.rand(20, generator=torch.Generator().manual_seed(3)) / 400 + 1e-3
    results = []
    for backend in ("cpu", "reference"):
        with fp.use_backend(backend), poisoned_outputs():
            q = fp.ops.int8_conv2d(x, w, ONE, scale, stride=2, activation="relu", out_dtype=INT8, out_scale=ONE)
            assert q.stride() == (512, 1, 128, 32)
            assert q.unique().numel() > 30
            results.append(fp.ops.int8_conv2d(q, v, ONE, ONE, padding=1, out_dtype=torch.float32))
    assert_equal(*results)


def test_one_scale_an_image_is_that_of_each_image():
    x, w = images(3, 40, 7, 7), images(33, 40, 3, 3)
    scale = torch.tensor([0.5, 0.001, 3.0])
    y = fp.ops.int8_conv2d(x, w, scale, ONE, padding=1, out_dtype=torch.bfloat16)
    each = [
        fp.ops.int8_conv2d(x[i : i + 1], w, scale[i : i + 1], ONE, padding=1, out_dtype=torch.bfloat16)
        for i in range(3)
    ]
    assert torch.equal(torch.cat(each), y)


def threaded():
    """Blocks of pixels for several threads, and so few that threads share the channels."""
    half = EpilogueCase(out_dtype=torch.float16, activation="relu", residual="contiguous")
    yield cases.Case((2, 30, 31), 48, 70, stride=(2, 1), epilogue=half, residual_first=True)
    yield cases.Case((1, 7, 7), 256, 512, epilogue=EpilogueCase(out_dtype=INT8))
    yield cases.Case((3, 9, 9), 32, 64, groups=2, epilogue=half)
    yield cases.Case((1, 4, 4), 64, 300)
    yield cases.Case((2, 40, 5), 1, 1, (5, 3), groups=150, epilogue=half)


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c.images)) for c in threaded()])
def test_bits_do_not_depend_on_the_threads(case):
    args, threads, results = case.arguments(), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            with poisoned_outputs():
                results.append(RUNS["cpu"](*args))
    finally:
        torch.set_num_threads(threads)
    cases.assert_matches(results[0], args)
    assert all(torch.equal(r, results[0]) for r in results)


def test_bits_are_those_of_every_layout():
    """Of x: dense, pixels apart, a crop, and one channel group's own memory."""
    for layout in cases.LAYOUTS:
        case = cases.Case((2, 6, 9), 36, 40, (3, 2), dilation=(1, 2), layout=layout)
        y = RUNS["cpu"](*case.arguments())
        if layout == cases.LAYOUTS[0]:
            expected = y
        assert_equal(y, expected)


@pytest.mark.every(3)
@pytest.mark.parametrize("case", in_parts([*cases.cases()][::9], 3))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.int8_conv2d_cpu.default, case.arguments())


def test_compiles_whole():
    x, w = images(2, 16, 9, 9), images(20, 16, 3, 3)

    def f(t):
        return fp.ops.int8_conv2d(t, w, ONE, ONE, stride=2, padding=(1, 0), out_dtype=torch.float32) * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_narrow_groups_have_a_reason():
    """Two outputs a channel; one is depthwise, and has a kernel."""
    x, w = images(1, 32, 5, 5), images(64, 1, 3, 3)
    table = fp.explain("int8_conv2d", x, w, ONE, ONE, groups=32, out_dtype=torch.float32)
    assert table.backend == "reference"
    assert table["cpu"].code == "narrow_groups"
    assert "of 1 and 2" in str(table["cpu"])
    with fp.use_backend("cpu"), pytest.raises(fp.Unsupported, match="groups of at least"):
        fp.ops.int8_conv2d(x, w, ONE, ONE, groups=32, out_dtype=torch.float32)
    depthwise = fp.explain("int8_conv2d", x, w[:32], ONE, ONE, groups=32, out_dtype=torch.float32)
    assert depthwise.backend == "cpu"
    assert depthwise["triton"].code in ("narrow_groups", "device")
    wide = images(2 * LEAST_GROUP, LEAST_GROUP, 3, 3)
    assert operations["int8_conv2d"].why_not_on("cpu", x.device, x) is None  # who asks before there is a call
    assert fp.explain("int8_conv2d", x, wide, ONE, ONE, groups=2, out_dtype=torch.float32).backend == "cpu"


X, W, RESIDUAL = (
    images(2, 8, 5, 6),
    images(16, 8, 3, 3),
    torch.zeros(2, 16, 3, 4).contiguous(memory_format=torch.channels_last),
)


def call(x=X, weight=W, x_scale=ONE, weight_scale=ONE, out_dtype=torch.float32, **options):
    return lambda: fp.ops.int8_conv2d(x, weight, x_scale, weight_scale, out_dtype=out_dtype, **options)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (call(X.float()), TypeError, "x must be an int8 tensor"),
        (call(X[0]), ValueError, r"x must be \[N, C, H, W\]"),
        (call(X.contiguous()), ValueError, "x must be in channels_last memory"),
        (call(weight=W.contiguous()), ValueError, "weight must be in channels_last memory"),
        (call(weight=W[:, :4]), ValueError, "groups a divisor"),
        (call(groups=3), ValueError, "with groups=3"),
        (call(groups=0), ValueError, "groups must be a positive integer"),
        (call(weight=images(16, 8, 7, 3)), ValueError, "must fit into the image"),
        (call(dilation=3), ValueError, "must fit into the image"),
        (call(stride=0), ValueError, "stride must be from 1"),
        (call(padding=-1), ValueError, "padding must be from 0"),
        (call(padding="same"), TypeError, "padding must be an integer or a pair"),
        (call(stride=(1, 2, 3)), TypeError, "stride must be an integer or a pair"),
        (call(X[:, :, :0]), ValueError, "only the images of x may be none"),
        (call(x_scale=torch.ones(3)), ValueError, "x_scale must be contiguous with 2 elements"),
        (call(x_scale=1.0), TypeError, "x_scale must be a float32 tensor"),
        (call(weight_scale=torch.ones(8)), ValueError, "weight_scale must be contiguous with 16 elements"),
        (call(bias=torch.ones(3)), ValueError, "16 elements"),
        (call(activation="silu_mul"), ValueError, "relu6, hard_swish"),
        (call(out_dtype=INT8), ValueError, "out_scale"),
        (call(out_dtype=torch.float8_e4m3fn, out_scale=ONE), TypeError, "float16, bfloat16 or int8"),
        (call(residual=RESIDUAL[:, :, 1:]), ValueError, "residual must have the output's shape"),
        (call(residual=RESIDUAL.half()), TypeError, "residual must be a tensor of torch.float32"),
        (call(residual=RESIDUAL.contiguous()), ValueError, "residual must be in channels_last memory"),
        (call(residual=RESIDUAL, out_dtype=INT8, out_scale=ONE), ValueError, "residual goes with out_dtype"),
        (call(residual_first=True), ValueError, "pass a residual"),
        (call(weight=W.to("meta")), ValueError, "weight is on meta and x on cpu"),
    ],
)  # fmt: skip
def test_refusals(call, error, words):
    with pytest.raises(error, match=words) as e:
        call()
    assert "\n" not in str(e.value)


def test_cases_are_those_that_they_are_named():
    """A window at each border, several blocks of pixels, every option."""
    all_of = [*cases.cases()]
    assert {c.epilogue.activation for c in all_of} >= {"relu6", "hard_swish", None}
    assert any(c.residual_first and c.epilogue.residual and c.epilogue.activation == "gelu" for c in all_of)
    assert any(c.gemm[0] > 600 for c in all_of) and any(c.gemm[0] == 1 for c in all_of)
    assert len(some_of(all_of, 1)) == len(all_of) < 90
    assert all(dataclasses.replace(c).flops() >= 0 for c in all_of)
