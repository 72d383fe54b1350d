"""mxfp4 in Triton, made by conversions or by integers and multiplied by tl.dot_scaled, on tensor cores that have it and
where Triton takes it apart: right against torch, without a finding."""

import itertools

import pytest
import torch

import gpuless

triton = pytest.importorskip("triton")
from triton_microscaling_kernels import downcast, product  # noqa: E402

pytestmark = pytest.mark.interpreted
NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
BLACKWELL = ("sm_100a", "sm_120")


def unpacked(codes):
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()
    return NUMBERS[pairs & 7] * (1 - (pairs >> 3) * 2)


def scaled(codes, scales):
    return unpacked(codes).double() * torch.exp2(scales.double() - 127).repeat_interleave(32, 1)


def cast(x, packed):
    rows, length = x.shape
    codes, scales = (
        torch.zeros(rows, length // 2, dtype=torch.uint8),
        torch.zeros(rows, length // 32, dtype=torch.uint8),
    )
    downcast[(rows // 16,)](x, codes, scales, packed, 16, length // 32)
    return codes, scales


def expected_cast(x):
    """The nearest number, of two as near the one with the even code, by distances."""
    blocks = x.double().unflatten(1, (-1, 32))
    exponents = torch.ceil(torch.log2(blocks.abs().amax(2) / 6))
    y = blocks / torch.exp2(exponents)[..., None]
    distance = (y.abs()[..., None] - NUMBERS).abs() + torch.tensor([0, 1e-9] * 4)
    codes = (distance.argmin(-1) | torch.signbit(y) * 8).flatten(1)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


@pytest.mark.parametrize(
    ("arch", "packed"), [*((arch, True) for arch in BLACKWELL), ("sm_90a", False), ("sm_80", False)]
)
def test_downcast(arch, packed):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 256, generator=g) * torch.exp2(torch.randint(-30, 30, (32, 1), generator=g))
    x[:, ::32] = 6.0  # a scale of one, so that the ties below are ties
    x[4:, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0])
    x[:4] *= 1e-3
    with gpuless.gpu(arch) as device:
        codes, scales = cast(x, packed)
    assert device.findings == []
    assert torch.equal(scales, expected_cast(x)[1])
    assert torch.equal(codes, expected_cast(x)[0])


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("sm_80", "e2m1"), ("sm_80", "bf16"), *itertools.product(("sm_90a", *BLACKWELL), ("e2m1", "e4m3", "bf16"))],
)
def test_product(arch, kind):
    m, n, k = 128, 128, 256
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g)
    (a, a_scales), (b, b_scales) = expected_cast(x), expected_cast(y)
    a_exact = scaled(a, a_scales)
    if kind != "e2m1":
        a = x.to(torch.float8_e4m3fn if kind == "e4m3" else torch.bfloat16)
        factor = torch.exp2(a_scales.double() - 127).repeat_interleave(32, 1) if kind == "e4m3" else 1
        a_exact = a.double() * factor
    exact = a_exact @ scaled(b, b_scales).T
    for seed in range(3):
        c = torch.zeros(m, n)
        with gpuless.gpu(arch, seed=seed) as device:
            tile = (128, 128, 128) if arch != "sm_80" else (64, 64, 64)
            grid = (m // tile[0], n // tile[1])
            product[grid](a, a_scales, b, b_scales, c, n, k, 2 if kind == "e2m1" else 1, kind, *tile, num_warps=4)
        assert device.findings == []
        assert (c.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("arch", "kind", "name", "rate"),
    [("sm_100a", "bf16", "tcgen05.mma f16", 4096), ("sm_100a", "e4m3", "tcgen05.mma e4m3", 8192),
     ("sm_100a", "e2m1", "tcgen05.mma e2m1", 16384), ("sm_120", "e2m1", "mma e2m1", 2048)],
)  # fmt: skip
def test_modelled_time(arch, kind, name, rate):
    """Products of every kind are counted, so that the model has the time of tensor cores: of 128 x 128 x 256."""
    a = torch.zeros(128, 256 if kind != "e2m1" else 128, dtype=torch.uint8)
    a = a.view(torch.float8_e4m3fn) if kind == "e4m3" else a.to(torch.bfloat16) if kind == "bf16" else a
    b, scales, c = (
        torch.zeros(128, 128, dtype=torch.uint8),
        torch.full((128, 8), 127).to(torch.uint8),
        torch.zeros(128, 128),
    )
    with gpuless.gpu(arch, counters=True) as device:
        product[(1, 1)](a, scales, b, scales, c, 128, 256, 2 if kind == "e2m1" else 1, kind, 128, 128, 128, num_warps=4)
    assert device.kernels()[0].counts.macs == {name: 128 * 128 * 256}
    clock = {"sm_100a": 1856e6, "sm_120": 2617e6}[arch]
    assert device.model()[0].terms["tensor cores"] == pytest.approx(128 * 128 * 256 / rate / clock)
