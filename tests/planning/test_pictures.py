"""Pictures: PSNR, SSIM and LPIPS of what a swapped model draws, in parity and as the budget of a plan."""

import base64
import importlib.util
import io
import json
import math
import re
import sys
import types

import pytest
import torch
from small_models import assert_same_objects, objects
from torch import nn

import forwardpass as fp
from forwardpass.common.timing import Timing
from forwardpass.planning import pictures, planner
from forwardpass.planning.candidates import measure
from forwardpass.planning.criterion import Criterion
from forwardpass.planning.pictures import PictureComparison, pictures_of

np = pytest.importorskip("numpy")
TIMES = {"before": 4.0, "after": 1.5, "int8": 1.0, "bf16": 2.0}


@pytest.fixture
def skimage():
    return pytest.importorskip("skimage", reason="the extra images is not installed")


@pytest.fixture
def times(monkeypatch):
    def interleave(named, device, *, rounds, warmup, on_round=lambda: None):
        for call in named.values():
            call()
            on_round()
        return {name: Timing(TIMES[name], TIMES[name], TIMES[name], rounds) for name in named}

    monkeypatch.setattr(measure, "interleave", interleave)
    monkeypatch.setattr(planner, "interleave", interleave)


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)).eval()


def drawn(model, seed):
    """Three pictures of 8 x 8 pixels in three steps from noise."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    for _ in range(3):
        x = x - model(x) / 4
    return torch.sigmoid(x).view(3, 1, 8, 8)


@torch.inference_mode()
def compared(model, seeds):
    """(lowest PSNR, pictures) of a swapped model, by hand."""
    after = torch.cat([drawn(model, seed) for seed in seeds])
    fp.restore(model)
    before = torch.cat([drawn(model, seed) for seed in seeds])
    error = (after - before).double().square().flatten(1).mean(1)
    return -10 * math.log10(error.max()), after


# what is taken for pictures


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (torch.rand(2, 3, 8, 9), (2, 3, 8, 9)),
        (torch.rand(2, 8, 9), (2, 1, 8, 9)),
        (torch.rand(2, 1, 8, 9).half(), (2, 1, 8, 9)),
        (np.random.rand(2, 8, 9, 3), (2, 3, 8, 9)),
        (np.random.rand(2, 8, 9), (2, 1, 8, 9)),
        ([np.zeros((8, 9, 4), np.uint8)] * 2, (2, 4, 8, 9)),
        ([np.zeros((8, 9), np.uint8)] * 2, (2, 1, 8, 9)),
    ],
)
def test_what_is_taken_for_pictures(given, shape):
    found = pictures_of(given)
    assert (found.shape, found.dtype) == (shape, torch.float32)


def test_layouts_and_ranges_mean_the_same():
    floats = torch.rand(2, 3, 8, 9).mul(255).round().div(255)
    integers = (floats * 255).round().to(torch.uint8)
    arrays = integers.movedim(1, -1).numpy()
    for given in (integers, arrays, [*arrays], floats.movedim(1, -1).numpy()):
        torch.testing.assert_close(pictures_of(given), floats)
    image = pytest.importorskip("PIL.Image")
    torch.testing.assert_close(pictures_of([image.fromarray(x) for x in arrays]), floats)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (torch.rand(8, 8), ValueError, r"must return pictures \[N, C, H, W\].*returned \[8, 8\]"),
        (torch.rand(2, 2, 8, 8), ValueError, "1, 3 or 4 channels"),
        (np.random.rand(2, 3, 8, 8), ValueError, r"\[N, H, W, C\].*returned \[2, 3, 8, 8\]"),
        (torch.rand(2, 1, 6, 8), ValueError, "at least 7 x 7 pixels"),
        (torch.rand(0, 1, 8, 8), ValueError, r"returned \[0, 1, 8, 8\]"),
        (torch.rand(1, 1, 8, 8) * 2 - 1, ValueError, "must return floats in 0..1, and returned -.*scale and clamp"),
        (torch.ones(1, 1, 8, 8, dtype=torch.int64), TypeError, "floats in 0..1 or uint8, and returned torch.int64"),
        ([torch.rand(1, 8, 8)] * 2, TypeError, "torch.stack"),
        ("picture.png", TypeError, "returned a str, which holds no pictures"),
        (None, TypeError, "returned a NoneType"),
    ],
)
def test_what_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        pictures_of(given)


# measures


def test_psnr_and_ssim(skimage):
    before = torch.rand(2, 3, 9, 9) / 2
    after = before.clone()
    after[1] += 0.1
    assert pictures.psnr(after, before).tolist() == pytest.approx([math.inf, 20.0], abs=1e-4)
    assert pictures.ssim(before, before).tolist() == pytest.approx([1.0, 1.0])
    assert 0 < pictures.ssim(after, before)[1] < 1
    after[0, 0, 0, 0] = math.nan
    assert pictures.psnr(after, before).isnan().tolist() == [True, False]


@pytest.mark.parametrize(("kind", "bound"), [("min_psnr", 30.0), ("min_ssim", 0.95)])
def test_criteria(skimage, kind, bound):
    criterion = Criterion(kind, bound)
    assert criterion.shown(criterion.budget) == pytest.approx(bound)
    before = torch.rand(4, 1, 16, 16) / 2
    errors = criterion.additive(before, before, None)
    assert errors.shape == (4,) and errors.max() < 1e-12
    assert math.isfinite(criterion.shown(criterion.worst(errors, before, before, None)))  # JSON has no infinity
    for off, fails in ((10**-1.6, False), (10**-1.4, True)) if kind == "min_psnr" else ((0.001, False), (0.4, True)):
        after = before.clone()
        after[2] += off
        errors = criterion.additive(after, before, None)
        assert errors.argmax() == 2
        assert criterion.fails(criterion.worst(errors, after, before, None)) is fails
    after[0, 0, 0, 0] = math.nan
    assert criterion.fails(criterion.worst(criterion.additive(after, before, None), after, before, None))


@pytest.fixture
def lpips(monkeypatch, tmp_path):
    """A package of that name, whose distance is the mean difference; its network takes pictures of 16 pixels and more."""

    class Network(torch.nn.Module):
        def forward(self, a, b, normalize):
            assert normalize and a.shape[1] == b.shape[1] == 3
            if a.shape[-1] < 16:
                raise RuntimeError("kernel size can't be greater than actual input size")
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    module = types.ModuleType("lpips")
    module.LPIPS = lambda net, verbose: Network()
    module.__spec__ = importlib.util.spec_from_loader("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pictures._lpips.cache_clear()
    yield tmp_path / "checkpoints"
    pictures._lpips.cache_clear()


def test_lpips_where_it_is_installed(skimage, lpips):
    before = torch.rand(2, 1, 16, 16) / 2
    found = PictureComparison()
    found.add(before + 0.25, before, 0)
    assert not found.lpips and found.without_lpips == "torchvision's weights of AlexNet are not in torch's hub folder"
    pictures._lpips.cache_clear()
    lpips.mkdir()
    (lpips / "alexnet-owt-0.pth").touch()
    found = PictureComparison()
    found.add(before + 0.25, before, 0)
    assert found.lpips == pytest.approx([0.25, 0.25]) and found.without_lpips is None
    assert found.to_json()["lpips_max"] == pytest.approx(0.25)
    assert "largest LPIPS 0.2500" in next(iter(found.blocks()))
    found.add(before[..., :8, :8], before[..., :8, :8], 1)
    assert not found.lpips and "kernel size" in found.without_lpips
    assert len(found.psnr) == 4


# parity


def test_parity(skimage, tmp_path):
    model, seeds = block(), range(3)
    before = objects(model)
    fp.swap(model, "int8")
    report = fp.parity(model, seeds, images=drawn)
    images = report.images
    assert report.batches == 3 and report.output.samples == len(images.psnr) == 9
    assert 0.999 < report.output.cosine_min < 1 and not report.unreached
    assert all(layer.total.samples == 27 for layer in report.layers)  # 3 rows, 3 steps, 3 seeds
    assert images.worst[0].psnr == min(images.psnr) and len(images.worst) == pictures.SHOWN
    assert [x.psnr for x in images.worst] == sorted(images.psnr)[: pictures.SHOWN]
    worst = images.worst[0]
    assert images.psnr[3 * worst.batch + worst.index] == worst.psnr
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))["images"]
    assert content["psnr_min"] == min(images.psnr) and content["ssim_min"] == min(images.ssim)
    assert f"9 pictures: lowest PSNR {min(images.psnr):.2f} dB" in str(report)
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    shown = [base64.b64decode(x) for x in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(shown) == 3 * pictures.SHOWN and "http" not in page
    image = pytest.importorskip("PIL.Image")
    first = np.asarray(image.open(io.BytesIO(shown[0])))
    assert first.shape == (8, 8) and abs(first / 255 - worst.before[0].numpy()).max() <= 0.5 / 255 + 1e-6
    expected, after = compared(model, seeds)
    assert min(images.psnr) == pytest.approx(expected, abs=1e-3)
    torch.testing.assert_close(worst.after, after[3 * worst.batch + worst.index], rtol=0, atol=1e-6)
    assert_same_objects(model, before)
    assert "images" in report.to_json()["measured"]


def test_parity_with_a_reference(skimage):
    model = block()
    fp.swap(model, "int8", keep=False)
    report = fp.parity(model, [0], block(), images=drawn)
    assert 20 < min(report.images.psnr) < 90


def test_noise_of_torchs_own_generator_is_the_same_for_both(skimage):
    model = block()

    def unseeded(model, _):
        return drawn(model, int(torch.randint(1000, ())))

    fp.swap(model, "int8")
    state = torch.get_rng_state()
    assert min(fp.parity(model, [0, 0], images=unseeded).images.psnr) > 25
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", ["parity", "plan"])
def test_a_drawing_that_does_not_repeat_is_refused(skimage, times, how):
    model, generator = block(), torch.Generator().manual_seed(0)

    def other(model, _):
        return drawn(model, int(torch.randint(1 << 20, (), generator=generator)))

    if how == "parity":
        fp.swap(model, "int8")
    before = objects(model)
    options = {} if how == "parity" else {"min_psnr": 30, "candidates": "int8"}
    with pytest.raises(ValueError, match=r"drew pictures \d+\.\d dB apart of the same batch.*from a seed within it"):
        getattr(fp, how)(model, [0], images=other, **options)
    assert_same_objects(model, before)


def test_without_scikit_image_it_is_refused(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "skimage" else find(name, *a))
    model = block()
    words = r"PSNR and SSIM of images= need scikit-image: pip install 'scikit-image>=0\.22'"
    with pytest.raises(ValueError, match=words):
        fp.plan(model, [0], images=drawn, min_psnr=30)
    fp.swap(model, "int8")
    with pytest.raises(ValueError, match=words):
        fp.parity(model, [0], images=drawn)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forward": drawn}, "and forward= says it too: drop forward="),
        ({"output": lambda x: x}, "and output= says it too"),
        ({"task": "embedding"}, "drop task="),
        ({"compiled": True}, "drop compiled="),
    ],
)
def test_what_parity_takes_no_pictures_with(skimage, options, words):
    model = block()
    fp.swap(model, "int8")
    with pytest.raises(ValueError, match=words):
        fp.parity(model, [0], images=drawn, **options)


# plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_psnr": 30.0}, "min_psnr= bounds pictures.*pass images="),
        ({"min_ssim": 0.9}, "min_ssim= bounds pictures"),
        ({"min_psnr": 30.0, "min_ssim": 0.9, "images": drawn}, "exactly one criterion.*got min_psnr, min_ssim"),
        ({"images": drawn}, "exactly one criterion.*got none"),
        ({"min_ssim": 1.1, "images": drawn}, "min_ssim must be between -1 and 1"),
        ({"min_psnr": -1.0, "images": drawn}, "min_psnr must be a finite number, 0 or more"),
        ({"min_psnr": math.nan, "images": drawn}, "min_psnr must be"),
    ],
)
def test_exactly_one_criterion_of_pictures(options, words):
    with pytest.raises(ValueError, match=words):
        fp.plan(block(), [0], **options)


def test_images_is_a_function():
    with pytest.raises(TypeError, match="images= is a function"):
        fp.plan(block(), [0], images=torch.rand(1, 1, 8, 8), min_psnr=30)


def test_a_plan_holds_its_psnr(skimage, times):
    model, seeds = block(), range(4)
    before = objects(model)
    fp.swap(model, "int8")
    all_in_int8, _ = compared(model, seeds)
    chosen = {}
    for bound in (all_in_int8 - 3, all_in_int8 + 3, 200.0):
        plan = fp.plan(model, seeds, images=drawn, min_psnr=bound, candidates=["int8", "bf16"])
        assert_same_objects(model, before)
        assert plan.evidence["criterion"] == {"kind": "min_psnr", "bound": bound}
        chosen[bound] = [x["choice"] for x in plan.evidence["layers"]]
        if plan.layers:
            held = [a["value"] for a in plan.evidence["attempts"] if a["holds"]][-1]
            fp.swap(model, plan=plan)
            found, _ = compared(model, seeds)
            assert found >= bound and found == pytest.approx(held, abs=0.1)
            assert f"lowest PSNR in dB >= {bound:g}" in str(plan).replace("\n  ", " ")
    low, high, highest = chosen.values()
    assert set(low) == {"int8"} and set(high) != {"int8"} and set(highest) == {None}


def test_a_plan_holds_its_ssim(skimage, times):
    model = block()
    plan = fp.plan(model, [0, 1], images=drawn, min_ssim=0.9, candidates=["int8"])
    assert plan.layers and plan.evidence["criterion"]["kind"] == "min_ssim"
    fp.swap(model, plan=plan)
    assert min(fp.parity(model, [0, 1], images=drawn).images.ssim) >= 0.9


@pytest.mark.every(2)
def test_calibration_draws(skimage, times, monkeypatch):
    monkeypatch.setitem(TIMES, "int8+calibrated", 0.9)
    model = block()
    plan = fp.plan(model, [0], images=drawn, min_psnr=10, candidates=["int8+calibrated"], calibrate=range(50, 150))
    assert plan.calibrated and plan.layers
    fp.swap(model, plan=plan, calibrate=range(50, 150), forward=drawn)
    assert min(fp.parity(model, [0], images=drawn).images.psnr) >= 10
