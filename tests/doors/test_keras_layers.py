"""Models of Keras 3 on torch: Dense, and EinsumDense that is a Linear, compute on swapped layers."""

import copy
import gc
import os
import pickle
import weakref

import pytest
import torch
from later import Later, later
from processes import fork
from torch import nn

import forwardpass as fp
from forwardpass.swap import originals

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = later("keras")
layers = Later("keras.layers")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_names():
    if keras.config.backend() != "torch":
        pytest.skip("keras was imported with another backend than torch")
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)


def sequential():
    model = keras.Sequential(
        [layers.Input((80,)), layers.Dense(96, "gelu", name="up"), layers.Dense(64, name="down", use_bias=False)]
    )
    return model, torch.randn(5, 80)


def encoder():
    """With attention, whose projections are EinsumDense, and one layer in two places."""
    x = keras.Input((11, 64))
    shared = layers.Dense(64, name="shared")
    h = layers.Add()([x, layers.MultiHeadAttention(4, 16, name="mha")(x, x)])
    h = layers.Dense(136, "relu", name="up")(layers.LayerNormalization()(h))
    h = shared(shared(layers.Dense(64, name="down")(h)))
    head = layers.EinsumDense("...c,cde->...de", output_shape=(3, 40), bias_axes="de", name="head")
    return keras.Model(x, head(h)), torch.randn(3, 11, 64)


def subclassed():
    from keras_models import Subclassed  # which imports keras

    model, x = Subclassed(), torch.randn(2, 3, 64)
    model(x)
    return model, x


class Held(nn.Module):
    """A module of torch with a keras model in it."""

    def __init__(self):
        super().__init__()
        self.body, _ = sequential()
        self.head = nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.body(x))


#: model -> the names of layers that are swapped
MODELS = {
    sequential: {"sequential/up", "sequential/down"},
    encoder: {"mha/query", "mha/key", "mha/value", "mha/attention_output", "up", "shared", "down", "head"},
    subclassed: {"outer/dense", "outer/inner/dense_1", "outer/inner/dense_2", "outer/dense_3", "outer/dense_4"},
}


def predict(model, x):
    return torch.from_numpy(model.predict(x, verbose=0, batch_size=2).astype("float32"))


def state(model):
    """What a swap must leave as it was."""
    attributes = [sorted(vars(x)) for x in model._flatten_layers()]
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    return attributes, parameters, list(model.state_dict()), [*model._modules]


def near(a, b, error=0.03):
    return (a - b).norm() < error * b.norm()


@pytest.mark.every(2)
@pytest.mark.parametrize("precision", ["int8", "w8a16", "bf16"])
@pytest.mark.parametrize("make", MODELS)
def test_swapped_and_restored(make, precision):
    model, x = make()
    before, was, variables = predict(model, x), state(model), [v.numpy().copy() for v in model.variables]
    assert type(fp.swap(model, precision, dry_run=True)) is fp.types.Report and state(model) == was
    with torch.no_grad():
        report = fp.swap(model, precision)
        assert {layer.fqn.rpartition("#")[0] or layer.fqn for layer in report.swapped} == MODELS[make]
        assert not report.warnings
        during = predict(model, x)
        assert near(during, before) and not torch.equal(during, before)
        torch.testing.assert_close(model(x), during, rtol=0, atol=1e-4)
        assert model(x[:0]).shape == (0, *before.shape[1:])
    assert all((v.numpy() == w).all() for v, w in zip(model.variables, variables))
    swapped = {layer.fqn for layer in report.swapped}
    assert not [name for name, _ in model.named_parameters() if "kernel" in name]
    assert swapped <= {name for name, _ in model.named_modules()}
    fp.restore(model)
    assert state(model) == was
    assert torch.equal(predict(model, x), before)
    fp.swap(model, precision)
    assert torch.equal(predict(model, x), during)


