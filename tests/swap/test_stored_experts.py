"""Experts of 8-bit checkpoints: one by one in the file, read into `fp.nn.Experts` byte by byte."""

import re
import warnings

import pytest
import torch
import transformers
from rotation import in_turn, paired
from safetensors.torch import load_file, save_file
from small_models import objects, outputs
from stored_formats import FORMATS, MIXTURES, edit, mixture, write
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.moe import use_experts_implementation

import forwardpass as fp
from forwardpass.nn.linear.quantized_linear import quantize_weight
from forwardpass.ops.common.activations import interleave_gate_up
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.proofs.walker import experts_leaves

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
#: format -> the kind of experts on a CPU, and on a GPU that multiplies fp8
KINDS = {
    "int8_token": ("int8", "int8"),
    "int8_static": ("int8", "int8"),
    "int8_packed": ("w8a16", "w8a16"),
    "fp8_token": ("w8a16_fp8", "fp8"),
    "fp8_static": ("w8a16_fp8", "fp8"),
    "fp8_block": ("w8a16_fp8_group", "fp8_block"),
    "deepseek": ("w8a16_fp8_group", "fp8_block"),
    "deepseek_powers_of_two": ("w8a16_fp8_group", "fp8_block"),
    "deepseek_static": ("w8a16_fp8", "fp8"),
    "modelopt": ("w8a16_fp8", "fp8"),
    "fbgemm": ("w8a16_fp8", "fp8"),
}
FINER = "ignore:inputs of experts are quantised row by row:UserWarning"


def experts_of(model):
    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, fp.nn.Experts)}


