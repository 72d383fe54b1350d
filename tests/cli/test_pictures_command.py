"""`forwardpass swap` on models of pictures: torchvision's and timm's by name, folders of other libraries, photographs."""

import json

import pytest
import torch
from command_line import refused, run

from forwardpass.cli import vision

np = pytest.importorskip("numpy")
image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four small pictures."""
    folder, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(4):
        coarse = image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((80, 60), image.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict of timm's smallest."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    file = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(model.state_dict(), file)
    return file


@pytest.mark.every(2)
def test_a_model_of_timm_by_name(photographs, weights, tmp_path):
    """Its convolutions are calibrated on one half of the crops and compared on the other."""
    args = (
        "swap",
        "timm:test_resnet",
        "--weights",
        weights,
        "--images",
        photographs,
        "--batch",
        1,
        "--min-cosine",
        0.99,
    )
    done = run(*args, "--json", tmp_path / "out.json", "--save", tmp_path / "saved")
    assert done.exit_code == 0, done.output
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["schema"] == "forwardpass.swap_images/1" and out["calibration"] == {"pictures": 28}
    assert out["photographs"].startswith("56 crops of 4 photographs of the folder ")
    assert {s["precision"] for s in out["swapped"]} == {"int8"} and out["parity"]["pictures"] == 28
    assert out["parity"]["top1_agreement"] > 0.8 and 0.99 < out["parity"]["cosine_min"] <= 1
    assert {*out["latency_ms"]} == {"before", "before, channels_last", "after"} and out["speedup"] > 0
    assert "best class" in done.stdout and "passes >= 0.99" in done.stdout
    assert (tmp_path / "saved" / "forwardpass.json").is_file()


@pytest.mark.every(3)
def test_a_precision_without_calibration_and_a_check_that_fails(photographs, weights):
    args = ("swap", "timm:test_resnet", "--weights", weights, "--images", photographs, "--batch", 1)
    done = run(*args, "--calibrate", "none", "--json", "-")
    out = json.loads(done.stdout)
    assert out["calibration"] is None
    assert {s["code"] for s in out["skipped"]} >= {"uncalibrated"}
    done = run(*args, "--min-cosine", 1)
    assert done.exit_code == 1 and "the check cosine_min >= 1.0 failed" in done.stderr


def test_a_folder_of_transformers(photographs, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    done = run(
        "swap", tmp_path, "--images", photographs, "--batch", 1, "--include", "**", "--min-cosine", 0.99, "--json", "-"
    )
    assert done.exit_code == 0, done.output
    out = json.loads(done.stdout)
    assert out["size"] == 32 and len(out["swapped"]) > 8 and out["parity"]["top1_agreement"] is not None


@pytest.mark.every(3)
def test_a_folder_of_diffusers_draws(photographs, tmp_path):
    """What it gives are pictures, so that PSNR is what is told."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("skimage", reason="the extra images is not installed")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=[32, 32], layers_per_block=1, norm_num_groups=8, sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).save_pretrained(tmp_path)  # fmt: skip
    done = run("swap", tmp_path, "--images", photographs, "--batch", 1, "--json", "-", "--min-cosine", 0.9)
    assert done.exit_code == 0, done.output
    out = json.loads(done.stdout)
    assert out["parity"]["psnr_min"] > 20 and out["parity"]["top1_agreement"] is None
    assert any("conv" in s["fqn"] for s in out["swapped"])


def test_what_is_not_there_is_refused_in_a_sentence(photographs, weights, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(vision, "photographs", lambda *a: pytest.fail("refused after the work, not before"))
    done = run("swap", "torchvision:resnet18")
    refused(done, "torchvision's weights of resnet18 are not on this machine (")
    assert "downloads nothing: pass --weights FILE, a state dict such as https" in done.stderr
    refused(run("swap", "timm:resnet18"), "timm's weights of resnet18 are not on this machine")
    refused(run("swap", "torchvision:resnet19"), "torchvision has no model resnet19: it has resnet1")
    refused(run("swap", "timm:nothing_at_all"), "timm has no model nothing_at_all")
    refused(run("swap", "torchvision:fasterrcnn_resnet50_fpn"), "returns boxes, which this command does not compare")
    refused(run("swap", "timm:test_resnet", "--weights", tmp_path / "no.pth"), "there is no file ")
    refused(run("swap", "torchvision:resnet18", "--weights", weights), "holds no state dict of this ResNet")
    (tmp_path / "bad.pth").write_bytes(b"no zip")
    refused(run("swap", "timm:test_resnet", "--weights", tmp_path / "bad.pth"), "holds no state dict of this")


def test_pictures_that_are_none_are_refused(weights, tmp_path):
    args = ("swap", "timm:test_resnet", "--weights", weights)
    refused(run(*args, "--images", tmp_path / "nothing"), "is no folder: pass one with pictures")
    refused(run(*args, "--images", tmp_path), "has no picture (.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    refused(run(*args, "--images", tmp_path), "broken.png: cannot identify image file")


def test_options_of_the_other_kind_of_model_are_refused(folder, weights, tmp_path):
    args = ("swap", "timm:test_resnet", "--weights", weights)
    for option, value in (("--text", weights), ("--kv-cache", "int8"), ("--length", 64), ("--steps", 3)):
        refused(run(*args, option, value), f"{option} is for models of text, and this is one of pictures: drop it")
    refused(run("swap", folder, "--images", tmp_path), "--images is for models of pictures")
    refused(run("swap", folder, "--weights", weights), "--weights is for models of pictures")
