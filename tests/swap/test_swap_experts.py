"""Models with experts: swapped, restored, stored, generating, and what stays with which reason."""

import pytest
import torch
from rotation import in_turn, paired
from small_models import build, codes, names

import forwardpass as fp
from forwardpass.proofs.walker import experts_leaves
from forwardpass.swap import precision as precision_module

_SIZES = {"vocab_size": 100, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 64, "intermediate_size": 96,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
#: Every expert is asked, as a router is no continuous function.
MODELS = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        **_SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 96}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **_SIZES, "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 96,
        "first_k_dense_replace": 0, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "num_key_value_heads": 4}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {
        **_SIZES, "head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 4}),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", {
        **_SIZES, "head_dim": 16, "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 4,
        "moe_intermediate_size": 96, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"]}),
    "nemotron_h": ("NemotronHForCausalLM", "NemotronHConfig", {
        **_SIZES, "head_dim": 16, "layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 4,
        "moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 96, "n_group": 1, "topk_group": 1}),
}  # fmt: skip
#: Of the logits. Gemma 4 normalises behind each block: its Linears alone bring 0.024.
OFF = {"gemma4": 0.05}
#: e4m3 has 3 bits of mantissa
COARSER = {"fp8": 4, "fp8_block": 4}
PRECISIONS = ("int8", "fp8", "fp8_block", "w8a16")


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """A precision whose Linears and experts have scales of blocks."""
    monkeypatch.setattr(precision_module, "PRECISIONS", list(precision_module.PRECISIONS))
    fp.register_precision(fp.Precision("fp8_block", 1, fp.nn.Fp8Linear, {"scales": "block"}, experts="fp8_block"))


def ids(tokens=12):
    return torch.randint(3, 100, (2, tokens), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, tokens=12):
    return model(input_ids=ids(tokens), attention_mask=torch.ones(2, tokens)).logits


def experts_of(model):
    return [leaf.fqn for leaf in experts_leaves(model)]


@pytest.mark.every(2)
@pytest.mark.filterwarnings("ignore:swap. fp8_.* has no kernel:UserWarning")
@pytest.mark.parametrize(("name", "precision"), paired(MODELS, PRECISIONS))
def test_architectures(name, precision, tmp_path):
    model = build(name, MODELS)
    before, experts = logits(model), experts_of(model)
    assert experts
    report = fp.swap(model, precision, include=["**", *experts], exclude="lm_head")
    assert set(experts) <= set(names(report))
    assert all(isinstance(model.get_submodule(fqn), fp.nn.Experts) for fqn in experts)
    assert report.weight_bytes.after < 0.6 * report.weight_bytes.before
    after = logits(model)
    assert 0 < (after - before).norm() / before.norm() < OFF.get(name, 0.02) * COARSER.get(precision, 1)
    parity = fp.parity(model, [{"input_ids": ids(), "attention_mask": torch.ones(2, 12)}])
    by_name = {layer.fqn: layer for layer in parity.layers}
    for fqn in experts:
        layer = by_name[fqn]
        assert layer.total.samples == 24 and layer.kernel.relative_error < 0.1 * layer.quantisation.relative_error
    generated = model.generate(ids(4), attention_mask=torch.ones(2, 4), max_new_tokens=4, do_sample=False)
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_pretrained(tmp_path)
    assert torch.equal(logits(loaded), after)
    assert torch.equal(
        loaded.generate(ids(4), attention_mask=torch.ones(2, 4), max_new_tokens=4, do_sample=False), generated
    )
    fp.restore(model)
    assert torch.equal(logits(model), before)
    again = fp.swap(model, plan=report.plan)
    assert names(again) == names(report) and torch.equal(logits(model), after)


def test_what_stays_and_why():
    model = build("mixtral", MODELS)
    (first, second) = experts_of(model)
    module = model.get_submodule(first)
    handle = module.register_forward_hook(lambda *_: None)
    report = fp.swap(model, "w8a16", dry_run=True)
    assert codes(report)[first] == "hooks" and second in names(report)
    handle.remove()
    report = fp.swap(model, "bf16", dry_run=True)
    assert codes(report)[first] == codes(report)[second] == "experts" and "there is no bf16 for experts" in str(report)
    assert codes(fp.swap(model, "w8a16", exclude=first, dry_run=True))[first] == "excluded"
    with torch.no_grad():
        module.down_proj[1, 2, 3] = torch.nan
    assert codes(fp.swap(model, "w8a16", dry_run=True))[first] == "not_finite"
    model.get_submodule(second).gate_up_proj = model.get_submodule(first).gate_up_proj
    assert codes(fp.swap(model, "w8a16", dry_run=True))[second] in ("tied", "shared")


def test_strict_speaks_of_experts():
    model = build("mixtral", MODELS)
    with pytest.raises(fp.Unsupported, match="there is no bf16 for experts"):
        fp.swap(model, "bf16", strict=True)
    for layer in model.model.layers:
        layer.mlp.experts.has_gate = None  # as a class that is not transformers' own
    with pytest.raises(fp.Unsupported, match="holds its experts' weights as one parameter"):
        fp.swap(model, "int8", strict=True)
    report = fp.swap(model, "int8", strict=True, exclude="experts")
    assert not report.warnings
    assert "fused_experts" not in codes(report).values()


def test_a_dry_run_is_the_same(tmp_path):
    model = build("qwen3_moe", MODELS)
    dry, report = fp.swap(model, "w8a16", dry_run=True), fp.swap(model, "w8a16")
    assert dry.to_json()["swapped"] == report.to_json()["swapped"]
    assert dry.weight_bytes.after == report.weight_bytes.after
    state = fp.swap(build("qwen3_moe", MODELS), "w8a16", calibrate=None).plan.to_json()
    assert state == report.plan.to_json()


def test_calibration_leaves_experts_as_they_would_be():
    model = build("mixtral", MODELS)
    report = fp.swap(
        model, "int8", include=["**", *experts_of(model)], exclude="lm_head", calibrate=[{"input_ids": ids(32)}]
    )
    planned = {layer.fqn: layer.calibrated for layer in report.plan.layers}
    assert [planned[fqn] for fqn in experts_of_report(report)] == [False, False] and any(planned.values())


def experts_of_report(report):
    return [s.fqn for s in report.swapped if s.fqn.endswith("experts")]


@pytest.mark.every(3)
@pytest.mark.parametrize("name", in_turn(["mixtral", "gpt_oss"]))
def test_compiled(name):
    model = build(name, MODELS)
    fp.swap(model, "w8a16")
    after = logits(model)
    compiled = torch.compile(model, dynamic=False)
    torch.testing.assert_close(logits(compiled), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_are_swapped_on_a_gpu(precision, arch):
    model = build("mixtral", MODELS).bfloat16()
    experts = experts_of(model)
    with fp.interpret(arch):
        report = fp.swap(model, precision, include=experts)
    if precision.startswith("fp8") and arch == "sm_80":
        assert codes(report).items() >= dict.fromkeys(experts, "no_fp8").items()
    else:
        assert set(experts) <= set(names(report))
