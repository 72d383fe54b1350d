"""Encoders of transformers without their padding beside themselves with it, padded and in float32."""

import copy
import json
import pickle
import sys
import threading

import pytest
import torch
from rotation import in_turn
from small_models import assert_same_objects, objects
from torch import nn

import forwardpass as fp
from forwardpass.common.batches import main_output, tensors
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations import heads_first
from forwardpass.integrations.transformers import unpadding
from forwardpass.nn import QuantizedLinear
from forwardpass.swap import originals

transformers = pytest.importorskip("transformers")

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
_COMMON = {**_SIZES, "initializer_range": 0.3, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 1}
#: The model, its config, and what attention is: varlen, or padded where it computes in its own code.
FAMILIES = {
    "bert": ("BertModel", "BertConfig", _COMMON, "varlen"),
    "roberta": ("RobertaModel", "RobertaConfig", _COMMON, "varlen"),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", _COMMON, "varlen"),
    "camembert": ("CamembertModel", "CamembertConfig", _COMMON, "varlen"),
    "electra": ("ElectraModel", "ElectraConfig", {**_COMMON, "embedding_size": 32}, "varlen"),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 4, "initializer_range": 0.3, "vocab_size": 100,
         "max_position_embeddings": 64},
        "varlen",
    ),
    # every other layer sees two tokens to each side
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**_COMMON, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3,
         "bos_token_id": 2, "eos_token_id": 3},
        "varlen",
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", _COMMON, "padded"),
    "deberta": (
        "DebertaModel",
        "DebertaConfig",
        {**_COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "padded",
    ),
    "deberta_v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**_COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
         "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        "padded",
    ),
}  # fmt: skip
LENGTHS = (14, 3, 9, 1)


