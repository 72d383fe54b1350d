"""w8a16_grouped_gemm's kernel, as compiled: every case on each architecture, experts of any number of rows, what it reads."""

import dataclasses

import pytest
import torch
from every_backend import on_each

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.int8_grouped_gemm.cases import mixed
from forwardpass.ops.w8a16_grouped_gemm import cases
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")
F16, BF16 = torch.float16, torch.bfloat16
OPERATION = dispatch.operations["w8a16_grouped_gemm"]
CASES = [
    dataclasses.replace(c, groups=False) for c in cases.cases() if c.x_dtype != torch.float32
]  # Triton's has groups


def interpreted(args, arch, seed=0, operation=OPERATION, **options):
    """The result, and the kernels that computed it."""
    with fp.interpret(arch, seed=seed, guard=True, counters=True, **options) as device, fp.use_backend("cuda"):
        got = operation(*args)
    assert device.findings == []
    return got, device.kernels()


@pytest.mark.parametrize(("case", "arch"), on_each(ARCHITECTURES, CASES, 12))
def test_kernel(case, arch, seed):
    args = case.arguments(seed=seed)
    with fp.interpret(arch, seed=seed) as device, fp.use_backend("cuda"):
        got = OPERATION(*args)
    cases.assert_matches(got, args)
    assert device.findings == []


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("case", "arch"),
    on_each(
        ["sm_80", "sm_89", "sm_90a"],
        [
            cases.Case(mixed(1), 130, 70, BF16),
            cases.Case(mixed(8), 33, 130, F16, E4M3),
            cases.Case(mixed(60), 144, 130, BF16, activation="silu_mul", layout="apart"),
            cases.Case(mixed(256), 130, 33, F16, bias=False),
            cases.Case((0, 3, 65, 0, 64, 1, 0, 3), 272, 300, BF16, E4M3, room=65),
            cases.Case((0, 1, 0, 0, 1, 0, 0, 0) * 32, 33, 515, BF16, activation="gelu", room=1),
        ],
        3,
    ),
)
def test_experts_of_any_number_of_rows(case, arch, seed):
    for s in range(seed, seed + 3):
        args = case.arguments(seed=s)
        got, kernels = interpreted(args, arch, s)
        assert any("Grouped" in k.kernel for k in kernels)
        cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_blocks_compute_tile_after_tile(arch, seed):
    for room in (None, 34):
        args = cases.Case((5, 0, 33, 2, 16), 600, 700, BF16, room=room).arguments(seed=seed)
        got, _ = interpreted(args, arch, seed, multiprocessors=3)
        cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize(("experts", "tile"), [(480, 64), (481, 16), (512, 16)])
def test_as_many_experts_as_there_may_be(experts, tile, seed):
    """More than the list of the larger tile has room for take the smaller."""
    args = cases.Case((18, 17, 20, 13) * (experts // 4) + (1,) * (experts % 4), 16, 16).arguments(seed=seed)
    got, kernels = interpreted(args, "sm_80", seed)
    assert any(f"MmaTileELi{tile}E" in k.kernel for k in kernels)
    cases.assert_matches(got, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("x_dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.int8, E4M3], ids=str)
def test_bits_are_those_of_w8a16_gemm(x_dtype, w_dtype, seed):
    """On mma.sync, where that does not split K: of more rows than the GEMV takes, and of one block of 128 of K."""
    dense = dispatch.operations["w8a16_gemm"]
    for counts, k in (((5, 0, 16, 17, 130, 1000), 300), ((1, 4, 0, 2), 128)):
        case = cases.Case(counts, 130, k, x_dtype, w_dtype)
        x, w, weight_scale, _, bias, _ = args = case.arguments(seed=seed)
        got, _ = interpreted(args, "sm_80", seed)
        begin = 0
        for e, count in enumerate(counts):
            rows = slice(begin, begin := begin + count)
            of_e = x[rows], w[e].contiguous(), weight_scale[e], bias[e], None
            assert_equal(got[rows], interpreted(of_e, "sm_80", seed, dense)[0], f"expert {e}")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_what_no_expert_has_is_not_used(arch, seed):
    """Weights of experts without rows, rows beyond the last expert's, and those that a tile reads of the next one."""
    for room in (None, 20):
        case = cases.Case((0, 2, 0, 18, 0), 33, 70, F16, E4M3, room=room, beyond=30)
        x, w, weight_scale, offs, bias, activation = args = case.arguments(seed=seed)
        expected, _ = interpreted(args, arch, seed)
        w, x = w.clone(), x.clone()
        for e in (0, 2, 4):
            w[e].view(torch.uint8).fill_(0x7F)
        if room is None:
            x[20:] = float("nan")
        else:
            x[torch.arange(room) >= torch.tensor(case.counts)[:, None]] = float("nan")
        assert_equal(interpreted((x, w, weight_scale, offs, bias, activation), arch, seed)[0], expected)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_chosen_experts_weights_are_read_once(arch):
    """One token's eight of 64 experts: their bytes and hardly any other, and those of the weight from L2 once as well."""
    counts = tuple(int(e % 8 == 5) for e in range(64))
    case = cases.Case(counts, 256, 512, BF16, bias=False, layout="contiguous", beyond=0)
    x, *others = case.arguments()
    _, (kernel,) = interpreted((x.contiguous(), *others), arch)
    weight = 8 * case.n * case.k
    assert weight < kernel.footprint_read <= 1.05 * weight + x.numel() * x.itemsize
    copied = sum(i.get("sectors", 0) * 32 for i in kernel.instructions if i["opcode"].startswith("cp.async"))
    tiles, rows = 8 * case.n // 128, 16
    assert weight < copied <= weight + tiles * rows * case.k * x.itemsize


def test_float32_rows_are_refused():
    case = dataclasses.replace(CASES[0], x_dtype=torch.float32)
    with fp.interpret("sm_80"), fp.use_backend("cuda"), pytest.raises(fp.Unsupported, match="float32"):
        OPERATION(*case.arguments())
