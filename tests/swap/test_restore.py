"""restore: the same Module and Parameter objects, bit for bit; and a sentence where there is nothing to restore."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from rotation import paired
from small_models import CONFIGS, assert_same_objects, batch, block, build, objects, outputs
from torch import nn

import forwardpass as fp
from forwardpass.swap import originals


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "keep"), paired(CONFIGS, ["auto", "device", "cpu"]))
def test_the_same_objects_and_outputs(name, keep):
    model, inputs = build(name), batch(name)
    before, exact = objects(model), outputs(model, inputs)
    fp.swap(model, "int8", keep=keep)
    assert not torch.equal(outputs(model, inputs), exact)
    fp.restore(model)
    assert_same_objects(model, before)
    assert torch.equal(outputs(model, inputs), exact)
    for precision in ("w8a16", "fp8"):  # and again
        fp.swap(model, precision)
        fp.restore(model)
        assert_same_objects(model, before)


def test_gradients_flags_and_hooks_of_the_originals():
    model = block().train()
    model.first.weight.requires_grad_(False)
    model(torch.randn(2, 64)).sum().backward()
    grad = model.second.weight.grad
    before = objects(model)
    with pytest.warns(UserWarning, match="training mode"):
        fp.swap(model, "int8", keep="cpu")
    model.eval()
    fp.restore(model)
    assert_same_objects(model, before)
    assert model.second.weight.grad is grad
    assert not any(m.training for m in model.modules())  # as the model is now


def test_originals_are_outside_the_model():
    model = block()
    fp.swap(model, "int8")
    assert [n for n, p in model.named_parameters() if p.numel()] == ["head.weight", "head.bias"]
    assert sum(t.nbytes for t in model.state_dict().values()) < 4 * 64 * 128
    file = io.BytesIO()
    torch.save(model, file)
    assert len(file.getvalue()) < 4 * 64 * 128
    assert len(pickle.dumps(copy.deepcopy(model))) < 4 * 64 * 128


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_works_and_cannot_be_restored(how):
    model, x = block(), torch.randn(3, 64)
    exact = outputs(model, x)
    fp.swap(model, "int8")
    other = how(model)
    assert torch.equal(outputs(other, x), outputs(model, x))
    with pytest.raises(RuntimeError, match="2 swapped layers and no originals, being a copy"):
        fp.restore(other)
    fp.restore(model)
    assert not torch.equal(outputs(other, x), exact)  # still swapped
    with pytest.raises(RuntimeError, match="not swapped: there is nothing to restore"):
        fp.restore(model)


def test_a_copy_of_the_original_is_swapped_by_itself():
    model, x = block(), torch.randn(3, 64)
    exact, other = outputs(model, x), copy.deepcopy(model)
    fp.swap(other, "int8")
    assert torch.equal(outputs(model, x), exact)
    fp.restore(other)
    assert torch.equal(outputs(other, x), exact)


def test_a_swapped_submodule():
    model = nn.Sequential(block(), block())
    fp.swap(model[1], "int8")
    with pytest.raises(RuntimeError, match=r"only its submodule 1 was swapped: .*get_submodule\('1'\)"):
        fp.restore(model)
    fp.restore(model.get_submodule("1"))


def test_keep_false_lets_the_originals_go():
    model = block()
    gone = weakref.ref(model.first)
    report = fp.swap(model, "int8", keep=False)
    gc.collect()
    assert gone() is None
    assert report.weight_bytes.originals == 0
    assert report.weight_bytes.originals_device is None
    assert "originals not kept" in str(report)
    with pytest.raises(RuntimeError, match="keep=False, so its originals are gone"):
        fp.restore(model)
    with pytest.raises(RuntimeError, match="keep=False let the originals go"):
        report.__enter__()


def test_a_dropped_model_takes_its_originals_with_it():
    model = block()
    original = weakref.ref(model.first)
    report = fp.swap(model, "int8")
    gone, entries = weakref.ref(model), len(originals._swapped)
    del model
    gc.collect()
    assert gone() is None
    assert original() is None
    assert len(originals._swapped) == entries - 1
    with report:  # has nothing to restore any more
        pass


def test_the_report_restores():
    model, x = block(), torch.randn(3, 64)
    before, exact = objects(model), outputs(model, x)
    with fp.swap(model, "int8") as report:
        assert len(report.swapped) == 2
        assert not torch.equal(outputs(model, x), exact)
    assert_same_objects(model, before)
    with pytest.raises(KeyError, match="mine"), fp.swap(model, "int8"):
        raise KeyError("mine")
    assert_same_objects(model, before)
    with fp.swap(model, "int8"):
        fp.restore(model)  # inside: then the exit has nothing to do
    with fp.swap(model, "int8"):
        fp.restore(model)
        fp.swap(model, "w8a16")  # another swap, which is not this block's
    assert isinstance(model.first, fp.nn.W8A16Linear)
    fp.restore(model)
    assert_same_objects(model, before)


def test_a_report_pickles():
    report = fp.swap(block(), "int8")
    assert pickle.loads(pickle.dumps(report)) == report


def test_dtype_and_layers_that_were_replaced_since():
    model = block()
    before = objects(model)
    fp.swap(model, "int8")
    model.half()
    swapped = model.second
    model.second = nn.Linear(128, 64)
    with pytest.raises(RuntimeError, match="second is no longer the Int8Linear"):
        fp.restore(model)
    assert isinstance(model.first, fp.nn.Int8Linear)  # all or none
    model.second = swapped
    fp.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16}  # float32 beside it before
    assert id(model.first.weight) == before[1]["first.weight"][0]
    assert model(torch.randn(3, 64).half()).dtype == torch.float16


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_model_that_was_cast_is_restored_in_one_dtype(name):
    model = build(name)
    expected = {n: p.to(torch.bfloat16) for n, p in model.state_dict().items()}
    fp.swap(model, "int8", include="**", attention=False)
    model.bfloat16()
    fp.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items() if t.is_floating_point())


def test_hooks_on_replacements_are_spoken_of():
    model = block()
    fp.swap(model, "int8")
    model.first.register_forward_hook(lambda *a: None)
    with pytest.warns(UserWarning, match="hooks registered on 1 replaced layers"):
        fp.restore(model)


def test_a_model_that_defines_equality():
    class Equal(nn.Sequential):
        def __eq__(self, other):
            return True

        __hash__ = None

    a, b = Equal(block()).eval(), Equal(block()).eval()
    fp.swap(a[0], "int8")
    fp.swap(b[0], "w8a16")
    fp.restore(a[0])
    assert isinstance(b[0].first, fp.nn.W8A16Linear)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["auto", "device"])
def test_on_a_gpu(keep):
    model, x = block().cuda(), torch.randn(3, 64, device="cuda")
    before, exact = objects(model), outputs(model, x)
    report = fp.swap(model, "int8", keep=keep)
    kept = originals.find(model).layers[0].original
    assert kept.weight.device.type == ("cpu" if keep == "auto" else "cuda") == report.weight_bytes.originals_device
    assert fp.parity(model, [x]).output.cosine_min > 0.99
    assert kept.weight.device.type == report.weight_bytes.originals_device
    model.cpu()
    fp.restore(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    model.cuda()
    assert_same_objects(model, before)
    assert torch.equal(outputs(model, x), exact)


def test_an_interrupt_amid_the_exchange_undoes_it():
    class Interrupted(dict):
        def __setitem__(self, name, module):
            if name == "second" and isinstance(module, fp.nn.Int8Linear):
                raise KeyboardInterrupt
            super().__setitem__(name, module)

    model = block()
    vars(model)["_modules"] = Interrupted(model._modules)
    before = objects(model)
    with pytest.raises(KeyboardInterrupt):
        fp.swap(model, "int8")
    assert_same_objects(model, before)


def test_moved_data_comes_back_after_a_failure():
    """To "cpu:0", which is not equal to "cpu": the move takes its whole path, and the data stays where it is."""
    model = block()
    before, data = objects(model), [p.data_ptr() for p in model.parameters()]
    there = torch.device("cpu", 0)

    def modules():
        yield model.first
        raise MemoryError("here")

    with pytest.raises(MemoryError, match="here"):
        originals.Moved(modules(), there)
    moved = originals.Moved([model.first, model.second], there)
    with torch.no_grad():
        for p in model.first.parameters():
            p.data = p.data + 1
    moved.undo()
    assert_same_objects(model, before)
    assert [p.data_ptr() for p in model.parameters()] == data


def test_a_model_moved_to_meta_restores_to_where_the_originals_are():
    model = block()
    before = objects(model)
    fp.swap(model, "int8")
    for name in ("first", "second"):
        getattr(model, name).to("meta")
    fp.restore(model)
    assert_same_objects(model, before)


def test_what_another_model_shares_stays_where_it_is():
    """It was moved with the originals, to the CPU, under the other model."""
    layer, other = nn.Linear(8, 8), nn.Linear(8, 8)
    assert originals.held_elsewhere([layer]) == []
    other.weight = layer.weight
    held = originals.held_elsewhere([layer])
    assert len(held) == 1 and held[0] is layer.weight
    originals.Moved([nn.ParameterList([layer.weight])], torch.device("meta"), but=held)
    optimizer = torch.optim.SGD([layer.bias], 0.1)
    assert len(originals.held_elsewhere([layer])) == 2 and optimizer.param_groups
