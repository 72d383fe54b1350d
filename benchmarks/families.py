"""Small models of many families with random weights, each swapped: which rewritings were made, which were not and why, how long the
swap takes, and how far the output moves.

    python -m benchmarks.families [--only PART] [--precision int8] [--json FILE]

A family that the installed library does not have, or cannot build, is a row that says so.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench
from forwardpass.common.batches import main_output
from forwardpass.common.models.compare import relative_error

Inputs = dict[str, Any] | tuple[Any, ...]

_SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "vocab_size": 512, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
                          "eos_token_id": 2}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 64}
_GPT = {
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 512,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_SPEECH = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": (32, 32),
           "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
           "vocab_size": 64}  # fmt: skip
_IMAGES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
           "patch_size": 8}  # fmt: skip
_SEQ2SEQ = {"d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "vocab_size": 512, "max_position_embeddings": 128,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
_T5 = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4, "vocab_size": 512,
       "decoder_start_token_id": 0}  # fmt: skip
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 96, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}

_IDS = {"input_ids": torch.arange(3, 51).reshape(2, 24), "attention_mask": torch.ones(2, 24, dtype=torch.long)}
_TOKENS = {"input_ids": _IDS["input_ids"]}
_PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()}
_WAVE = {"input_values": torch.linspace(0, 200, 2 * 4000).reshape(2, 4000).sin()}
_DECODER = {**_TOKENS, "decoder_input_ids": torch.arange(3, 19).reshape(2, 8)}
_IMAGE_AND_TEXT = {**_IDS, **_PIXELS}


@dataclass(frozen=True)
class Family:
    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs


def _of_transformers(cls: str, options: dict[str, Any], inputs: Inputs) -> Family:
    def make() -> nn.Module:
        import transformers

        model = getattr(transformers, cls)
        made: nn.Module = model(model.config_class(**options))
        return made

    return Family("transformers", cls, make, inputs)


_TRANSFORMERS: tuple[tuple[str, dict[str, Any], Inputs], ...] = (
    ("BertModel", _SIZES, _IDS),
    ("RobertaModel", _SIZES, _IDS),
    ("XLMRobertaModel", _SIZES, _IDS),
    ("DistilBertModel", {"dim": 256, "hidden_dim": 512, "n_layers": 2, "n_heads": 4, "vocab_size": 512}, _IDS),
    ("ElectraModel", {**_SIZES, "embedding_size": 256}, _IDS),
    ("MPNetModel", _SIZES, _IDS),
    ("ModernBertModel", {**_SIZES, "cls_token_id": 1, "sep_token_id": 2}, _IDS),
    ("DebertaV2Model", _SIZES, _IDS),
    ("AlbertModel", {**_SIZES, "embedding_size": 128}, _IDS),
    ("LlamaForCausalLM", _GROUPED, _TOKENS),
    ("MistralForCausalLM", _GROUPED, _TOKENS),
    ("Qwen2ForCausalLM", _GROUPED, _TOKENS),
    ("Qwen3ForCausalLM", _GROUPED, _TOKENS),
    ("Gemma2ForCausalLM", _GROUPED, _TOKENS),
    ("Gemma3ForCausalLM", _GROUPED, _TOKENS),
    ("PhiForCausalLM", _SIZES, _TOKENS),
    ("Phi3ForCausalLM", {**_SIZES, "num_key_value_heads": 2}, _TOKENS),
    ("Olmo2ForCausalLM", _GROUPED, _TOKENS),
    ("SmolLM3ForCausalLM", _GROUPED, _TOKENS),
    ("GraniteForCausalLM", _GROUPED, _TOKENS),
    ("CohereForCausalLM", _GROUPED, _TOKENS),
    ("StableLmForCausalLM", _GROUPED, _TOKENS),
    ("Starcoder2ForCausalLM", _GROUPED, _TOKENS),
    ("Glm4ForCausalLM", _GROUPED, _TOKENS),
    ("GPT2LMHeadModel", _GPT, _TOKENS),
    ("GPTNeoXForCausalLM", _SIZES, _TOKENS),
    ("GPTJForCausalLM", {**_GPT, "rotary_dim": 32}, _TOKENS),
    ("GPTBigCodeForCausalLM", _GPT, _TOKENS),
    ("FalconForCausalLM", {**_SIZES, "intermediate_size": 512, "ffn_hidden_size": 512}, _TOKENS),
    ("BloomForCausalLM", {"hidden_size": 256, "n_layer": 2, "n_head": 4, "vocab_size": 512}, _TOKENS),
    ("OPTForCausalLM", {**_SIZES, "ffn_dim": 512, "word_embed_proj_dim": 256}, _TOKENS),
    ("MixtralForCausalLM", {**_EXPERTS, "num_local_experts": 4}, _TOKENS),
    ("Qwen3MoeForCausalLM", {**_EXPERTS, "num_experts": 4}, _TOKENS),
    ("GptOssForCausalLM", {**_EXPERTS, "num_local_experts": 4}, _TOKENS),
    ("MambaForCausalLM", {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 512}, _TOKENS),
    ("T5ForConditionalGeneration", _T5, _DECODER),
    ("UMT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, _DECODER),
    ("BartForConditionalGeneration", _SEQ2SEQ, _DECODER),
    ("MarianMTModel", _SEQ2SEQ, _DECODER),
    ("WhisperForConditionalGeneration",
     {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 64},
     {"input_features": torch.linspace(-1, 1, 2 * 16 * 32).reshape(2, 16, 32).sin(),
      "decoder_input_ids": _DECODER["decoder_input_ids"]}),
    ("ViTModel", _IMAGES, _PIXELS),
    ("DeiTModel", _IMAGES, _PIXELS),
    ("BeitModel", _IMAGES, _PIXELS),
    ("Dinov2Model", {**_IMAGES, "mlp_ratio": 2}, _PIXELS),
    ("SwinModel", _SWIN, _PIXELS),
    ("SegformerModel", {"hidden_sizes": [64, 128, 256, 256], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]},
     _PIXELS),
    ("CLIPModel", {"text_config": _SIZES, "vision_config": _IMAGES, "projection_dim": 256}, _IMAGE_AND_TEXT),
    ("SiglipModel", {"text_config": {**_SIZES, "max_position_embeddings": 24}, "vision_config": _IMAGES}, _IMAGE_AND_TEXT),
    ("Wav2Vec2Model", _SPEECH, _WAVE),
    ("HubertModel", _SPEECH, _WAVE),
)  # fmt: skip


def _of_timm(name: str, side: int = 32, **options: Any) -> Family:
    pixels = torch.linspace(-1, 1, 2 * 3 * side * side).reshape(2, 3, side, side).sin()
    return Family("timm", name, lambda: importlib.import_module("timm").create_model(name, **options), (pixels,))


def _of_torchvision(name: str, **options: Any) -> Family:
    models = "torchvision.models"
    return Family(
        "torchvision",
        name,
        lambda: getattr(importlib.import_module(models), name)(**options),
        (_PIXELS["pixel_values"],),
    )


def _of_diffusers(name: str, inputs: Inputs, **options: Any) -> Family:
    return Family("diffusers", name, lambda: getattr(importlib.import_module("diffusers"), name)(**options), inputs)


def _sentence_transformer(pooling: str) -> Family:
    """A model, its pooling and a dense layer, without a tokenizer: features go in as a tokenizer would give them."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            import transformers

            modules = importlib.import_module("sentence_transformers.models")
            self.transformer = transformers.BertModel(transformers.BertConfig(**_SIZES))
            self.pooling, self.dense = modules.Pooling(256, pooling), modules.Dense(256, 256)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            tokens = self.transformer(input_ids, attention_mask).last_hidden_state
            features = {"token_embeddings": tokens, "attention_mask": attention_mask}
            embedding: Tensor = self.dense(self.pooling(features))["sentence_embedding"]
            return embedding

    return Family("sentence-transformers", f"BERT, {pooling}, Dense", Encoder, _IDS)


