"""Convolutions in fp.swap: what becomes of them, with the norms and activations behind them, and what stays, and why."""

import copy
import json
import pickle

import pytest
import torch
from conv_models import MODELS, WIDE, Block, Conv, build, picture, randomised
from torch import nn

import forwardpass as fp
from forwardpass.nn import Int8Conv2d
from forwardpass.nn.folded import FoldedNorm, SharedActivation
from forwardpass.proofs import convolution
from forwardpass.proofs.walker import convolutions
from forwardpass.swap import rules

pytestmark = pytest.mark.filterwarnings("ignore:swap. int8_conv2d has no kernel")


def off(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


def swapped(name, **options):
    """(the model, swapped in its wide convolutions; a picture; what the model gave for it; the report)."""
    model, x = build(name), picture()
    with torch.inference_mode():
        expected = model(x)
        report = fp.swap(model, "int8", include=WIDE[name], **options)
    return model, x, expected, report


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_wide_convolutions_are_swapped_with_what_is_behind_them(name):
    model, x, expected, report = swapped(name)
    assert [s.fqn for s in report.swapped] == WIDE[name] and not report.apart
    assert off(model(x), expected) < 0.03
    assert off(model(x.contiguous(memory_format=torch.channels_last)), expected) < 0.03
    computes = {s.fqn: s.computes for s in report.swapped}
    assert (
        computes
        == {
            "resnet": {
                "blocks.0.conv1": "int8 v1, 3 x 3 + batch norm + relu",
                "blocks.0.conv2": "int8 v1, 3 x 3 + batch norm + add + relu",
                "blocks.1.conv1": "int8 v1, 3 x 3 + batch norm + relu",
                "blocks.1.conv2": "int8 v1, 3 x 3 + batch norm + add + relu",
                "blocks.1.downsample.0": "int8 v1, 1 x 1 / 2 + batch norm",
            },
            "yolo": {
                "down.conv": "int8 v1, 3 x 3 / 2 + batch norm + silu",
                "c2f.cv1.conv": "int8 v1, 1 x 1 + batch norm + silu",
                "c2f.cv2.conv": "int8 v1, 1 x 1 + batch norm + silu",
                "c2f.m.0.0.conv": "int8 v1, 3 x 3 + batch norm + silu",
                "c2f.m.0.1.conv": "int8 v1, 3 x 3 + batch norm + silu",
                "detect": "int8 v1, 1 x 1",
            },
            "mobilenet": {
                "block.conv.0.0": "int8 v1, 1 x 1 + batch norm + hard_swish",
                "block.conv.2": "int8 v1, 1 x 1 + batch norm",
            },
            "plain": {"second": "int8 v1, 1 x 3"},
        }[name]
    )


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_restore_brings_the_same_objects_back(name):
    model, x = build(name), picture()
    expected, state, modules = (
        model(x),
        {n: t.clone() for n, t in model.state_dict().items()},
        dict(model.named_modules()),
    )
    fp.swap(model, "int8", include=WIDE[name])
    assert not torch.equal(model(x), expected)
    fp.restore(model)
    assert torch.equal(model(x), expected)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_folders_plans_and_copies_give_the_same_bits(name, tmp_path):
    model, x, _, report = swapped(name)
    y = model(x)
    fp.save_pretrained(model, tmp_path / "folder")
    loaded = fp.load_pretrained(tmp_path / "folder", model=MODELS[name]().eval())
    assert torch.equal(loaded(x), y)
    on_meta = fp.load_pretrained(tmp_path / "folder", model=MODELS[name]().eval().to("meta"))
    # Its tensors are the file's memory, aligned otherwise, which layers in floats may show in their last bit.
    assert all(torch.equal(t, on_meta.state_dict()[n]) for n, t in model.state_dict().items())
    assert off(on_meta(x), y) < 0.01
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), y)
    empty = MODELS[name]().eval()
    fp.swap(empty, "int8", include=WIDE[name])
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(x), y)
    report.save_plan(tmp_path / "plan.json")
    fp.restore(model)
    fp.swap(model, plan=tmp_path / "plan.json")
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match=r"it has no Linear layer, convolution or experts|has .in_features"):
        fp.swap(nn.Sequential(nn.Conv2d(16, 16, 1)), plan=tmp_path / "plan.json")


