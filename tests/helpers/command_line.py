"""The command line, run in this process, and the model that it is run on."""

import importlib.util

import pytest
import torch
from typer.testing import CliRunner

from forwardpass.cli import commands, embedding

#: found without importing the package, as the command does
NO_MINILM = importlib.util.find_spec(embedding.MINILM_PACKAGE.replace("-", "_")) is None


def small_bert(folder):
    """A tiny BERT of random weights with MiniLM's tokenizer, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    if NO_MINILM:
        pytest.skip("the extra demo is not installed")
    source = embedding.find_model("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*args):
    return CliRunner().invoke(commands.app, [str(a) for a in args])


def refused(result, words):
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert words in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" …")]  # beside what was being done
    assert len(lines) == 1, result.stderr
    assert result.stdout.count("\n") <= 1  # at most the model that was chosen
