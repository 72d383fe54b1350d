"""What only the GEMMs on wgmma have, and shapes that reach it: clusters, tiles beyond the first of a block, both tiles."""

import pytest
import torch
from rotation import in_parts, in_turn

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation.cases import EpilogueCase, assert_epilogue_matches
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.int8_gemm.reference import int8_gemm as int8_reference
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

#: (M, N, K), with 132 multiprocessors: the depth split; an even number of rows of tiles, in clusters of two; an odd one,
#: alone; more than 16, of which the last cluster has one too many; 128 x 256 and more of them than multiprocessors; 128 x 192,
#: of which every second one begins inside a block of scales
SHAPES = ((100, 130, 4100), (257, 520, 1), (300, 640, 130), (2176, 300, 130), (1700, 4600, 130), (1400, 2100, 300))
#: of w8a16_gemm, whose product is made transposed: for each height of tile the same of N, and parts of the depth; the last
#: three in tiles of 256 rows
WEIGHTS = ((16, 130, 4100), (9, 300, 130), (64, 2176, 130), (50, 260, 1), (300, 640, 130), (1700, 2600, 130),
           (2100, 1100, 130), (2090, 1230, 700), (5100, 1270, 70))  # fmt: skip
BF16 = EpilogueCase(out_dtype=torch.bfloat16)
FP8 = [
    *(fp8_gemm.Case(*shape, BF16, blocks=blocks) for shape in SHAPES for blocks in (False, True)),
    fp8_gemm.Case(700, 5216, 130, EpilogueCase(activation="silu_mul", out_dtype=torch.bfloat16), blocks=True),
]


def interpreted(case, seed, kernel, truncating=False, op="int8_gemm"):
    args = case.arguments(seed=seed)
    with fp.interpret("sm_90a", seed=seed, truncating=truncating, counters=True) as device, fp.use_backend("cuda"):
        got = dispatch.operations[getattr(case, "op", op)](*args)
    assert device.findings == []
    assert any(kernel in k.kernel for k in device.kernels())
    return got, args


@pytest.mark.every(3)
@pytest.mark.parametrize("shape", in_parts(SHAPES, 3))
def test_int8(shape, seed):
    got, args = interpreted(int8_gemm.Case(*shape), seed, "gemm_wgmma_kernel")
    assert_epilogue_matches(got, int8_reference, args)


OF_WEIGHTS = [
    w8a16_gemm.Case((m,), n, k, x_dtype, w_dtype, scales)
    for w_dtype in (torch.int8, E4M3)
    for x_dtype, scales in ((torch.float16, "column"), (torch.bfloat16, "block"))
    for m, n, k in WEIGHTS
]


@pytest.mark.every(3)
@pytest.mark.parametrize("case", in_parts(OF_WEIGHTS, 8))
def test_w8a16(case, seed):
    got, args = interpreted(case, seed, "gemm_wgmma_kernel", op="w8a16_gemm")
    w8a16_gemm.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 240, 40), (6700, 300, 40)], ids=str)
def test_a_bias_of_each_type(shape, dtype):
    """Added to what is the same without it."""
    m, n, k = shape
    case = w8a16_gemm.Case((m,), n, k, torch.float16, torch.int8, "column")
    x, w, weight_scale, bias, activation, _ = case.arguments()
    bias = bias.to(dtype)
    with fp.interpret("sm_90a"), fp.use_backend("cuda"):
        got = fp.ops.w8a16_gemm(x, w, weight_scale, bias=bias, activation=activation)
    w8a16_gemm.assert_matches(got, (x, w, weight_scale, bias.float(), activation))


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts(FP8, 4))
def test_fp8(case, seed):
    got, args = interpreted(case, seed, "gemm_wgmma_kernel")
    fp8_gemm.assert_matches(got, args)


@pytest.mark.parametrize("case", in_parts(fp8_gemm.PROMOTION_CASES, 2))
def test_fp8_is_promoted(case, seed):
    got, args = interpreted(case, seed, "gemm_wgmma_kernel", truncating=True)
    fp8_gemm.assert_matches(got, args, truncating=True)


