"""The projections of nn.MultiheadAttention as layers of 8 bits: every form of its arguments, what reads its weights elsewhere, and
what goes on with such a model."""

import copy
import gc
import json
import pickle
import warnings
import weakref

import pytest
import torch
from small_models import assert_same_objects, codes, names, objects, outputs
from torch import nn

import forwardpass as fp
from forwardpass.common.models.modules import hooked

N, L, S, E, H = 2, 5, 7, 64, 4
LAYERS = ["in_proj", "out_proj"]


class Holder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, H, **options)
        if self.attention.in_proj_bias is not None:  # torch begins with zeros
            nn.init.normal_(self.attention.in_proj_bias)
        self.requires_grad_(False).eval()

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 128, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers).eval().requires_grad_(False)


def inputs(how, batch_first=True, batched=True, kdim=E, vdim=E):
    """(query, key, value); one tensor for several of them where torch would know it as one."""
    g = torch.Generator().manual_seed(1)
    x, memory, other = (torch.randn(N, n, k, generator=g) for n, k in ((L, E), (S, kdim), (S, vdim)))

    def form(t):
        return t[0] if not batched else t if batch_first else t.transpose(0, 1).contiguous()

    x, memory, other = form(x), form(memory), form(other)
    return {"self": (x, x, x), "memory": (x, memory, memory), "three": (x, memory, other)}[how]


def error(y, expected):
    assert y.shape == expected.shape and y.dtype == expected.dtype
    return float((y - expected).norm() / expected.norm())


# ---- arguments

MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([[S], [S - 2]])},
    "float padding": {"key_padding_mask": torch.zeros(N, S).masked_fill(torch.arange(S) >= S - 1, -torch.inf)},
    "mask": {"attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 1},
    "mask of each head": {"attn_mask": torch.rand(N * H, L, S, generator=torch.Generator().manual_seed(2)) < 0.3},
    "bias": {"attn_mask": torch.randn(L, S, generator=torch.Generator().manual_seed(3))},
    "both": {
        "attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 1,
        "key_padding_mask": torch.arange(S) >= torch.tensor([[S], [S - 2]]),
    },
}


@pytest.mark.every(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@torch.inference_mode()
def test_every_form_of_the_arguments(mask, fused):
    for batch_first in (True, False):
        model = Holder(batch_first=batch_first)
        calls = []
        for how in ("self", "memory", "three"):
            for batched in (True, False):
                given = dict(MASKS[mask])
                if how == "self":
                    given = {k: v[..., :L] for k, v in given.items()}
                if not batched:
                    given = {
                        k: v[0] if k == "key_padding_mask" else v[: H if v.dim() == 3 else None]
                        for k, v in given.items()
                    }
                for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                    calls.append((inputs(how, batch_first, batched), {**given, **weights}))
        expected = [model(*tensors, **given) for tensors, given in calls]
        report = fp.swap(model, "int8", attention=fused)
        assert names(report) == [f"attention.{name}" for name in LAYERS]
        for (tensors, given), (y, weights) in zip(calls, expected):
            got, got_weights = model(*tensors, **given)
            assert error(got, y) < 0.03
            assert got.is_contiguous() or not y.is_contiguous()
            assert (got_weights is None) == (weights is None)
            if weights is not None:
                assert error(got_weights, weights) < 0.03
        fp.restore(model)
        assert all(torch.equal(model(*t, **given)[0], y) for (t, given), (y, _) in zip(calls, expected))


@pytest.mark.filterwarnings("ignore:swap. fp8_linear has no kernel")
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.03), ("fp8", 0.08), ("w8a16", 0.02), ("bf16", 0.01)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_every_precision(precision, bound, bias):
    model = Holder(batch_first=True, bias=bias)
    expected = [model(*inputs(how))[0] for how in ("self", "memory", "three")]
    assert len(fp.swap(model, precision).swapped) == 2
    assert (model.attention.in_proj.bias is not None) == bias
    for how, y in zip(("self", "memory", "three"), expected):
        assert 0 < error(model(*inputs(how))[0], y) < bound


