"""Models of sentence-transformers, swapped as they are, and their folders on the command line."""

import json

import pytest
import torch
from command_line import NO_MINILM, refused, run, small_bert
from fake_hub import FakeHub
from later import later
from rotation import some_of
from small_models import assert_same_objects, objects

import forwardpass as fp
from forwardpass.cli import embedding, readout
from forwardpass.integrations import sentence_transformers as around

transformers = pytest.importorskip("transformers")
sentence_transformers = later("sentence_transformers")

TEXTS = [
    "a cat",
    "Rain falls on the roof of the old house, and nobody is at home to hear it.",
    "Where is the nearest station?",
    "two dogs run after one ball in the park",
    "x",
    "The committee met for the third time that week.",
]


def encoder(folder):
    """A SentenceTransformer of random weights, large enough that attention matters."""
    modules = sentence_transformers.sentence_transformer.modules
    transformer = modules.Transformer(str(small_bert(folder)))
    spread(transformer)
    width = transformer.get_embedding_dimension()
    return sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(width, "mean"), modules.Normalize()], device="cpu"
    )


def spread(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.1)


def classifier(folder):
    base = small_bert(folder)
    config = transformers.AutoConfig.from_pretrained(base, num_labels=1)
    model = transformers.BertForSequenceClassification(config)
    spread(model)
    model.save_pretrained(base)
    return base


@pytest.mark.every(2)
def test_a_sentence_transformer(tmp_path):
    model = encoder(tmp_path)
    before, expected = objects(model), model.encode(TEXTS)
    report = fp.swap(model, precision="int8", encoder=False)  # a hook below would change how its attention rounds
    assert [x.fqn for x in report.unpadding.encoders] == ["0.model.encoder.layer"]
    assert (
        model[0].model.encoder.layer[0].intermediate.dense.activation == "gelu"
    )  # as in a model of transformers by itself
    lengths = [len(model.tokenizer(text)["input_ids"]) for text in TEXTS]
    rows = []
    dense = model[0].model.encoder.layer[1].output.dense
    handle = dense.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[:-1].numel()))
    got = torch.from_numpy(model.encode(TEXTS))
    handle.remove()
    assert rows == [sum(lengths)] < [max(lengths) * len(TEXTS)]  # its model's forward is called past all hooks
    assert 0.995 < torch.cosine_similarity(got, torch.from_numpy(expected)).min() < 1 - 1e-7
    # in batches of one there is no padding
    assert torch.allclose(got, torch.from_numpy(model.encode(TEXTS, batch_size=1)), atol=1e-3)
    model.save_pretrained(str(tmp_path / "other"))
    assert (fp.load_pretrained(tmp_path / "other").encode(TEXTS) == model.encode(TEXTS)).all()
    fp.restore(model)
    assert not {"save", "save_pretrained"} & vars(model).keys()
    assert_same_objects(model, before)
    assert (model.encode(TEXTS) == expected).all()


@pytest.mark.every(2)
def test_a_cross_encoder(tmp_path):
    model = sentence_transformers.CrossEncoder(str(classifier(tmp_path)), device="cpu")
    pairs = [(TEXTS[0], text) for text in TEXTS[1:]]
    before, expected = objects(model), model.predict(pairs)
    ranking = [x["corpus_id"] for x in model.rank(TEXTS[0], TEXTS[1:])]
    report = fp.swap(model, precision="int8")
    assert [x.fqn for x in report.unpadding.encoders] == ["0.model.bert.encoder.layer"]
    got = model.predict(pairs)
    assert 0 < abs(got - expected).max() < 0.1 * (expected.max() - expected.min())
    assert [x["corpus_id"] for x in model.rank(TEXTS[0], TEXTS[1:])] == ranking
    fp.restore(model)
    assert_same_objects(model, before)
    assert (model.predict(pairs) == expected).all()


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    return file