def test_a_folder_of_another_model_is_refused(tmp_path):
    model, *_ = swapped("resnet")
    fp.save_pretrained(model, tmp_path / "folder")
    record = json.loads((tmp_path / "folder" / "forwardpass.json").read_text())
    other = build("resnet")
    other.blocks[0].conv1 = nn.Conv2d(32, 32, 1)
    with pytest.raises(ValueError, match="recorded as"):
        fp.load_pretrained(tmp_path / "folder", model=other)
    other = build("resnet")
    other.blocks[0].bn1 = nn.GroupNorm(4, 32)
    with pytest.raises(ValueError, match=r"computes|has no place|is missing"):
        fp.load_pretrained(tmp_path / "folder", model=other)
    for damage in ({"groups": 0}, {"kernel_size": "3"}, {"stride": [0, 1]}, {"out_channels": "32"}):
        record["layers"][0]["config"].update(damage)
        (tmp_path / "folder" / "forwardpass.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="does not fit this ResNet"):
            fp.load_pretrained(tmp_path / "folder", model=build("resnet"))


# ---- what stays, and why


@pytest.fixture
def whatever_size(monkeypatch):
    monkeypatch.setattr(rules, "LEAST_CONVOLUTIONS_ON_CPU", {})
    monkeypatch.setattr(rules, "LEAST_SIZE", rules.LeastSize(0, 1))


def codes(model, precision="int8", **options):
    report = fp.swap(model, precision, dry_run=True, **options)
    return {s.fqn: s.reason.code for s in report.skipped}


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.narrow = nn.Conv2d(32, 8, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, groups=4)
        self.reflect = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 32, 1))
        self.read = nn.Conv2d(32, 32, 1)
        self.hooked = nn.Conv2d(32, 32, 1)
        self.hooked.register_forward_hook(lambda *_: None)
        self.double = nn.Conv2d(32, 32, 1, dtype=torch.float64)
        self.own = type("Own", (nn.Conv2d,), {})(32, 32, 1)
        self.wide, self.transposed = nn.Conv2d(32, 32, 1), nn.ConvTranspose2d(32, 32, 1)

    def forward(self, x):
        return self.stem(x) + self.read.weight.sum()


@pytest.mark.filterwarnings("ignore:swap")
def test_what_stays_says_why(whatever_size):
    by_default = {"stem": "narrow", "narrow": "narrow", "depthwise": "depthwise", "grouped": "narrow"}
    of_model = {"reflect": "padding_mode", "normed": "parametrized", "read": "weight_read", "hooked": "hooks", "double": "dtype",
                "own": "subclass"}  # fmt: skip
    assert codes(Kinds().eval(), calibrate=[(picture(),)]) == by_default | of_model
    others = fp.swap(Kinds().eval(), "int8", dry_run=True).other_layers
    assert ("ConvTranspose2d", "convolution") in [(x.module, x.reason.code) for x in others]


def test_by_default_convolutions_wait_for_calibration(whatever_size):
    model = build("yolo")
    assert codes(model) == {"stem.conv": "narrow"} | dict.fromkeys(WIDE["yolo"], "uncalibrated")
    assert codes(model, calibrate=[(picture(),)]) == {"stem.conv": "narrow"}
    assert codes(model, precision={"down.*": "int8"}).keys() == {"stem.conv", *WIDE["yolo"]} - {"down.conv"}
    with pytest.raises(fp.Unsupported, match="hooks are registered"):
        fp.swap(Kinds().eval(), "int8", strict=True, include=["hooked"])


@pytest.mark.parametrize(
    ("tier", "swapped"), [("avx512_vnni", ["1", "3"]), ("avx2", ["3"]), ("avx512", ["3"]), ("amx", ["1", "3"])]
)
def test_a_cpu_keeps_convolutions_that_int8_would_slow_down(monkeypatch, tier, swapped):
    monkeypatch.setattr(rules, "cpu_tier", lambda: tier)
    convs = [nn.Conv2d(24, 144, 1), nn.Conv2d(144, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3)]
    report = fp.swap(nn.Sequential(*convs).eval(), "int8", dry_run=True, calibrate=[(picture(),)])
    assert [s.fqn for s in report.swapped] == swapped
    assert {s.reason.code for s in report.skipped} == {"too_small"}


@pytest.mark.parametrize("precision", ["fp8", "w8a16", "bf16", "int8_rotated"])
def test_other_precisions_have_none_for_convolutions(precision):
    model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Flatten(), nn.Linear(256, 256)).eval()
    report = fp.swap(model, precision, dry_run=True, strict=True)  # which refuses what a model makes impossible
    assert [(s.fqn, s.reason.code) for s in report.skipped if s.fqn == "0"] == [("0", "convolution")]


# ---- what comes between after the swap


