"""The two epilogues of the GEMMs with fragments of accumulators: the direct one (fragment.cuh), which makes outputs of
16 bits and those quantised in groups, and the general one, which makes the rest. They have the same bits, whatever the edge."""

import itertools

import pytest
import torch
from rotation import paired

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.dequant_activation.cases import residual as residual_of
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

CASES = {"int8_gemm": int8_gemm.Case, "fp8_gemm": fp8_gemm.Case}
LAUNCHES = (("int8_gemm", "sm_80"), ("int8_gemm", "sm_90a"), ("fp8_gemm", "sm_89"), ("fp8_gemm", "sm_90a"))
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "silu_mul", "gelu_mul", "gelu_tanh_mul")
#: rows, columns: whole tiles of each kernel, and the same less a few, which is not a multiple of 8 unless it has to be
WHOLE, RAGGED, RAGGED_GATED = (256, 512), (251, 499), (251, 496)
EPILOGUE = ("fragment.cuh", "staged.cuh", "terms.cuh", "vector8.cuh", "activation.cuh", "vec.cuh", "cuda_bf16.hpp")
#: PTX instructions of a warp for 16 x 256 accumulators: 1163, 1080 (chunks of 32 columns), 1064 and 966; the general epilogue has
#: 2100 to 3101
#: In PTX. On sm_80 some 300 are moves between the arms of the switch of activations, of which machine code has none.
MOST = {"sm_80": 1180, "sm_89": 1150, "sm_90a": 1150}
BF16 = torch.bfloat16


def run(operation, args, arch, seed=0, **options):
    with fp.interpret(arch, seed=seed, approximate=False, **options) as device, fp.use_backend("cuda"):
        got = operation(*args)
    assert device.findings == []
    return got, device


def rows_and_columns(args, m, n):
    """The arguments of the first m rows and n columns."""
    a, b, a_scale, b_scale, bias, *options = args
    b_scale, bias = (None if x is None else x[: n if x.numel() > 1 else 1] for x in (b_scale, bias))
    return a[:m], b[:n], a_scale[: m if a_scale.numel() > 1 else 1], b_scale, bias, *options


@pytest.mark.every(2)
@pytest.mark.parametrize(("activation", "launch"), paired(ACTIVATIONS, LAUNCHES))
def test_direct_and_general_outputs_are_equal(launch, activation, seed):
    """Of 16 bits, and of fp32 rounded to them: whole tiles and ragged ones, each kind of scale and of bias; and with a residual."""
    name, arch = launch
    operation = dispatch.operations[name]
    ragged = RAGGED if activation is None or not activation.endswith("_mul") else RAGGED_GATED
    kinds = itertools.cycle(
        itertools.product((torch.float32, torch.float16, BF16, None), ("row", "tensor"), ("column", "tensor"))
    )
    layouts = itertools.cycle(("contiguous", "aligned", "apart"))
    for (m, n), dtype in itertools.product((WHOLE, ragged), (BF16, torch.float16)):
        bias, a_scale, b_scale = next(kinds)
        case = EpilogueCase(a_scale, b_scale, bias, activation, torch.float32)
        args = rows_and_columns(CASES[name](*WHOLE, 128, case).arguments(seed=seed), m, n)
        general, _ = run(operation, args, arch, seed)
        direct, _ = run(operation, (*args[:6], dtype, *args[7:]), arch, seed)
        assert_equal(direct, general.to(dtype))
        residual = residual_of(general.shape, dtype, next(layouts), seed=seed)
        general, _ = run(operation, (*args[:-1], residual.float()), arch, seed)
        direct, _ = run(operation, (*args[:6], dtype, *args[7:-1], residual), arch, seed)
        assert_equal(direct, general.to(dtype))


@pytest.mark.parametrize("bias", [None, torch.float32])
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_direct_and_general_outputs_of_block_scales_are_equal(arch, bias, seed):
    """Without a bias the accumulators are the outputs, and are not multiplied by anything."""
    operation = dispatch.operations["fp8_gemm"]
    for m, n in (WHOLE, RAGGED):
        args = fp8_gemm.Case(m, n, 300, EpilogueCase(bias=bias), blocks=True).arguments(seed=seed)
        general, _ = run(operation, args, arch, seed)
        for dtype in (BF16, torch.float16):
            direct, _ = run(operation, (*args[:6], dtype, *args[7:]), arch, seed)
            assert_equal(direct, general.to(dtype))


@pytest.mark.parametrize(("name", "arch"), LAUNCHES)
def test_a_ragged_edge_changes_no_bits(name, arch, seed):
    args = CASES[name](*WHOLE, 128, EpilogueCase(activation="gelu", out_dtype=BF16)).arguments(seed=seed)
    whole, _ = run(dispatch.operations[name], args, arch, seed)
    ragged, _ = run(dispatch.operations[name], rows_and_columns(args, *RAGGED), arch, seed)
    assert_equal(ragged, whole[: RAGGED[0], : RAGGED[1]].contiguous())