@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_the_causal_hint(fused):
    model, x = Holder(batch_first=True), inputs("self")
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    padding = {"key_padding_mask": torch.zeros(N, L).masked_fill(torch.arange(L) == L - 1, -torch.inf)}
    calls = [
        {"attn_mask": causal, "is_causal": True, "need_weights": w, **p} for w in (True, False) for p in ({}, padding)
    ]
    expected = [model(*x, **given)[0] for given in calls]
    fp.swap(model, "int8", attention=fused)
    assert all(error(model(*x, **given)[0], y) < 0.03 for given, y in zip(calls, expected))
    with pytest.raises(ValueError, match="is_causal=True is a hint about attn_mask, which is missing"):
        model(*x, is_causal=True)


@torch.inference_mode()
def test_dropout_in_training():
    model, x = Holder(batch_first=True, dropout=0.5), inputs("self")
    fp.swap(model, "int8", attention=False)
    expected = model(*x)[0]
    model.train()
    for given in ({}, {"need_weights": False}):
        assert error(model(*x, **given)[0], expected) > 0.05
    fp.restore(model)
    fp.swap(model.eval(), "int8", attention=True)
    with pytest.raises(RuntimeError, match="has no dropout"):
        model.train()(*x)


@torch.inference_mode()
def test_rows_of_the_projection():
    """Of a query and a memory each is multiplied by its rows alone, as if by all of them; a hook sees both."""
    model = Holder(batch_first=True)
    tensors = inputs("memory")
    for precision in ("int8", "w8a16"):
        fp.swap(model, precision)
        layer, rows = model.attention.in_proj, []
        product = type(layer).product

        def counted(self, x, product=product, rows=rows):
            rows.append(self.out_features)
            return product(self, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(layer), "product", counted)
            y = model(*tensors)[0]
            assert rows == [E, 2 * E, E]  # and out_proj
        seen = []
        with hooked([("", layer)], before=lambda key, module, x, seen=seen: seen.append(x)):
            assert torch.equal(model(*tensors)[0], y)
        assert seen[0] is tensors[0] and seen[1] is tensors[1] and len(seen) == 2
        for changed in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(changed(*tensors)[0], y)
        half = model.to(torch.bfloat16)(*(t.bfloat16() for t in tensors[:1]), *(tensors[1].bfloat16(),) * 2)[0]
        assert 0 < error(half.float(), y) < 0.03
        model.float()
        layer.qweight = torch.zeros_like(layer.qweight)  # what is put in its place counts
        assert not torch.equal(model(*tensors)[0], y)
        fp.restore(model)