@pytest.mark.every(2)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "activation"),
    in_turn([(300, 2608, None), (129, 9000, "gelu"), (129, 12000, "silu_mul"), (900, 1824, "silu_mul")]),
)
def test_fp8_gemm_quantize_is_one_kernel_with_the_bits_of_two(m, n, activation, blocks, seed):
    """gated, both warpgroups have half of a group, and of 128 x 128 tiles none has all of it"""
    args = fp8_gemm.Case(m, n, 136, EpilogueCase(activation=activation, out_dtype=torch.float32), blocks).arguments(
        seed=seed
    )
    with fp.interpret("sm_90a", seed=seed, approximate=False) as device, fp.use_backend("cuda"):
        y = dispatch.operations["fp8_gemm"](*args)
        expected = fp.ops.quantize(y, torch.float8_e4m3fn, group_size=128)
        before = device.counters["launches"]
        got = fp.ops.fp8_gemm_quantize(*args[:4], bias=args[4], activation=activation)
        assert device.counters["launches"] == before + 1
    for g, e in zip(got, expected):
        assert_equal(g, e)
    assert device.findings == []


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "activation"),
    in_turn([(300, 256, None), (129, 250, "gelu"), (200, 256, "silu_mul"), (257, 100, None), (70, 17, "relu")]),
)
def test_rows_that_a_tile_has_whole_are_quantised_by_the_product(m, n, activation, blocks, seed):
    """Of one tile's columns, and of both groups that it has; one row is large, and one has its largest value at the end."""
    case = fp8_gemm.Case(m, n, 136, EpilogueCase(activation=activation, out_dtype=torch.float32), blocks)
    args = case.arguments(seed=seed)
    bias = args[4].clone()
    bias[-1] = 3000
    args = (*args[:4], bias, *args[5:])
    with fp.interpret("sm_90a", seed=seed, approximate=False) as device, fp.use_backend("cuda"):
        y = dispatch.operations["fp8_gemm"](*args)
        expected = fp.ops.quantize(y, torch.float8_e4m3fn)
        before = device.counters["launches"]
        got = fp.ops.fp8_gemm_quantize(*args[:4], bias=bias, activation=activation, group_size=None)
        assert device.counters["launches"] == before + (1 if m > 64 else 2)
    for g, e in zip(got, expected):
        assert_equal(g, e)
    assert device.findings == []


@pytest.mark.parametrize(
    ("m", "n", "activation", "zero_point", "launches"),
    in_turn([(300, 256, None, None, 1), (129, 250, "gelu", None, 1), (257, 100, "relu", None, 1), (70, 17, None, None, 1),
             (130, 257, None, None, 2), (130, 256, "silu_mul", None, 2), (130, 64, None, "row", 2), (3, 64, None, None, 2)]),
)  # fmt: skip
def test_rows_of_int8_that_a_tile_has_whole_are_quantised_by_the_product(m, n, activation, zero_point, launches, seed):
    case = int8_gemm.Case(m, n, 136, EpilogueCase(activation=activation, zero_point=zero_point), quantized=True)
    *shared, activation, a_zero_point, b_sum = case.arguments(seed=seed)
    options = {"bias": shared[4].clone(), "activation": activation, "a_zero_point": a_zero_point, "b_sum": b_sum}
    options["bias"][-1] = 3000
    with fp.interpret("sm_90a", seed=seed, approximate=False) as device, fp.use_backend("cuda"):
        expected = fp.ops.quantize(fp.ops.int8_gemm(*shared[:4], **options, out_dtype=torch.float32), torch.int8)
        before = device.counters["launches"]
        got = fp.ops.int8_gemm_quantize(*shared[:4], **options)
        assert device.counters["launches"] == before + launches
    for g, e in zip(got, expected):
        assert_equal(g, e)
    assert device.findings == []


@pytest.mark.every(2)
@pytest.mark.parametrize(("m", "activation"), [(9, None), (61, "silu_mul"), (128, "gelu")])
def test_sums_of_a_cluster_are_those_of_the_parts_in_order(m, activation, seed):
    """27 tiles beside each other: four splits each, of 384 columns."""
    case = fp8_gemm.Case(m, 27 * 128 - 16, 1536, EpilogueCase(activation=activation, out_dtype=torch.bfloat16))
    args = case.arguments(seed=seed)
    a, b, a_scale, b_scale, bias, *_ = args
    one = torch.ones(1)
    with fp.interpret("sm_90a", seed=seed, counters=True, approximate=False) as device, fp.use_backend("cuda"):
        got = dispatch.operations["fp8_gemm"](*args)
        (kernel,) = device.kernels()
        parts = [
            fp.ops.fp8_gemm(a[:, k : k + 384], b[:, k : k + 384], one, one, out_dtype=torch.float32)
            for k in range(0, 1536, 384)
        ]
        expected = fp.ops.dequant_activation(
            parts[0] + parts[1] + parts[2] + parts[3], a_scale, b_scale, bias=bias, activation=activation,
            out_dtype=torch.bfloat16,
        )  # fmt: skip
    assert device.findings == [] and (kernel.cluster[0], kernel.grid[0]) == (4, 4 * 27)
    assert_equal(got, expected)
    fp8_gemm.assert_matches(got, args)


def test_scales_of_b_that_begin_anywhere(seed):
    """TMA wants multiples of 16 bytes."""
    case = fp8_gemm.Case(200, 300, 400, BF16, blocks=True)
    args = case.arguments(seed=seed)
    for offset in (1, 2, 3):
        b_scale = torch.cat([torch.full((offset,), torch.nan), args[3].flatten()])[offset:].view(args[3].shape)
        moved = (*args[:3], b_scale, *args[4:])
        with fp.interpret("sm_90a", seed=seed) as device, fp.use_backend("cuda"):
            fp8_gemm.assert_matches(dispatch.operations["fp8_gemm"](*moved), moved)
        assert device.findings == []
