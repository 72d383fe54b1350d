"""Plans: they replay, and a plan that does not fit is refused before anything is changed."""

import os

import pytest
import torch
from small_models import assert_same_objects, block, codes, inputs, names, objects, outputs

import forwardpass as fp
from forwardpass.common.batches import Fingerprint


@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16", "bf16"])
def test_a_plan_replays(tmp_path, precision):
    model, x = block(), torch.randn(4, 64)
    report = fp.swap(model, precision, exclude="second")
    expected = outputs(model, x)
    report.save_plan(tmp_path / "plan.json")
    for plan in (tmp_path / "plan.json", str(tmp_path / "plan.json"), report.plan, report.plan.to_json()):
        again = block()
        replayed = fp.swap(again, plan=plan)
        assert codes(replayed) == {"second": "not_planned", "head": "not_planned"}
        assert replayed.plan == report.plan
        assert torch.equal(outputs(again, x), expected)


def test_a_plan_overrules_the_defaults_but_not_the_user():
    plan = fp.swap(block(), "int8", include=["first", "head"], dry_run=True).plan
    assert names(fp.swap(block(), plan=plan)) == ["first", "head"]
    assert names(fp.swap(block(), plan=plan, exclude="first")) == ["head"]


def test_a_plan_of_two_precisions_calibrates_those_that_take_it():
    plan = fp.swap(block(), "int8", calibrate=[inputs()], dry_run=True).plan.to_json()
    plan["layers"][1].update(precision="w8a16", calibrated=False)
    model = block()
    report = fp.swap(model, plan=plan, calibrate=[inputs()])
    assert [s.precision for s in report.swapped] == ["int8", "w8a16"]
    assert model.first.channel_scale is not None
    written = report.to_json()["plan"]
    assert written.pop("calibration").startswith("sha256:")  # a dry run reads no batches
    assert written == {k: v for k, v in plan.items() if k != "calibration"}


def test_a_plan_for_fp8_does_not_fit_a_gpu_without_it():
    plan = fp.swap(block(), "fp8", dry_run=True).plan
    model = block()
    before = objects(model)
    with fp.interpret("sm_80"), pytest.raises(ValueError, match=r"names first, and this GPU is sm_80.*use int8"):
        fp.swap(model, plan=plan)
    assert_same_objects(model, before)


def test_a_plan_of_no_layers_is_for_its_model_too():
    plan = fp.swap(block(), "int8", exclude="**", dry_run=True).plan
    assert plan.layers == () and plan.linear_layers.startswith("3 Linear layers, sha256:")
    assert fp.swap(block(), plan=plan.to_json()).swapped == []
    smaller, wider = block(), block(width=96)
    del smaller.head
    renamed = torch.nn.Sequential(*block().children())
    for model, has in ((smaller, "2 Linear layers"), (wider, "3 Linear layers"), (renamed, "3 Linear layers")):
        before = objects(model)
        with pytest.raises(ValueError, match=f"for another model .Block. .*it has {has}, .* not 3 Linear layers"):
            fp.swap(model, plan=plan.to_json())
        assert_same_objects(model, before)


def edited(**changes):
    def edit():
        plan = fp.swap(block(), "int8", dry_run=True).plan.to_json()
        for path, value in changes.items():
            if path in plan["layers"][0]:
                plan["layers"][0][path] = value
            else:
                plan[path] = value
        return plan

    return edit


BAD_PLANS = [
    (edited(fqn="nowhere"), "another model .*no Linear layer, convolution or experts nowhere"),
    (edited(in_features=65), r"first has \(in_features, out_features, bias\) \(64, 128, True\)"),
    (edited(bias=False), "another model"),
    (edited(schema="forwardpass.plan/9"), "schema 'forwardpass.plan/9', and this version reads"),
    (edited(version=9), "no precision 'int8' version 9"),
    (edited(precision="int3"), "no precision 'int3'"),
    (edited(in_features=True), r"layers\.0\.in_features is 'True', no int"),
    (edited(extra=1), "it has extra, which is not known"),
    (edited(layers={}), "layers is no list"),
    (edited(layers=[3]), r"layers\.0 is no object"),
    (edited(fqn="second"), "names a layer twice"),
    (edited(calibrated=True), "made with calibration"),
    (edited(calibration=3), "calibration is '3', no str or null"),
    (edited(linear_layers=3), "linear_layers is '3', no str"),
    (edited(linear_layers="3 Linear layers"), "another model"),
    (edited(schema="forwardpass.plan/1"), "make the plan again"),
    (edited(evidence=[]), "evidence is .*, no object or null"),
    (
        lambda: {**edited()(), "layers": [{**edited(precision="w8a16")()["layers"][0], "calibrated": True}]},
        "takes no calibr",
    ),
    (dict, "no schema"),
]


@pytest.mark.parametrize("case", range(len(BAD_PLANS)))
def test_a_plan_that_does_not_fit_is_refused(case):
    make, words = BAD_PLANS[case]
    model = block()
    before = objects(model)
    with pytest.raises(ValueError, match=words) as e:
        fp.swap(model, plan=make())
    assert "\n" not in str(e.value)
    assert_same_objects(model, before)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"schema": NaN}',
        b'{"schema": ' + b"9" * 10_000 + b"}",
    ],
    ids=range(8),
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match="plan") as e:
        fp.swap(block(), plan=tmp_path / "plan.json")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("special", ["/proc/self/mem", "/proc/self/environ", "/dev/zero", "pipe", "folder", "huge"])
def test_only_a_regular_file_of_a_sane_size_is_read(tmp_path, special):
    path = tmp_path / special if "/" not in special else special
    if special == "pipe":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    elif special == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"is not a plan .*: write one with fp.plan") as e:
        fp.swap(block(), plan=path)
    assert "\n" not in str(e.value)


def test_a_file_is_written_through_no_link_that_waits(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "plan.json.partial").symlink_to(tmp_path / "mine")
    plan = fp.swap(block(), "int8", dry_run=True).plan
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "mine").read_text() == "mine"
    assert fp.Plan.load(tmp_path / "plan.json") == plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "plan.json", "plan.json.partial"]


def test_a_plan_for_a_layer_that_has_hooks_now_is_refused():
    plan, model = fp.swap(block(), "int8", dry_run=True).plan, block()
    model.first.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="does not fit this Block: it names first, and hooks are registered"):
        fp.swap(model, plan=plan)


def test_a_fingerprint_tells_batches_apart():
    def of(*given):
        return Fingerprint().add(given).value

    x = torch.arange(6.0)
    same = of({"a": x, "b": [1, None]})
    assert same == of({"a": x.clone(), "b": (1, None)}) == of({"a": torch.arange(12.0)[::2] / 2, "b": [1, None]})
    others = [
        of({"b": [1, None], "a": x}), of({"a": x.double(), "b": [1, None]}), of({"a": x.view(2, 3), "b": [1, None]}),
        of({"a": x + 1, "b": [1, None]}), of({"a": x, "b": [1]}), of({"a": x, "b": [1, None]}, x), of(),
    ]  # fmt: skip
    assert len({same, *others}) == 1 + len(others)
    assert of(object()) is None
    assert list(Fingerprint().reading([1, 2])) == [1, 2]
