"""Continuous batching of prompts that have more tokens than a batch (chunked prefill)."""

import itertools
import os

import pytest
import torch
from processes import fork
from rotation import in_turn
from small_models import ATTENTION, build

import forwardpass as fp
from forwardpass.integrations.transformers import attention as transformers_attention
from forwardpass.integrations.transformers import continuous_batching

transformers = pytest.importorskip("transformers")


@pytest.mark.every(2)
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


#: In a process of its own, as continuous batching generates in a thread.
_INTERPRETED = """
import torch, transformers
import forwardpass as fp
from forwardpass.dispatch import interpreter
from forwardpass.integrations.transformers import attention
from small_models import ATTENTION, build
from transformers.generation.configuration_utils import ContinuousBatchingConfig

model = build("llama", ATTENTION).half()
prompts = [[5, 6, 7, 8] * 11, [9, 10], [12, 3] * 15]
config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
alone = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
fp.swap(model, attention=True)
calls, packed = [], attention._packed
def noted(module, qkv, options):  # whether pages of a prompt are read, the tokens, the sequences, the keys
    calls.append(("prompt_pages" in options, qkv[0].shape[2], len(options["cu_seq_lens_q"]) - 1, qkv[1].shape[2]))
    return packed(module, qkv, options)
attention._packed = noted
options = ContinuousBatchingConfig(page_size=16, max_memory_percent=0.02, max_batch_tokens=16, use_cuda_graph=False)
batched = model.generate_batch(prompts, generation_config=config, continuous_batching_config=options)
assert [x.generated_tokens for x in batched.values()] == alone
assert not interpreter().device.findings
in_pages = [(tokens, sequences, keys) for paged, tokens, sequences, keys in calls if paged]
assert {sequences > 1 for _, sequences, _ in in_pages} == {True, False}, calls  # beside steps, and alone
assert all(tokens == keys > sequences for tokens, sequences, keys in in_pages), calls  # nothing is gathered
"""


@pytest.mark.every(3)
@pytest.mark.interpreted
@pytest.mark.parametrize("arch", in_turn(["sm_80", "sm_90a"]))
def test_chunks_read_the_pages_of_their_prompt_on_a_gpu(arch):
    done = fork.run(_INTERPRETED, env={**os.environ, "GPULESS_ARCH": arch})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lengths", [(5,), (1, 4, 1), (4, 1), (1, 1, 6)])
def test_a_chunk_and_steps_are_two_calls(lengths):
    """Whichever sequence has the chunk; in a batch that is padded to a size, a sequence alone has fewer rows than it says."""
    g = torch.Generator().manual_seed(0)
    rows, most = sum(lengths), max(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    seq_lens = torch.randint(most, 40, (len(lengths),), generator=g).int()
    pages = torch.randperm(3 * len(lengths), generator=g).view(-1, 3).int()
    q = torch.randn(rows, 4, 64, generator=g)
    k, v = torch.randn(2, 3 * len(lengths), 16, 2, 64, generator=g)

    def attend(q, seq_lens, pages):
        return fp.ops.attention_decode(q, k, v, seq_lens, block_table=pages)

    expected = torch.cat([attend(q[None, a:b], seq_lens[None, i], pages[None, i])[0]
                          for i, (a, b) in enumerate(itertools.pairwise(ends))])  # fmt: skip
    got = continuous_batching.in_their_pages(q, ends, most, seq_lens, pages, attend)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if len(lengths) == 1:
        padded = torch.cat([q, torch.full((3, 4, 64), torch.nan)])
        got = continuous_batching.in_their_pages(padded, ends, most + 3, seq_lens, pages, attend)
        torch.testing.assert_close(got[:rows], expected, rtol=1e-5, atol=1e-6)
