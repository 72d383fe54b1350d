"""The GEMMs' kernels in the mutation suite: an instance of each template and each type of operands, in launches that
take every path: slices of K beyond the stages, ragged ends, more tiles than blocks, partial sums, each kind of scale."""

import dataclasses
import itertools

import torch
from mutant_instances import Instance

from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.fp8_linear import cases as fp8_linear
from forwardpass.ops.int8_conv2d import cases as int8_conv2d
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.int8_linear import cases as int8_linear
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm

#: Whose arithmetic is not mutated here. CUDA's lines are in dequant_activation's kernel too, and mutated there; Triton's
#: are not, and every option of theirs is compared in test_kernels.py.
EPILOGUE = (
    "csrc/device/activation.cuh",
    "csrc/device/epilogue/terms.cuh",
    "csrc/device/epilogue/vector8.cuh",
    "csrc/device/vec.cuh",
    "python/forwardpass/ops/common/triton_activations.py",
    "python/forwardpass/ops/common/triton_epilogue.py",
    "python/forwardpass/ops/common/triton_rows.py",
)

I8, F8, W8 = int8_gemm.Case, fp8_gemm.Case, w8a16_gemm.Case
PLAIN, GATED = EpilogueCase(), EpilogueCase(activation="silu_mul", out_dtype=torch.bfloat16)
#: of the direct epilogue beside GATED, both types and two of the biases; and a gated output of the general one
HALF = EpilogueCase(bias=torch.float16, activation="relu", out_dtype=torch.bfloat16)
FP16 = EpilogueCase(bias=torch.bfloat16, out_dtype=torch.float16)
GATED_FP16 = EpilogueCase(activation="silu_mul", out_dtype=torch.float16)
GATED_FP32 = EpilogueCase(activation="silu_mul")
#: of a residual, in either type and beside a ragged edge; with a gate of samples, and without one
RESIDUAL = EpilogueCase(out_dtype=torch.bfloat16, residual="contiguous", ada_gate=True)
RESIDUAL_FP16 = EpilogueCase(bias=None, out_dtype=torch.float16, residual="aligned")
GATED_SAMPLES_FP16 = EpilogueCase(out_dtype=torch.float16, residual="contiguous", ada_gate=True)
#: whose accumulators are the outputs, with block scales
BARE, BARE_FP16 = (EpilogueCase(bias=None, out_dtype=dtype) for dtype in (torch.bfloat16, torch.float16))
BARE_GATED = EpilogueCase(bias=None, activation="silu_mul", out_dtype=torch.bfloat16)
#: of int8's products: outputs in steps; and, on wgmma, a residual before the activation, as a convolution of single pixels has it
STEPS = EpilogueCase(bias=None, out_dtype=torch.int8, out_scale="column")
ONE_STEP = EpilogueCase(activation="relu", out_dtype=torch.int8)
ZERO_POINT = EpilogueCase(zero_point="row", a_scale="tensor", b_scale="tensor")


def mma(case, m, depths, many, *more, **options):
    """m rows, all of a tile's: depths short of the stages and beyond them, ragged; parts of K; and many tiles, of one slice."""
    return (
        *(case(m, 128, k, PLAIN, **options) for k in depths),
        case(m - 1, 48, depths[0], GATED, **options),
        case(m, 136, depths[0], HALF, **options),
        case(m, 40, depths[0], FP16, **options),
        case(m, 136, depths[0], RESIDUAL, **options),
        case(m - 3, 120, depths[0], RESIDUAL_FP16, **options),
        case(m - 2, 40, depths[0], GATED_SAMPLES_FP16, **options),
        case(m, 48, depths[0], GATED_FP16, **options),
        case(m - 1, 48, depths[0], GATED_FP32, **options),
        case(m - 3, 36, 1100, PLAIN, **options),
        case(m - 3, 36, 10100, PLAIN, **options),
        case(*many, 16, PLAIN, layouts=("contiguous", "contiguous"), **options),
        *more,
    )