class Recorder:
    def __init__(self, module):
        self.seen = []
        self.handle = module.register_forward_hook(lambda m, i, o: self.seen.append(o.clone()))


@torch.inference_mode()
def test_a_hook_behind_a_convolution_sees_what_it_saw():
    plain, x = build("resnet"), picture()
    model = build("resnet")
    fp.swap(model, "int8", include=WIDE["resnet"])
    for name in ("conv1", "bn1", "bn2"):
        recorders = [Recorder(getattr(m.blocks[0], name)) for m in (plain, model)]
        before, after = plain(x), model(x)
        assert off(after, before) < 0.03
        assert off(recorders[1].seen[0], recorders[0].seen[0]) < 0.03, name
        for r in recorders:
            r.handle.remove()


@torch.inference_mode()
def test_another_module_in_the_place_of_a_norm_or_an_activation_counts():
    for name, other in (("bn1", nn.Identity()), ("bn1", nn.GroupNorm(4, 32)), ("relu", nn.Tanh())):
        plain, model, x = build("resnet"), build("resnet"), picture()
        fp.swap(model, "int8", include=WIDE["resnet"])
        for m in (plain, model):
            setattr(m.blocks[0], name, copy.deepcopy(other))
        assert off(model(x), plain(x)) < 0.05, name


@torch.inference_mode()
def test_a_norm_in_training_mode_normalises_by_its_batch():
    plain, model, x = build("resnet"), build("resnet"), picture()
    fp.swap(model, "int8", include=WIDE["resnet"])
    for m in (plain, model):
        m.blocks[0].bn1.train()
    assert off(model(x), plain(x)) < 0.03
    assert off(model.blocks[0].bn1.running_mean, plain.blocks[0].bn1.running_mean) < 0.03
    for m in (plain, model):
        m.eval()
    assert off(model(x), plain(x)) < 0.03


@torch.no_grad()
def test_a_norm_that_is_written_into_loaded_or_cast_counts():
    plain, model, x = build("resnet"), build("resnet"), picture()
    fp.swap(model, "int8", include=WIDE["resnet"])
    model(x)
    for m in (plain, model):
        m.blocks[0].bn1.weight.mul_(-2)
        m.blocks[1].bn2.running_var.mul_(3)
    assert off(model(x), plain(x)) < 0.03
    state = {n: 1.5 * t for n, t in build("resnet").state_dict().items() if ".bn" in n and t.is_floating_point()}
    for m in (plain, model):
        assert not m.load_state_dict(state, strict=False).unexpected_keys
    assert off(model(x), plain(x)) < 0.03
    model.to(torch.bfloat16)
    assert off(model(x.to(torch.bfloat16)).float(), plain(x)) < 0.05


def test_a_model_in_training_mode_folds_once_it_is_not():
    model, x = build("resnet").train(), picture()
    with pytest.warns(UserWarning, match="training mode"):
        fp.swap(model, "int8", include=WIDE["resnet"])
    model.eval()
    with torch.inference_mode():
        assert off(model(x), build("resnet")(x)) < 0.03


# ---- what is read is run


