"""The grouped GEMMs' kernels, as compiled: every case on each architecture, and what only they have: lists of experts, tiles that
end with an expert, rows of none."""

import pytest
import torch
from every_backend import OF_TRITON, on_each
from rotation import in_turn, paired

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.experts import MOST_EXPERTS
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_grouped_gemm import cases
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")
BF16 = EpilogueCase(out_dtype=torch.bfloat16)
OPERATION = dispatch.operations["int8_grouped_gemm"]


def interpreted(args, arch, implementation="cuda", seed=0, **options):
    """The result, and the kernels that computed it."""
    with fp.interpret(arch, seed=seed, guard=True, counters=True, **options) as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        got = OPERATION(*args)
    assert device.findings == []
    return got, device.kernels()


LAUNCHES = [
    *on_each(ARCHITECTURES, cases.cases(), 12, "cuda"),
    *on_each(ARCHITECTURES, cases.cases(few_kernels=True), OF_TRITON, "triton", slow=("sm_89",)),  # which is sm_80's
]


@pytest.mark.parametrize(("case", "implementation", "arch"), LAUNCHES)
def test_kernel(case, implementation, arch, seed):
    args = case.arguments(seed=seed)
    with fp.interpret(arch, seed=seed) as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        got = OPERATION(*args)
    cases.assert_matches(got, args)
    assert device.findings == []


#: (counts, N, K) of 132 multiprocessors: more tiles than blocks, of every height, with ends inside a tile and between two
LARGE = {
    (128, 256): ((700, 0, 1, 300), 4090, 130),
    (128, 128): ((140, 130, 129, 128, 1), 600, 260),
    (64, 128): ((70, 0, 64, 63, 65, 3) * 4, 1600, 130),
    (16, 128): ((1, 0, 17, 2, 16, 5, 31) * 6, 520, 130),
}


@pytest.mark.every(2)
@pytest.mark.parametrize(("tile", "room"), paired(LARGE, [False, True]))
def test_blocks_compute_tile_after_tile(tile, room, seed):
    counts, n, k = LARGE[tile]
    case = cases.Case(counts, n, k, BF16, room=max(counts) if room else None)
    args = case.arguments(seed=seed)
    got, kernels = interpreted(args, "sm_90a", seed=seed)
    assert room or all("WgmmaTileELi{}ELi{}E".format(*tile) in k.kernel for k in kernels)
    cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("room", in_turn([None, 5300]))
def test_pairs_of_blocks_have_the_same_expert(room, seed):
    """And share its weight, where experts have many rows: odd numbers of tiles, one, none, and even ones."""
    case = cases.Case((2100, 1, 0, 5300, 256, 4900), 140, 70, BF16, room=room)
    args = case.arguments(seed=seed)
    got, (kernel,) = interpreted(args, "sm_90a", seed=seed, multiprocessors=20)
    assert kernel.cluster[0] == 2 and kernel.grid[0] <= 20
    cases.assert_matches(got, args)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_blocks_compute_tile_after_tile_on_few_multiprocessors(arch, seed):
    for counts in ((5, 0, 33, 2, 60), (130, 200, 1)):
        args = cases.Case(counts, 300, 200, BF16).arguments(seed=seed)
        got, _ = interpreted(args, arch, seed=seed, multiprocessors=3)
        cases.assert_matches(got, args)


@pytest.mark.parametrize(("experts", "arch"), paired([32, 33, 384, 385, MOST_EXPERTS], ["sm_80", "sm_90a"]))
def test_as_many_experts_as_there_may_be(experts, arch, seed):
    """Of which a few have rows, as of one token; and of rows that the list of a large tile would have no room for."""
    counts = [0] * experts
    for e in (0, 1, experts // 3, experts // 2, experts - 2, experts - 1):
        counts[e] = 1 + e % 3
    args = cases.Case(tuple(counts), 16, 64, BF16).arguments(seed=seed)
    got, _ = interpreted(args, arch, seed=seed)
    cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("arch", "experts", "n", "tile"),
    [
        ("sm_80", 144, 16, (128, 128)),
        ("sm_80", 145, 16, (64, 128)),
        ("sm_90a", 384, 240, (128, 256)),
        ("sm_90a", 385, 240, (128, 128)),
    ],
)
def test_lists_that_a_large_tile_has_no_room_for(arch, experts, n, tile):
    args = cases.Case((66, 65) * (experts // 2) + (67,) * (experts % 2), n, 16, BF16).arguments()
    got, kernels = interpreted(args, arch)
    assert all("TileELi{}ELi{}E".format(*tile) in k.kernel for k in kernels)
    cases.assert_matches(got, args)


@pytest.mark.parametrize(
    ("out_dtype", "arch"), paired([torch.float32, torch.bfloat16, torch.int8], ["sm_80", "sm_90a"])
)
def test_rows_of_no_expert_are_zero(out_dtype, arch):
    """Also where a bias or an activation would make something else of a sum of 0, and in rows of any alignment."""
    for n, room in ((33, None), (48, None), (33, 9), (48, 9)):
        case = cases.Case((2, 0, 5), n, 64, EpilogueCase(out_dtype=out_dtype), room=room, beyond=200)
        args = case.arguments()
        cases.assert_matches(interpreted(args, arch)[0], args)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_an_experts_bits_do_not_depend_on_the_others(arch, seed):
    case = cases.Case((3, 70, 0, 20), 130, 300, BF16, beyond=0)
    a, b, a_scale, b_scale, _, bias, *options = case.arguments(seed=seed)
    got, _ = interpreted(
        (a, b, a_scale, b_scale, torch.tensor([3, 73, 73, 93], dtype=torch.int32), bias, *options), arch
    )
    alone, _ = interpreted(
        (a[3:73], b[1:2], a_scale[3:73].contiguous(), b_scale[1:2], torch.tensor([70], dtype=torch.int32), bias[1:2], *options),
        arch,
    )  # fmt: skip
    assert_equal(got[3:73], alone)
