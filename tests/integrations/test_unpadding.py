"""Encoders of transformers without their padding beside themselves with it, padded and in float32."""

import copy
import json
import pickle
import sys
import threading

import pytest
import torch
from encoders import FAMILIES, LENGTHS, build, hidden, off, ragged, rows_of, swapped, transformers
from rotation import in_turn
from small_models import assert_same_objects, objects
from torch import nn

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations import heads_first
from forwardpass.integrations.transformers import unpadding
from forwardpass.swap import originals


@pytest.mark.every(2)
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


@pytest.mark.every(2)
@pytest.mark.parametrize("case", STAYS)
@torch.inference_mode()
def test_what_stays_padded(case):
    model, batch = build("bert"), STAYS[case](ragged())
    options = {"precision": "int8", "encoder": False}  # one operation would not be what layers are that a hook sees
    expected = swapped(model, unpad=False, **options)[0](**batch)
    ours, _ = swapped(model, **options)
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


@pytest.mark.every(2)
@pytest.mark.parametrize("graph", in_turn([compiled, exported, traced]))
def test_what_is_compiled_exported_or_traced_stays_padded(graph):
    model, batch = build("bert"), ragged()
    options = {"precision": "int8", "encoder": False}
    got = graph(swapped(model, **options)[0], batch)
    torch.testing.assert_close(got, hidden(swapped(model, unpad=False, **options)[0], batch), rtol=1e-4, atol=1e-4)
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


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_attention_that_is_left_alone(name):
    """It computes padded, with its projections; excluded, off, and on a shared config."""
    model, batch = build(name), ragged()
    first, second = (copy.deepcopy(model) for _ in range(2))
    fp.swap(first, precision="int8", unpad=True, encoder=False)
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config

    def compare(model, **options):
        expected = hidden(swapped(model, unpad=False, precision="int8", encoder=False, **options)[0], batch)
        ours, report = swapped(model, precision="int8", encoder=False, **options)
        assert report.unpadding.encoders[0].attention == "padded"
        assert rows_of(ours, lambda: hidden(ours, batch)) == [sum(LENGTHS)] * 3
        assert off(hidden(ours, batch), expected, batch["attention_mask"]) < 2e-3
        return ours

    assert compare(model, attention=False).config._attn_implementation == "sdpa"
    compare(model, exclude="encoder.layer.0.attention.self" if name == "bert" else "layers.0.attn")
    assert (
        swapped(second, precision="int8")[1].unpadding.encoders[0].attention == "varlen"
    )  # a copy's config is its own
    expected, padded = (
        hidden(second, batch),
        hidden(swapped(second, unpad=False, precision="int8", encoder=False)[0], batch),
    )
    report = fp.swap(second, precision="int8", unpad=True, encoder=False)
    assert report.unpadding.encoders[0].attention == "padded"
    assert rows_of(second, lambda: hidden(second, batch)) == [sum(LENGTHS)] * 3
    during = hidden(second, batch)
    assert off(during, padded, batch["attention_mask"]) < 2e-3
    fp.restore(first)  # the config names what it named before
    assert off(hidden(second, batch), during, batch["attention_mask"]) < 2e-3
    fp.restore(second)
    assert off(hidden(second, batch), expected, batch["attention_mask"]) < 1e-5


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("kernel", [True, False])
def test_attention_that_is_not_swapped(name, kernel, monkeypatch):
    """Torch's kernel on each sequence, and where there is none on padded q, k and v."""
    monkeypatch.setattr(
        sys.modules["forwardpass.swap.attention.attention_modules"], "faster_than_torch", lambda *_: False
    )
    model, batch = build(name).bfloat16(), ragged()
    exact = hidden(copy.deepcopy(model).float(), batch)
    layers = {"precision": "int8", "encoder": False}
    padded, _ = swapped(model, unpad=False, **layers)
    ours, report = swapped(model, **layers)
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
    fp.swap(replayed, plan=report.plan, encoder=False)
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


@pytest.mark.every(2)
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
    report = fp.swap(model, precision="int8", unpad=False, encoder=False)
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


@pytest.mark.every(2)
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
    with pytest.raises(ValueError, match="unpad is 'yes', and not one of None, layers, attention"):
        fp.swap(model, plan={**stored, "unpad": "yes"})
    with pytest.raises(ValueError, match="unpad is 'True', and not one of None, layers, attention"):
        fp.swap(model, plan={**stored, "unpad": True})
    # attention that a user kept is not named in a replay either
    kept, again = (copy.deepcopy(model) for _ in range(2))
    plan = fp.swap(kept, precision="int8", attention=False, unpad=True).plan
    assert plan.unpad == "layers"
    fp.swap(again, plan=plan)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(hidden(again, batch), hidden(kept, batch))


@pytest.mark.every(2)
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
            with pytest.raises(ValueError, match="unpad is 'yes', and not one of None, layers, attention"):
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
