"""ModernBERT's layers as one operation: two kinds of masks and rotations, and the first layer without a norm."""

import pytest
import torch
from tiny_encoders import close, hidden, last_of, modernbert, swapped
from torch import nn

import forwardpass as fp
from forwardpass.common.environment import cpu_tier
from forwardpass.integrations.transformers import encoder_stack
from forwardpass.integrations.transformers.stacks import rotary_encoder_stack
from forwardpass.ops.encoder_layer import OPERATION

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(cpu_tier() in (None, "baseline"), reason="needs AVX2")

NAMES = OPERATION.parameters
#: Of one operation beside layers one by one, whose sums are in another order: 8 bits that are rounded to the other side.
BOUND = 5e-3
LONG = torch.arange(280).reshape(4, 70) % 97 + 1
LONG_PADDED = torch.ones(4, 70, dtype=torch.int64)
for row, length in enumerate((70, 41, 5, 1)):
    LONG_PADDED[row, length:] = 0


@pytest.fixture(autouse=True)
def attention_in_float32(monkeypatch):
    """As in the layers one by one."""
    monkeypatch.setattr(encoder_stack, "has_bfloat16_products", lambda: False)


def both_kinds():
    """Layers that see all, eight to each side, eight to each side, all."""
    return modernbert(num_hidden_layers=4, local_attention=16)


@pytest.fixture
def passed(monkeypatch):
    """The arguments of each call of the operation, by name."""
    arguments = []
    monkeypatch.setattr(
        rotary_encoder_stack, "OPERATION", lambda *args: arguments.append(dict(zip(NAMES, args))) or OPERATION(*args)
    )
    return arguments


def one_by_one(model, *args, **inputs):
    handle = last_of(model.layers[1]).register_forward_hook(lambda *_: None)
    y = hidden(model, *args, **inputs)
    handle.remove()
    return y


def off(x, y):
    return (x - y).norm() / y.norm()


def test_each_layer_has_its_own_window_and_rotation(passed):
    model = swapped(both_kinds())[0]
    hidden(model, LONG)
    (call,) = passed
    cos, sin = call["cos"], call["sin"]
    assert call["windows"] == [-1, 8, 8, -1] and not call["first_norm"] and call["pre_norm"]
    assert cos[0] is cos[3] and cos[1] is cos[2] and sin[0] is sin[3] and not torch.equal(cos[0], cos[1])
    assert call["key_lens"] is None or call["key_lens"].tolist() == [70] * 4


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("mask", [None, LONG_PADDED], ids=["whole", "padded"])
def test_texts_longer_than_the_window(mask, unpad, passed):
    model = both_kinds()
    exact = hidden(model, LONG, attention_mask=mask)
    model = swapped(model, unpad=unpad)[0]
    y = hidden(model, LONG, attention_mask=mask)
    assert len(passed) == 1 and close(y, exact, LONG_PADDED if mask is None else mask)
    layers, real = one_by_one(model, LONG, attention_mask=mask), LONG_PADDED.bool()
    assert len(passed) == 1 and off(y[real], layers[real]) < BOUND


