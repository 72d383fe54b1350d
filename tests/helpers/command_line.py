"""The command line, run in this process, and the model that it is run on."""

import importlib.metadata
import importlib.util

import pytest
import torch
from typer.testing import CliRunner

from forwardpass.cli import commands, embedding, source


def _missing(alias):
    """Whether the package of this model is not installed; it is not imported, as the command does not either."""
    try:
        importlib.metadata.distribution(source.PACKAGED[alias].package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


NO_MINILM = _missing("minilm")
NO_SMOLLM2 = _missing("smollm2") or importlib.util.find_spec("gguf") is None


def small_bert(folder):
    """A tiny BERT of random weights with MiniLM's tokenizer, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    if NO_MINILM:
        pytest.skip("the extra demo is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedding.find_model("minilm").path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_llama(folder, **config):
    """A tiny decoder of random weights, its head tied to its embedding, over bytes, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    bytes_of = tokenizers.pre_tokenizers.ByteLevel
    vocabulary = ["<s>", *sorted(bytes_of.alphabet())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_of(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>")
    torch.manual_seed(0)
    form = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(vocabulary), **(form | ids | config)))
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
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
