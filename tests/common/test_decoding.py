"""A generation is the one that transformers' generate gives, padded or not, and its times are of the phases."""

import pytest
import torch
from small_models import build

from forwardpass.common.models.decoding import PHASES, Decoding, Generation, rates, run_of


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [0, 3])
def test_it_generates_what_transformers_does(name, padding):
    model = build(name)
    ids = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    clock = iter(range(100))
    with torch.inference_mode():
        found, times = Generation(model, ids, mask).generate(5, clock=lambda: next(clock))
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    if padding and name == "gpt2":  # whose positions generate counts by the mask
        found, expected = found[1:], expected[1:]
    assert torch.equal(found, expected[:, 8:]) and times == list(range(7))


def test_rates_are_tokens_over_seconds_and_take_turns():
    turns = []

    def run(name, prefill, step):
        def times(ids, steps):
            turns.append(name)
            return [0.0, prefill, *(prefill + step * (i + 1) for i in range(steps))]

        return times

    found = rates({"a": run("a", 2.0, 0.5), "b": run("b", 1.0, 0.25)}, torch.zeros(3, 4), 5, rounds=2)
    assert turns == ["a", "b"] * 3  # the first round is not timed
    assert [found["a"][p].median for p in PHASES] == [3 * 4 / 2.0, 3 / 0.5]
    assert [found["b"][p].median for p in PHASES] == [12.0, 12.0] and found["a"]["prefill"].rounds == 2


def test_a_decodings_prompts_are_the_same_each_time():
    model, decoding = build("llama"), Decoding(2, 6, 3, 2)
    assert torch.equal(decoding.prompts(model), decoding.prompts(model)) and decoding.length == 12
    assert len(run_of(model)(decoding.prompts(model), 2)) == 4
    assert Decoding.default_of(model) == Decoding(1, 32, 16) and Decoding.default_of(torch.nn.Linear(2, 2)) is None
