"""Tiny models with random weights, of the architectures that people swap, and a batch for each."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "bert": ("BertModel", "BertConfig", _DECODER),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, **_SPECIAL},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "num_key_value_heads": 4}),
    "llama_tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_key_value_heads": 4, "num_local_experts": 4}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "vocab_size": 100,
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            **_SPECIAL,
        },
    ),
}


#: The same and others with heads of 32, which kernels take, and what attention has besides: windows that are shorter than the
#: batches, softcap, sinks, GQA. Every expert is asked, as a router is no continuous function.
_WIDE = {**_DECODER, "hidden_size": 128, "max_position_embeddings": 128}
_LONG = {**_DECODER, "head_dim": 32, "num_key_value_heads": 2, "max_position_embeddings": 128, **_SPECIAL}
ATTENTION = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LONG),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LONG, "sliding_window": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_LONG, "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_LONG,
            "sliding_window": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LONG),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_LONG,
            "sliding_window": 6,
            "query_pre_attn_scalar": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "bert": ("BertModel", "BertConfig", _WIDE),
    "vit": ("ViTModel", "ViTConfig", {**CONFIGS["vit"][2], "hidden_size": 128}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**CONFIGS["t5"][2], "d_kv": 32, "decoder_start_token_id": 0}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**CONFIGS["whisper"][2], "d_model": 128, "max_target_positions": 128},
    ),
}

_IMAGES = CONFIGS["vit"][2]
#: MLPs as they are written: two layers, three, gate and up as one, with dropouts, and with what T5 has around its last layer.
MLPS = {
    **{name: CONFIGS[name] for name in ("llama", "gpt2", "vit", "t5")},
    "t5_gated": ("T5ForConditionalGeneration", "T5Config", {**CONFIGS["t5"][2], "feed_forward_proj": "gated-gelu"}),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_DECODER, "pad_token_id": 0}),
    "gemma3": ATTENTION["gemma3"],
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**_DECODER, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "mlp_dropout": 0.5},
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {**_IMAGES, "hidden_act": "gelu"}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGES),
}


def build(name, configs=CONFIGS):
    model, config, options = configs[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def batch(name, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (2, 10), generator=g)
    if name in ("vit", "clip", "siglip"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=g)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 16, 32, generator=g), "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **({"decoder_input_ids": ids[:, :7]} if name.startswith("t5") else {}),
    }


@torch.inference_mode()
def outputs(model, inputs):
    """The first output of a Hugging Face model, or what another model returns."""
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def of_tokens(output, inputs):
    """Rows of an output [B, S, ...] that are no padding, of which a swapped encoder has none."""
    mask = inputs.get("attention_mask")
    return output if mask is None or mask.shape != output.shape[:2] else output[mask.bool()]


class TwoLayers(nn.Module):
    """The plainest MLP."""

    def __init__(self, width=64):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(width, 128), nn.Linear(128, width), nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A plain model: two layers that can be swapped, a head that is too small."""

    def __init__(self, width=64):
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Attention(nn.Module):
    """As vision transformers write it: one projection, heads first, torch's function."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A small one, of images [B, 3, 32, 32] to 10 logits."""

    def __init__(self, width=64, heads=2, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(torch.randn(16, width))
        self.blocks = nn.Sequential(*(VisionBlock(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT + self.position
        return self.head(self.blocks(x).mean(1))


def block(width=64):
    torch.manual_seed(0)
    return Block(width).eval()


def inputs(rows=256, seed=2):
    """For a block: an outlier channel, as activations have."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    x[:, 7] *= 30
    return x


def objects(model):
    """What must not change: every module, parameter and buffer, by identity, and what they hold."""
    modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return modules, {n: (id(t), t.dtype, t.requires_grad, t.detach().clone()) for n, t in tensors.items()}


def bits(t):
    return t.reshape(-1).view(torch.uint8)  # NaN equals itself


def assert_same_objects(model, before):
    modules, tensors = objects(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (*identity, values) in tensors.items():
        assert identity == list(before[1][name][:3]), name
        assert torch.equal(bits(values), bits(before[1][name][3])), name


def codes(report):
    return {s.fqn: s.reason.code for s in report.skipped if s.bytes is None}  # without convolutions


def names(report):
    return [s.fqn for s in report.swapped]
