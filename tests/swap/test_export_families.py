"""Exports of families, read back by us and by compressed-tensors within transformers: right, or refused before there is a file."""

import pytest
import torch
import transformers
from rotation import paired
from small_models import outputs
from stored_formats import layers_of

import forwardpass as fp

pytest.importorskip("compressed_tensors")

_TOKENS = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
_TO_DECODER = {**_TOKENS, "decoder_input_ids": torch.arange(3, 11).reshape(2, 4)}
_PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()}
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
          "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
_OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "max_position_embeddings": 64, "word_embed_proj_dim": 64}  # fmt: skip
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 100,
    "decoder_start_token_id": 0,
}
_IMAGES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}

#: (class, config, inputs, the words of a refusal or None)
FAMILIES = {
    "llama": ("LlamaForCausalLM", _GROUPED, _TOKENS, None),
    "llama tied": ("LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, _TOKENS, None),
    "gemma": ("GemmaForCausalLM", _GROUPED, _TOKENS, None),
    "gpt2": ("GPT2LMHeadModel", _GPT, _TOKENS, r"h\.0\.attn\.c_attn is a Conv1D .*use fp\.save_pretrained"),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _GPT, _TOKENS, None),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_SIZES, "tie_word_embeddings": False}, _TOKENS, None),
    "gpt_neox tied": ("GPTNeoXForCausalLM", {**_SIZES, "tie_word_embeddings": True}, _TOKENS, None),
    "falcon": ("FalconForCausalLM", {**_SIZES, "intermediate_size": None}, _TOKENS, None),
    "opt": ("OPTForCausalLM", _OPT, _TOKENS, None),
    "bert": ("BertModel", _SIZES, _TOKENS, None),
    "mixtral": ("MixtralForCausalLM", {**_EXPERTS, "num_local_experts": 4}, _TOKENS, None),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32}, _TOKENS, None),
    "t5": ("T5ForConditionalGeneration", _T5, _TO_DECODER, None),
    "t5 untied": ("T5ForConditionalGeneration", {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
                  _TO_DECODER, None),
    "vit": ("ViTForImageClassification", {**_IMAGES, "intermediate_size": 128}, _PIXELS, None),
    "dinov2": ("Dinov2Model", _IMAGES, _PIXELS, r"mlp\.weights_in\.weight as one, .*use fp\.save_pretrained"),
}  # fmt: skip


def swapped(cls, config, precision):
    torch.manual_seed(0)
    model = getattr(transformers, cls)
    model = model(model.config_class(**{k: v for k, v in config.items() if v is not None})).eval()
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    fp.swap(
        model, precision, include="**", exclude=experts, encoder=False
    )  # an export does not say that layers are one
    return model


@pytest.mark.every(2)
@pytest.mark.parametrize(("family", "precision"), paired(FAMILIES, ["int8", "mixed"]))
@torch.inference_mode()
def test_read_back(family, precision, tmp_path):
    cls, config, x, refusal = FAMILIES[family]
    by_hand = {"**.0.**": "w8a16", "**": "int8"} if precision == "mixed" else precision
    model = swapped(cls, config, by_hand)
    if refusal:
        with pytest.raises(fp.Unsupported, match=refusal) as e:
            fp.export_pretrained(model, tmp_path / "new")
        assert "\n" not in str(e.value) and not (tmp_path / "new").exists()
        return
    y = outputs(model, x)
    fp.export_pretrained(model, tmp_path)
    ours = fp.load_pretrained(tmp_path)
    assert layers_of(ours).keys() == layers_of(model).keys()
    torch.testing.assert_close(outputs(ours, x), y, rtol=0, atol=2e-5 * y.abs().max())
    theirs, about = getattr(transformers, cls).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about.values()), about
    assert (outputs(theirs.eval(), x) - y).norm() < 0.02 * y.norm()


@torch.inference_mode()
def test_what_only_the_model_in_hand_has_is_refused(tmp_path):
    """Another head than the class builds, a layer less, one more: transformers would fail, or start it at random."""
    cls, config, _, _ = FAMILIES["llama"]
    wider, shorter, more = (swapped(cls, config, "int8") for _ in range(3))
    wider.lm_head = torch.nn.Linear(64, 120, bias=False)
    shorter.model.layers[1].mlp = torch.nn.Identity()
    more.model.layers[1].extra = torch.nn.Linear(64, 64)
    for model, words in (
        (
            wider,
            r"lm_head\.weight is \[120, 64\] here, and a LlamaForCausalLM that transformers builds has one of \[100, 64\]",
        ),
        (shorter, r"transformers builds has model\.layers\.1\.mlp\.\w+\.weight, and this model has not"),
        (more, r"extra\.weight is \[64, 64\] here, .* has no such tensor"),
    ):
        with pytest.raises(fp.Unsupported, match=words):
            fp.export_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
