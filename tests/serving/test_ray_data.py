"""The example for Ray Data, with Ray itself: two actors on this machine."""

import os
import pathlib
import sys

import numpy as np
import pytest
import torch
from command_line import small_bert
from later import later

import forwardpass as fp
from forwardpass.swap import rules

ray = pytest.importorskip("ray", reason="ray[data] is not installed")
sentence_transformers = later("sentence_transformers")
ray_data = pytest.importorskip(
    "examples.ray_data", reason="examples are in the checkout only; run pytest from its root"
)

WORDS = ["rain", "roof", "an", "old", "house", "nobody", "home", "hear", "it", "dogs", "and", "a", "cat"]
BATCH = 50


def with_ray(test):
    """Ray starts half a dozen processes and ends them, 25 s."""
    return pytest.mark.slow(pytest.mark.usefixtures("cluster")(test))


@pytest.fixture(scope="module")
def cluster():
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # actors are of this file, which imports others
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a SentenceTransformer of floats, the same as a checkpoint in int8, a plan for it)"""
    path = tmp_path_factory.mktemp("models")
    modules = sentence_transformers.sentence_transformer.modules
    transformer = modules.Transformer(str(small_bert(path / "bert")))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    model = sentence_transformers.SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu")
    model.save(str(path / "floats"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "LEAST_SIZES_ON_CPU", {})  # layers are tiny
        report = fp.swap(model, "int8")
    report.plan.save(path / "plan.json")
    fp.save_pretrained(model, path / "int8")
    return str(path / "floats"), str(path / "int8"), str(path / "plan.json")


def texts(count):
    g = np.random.default_rng(0)
    return [" ".join(g.choice(WORDS, g.integers(1, 12))) + f" {i}" for i in range(count)]


def dataset(lines, blocks):
    return ray.data.from_items([{"text": t} for t in lines], override_num_blocks=blocks)


def embeddings(rows):
    return np.stack([row["embedding"] for row in rows])


def by_loop(lines, **model):
    threads = torch.get_num_threads()
    try:
        embed = ray_data.Embed(**model)
        batches = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]
        return np.concatenate([embed({"text": batch})["embedding"] for batch in batches])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.every(2)
def test_a_plan_gives_an_actor_the_model_that_was_saved(folders):
    """Without Ray: an actor is a class."""
    lines = texts(110)
    by_plan = by_loop(lines, folder=folders[0], plan=folders[2])
    assert by_plan.shape[0] == 110 and np.array_equal(by_plan, by_loop(lines, folder=folders[1]))


class Fails(ray_data.Embed):
    """Ends its process or raises at the batch with a text, for each file of that text's number in `marks`, which it removes."""

    def __init__(self, marks, texts, **model):
        super().__init__(**model)
        self.marks, self.texts = pathlib.Path(marks), texts

    def __call__(self, batch):
        for number, text in enumerate(self.texts):
            if text in list(batch["text"]) and (marks := sorted(self.marks.glob(f"{number}.*"))):
                marks[0].unlink()
                if marks[0].suffix == ".exit":
                    os._exit(1)
                raise MemoryError("it did not fit")
        return super().__call__(batch)


def failures(folders, tmp_path, count, blocks):
    """Embeddings of all texts in order, of a run in which a process died and another one raised."""
    lines = texts(count)
    for name in ("0.exit", "1.raise", "1.raise_again"):
        (tmp_path / name).touch()
    model = {"folder": folders[1], "marks": str(tmp_path), "texts": [lines[count // 2], lines[count // 4]]}
    rows = ray_data.embed(dataset(lines, blocks), model, actors=2, batch=BATCH, actor=Fails).take_all()
    assert not [*tmp_path.iterdir()] and [row["text"] for row in rows] == lines
    assert np.array_equal(embeddings(rows), by_loop(lines, folder=folders[1]))


@with_ray
def test_what_fails_is_done_again(folders, tmp_path):
    failures(folders, tmp_path, 400, 4)


@with_ray
def test_ten_thousand_texts(folders, tmp_path):
    failures(folders, tmp_path, 10_000, 20)


@with_ray
def test_a_third_exception_ends_the_job(folders, tmp_path):
    lines = texts(100)
    for i in range(3):
        (tmp_path / f"0.{i}").touch()
    model = {"folder": folders[1], "marks": str(tmp_path), "texts": [lines[60]]}
    with pytest.raises(Exception, match="it did not fit"):
        ray_data.embed(dataset(lines, 2), model, actors=1, batch=BATCH, actor=Fails).take_all()


@with_ray
def test_a_plan_is_read_by_each_actor(folders):
    lines = texts(110)  # the last batch is a short one
    model = {"folder": folders[0], "plan": folders[2]}
    rows = ray_data.embed(dataset(lines, 1), model, actors=1, batch=BATCH).take_all()
    assert np.array_equal(embeddings(rows), by_loop(lines, **model))
    assert np.array_equal(embeddings(rows), by_loop(lines, folder=folders[1]))


@with_ray
def test_the_command(folders, tmp_path, monkeypatch, capsys):
    lines = texts(120)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("\n".join(lines) + "\n")
    words = ["ray_data.py", folders[1], str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--batch", str(BATCH)]
    monkeypatch.setattr("sys.argv", words)
    ray_data.main()
    monkeypatch.setattr("sys.argv", [*words, "--actors", "2"])
    with pytest.raises(SystemExit):
        ray_data.main()
    assert "leave none of the cluster's 2 cores for reading" in capsys.readouterr().err
    rows = ray.data.read_parquet(str(tmp_path / "out")).take_all()
    rows.sort(key=lambda row: lines.index(row["text"]))  # files are of blocks, in no order
    assert [row["text"] for row in rows] == lines
    np.testing.assert_allclose(embeddings(rows), by_loop(lines, folder=folders[1]), atol=1e-4)  # other batches


class Threads(ray_data.Embed):
    def __call__(self, batch):
        return {"threads": [torch.get_num_threads()] * len(batch["text"])}


@with_ray
def test_an_actor_takes_the_threads_that_it_is_given(folders):
    model = {"folder": folders[1], "threads": 2}
    rows = ray_data.embed(dataset(texts(4), 1), model, actors=1, batch=4, actor=Threads).take_all()
    assert [row["threads"] for row in rows] == [2] * 4
