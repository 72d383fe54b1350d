"""int8_conv2d's kernels in the mutation suite: windows of every geometry as the GEMM's rows of a. With two multiprocessors
the largest tiles are chosen for few outputs, and a persistent block computes several."""

import torch
from mutant_instances import Instance

from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_conv2d.cases import Case

PLAIN = EpilogueCase()
HALF = EpilogueCase(bias=torch.float16, activation="relu", out_dtype=torch.bfloat16)
STEPS = EpilogueCase(out_dtype=torch.int8, out_scale="column")
#: whose lines are mutated: the epilogue is the GEMM's
FILES = (
    "csrc/device/pipeline.cuh",
    "csrc/device/ptx_sm80.cuh",
    "csrc/device/ptx_sm90a.cuh",
    "csrc/device/wgmma.cuh",
    "csrc/kernels/gemm/arguments.cuh",
    "csrc/kernels/gemm/mma.cuh",
    "csrc/kernels/gemm/mma_mainloop.cuh",
    "csrc/kernels/gemm/operand_copy.cuh",
    "csrc/kernels/gemm/wgmma.cuh",
    "csrc/kernels/gemm/wgmma_mainloops.cuh",
    "csrc/kernels/gemm/window_copy.cuh",
    "csrc/kernels/gemm/window_tma.cuh",
    "csrc/params/common.h",
    "csrc/schedule/gemm_tile.cuh",
    "csrc/schedule/persistent.cuh",
)


def windows(few, many):
    """Of every geometry. few, many: output channels; those of some cases, which make one tile and several."""
    return (
        Case((2, 9, 12), 64, few - 8, (3, 5), padding=(0, 2), epilogue=HALF),
        Case((2, 15, 14), 128, many, stride=(2, 1)),
        Case((1, 13, 11), 192, few, padding=(2, 2), dilation=(2, 3)),
        Case((1, 7, 11), 512, few),  # parts of K, which begin within taps
        Case((1, 7, 11), 1152, few, (1, 3), padding=(0, 1)),
        Case((3, 30, 29), 64, many, (1, 2), padding=(0, 1), epilogue=HALF),
        Case((1, 4, 5), 128, few, (2, 3), padding=(5, 4)),
        Case((1, 11, 12), 64, many - 3, (1, 2), padding=(0, 1), epilogue=STEPS),
    )


def low(few, many):
    """Of at most 64 output pixels."""
    return (
        Case((2, 5, 8), 64, many - 8, (3, 5), padding=(0, 2), epilogue=HALF),
        Case((2, 7, 8), 128, many, stride=(2, 1)),
        Case((1, 8, 6), 192, few, padding=(2, 2), dilation=(2, 3)),
        Case((1, 7, 8), 512, few),
        Case((1, 4, 5), 128, many, (2, 3), padding=(3, 2)),
        Case((1, 7, 8), 64, few - 3, (1, 2), padding=(0, 1), epilogue=STEPS),
    )


def short_taps(columns, *images):
    """Shorter than a slice, several to a slice or a slice and a half; the most bits of a kernel's sides."""
    return tuple(
        Case(image, channels, columns, kernel, padding=padding)
        for image in images
        for channels, kernel, padding in (
            (16, (7, 7), (3, 3)), (48, (3, 3), (1, 1)), (16, (15, 15), (7, 7)), (16, (15, 1), (7, 0)), (80, (1, 2), (0, 1)),
        )
    )  # fmt: skip


def mma(tile, *cases):
    kernel = f"MmaTile{{{tile}, stage_k=64, stages=3, blocks_per_sm=2, experts=0}}, OneTile, WindowMainloop"
    return Instance(("sm_80",), kernel, cases, multiprocessors=2, files=FILES)


def wgmma(tile, *cases):
    kernel = f"WgmmaTile{{{tile}, stage_k=128, experts=0}}, PersistentTiles, WindowMainloop"
    return Instance(("sm_90a",), kernel, cases, multiprocessors=2, files=FILES)


INSTANCES = {
    "conv2d_mma_128x128": mma("m=128, n=128, warps_m=2, warps_n=2", *windows(200, 240), *short_taps(200, (1, 9, 9))),
    "conv2d_mma_64x128": mma("m=64, n=128, warps_m=2, warps_n=2", *low(128, 200), *short_taps(128, (1, 7, 9))),
    "conv2d_mma_128x64": mma("m=128, n=64, warps_m=4, warps_n=1", *windows(40, 136), *short_taps(40, (1, 9, 9))),
    "conv2d_wgmma_128x256": wgmma("m=128, n=256, stages=4", *windows(250, 500)),
    "conv2d_wgmma_128x128": wgmma("m=128, n=128, stages=6", *windows(128, 120)),
    "conv2d_wgmma_128x64": wgmma("m=128, n=64, stages=6", *windows(40, 64)),
}
