"""fp.nn.Experts against the modules of transformers that it is made of: with and without a gate, transposed, with biases, a gate
of their own, a norm behind."""

import copy
import pickle

import pytest
import torch
from small_models import transformers
from torch import nn

import forwardpass as fp
from forwardpass.nn.linear.quantized_linear import quantize_weight
from forwardpass.nn.quantized_experts import is_experts
from forwardpass.ops.common.activations import separate_gate_up
from forwardpass.ops.fp8_gemm.reference import columns_scale
from forwardpass.proofs.activation import activation_within

moe = pytest.importorskip("transformers.integrations.moe")

E, H, I = 5, 48, 24  # noqa: E741


def config(**options):
    return transformers.PreTrainedConfig(experts_implementation="eager", **options)


class Eager(nn.Module):
    """What transformers' modules of experts do, one expert after the other; `_apply_gate` and the rest come by the decorator."""

    gated, transposed, biased = True, False, False

    def __init__(self, config):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        h, i = config.sizes
        sizes = {"gate_up_proj" if self.gated else "up_proj": (2 * i if self.gated else i, h), "down_proj": (h, i)}
        for name, (n, k) in sizes.items():
            shape = (E, k, n) if self.transposed else (E, n, k)
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g) / k**0.5))
            if self.biased:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, n, generator=g)))
        self.num_experts, self.act_fn, self.limit = E, nn.SiLU(), 1.5

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = torch.zeros_like(hidden_states)
        for j in range(top_k_index.shape[1]):
            for t, e in enumerate(top_k_index[:, j].tolist()):
                if e < E:
                    x = self.linear("gate_up_proj" if self.gated else "up_proj", e, hidden_states[t])
                    x = self._apply_gate(x) if self.gated else self.act_fn(x)
                    x = self.linear("down_proj", e, x)
                    if self.has_post_expert_norm:
                        x = self.post_expert_norm(x)
                    y[t] += x * top_k_weights[t, j]
        return y

    def linear(self, name, e, x):
        w = getattr(self, name)[e]
        return x @ (w if self.transposed else w.t()) + (getattr(self, f"{name}_bias")[e] if self.biased else 0)


class Plain(Eager):
    pass


class Gpt(Eager):
    transposed = biased = True

    def _apply_gate(self, x):
        gate, up = x[..., ::2].clamp(max=self.limit), x[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate)


class NoGate(Eager):
    gated = False


class Normed(Eager):
    def __init__(self, config):
        super().__init__(config)
        self.post_expert_norm = nn.RMSNorm(config.sizes[0])


class OddGate(Eager):
    """A gate that no epilogue has."""

    def __init__(self, config):
        super().__init__(config)
        self.act_fn = nn.Tanh()


KINDS = {
    Plain: ({}, "silu_mul"),
    Gpt: ({"is_concatenated": False, "is_transposed": True, "has_bias": True}, None),
    NoGate: ({"has_gate": False}, "silu"),
    Normed: ({"has_post_expert_norm": True}, "silu_mul"),
    OddGate: ({}, None),
}
CLASSES = {cls.__name__: moe.use_experts_implementation(cls, **options) for cls, (options, _) in KINDS.items()}
ACTIVATIONS = {cls.__name__: activation for cls, (_, activation) in KINDS.items()}


def module(name, dtype=torch.float32, sizes=(H, I)):
    return CLASSES[name](config(sizes=sizes)).eval().to(dtype)


def inputs(tokens=7, k=2, dtype=torch.float32, seed=1, hidden=H):
    g = torch.Generator().manual_seed(seed)
    index = (
        torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k).long()
    )
    return torch.randn(tokens, hidden, generator=g).to(dtype), index, torch.rand(tokens, k, generator=g).to(dtype)


def swapped(original, kind):
    return fp.nn.Experts.from_torch(original, kind=kind, activation=activation_within(original))


def with_dequantised(original, new):
    """A copy of the original on the very weights that the new one has."""
    other = copy.deepcopy(original).float()
    for name, old in (("up", "gate_up_proj" if original.has_gate else "up_proj"), ("down", "down_proj")):
        for e in range(E):
            weight, scale = (getattr(new, f"{name}_{part}")[e] for part in ("weight", "scale"))
            w = weight.double() * columns_scale(weight, scale)
            if name == "up" and (new.activation or "").endswith("_mul"):
                w = torch.cat(separate_gate_up(w))
            getattr(other, old).data[e] = w.t() if original.is_transposed else w
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
@torch.inference_mode()
def test_weights_alone(name, dtype):
    """With w8a16 nothing else is rounded to 8 bits: the original on the same weights, within the dtype."""
    original = module(name)
    assert is_experts(original)
    new = swapped(original.to(dtype), "w8a16")
    assert new.activation == ACTIVATIONS[name]
    x = inputs(dtype=dtype)
    expected = with_dequantised(original, new)(*(t.float() if t.is_floating_point() else t for t in x))
    actual = new(*x)
    assert actual.dtype == dtype
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 6e-3), error


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_block"])
@pytest.mark.parametrize("name", CLASSES)
@torch.inference_mode()
def test_rows_of_8_bits(name, kind):
    sizes = (300, 136) if kind == "fp8_block" else (H, I)  # several blocks, the last of each not whole
    original, x = module(name, sizes=sizes), inputs(40, hidden=sizes[0])
    new = swapped(original, kind)
    expected, actual = original(*x), new(*x)
    assert 1e-4 < (actual - expected).norm() / expected.norm() < (0.02 if kind == "int8" else 0.08)
    torch.testing.assert_close(new.exact(*x).float(), actual, rtol=1e-2, atol=1e-2 * expected.std().item())
    assert (
        new.exact(*x) - actual
    ).norm() / actual.norm() < 1e-3  # a step of int8 apart here and there, between the products