def test_each_layer_is_its_linear():
    model, x = encoder()
    query = model.get_layer("mha").query_dense
    kernel, bias = query.kernel.value.detach(), query.bias.value.detach()
    linear = nn.Linear(64, 64)
    linear.weight.data, linear.bias.data = kernel.reshape(64, 64).t(), bias.reshape(64)
    fp.swap(model, "int8", include="mha/query")
    with torch.no_grad():
        assert torch.equal(query(x), fp.nn.Int8Linear.from_torch(linear)(x).unflatten(-1, (4, 16)))
        assert query(torch.full((1, 2, 64), torch.nan)).isnan().all()
    assert model.get_layer("up").compute_output_shape((3, 11, 64)) == (3, 11, 136)
    assert "call" not in vars(model.get_layer("up"))  # it stays, and is keras' alone
    again = keras.Model(model.input, model.get_layer("down").output)  # symbolic calls ask for shapes
    assert near(predict(again, x), predict(again, x)) and layers.Dense(8)(model.output).shape == (None, 11, 3, 8)
    assert model.get_layer("up")(keras.Input((4, 64))).shape == (None, 4, 136)


def test_a_keras_model_within_a_module_of_torch():
    torch.manual_seed(0)
    model, x = Held().eval(), torch.randn(4, 80)
    with torch.no_grad():
        before = model(x)
        report = fp.swap(model, {"body.*up": "w8a16", "**": "int8"})
        assert {layer.fqn: layer.precision for layer in report.swapped} == {
            "body.sequential/up": "w8a16",
            "body.sequential/down": "int8",
            "head": "int8",
        }
        assert near(model(x), before)
        fp.restore(model)
        assert torch.equal(model(x), before)


def _lora(layer):
    layer.enable_lora(2)


