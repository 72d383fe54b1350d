"""Small decoders that generate, what they are called with, and their prompts."""

import pytest
from small_models import ATTENTION, batch, build

transformers = pytest.importorskip("transformers")

STEPS = 12
DECODERS = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss"]
OPTIONS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True,
           "output_logits": True, "disable_compile": True}  # fmt: skip


def decoder(name):
    model = build(name, ATTENTION)
    model.set_attn_implementation("eager")
    return model


def padded(name):
    """Two prompts, the second shorter and padded on the left."""
    inputs = {k: v for k, v in batch(name).items() if k != "decoder_input_ids"}
    if name in DECODERS:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


def static_cache(model, name, length):
    """With the prompts of `batch` in it."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    model(input_ids=batch(name)["input_ids"], cache=cache)
    return cache