def wgmma(case, columns, *more, **options):
    """Clusters of one and of two, the last row of tiles ragged or missing; `columns`: three tiles, which together come to
    each stage twice."""
    return (
        case(100, columns, 1000, PLAIN, **options),
        case(200, columns, 460, PLAIN, **options),
        case(257, columns - 44, 100, GATED, **options),
        case(200, columns + 4, 100, HALF, **options),
        case(100, columns, 100, FP16, **options),
        case(200, columns + 4, 100, RESIDUAL, **options),
        case(101, columns - 44, 100, RESIDUAL_FP16, **options),
        case(101, columns - 44, 100, GATED_FP16, **options),
        case(257, columns - 44, 100, GATED_FP32, **options),
        *more,
    )


def residual_first(images, columns):
    """Of both types."""
    return (
        int8_conv2d.Case(images, 48, n, (1, 1), padding=(0, 0), epilogue=epilogue, residual_first=True)
        for n, epilogue in ((columns, RESIDUAL), (columns - 8, RESIDUAL_FP16))
    )


def transposed(case, m, *more, **options):
    """m rows, all of a tile's: tiles that come to each stage twice, ragged; gated; the most parts of K that a cluster adds."""
    return (
        case(m, 600, 500, PLAIN, **options),
        case(m - 3, 144, 330, GATED, **options),
        case(m - 5, 40, 3000, PLAIN, **options),
        case(m - 7, 48, 3000, GATED, **options),
        *more,
    )


def upconverted(dtype, few, many):
    """Weights on wgmma: the product is made transposed, so it is N that makes clusters of one and of two, and tiles that come
    to each stage twice."""
    return (
        *(W8((m,), n, k, dtype, w, scales, activation=activation)
          for w in (torch.int8, E4M3)
          for m, n, k, scales, activation in ((few, 120, 3000, "block", None), (many, 240, 330, "column", "silu_mul"),
                                              (few, 1100, 500, "tensor", None), (few, 250, 1100, "block", None),
                                              (few, 96, 3000, "column", "silu_mul"), (few, 1096, 40, "tensor", None))),
        W8((many - 1,), 1096, 40, dtype, residual="contiguous"), W8((few,), 120, 40, dtype, residual="aligned"),
    )  # fmt: skip


