"""fp.plan of a model with experts: a module of experts is a layer, timed on routings, chosen like any."""

import pytest
import torch
from small_models import build, names

import forwardpass as fp
from forwardpass.planning.candidates.measure import sample_inputs
from forwardpass.proofs.walker import experts_leaves
from forwardpass.swap import precision

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MODEL = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 4})
}


@pytest.mark.every(3)
def test_experts_are_chosen_like_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "PRECISIONS", list(precision.PRECISIONS))
    fp.register_precision(fp.Precision("fp8_block", 1, fp.nn.Fp8Linear, {"scales": "block"}, experts="fp8_block"))
    model = build("mixtral", MODEL)
    experts = [leaf.fqn for leaf in experts_leaves(model)]
    batches = [
        {"input_ids": torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(i))} for i in (1, 2)
    ]
    with torch.inference_mode():
        before = model(**batches[0]).logits
    options = {
        "candidates": ["int8", "int8+calibrated", "fp8", "fp8_block", "bf16"],
        "max_error": 0.1,
        "target": "memory",
        "calibrate": batches,
    }
    plan = fp.plan(model, batches, shapes=[batches[0], fp.Decoding(1, 8, 2)], resume=tmp_path / "part", **options)
    rows = {row["fqn"]: row for row in plan.evidence["layers"]}
    assert {layer.fqn: layer.precision for layer in plan.layers if layer.fqn in experts} == dict.fromkeys(
        experts, "int8"
    )
    for fqn in experts:
        assert rows[fqn]["calls"] == {"forward": [[24, 64, 4]], "prefill": [[8, 64, 4]], "decode": [[1, 64, 4]]}
        told = rows[fqn]["candidates"]
        assert 0 < told["int8"]["error"] < 0.03 and told["int8"]["kernel"] < 0.1 * told["int8"]["quantisation"]
        assert (
            told["bf16"]["refused"]["code"] == "experts"
            and told["fp8"]["refused"]["code"] == "reference"  # a CPU has no kernel for it
            and told["fp8_block"]["refused"]["code"] == "reference"
            and told["int8+calibrated"]["refused"]["code"] == "not_calibrated"
        )
    assert str(plan)
    plan.save(tmp_path / "plan.json")
    report = fp.swap(model, plan=tmp_path / "plan.json", calibrate=batches if plan.calibrated else None)
    assert set(experts) < set(names(report))
    with torch.inference_mode():
        assert 0 < (model(**batches[0]).logits - before).norm() / before.norm() < 0.1


def test_tokens_choose_each_expert_once():
    (leaf, _) = experts_leaves(build("mixtral", MODEL))
    x, index, weights = sample_inputs(leaf, (40, 64, 3))
    assert (x.shape, index.shape, weights.shape) == ((40, 64), (40, 3), (40, 3))
    assert (
        all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 4 for row in index.tolist())
        and len(index.unique()) == 4
    )


@pytest.mark.every(2)
def test_w8a16_of_experts_is_planned_on_a_gpu():
    """Whether w8a16 has a kernel there is asked before there is a call."""
    model = build("mixtral", {"mixtral": (*MODEL["mixtral"][:2], {**MODEL["mixtral"][2], "num_hidden_layers": 1})})
    model = model.bfloat16()
    (leaf,) = experts_leaves(model)
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    with fp.interpret("sm_90a"):
        options = {"candidates": ["w8a16"], "max_error": 0.1, "target": "memory", "include": [leaf.fqn]}
        plan = fp.plan(model, [batch], shapes=[batch], **options)  # and no steps of decoding, which are slow there
    assert {layer.fqn: layer.precision for layer in plan.layers}[leaf.fqn] == "w8a16"
