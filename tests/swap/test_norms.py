"""Norms before MLPs: which quantise for them, what they give on a GPU and elsewhere, and that all around a swap knows them."""

import copy
import dataclasses
import itertools
import pickle
import types

import pytest
import torch
from rotation import in_turn, paired
from small_models import ATTENTION, MLPS, assert_same_objects, batch, build, objects, outputs
from small_models import TwoLayers as Mlp
from torch import nn

import forwardpass as fp
from forwardpass.common.printing import quiet
from forwardpass.nn import QuantizingNorm, norm
from forwardpass.nn.linear.quantized_inputs import Quantized
from forwardpass.ops.common.quantized_rows import E4M3

WIDTH = 64
NORMS = {"llama": "post_attention_layernorm", "gpt2": "ln_2", "vit": "layernorm_after", "t5": "layer_norm", "phi": None,
         "t5_gated": "layer_norm", "phi3": "post_attention_layernorm", "gemma3": "pre_feedforward_layernorm",
         "modernbert": "mlp_norm", "clip": "layer_norm2", "siglip": "layer_norm2"}  # fmt: skip


class Layer(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Lines(Layer):
    def forward(self, x):
        residual = x
        x = self.norm(x)
        y = self.mlp(x)
        x = residual + y
        return x


class AlsoRead(Layer):
    def forward(self, x):
        x = self.norm(x)
        return x + self.mlp(x)


class Between(Layer):
    def forward(self, x):
        return x + self.mlp(2 * self.norm(x))


class Twice(Layer):
    def forward(self, x):
        return self.norm(x) + self.mlp(self.norm(x))


class MlpTwice(Layer):
    def forward(self, x):
        return self.mlp(x) + self.mlp(self.norm(x))


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def model_of(layer, precision="int8", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model(layer()).eval().to(dtype)
    for p in model.layer.norm.parameters():
        p.data.uniform_(0.5, 1.5)
    return model, fp.swap(model, precision, include="**", **options)


@pytest.fixture
def x():
    return 3 * torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3)) + 0.5


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MLPS)
def test_models(name):
    """Found in every MLP of a model; on a CPU bits are as without, and all comes back."""
    model, x = build(name, MLPS), batch(name)
    keys = [k for k in model.state_dict() if "norm" in k or "ln_" in k]
    report = fp.swap(model, "int8", include="**", exclude="lm_head")
    norms = [fqn for fqn, m in model.named_modules() if isinstance(m, QuantizingNorm)]
    assert sorted(report.norms) == sorted(norms) and report.to_json()["norms"] == report.norms
    if NORMS[name] is None:
        assert not norms and "norms that quantise" not in str(report)
        return
    without = 1 if name == "siglip" else 0  # its pooling head adds the MLP's result in the statement that calls it
    assert len(norms) == len(report.mlps) - without > 0 and "norms that quantise" not in str(report)  # on a GPU they do
    assert "norms that quantise for an MLP" in str(dataclasses.replace(report, device="cuda"))
    assert {fqn.rpartition(".")[2] for fqn in norms} == {NORMS[name]}
    assert [k for k in model.state_dict() if "norm" in k or "ln_" in k] == keys
    y = outputs(model, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for fqn in norms:
            new = again.get_submodule(fqn)
            holder, reader = new._reader
            assert holder is again.get_submodule(fqn.rpartition(".")[0]) and reader in holder._modules
            setattr(holder, fqn.rpartition(".")[2], new._norm[0])  # as it was
        assert torch.equal(outputs(again, x), y)


def test_timm():
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(0)
    model = vit(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    before = outputs(model, x)
    report = fp.swap(model, "int8", include="**")
    assert len(report.mlps) == 2 and report.norms == ["blocks.0.norm2", "blocks.1.norm2"]
    assert 0 < (outputs(model, x) - before).norm() < 0.05 * before.norm()


@pytest.mark.every(3)
@pytest.mark.parametrize("name", in_turn(["llama", "gemma3", "gpt2"]))
def test_restored_stored_and_compiled(name, tmp_path):
    model, x = build(name, MLPS), batch(name)
    untouched = objects(model)
    fp.swap(model, "int8", include="**", exclude="lm_head", attention=False)
    y = outputs(model, x)
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path)
    assert sum(isinstance(m, QuantizingNorm) for m in loaded.modules()) == 2 and torch.equal(outputs(loaded, x), y)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, x), y, rtol=0, atol=1e-4)
    fp.restore(model)
    assert_same_objects(model, untouched)


