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


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("arch", "rows", "depth", "launches"),
    [
        ("sm_80", 70, 1024, {"quantize": (0, 1), "gemm_mma": (0, 1), "dequant_activation": (0, 1)}),
        ("sm_90a", 1, 1024, {"quantize": (0, 1), "gemv": (1, 1)}),
        ("sm_90a", 16, 1024, {"quantize": (0, 1), "gemm_wgmma": (1, 1)}),
        ("sm_90a", 300, 1024, {"quantize": (0, 1), "gemm_wgmma": (1, 1)}),
        # more splits than a cluster has blocks
        ("sm_90a", 16, 4096, {"quantize": (0, 1), "gemm_wgmma": (1, 1), "dequant_activation": (1, 1)}),
        ("sm_120", 70, 1024, {"quantize": (0, 1), "gemm_mma": (1, 1), "dequant_activation": (1, 1)}),
    ],
)
def test_linear(arch, rows, depth, launches):
    x, w = torch.randn(rows, depth), torch.randn(256, depth)
    q, scale, _ = fp.ops.quantize(w, torch.int8)
    exact = fp.ops.int8_linear(x, q, scale)
    with fp.interpret(arch, timeline=True) as device, fp.use_backend("cuda"):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        results = [fp.ops.int8_linear(x, q, scale) for _ in range(2)]
    assert device.findings == [] and all(torch.equal(r, exact) for r in results)
    assert programmatic(device) == {name: (2 * n, 2 * of) for name, (n, of) in launches.items()}


@pytest.mark.every(2)
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_the_weight_is_on_its_way_before_the_quantisation_ends(rows):
    x, w = torch.randn(rows, 4096), torch.randint(-127, 128, (4096, 4096), dtype=torch.int8)
    with fp.interpret("sm_90a", timeline=True, checks=False) as device, fp.use_backend("cuda"):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        fp.ops.int8_linear(x, w, torch.ones(4096))
    (gemm,) = (k for k in device.timeline().kernels if k.programmatic)
    early = gemm.cycles - gemm.dependency_cycle - gemm.after_cycles
    # 300 rows leave no multiprocessor without rows that are quantised, and none has registers for both kernels
    assert early > 500 if rows < 300 else early == 0


@pytest.mark.parametrize("rows", [1, 16])
def test_a_weight_that_is_copied_is_waited_for(rows):
    x, w = torch.randn(rows, 1000), torch.randint(-127, 128, (256, 1001), dtype=torch.int8)[:, :1000]
    exact = fp.ops.int8_linear(x, w, torch.ones(256))
    with fp.interpret("sm_90a", counters=True) as device, fp.use_backend("cuda"):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        assert torch.equal(fp.ops.int8_linear(x, w, torch.ones(256)), exact)
    assert device.findings == [] and device.kernels("pad_rows")


def test_attention():
    q, k, v = (torch.randn(1, 1, 64, 64, dtype=torch.float16) for _ in range(3))
    with fp.interpret("sm_90a", timeline=True) as device, fp.use_backend("cuda"):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        fp.ops.attention(q, k, v)
    assert programmatic(device) == {"attention": (1, 1)}


def test_attention_8bit():
    """The second of the launches that quantise, and attention, begin while the launch before each ends."""
    q, k, v = (torch.randn(1, 1, 64, 64, dtype=torch.float16) for _ in range(3))
    with fp.interpret("sm_90a", timeline=True) as device, fp.use_backend("cuda"):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        fp.ops.attention_8bit(q, k, v)
    launches = {k.kernel: (k.programmatic, k.launches) for k in device.timeline().kernels}
    early = {
        name for name in ("qkv_to_int8", "attention_wgmma") for k in launches if name in k and launches[k] == (1, 1)
    }
    assert device.findings == [] and len(launches) == 3 and early == {"qkv_to_int8", "attention_wgmma"}


@pytest.mark.parametrize("rows", [2, 16, 300])
@pytest.mark.parametrize("op", ["int8_gemm", "fp8_gemm", "w8a16_gemm"])
def test_a_weight_that_the_launch_before_writes(op, rows):
    """The GEMM begins while that launch writes: it may not read the weight as data that does not change."""
    x, w = torch.randn(rows, 512), torch.randn(256, 512)
    dtype = torch.float8_e4m3fn if op == "fp8_gemm" else torch.int8
    a, a_scale, _ = fp.ops.quantize(x, dtype)
    with fp.interpret("sm_90a") as device, fp.use_backend("cuda"):
        if reason := fp.dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        b, b_scale, _ = fp.ops.quantize(w, dtype)
        if op == "w8a16_gemm":
            got = fp.ops.w8a16_gemm(x.bfloat16(), b, b_scale)
        else:
            got = getattr(fp.ops, op)(a, b, a_scale, b_scale, out_dtype=torch.bfloat16)
    assert device.findings == []
    assert (got.float() - x @ w.T).norm() < 0.05 * (x @ w.T).norm()