def dequantised(experts, name):
    """[E, N, K] in float64."""
    weight, scale = (getattr(experts, f"{name}_{part}") for part in ("weight", "scale"))
    n, k = weight.shape[1:]
    if scale.dim() == 2:
        return weight.double() * scale[..., None]
    columns = scale.repeat_interleave(128, -1)[..., :k]
    if scale.shape[1] == n:
        return weight.double() * columns
    if scale.dim() == 4:  # of gate and of up, whose rows are 8 of one and 8 of the other
        gate, up = columns.repeat_interleave(128, 2)[:, :, : n // 2].unbind(1)
        return weight.double() * torch.stack([interleave_gate_up(g, u) for g, u in zip(gate, up)])
    return weight.double() * columns.repeat_interleave(128, 1)[:, :n]


def check_weights(model, weights):
    """Those of the file, to the last bit."""
    names = ("w1", "w3", "w2") if any(".w1" in name for name in weights) else ("gate_proj", "up_proj", "down_proj")
    for fqn, experts in experts_of(model).items():
        for e in range(4):
            of_file = [
                weights.get(f"{fqn}.{e}.{n}", weights.get(f"{fqn.replace('.mlp.', '.block_sparse_moe.')}.{e}.{n}"))
                for n in names
            ]
            assert torch.equal(dequantised(experts, "up")[e], interleave_gate_up(*of_file[:2])), (fqn, e)
            assert torch.equal(dequantised(experts, "down")[e], of_file[2]), (fqn, e)


def with_weights(name, weights, folder):
    """The model in floats, of the weights that the file stands for."""
    mixture(name).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {f"{layer}.weight": w.float() for layer, w in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.every(2)
@pytest.mark.filterwarnings(FINER)
@pytest.mark.parametrize(("format", "name"), paired(KINDS, MIXTURES))
@torch.inference_mode()
def test_formats(name, format, tmp_path):
    weights = write(tmp_path / "theirs", format, mixture(name))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = fp.load_pretrained(tmp_path / "theirs")
    assert any("finer" in str(w.message) for w in said) == (format == "int8_static")
    experts = experts_of(model)
    assert experts and {m.kind for m in experts.values()} == {KINDS[format][0]}
    check_weights(model, weights)
    y, expected = outputs(model, X), outputs(with_weights(name, weights, tmp_path / "floats"), X)
    assert (y - expected).norm() < (1e-5 if KINDS[format][0].startswith("w8a16") else 0.3) * expected.norm()
    fp.save_pretrained(model, tmp_path / "ours")
    assert torch.equal(outputs(fp.load_pretrained(tmp_path / "ours"), X), y)


@pytest.mark.every(2)
@pytest.mark.filterwarnings(FINER)
@pytest.mark.parametrize("format", in_turn(KINDS, 2))
@torch.inference_mode()
def test_on_a_gpu(format, tmp_path):
    """On one without fp8 products weights are read as they are."""
    weights = write(tmp_path, format, mixture("Qwen3MoeForCausalLM"))
    for arch, kind in (("sm_80", KINDS[format][0]), ("sm_90a", KINDS[format][1])):
        with fp.interpret(arch):
            model = fp.load_pretrained(tmp_path)
        assert {m.kind for m in experts_of(model).values()} == {kind}
        check_weights(model, weights)


BROKEN = {
    "missing scale": (lambda t, n: t.pop(n), "or not all of one shape"),
    "shape of scale": (lambda t, n: t.update({n: torch.ones(7)}), "or not all of one shape"),
    "nan": (lambda t, n: t[n].fill_(torch.nan), "experts: its weight_scale holds values"),
    "zero": (lambda t, n: t[n].zero_(), "experts: its weight_scale holds values"),
    "unknown tensor": (lambda t, n: t.update({f"{n}_more": torch.ones(1)}), "gate_up_proj_scale_more is"),
    "no such expert": (lambda t, n: t.update({n.replace(".2.", ".9."): t[n].clone()}), "or not all of one shape"),
    "other sizes": (lambda t, n: [t.update({m: t[m][:64].clone()}) for m in t if re.search(r"experts\.\d\.(gate|up)", m)],
                    r"an expert's gate_up_proj is \[64, 256\] in the file, and \[192, 256\] in the model"),
    "floats": (lambda t, n: [t.update({m: t[m].float()}) for m in t if ".down_proj.weight" in m],
               "one of its projections holds 8 bits"),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, tmp_path):
    change, words = BROKEN[name]
    write(tmp_path, "int8_token", mixture("Qwen3MoeForCausalLM"))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.2.up_proj.weight_scale")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words) as e:
        fp.load_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def test_packed_weights_of_another_size(tmp_path):
    write(tmp_path, "int8_packed", mixture("Qwen3MoeForCausalLM"))
    edit(tmp_path, moe_intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"expert 0's gate_up_proj is \[192, 256\] in the file, and \[96, 256\] in the model"
    ):
        fp.load_pretrained(tmp_path)


@pytest.mark.every(2)
@pytest.mark.parametrize("format", [f for f in FORMATS if f not in KINDS and f != "int8_asymmetric"])
def test_formats_without_experts(format, tmp_path):
    write(tmp_path, format, mixture("Qwen3MoeForCausalLM"))
    with pytest.raises(ValueError, match="instead") as e:
        fp.load_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def taken(original, config, block, scheme="dynamic"):
    """transformers' module of the weights of another one, in e4m3, and those weights."""
    cls = use_experts_implementation(experts_class=FP8Experts)
    new, scales, weights = cls(config, block, scheme), "block" if block else "tensor", {}
    for name in ("gate_up_proj", "down_proj"):
        stack, scale = getattr(new, name), getattr(new, f"{name}_scale_inv")
        parts = 2 if name == "gate_up_proj" else 1
        of_experts = []
        for e, w in enumerate(getattr(original, name).detach()):
            quantized = [quantize_weight(part, E4M3, scales) for part in w.chunk(parts)]
            stack.data[e] = torch.cat([q for q, _ in quantized])
            scale.data[e] = torch.cat([s for _, s in quantized]).reshape(scale.shape[1:])
            wide = [
                s.repeat_interleave(128, 0)[: q.shape[0]].repeat_interleave(128, 1)[:, : q.shape[1]] if block else s
                for q, s in quantized
            ]
            of_experts.append([q.double() * s for (q, _), s in zip(quantized, wide)])
        weights[name] = of_experts
    return new.eval(), weights


@pytest.mark.filterwarnings(FINER)
@pytest.mark.parametrize(("block", "scheme"), [((128, 128), "dynamic"), (None, "dynamic"), (None, "static")])
@torch.inference_mode()
def test_taken_over(block, scheme):
    """The experts of a model that transformers has loaded."""
    model = mixture("Qwen3MoeForCausalLM", moe_intermediate_size=256)
    expected = outputs(model, X)
    weights = {}
    for leaf in experts_leaves(model):
        new, weights[leaf.fqn] = taken(leaf.module, model.config, block, scheme)
        model.set_submodule(leaf.fqn, new)
    before = objects(model)
    report = fp.swap(model)
    assert {s.fqn for s in report.swapped} == weights.keys()
    for fqn, experts in experts_of(model).items():
        for e in range(4):
            up = weights[fqn]["gate_up_proj"][e]
            up = torch.cat(up) if experts.activation is None else interleave_gate_up(*up)
            assert torch.equal(dequantised(experts, "up")[e], up)
            assert torch.equal(dequantised(experts, "down")[e], weights[fqn]["down_proj"][e][0])
    y = outputs(model, X)
    assert 0 < (y - expected).norm() < 0.08 * expected.norm()
    fp.restore(model)
    assert objects(model)[0] == before[0]