@pytest.mark.parametrize(
    "layer",
    [
        AlsoRead,
        Between,
        Twice,
        MlpTwice,
        lambda: Layer(Scaled(WIDTH)),
        lambda: Layer(nn.RMSNorm(WIDTH)),  # whose epsilon is that of a dtype
        lambda: Layer(nn.LayerNorm((6, WIDTH))),
    ],
)
def test_left_as_they_are(layer, x):
    model, report = model_of(layer)
    assert report.mlps and not report.norms and not isinstance(model.layer.norm, QuantizingNorm)


def test_left_for_what_is_around_them():
    assert model_of(Layer)[1].norms == model_of(Lines)[1].norms == ["layer.norm"]
    for precision in ("w8a16", "bf16"):
        assert not model_of(Layer, precision)[1].norms  # they read 16 bits
    assert fp.swap(Layer().eval(), "int8", include="**").norms == []  # the model's own
    hooked = Model(Layer())
    hooked.layer.norm.register_forward_hook(lambda *_: None)
    named = Model(Layer())
    named.other = named.layer.norm
    patched = Model(Layer())
    patched.layer.forward = patched.layer.forward
    for model in (hooked, named, patched):
        assert fp.swap(model.eval(), "int8", include="**").norms == []
    model, report = model_of(Layer, dry_run=True)
    assert report.norms == ["layer.norm"] and type(model.layer.norm) is nn.LayerNorm


# ---- on a GPU, interpreted

RMS = lambda: Layer(nn.RMSNorm(WIDTH, eps=1e-5))  # noqa: E731


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    ("on", "given"),
    paired(
        itertools.product((torch.float32, torch.bfloat16), (Layer, Lines, RMS)),
        (("int8", "sm_80"), ("int8", "sm_90a"), ("fp8", "sm_89"), ("fp8", "sm_90a")),
    ),
)
@torch.no_grad()
def test_on_gpus(on, given, backend, x):
    """One launch normalises and quantises; values are the norm's but for half a step."""
    (dtype, layer), (precision, arch) = on, given
    model, _ = model_of(layer, precision, dtype)
    x, block = x.to(dtype), model.layer
    with fp.interpret(arch, counters=True) as device, fp.use_backend(backend):
        rows = block.norm(x)
        kernels = [k.kernel for k in device.kernels()]
        y = block(x)
        exact = block.mlp.exact(rows)
        result = block.mlp(rows)
    assert device.findings == [] and len(kernels) == 1 and "norm" in kernels[0]
    assert isinstance(rows, Quantized) and rows.dtype == dtype and y.dtype == dtype
    assert rows.values.dtype == (torch.int8 if precision == "int8" else E4M3)
    zero = 0 if rows.zero_point is None else rows.zero_point[:, None]
    back = (rows.values.double() - zero) * rows.scale.double()[:, None]
    expected = block.norm._norm[0].double()(x.double())
    step = rows.scale.double()[:, None] * (0.51 if precision == "int8" else 17)  # e4m3's widest, of 448
    assert ((back - expected).abs() <= step).all() and (back - expected).norm() < 0.03 * expected.norm()
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(result.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=bound)
    torch.testing.assert_close(y, x + result, rtol=0, atol=0)


@torch.no_grad()
def test_gemma_adds_one_to_its_weight():
    model = build("gemma3", MLPS)
    (fqn, *_) = fp.swap(model, "int8", include="**").norms
    new = model.get_submodule(fqn)
    new.weight.uniform_(-0.5, 0.5)
    x = torch.randn(5, new.weight.numel())
    with fp.interpret("sm_80"), fp.use_backend("cuda"):
        rows = new(x)
    back = (rows.values.float() - rows.zero_point[:, None]) * rows.scale[:, None]
    assert ((back - new._norm[0](x)).abs() <= 0.51 * rows.scale[:, None]).all()


@torch.no_grad()
def test_smoothed_by_the_scales_of_the_layer(x):
    model, report = model_of(Layer, calibrate=[torch.randn(64, WIDTH)])
    assert report.norms and model.layer.mlp.fc1.channel_scale is not None
    with fp.interpret("sm_80"), fp.use_backend("cuda"):
        rows, y = model.layer.norm(x), model(x)
    channel = model.layer.mlp.fc1.channel_scale
    back = (rows.values.float() - rows.zero_point[:, None]) * rows.scale[:, None]
    assert ((back - model.layer.norm._norm[0](x) * channel).abs() <= 0.51 * rows.scale[:, None]).all()
    torch.testing.assert_close(y, model(x), rtol=0, atol=2e-2)