CUDA = {
    "int8_mma_128x128": Instance(
        ("sm_80",), "Int8, MmaTile{m=128, n=128,",
        # gated columns of more than one warp, which has 64
        mma(I8, 128, (5, 388, 9200), (1153, 130), I8(70, 120, 388, ZERO_POINT), I8(128, 112, 5, GATED_FP16),
            I8(128, 128, 40, STEPS), I8(125, 123, 40, ONE_STEP)),
    ),
    "int8_mma_64x128": Instance(("sm_80",), "Int8, MmaTile{m=64, n=128,",
        mma(I8, 64, (388, 9200), (40, 300), I8(64, 128, 40, STEPS), I8(61, 123, 40, ONE_STEP),
            I8(64, 128, 40, GATED)),
    ),
    "int8_mma_16x128": Instance(("sm_80",), "Int8, MmaTile{m=16, n=128,",
        mma(I8, 16, (70, 1000, 14300), (9, 300), I8(16, 128, 40, STEPS), I8(13, 123, 40, ONE_STEP)),
    ),
    "fp8_mma_128x128": Instance(("sm_89",), "E4m3, MmaTile{m=128, n=128,", mma(F8, 128, (5, 300, 14300), (1153, 130))),
    "fp8_mma_16x128": Instance(("sm_89",), "E4m3, MmaTile{m=16, n=128,", mma(F8, 16, (70, 200, 300, 1000, 20300), (9, 300))),
    "fp8_blocks_mma_128x128": Instance(
        ("sm_89",), "E4m3Blocks, MmaTile{m=128, n=128,",
        mma(F8, 128, (5, 300, 14300), (1153, 290), F8(127, 272, 700, GATED, blocks=True),
            F8(128, 256, 40, BARE, blocks=True), F8(123, 251, 40, BARE_FP16, blocks=True),
            F8(128, 256, 40, BARE_GATED, blocks=True), blocks=True),
    ),
    "fp8_blocks_mma_64x128": Instance(
        ("sm_89",), "E4m3Blocks, MmaTile{m=64, n=128,",
        mma(F8, 64, (5, 300, 14300), (40, 400), F8(60, 272, 700, GATED, blocks=True),
            F8(64, 256, 40, BARE, blocks=True), F8(59, 251, 40, BARE_FP16, blocks=True),
            F8(64, 256, 40, BARE_GATED, blocks=True), blocks=True),
    ),
    "int8_wgmma_128x128": Instance(
        ("sm_90a",), "Int8, WgmmaTile{m=128, n=128,",
        wgmma(I8, 300, I8(100, 40, 3000, PLAIN), I8(101, 48, 1100, GATED), int8_linear.Case((100,), 300, 500),
              I8(200, 304, 100, STEPS), I8(101, 299, 100, ONE_STEP), *residual_first((1, 10, 20), 304)), clusters=1,
    ),
    "int8_wgmma_128x256": Instance(
        ("sm_90a",), "Int8, WgmmaTile{m=128, n=256,",
        (I8(200, 50 * 256, 590, PLAIN), I8(200, 50 * 256, 40, GATED), I8(100, 100 * 256, 40, PLAIN),
         I8(200, 50 * 256, 40, HALF), I8(203, 50 * 256 - 3, 40, FP16), I8(203, 50 * 256, 40, GATED_FP16),
         I8(200, 50 * 256, 40, RESIDUAL), I8(203, 50 * 256 - 8, 40, RESIDUAL_FP16),
         I8(200, 50 * 256, 40, STEPS), I8(203, 50 * 256 - 3, 40, ONE_STEP), *residual_first((1, 10, 20), 50 * 256),
         I8(200, 250, 40, PLAIN, quantized=True), I8(203, 100, 40, HALF, quantized=True),
         I8(200, 50 * 256, 40, GATED_FP32)), clusters=1, tiles=3,
    ),
    "int8_wgmma_64x128": Instance(
        ("sm_90a",), "Int8, WgmmaTile{m=64, n=128,", transposed(I8, 64, int8_linear.Case((57,), 300, 500)), clusters=1
    ),
    "int8_wgmma_16x128": Instance(
        ("sm_90a",), "Int8, WgmmaTile{m=16, n=128,",
        transposed(I8, 16, I8(9, 40, 388, ZERO_POINT), int8_linear.Case((9,), 300, 500), int8_linear.Case((7,), 40, 2100)),
        clusters=1,
    ),
    "fp8_wgmma_128x128": Instance(
        ("sm_90a",), "E4m3OptionalBlocks, WgmmaTile{m=128, n=128,",
        (*wgmma(F8, 300, F8(100, 40, 3000, PLAIN), F8(101, 48, 1100, GATED), fp8_linear.Case((100,), 300, 500)),
         *wgmma(F8, 300, F8(100, 40, 1100, PLAIN, blocks=True), blocks=True),
         F8(200, 300, 330, PLAIN, blocks=True, quantized=True),
         F8(256, 256, 40, BARE, blocks=True), F8(251, 251, 40, BARE_FP16, blocks=True),
         F8(256, 256, 40, BARE_GATED, blocks=True)),
        clusters=1,
    ),
    "fp8_wgmma_128x256": Instance(
        ("sm_90a",), "E4m3OptionalBlocks, WgmmaTile{m=128, n=256,",
        (F8(200, 50 * 256, 300, PLAIN), F8(200, 50 * 256, 40, HALF), F8(203, 50 * 256 - 3, 40, FP16),
         F8(200, 50 * 256, 40, RESIDUAL), F8(203, 50 * 256 - 8, 40, RESIDUAL_FP16),
         F8(200, 250, 40, PLAIN, quantized=True, rows=True),
         F8(200, 50 * 256, 40, GATED), F8(203, 50 * 256, 40, GATED_FP16), F8(200, 50 * 256, 40, GATED_FP32),
         F8(100, 100 * 256, 40, PLAIN, blocks=True), F8(200, 50 * 256, 40, BARE, blocks=True),
         F8(203, 50 * 256 - 3, 40, BARE_FP16, blocks=True), F8(200, 50 * 256, 40, BARE_GATED, blocks=True),
         F8(200, 50 * 256 - 3, 40, PLAIN, quantized=True), F8(250, 592, 330, BARE_GATED, blocks=True, quantized=True),
         F8(250, 592, 330, GATED, blocks=True, quantized=True), F8(100, 592, 700, GATED, blocks=True, quantized=True)),
        clusters=1, tiles=3,
    ),
    "fp8_wgmma_128x192": Instance(
        ("sm_90a",), "E4m3OptionalBlocks, WgmmaTile{m=128, n=192,",
        (F8(200, 66 * 192, 300, PLAIN), F8(200, 66 * 192, 40, HALF), F8(203, 66 * 192 - 3, 40, FP16),
         F8(200, 66 * 192, 40, RESIDUAL), F8(203, 66 * 192 - 8, 40, RESIDUAL_FP16),
         F8(200, 66 * 192, 40, GATED), F8(203, 66 * 192, 40, GATED_FP16), F8(200, 66 * 192, 40, GATED_FP32),
         F8(200, 66 * 192, 300, PLAIN, blocks=True), F8(200, 66 * 192, 40, BARE, blocks=True),
         F8(203, 66 * 192 - 3, 40, BARE_FP16, blocks=True)),
        clusters=1, tiles=3,
    ),
    "fp8_wgmma_64x128": Instance(
        ("sm_90a",), "E4m3OptionalBlocks, WgmmaTile{m=64, n=128,",
        transposed(F8, 64, fp8_linear.Case((57,), 300, 500), *transposed(F8, 64, blocks=True)), clusters=1,
    ),
    "fp8_wgmma_16x128": Instance(
        ("sm_90a",), "E4m3OptionalBlocks, WgmmaTile{m=16, n=128,",
        transposed(F8, 16, fp8_linear.Case((9,), 300, 500), *transposed(F8, 16, blocks=True)), clusters=1,
    ),
    "w8a16_16x128": Instance(
        ("sm_80", "sm_89"), "W8a16, MmaTile{m=16,",
        tuple(W8((m,), n, k, dtype, w, scales, activation=activation)
              for dtype in (torch.float16, torch.bfloat16)
              for w in (torch.int8, E4M3)
              for m, n, k, scales, activation in ((9, 120, 500, "block", None), (16, 128, 30, "column", "silu_mul"),
                                                  (9, 40, 1100, "block", None), (9, 300, 16, "tensor", None))),
    ),
    "w8a16_128x128": Instance(
        ("sm_80",), "W8a16, MmaTile{m=128,",
        tuple(W8((m,), n, k, dtype, w, scales, activation=activation)
              for dtype in (torch.float16, torch.bfloat16)
              for w in (torch.int8, E4M3)
              for m, n, k, scales, activation in ((70, 120, 500, "block", None), (128, 128, 30, "column", "silu_mul"),
                                                  (70, 40, 1100, "block", None), (1153, 130, 16, "tensor", None))),
    ),
    "w8a16_wgmma_128x16": Instance(
        ("sm_90a",), "Upconverted<bf16, true>, WgmmaTile{m=128, n=16,", upconverted(torch.bfloat16, 9, 16), clusters=1,
    ),
    "w8a16_wgmma_128x128": Instance(
        ("sm_90a",), "Upconverted<f16, true>, WgmmaTile{m=128, n=128,", upconverted(torch.float16, 70, 200), clusters=1,
    ),
    "w8a16_wgmma_128x256": Instance(
        ("sm_90a",), "Upconverted<f16, false>, WgmmaTile{m=128, n=256,",
        (*(W8((m,), n, k, torch.float16, w, scales, activation=activation)
           for w in (torch.int8, E4M3)
           for m, n, k, scales, activation in ((50 * 256, 200, 700, "column", None), (100 * 256, 112, 40, "tensor", "silu_mul"),
                                               (100 * 256 - 3, 123, 40, "column", "relu"))),
         W8((50 * 256 - 3,), 200, 40, torch.float16, residual="contiguous")), clusters=1, tiles=3,
    ),
    "gemv_int8": Instance(
        ("sm_80",), "gemv_kernel",
        (I8(3, 40, 3005, PLAIN), I8(4, 48, 1389, GATED), I8(1, 70, 5, PLAIN), I8(3, 40, 1285, PLAIN),
         I8(3, 40, 1349, PLAIN), I8(2, 20, 16500, PLAIN), int8_linear.Case((3,), 40, 1389)),
    ),
    "gemv_fp8": Instance(
        ("sm_89",), "gemv_kernel",
        (F8(3, 140, 3005, PLAIN), F8(4, 48, 1389, GATED), F8(4, 140, 3005, PLAIN, blocks=True),
         F8(2, 272, 1389, GATED, blocks=True), F8(2, 20, 16500, PLAIN), fp8_linear.Case((3,), 40, 1389)),
    ),
    "gemv_w8a16": Instance(
        ("sm_80",), "gemv_kernel",
        tuple(W8((m,), n, k, torch.float16, w, scales, activation=activation)
              for w in (torch.int8, E4M3)
              for m, n, k, scales, activation in ((3, 40, 3005, "block", None), (4, 48, 1389, "column", "silu_mul"),
                                                  (3, 40, 1285, "tensor", None), (3, 40, 1349, "tensor", None),
                                                  (2, 20, 16500, "tensor", None))),
    ),
    "pad_rows": Instance(
        ("sm_80",), "pad_rows_kernel",
        (I8(3, 7, 300, PLAIN, ("apart", "shifted")), W8((5,), 3, 301, layout="apart")),
    ),
}  # fmt: skip


