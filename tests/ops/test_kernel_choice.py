"""Which kernel computes a GEMM, and in which tiles and parts of K: what the kernel library selects of those that it has."""

import ctypes
import shutil
import subprocess

import pytest
from gemm_tables import INVALID_VALUE, LIBRARY, NO_KERNEL, SUCCESS, library, select

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA kernels, or without the interpreter")

A100, L40S, H100, RTX5090 = (108, 80), (142, 89), (132, 90), (170, 120)  # multiprocessors, architecture


@pytest.mark.parametrize(
    ("kind", "device", "shape", "arch", "tile", "splits", "cluster", "cluster_sums"),
    [
        ("int8", A100, (4, 4096, 4096), 80, (4, 16), 1, 0, False),
        ("int8", A100, (5, 4096, 4096), 80, (16, 128), 3, 0, False),  # 32 tiles, of 108 multiprocessors
        ("int8", A100, (64, 4096, 300), 80, (64, 128), 1, 0, False),  # of K there is too little to split
        ("int8", A100, (4096, 4096, 4096), 80, (128, 128), 1, 0, False),
        ("int8", H100, (1, 4096, 4096), 80, (4, 16), 1, 0, False),
        ("int8", H100, (16, 1024, 1024), 90, (16, 128), 4, 1, True),
        ("int8", H100, (4096, 4096, 4096), 90, (128, 256), 1, 2, False),
        ("int8", H100, (512, 4096, 4096), 90, (128, 128), 1, 2, False),  # 128 tiles are one round, as 64 would be
        ("fp8", H100, (4096, 2112, 7168), 90, (128, 192), 1, 2, False),  # three rounds, of 256 columns too
        ("fp8", H100, (4096, 24576, 1536), 90, (128, 256), 1, 2, False),  # 47 rounds of 128 columns are fewer
        ("int8", RTX5090, (4096, 4096, 4096), 80, (128, 128), 1, 0, False),
        ("fp8", L40S, (64, 18176, 512), 89, (64, 128), 1, 0, False),
        ("fp8", RTX5090, (100, 128, 128), 89, (128, 128), 1, 0, False),
        # four tiles beside each other: two clusters
        ("w8a16", H100, (64, 512, 4096), 90, (64, 128), 16, 2, False),
        ("w8a16", H100, (64, 384, 4096), 90, (64, 128), 16, 1, False),  # three
        # too many splits for clusters that share x too
        ("w8a16", H100, (64, 2048, 4096), 90, (64, 128), 8, 1, True),
        ("w8a16", H100, (512, 4096, 4096), 90, (128, 128), 1, 2, False),  # 128 tiles are one round, as 64 would be
        ("w8a16", H100, (2048, 4096, 4096), 90, (256, 128), 1, 2, False),
        # three rounds, not two of twice the rows
        ("w8a16", H100, (1280, 4096, 4096), 90, (128, 128), 1, 2, False),
    ],
)
def test_by_hand(kind, device, shape, arch, tile, splits, cluster, cluster_sums):
    error, choice = select(kind, device, *shape)
    assert error == SUCCESS
    kernel = choice.kernel.contents
    assert (kernel.arch, (kernel.tile_m, kernel.tile_n)) == (arch, tile)
    assert (choice.splits, choice.cluster, choice.blocks) == (splits, cluster, device[0] if cluster else 0)
    assert choice.cluster_sums == cluster_sums


@pytest.mark.parametrize(
    ("sms", "shape", "splits", "cluster", "cluster_sums", "blocks"),
    [
        (19, (16, 384, 4096), 6, 1, False, 19),  # three clusters of six: of 16 multiprocessors two, of three none
        (20, (16, 256, 2560), 10, 1, False, 20),  # too many for a cluster
        (24, (16, 384, 4096), 8, 1, True, 24),
        (34, (300, 512, 4096), 2, 1, True, 34),  # three rows of tiles, which share nothing
        (34, (200, 512, 4096), 4, 2, True, 34),  # two rows: clusters of eight, four of them
        (35, (4096, 4096, 4096), 1, 2, False, 34),  # 17 clusters, of the last multiprocessor none
        (1, (4096, 4096, 4096), 1, 1, False, 1),  # no cluster fits
    ],
)
def test_clusters_are_those_that_the_device_has_room_for(sms, shape, splits, cluster, cluster_sums, blocks):
    error, c = select("int8", (sms, 90), *shape)
    assert error == SUCCESS
    assert (c.splits, c.cluster, c.cluster_sums, c.blocks) == (splits, cluster, cluster_sums, blocks)


@pytest.mark.parametrize(("m", "group", "tile", "quantizes"),
                         [(5, 128, (128, 128), True), (5, 256, (128, 256), True), (4096, 128, (128, 256), True),
                          (4, 128, (4, 16), False), (5, 0, (16, 128), False)])  # fmt: skip
def test_a_block_that_quantises_has_all_of_a_group(m, group, tile, quantizes):
    error, choice = select("fp8", H100, m, 4096, 4096, group)
    kernel = choice.kernel.contents
    assert (error, (kernel.tile_m, kernel.tile_n), choice.quantizes) == (SUCCESS, tile, quantizes)


def test_where_no_kernel_runs_there_is_an_error():
    assert select("fp8", A100, 64, 64, 64)[0] == NO_KERNEL
    assert select("int8", (40, 75), 64, 64, 64)[0] == NO_KERNEL


def test_a_dtype_without_a_kernel_is_an_error():
    params = (ctypes.c_int64 * 64)()  # DequantActivationParams: no rows
    params[1] = 4  # of e4m3
    launcher = library().forwardpass_dequant_activation
    assert launcher(ctypes.byref(params), ctypes.c_void_p(2)) == INVALID_VALUE


def test_libraries_share_no_tables():
    """Both may be open in one process, each with kernels of its own: of ours only entry points are dynamic symbols."""
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    for path in LIBRARY.parent.glob("_kernels*.so"):
        said = subprocess.run(["readelf", "-W", "--dyn-syms", path], capture_output=True, text=True, check=True).stdout
        fields = [line.split() for line in said.splitlines()]
        ours = [f[7] for f in fields if len(f) == 8 and f[6].isdigit() and "forwardpass" in f[7]]  # defined here
        assert ours and all(name.startswith("forwardpass_") for name in ours), path.name