_HEADS = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 2}
_LATENTS = torch.linspace(-1, 1, 2 * 4 * 64).reshape(2, 4, 8, 8).sin()
_CONTEXT = torch.linspace(-1, 1, 2 * 7 * 256).reshape(2, 7, 256).sin()

FAMILIES: tuple[Family, ...] = (
    *(_of_transformers(*x) for x in _TRANSFORMERS),
    _of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=256, depth=2, num_heads=4),
    _of_timm("deit3_small_patch16_224", img_size=32, patch_size=8, depth=2),
    _of_timm("eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=256, depth=2, num_heads=4),
    _of_timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1, 1, 1)),
    _of_timm("mixer_s32_224", side=64, img_size=64),
    _of_timm("convnext_tiny", depths=(1, 1, 1, 1)),
    _of_timm("resnet18"),
    _of_torchvision("VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=256, mlp_dim=512),
    _of_torchvision("SwinTransformer", patch_size=[2, 2], embed_dim=64, depths=[1, 1], num_heads=[2, 4], window_size=[4, 4]),
    _of_torchvision("convnext_tiny"),
    _of_torchvision("resnet18"),
    _of_diffusers("DiTTransformer2DModel",
                  {"hidden_states": _LATENTS, "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])},
                  **_HEADS, in_channels=4, out_channels=8, sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
                  norm_num_groups=4),
    _of_diffusers("FluxTransformer2DModel",
                  {"hidden_states": torch.randn(1, 15, 4), "encoder_hidden_states": _CONTEXT[:1], "timestep": torch.tensor([0.5]),
                   "pooled_projections": torch.randn(1, 256), "img_ids": torch.randn(15, 3), "txt_ids": torch.randn(7, 3)},
                  **_HEADS, num_single_layers=2, patch_size=1, in_channels=4, joint_attention_dim=256,
                  pooled_projection_dim=256, axes_dims_rope=[16, 24, 24]),
    _of_diffusers("SD3Transformer2DModel",
                  {"hidden_states": _LATENTS, "encoder_hidden_states": _CONTEXT, "timestep": torch.tensor([1, 2]),
                   "pooled_projections": torch.randn(2, 256)},
                  **_HEADS, sample_size=8, patch_size=2, in_channels=4, caption_projection_dim=256, joint_attention_dim=256,
                  pooled_projection_dim=256, out_channels=4),
    _of_diffusers("UNet2DConditionModel",
                  {"sample": _LATENTS, "timestep": torch.tensor([1, 2]), "encoder_hidden_states": _CONTEXT},
                  sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 256),
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                  cross_attention_dim=256, attention_head_dim=4, norm_num_groups=8),
    *(_sentence_transformer(pooling) for pooling in ("mean", "cls")),
)  # fmt: skip


