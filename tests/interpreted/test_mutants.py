"""The mutation suite (mutants.py): one mutant in 120 in `make test`, by the commit, all in `make test-all`."""

import functools
import os
import shutil

import pytest

pytest.importorskip("gpuless")
pytest.importorskip("triton")

import mutants
from rotation import number

from forwardpass.dispatch.interpreted import KERNELS
from gpuless import Module

NVCC = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(NVCC is None or not KERNELS.exists(), reason="built without CUDA kernels"),
]
SUBJECTS = list(mutants.subjects())
OF_KERNEL = {name: [arch for n, arch in SUBJECTS if n == name] for name, _ in SUBJECTS}


def parts(of):
    """[(kernel, architecture, n, which)]: `make test` mutates a kernel in twelve, each for one of at most three architectures, and
    there the mutants whose digest has the remainder `which` by n: one in 120 of all. Kernels are few because most of the time is
    spent on launches without a mutant. Each choice is a digit of the number `of`, so that none decides another."""
    for i, (name, archs) in enumerate(OF_KERNEL.items()):
        if i % 12 == of % 12:
            n = 6 if name in mutants.INSTANCES else 3
            yield name, archs[(i // 12 + of // 12) % len(archs)], n, of // 36 % n


SEEDS = range(20)


@functools.cache
def all_of(name, arch):
    return mutants.run([arch], [name])


@pytest.mark.parametrize(
    ("name", "arch", "n", "which"),
    [pytest.param(*part, id="{}-{}-{}-{}".format(*part)) for part in parts(number())]
    + [pytest.param(name, arch, 1, 0, id=f"{name}-{arch}-all", marks=pytest.mark.slow) for name, arch in SUBJECTS],
)
def test_mutants_are_detected(name, arch, n, which):
    results = all_of(name, arch) if n == 1 else mutants.run([arch], [name], chosen=lambda m: m.digest % n == which)
    made = mutants.report(results)
    invalid = [m.id for m, by, _ in results if by == "unsupported"]
    unknown = [u for u in made["undetected"] if u["reason"] is None]
    assert not invalid, f"the interpreter does not take these mutants: {invalid}"
    assert not unknown, f"{len(unknown)} mutants are neither detected nor explained:\n{mutants.markdown(made)}"


def test_the_parts_are_all_mutants():
    """Also of a number that is not small, as a commit's is not."""
    first, count = 2513386919, 12 * 3 * 6
    run = {part for number in range(first, first + count) for part in parts(number)}
    assert {name for name, *_ in run} == {*OF_KERNEL}
    for name, arch in SUBJECTS:
        chosen = {(n, which) for *subject, n, which in run if subject == [name, arch]}
        n = 6 if name in mutants.INSTANCES else 3
        assert chosen == {(n, which) for which in range(n)}, (name, arch)


@pytest.mark.slow
def test_every_reason_is_needed():
    results = [r for name, arch in SUBJECTS for r in all_of(name, arch)]
    undetected = {m.key for m, by, _ in results if by in (None, "unreached")}
    known = mutants.reasons()
    if (
        mutants.TRITON != "3.7"
    ):  # the one of constraints.txt, with which they were all asked for: others may do without some
        known = [(line, kind) for line, kind in known if ".py: " not in line]
    stale = [key for key in known if key not in undetected]
    assert not stale, f"reasons for mutants that are detected, or do not exist: {stale}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, arch in SUBJECTS if name not in mutants.OPERATIONS])
def test_same_bits_in_20_seeds(name, arch):
    """And no finding; of the memory-bound operations' kernels test_kernels.py says it."""
    for launch in mutants.launches_of(name, arch):
        launch.learn(Module(mutants.mutant_edits.only(launch.ptx, launch.kernel)), arch, SEEDS)
