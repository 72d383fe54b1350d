"""Layers that a swap leaves as they are, and what the report says of them: lazy, of other kinds, slower in int8 on this CPU; and
subclasses that it takes."""

import pytest
import torch
from small_models import assert_same_objects, build, codes, names, objects, outputs
from torch import nn

import forwardpass as fp
from forwardpass.common import environment
from forwardpass.swap import rules
from forwardpass.swap.rules import LEAST_SIZES_ON_CPU


class Dotted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        setattr(self, "a.b", nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.MultiheadAttention(64, 2)))
        self.plain = nn.Sequential(nn.Linear(64, 64))
        self.plain._modules["act.x"] = nn.GELU()

    def forward(self, x):
        x = self._modules["a.b"][0](x)
        return self.plain(self._modules["a.b"][2](x, x, x)[0])


def test_names_with_a_dot_stay_through_swap_plan_and_checkpoint(tmp_path):
    model, x = Dotted().eval(), torch.randn(3, 64)
    before, exact = objects(model), outputs(model, x)
    report = fp.swap(model, "int8", attention=True)
    assert names(report) == ["plain.0"] and set(codes(report).values()) == {"dotted"} and len(codes(report)) == 4
    after = outputs(model, x)
    assert 0 < (after - exact).norm() < 0.03 * exact.norm()
    fp.parity(model, [x])
    fp.save_pretrained(model, tmp_path)
    assert torch.equal(outputs(fp.load_pretrained(tmp_path, Dotted().eval()), x), after)
    fp.restore(model)
    assert_same_objects(model, before)
    fp.swap(model, plan=report.plan)
    assert torch.equal(outputs(model, x), after)


def test_a_lazy_layer_stays_until_it_has_been_called():
    model, x = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64), nn.LazyBatchNorm1d()).eval(), torch.randn(3, 80)
    report = fp.swap(model, "int8")
    assert names(report) == ["1"] and codes(report) == {"0": "uninitialized"}
    fp.restore(model)
    model(x)
    assert names(fp.swap(model, "int8")) == ["0", "1"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
        ("transformers.models.esm.modeling_esmfold", "EsmFoldLinear"),
        ("timm.layers.linear", "Linear"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_subclasses_that_compute_a_linear(module, name, bias):
    torch.manual_seed(0)
    layer = getattr(pytest.importorskip(module), name)(80, 64, bias=bias)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 80)
    linear = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), linear, rtol=1e-5, atol=1e-5)  # what the table of their names says
    model = nn.Sequential(layer)
    assert names(fp.swap(model, "int8")) == ["0"]
    assert (outputs(model, x) - linear).norm() < 0.02 * linear.norm()
    fp.restore(model)
    assert model[0] is layer


def test_a_falcon_is_swapped():
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    report = fp.swap(FalconForCausalLM(config).eval(), "int8", attention=False)
    assert len(names(report)) == 8 and {c for c in codes(report).values() if c != "attention_off"} == {"lm_head"}


class Mixed(nn.Module):
    """Layers of other kinds, and a norm too small to speak of."""

    def __init__(self):
        super().__init__()
        self.embedding, self.conv, self.lstm = nn.Embedding(200, 64), nn.Conv1d(64, 64, 3), nn.LSTM(64, 64)
        self.convs = nn.ModuleList([nn.Conv1d(1, 1, 1)])
        self.first, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.table = nn.Parameter(torch.zeros(4, 64, 64))


def test_what_is_neither_linear_nor_attention_is_reported():
    report = fp.swap(Mixed().eval(), "int8", dry_run=True)
    layers = [(x.module, x.first, x.count, x.bytes, x.reason.code) for x in report.other_layers]
    assert layers == [
        ("LSTM", "lstm", 1, 4 * 8 * 64 * 65, "recurrent"),
        ("Mixed", "", 1, 4 * 4 * 64 * 64, "own_weights"),
        ("Embedding", "embedding", 1, 4 * 200 * 64, "embedding"),
        ("Conv1d", "conv", 2, 4 * (3 * 64 * 64 + 64 + 2), "convolution"),
    ]
    assert all(f"{bytes_:,}" in str(report) for *_, bytes_, _ in layers)
    assert report.to_json()["other_layers"][0] == {
        "module": "LSTM",
        "first": "lstm",
        "count": 1,
        "bytes": 133120,
        "code": "recurrent",
        "text": "recurrent layers have no kernel here",
        "fix": "leave it",
    }
    assert [x.module for x in fp.swap(build("mixtral"), "int8", dry_run=True).other_layers] == [
        "Embedding"
    ]  # experts: skipped
    assert fp.swap(nn.TransformerEncoderLayer(256, 4, 256).eval(), "int8", dry_run=True).other_layers == []


def test_the_report_says_which_activations_layers_took_over():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    lines = str(fp.swap(model, "int8")).splitlines()
    assert any("int8 v1 + gelu" in line for line in lines) and sum("gelu" in line for line in lines) == 1


@pytest.mark.parametrize("tier", ["avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"])
def test_a_cpu_keeps_layers_that_int8_would_slow_down(monkeypatch, tier):
    sizes = {"avx2": (102400, 256), "avx512": (102400, 256)}
    elements, side = sizes.get(tier, (65536, 64))
    monkeypatch.setattr(rules, "LEAST_SIZES_ON_CPU", LEAST_SIZES_ON_CPU)
    monkeypatch.setattr(rules, "cpu_tier", lambda: tier)
    long = elements // (side - 1) + 1
    model = nn.Sequential(*(nn.Linear(k, n) for n, k in ((side, elements // side), (side, elements // side - 1),
                                                         (side - 1, long), (long, side - 1))))  # fmt: skip
    report = fp.swap(model, "int8", dry_run=True)
    assert [s.fqn for s in report.swapped] == ["0"] and {s.reason.code for s in report.skipped} == {"too_small"}
    assert f"too small to gain on this CPU, below {elements} weights with {side} rows" in " ".join(str(report).split())
    assert len(fp.swap(model, "int8", include=list("0123"), dry_run=True).swapped) == 4  # spelled out
    assert len(fp.swap(model, "w8a16", dry_run=True).swapped) == 4  # was not measured
    with fp.interpret("sm_90a"):  # as on a GPU
        assert len(fp.swap(model, "int8", dry_run=True).swapped) == 4


def test_a_cpu_without_int8_instructions_keeps_its_layers(monkeypatch):
    monkeypatch.setattr(environment, "INT8_INSTRUCTIONS", {})
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    report = fp.swap(model, "int8", dry_run=True)
    assert {s.reason.code for s in report.skipped} == {"no_int8_instructions"} and not report.swapped
    assert "multiplies int8 as fp32" in str(report)
    assert [s.fqn for s in fp.swap(model, "int8", include=["1"], dry_run=True).swapped] == ["1"]  # spelled out
    assert len(fp.swap(model, "bf16", dry_run=True).swapped) == 2
    with fp.interpret("sm_90a"):  # whose kernels have what multiplies int8
        assert len(fp.swap(model, "int8", dry_run=True).swapped) == 2
