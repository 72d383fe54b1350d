"""Tensor copies in im2col mode against numpy: a convolution's windows, pixel after pixel. And the limits of their maps."""

import ctypes
import re

import numpy as np
import pytest
import torch
from ptx import MBARRIER, WAIT, assert_refused, copied, finding, integers, run
from rows import row
from tensor_maps import in_shared_memory, noise, raw

import gpuless
from gpuless import core

pytestmark = pytest.mark.interpreted

BYTES = "mbarrier::complete_tx::bytes"
DIMENSIONS = "1d|2d|3d|4d|5d"


class Im2colMap(gpuless.TensorMap):
    """Of a tensor [N, (D, H,) W, C]; corners, strides: (D, H,) W, as torch has them."""

    def __init__(self, tensor, lower, upper, channels, pixels, strides=None, swizzle=0, data_type=None):
        self.tensor = tensor
        self.how = lower, upper, channels, pixels, strides or [1] * (tensor.dim() - 2), swizzle, data_type

    def encode(self, tensor):
        lower, upper, channels, pixels, strides, swizzle, data_type = self.how
        rank, size = tensor.dim(), tensor.element_size()
        n64, n32, corner = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank, ctypes.c_int * (rank - 2)
        encoded = ctypes.create_string_buffer(128 + 64)
        aligned = ctypes.addressof(encoded) + -ctypes.addressof(encoded) % 64
        error = core.load().gpuless_tensor_map_encode_im2col(
            aligned, 0 if data_type is None else data_type, rank, tensor.data_ptr(), n64(*tensor.shape[::-1]),
            n64(*[s * size for s in tensor.stride()[::-1][1:]]), corner(*lower[::-1]), corner(*upper[::-1]), channels, pixels,
            n32(*[1, *strides[::-1], 1][:rank]), 0, {0: 0, 32: 1, 64: 2, 128: 3}[swizzle], 0, 0,
        )  # fmt: skip
        if error:
            raise ValueError(core.load().gpuless_tensor_map_error().decode())
        return ctypes.string_at(aligned, 128)


def windows(x, kernel, stride, padding, dilation):
    """[output pixels, taps, channels] of x [N, spatial..., C] as a convolution sees it, zeros outside; written as loops."""
    spatial = x.shape[1:-1]
    outs = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(spatial, kernel, stride, padding, dilation)]
    rows = []
    for n in range(x.shape[0]):
        for out in np.ndindex(*outs):
            taps = []
            for tap in np.ndindex(*kernel):
                at = [o * s - p + t * d for o, s, p, t, d in zip(out, stride, padding, tap, dilation)]
                inside = all(0 <= a < size for a, size in zip(at, spatial))
                taps.append(x[(n, *at)] if inside else np.zeros_like(x[(0,) * (x.ndim - 1)]))
            rows.append(taps)
    return np.array(rows), outs


def load_body(rank, coordinates, offsets, size, base, multicast=""):
    at, by = ", ".join(str(c) for c in coordinates), ", ".join(str(o) for o in offsets)
    mode = f"shared::cluster.global.im2col.{BYTES}{'.multicast::cluster' if multicast else ''}"
    return f"""{MBARRIER}
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], {size};
    @%p0 cp.async.bulk.tensor.{rank}d.{mode} [%s+{base}], [%a0, {{{at}}}], [%s], {{{by}}}{multicast};
    {WAIT.format(0)}
    {copied(f"%s+{base}", "%a1", size // 4, "out")}"""


CONVOLUTIONS = [
    # shape, kernel, stride, padding, dilation, channels of a copy, pixels of a copy, swizzle
    ((2, 9, 7, 32), (3, 3), (1, 1), (1, 1), (1, 1), 32, 24, 32),
    ((3, 5, 6, 160), (3, 2), (2, 1), (1, 2), (1, 2), 128, 32, 128),
    ((2, 11, 9, 64), (3, 3), (2, 2), (0, 1), (2, 1), 64, 40, 64),
    ((1, 4, 4, 16), (1, 1), (2, 2), (0, 0), (1, 1), 16, 8, 0),
    ((2, 9, 48), (3,), (2,), (1,), (1,), 48, 16, 0),
    ((2, 4, 3, 5, 16), (2, 1, 3), (1, 1, 2), (1, 0, 1), (1, 1, 1), 16, 32, 0),
]


