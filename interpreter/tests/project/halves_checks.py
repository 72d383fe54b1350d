"""What CUDA computes of halves and bfloat16s in float, and rounds once: test_pytest_gpu.py runs these with --gpu.

The witness is double precision on the CPU, rounded once.
"""

import pytest
import torch
import torch.nn.functional as F

INDEX = torch.randint(0, 20, (500,), generator=torch.Generator().manual_seed(0))


def accumulated(x):
    index = INDEX.to(x.device)
    return torch.zeros(20, 33, dtype=x.dtype, device=x.device).index_put((index,), x, accumulate=True)


def embedded(x):
    return F.embedding(INDEX.to(x.device), x)


def in_bags(mode):
    return lambda x: F.embedding_bag(INDEX.view(50, 10).to(x.device), x, mode=mode)


def negative_likelihood(x):
    return F.nll_loss(x, torch.arange(len(x), device=x.device) % x.shape[1])


def resized(mode, scale):
    return lambda x: F.interpolate(x, scale_factor=scale, mode=mode)


def smoothed(x):
    return F.interpolate(x, scale_factor=0.6, mode="bilinear", antialias=True)


def optimized(x, y):
    p = torch.nn.Parameter(x.detach().clone())
    p.grad = y.detach()
    torch.optim.SGD([p], lr=0.01, weight_decay=0.1, fused=True).step()
    return p.detach()


def one_by_one(x, y):
    return torch._foreach_add([x, y], [y, x], alpha=0.3)[1]


def in_place(x, y):
    return x.clone().add_(y, alpha=0.3)


def running(x):
    mean, variance = (torch.ones(16, dtype=x.dtype, device=x.device) for _ in range(2))
    F.batch_norm(x, mean, variance, training=True)
    return torch.stack([mean, variance])


CASES = {
    "add": (lambda x, y: torch.add(x, y, alpha=0.3), (3000,), (3000,)),
    "add a number": (lambda x: x + 0.3456, (3000,)),
    "subtract": (lambda x: 1.2345 - x, (3000,)),
    "in place": (in_place, (3000,), (3000,)),
    "foreach": (one_by_one, (3000,), (3000,)),
    "sgd": (optimized, (3000,), (3000,)),
    "prod": (lambda x: x.prod(0).detach(), (12, 20)),
    "logit": (lambda x: torch.logit(x, 0.01), (3000,)),
    "glu": (F.glu, (30, 300)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (257,), w, b), (64, 257), (257,), (257,)),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (8, 16, 33), (16,), (16,)),
    "running statistics": (running, (8, 16, 33)),
    "nll": (negative_likelihood, (300, 20)),
    "nll 2d": (lambda x: F.nll_loss(x, x.new_ones(2, 30, 30, dtype=torch.int64)), (2, 5, 30, 30)),
    "embedding": (embedded, (20, 33)),
    "bags": (in_bags("mean"), (20, 33)),
    "index_put": (accumulated, (500, 33)),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b), (2, 16, 10, 10), (8, 16, 3, 3), (8,)),
    "transposed": (lambda x, w: F.conv_transpose1d(x, w), (2, 16, 20), (16, 8, 5)),
    "fold": (lambda x: F.fold(x, (20, 20), 3), (2, 27, 324)),
    "avg pool": (lambda x: F.avg_pool2d(x, 5, 1), (2, 3, 20, 20)),
    "max pool": (lambda x: F.max_pool2d(x, 5, 1), (2, 3, 20, 20)),
    "adaptive pool": (lambda x: F.adaptive_avg_pool3d(x, 2).detach(), (2, 3, 8, 8, 8)),
    "linear": (resized("linear", 1.7), (2, 3, 30)),
    "bicubic": (resized("bicubic", 1.7), (2, 3, 9, 9)),
    "trilinear": (resized("trilinear", 0.6), (2, 3, 8, 8, 8)),
    "antialias": (smoothed, (2, 3, 20, 20)),  # torch has no such kernel for halves on a CPU
    "pool 3d": (lambda x: F.avg_pool3d(x, 3, 1), (2, 3, 8, 8, 8)),  # nor this
    "grid sample": (lambda x, g: F.grid_sample(x, g.clamp(-1, 1), align_corners=False).detach(), (2, 3, 8, 8), (2, 8, 8, 2)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_rounded_once(name, dtype):
    function, *shapes = CASES[name]
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    results = []
    for device, computed_in in (("cuda", dtype), ("cpu", torch.float64)):
        args = [v.to(device, computed_in).requires_grad_() for v in values]
        out = function(*args)
        gradients = ()
        if out.requires_grad:
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
            gradients = torch.autograd.grad(out, args, weights.to(device, computed_in))
        assert all(t.dtype == computed_in for t in (out, *gradients))
        results.append([t.detach().cpu().double() for t in (out, *gradients)])
    for n, (result, exact) in enumerate(zip(*results)):
        rounded = exact.to(dtype).double()
        ulp = torch.finfo(dtype).eps * rounded.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor().exp2()
        error = (result - exact).abs() - 1e-5 * exact.square().mean().sqrt()  # what float sums may differ
        assert (error <= 0.5001 * ulp).all(), (n, (error / ulp).max())
