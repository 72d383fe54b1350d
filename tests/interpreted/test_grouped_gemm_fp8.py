"""fp8_grouped_gemm's kernels, as compiled: every case on each architecture whose tensor cores multiply e4m3, and what of experts
test_grouped_gemm.py cannot see: scales of blocks whose rows begin anywhere, sums that are promoted."""

import itertools

import pytest
import torch
from every_backend import OF_TRITON, cuda_and_triton, on_each
from rotation import paired

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_grouped_gemm import cases
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

ARCHITECTURES = ("sm_89", "sm_90a", "sm_120")
BF16 = EpilogueCase(out_dtype=torch.bfloat16)
OPERATION = dispatch.operations["fp8_grouped_gemm"]


def interpreted(args, arch, implementation="cuda", seed=0, truncating=True, **options):
    """The result, and the kernels that computed it."""
    with (
        fp.interpret(arch, seed=seed, guard=True, counters=True, truncating=truncating, **options) as device,
        fp.use_backend(implementation),
    ):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        got = OPERATION(*args)
    assert device.findings == []
    return got, device.kernels()


LAUNCHES = [
    *on_each(ARCHITECTURES, cases.cases(), 12, "cuda"),
    *on_each(ARCHITECTURES, cases.cases(few_kernels=True), OF_TRITON, "triton"),
]


@pytest.mark.parametrize(("case", "implementation", "arch"), LAUNCHES)
def test_kernel(case, implementation, arch, seed):
    args = case.arguments(seed=seed)
    got, _ = interpreted(args, arch, implementation, seed)
    cases.assert_matches(got, args, truncating=True)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("implementation", "case", "arch"),
    cuda_and_triton(on_each(ARCHITECTURES[:2], cases.PROMOTION_CASES, 2), ARCHITECTURES, at=1),
)
def test_sums_are_promoted(case, implementation, arch, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(interpreted(args, arch, implementation, seed)[0], args, truncating=True)


@pytest.mark.every(2)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES[:2])
def test_bits_are_those_of_fp8_gemm(arch, blocks, seed):
    """In a tile of the same height, in which sums have the same order."""
    case = cases.Case((70, 0, 100, 66), 272, 300, BF16, blocks=blocks, beyond=5)
    args = case.arguments(seed=seed)
    got, _ = interpreted(args, arch, seed=seed)
    for where, (*operands, bias, activation, out_dtype, out_scale) in cases.expert_arguments(args):
        with fp.interpret(arch, truncating=True), fp.use_backend("cuda"):
            alone = fp.ops.fp8_gemm(
                *operands, bias=bias, activation=activation, out_dtype=out_dtype, out_scale=out_scale
            )
        assert_equal(got[where], alone)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("implementation", "kind", "arch"),
    cuda_and_triton(paired(["fp8", "fp8_block"], ARCHITECTURES[:2]), ARCHITECTURES, at=1),
)
@torch.inference_mode()
def test_a_module_of_experts(implementation, arch, kind, seed):
    """Its operations take what those before them give: rows in the order of experts, scales of groups, a gated product."""
    experts = fp.nn.Experts(5, 400, 264, kind=kind, activation="silu_mul")
    g = torch.Generator().manual_seed(seed)
    for name in ("up", "down"):
        weight, scale = getattr(experts, f"{name}_weight"), getattr(experts, f"{name}_scale")
        weight.copy_((torch.randn(weight.shape, generator=g) * 100).clamp(-448, 448))
        scale.copy_((torch.rand(scale.shape, generator=g) + 0.5) / 2000)
    x = torch.randn(30, 400, generator=g).bfloat16()
    index = torch.rand(30, 6, generator=g).argsort(-1)[:, :3]  # 5 is no expert
    weights = torch.rand(30, 3, generator=g)
    expected = experts.exact(x, index, weights)
    with fp.interpret(arch, seed=seed, guard=True, truncating=True) as device, fp.use_backend(implementation):
        if reason := fp.dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        got = experts(x, index, weights)
    assert device.findings == []
    # where a sum is rounded to the other of two, one of e4m3's few values differs between the products
    assert (got.double() - expected).norm() < 0.02 * expected.norm()


#: (counts, N, K) of 132 multiprocessors: more tiles than blocks, of every height, with ends inside a tile and between two
LARGE = {
    (128, 256): ((700, 0, 1, 300), 4090, 130),
    (128, 128): ((140, 130, 129, 128, 1), 600, 260),
    (64, 128): ((70, 0, 64, 63, 65, 3) * 4, 1600, 130),
    (16, 128): ((1, 0, 17, 2, 16, 5, 31) * 6, 520, 130),
}


@pytest.mark.every(2)
@pytest.mark.parametrize(("tile", "having"), paired(LARGE, itertools.product([False, True], repeat=2)))
def test_blocks_compute_tile_after_tile(tile, having, seed):
    room, blocks = having
    counts, n, k = LARGE[tile]
    args = cases.Case(counts, n, k, BF16, blocks=blocks, room=max(counts) if room else None).arguments(seed=seed)
    got, kernels = interpreted(args, "sm_90a", seed=seed, truncating=False)
    assert room or all("WgmmaTileELi{}ELi{}E".format(*tile) in k.kernel for k in kernels)
    cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ARCHITECTURES[:2])
@pytest.mark.parametrize("blocks", [False, True])
def test_blocks_compute_tile_after_tile_on_few_multiprocessors(blocks, arch, seed):
    """In rows of every remainder by 4, at which scales of groups may not be copied by 16 bytes."""
    for counts in ((5, 0, 33, 2, 60), (130, 201, 1, 64)):
        args = cases.Case(counts, 300, 200, BF16, blocks=blocks).arguments(seed=seed)
        got, _ = interpreted(args, arch, seed=seed, multiprocessors=3)
        cases.assert_matches(got, args, truncating=True)


@pytest.mark.every(2)
@pytest.mark.parametrize(("room", "blocks"), paired([None, 5300], [False, True]))
def test_pairs_of_blocks_have_the_same_expert(room, blocks, seed):
    """And share its weight, where experts have many rows: odd numbers of tiles, one, none, and even ones."""
    args = cases.Case((2100, 1, 0, 5300, 256, 4900), 140, 70, BF16, blocks=blocks, room=room).arguments(seed=seed)
    got, (kernel,) = interpreted(args, "sm_90a", seed=seed, truncating=False, multiprocessors=20)
    assert kernel.cluster[0] == 2 and kernel.grid[0] <= 20
    cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize(("arch", "experts"), [("sm_89", 144), ("sm_89", 145), ("sm_90a", 384), ("sm_90a", 512)])
def test_as_many_experts_as_there_may_be(arch, experts, seed):
    """Of which a few have rows; on sm_89 large tiles have no room for the list of more than 144."""
    for rows in (1, 70):
        counts = [0] * experts
        for e in (0, 1, experts // 3, experts - 2, experts - 1):
            counts[e] = rows * (1 + e % 3)
        args = cases.Case(tuple(counts), 16, 64, BF16, blocks=True).arguments(seed=seed)
        got, _ = interpreted(args, arch, seed=seed)
        cases.assert_matches(got, args, truncating=True)
