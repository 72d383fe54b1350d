"""Shapes and options of int8_conv2d, for tests and benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...testing import MOST_MACS, laid_out, pairwise
from ..common.activations import PLAIN
from ..common.quantized_rows import FLOATS
from ..dequant_activation.cases import RESIDUALS, EpilogueCase, assert_epilogue_matches, epilogue_factors
from ..int8_linear import pack_int8_weight
from . import LEAST_GROUP, output_size, reference

#: of x: those of `laid_out`, and a crop of larger images, whose rows do not collapse
LAYOUTS = ("contiguous", "aligned", "apart", "shifted", "crop")


@dataclass(frozen=True)
class Case:
    images: tuple[int, int, int]  # N, H, W
    channels: int  # of a group
    out_channels: int  # of a group
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    epilogue: EpilogueCase = EpilogueCase()  # a_scale "row": one an image
    residual_first: bool = False
    layout: str = "contiguous"  # of x
    packed: bool = False

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = (
            output_size(self.images[i + 1], self.kernel[i], self.stride[i], self.padding[i], self.dilation[i])
            for i in (0, 1)
        )
        return height, width

    @property
    def gemm(self) -> tuple[int, int, int]:
        """M, N and K of one group's product."""
        return (
            self.images[0] * self.out_size[0] * self.out_size[1],
            self.out_channels,
            self.channels * self.kernel[0] * self.kernel[1],
        )

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """In the schema's order; operands over all of int8, -128 among them, an image of zeros, channels of extremes."""
        g = torch.Generator().manual_seed(seed)
        c, n = self.channels * self.groups, self.out_channels * self.groups
        x = torch.randint(-128, 128, (*self.images, c), generator=g, dtype=torch.int8)
        w = torch.randint(-128, 128, (n, *self.kernel, self.channels), generator=g, dtype=torch.int8)
        if self.images[0] > 1:
            x[1] = 0
        if n > 2:
            w[1], w[2] = 0, -128
        count, size = self.images[0], self.out_size
        e = self.epilogue.arguments((count,), n, 1 / (5000 * self.gemm[2] ** 0.5), device, seed)
        added = self.epilogue.residual_of((count, *size), n, device, seed)
        w = w.to(device).permute(0, 3, 1, 2)
        packed = pack_int8_weight(w) if self.packed and device == "cpu" else None
        return (
            self._laid_out(x, device).permute(0, 3, 1, 2), w, e["a_scale"], e["b_scale"],
            self.stride, self.padding, self.dilation, self.groups, e["bias"], e["activation"], e["out_dtype"], e["out_scale"],
            None if added is None else added.permute(0, 3, 1, 2), self.residual_first and added is not None, packed,
        )  # fmt: skip

    def _laid_out(self, x: Tensor, device: str) -> Tensor:
        if self.layout != "crop":
            return laid_out(x, self.layout, device)
        count, height, width, c = x.shape
        large = torch.full((count, height + 1, width + 2, c), 127, dtype=torch.int8, device=device)
        crop = large[:, 1:, 1:-1]
        crop.copy_(x)
        return crop

    def bytes(self) -> int:
        """Images and weight once, outputs once."""
        m, n, k = self.gemm
        pixels = self.images[0] * self.images[1] * self.images[2]
        return self.groups * (pixels * self.channels + n * k + m * n * self.epilogue.out_dtype.itemsize)

    def flops(self) -> int:
        m, n, k = self.gemm
        return 2 * m * n * k * self.groups


def assert_matches(actual: Tensor, args: tuple[Any, ...]) -> None:
    """actual is what every backend returns for args."""
    if actual.dtype != torch.int8:
        return assert_epilogue_matches(actual, reference.int8_conv2d, args)
    assert_epilogue_matches(actual.permute(0, 2, 3, 1), _pixels, args)


@functools.wraps(reference.int8_conv2d)
def _pixels(*args: Any, **named: Any) -> Tensor:
    """The reference's channels last, where a scale per channel broadcasts."""
    return reference.int8_conv2d(*args, **named).permute(0, 2, 3, 1)