class Tapped(nn.Module):
    """What its norm gives goes elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        y = self.bn(y)
        z = self.act(y)
        return z + y


class Shifted(Tapped):
    def forward(self, x):
        return self.act(self.bn(self.conv(x) + 1))


@pytest.mark.parametrize(("cls", "norm"), [(Tapped, True), (Shifted, False)])
@torch.inference_mode()
def test_what_does_more_than_that_keeps_it(cls, norm):
    model, x = randomised(cls()), picture()
    expected = model(x)
    report = fp.swap(model, "int8", include=["conv"])
    assert [(s.norm, s.activation) for s in report.swapped] == [(norm, None)] and not report.apart
    assert off(model(x), expected) < 0.03


@torch.inference_mode()
def test_what_was_misread_is_run_and_stays_apart(monkeypatch):
    read = {"conv": ("bn", True), "bn": ("act", True)}
    monkeypatch.setattr(convolution, "called_next", lambda methods, name: read.get(name, (None, False)))
    model, x = randomised(Shifted()), picture()
    expected = model(x)
    report = fp.swap(model, "int8", include=["conv"])
    assert [(s.norm, s.activation) for s in report.swapped] == [(False, None)]
    assert [(s.fqn, s.reason.code) for s in report.apart] == [("conv", "disproved")]
    assert off(model(x), expected) < 0.03


@torch.inference_mode()
def test_a_norm_that_is_not_as_torch_has_it_stays():
    norms = [nn.BatchNorm2d(32, track_running_stats=False), nn.GroupNorm(4, 32), type("Own", (nn.BatchNorm2d,), {})(32)]
    for norm in norms:
        model = nn.Sequential(nn.Conv2d(32, 32, 1), norm, nn.ReLU()).eval()
        assert convolutions(model)[0].norm is None and convolutions(model)[0].activation is None
    shared = nn.BatchNorm2d(32)
    model = nn.Sequential(nn.Conv2d(32, 32, 1), shared, nn.Conv2d(32, 32, 1), shared).eval()
    assert [leaf.norm for leaf in convolutions(model)] == [None, None]


def test_stand_ins_say_what_they_are():
    model, *_ = swapped("resnet")
    block = model.blocks[0]
    assert isinstance(block.bn1, FoldedNorm) and isinstance(block.relu, SharedActivation)
    assert isinstance(block.conv1, Int8Conv2d) and "norm, activation=relu" in str(block.conv1)
    assert "BatchNorm2d, by the layer before it" in str(block) and "ReLU, by layers before it" in str(block)
    assert block.bn1.num_features == 32 and {n for n, _ in block.bn1.named_parameters()} == {"weight", "bias"}
    assert {*model.state_dict()} >= {n for n in build("resnet").state_dict() if ".bn" in n}


# ---- measuring


@torch.inference_mode()
def test_calibrated_convolutions_have_one_scale():
    batches = [picture(4)]
    model, x, expected, report = swapped("yolo", calibrate=batches)
    layers = [m for m in model.modules() if isinstance(m, Int8Conv2d)]
    assert [m.kernel_size for m in layers if m.input_scale is not None] == 3 * [(3, 3)]
    assert [m.kernel_size for m in layers if m.channel_scale is not None] == 3 * [(1, 1)]  # as a Linear is calibrated
    assert off(model(x), expected) < 0.05 and all(x.calibrated for x in report.plan.layers)


@torch.inference_mode()
def test_parity_compares_pixels():
    model, x, *_ = swapped("resnet")
    result = fp.parity(model, [x])
    assert [layer.fqn for layer in result.layers] == WIDE["resnet"]
    for layer in result.layers:
        assert (
            layer.total.samples == 2 * (6 * 6 if "blocks.1" in layer.fqn else 12 * 12)
            and 1e-4 < layer.total.relative_error < 0.02
        )
        assert layer.kernel.relative_error < 1e-5
    reference = build("resnet")
    fp.restore(model)
    fp.swap(model, "int8", include=WIDE["resnet"], keep=False)
    assert fp.parity(model, [x], reference=reference).output.cosine_min > 0.999


@pytest.mark.every(2)
def test_plan_has_a_row_for_each():
    model, x = build("yolo"), picture(4)
    before = {n: id(m) for n, m in model.named_modules()}
    plan = fp.plan(model, [x], min_cosine=0.99, candidates=["int8", "int8+calibrated"], calibrate=[picture()])
    rows = {row["fqn"]: row for row in plan.evidence["layers"]}
    assert {*rows} == {*WIDE["yolo"], "stem.conv"} and {n: id(m) for n, m in model.named_modules()} == before
    fp.swap(model, plan=plan, calibrate=[picture()] if plan.calibrated else None) if plan.layers else None


@pytest.mark.every(3)
@torch.inference_mode()
def test_compiled_code_gives_the_same():
    model, x, _, _ = swapped("resnet")
    y = model(x)
    assert off(torch.compile(model, backend="eager", fullgraph=True)(x), y) < 1e-5


def test_convs_of_classes_that_pad_by_themselves():
    from timm.layers import Conv2dSame

    model = nn.ModuleDict({"one": Conv2dSame(32, 32, 3), "strided": Conv2dSame(32, 32, 3, stride=2)}).eval()
    layer, x = Int8Conv2d.from_torch(model["one"]), torch.randn(1, 32, 9, 9)
    with torch.inference_mode():
        assert off(layer(x), model["one"](x)) < 0.02
    assert Int8Conv2d.why_not(model["strided"]).code == "padding"


def test_blocks_of_a_library_are_read():
    from timm.layers import BatchNormAct2d

    model = randomised(nn.Sequential(Conv(32, 32), Block(32), nn.Conv2d(32, 32, 1), BatchNormAct2d(32)))
    leaves = convolutions(model)
    assert [(leaf.norm is not None, leaf.formula) for leaf in leaves] == [
        (True, "silu"),
        (True, "relu"),
        (True, None),
        (True, "relu"),
    ]
