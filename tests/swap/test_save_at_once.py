"""Processes that save into one folder at the same time: one wins whole, and another one says so."""

import fcntl
import os
import shutil
import threading

import pytest
import torch
from rotation import in_turn
from saving_processes import FAILED, SAVED, at_once, killed_after
from small_models import CONFIGS, build, outputs

import forwardpass as fp

pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ROUNDS = 4
SAVES = {
    "save_pretrained": lambda model, folder: fp.save_pretrained(model, folder, max_shard_size="50KB"),
    "the model's own": lambda model, folder: model.save_pretrained(folder),
    "export_pretrained": lambda model, folder: fp.export_pretrained(
        model, folder, overwrite=True, max_shard_size="50KB"
    ),
}


def models():
    """Two of other sizes, so that files of both together are no model."""
    name, config, sizes = CONFIGS["bert"]
    made = [build("bert"), build("bert", {"bert": (name, config, {**sizes, "num_hidden_layers": 1})})]
    for model in made:
        fp.swap(model, "int8", include="**", attention=False)
    return made


@pytest.mark.every(3)
@pytest.mark.parametrize("how", in_turn(SAVES))
def test_one_wins_whole(how, tmp_path):
    both, inputs = models(), {"input_ids": torch.arange(3, 23).reshape(2, 10)}
    expected = [outputs(model, inputs) for model in both]
    for round_ in range(ROUNDS):
        folder = tmp_path / str(round_)
        ends = at_once([lambda model=model, folder=folder: SAVES[how](model, folder) for model in both])
        assert FAILED not in ends and SAVED in ends, ends
        got = outputs(fp.load_pretrained(folder), inputs)
        saved = [y for y, end in zip(expected, ends) if end == SAVED]
        assert any(y.shape == got.shape and torch.allclose(y, got, atol=1e-5) for y in saved), ends
        assert not list(folder.glob(".*"))


def test_a_save_beside_another_is_refused_and_writes_nothing(tmp_path):
    model, _ = models()
    fp.save_pretrained(model, tmp_path / "saved")
    fp.export_pretrained(model, tmp_path / "exported")
    for name, save in (("saved", SAVES["save_pretrained"]), ("exported", SAVES["export_pretrained"])):
        folder = tmp_path / name
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        errors = []

        def in_a_thread(save=save, folder=folder, errors=errors):
            try:
                save(model, folder)
            except ValueError as e:
                errors.append(str(e))

        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        assert len(errors) == 1 and str(folder) in errors[0] and "\n" not in errors[0]
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        os.close(descriptor)  # as the system does for a process that is killed
        save(model, folder)


@pytest.mark.every(3)
@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_an_export_that_is_killed_leaves_the_old_one_the_new_one_or_none(tmp_path, step):
    both, inputs = models(), {"input_ids": torch.arange(3, 23).reshape(2, 10)}
    was, will = (outputs(model, inputs) for model in both)
    SAVES["export_pretrained"](both[0], tmp_path / "old")
    seen = []
    for events in range(0, 200, step):
        folder = tmp_path / str(events)
        shutil.copytree(tmp_path / "old", folder)
        ended = killed_after(events, lambda: SAVES["export_pretrained"](both[1], folder))  # noqa: B023
        if (folder / "config.json").exists():
            got = outputs(fp.load_pretrained(folder), inputs)
            seen.append("old" if torch.allclose(got, was, atol=1e-5) else "new")
            assert seen[-1] == "old" or torch.allclose(got, will, atol=1e-5), events
        else:
            seen.append("none")
            with pytest.raises((OSError, ValueError)):
                fp.load_pretrained(folder)
        SAVES["export_pretrained"](both[1], folder)  # over what is left
        assert not list(folder.glob(".*"))
        if ended:
            break
    assert seen[0] == "old" and seen[-1] == "new" and seen == sorted(seen, key=["old", "none", "new"].index)
    assert seen.count("old") > 3 // step


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks for folders"):
        fp.save_pretrained(models()[0], tmp_path)
