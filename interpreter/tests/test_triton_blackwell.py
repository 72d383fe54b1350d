"""What Triton's compiler makes for a B200, which knows nothing of the interpreter: right against torch, with no finding, by
five seeds."""

import pytest
import torch

import gpuless

triton = pytest.importorskip("triton")
from triton.tools.mxfp import MXFP4Tensor, MXScaleTensor  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402
from triton_blackwell_kernels import (  # noqa: E402
    attention,
    persistent_product,
    product,
    product_by_descriptors,
    scaled_product,
)

pytestmark = pytest.mark.interpreted
SEEDS = range(5)
boxes = TensorDescriptor.from_tensor


def matrices(m, n, k, dtype):
    g = torch.Generator().manual_seed(m + n + k)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in ((m, k), (n, k)))


def check(launch, expected, tolerance):
    """launch(): the compiled kernel and its result."""
    for seed in SEEDS:
        with gpuless.gpu("sm_100a", seed=seed) as device:
            compiled, got = launch()
        assert device.findings == []
        assert "tcgen05.mma" in compiled.asm["ptx"]
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("size", "tile", "dtype", "warps"), [
    ((256, 256, 256), (128, 128, 64), torch.float16, 4), ((200, 136, 72), (64, 128, 64), torch.bfloat16, 4),
    ((200, 136, 72), (128, 64, 32), torch.float32, 8), ((200, 136, 144), (128, 256, 64), torch.float8_e4m3fn, 8),
])  # fmt: skip
def test_product(size, tile, dtype, warps):
    m, n, k = size
    a, b = matrices(m, n, k, dtype)
    b = b.T.contiguous()

    def launch():
        c = torch.zeros(m, n)
        grid = (triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1]))
        return product[grid](a, b, c, m, n, k, *tile, num_warps=warps, num_stages=3), c

    check(launch, a.double() @ b.double(), 2e-3 if dtype == torch.float32 else 1e-6)  # tf32


@pytest.mark.parametrize(
    ("size", "dtype", "warps"), [((256, 256, 256), torch.float16, 4), ((200, 144, 272), torch.float8_e4m3fn, 8)]
)
def test_descriptors(size, dtype, warps):
    m, n, k = size
    a, b = matrices(m, n, k, dtype)
    bk = 64 if dtype == torch.float16 else 128

    def launch():
        c = torch.zeros(m, n, dtype=torch.float16)
        grid = (triton.cdiv(m, 128), triton.cdiv(n, 128))
        descriptors = boxes(a, [128, bk]), boxes(b, [128, bk]), boxes(c, [128, 128])
        return product_by_descriptors[grid](*descriptors, k, 128, 128, bk, False, num_warps=warps, num_stages=3), c

    check(launch, a.double() @ b.double().T, 1e-3)


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("size", "warps"), [((512, 256, 256), 4), ((200, 136, 72), 8)])
def test_persistent_programs(size, warps, halves, specialised):
    m, n, k = size
    a, b = matrices(m, n, k, torch.float16)

    def launch():
        c = torch.zeros(m, n, dtype=torch.float16)
        descriptors = boxes(a, [128, 64]), boxes(b, [128, 64]), boxes(c, [128, 64 if halves else 128])
        return persistent_product[(2,)](
            *descriptors, m, n, k, 2, 128, 128, 64, specialised, halves, num_warps=warps, num_stages=3
        ), c

    check(launch, a.double() @ b.double().T, 1e-3)