def swapped(folder, texts):
    options = ("--text", texts, "--calibrate", "none", "--batch", 1, "--length", 8, "--min-cosine", 0.9, "--json", "-")
    result = run("swap", folder, "--precision", "int8", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), " ".join(result.stderr.split())


@pytest.mark.every(2)
def test_the_folder_of_a_sentence_transformer(tmp_path, texts):
    """What is compared is what `encode` gives."""
    folder = tmp_path / "model"
    model = encoder(tmp_path / "bert")
    model[1].pooling_mode = "cls"
    model.prompts, model.default_prompt_name = {"query": "search: "}, "query"
    model.save(str(folder))
    source = embedding.find_model(str(folder))
    reads = readout.readout_of(source)
    assert reads == readout.Embeddings("cls", True, "search: ", 512)
    loaded, tokenizer = embedding.load(source)
    ours = reads.results(loaded, reads.tokenize(tokenizer, TEXTS, loaded, "cpu"))
    assert torch.allclose(ours, torch.from_numpy(model.encode(TEXTS)), atol=1e-5)
    written, printed = swapped(folder, texts)
    assert written["parity"]["texts"] == len(TEXTS)
    assert written["unpadding"]["encoders"][0]["fqn"] == "encoder.layer"
    assert "encoder.layer (2 layers) runs without it" in printed
    assert "embeddings: cls of the tokens, normalised, prompt 'search: '" in printed


@pytest.mark.parametrize("mode", readout.POOLING)
def test_ways_to_pool(mode):
    hidden = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 2, 4]).unsqueeze(1)).long()
    pooling = sentence_transformers.sentence_transformer.modules.Pooling(8, mode)
    expected = pooling({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(readout.POOLING[mode](hidden, mask), expected)
    old = {"pooling_mode_cls_token": False, {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens",
           "max": "pooling_mode_max_tokens"}.get(mode, f"pooling_mode_{mode}"): True}  # fmt: skip
    configs = (old, pooling.get_config_dict())
    assert [around._current("Pooling", config)["pooling_mode"] for config in configs] == [mode, mode]


@pytest.mark.every(2)
def test_the_folder_of_a_cross_encoder(tmp_path, texts):
    """Whoever saved it: transformers, with one label, or sentence-transformers."""
    folder = classifier(tmp_path / "plain")
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    for path in (folder, tmp_path / "saved"):
        source = embedding.find_model(str(path))
        reads = readout.readout_of(source)
        loaded, tokenizer = embedding.load(source, auto=reads.auto)
        ours = reads.results(loaded, reads.tokenize(tokenizer, TEXTS, loaded, "cpu"))
        expected = model.predict([(TEXTS[0], text) for text in TEXTS[1:]])
        assert torch.allclose(ours.sigmoid()[0], torch.from_numpy(expected), atol=1e-5)
    written, printed = swapped(folder, texts)
    assert written["parity"]["texts"] == 5 and written["parity"]["queries"] == 1
    assert written["parity"]["order"] == written["parity"]["first"] == 1
    assert "100.00% of two texts in the same order, the first one for 1 of 1 query" in printed


def test_scores_that_are_ordered_otherwise():
    expected = torch.tensor([[3.0, 2.0, 1.0], [1.0, 5.0, torch.nan]])
    actual = torch.tensor([[2.0, 3.0, 1.0], [1.0, 5.0, torch.nan]])
    result = readout.Scores().parity(actual, expected)
    assert (result["order"], result["first"], result["texts"], result["queries"]) == (3 / 4, 1, 5, 2)
    assert result["cosine_min"] == pytest.approx(0.5)
    assert readout.Scores().parity(expected, expected)["cosine_min"] == pytest.approx(1)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "pools by weightedmean"),
        (
            {
                "modules.json": [
                    {"type": "sentence_transformers.models.Transformer", "path": ""},
                    {"type": "sentence_transformers.models.Dense", "path": "2_Dense"},
                ]
            },
            "a module Dense",
        ),
        (
            {"modules.json": [{"type": "os.system", "path": ""}]},
            "a module os.system, which is none of sentence-transformers",
        ),
        ({"modules.json": [{"type": "sentence_transformers.models.BoW", "path": ""}]}, "a module BoW in place 0"),
        ({"modules.json": [{"type": "sentence_transformers.models.Transformer", "path": "../.."}]}, "leads out of it"),
        ({"modules.json": {"a": 1}}, "cannot read"),
        ({"config_sentence_transformers.json": "{"}, "cannot read"),
    ],
)
def test_folders_that_are_refused(change, words, tmp_path):
    encoder(tmp_path / "bert").save(str(tmp_path / "model"))
    for file, content in change.items():
        (tmp_path / "model" / file).write_text(content if isinstance(content, str) else json.dumps(content))
    refused(run("swap", tmp_path / "model", "--precision", "int8"), words)


