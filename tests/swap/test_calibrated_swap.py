"""calibrate=: what batches change, and that nothing of the calibration stays on the model."""

import pytest
import torch
from small_models import assert_same_objects, batch, block, build, inputs, objects, outputs
from torch import nn

import forwardpass as fp


def test_calibration_lowers_the_error():
    x, model = inputs(seed=3), block()
    exact = outputs(model, x)
    errors = []
    for calibrate in (None, [inputs(), inputs(64, 5)]):
        with fp.swap(model, "int8", calibrate=calibrate):
            errors.append((outputs(model, x) - exact).norm())
    assert errors[1] < 0.7 * errors[0]


def test_calibration_leaves_padding_out():
    def run(filler):
        model, ids = build("bert"), batch("bert")
        ids["input_ids"][ids["attention_mask"] == 0] = filler
        fp.swap(model, "int8", calibrate=[ids])
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
    assert any("never reached 1 of 3 layers (unused" in w for w in report.warnings)
    assert len(found) == 2
    assert model.first.channel_scale is None
    assert all(t.isfinite().all() for t in model.state_dict().values())