def build(name):
    model, config, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def ragged(lengths=LENGTHS, seed=1):
    """Padded on the right."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(4, 100, mask.shape, generator=g).masked_fill(~mask, 1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def swapped(model, unpad=True, **options):
    model = copy.deepcopy(model)
    return model, fp.swap(model, unpad=unpad, **(options or {"precision": "int8"}))


@torch.inference_mode()
def hidden(model, batch):
    return getattr(model, "base_model", model)(**batch).last_hidden_state


def rows_of(model, run):
    """How many rows the second layer of each MLP is given in a call."""
    seen = []
    layers = [
        m for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, nn.Linear)) and m.in_features == 128
    ]
    assert len(layers) == 3
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:-1].numel())) for m in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def off(actual, expected, mask):
    keep = mask.bool()
    return ((actual - expected)[keep].norm() / expected[keep].norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_ragged_batch(name):
    model, batch, attention = build(name), ragged(), FAMILIES[name][3]
    mask = batch["attention_mask"]
    exact = hidden(model, batch)
    before = objects(model)
    padded, _ = swapped(model, unpad=False)
    expected = hidden(padded, batch)
    report = fp.swap(model, precision="int8", unpad=True)
    [encoder] = report.unpadding.encoders
    assert (encoder.layers, encoder.attention, report.unpadding.reason) == (3, attention, None)
    assert "padding: " in str(report) and report.plan.unpad == ("layers" if attention == "padded" else "attention")
    got = hidden(model, batch)
    assert got.shape == expected.shape
    # a row of int8 is quantised by itself, so that sums in another order flip a few roundings at most
    assert off(got, expected, mask) < 2e-3
    assert off(got, exact, mask) < 1.01 * off(expected, exact, mask)
    assert not got[~mask.bool()].any()
    assert rows_of(model, lambda: hidden(model, batch)) == [sum(LENGTHS)] * 3
    assert rows_of(padded, lambda: hidden(padded, batch)) == [mask.numel()] * 3
    fp.restore(model)
    assert_same_objects(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or unpadding.PLACE in vars(m) for m in model.modules())
    assert torch.equal(hidden(model, batch), exact)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_only_attention_is_swapped(name):
    """In float32: off by rounding alone."""
    model, batch = build(name), ragged()
    exact = hidden(copy.deepcopy(model).double(), batch)
    ours, report = swapped(model, attention=True)
    assert report.unpadding.encoders[0].attention == "varlen"
    with counted(Calls()) as calls:
        got = hidden(ours, batch)
    assert calls.kernel_calls.total() == 3 and not calls.fallbacks
    assert off(got.double(), exact, batch["attention_mask"]) < 1e-5


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_padding_between_tokens(name):
    """It counts in a window."""
    model, batch = build(name), ragged((9, 9, 9))
    batch["attention_mask"][:, 3:5] = 0
    ours, _ = swapped(model, attention=True)
    assert off(hidden(ours, batch), hidden(model, batch), batch["attention_mask"]) < 1e-5
    assert rows_of(ours, lambda: hidden(ours, batch)) == [21] * 3


def full(batch):
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


def left(batch):
    return {name: x.flip(1) for name, x in batch.items()}


def empty_row(batch):
    batch["attention_mask"][1] = 0
    return batch


def square(batch):
    mask = batch["attention_mask"].bool()
    return {**batch, "attention_mask": mask[:, None, None] & mask[:, None, :, None]}


STAYS = {
    "little padding": lambda batch: ragged((16, 16, 14)),
    "no padding": full,
    "no mask": lambda batch: {"input_ids": batch["input_ids"]},
    "left padding": left,
    "a row of padding": empty_row,
    "a 4-D mask": square,
    "hidden states": lambda batch: {**batch, "output_hidden_states": True},
    "attention weights": lambda batch: {**batch, "output_attentions": True},
}


@pytest.mark.parametrize("case", STAYS)
@torch.inference_mode()
def test_what_stays_padded(case):
    model, batch = build("bert"), STAYS[case](ragged())
    expected = swapped(model, unpad=False)[0](**batch)
    ours, _ = swapped(model)
    results = []
    assert rows_of(ours, lambda: results.append(ours(**batch))) == [batch["input_ids"].numel()] * 3
    for name, x in expected.items():
        for a, b in zip(*((x, results[0][name]) if isinstance(x, tuple) else ([x], [results[0][name]]))):
            assert torch.equal(a, b), name


def test_hidden_states_that_were_asked_for_before():
    """transformers' own hooks stay on the layers, and record nothing in later calls."""
    model, batch = build("bert"), ragged()
    with torch.inference_mode():
        model(**batch, output_hidden_states=True)
    ours, report = swapped(model)
    assert report.unpadding.encoders
    assert rows_of(ours, lambda: hidden(ours, batch)) == [sum(LENGTHS)] * 3
    with torch.inference_mode():
        result = ours(**batch, output_hidden_states=True)
    assert [x.shape[:2] for x in result.hidden_states] == [batch["input_ids"].shape] * 4


def test_settings_of_a_config_and_of_a_model():
    model, batch = build("bert"), ragged()
    ours, _ = swapped(model)
    every, tokens = [batch["input_ids"].numel()] * 3, [sum(LENGTHS)] * 3
    ours.config.output_hidden_states = True
    assert rows_of(ours, lambda: hidden(ours, batch)) == every
    ours.config.output_hidden_states = False
    name = ours.config._attn_implementation
    ours.set_attn_implementation("sdpa")
    assert rows_of(ours, lambda: hidden(ours, batch)) == every
    ours.set_attn_implementation(name)
    assert rows_of(ours, lambda: hidden(ours, batch)) == tokens
    ours.train()
    assert rows_of(ours, lambda: hidden(ours, batch)) == every


@pytest.mark.filterwarnings("ignore")  # of tracing
def compiled(model, batch):
    with torch.inference_mode():
        return torch.compile(model, backend="eager", fullgraph=True)(**batch).last_hidden_state


def exported(model, batch):
    with torch.inference_mode():
        return torch.export.export(model, (), batch).module()(**batch).last_hidden_state


def traced(model, batch):
    values = tuple(batch.values())
    with torch.no_grad():
        return torch.jit.trace(Ordered(model, tuple(batch)), values, check_trace=False)(*values)


@pytest.mark.parametrize("graph", in_turn([compiled, exported, traced]))
def test_what_is_compiled_exported_or_traced_stays_padded(graph):
    model, batch = build("bert"), ragged()
    got = graph(swapped(model)[0], batch)
    torch.testing.assert_close(got, hidden(swapped(model, unpad=False)[0], batch), rtol=1e-4, atol=1e-4)
    assert got[~batch["attention_mask"].bool()].any()