def adjusted(folder, dense=False):
    """With everything that is to come back set to something else than its default."""
    model = encoder(folder)
    model[1].pooling_mode = "cls"
    if dense:
        model.append(
            sentence_transformers.sentence_transformer.modules.Dense(96, 64, activation_function=torch.nn.GELU())
        )
    model.max_seq_length = 32
    model.prompts, model.default_prompt_name = {"query": "search: ", "document": ""}, "query"
    model.truncate_dim, model.similarity_fn_name = 48, "dot"
    return model


LONG = [*TEXTS, "one two three four five " * 9]


def assert_same_model(loaded, model):
    assert type(loaded) is type(model)
    assert [type(m) for m in loaded] == [type(m) for m in model]
    assert [m.get_config_dict() for m in loaded] == [m.get_config_dict() for m in model]
    for name in ("prompts", "default_prompt_name", "max_seq_length"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert not loaded.training and {p.device.type for p in loaded.parameters()} == {"cpu"}


@pytest.mark.every(2)
@pytest.mark.parametrize("dense", [False, True])
def test_a_sentence_transformer_is_stored_whole(tmp_path, dense):
    model = adjusted(tmp_path / "bert", dense)
    fp.swap(model.eval(), precision="int8")
    expected = model.encode(LONG)
    assert expected.shape == (7, 48)
    fp.save_pretrained(model, tmp_path / "saved")
    loaded = fp.load_pretrained(tmp_path / "saved")
    assert_same_model(loaded, model)
    assert (loaded.truncate_dim, loaded.similarity_fn_name) == (48, "dot")
    assert (loaded.encode(LONG) == expected).all()
    assert (loaded.encode(LONG, prompt_name="document") == model.encode(LONG, prompt_name="document")).all()
    fp.save_pretrained(loaded, tmp_path / "again")
    records = [json.loads((tmp_path / name / "forwardpass.json").read_text()) for name in ("saved", "again")]
    assert records[0] == records[1]
    # another program finds no weights there that it would take for a float model's
    with pytest.raises((OSError, ValueError)):
        sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)


@pytest.mark.every(2)
def test_a_cross_encoder_is_stored_whole(tmp_path):
    model = sentence_transformers.CrossEncoder(
        str(classifier(tmp_path / "bert")), device="cpu", max_length=24, activation_fn=torch.nn.Identity()
    )
    model.prompts, model.default_prompt_name = {"query": "rank: "}, "query"
    pairs = [(TEXTS[0], text) for text in LONG[1:]]
    fp.swap(model.eval(), precision="int8")
    expected = model.predict(pairs)
    fp.save_pretrained(model, tmp_path / "saved")
    loaded = fp.load_pretrained(tmp_path / "saved")
    assert_same_model(loaded, model)
    assert type(loaded.activation_fn) is torch.nn.Identity
    assert (
        abs(loaded.predict(pairs) - expected).max() < 1e-6
    )  # its head is in fp32, whose sums go by where a weight lies
    assert readout.readout_of(embedding.find_model(str(tmp_path / "saved"))) == readout.Scores(24)


