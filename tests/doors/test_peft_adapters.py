"""Models with adapters of peft: the layer below an adapter is swapped, and the adapter goes on over it."""

import copy
import pickle

import pytest
import torch
from later import later
from small_models import transformers
from torch import nn

import forwardpass as fp
from forwardpass.proofs.code import Reach

peft = later("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[5, 17, 99, 3, 8, 61, 2], [1, 7, 9, 33, 80, 12, 70]])
_SIZES = {
    "vocab_size": 104,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config).eval()


def config(**options):
    return peft.LoraConfig(
        **{
            "r": 5,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "init_lora_weights": False,
            "lora_dropout": 0.2,
            **options,
        }
    )


def adapted(model=None, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(model or llama(), config(**options)).eval()


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def swapped_names(report):
    return {layer.fqn for layer in report.swapped}


def close(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.998


def test_the_layer_below_is_swapped_and_the_adapter_goes_on():
    model = adapted()
    before, layer = logits(model), model.base_model.model.model.layers[0].self_attn.q_proj
    below = copy.deepcopy(layer.base_layer)
    with model.disable_adapter():
        without = logits(model)
    report = fp.swap(model, "int8")
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in swapped_names(report)
    assert not [name for name in swapped_names(report) if "lora_" in name]
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        base = fp.nn.Int8Linear.from_torch(below)(x)
        lora = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        assert torch.equal(layer.base_layer(x), base)
        assert torch.equal(layer(x), base + lora)
        assert layer(torch.zeros(0, 64)).shape == (0, 64)
        assert layer(torch.full((1, 64), torch.nan)).isnan().all()
    assert close(logits(model), before) and not close(before, without)
    with model.disable_adapter():
        assert close(logits(model), without)
    fp.restore(model)
    assert torch.equal(logits(model), before)
    assert model.merge_and_unload() is not None


def test_packages_that_know_no_modules_are_not_looked_through():
    """Peft's code leads to sympy's, whose 8,000 functions took a second of each swap."""
    functions = Reach(adapted())._references[1]
    packages = {f.__globals__["__name__"].partition(".")[0] for f, _ in functions}
    assert "peft" in packages and not packages & {"sympy", "mpmath", "huggingface_hub"}


def test_several_adapters_and_one_that_is_added_after():
    model = adapted()
    model.add_adapter("other", config())
    model.eval()  # of its dropout
    names, outputs = ("default", "other"), {}
    for name in names:
        model.set_adapter(name)
        outputs[name] = logits(model)
    mixed = logits(model, adapter_names=["other", "default"])
    fp.swap(model, "int8")
    for name in names:
        model.set_adapter(name)
        assert close(logits(model), outputs[name])
    after = logits(model)
    assert close(logits(model, adapter_names=["other", "default"]), mixed)
    model.add_adapter("late", config())
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B):
            part["late"].load_state_dict(part["other"].state_dict())
    model.set_adapter("late")
    assert torch.equal(logits(model), after)


def test_siblings_with_and_without_adapters():
    model = adapted(target_modules=["k_proj"])
    before = logits(model)
    report = fp.swap(model, "int8")
    assert not [run for run in report.joined if any("self_attn" in name for name in run)]
    assert close(logits(model), before)
    model = adapted(target_modules=["v_proj"])
    before = logits(model)
    report = fp.swap(model, "int8", include="*_proj")
    assert [run for run in report.joined if run[0].endswith("q_proj") and len(run) == 2]
    assert close(logits(model), before)
    with torch.no_grad():
        assert close(model(IDS[:1, :1]).logits, before[:1, :1])


def test_merged_layers_are_swapped_with_the_sum_and_are_not_merged_or_unmerged_after():
    model = adapted()
    base, before = logits(llama()), logits(model)
    model.merge_adapter()
    merged = logits(model)
    fp.swap(model, "int8")
    assert close(logits(model), before) and not close(logits(model), base)
    for call in (model.unmerge_adapter, model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"8-bit weights of swapped layers.*fp\.restore"):
            call()
    with pytest.raises(RuntimeError, match=r"Linear\.unmerge would"), model.disable_adapter():
        logits(model)
    assert close(logits(model), before)
    fp.restore(model)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert close(logits(model), before)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_refuse_to_merge_too(move):
    model = adapted()
    fp.swap(model, "int8")
    other = move(model)
    with pytest.raises(RuntimeError, match="8-bit weights"):
        other.merge_and_unload()
    for layer in other.modules():
        if isinstance(layer, peft.tuners.lora.Linear) and isinstance(layer.base_layer, fp.nn.Int8Linear):
            with pytest.raises(RuntimeError, match="8-bit weights"):
                layer.merge(safe_merge=True)
            assert vars(layer)["merge"].module is layer
    fp.restore(model)
    assert torch.equal(logits(other), logits(other)) and not torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_adapters_that_read_the_weight_are_not_added_after(options):
    model = adapted(init_lora_weights=True)
    fp.swap(model, "int8")
    with pytest.raises(RuntimeError, match=r"plain LoRA alone.*fp\.restore"):
        model.add_adapter("late", config(**options))


def test_dora_stays():
    model = adapted(use_dora=True)
    before = logits(model)
    report = fp.swap(model, "int8")
    assert not [name for name in swapped_names(report) if "base_layer" in name]
    reason = {s.fqn: s.reason for s in report.skipped}["base_model.model.model.layers.0.self_attn.q_proj.base_layer"]
    assert reason.code == "adapter" and "may read its weight" in reason.text
    assert close(logits(model), before)
    fp.restore(model)
    assert torch.equal(logits(model), before)


#: tuner -> its options, and whether its forward only calls the layer below
_OTHERS = {
    "IA3Config": ({"feedforward_modules": ["down_proj"]}, True),
    "VeraConfig": ({}, True),
    "AdaLoraConfig": ({"total_step": 10}, True),
    "RandLoraConfig": ({}, True),
    "LoHaConfig": ({}, False),
    "LoKrConfig": ({}, False),
    "BOFTConfig": ({"boft_block_size": 4}, False),
    "HRAConfig": ({}, False),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", _OTHERS)
def test_other_tuners(name):
    options, swappable = _OTHERS[name]
    targets = ["q_proj", "down_proj"]
    torch.manual_seed(2)
    model = peft.get_peft_model(llama(), getattr(peft, name)(target_modules=targets, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    before = logits(model)
    report = fp.swap(model, "int8")
    assert any("base_layer" in name for name in swapped_names(report)) == swappable
    assert close(logits(model), before)
    fp.restore(model)
    assert torch.equal(logits(model), before)


class Adapter(nn.Module):
    """As peft's are."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.scale = nn.Linear(64, 64), nn.Parameter(torch.ones(64))

    def forward(self, x):
        return self.scaled(self.base_layer(x))

    def scaled(self, y):
        return y * self.scale


class Reads(Adapter):
    def scaled(self, y):
        return y * self.scale + self.base_layer.weight.mean()


class Aliases(Adapter):
    def forward(self, x):
        layer = self.base_layer
        return self.scaled(nn.functional.linear(x, layer.weight, layer.bias))


def outside(adapter, x):
    return nn.functional.linear(x, adapter.base_layer.weight)


class HandsOver(Adapter):
    def forward(self, x):
        return self.base_layer(x) + outside(self, x)


class Inherits(Reads):
    def forward(self, x):
        return super().forward(x)


class ByName(Adapter):
    def forward(self, x):
        return self.base_layer(x) + getattr(self, "base_layer").weight.mean()  # noqa: B009


@pytest.mark.parametrize("kind", [Adapter, Reads, Aliases, HandsOver, Inherits, ByName])
def test_what_the_code_of_an_adapter_shows(kind):
    model, x = nn.Sequential(kind(), nn.Linear(64, 64)).eval(), torch.randn(3, 64)
    with torch.no_grad():
        before = model(x)
        report = fp.swap(model, "int8")
        assert {layer.fqn for layer in report.swapped} == ({"0.base_layer", "1"} if kind is Adapter else {"1"})
        assert close(model(x), before)
        fp.restore(model)
        assert torch.equal(model(x), before)


def test_gpt2_has_its_transposed_layers_below_adapters():
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=104, n_positions=64)
    ).eval()
    model = adapted(gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    before = logits(model)
    report = fp.swap(model, "int8")
    assert len([name for name in swapped_names(report) if name.endswith("base_layer")]) == 4
    assert close(logits(model), before)
    fp.restore(model)
    assert torch.equal(logits(model), before)


def test_a_head_below_an_adapter_is_a_head_and_copies_that_peft_trains_stay():
    model = adapted(target_modules=["lm_head"], modules_to_save=["o_proj"])
    report = fp.swap(model, "int8")
    codes = {s.fqn.rpartition("model.")[2]: s.reason.code for s in report.skipped}
    assert codes["lm_head.base_layer"] == "lm_head"
    assert codes["layers.1.self_attn.o_proj.modules_to_save.default"] == "adapter"
    fp.restore(model)
    report = fp.swap(model, "int8", include=["lm_head"])
    assert "base_model.model.lm_head.base_layer" in swapped_names(report)


def test_patterns_name_the_layer_as_the_model_has_it():
    model = adapted()
    report = fp.swap(model, {"q_proj": "w8a16", "*_proj": "int8"}, exclude="v_proj")
    precisions = {layer.fqn: layer.precision for layer in report.swapped}
    assert precisions["base_model.model.model.layers.0.self_attn.q_proj.base_layer"] == "w8a16"
    assert not [name for name in precisions if "v_proj" in name]


def test_saving(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "before")
    fp.swap(model, "int8")
    model.save_pretrained(tmp_path / "adapter")  # which is floats alone
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("before", "adapter")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="PeftModel is none: use"):
        fp.export_pretrained(model, tmp_path / "export")
    with pytest.raises(RuntimeError, match=r"fp\.save_pretrained"):
        model.base_model.model.save_pretrained(tmp_path / "floats")
    fp.save_pretrained(model, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"PeftModel.* pass it as model="):
        fp.load_pretrained(tmp_path / "checkpoint")
    loaded = fp.load_pretrained(tmp_path / "checkpoint", model=adapted(llama().to("meta")))
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(RuntimeError, match="8-bit weights"):
        loaded.merge_and_unload()
    float_model = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    fp.restore(model)
    assert torch.equal(logits(float_model), logits(model))


def test_peft_does_not_save_a_head_in_8_bits(tmp_path):
    model = adapted()
    fp.swap(model, "int8", include=["lm_head", "q_proj"])
    with pytest.raises(RuntimeError, match="8-bit values"):
        model.save_pretrained(tmp_path)
    fp.restore(model)
    model.save_pretrained(tmp_path)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "targets", [["q_proj"], ["gate_proj"], ["gate_proj", "lm_head"], "all-linear", None, r".*\.up_proj"]
)
def test_adapters_for_swapped_layers_are_refused(targets, tmp_path):
    model = llama()
    before = logits(model)
    adapted(llama(), target_modules=targets).save_pretrained(tmp_path)
    fp.swap(model, "int8")
    during = logits(model)
    with pytest.raises(ValueError, match=r"which is swapped already: add adapters to the model as it was"):
        adapted(model, target_modules=targets)
    with pytest.raises(ValueError, match="swapped already"):
        peft.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), during)
    fp.restore(model)
    assert torch.equal(logits(model), before)
    assert peft.PeftModel.from_pretrained(model, tmp_path) is not None


def test_attention_of_torch_below_an_adapter_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), config(target_modules=["attention"], lora_dropout=0.0)).eval()
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        before = model(x)
        report = fp.swap(model, "int8", attention=True)
        assert "adapter" in {s.reason.code for s in report.skipped}
        assert torch.equal(model(x), before)


def test_unloading_leaves_the_swapped_layers():
    model = adapted()
    fp.swap(model, "int8")
    with model.disable_adapter():
        without = logits(model)
    assert torch.equal(logits(model.unload()), without)


@pytest.mark.every(2)
def test_compiled():
    model = adapted(lora_dropout=0.0)
    fp.swap(model, "int8")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 136)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


def test_below_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(adapted(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    before = logits(model)
    report = fp.swap(model, "int8")
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in swapped_names(report)
    assert close(logits(model), before)
    fp.restore(model)
    assert torch.equal(logits(model), before)
