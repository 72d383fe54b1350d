"""Continuous batching of prompts that have more tokens than a batch (chunked prefill)."""

import pytest
import torch
from small_models import ATTENTION, build

import forwardpass as fp
from forwardpass.integrations.transformers import attention as transformers_attention

transformers = pytest.importorskip("transformers")


def test_tokens_are_those_of_whole_prompts(monkeypatch):
    """Prompts of more tokens than a batch has, beside steps of others: transformers gathers their keys from the pages that steps
    then read in place."""
    continuous = pytest.importorskip("transformers.generation.configuration_utils")
    model = build("llama", ATTENTION)
    model.set_attn_implementation("eager")
    prompts = [[5, 6, 7, 8] * 11, [9, 10], [12, 3] * 15]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    fp.swap(model, attention=True)
    lengths = []
    packed = transformers_attention._packed
    monkeypatch.setattr(
        transformers_attention,
        "_packed",
        lambda m, qkv, o: lengths.append((qkv[0].shape[2], qkv[1].shape[2])) or packed(m, qkv, o),
    )
    options = continuous.ContinuousBatchingConfig(
        page_size=16, max_memory_percent=0.02, max_batch_tokens=16, use_cuda_graph=False
    )
    got = model.generate_batch(prompts, generation_config=config, continuous_batching_config=options)
    assert [x.generated_tokens for x in got.values()] == expected
    assert any(keys > rows > 3 for rows, keys in lengths)  # the next part of a prompt
    assert any(keys == rows <= 3 for rows, keys in lengths)  # a step in pages
    fp.restore(model)