@pytest.mark.every(2)
def test_pushed_to_the_hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub", monkeypatch)
    model = encoder(tmp_path / "bert")
    fp.swap(model.eval(), precision="int8")
    assert model.push_to_hub("someone/sentences") == "https://hub/someone/sentences"
    assert (fp.load_pretrained(hub.folder).encode(TEXTS) == model.encode(TEXTS)).all()
    model.push_to_hub("someone/sentences", exist_ok=True, replace_model_card=True)
    assert "# SentenceTransformer in int8" in (hub.folder / "README.md").read_text()
    with pytest.raises(
        ValueError, match=r"SentenceTransformer\.save of a swapped model .* no train_datasets=.*: drop it"
    ):
        model.push_to_hub("someone/sentences", train_datasets=["mine"])
    with pytest.raises(ValueError, match="no safe_serialization=False"):
        model.save(str(tmp_path / "none"), safe_serialization=False)


@pytest.mark.every(2)
def test_what_would_not_come_back_is_refused_when_it_is_saved(tmp_path):
    modules = sentence_transformers.sentence_transformer.modules
    words = "cannot be saved whole .it has a module Dropout, .*: save the model of transformers in it"
    model = encoder(tmp_path / "a")
    fp.swap(model.eval(), precision="int8")
    model.append(modules.Dropout())
    with pytest.raises(ValueError, match=words):
        fp.save_pretrained(model, tmp_path / "saved")
    del model[-1]
    model.append(modules.Dense(96, 8, activation_function=torch.nn.LeakyReLU(0.5)))
    with pytest.raises(
        ValueError, match=r"the activation LeakyReLU\(negative_slope=0.5\) is none of torch.nn as it is"
    ):
        fp.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    fp.save_pretrained(model[0].model, tmp_path / "saved")
    assert type(fp.load_pretrained(tmp_path / "saved")) is transformers.BertModel


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("class",), "SparseEncoder", "it is a SparseEncoder"),
        (("modules", 1, "module"), "os.system", "a module os.system"),
        (("modules", 1, "module"), "Router", "a module Router"),
        (("modules", 1, "config", "trust_remote_code"), True, "Pooling has trust_remote_code, which is not known"),
        (("modules", 0, "config", "model_kwargs"), {"a": 1}, "Transformer has model_kwargs, which is not known"),
        (
            ("modules", 0, "config", "modality_config"),
            {"text": {"method": "save"}},
            "another way than the model's forward",
        ),
        (("modules", 2, "config", "activation_function"), "os.system", "the activation os.system is none of torch.nn"),
        (("modules", 2, "config", "activation_function"), "torch.nn.Module", "none of torch.nn"),
        (("modules", 2, "config", "in_features"), True, "its Dense.in_features is 'True', no int"),
        (("settings", "prompts"), {"a": 1}, "a prompt is no text"),
        (("settings",), None, "settings is 'None', no object"),
    ],
)
def test_records_that_are_refused(tmp_path, path, value, words):
    model = encoder(tmp_path / "bert")
    model.append(sentence_transformers.sentence_transformer.modules.Dense(96, 64))
    del model[2]
    fp.swap(model.eval(), precision="int8")
    fp.save_pretrained(model, tmp_path / "saved")
    file = tmp_path / "saved" / "forwardpass.json"
    record = json.loads(file.read_text())
    entry = record["around"]
    for name in path[:-1]:
        entry = entry[name]
    entry[path[-1]] = value
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is damaged") as error:
        fp.load_pretrained(tmp_path / "saved")
    assert words in str(error.value)


FEW = ("--batch", 1, "--length", 8)
#: of the two folders that a command reads
A_HALF = pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])


def json_of(*args):
    result = run(*args, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), " ".join(result.stderr.split())