@pytest.mark.parametrize("name", CLASSES)
@torch.inference_mode()
def test_blocks_of_weights(name):
    """A block is of 128 rows of the gate, of the up or of the down projection as they come, however an epilogue wants them."""
    original = module(name, sizes=(300, 136))
    new = swapped(original, "fp8_block")
    both = 2 if new.activation == "silu_mul" else 1
    assert new.up_scale.shape == ((E, 2, 2, 3) if both == 2 else (E, 3 if original.has_gate else 2, 3))
    assert new.down_scale.shape == (E, 3, 2)
    again = with_dequantised(original, new)
    for proj, parts in (("gate_up_proj" if original.has_gate else "up_proj", both), ("down_proj", 1)):
        for weights in zip(getattr(original, proj), getattr(again, proj)):
            w, copied = ((x.t() if original.transposed else x).chunk(parts) for x in weights)
            for part, of_part in zip(w, copied, strict=True):
                q, scale = quantize_weight(part, torch.float8_e4m3fn, "block")
                torch.testing.assert_close(of_part, (q.double() * columns_scale(q, scale)).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", fp.nn.Experts.kinds)
@torch.inference_mode()
def test_tokens_and_choices(kind):
    """None, one, all of one expert, choices that are no expert, int32, several dimensions."""
    original = module("Plain")
    new = swapped(original, kind)
    assert new(*inputs(0)).shape == (0, H)
    x, index, weights = inputs(9, 3)
    whole = new(x, index, weights)
    torch.testing.assert_close(
        torch.cat([new(x[t : t + 1], index[t : t + 1], weights[t : t + 1]) for t in range(9)]), whole
    )
    assert torch.equal(new(x, index.int(), weights), whole)
    assert torch.equal(new(x.view(3, 3, H), index.view(3, 3, 3), weights.view(3, 3, 3)), whole.view(3, 3, H))
    one = torch.full_like(index, 3)
    expected = original(x, one, weights)
    assert (new(x, one, weights) - expected).norm() < 0.08 * expected.norm()
    elsewhere = torch.where(index == 2, E, index)  # as transformers marks experts of another device
    torch.testing.assert_close(new(x, elsewhere, weights), new(x, index, weights * (index != 2)))
    assert torch.equal(new(x, torch.full_like(index, E), weights), torch.zeros_like(x))


@pytest.mark.parametrize("kind", ["int8", "fp8_block", "w8a16_fp8_group"])
@pytest.mark.parametrize("name", ["Gpt", "Plain"])
@torch.inference_mode()
def test_kept_and_moved(name, kind):
    original, x = module(name), inputs()
    new = swapped(original, kind)
    before = new(*x)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(other(*x), before)
    empty = fp.nn.Experts(**new.config(), device="cpu")
    empty.load_state_dict(new.state_dict())
    empty.adopt(original)
    assert torch.equal(empty(*x), before)
    half = copy.deepcopy(new).half()
    assert half.up_weight.dtype == new.up_weight.dtype and half.up_scale.dtype == torch.float32
    assert half.up_bias is None or half.up_bias.dtype == torch.float16
    assert half.down_weight.stride(1) % 16 == 0
    with pytest.raises(RuntimeError, match=r"load_state_dict: (down|up)_weight"):
        new.load_state_dict({n: t.float() for n, t in new.state_dict().items()})


@pytest.mark.every(3)
@torch.inference_mode()
def test_compiled():
    new, x = swapped(module("Normed"), "int8"), inputs()
    torch.testing.assert_close(torch.compile(new, fullgraph=True)(*x), new(*x))


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"kind must be one of int8, fp8, fp8_block, w8a16, w8a16_group, .*, not 'int4'"
    ):
        fp.nn.Experts(E, H, I, kind="int4")
    with pytest.raises(ValueError, match="activation must be one of"):
        fp.nn.Experts(E, H, I, kind="int8", gated=False, activation="silu_mul")
    with pytest.raises(ValueError, match="a Linear is no module of experts"):
        fp.nn.Experts.from_torch(nn.Linear(4, 4), kind="int8")
    meta = module("Plain").to("meta")
    with pytest.raises(ValueError, match="its gate_up_proj is on the meta device"):
        fp.nn.Experts.from_torch(meta, kind="int8")
    new, (x, index, weights) = swapped(module("Plain"), "int8"), inputs()
    with pytest.raises(RuntimeError, match="inference_mode"):
        new(x.requires_grad_(), index, weights)
