"""What the command finds out before it runs a model: paths, patterns, a hub out of reach, a file that is not whole."""

import logging
import shutil
import time

import huggingface_hub as hub
import pytest
import safetensors.torch
import torch
import transformers
from command_line import refused, run
from huggingface_hub import errors

from forwardpass.cli import comparison, embedding, source
from forwardpass.common.printing import quiet
from forwardpass.nn import Int8Linear
from forwardpass.planning.parity import ParityReport


@pytest.mark.parametrize("option", ["--save", "--json"])
def test_a_path_that_takes_no_file_is_refused_before_the_work(folder, monkeypatch, option):
    """Permissions say that root may write to /proc, where nothing can be made."""
    monkeypatch.setattr(embedding, "load", lambda *a: pytest.fail("refused after the work, not before"))
    words = "the folder /proc/x cannot be made" if option == "--save" else "cannot write /proc/x: "
    refused(run("swap", folder, option, "/proc/x"), words)
    refused(run("profile", folder, "--html", "/proc/x"), "cannot write /proc/x: ")
    refused(run("plan", folder, "--min-cosine", 0.9, "--resume", "/proc/x"), "cannot write /proc/x: ")


def test_a_model_of_which_nothing_is_swapped_has_no_parity(folder, tmp_path):
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    done = run("parity", tmp_path, "--calibrate", "none")
    refused(
        done,
        "no layer of this model is swapped, so there is nothing to compare: too_small: 32 x 32 is too small to gain",
    )


def test_options_that_do_not_go_together_are_refused_before_a_model_is_read(folder, monkeypatch):
    """They were refused once the model was loaded, and twice in memory."""
    monkeypatch.setattr(embedding, "load", lambda *a: pytest.fail("refused after the work, not before"))
    words = "kv_cache='int8' needs swapped attention, which reads it: drop attention=False"
    refused(run("swap", folder, "--kv-cache", "int8", "--attention", "false"), words)
    refused(run("swap", folder, "--kv-cache", "int4"), "kv_cache is None or one of")


@pytest.mark.every(3)
def test_a_layer_that_no_text_reaches_fails(folder, monkeypatch):
    """Its error is unknown: it was a line of the report, and the command's status was 0."""
    monkeypatch.setattr(ParityReport, "unreached", property(lambda report: [report.layers[0].fqn]))
    done = run("parity", folder, "--precision", "int8", "--calibrate", "none")
    assert done.exit_code == 1 and "no text reaches encoder.layer.0." in done.stderr


def test_trying_a_path_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    (there := tmp_path / "there.json").write_text("as it was")
    monkeypatch.setattr(embedding, "load", lambda *a: (_ for _ in ()).throw(ValueError("enough")))
    for path in (there, tmp_path / "new.json"):
        refused(run("swap", folder, "--json", path, "--save", tmp_path / "saved"), "enough")
    refused(run("swap", folder, "--json", "/dev/null"), "enough")
    assert [p.name for p in tmp_path.iterdir()] == ["there.json"] and there.read_text() == "as it was"


def test_an_include_that_names_nothing_is_refused_before_texts_are_run(folder, monkeypatch):
    monkeypatch.setattr(comparison, "compare", lambda *a: pytest.fail("refused after the work, not before"))
    monkeypatch.setattr(Int8Linear, "from_torch", lambda *a, **k: pytest.fail("refused after the work, not before"))
    words = (
        "--include encoder.nothing names no layer of this model, which has encoder.layer.{0-1}.attention.self.query, "
    )
    refused(run("swap", folder, "--include", "*.query", "--include", "encoder.nothing"), words)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            OSError("Name or service not known"),
            "is out of reach (Name or service not known), and its cache has no some",
        ),
        (errors.RepositoryNotFoundError, "the hub has no model some/model that may be read here"),
        (errors.GatedRepoError, "the hub's some/model is gated: accept its terms"),
        (errors.EntryNotFoundError, "the hub's some/model has no config.json"),
        (None, "the hub is out of reach (no answer within 0.2 s)"),
    ],
)
def test_a_hub_out_of_reach_is_one_sentence_at_once(monkeypatch, tmp_path, answer, words):
    def ask(url, timeout):
        assert url.endswith("/some/model/resolve/main/config.json") and timeout == source.TIMEOUT_S
        if answer is None:
            time.sleep(1)
        elif isinstance(answer, OSError):
            raise answer
        else:
            raise answer.__new__(answer)  # its constructor wants a response of the version's own HTTP client

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "TIMEOUT_S", 0.2)
    began = time.monotonic()
    refused(run("swap", "some/model"), words)
    assert time.monotonic() - began < 1


def test_a_model_of_the_hub_is_read_from_its_cache_where_the_hub_is_out_of_reach(folder, monkeypatch, tmp_path):
    repository, commit = tmp_path / "models--some--model", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert source.is_in_reach("some/model") is False
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: None)
    assert source.is_in_reach("some/model") is True


def test_what_a_file_lacks_is_said_in_a_sentence_and_not_in_a_report(folder, tmp_path, capsys, caplog):
    copied = shutil.copytree(folder, tmp_path / "model")
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    kept = {name: x for name, x in weights.items() if "pooler" not in name}
    safetensors.torch.save_file(kept, copied / "model.safetensors", {"format": "pt"})
    embedding.load(source.find_model(str(copied)))
    said = capsys.readouterr().err
    assert (
        said
        == "forwardpass: the file has no pooler.dense.bias and pooler.dense.weight: what reads them gets random numbers\n"
    )
    assert "LOAD REPORT" not in caplog.text
    kept["embeddings.LayerNorm.weight"] = torch.ones(3)
    safetensors.torch.save_file(kept, copied / "model.safetensors", {"format": "pt"})
    refused(
        run("profile", copied),
        "1 weight of its file (embeddings.LayerNorm.weight, …) has another shape than its config says",
    )


def test_libraries_are_quiet_for_a_while_alone():
    loggers = [logging.getLogger(name) for name in quiet.LOGGERS]
    before = [logger.level for logger in loggers]
    with quiet.quiet_libraries():
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert all(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    assert [logger.level for logger in loggers] == before
