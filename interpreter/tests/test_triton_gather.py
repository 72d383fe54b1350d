"""Triton's descriptors that gather and scatter rows, as its compiler makes TMA of them: right against torch, no finding."""

import pytest
import torch

import gpuless

triton = pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402
from triton_gather_kernels import product_of_rows, rows_of, to_rows  # noqa: E402

pytestmark = pytest.mark.interpreted
boxes = TensorDescriptor.from_tensor
SEEDS = range(4)


@pytest.fixture(autouse=True)
def allocator():
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "width"), [(64, 64), (120, 32), (256, 128)])
def test_gather(dtype, columns, width):
    g = torch.Generator().manual_seed(columns)
    x, index = torch.randn(40, columns, generator=g).to(dtype), torch.randint(0, 40, (64,), generator=g).to(torch.int32)
    index[3], index[17], index[40] = 40, -1, 2**31 - 1  # outside of the tensor: zeros
    expected = torch.where(((index >= 0) & (index < 40))[:, None], x[index.long().clamp(0, 39)], 0)
    for seed in SEEDS:
        out = torch.zeros(64, columns, dtype=dtype)
        with gpuless.gpu("sm_100a", seed=seed) as device:
            made = rows_of[(2, triton.cdiv(columns, width))](x, index, out, 40, columns, 32, width, num_warps=4)
        assert device.findings == [] and "tile::gather4" in made.asm["ptx"]
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("columns", "width"), [(64, 64), (120, 32)])
def test_scatter(columns, width):
    g = torch.Generator().manual_seed(columns)
    x, index = torch.randn(64, columns, generator=g).half(), torch.randperm(80, generator=g)[:64].to(torch.int32)
    index[index >= 70] += 2**20  # not stored
    expected = torch.full((70, columns), 7.0).half()
    inside = index < 70
    expected[index[inside].long()] = x[inside] * 2
    for seed in SEEDS:
        out = torch.full((70, columns), 7.0).half()
        with gpuless.gpu("sm_100a", seed=seed) as device:
            made = to_rows[(2, triton.cdiv(columns, width))](x, index, out, 70, columns, 32, width, num_warps=4)
        assert device.findings == [] and "tile::scatter4" in made.asm["ptx"]
        assert torch.equal(out, expected)


def test_product_of_gathered_rows():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 256, generator=g).half(), torch.randn(128, 256, generator=g).half()
    index = torch.randint(0, 300, (128,), generator=g).to(torch.int32)
    expected = a[index.long()].double() @ b.double().T
    for seed in SEEDS:
        c = torch.zeros(128, 128)
        with gpuless.gpu("sm_100a", seed=seed) as device:
            made = product_of_rows[(1, 1)](boxes(a, [1, 64]), index, boxes(b, [128, 64]), c, 128, 256, 128, 128, 64)
        assert device.findings == [] and "tile::gather4" in made.asm["ptx"] and "tcgen05.mma" in made.asm["ptx"]
        assert (c.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