@pytest.mark.parametrize("pooled", ["mean", "first"])
def test_embeddings_of_padded_texts_are_those_of_each_alone(pooled, passed):
    model = swapped(both_kinds(), unpad=True)[0]

    def embedded(ids, mask):
        y = hidden(model, ids, attention_mask=mask)
        return y[:, 0] if pooled == "first" else (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    together = embedded(LONG, LONG_PADDED)
    for i, n in enumerate((70, 41, 5, 1)):
        alone = embedded(LONG[i : i + 1, :n], LONG_PADDED[i : i + 1, :n])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert len(passed) == 5


def faults():
    return {
        "theta": lambda a: {"cos": a["cos"][1:] + a["cos"][:1], "sin": a["sin"][1:] + a["sin"][:1]},
        "direction": lambda a: {"sin": [-x for x in a["sin"]]},
        "window": lambda a: {"windows": [w - (w > 0) for w in a["windows"]]},
        "wider": lambda a: {"windows": [w + (w > 0) for w in a["windows"]]},
        "no window": lambda a: {"windows": []},
        "first norm": lambda a: {"first_norm": True},
        "padding": lambda a: {"key_lens": None},
    }


@pytest.mark.parametrize("fault", faults())
def test_a_fault_would_be_seen(fault, monkeypatch):
    """The bound of the tests above tells one rotation, window or norm from another."""
    model = swapped(both_kinds())[0]
    expected, real = one_by_one(model, LONG, attention_mask=LONG_PADDED), LONG_PADDED.bool()
    assert off(hidden(model, LONG, attention_mask=LONG_PADDED)[real], expected[real]) < BOUND

    def wrong(*args):
        arguments = dict(zip(NAMES, args))
        return OPERATION(*(arguments | faults()[fault](arguments)).values())

    monkeypatch.setattr(rotary_encoder_stack, "OPERATION", wrong)
    assert off(hidden(model, LONG, attention_mask=LONG_PADDED)[real], expected[real]) > 2 * BOUND


@pytest.mark.parametrize("part", ["rotated", "band"])
def test_a_formula_with_another_rotation_or_window_is_disproved(part, monkeypatch):
    right = getattr(rotary_encoder_stack, part)
    wrong = {"rotated": lambda x, cos, sin: right(x, cos, -sin), "band": lambda n, k, window: right(n, k, window + 1)}
    monkeypatch.setattr(rotary_encoder_stack, part, wrong[part])
    assert swapped(modernbert())[1].encoder.reason.code == "disproved"


@pytest.mark.parametrize("unpad", [False, True])
def test_other_masks_than_padding_on_the_right_run_one_by_one(unpad, passed):
    """Padding between the tokens counts in a window."""
    model, holes = both_kinds(), LONG_PADDED.clone()
    holes[0, 20:40] = 0
    exact = hidden(model, LONG, attention_mask=holes)
    swapped(model, unpad=unpad)
    y = hidden(model, LONG, attention_mask=holes)
    assert not passed and close(y, exact, holes) and y.isfinite().all()


def masks(window, keys=70):
    place = torch.arange(70)
    seen = (place < keys).expand(4, 1, 70, 70)
    return {"full_attention": seen, "sliding_attention": seen & ((place[:, None] - place).abs() <= window)}


SEEN = masks(8)
MASKS = {
    "as they are": (SEEN, True),
    "narrower": (masks(7), False),
    "wider": (masks(9), False),
    "other padding": ({**SEEN, "full_attention": masks(8, 69)["full_attention"]}, False),
    "no mask": ({**SEEN, "full_attention": None}, True),
    "no window": ({**SEEN, "sliding_attention": None}, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_looked_at_in_each_kind_of_layer(name, passed):
    """As a user passes them, by their kinds: what they say counts."""
    model, (mask, is_one) = both_kinds(), MASKS[name]
    exact = hidden(model, LONG, attention_mask=mask)
    swapped(model)
    y = hidden(model, LONG, attention_mask=mask)
    assert len(passed) == is_one and close(y, exact)


@pytest.mark.parametrize("batch", [1, 4])
def test_positions_of_the_caller_count(batch, passed):
    model, positions = both_kinds(), torch.arange(69, -1, -1).repeat(batch, 1)
    exact, others = hidden(model, LONG, position_ids=positions), hidden(model, LONG)
    swapped(model)
    assert close(hidden(model, LONG, position_ids=positions), exact) and len(passed) == 1
    assert not close(exact, others)


def test_norms_that_come_and_go(passed):
    """A first layer with a norm is computed with it; another layer without one is called by itself, as are those beside it."""
    model = swapped(both_kinds())[0]
    y = hidden(model, LONG)
    model.layers[0].attn_norm = nn.LayerNorm(64, bias=False)
    z = hidden(model, LONG)
    assert [call["first_norm"] for call in passed] == [False, True] and not torch.equal(y, z)
    assert off(z, one_by_one(model, LONG)) < BOUND
    model.layers[0].attn_norm, model.layers[2].attn_norm = nn.Identity(), nn.Identity()
    assert hidden(model, LONG).isfinite().all() and len(passed) == 2


def test_another_rotation_function_runs_one_by_one(passed, monkeypatch):
    model = swapped(both_kinds())[0]
    modeling = transformers.models.modernbert.modeling_modernbert
    rotate = modeling.apply_rotary_pos_emb
    y = hidden(model, LONG)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin, **kw: rotate(q, k, cos, -sin, **kw))
    assert len(passed) == 1 and not close(hidden(model, LONG), y) and len(passed) == 1


@pytest.mark.parametrize("kind", ["MaskedLM", "SequenceClassification"])
def test_models_with_heads(kind, passed):
    torch.manual_seed(0)
    model = getattr(transformers, f"ModernBertFor{kind}")(both_kinds().config).eval()
    with torch.inference_mode():
        exact = model(LONG, attention_mask=LONG_PADDED).logits
        report = fp.swap(model, "int8", include="model.layers.**")
        y = model(LONG, attention_mask=LONG_PADDED).logits
    assert report.encoder.reason is None and len(passed) == 1
    mask = LONG_PADDED if kind == "MaskedLM" else torch.ones(4, 1, dtype=torch.int64)
    assert close(y.view(4, -1, y.shape[-1]), exact.view(4, -1, y.shape[-1]), mask)