class Ordered(nn.Module):
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors))).last_hidden_state


def test_copies_pickles_and_threads():
    model = build("modernbert")
    ours, _ = swapped(model)
    batches = [ragged(lengths, seed) for seed, lengths in enumerate([(5, 2), (14, 3, 9, 1), (4, 7, 4), (6, 6)])]
    expected = [hidden(ours, b) for b in batches]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert rows_of(other, lambda: hidden(other, batches[1])) == [27] * 3  # noqa: B023
        assert torch.equal(hidden(other, batches[1]), expected[1])
        with pytest.raises(RuntimeError, match="copy of a swapped model"):
            fp.restore(other)
    failed = []

    def work(i):
        for _ in range(20):
            if not torch.equal(hidden(ours, batches[i]), expected[i]):
                failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_an_exception_leaves_nothing_behind():
    model, batch = build("bert"), ragged()
    ours, _ = swapped(model)
    expected = hidden(ours, batch)
    handle = ours.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden(ours, batch)
    handle.remove()
    assert unpadding.current() is None
    # an interrupt passes by all hooks: the next call of the model cleans up
    handle = ours.encoder.layer[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        hidden(ours, batch)
    handle.remove()
    assert torch.equal(hidden(ours, batch), expected)
    assert unpadding.current() is None


def interrupt(*_):
    raise KeyboardInterrupt


def test_layers_that_were_taken_out():
    model, batch = build("bert"), ragged()
    ours, _ = swapped(model)
    expected = hidden(ours, batch)
    ours.encoder.layer = ours.encoder.layer[:2]
    with pytest.raises(RuntimeError, match=r"was taken out after the swap.*fp.restore"):
        hidden(ours, batch)
    assert unpadding.current() is None
    shorter = copy.deepcopy(model)
    shorter.encoder.layer = shorter.encoder.layer[:2]
    fp.swap(shorter, precision="int8")
    assert hidden(shorter, batch).shape == expected.shape


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_attention_that_is_left_alone(name):
    """It computes padded, with its projections; excluded, off, and on a shared config."""
    model, batch = build(name), ragged()
    first, second = (copy.deepcopy(model) for _ in range(2))
    fp.swap(first, precision="int8", unpad=True)
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config

    def compare(model, **options):
        expected = hidden(swapped(model, unpad=False, precision="int8", **options)[0], batch)
        ours, report = swapped(model, precision="int8", **options)
        assert report.unpadding.encoders[0].attention == "padded"
        assert rows_of(ours, lambda: hidden(ours, batch)) == [sum(LENGTHS)] * 3
        assert off(hidden(ours, batch), expected, batch["attention_mask"]) < 2e-3
        return ours

    assert compare(model, attention=False).config._attn_implementation == "sdpa"
    compare(model, exclude="encoder.layer.0.attention.self" if name == "bert" else "layers.0.attn")
    assert (
        swapped(second, precision="int8")[1].unpadding.encoders[0].attention == "varlen"
    )  # a copy's config is its own
    expected, padded = hidden(second, batch), hidden(swapped(second, unpad=False, precision="int8")[0], batch)
    report = fp.swap(second, precision="int8", unpad=True)
    assert report.unpadding.encoders[0].attention == "padded"
    assert rows_of(second, lambda: hidden(second, batch)) == [sum(LENGTHS)] * 3
    during = hidden(second, batch)
    assert off(during, padded, batch["attention_mask"]) < 2e-3
    fp.restore(first)  # the config names what it named before
    assert off(hidden(second, batch), during, batch["attention_mask"]) < 2e-3
    fp.restore(second)
    assert off(hidden(second, batch), expected, batch["attention_mask"]) < 1e-5


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("kernel", [True, False])
def test_attention_that_is_not_swapped(name, kernel, monkeypatch):
    """Torch's kernel on each sequence, and where there is none on padded q, k and v."""
    monkeypatch.setattr(sys.modules["forwardpass.swap.attention.modules"], "faster_than_torch", lambda *_: False)
    model, batch = build(name).bfloat16(), ragged()
    exact = hidden(copy.deepcopy(model).float(), batch)
    padded, _ = swapped(model, unpad=False)
    ours, report = swapped(model)
    assert not report.attention
    assert report.unpadding.encoders[0].attention == "varlen"
    if not kernel:
        why = fp.dispatch.Reason("none", "there is none", "")
        monkeypatch.setattr(heads_first, "why_no_kernel", lambda operation, call: why)
    with counted(Calls()) as calls:
        got = hidden(ours, batch)
    assert calls.kernel_calls.total() == 3 * kernel
    assert {reason.code for _, reason in calls.fallbacks} == (set() if kernel else {"not_swapped"})
    mask = batch["attention_mask"]
    assert off(got.float(), exact, mask) < 1.5 * off(hidden(padded, batch).float(), exact, mask)
    replayed = copy.deepcopy(model)
    fp.swap(replayed, plan=report.plan)
    assert torch.equal(hidden(replayed, batch), hidden(ours, batch))
    before = model.config._attn_implementation
    fp.restore(ours)
    assert ours.config._attn_implementation == before != replayed.config._attn_implementation


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_kernels_for_gpus(name):
    model, config, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    options = {**options, "hidden_size": 128}  # heads of 32
    model = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    batch = ragged((5, 2, 3))
    exact = hidden(model, batch)
    model = model.half()
    with fp.interpret("sm_80") as device, fp.use_backend("cuda"):
        ours, _ = swapped(model, attention=True)
        with counted(Calls()) as calls:
            got = hidden(ours, batch)
    assert calls.kernel_calls.total() == 3 and not calls.fallbacks and not device.findings
    assert off(got.float(), exact, batch["attention_mask"]) < 1e-2


@torch.inference_mode()
def test_a_mask_of_another_length_than_the_rows():
    """As many rows of one text as the mask has tokens: they were not gathered, and the mask holds."""
    ours, _ = swapped(build("bert"), attention=True)
    ids, mask = ragged((9,))["input_ids"], torch.ones(1, 12, dtype=torch.long)
    mask[:, 5:8] = 0  # 9 tokens
    expected = ours(input_ids=ids, attention_mask=mask[:, :9]).last_hidden_state
    create = ours._create_attention_masks
    ours._create_attention_masks = lambda attention_mask, **others: create(
        attention_mask=attention_mask[:, :9], **others
    )
    got = ours(input_ids=ids, attention_mask=mask).last_hidden_state
    keep = mask[:, :9].bool()
    assert torch.allclose(got[keep], expected[keep], atol=1e-5)


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
    return getattr(transformers, name)(transformers.BertConfig(**_COMMON)).eval()


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
    "ernie": ("ErnieModel", "ErnieConfig", _COMMON),
    "bart": ("BartModel", "BartConfig", {"d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "vocab_size": 100,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 96,
             "max_position_embeddings": 64}),
    "esm": ("EsmModel", "EsmConfig", {**_COMMON, "position_embedding_type": "rotary", "mask_token_id": 2}),
}  # fmt: skip


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


