"""A deliberately broken kernel of each kind is reported at its source line; the right twin of each is silent.

hazards/<name>.cu holds the kernel, what must be reported and, as "// HAZARD", where; here is how each is launched and
what the right one computes. All are small enough that what is wrong does not depend on the schedule: happens-before
and the state of asynchronous operations say so at every seed, so every seed must report it. 20 seeds without a false
alarm.
"""

import pathlib
import re

import pytest
import torch
from cached_ptx import NVCC, cached_ptx

import gpuless

pytestmark = [pytest.mark.interpreted, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]

FOLDER = pathlib.Path(__file__).parent / "hazards"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
SEEDS, BROKEN_SEEDS = 20, 10
RUNS = {}


class Source:
    """A hazard's file: what its comments promise."""

    def __init__(self, path):
        text = path.read_text()
        self.path = path
        self.kinds = re.search(r"^// Reports: (.*)$", text, re.M)[1].split(" or ")
        needs = re.search(r"^// Needs: (.*)$", text, re.M)[1]
        self.architectures = ARCHITECTURES[ARCHITECTURES.index(needs) :] if needs in ARCHITECTURES else (needs,)
        self.lines = [i for i, line in enumerate(text.splitlines(), 1) if "// HAZARD" in line]

    def module(self, broken, architecture):
        ptx = cached_ptx(self.path, [FOLDER / "hazard.cuh"], architecture, f"-DBROKEN={broken}")
        return gpuless.Module(ptx, arch=architecture)


SOURCES = {path.stem: Source(path) for path in sorted(FOLDER.glob("*.cu"))}
CASES = [
    pytest.param(name, architecture, marks=[pytest.mark.slow] if i else [], id=f"{name}-{architecture}")
    for name, source in SOURCES.items()
    for i, architecture in enumerate(source.architectures)  # the others in test-all: what nvcc emits hardly differs
]


def run(function):
    RUNS[function.__name__] = function
    return function


