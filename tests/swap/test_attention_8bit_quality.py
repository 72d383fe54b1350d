"""What attention in 8 bits loses on real models, and among many keys: the bars, by the benchmark that has the figures."""

import pytest
import torch

import forwardpass as fp
from forwardpass.cli import source

models = pytest.importorskip("benchmarks.attention_8bit_models", reason="benchmarks are in the checkout only")
EVERYWHERE = {"attention": "int8", "crossover": 0}


def loaded(name):
    try:
        source.find_model(name)
    except ValueError as e:
        pytest.skip(str(e))
    return models.load(name)


@pytest.mark.every(3)
@pytest.mark.parametrize("keys", [4096, 131072])
def test_retrieval(keys):
    """Each row finds its key, also with a fifth of its weight; and no number of keys makes the error larger."""
    for found in models.retrieval(keys):
        assert found["float32"]["found"] == found["int8"]["found"] == 1
        assert found["int8"]["nrmse"] < 0.015


@pytest.mark.every(3)
@torch.inference_mode()
def test_minilm():
    model, tokenizer, readout = loaded("minilm")
    batches = readout.tokenize(tokenizer, readout.builtin()[1][:32], model, "cpu")
    expected = readout.results(model, batches)
    with torch.inference_mode(False), fp.swap(model, **EVERYWHERE):
        got = readout.results(model, batches)
    assert 0.9995 <= readout.parity(got, expected)["cosine_min"] < 1


@pytest.mark.slow
def test_minilm_with_int8_layers():
    loaded("minilm")
    for found in models.embeddings():
        assert 0.999 <= found["cosine_min"] < 1, found


@pytest.mark.slow
@torch.inference_mode()
def test_perplexity_of_smollm2(monkeypatch):
    model, tokenizer, _ = loaded("smollm2")
    monkeypatch.setattr(models, "TOKENS", 2048)
    for found in models.perplexity(model, tokenizer, [256, 2048]):
        assert 0 < abs(found["increase"]) < 0.003, found


@pytest.mark.slow
@torch.inference_mode()
def test_planted_numbers(monkeypatch):
    """SmolLM2 finds as many of them as in floats."""
    model, tokenizer, _ = loaded("smollm2")
    monkeypatch.setattr(models, "PROMPTS", 1024)
    (found,) = models.needle(model, tokenizer, [1024])
    assert found["same_answers"] >= 0.9 and found["int8"] >= found["before"] - 0.1, found