@row(f"cp.async.bulk.tensor.{DIMENSIONS}.shared::cluster|shared::cta.global.im2col.{BYTES}.L2::cache_hint?")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_windows(case):
    shape, kernel, stride, padding, dilation, channels, pixels, swizzle = case
    x = noise(shape, torch.uint8)
    expected, outs = windows(raw(x), kernel, stride, padding, dilation)
    upper = [p - (k - 1) * d for p, k, d in zip(padding, kernel, dilation)]
    tensor_map = Im2colMap(x, [-p for p in padding], upper, channels, pixels, stride, swizzle)
    base, taps = 1024, list(np.ndindex(*kernel))
    size = channels * pixels
    y = torch.zeros(size // 4, dtype=torch.int32)
    firsts = {0, 3, max(0, len(expected) - 5)}  # in a row, and so that the column ends beyond the last image
    for first in firsts:
        *at, image = *np.unravel_index(first % int(np.prod(outs)), outs), first // int(np.prod(outs))
        corner = [int(o) * s - p for o, s, p in zip(at, stride, padding)]
        for tap in {0, len(taps) // 2, len(taps) - 1}:
            for channel in {0, (shape[-1] - 1) // channels * channels}:
                rows = np.zeros((pixels, channels), dtype=np.uint8)
                there = expected[first : first + pixels, tap, channel : channel + channels]
                rows[: there.shape[0], : there.shape[1]] = there
                offsets = [t * d for t, d in zip(taps[tap], dilation)][::-1]
                body = load_body(len(shape), [channel, *corner[::-1], image], offsets, size, base)
                run(body, tensor_map, y.zero_(), shared=base + size)
                assert np.array_equal(y.numpy().view(np.uint8), in_shared_memory(rows, base, swizzle)), (first, tap)


@row(f"cp.async.bulk.tensor.{DIMENSIONS}.shared::cluster.global.im2col.{BYTES}.multicast::cluster.L2::cache_hint?")
def test_multicast():
    x = noise((1, 4, 4, 16), torch.uint8)
    y = torch.zeros(32, dtype=torch.int32)
    body = load_body(4, [0, -1, -1, 0], [1, 1], 128, 128, ", %h1")
    run("mov.b16 %h1, 1;" + body, Im2colMap(x, (-1, -1), (-1, -1), 16, 8), y)
    assert np.array_equal(y.numpy().view(np.uint8), raw(x).reshape(-1, 16)[:8].reshape(-1))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lower": (-129, 0)}, "-128 to 127"),
        ({"upper": (0, 128)}, "-128 to 127"),
        ({"upper": (-4, 0)}, "must not be empty"),
        ({"channels": 0}, "channelsPerPixel must be 1 to 256"),
        ({"channels": 257}, "channelsPerPixel must be 1 to 256"),
        ({"channels": 24}, "channelsPerPixel times"),
        ({"channels": 144, "swizzle": 128}, "the swizzle's 128"),
        ({"pixels": 0}, "pixelsPerColumn must be 1 to 1024"),
        ({"pixels": 1025}, "pixelsPerColumn must be 1 to 1024"),
        ({"strides": (9, 1)}, "elementStrides[2]"),
        ({"data_type": 14}, "not supported"),
        ({"tensor": torch.zeros(4, 16, dtype=torch.uint8)}, "tensorRank must be 3 to 5"),
    ],
)
def test_limits(change, why):
    x = change.pop("tensor", torch.zeros(2, 4, 4, 16, dtype=torch.uint8))
    good = {
        "lower": (0, 0)[: x.dim() - 2],
        "upper": (0, 0)[: x.dim() - 2],
        "channels": 16,
        "pixels": 8,
        "strides": (1, 1),
    }
    with pytest.raises(ValueError, match=re.escape(why)):
        Im2colMap(x, **{**good, **change}).encode(x)


def test_misused():
    x, y = noise((1, 4, 4, 16), torch.uint8), torch.zeros(64, dtype=torch.int32)
    im2col = Im2colMap(x, (-1, -1), (-1, -1), 16, 8)
    assert "at most 255" in finding(load_body(4, [0, 0, 0, 0], [256, 0], 128, 128), im2col, y).message
    tiled = gpuless.tensor_map(x, (1, 2, 4, 16))
    assert "is tiled, the instruction of im2col" in finding(load_body(4, [0] * 4, [0, 0], 128, 128), tiled, y).message
    in_tiles = f"""{MBARRIER}
    @%p0 cp.async.bulk.tensor.4d.shared::cluster.global.{BYTES} [%s+128], [%a0, {{0, 0, 0, 0}}], [%s];"""
    assert "of im2col mode, the instruction tiled" in finding(in_tiles, im2col, y).message


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"cp.async.bulk.tensor.2d.shared::cluster.global.im2col.{BYTES} [%s], [%a0, {{0, 0}}], [%s], {{0}};", "3 to 5"),
        (f"cp.async.bulk.tensor.4d.shared::cluster.global.im2col.{BYTES} [%s], [%a0, {{0, 0, 0, 0}}], [%s], {{0}};",
         "2 im2col offsets"),
        (f"cp.async.bulk.tensor.4d.shared::cluster.global.im2col::w.{BYTES} [%s], [%a0, {{0, 0, 0, 0}}], [%s], {{0, 0}};",
         "only loads in .im2col"),
    ],
)  # fmt: skip
def test_refused(body, why):
    assert why in assert_refused(body, integers(64))