def integers(*shape, dtype=torch.float32):
    """Small enough that every sum and product is exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def poisoned(*shape):
    return torch.full(shape, float("nan"))


def from_row(kernel, x, y, *args, block=None, grid=1, shared=0, cluster=1):
    """x, y and scalars in global memory is all that most of them take."""
    block = (block or y.numel(), 1, 1)
    kernel.launch(grid=(grid, 1, 1), block=block, args=[x, y, *args], shared=shared, cluster=cluster)
    return y


def tiles(tensor):
    """TMA in boxes of 8 rows of 32 floats."""
    return gpuless.tensor_map(tensor, box=(8, 32))


# What follows: a hazard's launch, then (what it wrote, what it has to be).


@run
def missing_barrier(module):
    x = integers(128)
    return from_row(module["missing_barrier"], x, poisoned(128)), x.flip(0)


@run
def missing_syncwarp(module):
    x = integers(4, 32)
    return from_row(module["missing_syncwarp"], x, poisoned(4, 32), block=128), x.flip(1) - x[:, :1]


@run
def cp_async_missing_syncwarp(module):
    x = integers(128, dtype=torch.int32)  # 4 matrices, a register of a lane after the other
    return from_row(module["cp_async_missing_syncwarp"], x, torch.full((128,), -100, dtype=torch.int32), block=32), x


@run
def reused_buffer(module):
    x = integers(4, 128)
    return from_row(module["reused_buffer"], x, poisoned(128)), x.sum(0).flip(0)


@run
def cp_async_weak_wait(module):
    x = integers(2, 32, 4)
    return from_row(module["cp_async_weak_wait"], x, poisoned(32, 4), block=32), x.sum(0)


@run
def cp_async_uncommitted(module):
    x = integers(32, 4)
    return from_row(module["cp_async_uncommitted"], x, poisoned(32, 4), block=32), x


@run
def cp_async_missing_barrier(module):
    x = integers(64, 4)
    return from_row(module["cp_async_missing_barrier"], x, poisoned(64, 4), block=64), x.flip(0)


@run
def cp_async_reused_buffer(module):
    x = integers(2, 64, 4)
    return from_row(module["cp_async_reused_buffer"], x, poisoned(64)), x.sum((0, 2))


@run
def out_of_bounds_global(module):
    x = integers(100)
    y = from_row(module["out_of_bounds_global"], x, poisoned(100), 100, block=64, grid=2)
    return y, torch.cat([x.diff(), x.new_zeros(1)])


@run
def out_of_bounds_shared(module):
    x = integers(64)
    return from_row(module["out_of_bounds_shared"], x, poisoned(64)), x.flip(0)


@run
def out_of_bounds_dynamic_shared(module):
    x = integers(64)
    y = from_row(module["out_of_bounds_dynamic_shared"], x, poisoned(64), shared=64 * 4)
    return y, torch.cat([x[1:], x.new_zeros(1)])


@run
def misaligned(module):
    x = integers(68)
    return from_row(module["misaligned"], x, poisoned(64), block=16), x[4:]


@run
def misaligned_cp_async(module):
    x = integers(128)
    return from_row(module["misaligned_cp_async"], x, poisoned(128), block=32), x


@run
def uninitialised_shared(module):
    x = integers(50)
    return from_row(module["uninitialised_shared"], x, poisoned(64), 50), torch.cat([x, x.new_zeros(14)]).flip(0)


@run
def named_barrier_count(module):
    x = integers(2, 32)
    return from_row(module["named_barrier_count"], x, poisoned(32), block=128), x.sum(0)


@run
def named_barrier_order(module):
    x = integers(64)
    return from_row(module["named_barrier_order"], x, poisoned(64)), x.flip(0)


@run
def divergent_barrier(module):
    x = integers(64)
    return from_row(module["divergent_barrier"], x, poisoned(64)), torch.cat([x.roll(32)[:48], x.new_zeros(16)])


@run
def cluster_missing_barrier(module):
    x = integers(2, 2, 64)
    y = from_row(module["cluster_missing_barrier"], x, poisoned(2, 2, 64), block=64, grid=4, cluster=2)
    return y, x.flip(1)


@run
def cluster_early_exit(module):
    x = integers(2, 2, 64)
    y = from_row(module["cluster_early_exit"], x, poisoned(2, 2, 64), block=64, grid=4, cluster=2)
    return y, x.flip(1)


@run
def multicast_weak_wait(module):
    x = integers(256)
    y = from_row(module["multicast_weak_wait"], x, poisoned(2, 256), block=128, grid=2, cluster=2)
    return y, x.expand(2, 256)


@run
def tma_weak_wait(module):
    x = integers(16, 32)
    return from_row(module["tma_weak_wait"], tiles(x), poisoned(8, 32)), x[:8] + x[8:]


@run
def tma_missing_wait(module):
    x = integers(8, 32)
    return from_row(module["tma_missing_wait"], tiles(x), poisoned(8, 32)), x


@run
def tma_reused_buffer(module):
    x = integers(16, 32)
    return from_row(module["tma_reused_buffer"], tiles(x), poisoned(8, 32), block=288), x[:8] + x[8:]


@run
def tma_store_missing_fence(module):
    x, y = integers(8, 32), poisoned(8, 32)
    module["tma_store_missing_fence"].launch(grid=(1, 1, 1), block=(256, 1, 1), args=[x, tiles(y)])
    return y, x


@run
def tma_store_unfinished(module):
    x, y = integers(8, 32), poisoned(8, 32)
    module["tma_store_unfinished"].launch(grid=(1, 1, 1), block=(256, 1, 1), args=[x, tiles(y)])
    return y, x


@run
def tma_store_reused_buffer(module):
    x, y = integers(16, 32), poisoned(16, 32)
    module["tma_store_reused_buffer"].launch(grid=(1, 1, 1), block=(256, 1, 1), args=[x, tiles(y)])
    return y, x


@run
def mbarrier_wrong_phase(module):
    x = integers(16, 32)
    return from_row(module["mbarrier_wrong_phase"], tiles(x), poisoned(8, 32)), x[:8] + x[8:]


@run
def mbarrier_arrivals(module):
    x = integers(128)
    return from_row(module["mbarrier_arrivals"], x, poisoned(128)), x.flip(0)


@run
def mbarrier_expect_tx(module):
    x = integers(8, 32)
    return from_row(module["mbarrier_expect_tx"], tiles(x), poisoned(8, 32)), x


@run
def mbarrier_before_init(module):
    x = integers(128)
    return from_row(module["mbarrier_before_init"], x, poisoned(128)), x.flip(0)


def product(module, name, y, tiles):
    """Of a [64, 16] and `tiles` times b [8, 16], by a warpgroup, into y."""
    a, b = integers(64, 16, dtype=torch.float16), integers(tiles, 8, 16, dtype=torch.float16)
    module[name].launch(grid=(1, 1, 1), block=(128, 1, 1), args=[a, b, y])
    return y, a.float() @ b.float().mT  # [tiles, 64, 8]


@run
def wgmma_missing_fence(module):
    y, (expected,) = product(module, "wgmma_missing_fence", poisoned(64, 8), 1)
    return y, expected


@run
def wgmma_missing_register_fence(module):
    y, expected = product(module, "wgmma_missing_register_fence", poisoned(64, 8), 2)
    return y, 2 * expected[0] + expected[1]


@run
def wgmma_weak_wait(module):
    before = integers(2, 64, 8)
    y, expected = product(module, "wgmma_weak_wait", before.clone(), 2)
    return y, before + expected


@run
def wgmma_uncommitted(module):
    y, (expected,) = product(module, "wgmma_uncommitted", poisoned(64, 8), 1)
    return y, expected


@run
def wgmma_reused_operand(module):
    y, expected = product(module, "wgmma_reused_operand", poisoned(64, 8), 2)
    return y, expected.sum(0)


def tensor_product(module, name, tiles=1):
    """Of a [128, 16] and `tiles` times b [16, 16] by tcgen05; of the sum of products the first four columns."""
    a, b, y = integers(128, 16, dtype=torch.float16), integers(tiles, 16, 16, dtype=torch.float16), poisoned(128, 4)
    module[name].launch(grid=(1, 1, 1), block=(128, 1, 1), args=[a, b, y])
    return y, (a.float() @ b.float().mT).sum(0)[:, :4]


@run
def tcgen05_missing_wait(module):
    return tensor_product(module, "tcgen05_missing_wait")


@run
def tcgen05_weak_wait(module):
    return tensor_product(module, "tcgen05_weak_wait")


@run
def tcgen05_ld_missing_wait(module):
    return tensor_product(module, "tcgen05_ld_missing_wait")


@run
def tcgen05_st_missing_wait(module):
    y, expected = tensor_product(module, "tcgen05_st_missing_wait")
    return y, 1 + expected


@run
def tcgen05_reused_operand(module):
    return tensor_product(module, "tcgen05_reused_operand", 2)


@run
def tcgen05_not_freed(module):
    return tensor_product(module, "tcgen05_not_freed")


@run
def tcgen05_out_of_allocation(module):
    return tensor_product(module, "tcgen05_out_of_allocation")


def reversed_by_the_second(module, kernel):
    """Of two launches, the second of which may begin before the first has ended."""
    x, y, z = integers(256), poisoned(256), poisoned(256)
    module["producer"].launch(grid=(2, 1, 1), block=(128, 1, 1), args=[x, y])
    module[kernel].launch(grid=(2, 1, 1), block=(128, 1, 1), args=[y, z], programmatic=True)
    return z, 2 * x.flip(0)


@run
def missing_griddepcontrol_wait(module):
    return reversed_by_the_second(module, "missing_griddepcontrol_wait")


@run
def read_only_load_of_earlier_kernel(module):
    return reversed_by_the_second(module, "read_only_load_of_earlier_kernel")


def sum_by_the_last(kernel):
    x, partial, finished = integers(8, 128), poisoned(8, 128), torch.zeros(1, dtype=torch.int32)
    return from_row(kernel, x, poisoned(128), partial, finished, grid=8), x.sum(0)


@run
def release_before_barrier(module):
    return sum_by_the_last(module["release_before_barrier"])


@run
def release_without_fence(module):
    return sum_by_the_last(module["release_without_fence"])


@run
def tma_store_released_early(module):
    x, partial, finished = integers(4, 256), poisoned(32, 32), torch.zeros(1, dtype=torch.int32)
    args = [partial, tiles(partial), finished]
    return from_row(module["tma_store_released_early"], x, poisoned(256), *args, grid=4), x.sum(0)


@run
def cp_async_long_ago(module, later=40):
    x = integers(32, 4)
    return from_row(module["cp_async_long_ago"], x, poisoned(32, 4), later, block=64), x


@run
def tma_store_long_ago(module, later=40):
    x, y = integers(8, 32), poisoned(8, 32)
    module["tma_store_long_ago"].launch(grid=(1, 1, 1), block=(64, 1, 1), args=[tiles(x), tiles(y), later])
    return y, torch.ones(8, 32)


@run
def wgmma_long_ago(module, later=40):
    a, b, y = integers(64, 16, dtype=torch.float16), integers(8, 16, dtype=torch.float16), poisoned(64, 8)
    module["wgmma_long_ago"].launch(grid=(1, 1, 1), block=(256, 1, 1), args=[a, b, y, later])
    return y, a.float() @ b.float().T


@run
def release_of_cta_scope(module):
    x, flag = integers(64), torch.zeros(1, dtype=torch.int32)
    return from_row(module["release_of_cta_scope"], x, poisoned(64), poisoned(64), flag, grid=2), x


@run
def cluster_release_of_cta_scope(module):
    x, flag = integers(64), torch.zeros(1, dtype=torch.int32)
    return from_row(module["cluster_release_of_cta_scope"], x, poisoned(64), flag, grid=2, cluster=2), x


@run
def cluster_arrival_of_cta_scope(module):
    x = integers(64)
    return from_row(module["cluster_arrival_of_cta_scope"], x, poisoned(64), grid=2, cluster=2), x


@run
def wgmma_unfenced_copy(module):
    y, expected = product(module, "wgmma_unfenced_copy", poisoned(64, 8), 1)
    return y, expected.sum(0)


def test_every_hazard_is_run():
    assert set(RUNS) == set(SOURCES)
    assert all(source.lines for source in SOURCES.values())


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_broken(name, architecture):
    source = SOURCES[name]
    for seed in range(BROKEN_SEEDS):
        with pytest.raises(gpuless.Finding) as raised, gpuless.gpu(architecture, seed=seed):
            RUNS[name](source.module(1, architecture))
        finding = raised.value
        assert finding.kind in source.kinds, f"seed {seed}: {finding}"
        assert pathlib.Path(finding.file).name == source.path.name, f"seed {seed}: {finding}"
        assert finding.line in source.lines, f"seed {seed}: {finding}"
        assert finding.kernel == name
        assert (finding.seed, finding.arch) == (seed, architecture)  # what repeats it
        assert f"{source.path.name}:{finding.line}" in str(finding)


@pytest.mark.parametrize("later", [1, 14, 15, 16, 400])
@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith("long_ago")])
def test_nothing_is_forgotten(name, later):
    """However many operations have begun since, and been waited for."""
    module = SOURCES[name].module(1, "sm_90a")
    for seed in range(BROKEN_SEEDS):
        with pytest.raises(gpuless.Finding) as raised, gpuless.gpu("sm_90a", seed=seed):
            RUNS[name](module, later)
        assert raised.value.kind in SOURCES[name].kinds, f"seed {seed}: {raised.value}"
    with gpuless.gpu("sm_90a"):
        got, expected = RUNS[name](SOURCES[name].module(0, "sm_90a"), later)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "name", ["wgmma_weak_wait", "wgmma_uncommitted", "wgmma_unfenced_copy", "tma_store_unfinished"]
)
def test_what_gpus_forgive(name):
    """Where one is not strict the launch goes on, and computes what the right twin does."""
    for seed in range(BROKEN_SEEDS):
        with pytest.warns(gpuless.FindingWarning), gpuless.gpu("sm_90a", seed=seed, strict=False) as device:
            got, expected = RUNS[name](SOURCES[name].module(1, "sm_90a"))
        assert torch.equal(got, expected)
        assert {f.breaks for f in device.findings} == {"isa"}


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_right(name, architecture):
    source = SOURCES[name]
    for seed in range(SEEDS):
        with gpuless.gpu(architecture, seed=seed):
            got, expected = RUNS[name](source.module(0, architecture))
        differ = (got != expected).nonzero()  # NaN, never written, differs
        assert not len(differ), f"seed {seed}: {len(differ)} differ, the first at {differ[0].tolist()}"