@torch.no_grad()
def test_floats_where_something_may_look(x):
    """Hooks, another module in the MLP's place, and what promotes or converts dtypes."""

    def given(change=lambda layer: None):
        model, _ = model_of(Layer)
        change(model.layer)
        with fp.interpret("sm_80"), fp.use_backend("cuda"):
            return model.layer.norm(x)

    assert isinstance(given(), Quantized)
    for change in (
        lambda layer: layer.norm.register_forward_hook(lambda *_: None),
        lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer, "mlp", nn.Identity()),
    ):
        assert isinstance(given(change), torch.Tensor)
    model, _ = model_of(lambda: Layer(nn.RMSNorm(WIDTH, eps=1e-5)))
    with fp.interpret("sm_80"), fp.use_backend("cuda"):
        assert isinstance(model.layer.norm(x.bfloat16()), torch.Tensor)  # its weight is float32
        with torch.autocast("cpu", torch.bfloat16):
            assert isinstance(model.layer.norm(x), torch.Tensor)
    assert isinstance(model.layer.norm(x), torch.Tensor)


@torch.no_grad()
def test_parameters_are_those_of_the_norm(x):
    """Casts and checkpoints that put others in place, too."""
    model, _ = model_of(Layer)
    new = model.layer.norm
    assert [*new.state_dict()] == ["weight", "bias"] and new.eps == new._norm[0].eps
    assert "quantises for mlp" in repr(new)
    for changed in (
        model.bfloat16().float(),
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        changed.load_state_dict({k: v.clone() for k, v in changed.state_dict().items()}, assign=True)
        new = changed.layer.norm
        new.weight = nn.Parameter(torch.full((WIDTH,), 2.0))
        assert new._norm[0].weight is new.weight and new._reader[0] is changed.layer
        torch.testing.assert_close(new(x), nn.functional.layer_norm(x, (WIDTH,), new.weight, new.bias))


@pytest.mark.every(2)
@torch.no_grad()
def test_compiled_as_for_a_gpu(x, monkeypatch):
    """The operations of a CPU stand for a GPU's: a launch cannot be interpreted within a graph."""
    model, _ = model_of(Layer)
    floats = model(x)
    monkeypatch.setattr(norm, "gpu_takes", lambda device: True)
    y = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y) and not torch.equal(y, floats)
    torch.testing.assert_close(y, floats, rtol=0, atol=2e-2)


def test_under_grad_it_refuses_as_layers_do(x):
    model, _ = model_of(Layer)
    with fp.interpret("sm_80"), fp.use_backend("cuda"), pytest.raises(RuntimeError, match="inference"):
        model(x.requires_grad_())


def other_norm(self, x):
    return 2 * nn.functional.layer_norm(x, (WIDTH,), self.weight, self.bias)


def other_holder(self, x):
    y = self.norm(x)
    return x + self.mlp(y) * (y * y).mean()


@pytest.mark.parametrize(
    ("patched", "text"),
    [(other_norm, "LayerNorm.forward"), (other_holder, "Layer.forward"), (types.MethodType, "the forward of a Layer")],
)
@torch.no_grad()
def test_code_that_is_patched_after_the_swap_counts_on_a_gpu(patched, text, x, monkeypatch):
    """As Liger and Unsloth do. It counted on a CPU alone: a GPU computed the norm that was read (off by .5), or gave rows of 8 bits
    to code that nobody had read (TypeError)."""
    quiet.warn_once.cache_clear()
    model, _ = model_of(Layer)
    if patched is other_norm:
        monkeypatch.setattr(nn.LayerNorm, "forward", patched)
    elif patched is other_holder:
        monkeypatch.setattr(Layer, "forward", patched)
    else:
        model.layer.forward = types.MethodType(other_holder, model.layer)
    with fp.interpret("sm_80"), fp.use_backend("cuda"), pytest.warns(UserWarning, match=f"{text} is another function"):
        y = model(x)
    torch.testing.assert_close(y, model(x), rtol=0, atol=0.1)


def test_functions_of_ours_are_no_patches():
    """Those of a cache that norms the heads of queries and keys, by the class of the norms before MLPs."""
    model = build("qwen3", ATTENTION)
    fp.swap(model, "int8", include="**", exclude="lm_head", attention=True, kv_cache="auto")
    norms = [m for m in model.modules() if isinstance(m, QuantizingNorm)]
    assert norms and all(m._is_as_proven() for m in norms)
