"""An encoder's layers as one operation, and everything that sends a call back to the layers one by one."""

import copy
import io

import pytest
import torch
from tiny_encoders import (
    IDS,
    PADDED,
    SIZES,
    bert,
    close,
    distilbert,
    hidden,
    last_of,
    layers_of,
    list_of,
    modernbert,
    mpnet,
    swapped,
)
from torch import nn

import forwardpass as fp
from forwardpass.common.environment import cpu_tier
from forwardpass.integrations.transformers import encoder_stack
from forwardpass.integrations.transformers.stacks import rotary_encoder_stack
from forwardpass.ops.encoder_layer import OPERATION

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(cpu_tier() in (None, "baseline"), reason="needs AVX2")

FAMILIES = pytest.mark.parametrize("build", [bert, mpnet, modernbert])


@pytest.fixture
def calls(monkeypatch):
    """How many calls of the operation there were."""
    count = []

    def counted(*args):
        count.append(len(args[2]))
        return OPERATION(*args)

    for module in (encoder_stack, rotary_encoder_stack):
        monkeypatch.setattr(module, "OPERATION", counted)
    return count


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "model", [bert, lambda: bert("Roberta"), lambda: bert("XLMRoberta"), lambda: bert("Electra"), distilbert,
              mpnet, modernbert],
    ids=["bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet", "modernbert"],
)  # fmt: skip
def test_layers_are_one_operation(model, calls):
    model = model()
    exact, exact_padded = hidden(model), hidden(model, attention_mask=PADDED)
    names = [name for name, _ in model.named_modules()]
    model, report = swapped(model)
    assert "3 layers" in str(report) and "are one operation" in str(report)
    assert close(hidden(model), exact) and len(calls) == 1
    assert close(hidden(model, attention_mask=PADDED), exact_padded, PADDED) and len(calls) == 2
    assert {*names} <= {name for name, _ in model.named_modules()}
    assert isinstance(model.get_submodule(report.swapped[0].fqn), fp.nn.Int8Linear)
    fp.restore(model)
    assert torch.equal(hidden(model), exact) and len(calls) == 2


@FAMILIES
def test_it_is_what_the_layers_are(build, calls):
    """But for bfloat16 in attention and the order of sums."""
    model = swapped(build())[0]
    y = hidden(model)
    handle = last_of(layers_of(model)[1]).register_forward_hook(lambda *_: None)
    one_by_one = hidden(model)
    assert len(calls) == 1 and not torch.equal(y, one_by_one) and close(y, one_by_one)
    assert ((y - one_by_one).norm() / one_by_one.norm()) < 5e-3
    handle.remove()
    assert torch.equal(hidden(model), y) and len(calls) == 2


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_16_bits_is_as_near_to_float32_as_by_its_layers(build, dtype, calls):
    exact = hidden(build())
    model = swapped(build().to(dtype))[0]
    y = hidden(model)
    assert len(calls) == 1 and y.dtype == dtype
    last_of(layers_of(model)[1]).register_forward_hook(lambda *_: None)
    one_by_one = hidden(model)
    assert len(calls) == 1 and not torch.equal(y, one_by_one)
    assert (y - exact).norm() < 1.2 * (one_by_one - exact).norm() < 0.05 * exact.norm()


def sends_back():
    def hook(model):
        model.encoder.layer[2].register_forward_hook(lambda *_: None)

    def pre_hook(model):
        model.encoder.layer[0].attention.self.key.register_forward_pre_hook(lambda *_: None)

    def forward(model):
        dense = model.encoder.layer[0].output.dense
        dense.forward = lambda x: type(dense).forward(dense, x)

    def module(model):
        model.encoder.layer[1].output.dense = nn.Linear(256, 64)

    def dtype(model):
        model.encoder.layer[0].output.LayerNorm.double().bfloat16()

    return [hook, pre_hook, forward, module, dtype]


@pytest.mark.every(2)
@pytest.mark.parametrize("change", sends_back(), ids=lambda f: f.__name__)
def test_goes_layer_by_layer_where_something_is_around_one(change, calls):
    model = swapped(bert())[0]
    hidden(model)
    change(model)
    with torch.autocast("cpu", enabled=False):
        try:
            hidden(model)
        except RuntimeError:  # a norm of another dtype than its input, as without the swap
            assert change.__name__ == "dtype"
    assert len(calls) == 1


