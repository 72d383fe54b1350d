"""Folders that another library stored in 8 bits, on the command line."""

import json

import pytest
import transformers
from command_line import refused, run, small_llama
from stored_formats import write_compressed

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("compressed_tensors")
    folder = small_llama(tmp_path_factory.mktemp("stored"))
    write_compressed(folder, "W8A8", transformers.AutoModelForCausalLM.from_pretrained(folder))
    return folder


@pytest.mark.every(3)
def test_swap_takes_the_bytes_over_and_compares_with_transformers(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    done = run("swap", folder, "--text", text, "--length", 8, "--steps", 3, "--json", tmp_path / "swap.json",
               "--max-perplexity-increase", "3%", "--save", tmp_path / "saved")  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("14 layers to stored", "lm_head (floats", "decode, after"):
        assert words in done.stdout
    written = json.loads((tmp_path / "swap.json").read_text())
    assert {x["precision"] for x in written["swapped"]} == {"stored"} and len(written["swapped"]) == 14
    assert abs(written["parity"]["perplexity_increase"]) < 0.03
    done = run("profile", folder, "--text", text, "--length", 8, "--steps", 2, "--batches", 1, "--rounds", 1)
    assert done.exit_code == 0 and "Int8Linear" in done.stdout, done.output
    done = run(
        "profile", tmp_path / "saved", "--text", text, "--length", 8, "--steps", 2, "--batches", 1, "--rounds", 1
    )
    assert done.exit_code == 0 and "Int8Linear" in done.stdout, done.output


def test_what_asks_for_a_model_of_floats(folder, tmp_path):
    for option in (
        ("--precision", "int8"),
        ("--calibrate", "none"),
        ("--kv-cache", "auto"),
        ("--include", "lm_head"),
        ("--attention", "int8"),
    ):
        refused(run("swap", folder, *option), "taken over as they are: drop --precision")
    refused(run("plan", folder, "--max-perplexity-increase", "2%"), "layers have 8 bits already")
