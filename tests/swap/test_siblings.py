"""Layers of one input: which are, by the code that calls them, and that as one product they are what they were."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from rotation import in_turn
from small_models import build
from torch import nn

import forwardpass as fp
from forwardpass.nn.linear.joined import MOST_ROWS_ON_CPU, Joined
from forwardpass.nn.linear.quantized_linear import QuantizedLinear
from forwardpass.proofs.siblings import siblings
from forwardpass.proofs.walker import linear_leaves

SIZE = 64


class Layers(nn.Module):
    def __init__(self, bias=(True, True, True)):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(SIZE, n, bias=has) for n, has in zip((SIZE, 48, 48), bias))
        self.act = nn.SiLU()


class Straight(Layers):
    def forward(self, x):
        q = self.a(x).view(*x.shape[:-1], -1, 16)
        k, v = self.b(x).tanh(), self.c(x).reshape(x.size(0), -1)
        return q, k, v


class Gated(Layers):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x))


class Cross(Layers):
    def forward(self, x, other):
        q = self.a(x)
        if other is not None:
            k = self.b(other)
            v = self.c(other)
        else:
            k, v = q, q
        return q, k, v


class Changed(Layers):
    def forward(self, x):
        q = self.a(x)
        q.add_(1)
        k = self.b(x)
        x = x + 1
        return q, k, self.c(x)


class Used(Layers):
    def forward(self, x):
        q = self.a(x)
        h = self.act(x)
        return q, self.b(x), self.c(x), h


class Perhaps(Layers):
    def forward(self, x):
        q = self.a(x) if x.sum() else x
        for _ in range(2):
            k = self.b(x)
        return q, k, [self.c(x) for _ in range(2)]


class Twice(Layers):
    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), self.a(x + 1)


class Stored(Layers):
    def forward(self, x):
        q = self.a(x)
        x[0] = 1
        k = self.b(x)
        torch.add(x, x, out=x)
        return q, k, self.c(x)


class Augmented(Layers):
    def forward(self, x):
        q = self.a(x)
        x += 1
        return q, self.b(x), self.c(x)


@pytest.mark.parametrize(
    ("cls", "runs"),
    [
        (Straight, ["abc"]),
        (Gated, ["ab"]),
        (Cross, ["bc"]),
        (Changed, []),
        (Used, ["bc"]),
        (Perhaps, []),
        (Twice, []),
        (Stored, []),
        (Augmented, ["bc"]),
    ],
)
def test_runs_are_read_from_the_code(cls, runs):
    calls = siblings(linear_leaves(nn.Sequential(cls())))
    assert ["".join(leaf.name for leaf in run) for run in calls] == runs


def swapped(cls=Straight, precision="int8", dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(cls()).eval().to(dtype)
    report = fp.swap(model, precision, include=["0.a", "0.b", "0.c"])
    return model, report


def joined_of(model):
    return [m.joined for m in model.modules() if isinstance(m, QuantizedLinear) and m.joined is not None]


def apart(model, *inputs):
    """What the layers give when each computes alone."""
    holders = {m: m.joined for m in model.modules() if isinstance(m, QuantizedLinear)}
    for m in holders:
        m.joined = None
    with torch.no_grad():
        result = model(*inputs)
    for m, joined in holders.items():
        m.joined = joined
    return result


def products(model, *inputs):
    """(how many products a call makes, its result)"""
    calls = []
    original = {cls: cls.product for cls in (fp.nn.Int8Linear, fp.nn.W8A16Linear, fp.nn.Fp8Linear, fp.nn.Bf16Linear)}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for cls, product in original.items():
            patch.setattr(cls, "product", lambda self, x, product=product: (calls.append(self), product(self, x))[1])
        result = model(*inputs)
    return len(calls), result


@pytest.mark.parametrize("precision", ["int8", "w8a16", "fp8", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_one_product_gives_the_same_bits(precision, rows):
    model, report = swapped(precision=precision)
    x = torch.randn(rows, SIZE)
    assert report.joined == [("0.a", "0.b", "0.c")]
    assert "one product" in str(report) and report.to_json()["joined"] == [["0.a", "0.b", "0.c"]]
    calls, result = products(model, x)
    assert calls == 1
    for together, alone in zip(result, apart(model, x)):
        assert torch.equal(together, alone)


def test_another_activation_stays_apart():
    model, _ = swapped(Gated)
    assert isinstance(model[0], fp.nn.GatedMLP)  # not views of one weight
    assert not joined_of(model)


def test_columns_may_be_changed_in_place():
    model, _ = swapped()
    x = torch.randn(3, SIZE)
    layers = model[0]
    layers(x)
    layers.a.joined.begin(layers)
    q, k = layers.a(x), layers.b(x).clone()  # with gradients enabled
    q *= 2
    assert torch.equal(layers.b(x), k) and torch.equal(layers.c(x), layers.c.product(x))


def test_many_rows_on_a_cpu_are_computed_alone():
    model, _ = swapped()
    assert products(model, torch.randn(MOST_ROWS_ON_CPU, SIZE))[0] == 1
    assert products(model, torch.randn(MOST_ROWS_ON_CPU + 1, SIZE))[0] == 3


def test_another_input_is_computed_alone():
    model, report = swapped(Cross)
    x, other = torch.randn(2, 3, SIZE)
    assert report.joined == [("0.b", "0.c")]
    holder = model[0]
    with torch.no_grad():
        for together, alone in zip(holder(x, other), apart(holder, x, other)):
            assert torch.equal(together, alone)
    assert products(holder, x, None)[0] == 1


def test_layers_that_are_called_by_hand_see_what_their_input_is_now():
    model, _ = swapped()
    x = torch.randn(3, SIZE)
    layers = model[0]
    with torch.inference_mode():
        layers.a(x)
        x.mul_(2)
        assert torch.equal(layers.b(x), layers.b.product(x.clone()))


def test_a_forward_that_raises_before_its_layers_does_not_begin_a_later_call():
    model, _ = swapped()
    layers = model[0]
    with torch.inference_mode():
        x = torch.randn(3, SIZE)  # torch does not count what is written into it
        with pytest.raises(TypeError):
            layers()
        layers.a(x)
        x.mul_(2)
        assert torch.equal(layers.b(x), layers.b.product(x.clone()))


def test_an_interrupted_forward_leaves_nothing_behind():
    model, _ = swapped(Straight)
    layers = model[0]
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        hook = layers.b.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            layers(x)
        hook.remove()
        x.mul_(2)
        for together, alone in zip(model(x), apart(model, x)):
            assert torch.equal(together, alone)
    assert layers.a.joined._result is None


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.half().float(),
        lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True), m)[1],
        lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}), m)[1],
    ],
    ids=["deepcopy", "pickle", "half", "assigned", "loaded"],
)
def test_copied_cast_and_loaded(change):
    model, _ = swapped()
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        model(x)
    model = change(model)
    assert len({*joined_of(model)}) == 1 and joined_of(model)[0].members == (model[0].a, model[0].b, model[0].c)
    assert products(model, x)[0] == 1
    for together, alone in zip(model(x), apart(model, x)):
        assert torch.equal(together, alone)


def test_other_values_are_used():
    model, _ = swapped()
    other, _ = swapped()
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        other[0].b.qweight.neg_()
        other[0].b.weight_sum.neg_()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x)[1], other(x)[1])
        model[0].c.weight_scale = model[0].c.weight_scale * 2
        for together, alone in zip(model(x), apart(model, x)):
            assert torch.equal(together, alone)


def test_state_dict_holds_each_layer_alone(tmp_path):
    model, _ = swapped()
    state = model.state_dict()
    assert state["0.b.qweight"].shape == (48, SIZE)
    fp.save_pretrained(model, tmp_path / "checkpoint")
    loaded = fp.load_pretrained(tmp_path / "checkpoint", model=nn.Sequential(Straight()).eval())
    x = torch.randn(3, SIZE)
    calls, result = products(loaded, x)
    assert calls == 1
    for a, b in zip(result, model(x)):
        assert torch.equal(a, b)


def test_restored_without_a_trace():
    model, _ = swapped()
    fp.restore(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_differs_stays_apart():
    model = nn.Sequential(Straight(bias=(True, False, False))).eval()
    report = fp.swap(model, "w8a16", include=["0.a", "0.b", "0.c"])
    assert report.joined == []
    model, _ = swapped()
    fp.restore(model)
    report = fp.swap(
        model, "int8", include=["0.a", "0.b", "0.c"], calibrate=[torch.randn(64, SIZE)]
    )  # smoothed each by its own weight
    assert report.joined == []
    fp.restore(model)
    report = fp.swap(model, "int8", include=["0.a", "0.b", "0.c"], calibrate=[torch.randn(64, SIZE)], dry_run=True)
    assert report.joined == []


def test_no_trace_of_a_dry_run():
    model = nn.Sequential(Straight()).eval()
    report = fp.swap(model, "int8", include=["0.a", "0.b", "0.c"], dry_run=True)
    assert report.joined == [("0.a", "0.b", "0.c")] and not model[0]._forward_hooks


@pytest.mark.parametrize("cls", [Straight, Gated])
def test_neither_originals_nor_the_model_are_kept(cls):
    model = nn.Sequential(cls()).eval()
    original = weakref.ref(model[0].a)
    fp.swap(model, "int8", include=["0.a", "0.b", "0.c"], keep=False)
    gc.collect()
    assert original() is None
    model = nn.Sequential(cls()).eval()
    fp.swap(model, "int8", include=["0.a", "0.b", "0.c"])
    dropped = weakref.ref(model)
    del model
    gc.collect()
    assert dropped() is None


def test_threads_do_not_mix():
    model, _ = swapped()
    inputs = [torch.randn(3, SIZE) for _ in range(4)]
    expected = [apart(model, x) for x in inputs]
    wrong = []

    def run(x, y):
        with torch.no_grad():
            for _ in range(50):
                if not all(torch.equal(a, b) for a, b in zip(model(x), y)):
                    wrong.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.every(3)
@pytest.mark.parametrize("dynamic", in_turn([False, True]))
def test_compiled_whole(dynamic):
    model, _ = swapped()
    x = torch.randn(3, SIZE)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for _ in range(2):
            for a, b in zip(compiled(x), model(x)):
                assert torch.equal(a, b)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        model[0].b.weight_scale = model[0].b.weight_scale * 2
        for a, b in zip(compiled(x), apart(model, x)):
            assert torch.equal(a, b)


def test_exported():
    model, _ = swapped()
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        for a, b in zip(program(x), model(x)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_decoders(name):
    model = build(name)
    report = fp.swap(model, "w8a16")
    assert {len(names) for names in report.joined} == {2, 3}  # q, k and v; gate and up of a GatedMLP
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        a, b = model(input_ids=ids).logits, apart(model, ids).logits
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def static_layers(scale, smoothing=None):
    torch.manual_seed(0)
    smoothing = torch.rand(SIZE) + 0.5 if smoothing is None else smoothing
    return [
        fp.nn.Int8Linear.from_torch(
            nn.Linear(SIZE, 48), input_scale=torch.tensor([scale]), symmetric=True, channel_scale=smoothing
        )
        for _ in range(3)
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("write", ["load_state_dict", "copy_"])
def test_scales_that_are_written_into_count(write, alike, mode):
    """The product had copies of them: each layer was right, and the model off by .09."""
    x = torch.randn(3, SIZE)
    with mode():
        layers, other = static_layers(0.03), static_layers(0.05, torch.rand(SIZE) + 0.5)
        joined = Joined(layers)
        for layer, new in zip(layers, other) if alike else [(layers[1], other[1])]:
            if write == "load_state_dict":
                layer.load_state_dict(new.state_dict())
            else:
                for name, t in layer._buffers.items():
                    if t is not None:
                        t.copy_(new._buffers[name])
        expected = [layer.product(x) for layer in layers]
        for _ in range(2):
            joined.begin(nn.Module())
            assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected))


def test_an_input_that_is_written_into_through_a_view_counts():
    """What was read is the code of the module; a view that was made before has no name there."""
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        layers = static_layers(0.03)
        joined, view = Joined(layers), x.view(-1)
        joined.begin(nn.Module())
        layers[0](x)
        torch.relu_(view)
        assert all(torch.equal(layer(x), layer.product(x)) for layer in layers[1:])