def with_hook(model):
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    return model


def chunked(model):
    model.config.chunk_size_feed_forward = 2
    return model


def causal(model):
    options = FAMILIES["bert"][2]
    return transformers.BertModel(transformers.BertConfig(**options, is_decoder=True)).eval()


def convolving(model):
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**FAMILIES["bert"][2], conv_kernel_size=3)).eval()


@pytest.mark.parametrize(
    ("change", "code"),
    [(with_hook, "hooks"), (chunked, "chunks"), (causal, "decoder"), (convolving, "between_layers")],
)
def test_why_an_encoder_stays_padded(change, code):
    report = fp.swap(change(build("bert")), precision="int8")
    assert report.unpadding.reason.code == code
    assert not report.unpadding.encoders
    assert report.plan.unpad is None
    assert f"padding: stays: {report.unpadding.reason.text}" in " ".join(str(report).split())
    assert report.to_json()["unpadding"] == {"encoders": [], "reason": vars(report.unpadding.reason)}


def test_unpad_is_an_argument():
    model = build("bert")
    for wrong in ("always", 1, None):
        with pytest.raises(TypeError, match='unpad is "auto", True or False'):
            fp.swap(model, precision="int8", unpad=wrong)
    report = fp.swap(model, precision="int8", unpad=False)
    assert report.unpadding.reason.code == "unpad_off"
    stack = [m for m in model.modules() if isinstance(m, nn.ModuleList)] + [*model.encoder.layer]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [model, model.encoder, *stack])
    fp.restore(model)
    with pytest.warns(UserWarning, match="no layer is swapped"):
        report = fp.swap(model, precision="int8", exclude="**", attention=False)
    assert report.unpadding.reason.code == "unchanged"
    plain = nn.Sequential(nn.Linear(64, 64)).eval()
    report = fp.swap(plain, precision="int8")
    assert report.unpadding.reason.code == "no_encoder"
    assert "padding" not in str(report)


