"""Kernels in the mutation suite that are templates: an instance of one, and the cases that it is launched with."""

import dataclasses
import struct
import sys

import torch
from mutant_launches import recording

import forwardpass as fp
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.testing import poisoned_outputs


@dataclasses.dataclass(frozen=True)
class Instance:
    architectures: tuple[str, ...]
    kernel: str  # in its name
    cases: tuple
    implementation: str = "cuda"
    #: a kernel that computes one tile after the other: each launch with so many clusters, which make all tiles
    clusters: int = 0
    #: and no more tiles than these: the plan takes the largest tile only where there is one for every other
    #: multiprocessor, and mutants need no more than wrap around
    tiles: int = 0


def instance_launches(instance, arch):
    """Each case, compared, and of its launches those of the kernel."""
    launches = []
    torch.use_deterministic_algorithms(True)
    with (
        recording() as recorded,
        poisoned_outputs(),
        fp.use_backend(instance.implementation),
        fp.interpret(arch, approximate=False, truncating=True),
    ):
        for case in instance.cases:
            args, module = case.arguments(), sys.modules[type(case).__module__]
            got = fp.dispatch.operations[getattr(case, "op", module.__name__.split(".")[-2])](*args)
            module.assert_matches(got, args, **({"truncating": True} if module is fp8_gemm else {}))
            for launch in recorded:
                if instance.kernel in launch.kernel:
                    launches.append(launch)
                    if instance.tiles:
                        make_fewer(launch, case.n, instance.tiles)
            recorded.clear()
    torch.use_deterministic_algorithms(False)
    launches = [launch for launch in launches if (launch.kernel, launch.ptx) == (launches[0].kernel, launches[0].ptx)]
    if instance.clusters:
        for launch in launches:
            (_, block, (x, y, z), *rest) = launch.config
            launch.config = (x * instance.clusters, y, z), block, (x, y, z), *rest
    return launches


def make_fewer(launch, columns, tiles):
    """In WgmmaArguments (csrc/device/gemm_sm90a.cuh): the TileMap of one row of tiles, and behind it how many there are."""
    there = struct.pack("III", 1, -(-columns // 256), -(-columns // 256))
    assert launch.parameters.count(there) == 1
    at = launch.parameters.index(there) + 8
    struct.pack_into("I", launch.parameters, at, min(tiles, -(-columns // 256)))
