"""Models of sentence-transformers, swapped as they are, and their folders on the command line."""

import json

import pytest
import torch
from command_line import refused, run, small_bert
from small_models import assert_same_objects, objects

import forwardpass as fp
from forwardpass.cli import embedding, readout

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

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


def test_a_sentence_transformer(tmp_path):
    model = encoder(tmp_path)
    before, expected = objects(model), model.encode(TEXTS)
    report = fp.swap(model, precision="int8")
    assert [x.fqn for x in report.unpadding.encoders] == ["0.model.encoder.layer"]
    got = torch.from_numpy(model.encode(TEXTS))
    assert 0.995 < torch.cosine_similarity(got, torch.from_numpy(expected)).min() < 1 - 1e-7
    # in batches of one there is no padding
    assert torch.allclose(got, torch.from_numpy(model.encode(TEXTS, batch_size=1)), atol=1e-3)
    with pytest.raises(RuntimeError, match="use fp"):
        model.save_pretrained(str(tmp_path / "other"))
    fp.restore(model)
    assert_same_objects(model, before)
    assert (model.encode(TEXTS) == expected).all()


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


def test_the_folder_of_a_sentence_transformer(tmp_path, texts):
    """What is compared is what `encode` gives."""
    folder = tmp_path / "model"
    model = encoder(tmp_path / "bert")
    model[1].pooling_mode = "cls"
    model.prompts, model.default_prompt_name = {"query": "search: "}, "query"
    model.save(str(folder))
    source = embedding.find_model(str(folder))
    reads = readout.of(source)
    assert reads == readout.Embeddings("cls", True, "search: ")
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
    assert readout._modes(old) == readout._modes(pooling.get_config_dict()) == [mode]


def test_the_folder_of_a_cross_encoder(tmp_path, texts):
    """Whoever saved it: transformers, with one label, or sentence-transformers."""
    folder = classifier(tmp_path / "plain")
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    for path in (folder, tmp_path / "saved"):
        source = embedding.find_model(str(path))
        reads = readout.of(source)
        loaded, tokenizer = embedding.load(source, head=reads.head)
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "pools by weightedmean"),
        (
            {"modules.json": [{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "2_Dense"}]},
            "a module Dense",
        ),
        ({"config_sentence_transformers.json": "{"}, "cannot read"),
    ],
)
def test_folders_that_are_refused(change, words, tmp_path):
    encoder(tmp_path / "bert").save(str(tmp_path / "model"))
    for file, content in change.items():
        (tmp_path / "model" / file).write_text(content if isinstance(content, str) else json.dumps(content))
    refused(run("swap", tmp_path / "model", "--precision", "int8"), words)