def test_plans():
    model, batch = build("bert"), ragged()
    ours, report = swapped(model)
    stored = report.plan.to_json()
    assert stored["unpad"] == "attention"
    replayed, padded, old = (copy.deepcopy(model) for _ in range(3))
    fp.swap(replayed, plan=stored)
    assert torch.equal(hidden(replayed, batch), hidden(ours, batch))
    assert fp.swap(padded, plan=stored, unpad=False).unpadding.reason.code == "unpad_off"
    # those of before the entry was there replay as they ran
    del stored["unpad"]
    assert fp.swap(old, plan=stored).unpadding.reason.code == "not_planned"
    assert torch.equal(hidden(old, batch), hidden(padded, batch))
    with pytest.raises(ValueError, match="unpad is 'yes', and not one of layers, attention"):
        fp.swap(model, plan={**stored, "unpad": "yes"})
    with pytest.raises(ValueError, match="unpad of the plan is 'True', not of type"):
        fp.swap(model, plan={**stored, "unpad": True})
    # attention that a user kept is not named in a replay either
    kept, again = (copy.deepcopy(model) for _ in range(2))
    plan = fp.swap(kept, precision="int8", attention=False, unpad=True).plan
    assert plan.unpad == "layers"
    fp.swap(again, plan=plan)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(hidden(again, batch), hidden(kept, batch))


def test_checkpoints(tmp_path):
    model, batch = build("modernbert"), ragged()
    for options in ({"unpad": True}, {"unpad": False}, {"attention": False, "unpad": True}):
        ours = copy.deepcopy(model)
        fp.swap(ours, precision="int8", **options)
        fp.save_pretrained(ours, tmp_path)
        loaded = fp.load_pretrained(tmp_path)
        assert torch.equal(hidden(loaded, batch), hidden(ours, batch))
        assert loaded.config._attn_implementation == ours.config._attn_implementation
        assert any(unpadding.PLACE in vars(m) for m in loaded.modules()) is options.get("unpad", True)
    record = json.loads((tmp_path / "forwardpass.json").read_text())
    assert record["unpad"] == "layers"
    for unpad in (None, "absent", "yes"):  # from before it was written, and damaged
        changed = {k: v for k, v in record.items() if k != "unpad"} | ({} if unpad == "absent" else {"unpad": unpad})
        (tmp_path / "forwardpass.json").write_text(json.dumps(changed))
        if unpad == "yes":
            with pytest.raises(ValueError, match="what it says of padding"):
                fp.load_pretrained(tmp_path)
        else:
            assert not any(unpadding.PLACE in vars(m) for m in fp.load_pretrained(tmp_path).modules())


def test_parity_and_a_failed_swap(monkeypatch):
    model, batch = build("bert"), ragged()
    before = objects(model)
    monkeypatch.setattr(originals, "remember", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fp.swap(model, precision="int8")
    monkeypatch.undo()
    assert_same_objects(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or unpadding.PLACE in vars(m) for m in model.modules())
    fp.swap(model, precision="int8", unpad=True)
    result = fp.parity(model, [batch])
    assert {x.total.samples for x in result.layers} == {sum(LENGTHS), len(LENGTHS)}  # the pooler has a row of each text
    assert result.output.cosine_min > 0.99
    assert rows_of(model, lambda: hidden(model, batch)) == [sum(LENGTHS)] * 3
