"""Many architectures of transformers, small: outputs and greedy tokens with swapped attention beside their eager attention's."""

import pytest
import torch
from rotation import in_turn

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted

transformers = pytest.importorskip("transformers")

_ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100,
            "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
_DECODER = {**_ENCODER, "num_hidden_layers": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_WINDOW = {**_DECODER, "sliding_window": 6}
_SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 100, "max_position_embeddings": 128}  # fmt: skip
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "num_key_value_heads": 4}  # fmt: skip

#: model type -> (what its Auto class is for, its options)
TEXT = {
    **{name: ("CausalLM", _WINDOW) for name in ("cohere2", "olmo3", "phi3", "qwen3", "smollm3", "starcoder2")},
    **{
        name: ("CausalLM", _DECODER)
        for name in ("arcee", "bitnet", "cohere", "diffllama", "ernie4_5", "granite", "nemotron", "olmo2", "phi", "stablelm")
    },
    **{name: ("CausalLM", {**_DECODER, "head_dim": 16}) for name in ("gemma", "glm", "glm4", "helium", "seed_oss")},
    **{name: ("MaskedLM", _ENCODER) for name in ("albert", "bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta")},
    **{name: ("Seq2SeqLM", _SEQ2SEQ) for name in ("bart", "m2m_100", "mbart", "pegasus")},
    **{name: ("Seq2SeqLM", _T5) for name in ("mt5", "umt5")},
    "deepseek_v3": ("CausalLM", {**_DECODER, **_MLA}),
    "gemma3_text": ("CausalLM", {**_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt_neox": ("CausalLM", _ENCODER),
    "llama4_text": (
        "CausalLM",
        {**_DECODER, "attention_chunk_size": 6, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16,
         "intermediate_size_mlp": 64},
    ),
    "modernbert": (
        "MaskedLM",
        {**_ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 3, "sep_token_id": 4,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": (
        "CausalLM",
        {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
         "max_position_embeddings": 128, "word_embed_proj_dim": 64},
    ),
    "phimoe": ("CausalLM", {**_WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2}),
    "qwen2": ("CausalLM", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3_moe": ("CausalLM", {**_WINDOW, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "vaultgemma": ("CausalLM", {**_WINDOW, "head_dim": 16}),
}  # fmt: skip

_VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
           "patch_size": 8}  # fmt: skip
_AUDIO = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": (32, 32),
          "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 4,
          "num_conv_pos_embeddings": 16, "vocab_size": 20}  # fmt: skip
OTHERS = {
    **{name: _VISION for name in ("beit", "deit", "dinov2", "dinov3_vit", "siglip_vision_model", "videomae")},
    "beit": {**_VISION, "use_relative_position_bias": True},
    "swin": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "segformer": {},
    **{name: _AUDIO for name in ("hubert", "wav2vec2")},
}


def build(name, purpose, options):
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModel{'For' if purpose else ''}{purpose}")
    model = auto.from_config(transformers.AutoConfig.for_model(name, **options)).eval()
    model.set_attn_implementation("eager")
    return model


def compare(model, run):
    expected = run()
    report = fp.swap(model, attention=True)
    with counted(Calls()) as calls:
        got = run()
    assert report.attention
    assert not {s.reason.code for s in report.skipped} - {"no_precision", "fused_experts"}
    assert {reason.code for _, reason in calls.fallbacks} <= {"need_weights"}  # siglip's pooling
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)
    fp.restore(model)
    for x, y in zip(run(), expected):
        assert torch.equal(x, y)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", in_turn(TEXT, 4))
@torch.inference_mode()
def test_text(name):
    purpose, options = TEXT[name]
    model = build(name, purpose, options)
    ids = torch.randint(5, 99, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0

    def run():
        decoder = {"decoder_input_ids": ids[:, :7]} if purpose == "Seq2SeqLM" else {}
        whole, padded = model(input_ids=ids, **decoder)[0], model(input_ids=ids, attention_mask=mask, **decoder)[0]
        results = [whole, padded if decoder else padded[mask.bool()]]
        if purpose != "MaskedLM":
            results.append(
                model.generate(input_ids=ids, attention_mask=mask.flip(1), max_new_tokens=10, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
            )  # fmt: skip
        return results

    compare(model, run)


@pytest.mark.parametrize("name", in_turn(OTHERS, 3))
@torch.inference_mode()
def test_images_and_sound(name):
    model = build(name, "", OTHERS[name])
    g = torch.Generator().manual_seed(1)
    if OTHERS[name] is _AUDIO:
        mask = torch.ones(2, 800, dtype=torch.long)
        mask[1, 400:] = 0
        inputs = {"input_values": torch.randn(2, 800, generator=g), "attention_mask": mask}
    else:
        size = 64 if name == "segformer" else 32
        inputs = {"pixel_values": torch.randn(*((2, 16) if name == "videomae" else (2,)), 3, size, size, generator=g)}
    compare(model, lambda: [model(**inputs)[0]])
