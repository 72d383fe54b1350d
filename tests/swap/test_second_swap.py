"""A second swap of what the first left alone, and what takes each back."""

import pytest
import torch
from small_models import assert_same_objects, block, objects
from torch import nn

import forwardpass as fp


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_a_second_swap_takes_what_the_first_left_alone():
    model, x = Two().eval(), torch.ones(3, 64)
    with torch.inference_mode():
        y = model(x)
        before = objects(model)
        first = fp.swap(model, "int8", include="first.**")
        after_first, y_first = objects(model), model(x)
        second = fp.swap(model, "w8a16")
        assert {s.fqn for s in first.swapped} == {s.fqn.replace("second", "first", 1) for s in second.swapped}
        assert {s.precision for s in second.swapped} == {"w8a16"} and not {s.fqn for s in second.skipped} & {
            s.fqn for s in first.swapped
        }
        y_both = model(x)
        assert not torch.equal(y_both, y_first) and (y_both - y).norm() < 0.05 * y.norm()
        parity = fp.parity(model, [x])
        assert {layer.fqn for layer in parity.layers} == {s.fqn for s in (*first.swapped, *second.swapped)}
        assert torch.equal(model(x), y_both)
        with pytest.raises(RuntimeError, match=r"already holds 4 swapped layers.*, and nothing else"):
            fp.swap(model, "int8")
        replayed = Two().eval()
        for report in (first, second):
            fp.swap(replayed, plan=report.plan)
        assert torch.equal(replayed(x), y_both)
        with second:
            pass
        assert_same_objects(model, after_first)
        assert torch.equal(model(x), y_first)
        with fp.swap(model, "w8a16"):
            assert torch.equal(model(x), y_both)
            fp.restore(model)
            assert_same_objects(model, before)
        with first, fp.swap(model, "int8"):  # restored meanwhile: the first report describes nothing any more
            pass
        assert_same_objects(model, before)


def test_the_first_of_two_swaps_takes_the_second_back_too():
    model = Two().eval()
    before = objects(model)
    with fp.swap(model, "int8", include="first.**"):
        fp.swap(model, "w8a16")
    assert_same_objects(model, before)
    fp.swap(model, "int8", include="first.**", keep=False)
    fp.swap(model, "int8")
    both = objects(model)
    with pytest.raises(RuntimeError, match="keep=False"):
        fp.restore(model)
    assert_same_objects(model, both)


def test_a_restore_that_fails_on_the_first_of_two_changes_nothing():
    model = Two().eval()
    first = fp.swap(model, "int8", include="first.**").swapped[0].fqn
    fp.swap(model, "w8a16")
    model.set_submodule(first, nn.Identity())
    changed = objects(model)
    with pytest.raises(RuntimeError, match="is no longer the"):
        fp.restore(model)
    assert_same_objects(model, changed)