# ---- what stays


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"add_bias_kv": True}, "extra_keys"),
        ({"add_zero_attn": True}, "extra_keys"),
        ({"kdim": 24, "vdim": 40}, "separate_projections"),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_forms_that_stay(options, code):
    model = nn.ModuleDict({"it": Holder(batch_first=True, **options), "other": nn.Linear(E, E)})
    tensors = inputs("three", kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    expected = model["it"](*tensors)[0]
    report = fp.swap(model, "int8")
    assert codes(report)["it.attention.in_proj"] == code
    out_proj = "it.attention.out_proj" in names(report)
    assert out_proj == (code == "separate_projections")
    assert error(model["it"](*tensors)[0], expected) < (0.03 if out_proj else 1e-9)
    fp.restore(model)
    assert type(model["it"].attention) is nn.MultiheadAttention
    assert torch.equal(model["it"](*tensors)[0], expected)


def test_what_derives_from_torchs_stays():
    class Mine(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Layer(nn.TransformerEncoderLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    layer = Layer(E, H, 128, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(N, L, E)
    expected = layer(x)
    assert names(fp.swap(layer, "int8")) == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert 0 < error(layer(x), expected) < 0.03  # no fast path that would read integers as floats
    fp.restore(layer)
    layer.self_attn = Mine(E, H, batch_first=True).eval().requires_grad_(False)
    expected = layer(x)
    with pytest.warns(UserWarning, match="no layer is swapped"):
        report = fp.swap(layer, "int8")
    assert codes(report)["self_attn.in_proj"] == "subclass"
    assert {codes(report)[n] for n in ("self_attn.out_proj", "linear1", "linear2")} == {"weight_read"}
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "exclude", [["in_proj"], ["out_proj"], ["in_proj", "out_proj"], ["in_proj", "out_proj", "linear2"]]
)
@torch.inference_mode()
def test_a_part_of_them(exclude):
    """What is not swapped is a parameter again; torch's module is there where nothing of the encoder layer is swapped."""
    model, x = encoder(), torch.randn(N, L, E)
    before, expected = objects(model), model(x)
    report = fp.swap(model, "int8", exclude=exclude)
    assert not any(name.endswith(tuple(exclude)) for name in names(report)) and len(report.swapped) % 2 == 0
    attention = model.layers[0].self_attn
    assert type(attention) is fp.nn.MultiheadAttention and not model.use_nested_tensor
    state = model.state_dict()
    assert ("layers.0.self_attn.in_proj_weight" in state) == ("in_proj" in exclude)
    assert ("layers.0.self_attn.in_proj.qweight" in state) == ("in_proj" not in exclude)
    assert 0 < error(model(x), expected) < 0.03
    fp.restore(model)
    assert_same_objects(model, before)
    fp.swap(model, "int8", exclude="layers.0")
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention and not model.use_nested_tensor
    padding = torch.arange(L) >= torch.tensor([[L], [L - 2]])
    assert (
        error(model(x, src_key_padding_mask=padding)[~padding], model(x[:, :L], src_key_padding_mask=padding)[~padding])
        == 0
    )
    fp.restore(model)
    assert model.use_nested_tensor


@torch.inference_mode()
def test_a_second_swap():
    model, x = encoder(), torch.randn(N, L, E)
    before, expected = objects(model), model(x)
    fp.swap(model, "int8", exclude="in_proj")
    once = model(x)
    second = fp.swap(model, "w8a16")
    assert names(second) == [f"layers.{i}.self_attn.in_proj" for i in (0, 1)]
    assert not torch.equal(model(x), once) and error(model(x), expected) < 0.03
    fp.restore(model)
    assert_same_objects(model, before)
    assert torch.equal(model(x), expected)


def test_a_model_that_is_dropped_is_freed():
    model = encoder()
    attention = weakref.ref(model.layers[0].self_attn)
    fp.swap(model, "int8")
    dropped = weakref.ref(model)
    del model
    gc.collect()
    assert dropped() is None and attention() is None


# ---- around it


@pytest.mark.parametrize("keep", ["cpu", False])
@torch.inference_mode()
def test_save_and_load(keep, tmp_path):
    model, x = encoder(), torch.randn(N, L, E)
    fp.swap(model, "int8", keep=keep, exclude="layers.1.self_attn.in_proj", attention=keep == "cpu")
    expected = model(x)
    fp.save_pretrained(model, tmp_path)
    layers = {layer["fqn"] for layer in json.loads((tmp_path / "forwardpass.json").read_text())["layers"]}
    assert {"layers.0.self_attn.in_proj", "layers.1.self_attn.out_proj"} <= layers
    with torch.device("meta"):
        empty = encoder()
    for other in (encoder(), empty):
        loaded = fp.load_pretrained(tmp_path, other.eval())
        assert torch.equal(loaded(x), expected)
        assert [m.fused for m in loaded.modules() if isinstance(m, fp.nn.MultiheadAttention)] == [keep == "cpu"] * 2
    target = encoder(3)
    before = objects(target)
    with pytest.raises(ValueError, match="does not fit"):
        fp.load_pretrained(tmp_path, target)
    assert_same_objects(target, before)


@pytest.mark.every(2)
@torch.inference_mode()
def test_plan_parity_and_calibration():
    model, x = encoder(1), torch.randn(8, L, E, generator=torch.Generator().manual_seed(4))
    before = objects(model)
    plan = fp.plan(model, [(x,)], min_cosine=0.99, target="memory", candidates=["int8"])
    assert_same_objects(model, before)
    layers = {f"layers.0.{name}" for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")}
    assert {layer.fqn for layer in plan.layers} == layers
    report = fp.swap(model, plan=plan)
    assert set(names(report)) == layers
    parity = fp.parity(model, [(x,)])
    assert {layer.fqn for layer in parity.layers} == layers and all(
        0 < y.total.relative_error < 0.03 for y in parity.layers
    )
    assert all(y.kernel.relative_error < 1e-5 for y in parity.layers)
    # At padding torch's encoder gives zeros, which do not count.
    padded = {"src": x, "src_key_padding_mask": torch.arange(L) >= torch.tensor([[L], [L - 3]] * 4)}
    assert fp.parity(model, [padded]).output.cosine_min > 0.999
    fp.restore(model)
    decoder = nn.TransformerDecoderLayer(E, H, 128, batch_first=True).eval().requires_grad_(False)
    memory = torch.randn(8, S, E, generator=torch.Generator().manual_seed(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that calibration never reached a layer
        fp.swap(decoder, "int8", calibrate=[(x, memory)])
    assert decoder.multihead_attn.in_proj.channel_scale is not None
    found = fp.parity(decoder, [(x, memory)])
    assert found.output.cosine_min > 0.999
    rows = {layer.fqn: layer.total.samples for layer in found.layers}
    assert rows["multihead_attn.in_proj"] == 8 * (L + S)


def test_plans_of_before_fit_still():
    """They know no in_proj."""
    model = encoder()
    plan = fp.swap(model, "int8", exclude="self_attn", dry_run=True).plan.to_json()
    assert plan["linear_layers"].startswith("6 Linear layers")
    assert names(fp.swap(model, plan=plan)) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]


@torch.inference_mode()
def test_load_state_dict_is_refused_and_modes_stay():
    model = encoder()
    state = model.state_dict()
    fp.swap(model, "int8", include="self_attn.in_proj")
    with pytest.raises(RuntimeError, match=r"in_proj is a Int8Linear here, and the state dict has .*in_proj_weight"):
        model.load_state_dict(state, strict=False)
    model.train()
    fp.restore(model)
    assert all(m.training for m in model.modules())


@pytest.mark.every(3)
@torch.inference_mode()
def test_compiled_and_exported():
    torch._dynamo.reset()
    model, tensors = Holder(batch_first=True), inputs("memory")
    fp.swap(model, "int8")
    for _ in range(2):  # before there are parts, and after
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors)[0], model(*tensors)[0], rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, tensors, {"need_weights": False})
    torch.testing.assert_close(
        exported.module()(*tensors, need_weights=False)[0], model(*tensors)[0], rtol=1e-4, atol=1e-5
    )


def test_transformers_read_it(tmp_path):
    """SigLIP's pooling head is torch's module, whose weights transformers initialises by name."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=16)).eval()
    image = {"pixel_values": torch.randn(2, 3, 32, 32)}
    expected = outputs(model, image)
    assert "head.attention.in_proj" in names(fp.swap(model, "int8"))
    swapped = outputs(model, image)
    assert 0 < error(swapped, expected) < 0.05
    fp.save_pretrained(model, tmp_path / "ours")
    for load in (fp.load_pretrained, SiglipVisionModel.from_pretrained):
        assert torch.equal(outputs(load(tmp_path / "ours"), image), swapped)
    with pytest.raises(fp.Unsupported, match=r"head\.attention\.in_proj is a projection .* exclude='head\.attention'"):
        fp.export_pretrained(model, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