def _call(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.inference_mode():
        return main_output(model(**inputs) if isinstance(inputs, dict) else model(*inputs)).clone()


def _built(family: Family) -> nn.Module:
    torch.manual_seed(0)
    model = family.make().eval()
    with torch.no_grad():
        for p in model.parameters():  # a weight that starts as zero, as some of diffusers', says nothing
            if p.dim() > 1 and not p.any():
                p.normal_(std=0.05)
    return model


def measure(family: Family, precision: str) -> dict[str, Any]:
    """One row of the table; `failed` where the library does not have the family, or cannot build or run it."""
    row: dict[str, Any] = {"library": family.library, "family": family.name}
    try:
        model = _built(family)
        expected = _call(model, family.inputs)
    except Exception as e:
        return row | {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"}
    try:
        times = []
        for dry_run in (True, False):  # the first one parses the code; processor time, as others use the machine
            start = time.process_time()
            report = fp.swap(model, precision, dry_run=dry_run)
            times.append(round(1e3 * (time.process_time() - start), 1))
        error = relative_error(_call(model, family.inputs).double(), expected.double())
        fp.restore(model)
        same = torch.equal(_call(model, family.inputs), expected)
    except Exception as e:
        return row | {"failed": f"swapped, {type(e).__name__}: {str(e).splitlines()[0][:120]}"}
    within = {name for names in report.mlps for name in names}
    return row | {
        "swapped": len(report.swapped),
        "activations": sum(s.activation is not None and s.fqn not in within for s in report.swapped),
        "mlps": len(report.mlps),
        "products": sum(not within.issuperset(names) for names in report.joined),
        "norms": len(report.norms),
        "attention": len(report.attention),
        "one_operation": sum(stack["count"] for stack in report.encoder.to_json()["stacks"]),
        "unpadded": len(report.unpadding.encoders),
        "left": dict(Counter(s.reason.code for s in report.skipped)),
        "not_rewritten": dict(Counter(s.reason.code for s in report.apart)),
        "dry_run_ms": times[0],
        "swap_ms": times[1],
        "error": error,
        "restored_bits": same,
    }


def lines(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """A table in Markdown."""
    columns = ("library", "family", "swapped", "activations", "MLPs", "products", "attention", "one operation", "left",
               "not rewritten", "dry run, swap ms", "error")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for r in rows:
        if "failed" in r:
            yield f"| {r['library']} | {r['family']} | {r['failed']} |||||||||"
            continue
        left, apart = (", ".join(f"{k} {n}" for k, n in r[name].items()) or "-" for name in ("left", "not_rewritten"))
        counts = " | ".join(
            str(r[name]) for name in ("swapped", "activations", "mlps", "products", "attention", "one_operation")
        )
        yield (f"| {r['library']} | {r['family']} | {counts} | {left} | {apart} | {r['dry_run_ms']:.0f}, {r['swap_ms']:.0f} | "
               f"{r['error']:.1e} |")  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--only", default="", help="families or libraries whose names contain this")
    p.add_argument("--precision", default="int8")
    p.add_argument("--json", metavar="FILE", help="also write the result to this file")
    args = p.parse_args()
    warnings.simplefilter("ignore")
    libraries = ("transformers", "timm", "torchvision", "diffusers", "sentence-transformers")
    result = bench.header("families", "cpu", ["families"])
    result["libraries"] = {
        name: importlib.metadata.version(name) for name in libraries if importlib.util.find_spec(name.replace("-", "_"))
    }
    result["precision"] = args.precision
    chosen = [f for f in FAMILIES if args.only in f.name or args.only == f.library]
    result["families"] = [measure(family, args.precision) for family in chosen]
    print("\n".join(lines(result["families"])))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