def triton(architectures, *cases, kernel="gemm_kernel"):
    return Instance(architectures, kernel, cases, "triton")


CONTIGUOUS = ("contiguous", "contiguous")
#: each type of output has a layout of its own
_OUTPUTS = [EpilogueCase(out_dtype=d) for d in (torch.float32, torch.float16, torch.bfloat16, torch.int8, E4M3)]
_ZERO_POINTS = [dataclasses.replace(e, zero_point="row") for e in _OUTPUTS]


def products(case, m, n, *epilogues, **options):
    """Depths short of the stages and beyond them, ragged; rows that end where the storage does; more tiles than one."""
    return (
        *(case(m, n, k, e, **options) for k, e in zip((16, 248, 400, 520, 880), itertools.cycle(epilogues))),
        *(case(m - 2, n - 9, 16, e, layouts=CONTIGUOUS, **options) for e in epilogues),
        case(1153 if m > 64 else m, 2 * n + 2, 50, epilogues[-1], **options),
    )


TRITON = {
    "triton_int8": triton(("sm_80", "sm_90a"), *products(I8, 128, 128, *_ZERO_POINTS)),
    "triton_int8_swapped": triton(("sm_80", "sm_90a"), *products(I8, 16, 64, *_ZERO_POINTS)),
    "triton_int8_split": triton(("sm_80", "sm_90a"), I8(128, 128, 1400, PLAIN), I8(100, 30, 1100, PLAIN),
                                I8(128, 128, 1030, PLAIN)),
    "triton_sum_parts": triton(("sm_80",), *(I8(20, n, 1400, e) for n in (128, 130) for e in _OUTPUTS),
                               I8(9, 30, 1100, PLAIN), I8(20, 128, 1400, GATED),
                               I8(20, 130, 1400, dataclasses.replace(_OUTPUTS[3], out_scale="column")),
                               kernel="sum_parts_kernel"),
    "triton_fp8": triton(("sm_89", "sm_90a"), *products(F8, 128, 128, *_OUTPUTS)),
    "triton_fp8_blocks": triton(("sm_89", "sm_90a"), *products(F8, 128, 128, *_OUTPUTS, blocks=True)),
    "triton_fp8_blocks_gated": triton(("sm_90a",), F8(100, 272, 880, GATED, blocks=True, quantized=True),
                                      F8(130, 32, 50, GATED, blocks=True, quantized=True)),
    "triton_w8a16": triton(("sm_80", "sm_90a"), *(W8((m,), n, k, scales="block")
                             for m, n, k in ((128, 128, 440), (120, 100, 400), (128, 128, 248)))),
    "triton_w8a16_e4m3": triton(("sm_80",), W8((16,), 128, 440, w_dtype=E4M3), W8((16,), 128, 505, w_dtype=E4M3),
                                W8((5,), 30, 16, w_dtype=E4M3, layout="contiguous")),
}  # fmt: skip
INSTANCES = CUDA | TRITON
