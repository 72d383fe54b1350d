"""adaLN in a swapped model: which layers and norms are found to defer, what they give, and that all around a swap knows them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_same_objects, objects
from torch import nn

import forwardpass as fp
from forwardpass.nn.deferred import Deferred, DeferringNorm
from forwardpass.nn.linear import quantized_linear

WIDTH, TOKENS = 64, 6


class Block(nn.Module):
    """A block of a diffusion transformer (arXiv 2212.09748)."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def attention(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.dropout(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    def joined(self, x, gate, y):
        return x + gate.unsqueeze(1) * y

    def normed(self, norm, x, shift, scale):
        return norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def forward(self, x, t):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(t)).chunk(6, 1)
        x = self.joined(x, gate1, self.attention(self.normed(self.norm1, x, shift1, scale1)))
        return self.joined(x, gate2, self.down(F.gelu(self.up(self.normed(self.norm2, x, shift2, scale2)))))


class ReadTwice(Block):
    def joined(self, x, gate, y):
        return super().joined(x, gate, y) + y.mean()


class Scaled(Block):
    def joined(self, x, gate, y):
        return x + gate.unsqueeze(1) * (0.5 * y)


class NormReadTwice(Block):
    def normed(self, norm, x, shift, scale):
        return super().normed(norm, x, shift, scale).clamp(-100, 100)


class WrittenInto(Block):
    def forward(self, x, t):
        y = self.down(F.gelu(h := self.up(x)))
        h2 = F.gelu(h)
        z = self.down(h2)
        h2.zero_()
        return x + self.modulation(t)[:, None, :WIDTH] * z + y


class Model(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x, t=None):
        for block in self.blocks:
            x = block(x, x[:, 0] if t is None else t)
        return x


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Layers defer on a GPU alone. The CPU's operations compute the same sums."""
    monkeypatch.setattr(quantized_linear, "gpu_takes", lambda device: True)


def built(block=Block):
    torch.manual_seed(0)
    return Model(block).eval()


def batch(rows=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, TOKENS, WIDTH, generator=g), torch.randn(rows, WIDTH, generator=g)


def swapped(block=Block, precision="int8", **options):
    model = built(block)
    with torch.inference_mode():
        before = model(*batch())
    return model, before, fp.swap(model, precision, include="**", **options)


def deferring(model):
    layers = {fqn for fqn, m in model.named_modules() if getattr(m, "defers", False)}
    return layers, {fqn for fqn, m in model.named_modules() if isinstance(m, DeferringNorm)}


def names(*of_block):
    return {f"blocks.{i}.{name}" for i in range(2) for name in of_block}


FOUND = {
    Block: (("out", "down"), ("norm1", "norm2")),
    ReadTwice: ((), ("norm1", "norm2")),
    Scaled: ((), ("norm1", "norm2")),
    NormReadTwice: (("out", "down"), ()),
    WrittenInto: ((), ()),
}


@pytest.mark.parametrize("block", FOUND)
def test_what_is_found_by_running(block, as_on_a_gpu):
    model, before, report = swapped(block)
    layers, norms = FOUND[block]
    assert deferring(model) == (names(*layers), names(*norms))
    assert set(report.norms) == names(*norms)
    with torch.inference_mode():
        assert (model(*batch()) - before).norm() < 0.02 * before.norm()


def test_a_model_without_such_norms_is_not_run_for_them(monkeypatch):
    from forwardpass.proofs import norms

    monkeypatch.setattr(norms.Deferring, "in_place", lambda *_: pytest.fail("run"))
    model = built()
    for b in model.blocks:
        b.norm1, b.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    fp.swap(model, "int8", include="**")
    assert deferring(model) == (set(), set())


@pytest.mark.parametrize("precision", ["int8", "w8a16", "int8_rotated", "fp8"])
def test_the_sum_is_in_the_epilogue(precision, as_on_a_gpu, monkeypatch):
    model, before, _ = swapped(precision=precision)
    seen = []
    for fqn in names("out", "down"):
        layer = model.get_submodule(fqn)
        product = layer.product
        monkeypatch.setattr(layer, "product", lambda *a, p=product: seen.append(len(a)) or p(*a))
    with torch.inference_mode():
        y = model(*batch())
    assert seen == [3] * 4 and type(y) is torch.Tensor
    assert (y - before).norm() < (0.1 if precision == "fp8" else 0.02) * before.norm()


def test_a_cpu_computes_what_it_computed():
    model, *_ = swapped()
    with torch.inference_mode():
        y = model(*batch())
        for fqn in deferring(model)[0]:
            model.get_submodule(fqn).defers = False
        assert torch.equal(model(*batch()), y)


def test_layers_of_floats_alone_defer_nothing():
    model, *_ = swapped(precision="bf16")
    assert deferring(model) == (set(), set())


def test_restored_copied_and_pickled(as_on_a_gpu):
    model = built()
    before, expected = objects(model), model(*batch()).detach()
    fp.swap(model, "int8", include="**")
    with torch.inference_mode():
        y = model(*batch())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert deferring(other) == deferring(model) and torch.equal(other(*batch()), y)
    fp.restore(model)
    assert_same_objects(model, before)
    assert torch.equal(model(*batch()), expected)


def test_members_stay_callable_and_hooks_see_results(as_on_a_gpu):
    model, *_ = swapped()
    x, block, got = batch()[0], model.blocks[0], []
    with torch.inference_mode():
        assert torch.equal(block.out(x) + 0, block.out.product(x))
        y = model(*batch())
        handle = block.out.register_forward_hook(lambda module, args, out: got.append(type(out)))
        torch.testing.assert_close(model(*batch()), y)
        handle.remove()
        assert got == [torch.Tensor] and torch.equal(model(*batch()), y)


@pytest.mark.interpreted
@pytest.mark.parametrize("precision", ["int8", "int8_rotated"])
def test_kernels_of_a_gpu(precision, monkeypatch):
    """A norm with adaLN is one launch for q, k and v; the code of the model computes no norm, and no sum of a block."""
    model, before, _ = swapped(precision=precision)
    with torch.inference_mode(), fp.interpret("sm_80"):
        monkeypatch.setattr(F, "layer_norm", lambda *_, **__: pytest.fail("a norm was computed by itself"))
        y = model(*batch())
    assert (y - before).norm() < 0.02 * before.norm()


def test_in_16_bits(as_on_a_gpu):
    model = built().to(torch.bfloat16)
    inputs = [t.bfloat16() for t in batch()]
    with torch.inference_mode():
        before = model(*inputs)
        fp.swap(model, "int8", include="**")
        assert deferring(model)[0] == names("out", "down")
        y = model(*inputs)
    assert y.dtype == torch.bfloat16 and (y - before).float().norm() < 0.03 * before.float().norm()


def test_a_deferred_result_that_leaves_a_module_is_a_tensor_to_all(as_on_a_gpu):
    model, *_ = swapped()
    with torch.inference_mode():
        y = model.blocks[0].down(torch.randn(2, TOKENS, 4 * WIDTH))
        assert isinstance(y, Deferred) and isinstance(y, torch.Tensor) and torch.is_tensor(y)
        assert y.max() > 0 and y.numpy().shape == (2, TOKENS, WIDTH)