def others_among_layers():
    def without_last(layers):
        del layers[2]

    def in_another_order(layers):
        layers[1], layers[2] = layers[2], layers[1]

    def compiled(layers):
        layers[1] = torch.compile(layers[1], backend="eager")

    def compiled_in_place(layers):
        layers[1].compile(backend="eager")

    return [without_last, in_another_order, compiled, compiled_in_place]


@pytest.mark.every(2)
@FAMILIES
@pytest.mark.parametrize("change", others_among_layers(), ids=lambda f: f.__name__)
def test_goes_layer_by_layer_where_the_list_of_layers_is_another(build, change, calls):
    model, exact = swapped(build())[0], build()
    for m in (model, exact):
        change(layers_of(m))
    assert close(hidden(model), hidden(exact)) and not calls


def test_weights_that_change_count(calls):
    model = swapped(bert())[0]
    y = hidden(model)
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight.mul_(2)
        assert not torch.equal(hidden(model), y)
        model.encoder.layer[0].output.LayerNorm.weight.div_(2)
        assert torch.equal(hidden(model), y)
        dense = model.encoder.layer[1].output.dense
        dense.weight_scale = dense.weight_scale * 2
        assert not torch.equal(hidden(model), y)
    assert len(calls) == 4


def test_a_weight_that_is_gone_is_noticed(calls):
    """The last one that is looked at: nothing comes after it that would stand in its place."""
    model = swapped(bert())[0]
    hidden(model)
    del model.encoder.layer[-1].output.LayerNorm.bias
    with pytest.raises(AttributeError, match="bias"):
        hidden(model)
    assert len(calls) == 1


@FAMILIES
@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_what_is_between_layers_is_there_where_it_is_asked_for(build, asked, calls):
    model = swapped(build())[0]
    with torch.inference_mode():
        out = model(IDS, **asked)
    found = out.hidden_states if "output_hidden_states" in asked else out.attentions
    assert not calls and all(x.isfinite().all() for x in found)
    assert close(out.last_hidden_state, hidden(model)) and len(calls) == 1


@FAMILIES
def test_goes_layer_by_layer_in_training_under_autocast_and_for_other_masks(build, calls):
    model = swapped(build())[0]
    with torch.autocast("cpu", torch.bfloat16):
        hidden(model)
    left = PADDED.flip(1)
    assert hidden(model, attention_mask=left).isfinite().all()
    model.train()
    hidden(model)
    model.eval()
    with pytest.raises(RuntimeError, match="for inference"):
        model(IDS)  # under grad, as layers one by one
    assert not calls


def positions(model, x, i):
    if not hasattr(model, "rotary_emb"):
        return {}
    kind = model.config.layer_types[i]
    return {"position_embeddings": model.rotary_emb(x, torch.arange(x.shape[1])[None], kind)}


@FAMILIES
def test_layers_can_be_called_alone(build, calls):
    model = swapped(build())[0]
    exact, x = build(), torch.randn(1, 5, 64)
    hidden(model)
    for i in range(3):
        with torch.inference_mode():
            y, expected = (layers_of(m)[i](x, **positions(m, x, i)) for m in (model, exact))
            assert type(y) is type(expected)
            assert close(*(t[0] if isinstance(t, tuple) else t for t in (y, expected)))
    assert len(calls) == 1


def test_a_forward_that_raises_before_its_layers_does_not_begin_a_later_call(calls):
    model = swapped(bert())[0]
    x = torch.randn(1, 5, 64)
    with torch.inference_mode():
        with pytest.raises(TypeError):
            model.encoder()
        y = model.encoder.layer[0](x)
    assert not calls and close(y, bert().encoder.layer[0](x))


def test_goes_layer_by_layer_where_a_part_is_called_in_another_way(calls, monkeypatch):
    model, floats = swapped(bert())[0], bert()
    cls = type(model.encoder.layer[0].intermediate)
    call = cls.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, x: 2 * call(self, x))
    assert close(hidden(model), hidden(floats)) and not calls


