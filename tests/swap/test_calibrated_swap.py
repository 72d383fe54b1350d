"""calibrate=: what batches change, and that nothing of the calibration stays on the model."""

import contextlib

import pytest
import torch
from small_models import assert_same_objects, batch, block, build, codes, inputs, names, objects, outputs
from torch import nn

import forwardpass as fp
from forwardpass.calibration.running import LEAST_ROWS


def test_calibration_lowers_the_error():
    x, model = inputs(seed=3), block()
    exact = outputs(model, x)
    errors = []
    for calibrate in (None, [inputs(), inputs(64, 5)]):
        with fp.swap(model, "int8", calibrate=calibrate):
            errors.append((outputs(model, x) - exact).norm())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_batch_alone_is_refused_and_its_rows_are_no_batches(dry_run):
    model, x = block(), inputs()
    before = objects(model)
    for batch_alone in (x, {"x": x}, "x"):
        kind = type(batch_alone).__name__
        with pytest.raises(
            TypeError, match=rf"calibrate is an iterable of batches, not a {kind}: pass \[batch\] for one"
        ):
            fp.swap(model, "int8", calibrate=batch_alone, dry_run=dry_run)
    assert_same_objects(model, before)


def test_calibration_leaves_padding_out():
    def run(filler):
        model, ids = build("bert"), batch("bert")
        ids["input_ids"][ids["attention_mask"] == 0] = filler
        fp.swap(model, "int8", calibrate=[ids] * 3)
        return model.state_dict()

    a, b = run(5), run(77)
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_calibration_puts_hooks_and_flags_back():
    model = block()
    model.first.train()
    before = objects(model), [m.training for m in model.modules()]

    def forward(model, batch):
        assert not model.first.training
        assert torch.is_inference_mode_enabled()
        model(batch)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fp.swap(model, "int8", calibrate=[inputs()], forward=forward)
    assert_same_objects(model, before[0])
    assert [m.training for m in model.modules()] == before[1]
    assert not any(m._forward_pre_hooks for m in model.modules())
    fp.swap(model, "int8", calibrate=iter([(inputs(),)]))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_says_what_it_could_not_calibrate(bad):
    model, x = block(), inputs()
    x[3, 3] = bad
    model.unused = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="NaN or infinity") as found:
        report = fp.swap(model, "int8", calibrate=[x])
    assert len(found) == len(report.warnings) == 1
    assert codes(report)["unused"] == "not_reached" and type(model.unused) is nn.Linear
    assert model.first.channel_scale is None
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_what_no_batch_reaches_stays_in_floats():
    """It was rounded to nearest, with a warning."""
    model, x = block(), inputs()
    model.unused = nn.Linear(64, 64)
    before = objects(model)
    with pytest.raises(fp.Unsupported, match=r"strict=True.* would skip unused.* no batch of calibrate= reaches it"):
        fp.swap(model, "int8", calibrate=[x], strict=True)
    assert_same_objects(model, before)
    report = fp.swap(model, "int8", calibrate=[x])
    assert names(report) == ["first", "second"] and "not_reached" in str(report)
    assert [layer.fqn for layer in report.plan.layers] == ["first", "second"]
    fp.swap(model, "int8")
    assert type(model.unused) is not nn.Linear


def correlated(rows, seed):
    """Rows as layers meet them: few directions, some noise, channels of other loudness."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(8, 64, generator=torch.Generator().manual_seed(99))
    loud = torch.randn(64, generator=torch.Generator().manual_seed(5)).mul(0.7).exp()
    return (torch.randn(rows, 8, generator=g) @ basis + 0.1 * torch.randn(rows, 64, generator=g)) * loud


def test_few_rows_are_no_evidence():
    """One row makes an error of several times that of no calibration, where it is believed."""
    x, model = correlated(256, 1), block()
    exact, errors = outputs(model, x), {}
    for rows in (0, 1, LEAST_ROWS - 1, LEAST_ROWS, 64):
        calibrate = [correlated(rows, 2)] if rows else None
        few = (
            pytest.warns(UserWarning, match="saw fewer than 32 rows .* at the input of 2 of 2 layers")
            if 0 < rows < LEAST_ROWS
            else None
        )
        with few or contextlib.nullcontext(), fp.swap(model, "int8", calibrate=calibrate) as report:
            assert report.plan.calibrated == (rows >= LEAST_ROWS)
            assert any("fewer than 32 rows" in note for note in report.warnings) == (few is not None)
            errors[rows] = (outputs(model, x) - exact).norm()
    assert errors[1] == errors[LEAST_ROWS - 1] == errors[0] and errors[LEAST_ROWS] <= errors[0]
    assert errors[64] < 0.8 * errors[0]


def test_a_plan_says_which_layers_are_calibrated():
    model, x = block(), inputs(64)
    model.unused = nn.Linear(64, 64)
    model.late = nn.Linear(64, 64)

    def forward(model, batch):
        model(batch)
        model.late(batch[:3])

    batches = [x]
    with pytest.warns(UserWarning, match="fewer than"):
        plan = fp.swap(model, "int8", calibrate=batches, forward=forward).plan
    assert {layer.fqn: layer.calibrated for layer in plan.layers} == {
        "first": True, "second": True, "late": False,
    }  # fmt: skip
    y = outputs(model, x)
    fp.restore(model)
    replayed = fp.swap(model, plan=plan.to_json(), calibrate=batches, forward=forward).plan
    assert replayed == plan and torch.equal(outputs(model, x), y)
    fp.restore(model)
    x[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="NaN or infinity"):
        plan = fp.swap(model, "int8", calibrate=[x]).plan
    assert not plan.calibrated and plan.calibration is None
    fp.restore(model)
    fp.swap(model, plan=plan)