REFUSED = {
    "subclass": (lambda: type("Own", (layers.Dense,), {})(64), None, "subclass"),
    "lora": (lambda: layers.Dense(64), _lora, "keras"),
    "quantised": (lambda: layers.Dense(64), lambda layer: layer.quantize("int8"), "keras"),
    "mixed": (lambda: layers.Dense(64, dtype="mixed_bfloat16"), None, "dtype"),
    "half": (lambda: layers.Dense(64, dtype="float64"), None, "dtype"),
    "replaced": (lambda: layers.Dense(64), lambda layer: vars(layer).update(call=lambda x, training=None: x), "hooks"),
    "order": (lambda: layers.EinsumDense("abc,dc->abd", (None, 64)), None, "equation"),
    "batch": (lambda: layers.EinsumDense("abc,bcd->abd", (3, 64)), None, "equation"),
    "middle": (lambda: layers.EinsumDense("abc,bd->adc", (64, 64)), None, "equation"),
    "bias": (lambda: layers.EinsumDense("abc,cd->abd", (3, 64), bias_axes="bd"), None, "equation"),
    "nan": (lambda: layers.Dense(64), lambda layer: layer._kernel.value.data.fill_(torch.nan), "not_finite"),
    "small": (lambda: layers.Dense(2), None, "too_small"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_stay_are_named(name):
    make, change, code = REFUSED[name]
    layer, x = make(), torch.randn(2, 3, 64)
    model = keras.Sequential([layers.Input((3, 64)), layers.Dense(64, name="other"), layer])
    if change:
        change(layer)
    before = predict(model, x)
    if code != "too_small":
        with pytest.raises(fp.Unsupported, match="strict=True"):
            fp.swap(model, "int8", strict=True)
    report = fp.swap(model, "int8")
    assert [skipped.reason.code for skipped in report.skipped] == [code]
    assert layer.name in report.skipped[0].fqn or name in ("subclass",)
    assert [other.fqn for other in report.swapped] == ["sequential/other"]
    if name != "nan":
        assert near(predict(model, x), before)
    fp.restore(model)
    torch.testing.assert_close(predict(model, x), before, rtol=0, atol=0, equal_nan=True)


def test_a_layer_that_is_not_built():
    from keras_models import Subclassed

    model = Subclassed()
    report = fp.swap(model, "int8")
    assert not report.swapped and {s.reason.code for s in report.skipped} == {"uninitialized"}


def test_a_failed_swap_leaves_the_model(monkeypatch):
    model, x = encoder()
    before, was = predict(model, x), state(model)
    with pytest.raises(ValueError, match="no precision"):
        fp.swap(model, {"up": "int9"})
    monkeypatch.setattr(originals, "remember", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fp.swap(model, "int8")
    assert state(model) == was and torch.equal(predict(model, x), before)
    monkeypatch.undo()
    fp.swap(model, "int8")
    during = predict(model, x)
    with pytest.raises(RuntimeError, match="already holds"):
        fp.swap(model, "int8")
    assert torch.equal(predict(model, x), during)


def test_what_would_change_the_weights_is_refused(tmp_path):
    model, x = sequential()
    model.compile("sgd", "mse")
    before = predict(model, x)
    model.save_weights(tmp_path / "m.weights.h5")
    fp.swap(model, "int8")
    calls = [
        lambda: model.fit(x, torch.zeros(5, 64), verbose=0),
        lambda: model.set_weights(model.get_weights()),
        lambda: model.load_weights(tmp_path / "m.weights.h5"),
        lambda: model.get_layer("up").enable_lora(2),
        lambda: model.quantize("int8"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"float weights of which swapped layers.*fp\.restore"):
            call()
    assert model.evaluate(x, before, verbose=0) < 0.01
    fp.restore(model)
    assert torch.equal(predict(model, x), before)
    model.fit(x, torch.zeros(5, 64), verbose=0)
    assert not torch.equal(predict(model, x), before)
    model.load_weights(tmp_path / "m.weights.h5")
    assert torch.equal(predict(model, x), before)


def test_parts_refuse_too():
    model, _ = subclassed()
    was = state(model)
    fp.swap(model, "int8", include="*/inner/*")
    for part in (model, model.inner, model.inner.layers[0]):
        with pytest.raises(RuntimeError, match="float weights"):
            part.set_weights(part.get_weights())
    model.first.set_weights(model.first.get_weights())  # it stays
    fp.restore(model)
    assert state(model) == was


def test_keras_stores_the_float_model(tmp_path):
    model, x = encoder()
    before = predict(model, x)
    fp.swap(model, "int8")
    model.save(tmp_path / "model.keras")
    others = [
        keras.models.load_model(tmp_path / "model.keras"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ]
    for other in others:
        assert torch.equal(predict(other, x), before)
    with pytest.raises(ValueError, match=r"model\.save"):
        fp.save_pretrained(model, tmp_path / "folder")


def test_what_knows_no_layers_of_keras_says_so():
    model, x = sequential()
    with pytest.raises(ValueError, match=r"no layers of keras.*fp\.swap"):
        fp.plan(model, [x], min_cosine=0.99)
    was = state(model)
    for keep in ("cpu", False):
        with pytest.raises(ValueError, match=r"keras, which holds their weights itself: pass keep=\"device\""):
            fp.swap(model, "int8", keep=keep)
    assert state(model) == was


def test_calibration_plan_and_parity():
    model, x = encoder()
    before = predict(model, x)
    with torch.no_grad():
        report = fp.swap(model, "int8", calibrate=[x])
        assert near(predict(model, x), before, 0.02)
        parity = fp.parity(model, [x])
        assert parity.output.cosine_min > 0.999
        assert {layer.fqn for layer in parity.layers} == {layer.fqn for layer in report.swapped}
        during = predict(model, x)
        fp.restore(model)
        fp.swap(model, plan=report.plan, calibrate=[x])
        assert torch.equal(predict(model, x), during)
        fp.restore(model)
    assert torch.equal(predict(model, x), before)


def test_a_swapped_model_is_freed():
    model, x = encoder()
    predict(model, x)
    fp.swap(model, "int8")
    layer, model_ref = model.get_layer("up"), weakref.ref(model)
    del model
    keras.utils.clear_session()
    gc.collect()
    assert model_ref() is None and layer(x).shape == (3, 11, 136)


def test_a_layer_in_two_models():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            shared = layers.Dense(80)
            self.a = keras.Sequential([layers.Input((80,)), shared])
            self.b = keras.Sequential([layers.Input((80,)), layers.Dense(80), shared])

        def forward(self, x):
            return self.a(x) + self.b(x)

    model, x = Pair().eval(), torch.randn(3, 80)
    with torch.no_grad():
        before = model(x)
        assert len(fp.swap(model, "int8").swapped) == 2
        assert near(model(x), before)
        fp.restore(model)
        assert torch.equal(model(x), before)


def test_in_bfloat16():
    keras.config.set_dtype_policy("bfloat16")
    try:
        model, x = sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    with torch.no_grad():
        before = model(x)
        report = fp.swap(model, "int8")
        assert len(report.swapped) == 2 and model(x).dtype == torch.bfloat16
        assert near(model(x).float(), before.float())


def test_importing_forwardpass_does_not_import_keras():
    code = (
        "import sys, torch, forwardpass as fp; fp.swap(torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), 'int8'); "
    )
    done = fork.run(code + "print('keras' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
