"""Where encoders run without their padding: a run says that they may, and that the result does not show it."""

import copy

import pytest
import torch
from encoders import COMMON, LENGTHS, build, ragged, rows_of, swapped, transformers
from torch import nn

import forwardpass as fp
from forwardpass.common.batches import main_output, tensors


class Pooled(nn.Module):
    """A user's own sentence embeddings: means of tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        x = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        return (x * mask).sum(1) / mask.sum(1)


class Whole(Pooled):
    """And what returns them with their padding."""

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def headed(name):
    return getattr(transformers, name)(transformers.BertConfig(**COMMON)).eval()


RESULTS = {
    "hidden states": (lambda: build("bert"), False),
    "tokens' classes": (lambda: headed("BertForTokenClassification"), False),
    "tokens' logits": (lambda: headed("BertForMaskedLM"), False),
    "starts and ends of answers": (lambda: headed("BertForQuestionAnswering"), False),
    "a wrapper's hidden states": (lambda: Whole(build("bert")), False),
    "classes": (lambda: headed("BertForSequenceClassification"), True),
    "a cross-encoder's scores": (lambda: build("xlm_roberta"), True),
    "a wrapper's means": (lambda: Pooled(build("mpnet")), True),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("result", RESULTS)
@torch.inference_mode()
def test_where_padding_is_returned_it_stays(result):
    """last_hidden_state was zero at padding, where a user of the padded model had numbers."""
    make, is_off = RESULTS[result]
    model, batch = make(), ragged()
    padded = copy.deepcopy(model)
    fp.swap(padded, "w8a16", include="**", unpad=False, attention=True)
    report = fp.swap(model, "w8a16", include="**", attention=True)
    assert bool(report.unpadding.encoders) is is_off
    assert report.unpadding.reason is None if is_off else report.unpadding.reason.code == "returned"
    for x, expected in zip(tensors(model(**batch)), tensors(padded(**batch)), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)
    plan = report.plan
    fp.restore(model)
    assert bool(fp.swap(model, plan=plan).unpadding.encoders) is is_off
    fp.restore(model)
    assert fp.swap(model, "w8a16", include="**", unpad=True).unpadding.encoders


@pytest.mark.every(3)
def test_plans_measure_what_swaps_do():
    plans = {unpad: fp.plan(build("bert"), [ragged()], candidates="w8a16", max_error=1.0, target="memory", unpad=unpad)
             for unpad in ("auto", True)}  # fmt: skip
    assert {unpad: plan.unpad for unpad, plan in plans.items()} == {"auto": None, True: "attention"}


@pytest.mark.parametrize("where", ["layer", "stack"])
@torch.inference_mode()
def test_an_encoder_that_is_not_what_it_looks_like(where):
    """Its layers see other rows besides attention, or there is something between them. Lists of classes were believed."""
    model, batch = build("bert"), ragged()

    class OverRows(type(model.encoder.layer[1])):
        def forward(self, x, *args, **kwargs):
            y = super().forward(x, *args, **kwargs)
            return y - y.mean(1, keepdim=True)

    class Between(type(model.encoder)):
        def forward(self, hidden_states, attention_mask, **kwargs):
            for layer in self.layer:
                hidden_states = layer(hidden_states, attention_mask)
                hidden_states = hidden_states - hidden_states.mean(1, keepdim=True)
            return transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=hidden_states
            )

    for layer in model.encoder.layer if where == "layer" else ():
        layer.__class__ = OverRows
    if where == "stack":
        model.encoder.__class__ = Between
    padded = copy.deepcopy(model)
    fp.swap(padded, "w8a16", include="**", unpad=False, attention=True)
    report = fp.swap(model, "w8a16", include="**", attention=True, unpad=True)
    assert report.unpadding.reason.code == "disproved" and not report.unpadding.encoders
    assert torch.equal(model(**batch).last_hidden_state, padded(**batch).last_hidden_state)


#: Whose code nobody had read.
OTHERS = {
    "t5": ("T5EncoderModel", "T5Config", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4,
                                          "vocab_size": 100}),
    "ernie": ("ErnieModel", "ErnieConfig", COMMON),
    "bart": ("BartModel", "BartConfig", {"d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "vocab_size": 100,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 96,
             "max_position_embeddings": 64}),
    "esm": ("EsmModel", "EsmConfig", {**COMMON, "position_embedding_type": "rotary", "mask_token_id": 2}),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("name", OTHERS)
@torch.inference_mode()
def test_encoders_of_no_list(name):
    model, config, options = OTHERS[name]
    torch.manual_seed(0)
    model, batch = getattr(transformers, model)(getattr(transformers, config)(**options)).eval(), ragged()
    padded, _ = swapped(model, unpad=False, precision="w8a16", attention=True)
    ours, report = swapped(model, precision="w8a16", attention=True)
    mask = batch["attention_mask"]
    if name == "bart":
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    got, expected = (main_output(m(**batch)) for m in (ours, padded))
    got, expected = (x if name == "bart" else x[mask.bool()] for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    if name == "t5":  # whose attention counts the rows of its input for the bias of positions
        assert report.unpadding.reason.code == "disproved"
    else:
        assert rows_of(ours, lambda: ours(**batch)) == [sum(LENGTHS)] * 3
