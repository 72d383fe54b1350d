"""torch.compile of a project that says device="cuda": test_pytest_gpu.py runs these with --gpu."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_utils, metrics
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    metrics.reset()
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


def check(function, *args, rtol=1e-4, atol=1e-5, **options):
    """Compiled, it gives what it gives eagerly, gradients too, by kernels of Inductor's."""
    results = []
    for run in (function, torch.compile(function, **options)):
        ours = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        out = run(*ours)
        if out.requires_grad:
            out.float().square().sum().backward()
        results.append([out, *(a.grad for a in ours)])
    assert metrics.generated_kernel_count
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)


def test_pointwise():
    check(lambda x, y: torch.sin(x) + x * y, random(1000), random(1000))


def test_bfloat16():
    check(F.gelu, random(999, dtype=torch.bfloat16), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dim", [0, 1])
def test_sum(dim):
    check(lambda x: x.sum(dim), random(60, 2500))


def test_softmax():
    check(lambda x: F.softmax(2 * x, -1), random(17, 513))


def test_layer_norm():
    check(lambda x, w, b: F.layer_norm(x, (257,), w, b), random(17, 257), random(257), random(257))


def test_product_and_epilogue():
    check(lambda a, b, c: F.relu(a @ b + c) + 1, random(33, 64), random(64, 48), random(48))


def test_products_of_templates():
    """Triton's alone, each of which is benchmarked, and the best run."""
    options = {
        "max_autotune_gemm": True,
        "max_autotune_gemm_backends": "TRITON",
        "max_autotune_gemm_search_space": "DEFAULT",
    }
    a, b = (random(64, 64, dtype=torch.bfloat16).detach() for _ in range(2))
    check(lambda a, b: F.relu(a @ b), a, b, rtol=2e-2, atol=2e-2, options=options)


def test_shapes_that_change():
    compiled = torch.compile(lambda x: F.softmax(x, -1))
    for n in (5, 17, 300, 3000):
        x = random(3, n)
        torch.testing.assert_close(compiled(x), F.softmax(x, -1))
    assert metrics.generated_kernel_count <= 4


def test_training():
    layers = torch.nn.Sequential(
        torch.nn.Embedding(30, 16), torch.nn.Flatten(), torch.nn.Linear(64, 30), torch.nn.Dropout(0.0)
    )
    tokens = torch.randint(30, (5, 4), device="cuda")
    trained = []
    for compiled in (False, True):
        model = copy.deepcopy(layers).cuda()
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(run(tokens), tokens[:, 0]).backward()
            optimizer.step()
        trained.append(list(model.parameters()))
    for eager, compiled in zip(*trained):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_flex_attention():
    q, k, v = (random(1, 2, 128, 32) for _ in range(3))
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cuda")
    out = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-4, atol=1e-5)


@triton.jit
def doubled_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def test_with_a_kernel_of_the_project():
    def function(x):
        out = torch.empty_like(x)
        doubled_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
        return out.sin()

    check(function, random(1000).detach(), fullgraph=True)


def test_graphs_are_left_out():
    """With a warning, by torch that asks whether they can be; an older one is refused them by name."""
    asks = hasattr(cudagraph_utils, "check_caching_allocator_for_cudagraphs")
    with contextlib.nullcontext() if asks else pytest.raises(NotImplementedError, match="max-autotune-no-cudagraphs"):
        check(lambda x: F.relu(x) * 2, random(64).detach(), mode="reduce-overhead")
    assert bool(counters["inductor"]["cudagraph_skips"]) == asks