@pytest.mark.every(2)
@pytest.mark.parametrize("activation", [None, "silu_mul"])
def test_quantised_groups_with_a_ragged_edge_have_the_bits_of_whole_ones(activation, seed):
    """Of the groups that the edge leaves whole; tiles of 128 x 128, and of 128 x 256 where two warpgroups share a group."""
    gated = activation is not None
    m, n = (129, 133 * 256) if gated else WHOLE
    case = fp8_gemm.Case(m, n, 128, EpilogueCase(activation=activation), quantized=True)
    args = case.arguments(seed=seed)
    operation = dispatch.operations["fp8_gemm_quantize"]
    whole, _ = run(operation, args, "sm_90a", seed)
    ragged, _ = run(operation, rows_and_columns(args, m - 5, n - 16), "sm_90a", seed)
    groups = (n // (2 if gated else 1) - 16) // 128
    for w, r, columns in zip(whole, ragged, (groups * 128, groups)):
        assert_equal(r[:, :columns].contiguous(), w[: m - 5, :columns].contiguous())
    assert ragged[0].dtype == E4M3


def test_columns_outside_the_output_make_no_scale_larger():
    """The last column's bias is large, and its outputs are not; products with the columns behind it are 0."""
    m, n, one = 128, 300, torch.ones(1)
    a, b, bias = torch.ones(m, 128).to(E4M3), torch.zeros(n, 128), torch.ones(n)
    b[-1], bias[-1] = -1, 128
    operation = dispatch.operations["fp8_gemm_quantize"]
    (_, scale), _ = run(operation, (a, b.to(E4M3), one, one, bias, None, 128), "sm_90a")
    assert_equal(scale, torch.full_like(scale, 1 / 448))


#: of outputs, of which a product by their inverse is no quotient
UNUSUAL = (0.0, 1e-45, 2.0**-97, 2.0**97, float("inf"), float("nan"), -1.0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_int8_outputs_are_quotients_to_the_bit(arch, seed):
    """Of each scale of columns, halves between two steps among them; where one is unusual, its warp divides."""
    operation, (m, n) = dispatch.operations["int8_gemm"], (251, 300)
    case = EpilogueCase("tensor", "tensor", None, None, torch.float32)
    args = int8_gemm.Case(m, n, 32, case).arguments(seed=seed)
    one = torch.ones(1)
    args = (*args[:2], one, one, *args[4:])
    y, _ = run(operation, args, arch, seed)
    scales = 2.0 * (500 + torch.arange(n) % 97)
    assert (((y / scales).abs() % 1) == 0.5).any()
    odd = scales.clone()
    odd[5 :: n // len(UNUSUAL)] = torch.tensor([*UNUSUAL, 1.0])[: len(odd[5 :: n // len(UNUSUAL)])]
    for out_scale in (scales, scales / 3, odd, scales[:1], *(torch.tensor([s]) for s in UNUSUAL[2:4])):
        q, _ = run(operation, (*args[:6], torch.int8, out_scale, *args[8:]), arch, seed)
        expected = torch.nan_to_num(y / out_scale, nan=-127.0, posinf=127.0, neginf=-127.0).clamp(-127, 127).round()
        assert_equal(q.contiguous(), expected.to(torch.int8))


def epilogue_lines(name, arch, dtype, activation=None):
    """Of an epilogue with scales of rows and columns and no bias."""
    case = EpilogueCase(bias=None, activation=activation, out_dtype=dtype)
    args = CASES[name](*WHOLE, 128, case).arguments()
    _, device = run(dispatch.operations[name], args, arch, counters=True, checks=False)
    return [p.counts for p in device.profile(inlined=True) if p.file.rpartition("/")[2] in EPILOGUE]


@pytest.mark.parametrize(("name", "arch"), LAUNCHES)
def test_common_outputs_take_the_direct_epilogue(name, arch):
    direct, general = (
        sum(counts.issued for counts in epilogue_lines(name, arch, dtype)) / (WHOLE[0] * WHOLE[1] / (16 * 256))
        for dtype in (BF16, torch.float32)
    )
    assert direct < MOST[arch] < general


@pytest.mark.parametrize(("launch", "activation"), paired(LAUNCHES, [None, "silu_mul"]))
def test_the_direct_epilogue_has_no_bank_conflicts(launch, activation):
    """Outputs of 16 bits in rows of 128, 64 and 32 bytes."""
    name, arch = launch
    counts = epilogue_lines(name, arch, BF16, activation)
    assert sum(c.wavefronts for c in counts) == sum(c.ideal_wavefronts for c in counts) > 0
