"""The main loops of the GEMMs have no bank conflicts: what twice the depth adds to a source line is its share of the loop."""

import dataclasses
import functools
import itertools
import re

import pytest
import torch
from rotation import in_turn

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.dispatch.interpreted import KERNELS
from forwardpass.ops.fp8_grouped_gemm import cases as fp8_grouped_gemm
from forwardpass.ops.int8_conv2d import cases as int8_conv2d
from forwardpass.ops.int8_grouped_gemm import cases as int8_grouped_gemm
from forwardpass.ops.w8a16_grouped_gemm import cases as w8a16_grouped_gemm
from gpuless import core

pytestmark = pytest.mark.interpreted
gemm = pytest.importorskip("benchmarks.gemm", reason="benchmarks are in the checkout only; run pytest from its root")

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
#: a tile of each height; a tile for each multiprocessor, so that K is not split
SHAPES = ((1, 256), (16, 16896), (64, 16896), (256, 8448), (1024, 4096), (1408, 2304))
#: (rows of each expert, N): the same of a grouped GEMM
EXPERTS = (
    ((1, 0, 17, 2, 16) * 8, 520),
    ((70, 0, 64, 63) * 4, 1600),
    ((140, 130, 129, 128), 600),
    ((700, 0, 1, 300), 4090),
)
#: (output pixels, channels) of a convolution with steps, whose windows are of one tap: each tile, once for each multiprocessor
WINDOWS = {
    "sm_80": (((8, 8), 13824), ((32, 32), 1664), ((108, 128), 64)),
    "sm_90a": (((32, 44), 3072), ((32, 44), 1536), ((128, 132), 64)),
}
DEPTH = 128
#: of a third of the launches: each operation at two heights of tiles
PARTS = [*itertools.product(ARCHITECTURES, range(3))]
HALF = {"x_dtype": torch.float16}


@dataclasses.dataclass(frozen=True)
class Windows:
    """A case of int8_conv2d by its depth, k channels."""

    pixels: tuple[int, int]
    out_channels: int
    k: int

    def arguments(self):
        height, width = (2 * n - 1 for n in self.pixels)
        return int8_conv2d.Case((1, height, width), self.k, self.out_channels, (1, 1), (2, 2), (0, 0)).arguments()


def variants():
    for name, options in gemm.OPERATIONS.items():
        if "linear" not in name:  # the same kernels
            yield from ((name, o) for o in options.values())
    yield from (("w8a16_gemm", {**o, **HALF}) for o in gemm.OPERATIONS["w8a16_gemm"].values())
    # of block scales there is a kernel of its own, of either weight
    yield from (("w8a16_gemm", {"scales": "block", **dtype}) for dtype in ({}, HALF))


def launches(arch):
    """(operation, case) that have kernels"""
    for name, options in variants():
        operation = dispatch.operations[name]
        with fp.interpret(arch):
            shapes = () if operation.why_not_on("cuda", torch.device("cpu")) else SHAPES
        yield from ((operation, gemm.make_case(operation, m, n, DEPTH, options)) for m, n in shapes)
    for name, cases in (("int8_grouped_gemm", int8_grouped_gemm), ("w8a16_grouped_gemm", w8a16_grouped_gemm)):
        yield from ((dispatch.operations[name], cases.Case(counts, n, DEPTH)) for counts, n in EXPERTS)
    windows = WINDOWS.get(arch, WINDOWS["sm_80"])
    yield from ((dispatch.operations["int8_conv2d"], Windows(*window, DEPTH)) for window in windows)
    grouped = dispatch.operations["fp8_grouped_gemm"]
    if arch != "sm_80":
        for blocks in (False, True):
            yield from ((grouped, fp8_grouped_gemm.Case(counts, n, DEPTH, blocks=blocks)) for counts, n in EXPERTS)


@dataclasses.dataclass
class Line:
    where: str
    wavefronts: int
    ideal: int


def lines(device):
    """(kernel, file, line) -> counts, of the kernels that multiply"""
    multiply = {k.kernel for k in device.kernels() if re.search("gem[mv]", k.kernel)}
    return {(p.kernel, p.file, p.line): p.counts for p in device.profile() if p.kernel in multiply}


def run(operation, case, arch):
    images = operation.name == "int8_conv2d"  # which have their channels last
    call = case.arguments() if images else gemm.bench.as_a_layer_has_them(case.arguments())
    with torch.inference_mode(), fp.interpret(arch, counters=True, checks=False) as device, fp.use_backend("cuda"):
        operation(*call)
    return lines(device)


@functools.cache
def main_loops(arch, part):
    """kernel -> the lines of its main loop that use shared memory"""
    if core.why_not() or not KERNELS.exists():
        pytest.skip("there are no CUDA kernels that could be interpreted")
    found = {}
    for operation, case in [*launches(arch)][part::3]:
        once, twice = (run(operation, dataclasses.replace(case, k=k), arch) for k in (DEPTH, 2 * DEPTH))
        assert {key[0] for key in once} == {key[0] for key in twice}, "another depth, another kernel"
        for (kernel, file, line), counts in twice.items():
            before = once.get((kernel, file, line))
            added = [
                getattr(counts, c) - (getattr(before, c) if before else 0) for c in ("wavefronts", "ideal_wavefronts")
            ]
            found.setdefault(kernel, [])
            if added[1]:
                found[kernel].append(Line(f"{operation.name} {case}: {file.rpartition('/')[2]}:{line}", *added))
    return found


@pytest.mark.every(3)
@pytest.mark.parametrize(("arch", "part"), in_turn(PARTS))
def test_wavefronts_of_the_main_loops_are_ideal(arch, part):
    found = main_loops(arch, part)
    assert any(found.values())
    conflicts = [line for loop in found.values() for line in loop if line.wavefronts != line.ideal]
    assert not conflicts


@pytest.mark.slow
def test_every_gemm_kernel_was_looked_at():
    """Host code registers each by its name, a string in the library."""
    seen = set().union(*(main_loops(*part) for part in PARTS))
    names = re.findall(rb"\0(_ZN11forwardpass\d+\w*gem[mv]\w*_kernelI\w+)\0", KERNELS.read_bytes())
    assert names and not {name.decode() for name in names} - seen