def _padded(case: Case) -> Case:
    """The case with as much padding as its kernel needs."""
    padding = [
        max(p, -((s - d * (k - 1) - 1) // 2))
        for p, s, d, k in zip(case.padding, case.images[1:], case.dilation, case.kernel)
    ]
    return replace(case, padding=(padding[0], padding[1]))


def _that_fits(case: Case) -> Case:
    """The case, padded, in few multiplications, and in groups that kernels take."""
    case = _padded(case)
    if case.groups > 1:
        case = replace(case, channels=max(LEAST_GROUP, case.channels), out_channels=max(LEAST_GROUP, case.out_channels))
    while case.flops() / 2 > MOST_MACS:
        case = replace(case, channels=case.channels // 2)
    return case


def cases() -> Iterator[Case]:
    """Every pair of sizes and options, and no image at all."""
    factors = {
        "images": ((1, 1, 1), (1, 1, 40), (2, 5, 7), (1, 14, 14), (3, 8, 9), (1, 23, 29)),
        "channels": (1, 3, 16, 20, 33, 64, 130, 512),
        "out_channels": (1, 5, 16, 33, 48, 130),
        "kernel": ((3, 3), (1, 1), (1, 5), (2, 2), (5, 3), (7, 7)),
        "stride": ((1, 1), (2, 2), (2, 1), (1, 3)),
        "padding": ((1, 1), (0, 0), (2, 0), (3, 3)),
        "dilation": ((1, 1), (2, 2), (1, 3)),
        "groups": (1, 1, 2, 3),
        "layout": LAYOUTS,
        **epilogue_factors(zero_points=(None,)),
        "activation": (None, *PLAIN),
        "out_dtype": (*FLOATS, torch.int8),
        "residual": RESIDUALS,
        "residual_first": (False, True),
        "packed": (False, True),
    }
    for row in pairwise(factors):
        options = {name: row.pop(name) for name in list(row) if name in EpilogueCase.__dataclass_fields__}
        yield _that_fits(Case(**row, epilogue=EpilogueCase(**options)))
    for kernel, groups in (((3, 3), 1), ((1, 1), 1), ((3, 3), 2)):
        yield Case((0, 8, 8), 16, 16, kernel, groups=groups)


def depthwise_cases() -> Iterator[Case]:
    """Every pair of sizes and options of convolutions whose groups are single channels, which the CPU takes."""
    factors = {
        "images": ((1, 1, 1), (1, 1, 40), (2, 5, 7), (1, 14, 14), (3, 18, 9), (1, 37, 29)),
        "groups": (2, 16, 20, 33, 64, 70, 144),
        "kernel": ((3, 3), (5, 5), (1, 1), (2, 4), (1, 5), (7, 2)),
        "stride": ((1, 1), (2, 2), (2, 1), (1, 3), (3, 4)),
        "padding": ((1, 1), (0, 0), (2, 0), (3, 3)),
        "dilation": ((1, 1), (2, 2), (1, 3), (3, 1)),
        "layout": LAYOUTS,
        **epilogue_factors(zero_points=(None,)),
        "activation": (None, *PLAIN),
        "out_dtype": (*FLOATS, torch.int8),
        "residual": RESIDUALS,
        "residual_first": (False, True),
    }
    for row in pairwise(factors):
        options = {name: row.pop(name) for name in list(row) if name in EpilogueCase.__dataclass_fields__}
        yield _padded(Case(**row, channels=1, out_channels=1, epilogue=EpilogueCase(**options)))
    yield Case((0, 8, 8), 1, 1, groups=16)


def _layer(n: int, size: int, c: int, out: int, kernel: int, stride: int = 1) -> Case:
    half = kernel // 2
    return Case((n, size, size), c, out, (kernel, kernel), (stride, stride), (half, half),
                epilogue=EpilogueCase(activation="relu", out_dtype=torch.int8))  # fmt: skip


#: Layers of a ResNet-50 on a 224 x 224 image: of each stage the 1 x 1 down, the 3 x 3, the one with stride, the 1 x 1 up.
BENCHMARK_CASES = tuple(
    case
    for size, c in ((56, 64), (28, 128), (14, 256), (7, 512))
    for case in (
        _layer(1, size, 4 * c, c, 1),
        _layer(1, size, c, c, 3),
        _layer(1, 2 * size, c, c, 3, 2),
        _layer(1, size, c, 4 * c, 1),
    )
)
