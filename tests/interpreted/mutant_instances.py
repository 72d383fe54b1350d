"""Kernels in the mutation suite that are templates: an instance of one, and the cases that it is launched with."""

import dataclasses
import functools
import math
import re
import struct
import sys

import torch
from kernel_names import demangle
from mutant_launches import recording

import forwardpass as fp
from forwardpass.ops.append_kv import cases as append_kv
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.fp8_linear import cases as fp8_linear
from forwardpass.ops.int8_conv2d import cases as int8_conv2d
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm
from forwardpass.testing import poisoned_outputs


@dataclasses.dataclass(frozen=True)
class Instance:
    architectures: tuple[str, ...]
    kernel: str  # in its readable name
    cases: tuple
    implementation: str = "cuda"
    #: a kernel that computes one tile after the other: each launch with so many clusters, which make all tiles; but clusters of
    #: more than the two blocks that share an operand add splits of one tile
    clusters: int = 0
    #: and no more tiles than these: the plan takes the largest tile only where there is one for every other
    #: multiprocessor, and mutants need no more than wrap around
    tiles: int = 0
    multiprocessors: int = 0  # of the GPU, 0: all
    files: tuple[str, ...] = ()  # whose lines are mutated; none: all

    @property
    def columns(self):
        """Of a tile."""
        return int(re.search(r"\bn=(\d+)", self.kernel)[1])


@functools.cache
def readable_name(kernel):
    return demangle([kernel])[0]


def instance_launches(instance, arch):
    """Each case, compared, and of its launches those of the kernel."""
    launches = []
    torch.use_deterministic_algorithms(True)
    with (
        recording() as recorded,
        poisoned_outputs(),
        fp.use_backend(instance.implementation),
        fp.interpret(arch, approximate=False, truncating=True, multiprocessors=instance.multiprocessors),
    ):
        for case in instance.cases:
            args, module = case.arguments(), sys.modules[type(case).__module__]
            operation = fp.dispatch.operations[getattr(case, "op", None) or module.__name__.split(".")[-2]]
            if module is append_kv:  # which returns nothing
                with fp.use_backend("reference"):
                    operation(*(expected := append_kv.copied(args)))
                operation(*args)
                module.assert_matches(args, expected)
            else:
                got = operation(*args)
                module.assert_matches(got, args, **({"truncating": True} if module in (fp8_gemm, fp8_linear) else {}))
            for launch in recorded:
                if instance.kernel in readable_name(launch.kernel):
                    launches.append(launch)
                    if instance.tiles:
                        # swap-AB: the tile's columns are rows of x
                        columns = math.prod(case.lead) if isinstance(case, w8a16_gemm.Case) else columns_of(case)
                        make_fewer(launch, columns, instance.columns, instance.tiles)
            recorded.clear()
    torch.use_deterministic_algorithms(False)
    launches = [launch for launch in launches if (launch.kernel, launch.ptx) == (launches[0].kernel, launches[0].ptx)]
    if instance.clusters:
        for launch in launches:
            (_, block, (x, y, z), *rest) = launch.config
            if x <= 2:
                launch.config = (x * instance.clusters, y, z), block, (x, y, z), *rest
    return launches


def columns_of(case):
    """Of the output."""
    return case.gemm[1] if isinstance(case, int8_conv2d.Case) else case.n


def make_fewer(launch, columns, of_tile, tiles):
    """In a TileMap (csrc/schedule/gemm_tile.cuh) of one row of tiles: how many there are."""
    count = -(-columns // of_tile)
    tile_map = struct.pack("III", 1, count, count)
    assert launch.parameters.count(tile_map) == 1
    struct.pack_into("I", launch.parameters, launch.parameters.index(tile_map) + 8, min(tiles, count))