@FAMILIES
def test_copies_and_pickles_run_so_too(build, calls):
    model = swapped(build())[0]
    y = hidden(model)
    assert torch.equal(hidden(copy.deepcopy(model)), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(hidden(torch.load(file, weights_only=False)), y)
    assert len(calls) == 3


@FAMILIES
def test_without_padding(build, calls):
    model, report = swapped(build(), unpad=True)
    y = hidden(model, attention_mask=PADDED)
    assert calls and not y[1, 12:].any()
    assert torch.equal(y[0], hidden(model)[0]) and torch.equal(y[1, :12], hidden(model, IDS[1:, :12])[0])
    assert report.to_json()["encoder"] == {"stacks": [{"layers": list_of(model), "count": 3}], "reason": None}


@pytest.mark.parametrize("unpad", [False, True])
def test_a_mask_with_holes_has_other_positions_than_rows(unpad, calls):
    """Its biases are those of positions, and the operation has those of rows."""
    model, holes = mpnet(), PADDED.clone()
    holes[1, 3:6] = 0
    exact = hidden(model, attention_mask=holes)
    swapped(model, unpad=unpad)
    assert close(hidden(model, attention_mask=holes), exact, holes) and not calls


def test_biases_that_differ_from_text_to_text_run_one_by_one(calls, monkeypatch):
    model = swapped(mpnet())[0]
    bias = torch.randn(2, 4, 20, 20)
    monkeypatch.setattr(model.encoder, "compute_position_bias", lambda x: bias)
    y = hidden(model)
    assert not calls
    monkeypatch.setattr(model.encoder, "compute_position_bias", lambda x: bias[1:].expand(2, -1, -1, -1))
    assert close(hidden(model)[1:], y[1:]) and len(calls) == 1


def test_a_form_without_the_biases_is_disproved(monkeypatch):
    floats = encoder_stack.Stack._floats
    monkeypatch.setattr(encoder_stack.Stack, "_floats", lambda self, *operands: floats(self, *operands[:-1], None))
    assert swapped(mpnet())[1].encoder.reason.code == "disproved"


def test_masks_that_are_added_to_scores(calls):
    """MPNet's hide a key by the lowest number that there is. Others count as they are."""
    model = swapped(mpnet())[0]
    x, layers = model.embeddings(IDS), model.encoder
    added = torch.zeros(2, 1, 20, 20)
    added[..., 15:] = -torch.inf
    with torch.inference_mode():
        y = layers(x, added, return_dict=True).last_hidden_state
        assert len(calls) == 1 and close(y[:, :15], hidden(model, IDS[:, :15]))
        layers(x, added.clamp(min=-3), return_dict=True)
    assert len(calls) == 2


def test_calibrated_layers_too(calls):
    """q, k and v are then scaled each in its own way."""
    model = bert()
    exact = hidden(model)
    report = swapped(model, calibrate=[{"input_ids": IDS}] * 2)[1]
    assert report.encoder.reason is None
    attention = model.encoder.layer[0].attention.self
    assert not torch.equal(attention.query.channel_scale, attention.key.channel_scale)
    y = hidden(model)
    assert close(y, exact) and len(calls) == 1
    model.encoder.layer[1].output.register_forward_hook(lambda *_: None)
    one_by_one = hidden(model)
    assert len(calls) == 1 and ((y - one_by_one).norm() / one_by_one.norm()) < 5e-3


def test_it_is_the_default_and_can_be_left_out(calls):
    model = bert()
    report = fp.swap(model, "int8", include="**")
    assert "the 3 layers of encoder.layer are one operation" in str(report)
    assert hidden(model).isfinite().all() and len(calls) == 1
    fp.restore(model)
    report = fp.swap(model, "int8", include="**", encoder=False)
    assert "one operation" not in str(report) and "layer by layer" not in str(report)
    assert hidden(model).isfinite().all() and len(calls) == 1


def test_what_is_no_text_encoder_in_int8_says_nothing_of_it():
    for model, precision in ((nn.Sequential(nn.Linear(64, 64)), "int8"), (bert(), "w8a16")):
        report = fp.swap(model, precision, include="**")
        assert report.encoder.reason.code == "no_encoder" and "layer by layer" not in str(report)


@FAMILIES
@pytest.mark.parametrize("is_one", [False, True])
def test_attention_that_is_to_stay_keeps_the_layers_apart(build, is_one, calls):
    model = build()
    model, report = swapped(model, attention={f"{list_of(model)}.1": None, "**": True} if is_one else False)
    assert report.encoder.reason.code == "attention_kept"
    assert hidden(model).isfinite().all() and not calls


@pytest.mark.every(2)
@FAMILIES
@pytest.mark.parametrize("calibrate", [None, [{"input_ids": IDS}] * 2])
def test_folders_have_it(build, tmp_path, calls, calibrate):
    model = swapped(build(), calibrate=calibrate)[0]
    y = hidden(model)
    fp.save_pretrained(model, tmp_path)
    for load in (fp.load_pretrained, transformers.AutoModel.from_pretrained):
        loaded, before = load(tmp_path), len(calls)
        assert torch.equal(hidden(loaded), y) and len(calls) == before + 1
    fp.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(hidden(fp.load_pretrained(tmp_path / "again")), y)


def test_folders_without_it_are_loaded_without_it(tmp_path, calls):
    fp.save_pretrained(swapped(bert(), encoder=False)[0], tmp_path)
    assert hidden(fp.load_pretrained(tmp_path)).isfinite().all() and not calls


def test_a_loaded_class_that_reads_between_its_layers_runs_them_one_by_one(tmp_path, calls):
    fp.save_pretrained(swapped(bert())[0], tmp_path)
    other = bert()
    other.encoder = Reads(other.config).eval()
    with pytest.warns(UserWarning, match=r"the layers of encoder\.layer run one by one"):
        fp.load_pretrained(tmp_path, model=other)
    before = len(calls)
    assert hidden(other).isfinite().all() and len(calls) == before


def test_a_second_swap_leaves_it(calls):
    model = bert()
    fp.swap(model, "int8", include="encoder.**")
    y = hidden(model)
    fp.swap(model, "w8a16", include="pooler.**")
    assert torch.equal(hidden(model), y) and len(calls) >= 2
    fp.restore(model)
    before = len(calls)
    assert torch.equal(hidden(model), hidden(bert())) and len(calls) == before


def test_parity_sees_each_layer(calls):
    model = swapped(bert())[0]
    report = fp.parity(model, [{"input_ids": IDS}])
    assert "encoder.layer.1.output.dense" in str(report.to_json())


@FAMILIES
@pytest.mark.every(3)
def test_compiled_models_run_layer_by_layer(build, calls):
    model = swapped(build())[0]
    y = hidden(model)
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        assert close(compiled(IDS).last_hidden_state, y)
    assert len(calls) == 1


class Reads(transformers.models.bert.modeling_bert.BertEncoder):
    """Code that looks between the layers."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        first = self.layer[0](hidden_states, attention_mask)
        y = self.layer[2](self.layer[1](first, attention_mask), attention_mask) + first
        return transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=y)


class CallsThem(transformers.BertModel):
    """Code that calls the layers past the module that holds their list."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            x = layer(x)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)


def test_code_that_reads_between_the_layers_disproves_it(calls):
    model = bert()
    model.encoder = Reads(model.config).eval()
    report = swapped(model)[1]
    assert report.encoder.stacks == () and report.encoder.reason.code == "disproved"
    assert hidden(model).isfinite().all() and not calls


def test_layers_that_others_call_stay_apart(calls):
    torch.manual_seed(0)
    model, report = swapped(CallsThem(transformers.BertConfig(**SIZES)).eval())
    assert report.encoder.reason.code == "not_called"
    assert hidden(model).isfinite().all() and not calls


def test_why_not():
    for options, code in (({"exclude": "**.key"}, "precision"), ({"encoder": False}, "encoder_off")):
        assert swapped(bert(), **options)[1].encoder.reason.code == code
    with pytest.raises(TypeError, match="encoder is True or False"):
        fp.swap(bert(), "int8", encoder="auto")


def test_weights_are_passed_with_what_the_layers_have_packed(monkeypatch):
    passed = []
    monkeypatch.setattr(encoder_stack, "OPERATION", lambda *args: passed.extend(args[2]) or OPERATION(*args))
    model = swapped(bert())[0]
    hidden(model)
    packed = [m.packed() for m in model.encoder.modules() if type(m) is fp.nn.Int8Linear]
    assert len(packed) == 18 and all(any(t is p for t in passed) for p in packed)


def test_layers_of_another_form_run_one_by_one(calls):
    model = bert("Deberta")
    exact = hidden(model)
    report = swapped(model)[1]
    assert report.encoder.reason.code == "other_layers" and "the parts of a Deberta" in str(report)
    assert close(hidden(model), exact) and not calls


def test_a_backend_that_is_asked_for_is_for_the_layers_own_operations(calls):
    model = swapped(bert())[0]
    with fp.use_backend("cpu"):
        alone = hidden(model)
    with fp.interpret("sm_80", seed=1):
        assert close(hidden(model), alone)
    assert not calls
    hidden(model)
    assert calls