@pytest.mark.every(3)
@A_HALF
def test_commands_read_what_was_saved(tmp_path, texts, parts):
    """Every command that takes a model takes the folder of a SentenceTransformer, and the ones without a swap what was saved."""
    folder, saved = tmp_path / "model", tmp_path / "saved"
    model = adjusted(tmp_path / "bert")
    model.save(str(folder))
    described = (
        "embeddings: cls of the tokens, normalised, the first 48 values, prompt 'search: ', texts cut to 32 tokens"
    )
    options = ("--text", texts, "--calibrate", "none")
    _, printed = json_of("swap", folder, "--precision", "int8", *options, *FEW, "--min-cosine", 0.9, "--save", saved)
    assert described in printed
    reads = readout.readout_of(embedding.find_model(str(folder)))
    assert (
        reads
        == readout.readout_of(embedding.find_model(str(saved)))
        == readout.Embeddings("cls", True, "search: ", 32, 48)
    )
    loaded = fp.load_pretrained(saved)
    assert_same_model(loaded, model)
    fp.swap(model.eval(), precision="int8")
    assert (loaded.encode(LONG) == model.encode(LONG)).all()
    bert, tokenizer = embedding.load(embedding.find_model(str(saved)))
    for texts_of_one in TEXTS[:1], LONG[-1:]:  # alone: a row of int8 is quantised by itself, but for padding
        ours = reads.results(bert, reads.tokenize(tokenizer, texts_of_one, bert, "cpu"))
        assert torch.allclose(ours, torch.from_numpy(model.encode(texts_of_one)), atol=1e-6)

    written, printed = json_of("parity", folder, "--precision", "int8", *options)
    assert described in printed and written["readout"] == described and written["agreement"]["samples"] == len(TEXTS)
    written, printed = json_of("plan", folder, "--max-error", 0.1, "--candidates", "int8", *options, *FEW)
    assert described in printed and written["evidence"]["readout"] == described
    for name in some_of((folder, saved), parts):
        written, printed = json_of("profile", name, "--text", texts, *FEW, "--batches", 1, "--rounds", 1)
        assert described in printed
        short = ("--slo-ms", 1000, "--rate", 1, "--max-batch", 2, "--seconds", 1, "--check", 0, "--length", 8)
        assert json_of("size-batch", name, *short)[0]["policy"] is not None


@pytest.mark.every(3)
@A_HALF
def test_commands_read_a_cross_encoder(tmp_path, texts, parts):
    folder, saved = tmp_path / "model", tmp_path / "saved"
    sentence_transformers.CrossEncoder(str(classifier(tmp_path / "bert")), device="cpu").save_pretrained(str(folder))
    described = "scores of pairs of texts: of every 32 texts the first is the query"
    options = ("--text", texts, "--calibrate", "none")
    _, printed = json_of("swap", folder, "--precision", "int8", *options, *FEW, "--min-cosine", 0.9, "--save", saved)
    assert described in printed
    assert type(fp.load_pretrained(saved)) is sentence_transformers.CrossEncoder
    written, printed = json_of("parity", folder, "--precision", "int8", *options)
    # of one query the five scores about their mean, where of a classifier it would be each score alone
    assert (
        described in printed and (written["samples"], written["agreement"]) == (1, {}) and written["cosine_min"] > 0.9
    )
    written, printed = json_of("plan", folder, "--max-error", 0.1, "--candidates", "int8", *options, *FEW)
    assert described in printed
    for name in some_of((folder, saved), parts):
        written, printed = json_of("profile", name, "--text", texts, *FEW, "--batches", 1, "--rounds", 1)
        assert described in printed
        short = ("--slo-ms", 1000, "--rate", 1, "--max-batch", 2, "--seconds", 1, "--check", 0, "--length", 8)
        assert json_of("size-batch", name, *short)[0]["policy"] is not None


def test_minilm_reads_as_its_authors_stored_it():
    if NO_MINILM:
        pytest.skip("the extra demo is not installed")
    assert readout.readout_of(embedding.find_model("minilm")) == readout.Embeddings("mean", True, "", 256)
