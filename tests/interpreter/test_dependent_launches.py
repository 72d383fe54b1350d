"""Launches that may begin while the kernel before them ends, from sm_90 on. What such a kernel touches before it has waited is
found in every interpreted test; here, which launches are of this kind."""

import pytest
import torch

import forwardpass as fp

pytestmark = pytest.mark.interpreted


def programmatic(device):
    """{first word of a kernel's readable name: launches that may begin early, of how many}"""
    kernels = device.timeline().kernels
    names = ("quantize", "gemm_wgmma", "gemm_mma", "gemv", "dequant_activation", "attention")
    return {next(n for n in names if n in k.kernel): (k.programmatic, k.launches) for k in kernels}


@pytest.mark.parametrize(
    ("arch", "rows", "launches"),
    [
        ("sm_80", 70, {"quantize": (0, 1), "gemm_mma": (0, 1), "dequant_activation": (0, 1)}),
        ("sm_90a", 1, {"quantize": (0, 1), "gemv": (1, 1)}),
        ("sm_90a", 16, {"quantize": (0, 1), "gemm_wgmma": (1, 1), "dequant_activation": (1, 1)}),
        ("sm_90a", 300, {"quantize": (0, 1), "gemm_wgmma": (1, 1), "dequant_activation": (1, 1)}),
        ("sm_120", 70, {"quantize": (0, 1), "gemm_mma": (1, 1), "dequant_activation": (1, 1)}),
    ],
)
def test_linear(arch, rows, launches):
    x, w = torch.randn(rows, 1024), torch.randn(256, 1024)
    q, scale, _ = fp.ops.quantize(w, torch.int8)
    exact = fp.ops.int8_linear(x, q, scale)
    with fp.interpret(arch, timeline=True) as device, fp.use_backend("cuda"):
        if reason := device.why_not("cuda"):
            pytest.skip(str(reason))
        results = [fp.ops.int8_linear(x, q, scale) for _ in range(2)]
    assert device.findings == [] and all(torch.equal(r, exact) for r in results)
    assert programmatic(device) == {name: (2 * n, 2 * of) for name, (n, of) in launches.items()}


def test_attention():
    q, k, v = (torch.randn(1, 1, 64, 64, dtype=torch.float16) for _ in range(3))
    with fp.interpret("sm_90a", timeline=True) as device, fp.use_backend("cuda"):
        if reason := device.why_not("cuda"):
            pytest.skip(str(reason))
        fp.ops.attention(q, k, v)
    assert programmatic(device) == {"attention": (1, 1)}