def test_a_loop_that_ends_its_mbarriers_too_early():
    """Triton to 3.8 has mbarrier.inval of a loop's mbarriers run while commits on them are under way, where the loop is
    warp-specialised and not persistent. Hardware goes on; the ISA has no use of an mbarrier after its end. In Triton 3.9's code
    the interpreter finds nothing."""
    a, b = matrices(256, 256, 256, torch.float16)

    def launch():
        c = torch.zeros(256, 256, dtype=torch.float16)
        descriptors = boxes(a, [128, 64]), boxes(b, [128, 64]), boxes(c, [128, 128])
        return product_by_descriptors[(2, 2)](*descriptors, 256, 128, 128, 64, True, num_warps=4, num_stages=3), c

    if triton.__version__.rpartition(".")[0] not in ("3.6", "3.7", "3.8"):
        check(launch, a.double() @ b.double().T, 1e-3)
        return
    faults = []
    for seed in SEEDS:
        try:
            with gpuless.gpu("sm_100a", seed=seed):
                launch()
        except gpuless.Finding as f:
            faults.append(f)
    assert {f.kind for f in faults} == {"mbarrier"}
    assert all("there is no mbarrier here" in f.message and "tcgen05.commit" in f.instruction for f in faults)


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "length", "dim", "bm", "bn", "warps"), [(2, 256, 64, 64, 64, 4), (1, 256, 128, 128, 128, 8)]
)
def test_attention(heads, length, dim, bm, bn, warps, causal, specialised):
    g = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(heads * length, dim, generator=g).half() for _ in range(3))
    each = (x.double().view(heads, length, dim) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*each, is_causal=causal).view(-1, dim)

    def launch():
        o = torch.zeros_like(q)
        descriptors = boxes(q, [bm, dim]), boxes(k, [bn, dim]), boxes(v, [bn, dim]), boxes(o, [bm, dim])
        scale = dim**-0.5 * 1.4426950408889634
        grid = (length // bm, heads)
        return attention[grid](
            *descriptors, scale, length, dim, bm, bn, causal, specialised, num_warps=warps, num_stages=3
        ), o

    check(launch, expected, 2e-3)


def rows_of(scales):
    return scales.permute(0, 3, 2, 1, 4).reshape(scales.shape[0] * 128, -1)


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4", "nvfp4", "mixed"])
@pytest.mark.parametrize(("size", "bn", "warps"), [((128, 128, 512), 128, 4), ((256, 256, 512), 256, 4)])
def test_scaled_product(kind, size, bn, warps):
    m, n, k = size
    torch.manual_seed(k)
    block = 16 if kind == "nvfp4" else 32
    a, b = MXFP4Tensor(size=(m, k)).random(), MXFP4Tensor(size=(n, k)).random()
    exact = [x.to(torch.float32) for x in (a, b)]
    types = {"mxfp8": ("e4m3", "e4m3"), "mixed": ("e4m3", "e2m1")}.get(kind, ("e2m1", "e2m1"))
    packed = [
        x.to_packed_tensor(dim=1) if t == "e2m1" else y.to(torch.float8_e4m3fn) for x, y, t in zip((a, b), exact, types)
    ]
    per_byte = [2 if t == "e2m1" else 1 for t in types]
    scales = [torch.rand((rows // 128, k // block // 4, 32, 4, 4)) * 4 + 1e-3 for rows in (m, n)]
    if kind == "nvfp4":
        scales = [x.to(torch.float8_e4m3fn) for x in scales]
        numbers = [x.float() for x in scales]
    else:
        scales = [MXScaleTensor(x) for x in scales]
        numbers, scales = [x.to(torch.float32) for x in scales], [x.data for x in scales]
    x, y = ((e * rows_of(s).repeat_interleave(block, 1)).double() for e, s in zip(exact, numbers))
    bk = 128 if kind in ("mxfp8", "mixed") else 256

    def launch():
        c = torch.zeros(m, n, dtype=torch.float16)
        return scaled_product[(m // 128, n // bn)](
            boxes(packed[0], [128, bk // per_byte[0]]), scales[0], boxes(packed[1], [bn, bk // per_byte[1]]), scales[1],
            boxes(c, [128, bn]), k, *per_byte, block, *types, 128, bn, bk, num_warps=warps,
        ), c  # fmt: skip

    check(launch, x @ y.T, 1e-3)
