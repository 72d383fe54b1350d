"""`with fp.sdpa():` beside torch's own scaled_dot_product_attention: every argument, exactly, or a reason."""

import copy
import importlib.util
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from rotation import in_turn
from small_models import VisionTransformer
from torch import nn

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted

B, H, D = 2, 4, 16


def operands(rows=5, keys=7, heads=H, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, h, s, D, generator=g).to(dtype) for h, s in ((H, rows), (heads, keys), (heads, keys))]


def exact(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """In fp64, plain: what torch documents."""
    q, k, v = (t.double() for t in (q, k, v))
    if k.shape[-3] != q.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else s + attn_mask
    return s.softmax(-1) @ v


def call(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def some_mask(*shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 0] = True
    return mask


MASKS = {
    "none": lambda r, k: {},
    "causal": lambda r, k: {"is_causal": True},
    "bool": lambda r, k: {"attn_mask": some_mask(r, k)},
    "bool of each": lambda r, k: {"attn_mask": some_mask(B, H, r, k)},
    "bool of keys": lambda r, k: {"attn_mask": some_mask(B, 1, 1, k)},
    "added": lambda r, k: {"attn_mask": torch.randn(1, H, r, k)},
    "scale": lambda r, k: {"scale": 0.3},
    "causal and scale": lambda r, k: {"scale": 0.3, "is_causal": True},
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (6, 6), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@torch.inference_mode()
def test_arguments(kind, sizes, backend):
    q, k, v = operands(*sizes)
    options = MASKS[kind](*sizes)
    expected = call(q, k, v, **options)
    with fp.use_backend(backend), fp.sdpa() as calls:
        got = call(q, k, v, **options)
    assert calls.kernel_calls == {"scaled_dot_product_attention": 1}
    assert not calls.fallbacks
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), exact(q, k, v, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.inference_mode()
def test_shapes(backend):
    q, k, v = operands()
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v)]
    cases = [
        ((q, *operands(heads=2)[1:]), {"enable_gqa": True}),
        ((q, *operands(heads=1)[1:]), {}),  # broadcast over heads
        ((q[:1], k, v), {}),
        ((q, k[:1], v[:1]), {}),
        ((q[:, 0], k[:, 0], v[:, 0]), {"attn_mask": some_mask(B, 5, 7)}),
        ((q[:, 0], k[:, 0], v[:, 0]), {"attn_mask": some_mask(5, 7), "scale": 1.0}),
        (strided, {"is_causal": True}),
    ]
    for tensors, options in cases:
        expected = call(*tensors, **options)
        with fp.use_backend(backend), fp.sdpa() as calls:
            got = call(*tensors, **options)
        assert calls.kernel_calls and not calls.fallbacks
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_halves_and_autocast(dtype):
    q, k, v = operands()
    mask = torch.randn(5, 7)
    for autocast in (True, False):
        tensors = (q, k.double().float(), v) if autocast else (q.to(dtype), k.to(dtype), v.to(dtype))
        with torch.autocast("cpu", dtype, enabled=autocast):
            expected = call(*tensors, attn_mask=mask)
            with fp.sdpa() as calls:
                got = call(*tensors, attn_mask=mask)
        assert calls.kernel_calls and not calls.fallbacks
        assert got.dtype == expected.dtype == dtype
        own = (expected.double() - exact(q, k, v, mask)).abs().max()
        assert (got.double() - exact(q, k, v, mask)).abs().max() <= 2 * own


DECLINED = {
    "dropout": lambda q, k, v: ((q, k, v), {"dropout_p": 0.5}),
    "grad": lambda q, k, v: ((q.clone().requires_grad_(), k, v), {}),
    "dtype": lambda q, k, v: ((q.double(), k.double(), v.double()), {}),
    "scale": lambda q, k, v: ((q, k, v), {"scale": -0.5}),
    "shape": lambda q, k, v: ((q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)), {}),
    "head_dim": lambda q, k, v: ((q, k, v[..., :8]), {}),
    "tensor_class": lambda q, k, v: ((q.as_subclass(Wrapped), k, v), {}),
}


class Wrapped(torch.Tensor):
    pass


@pytest.mark.every(2)
@pytest.mark.parametrize("code", DECLINED)
@pytest.mark.parametrize("compiled", [False, True])
def test_declined(code, compiled):
    """Torch's own result, its reason counted."""
    if compiled and code == "tensor_class":
        pytest.skip("torch.compile asks a subclass first")
    torch._dynamo.reset()
    tensors, options = DECLINED[code](*operands())
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    torch.manual_seed(0)
    expected = call(*tensors, **options)
    torch.manual_seed(0)
    with fp.sdpa() as calls:
        got = run(*tensors, **options)
    assert [(name, reason.code, n) for (name, reason), n in calls.fallbacks.items()] == [
        ("scaled_dot_product_attention", code, 1)
    ]
    assert not calls.kernel_calls
    assert f"[{code}]" in str(calls)
    if not (compiled and code == "dropout"):  # other random numbers
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got.requires_grad == expected.requires_grad


def test_a_reason_is_logged_once(caplog):
    q, k, v = operands(rows=3, keys=11)
    with caplog.at_level("INFO", logger="forwardpass.dispatch"), fp.sdpa():
        fp.call_counts().fallbacks.clear()
        for _ in range(3):
            call(q, k, v, scale=-0.5)
    lines = [r.message for r in caplog.records if "left alone" in r.message]
    assert lines == [
        "scaled_dot_product_attention -> left alone: scale is not positive; negate the query for a negative one"
    ]


def test_what_torch_refuses_is_torchs_to_refuse():
    q, k, v = operands()
    for tensors, options in [
        ((q, k, v), {"attn_mask": torch.ones(5, 6, dtype=torch.bool)}),
        ((q, k[..., :8], v), {}),
        ((q, k[:, :3], v[:, :3]), {}),
        ((q, k.half(), v), {}),
        ((q, k, v), {"attn_mask": torch.ones(5, 7, dtype=torch.int32)}),
    ]:
        with pytest.raises(RuntimeError) as expected:
            call(*tensors, **options)
        with fp.sdpa() as calls, pytest.raises(RuntimeError) as got:
            call(*tensors, **options)
        assert str(got.value) == str(expected.value)
        assert sum(calls.fallbacks.values()) == 1


def test_a_backend_asked_for_by_name_raises():
    q, k, v = operands()
    with fp.use_backend("cuda"), fp.sdpa(), torch.inference_mode(), pytest.raises(fp.Unsupported, match="CUDA tensors"):
        call(q, k, v)


def test_off_by_default_nested_and_undone():
    q, k, v = operands()
    before = fp.call_counts().kernel_calls["scaled_dot_product_attention"]
    call(q, k, v)
    with pytest.raises(KeyError), fp.sdpa():
        raise KeyError
    call(q, k, v)
    assert fp.call_counts().kernel_calls["scaled_dot_product_attention"] == before
    with fp.sdpa() as outer:
        call(q, k, v)
        with fp.sdpa() as inner:
            call(q, k, v)
        call(q, k, v)
    call(q, k, v)
    name = "scaled_dot_product_attention"
    assert (outer.kernel_calls[name], inner.kernel_calls[name]) == (3, 1)
    assert fp.call_counts().kernel_calls[name] == before + 3


def test_one_thread_alone():
    q, k, v = operands()
    inside, done = threading.Event(), threading.Event()
    elsewhere = []

    def other():
        inside.wait(10)
        with counted(Calls()) as calls:
            call(q, k, v)
        elsewhere.append(calls)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fp.sdpa() as calls:
        inside.set()
        done.wait(10)
        call(q, k, v)
    thread.join()
    assert sum(calls.kernel_calls.values()) == 1
    assert not elsewhere[0].kernel_calls and not elsewhere[0].fallbacks


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("where", "dynamic"), in_turn([("around", False), ("within", True), ("around", True), ("within", False)])
)
@torch.inference_mode()
def test_compiled(where, dynamic):
    def within(q, k, v, **options):
        with fp.sdpa():
            return call(q, k, v, **options)

    for kind, (rows, keys) in itertools.product(["none", "causal", "bool of each", "scale"], [(5, 7), (7, 5)]):
        torch._dynamo.reset()
        function = call if where == "around" else within
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for more in (0, 4) if dynamic else (0,):
            q, k, v = operands(rows + more, keys + more)
            options = MASKS[kind](rows + more, keys + more)
            with counted(Calls()) as calls:
                if where == "around":
                    with fp.sdpa():
                        got = compiled(q, k, v, **options)
                else:
                    got = compiled(q, k, v, **options)
            assert not calls.fallbacks
            torch.testing.assert_close(got.double(), exact(q, k, v, **options), rtol=1e-5, atol=1e-6)
        with counted(Calls()) as calls:  # not in the graph of another mode
            compiled(q, k, v, **options)
        assert not calls.kernel_calls or where == "within"


# ---- models


@pytest.mark.every(3)
@torch.inference_mode()
def test_a_vision_transformer():
    model = VisionTransformer().eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    reference, expected = copy.deepcopy(model).double()(x.double()), model(x)
    own = (expected - reference).abs().max()
    with fp.sdpa() as calls:
        got = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert calls.kernel_calls == {"scaled_dot_product_attention": 4}
    assert not calls.fallbacks
    for y in (got, compiled):
        assert (y - reference).abs().max() <= 2 * own
    with fp.swap(model, attention=True) as report, counted(Calls()) as calls:
        assert torch.equal(model(x), got)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), compiled)
    assert {(s.module, s.before) for s in report.attention} == {("Attention", "sdpa")}
    assert calls.kernel_calls == {"Attention": 4}
    assert torch.equal(model(x), expected)


@torch.inference_mode()
def test_torchs_own_layers_are_counted():
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    expected = layer(x)
    with fp.sdpa() as calls:
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        layer.self_attn(x, x, x, need_weights=False)
    assert not calls.kernel_calls
    assert {(name, reason.code): n for (name, reason), n in calls.fallbacks.items()} == {
        ("multi_head_attention_forward", "within"): 2
    }


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
@torch.inference_mode()
def test_timm():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    x = torch.randn(1, 3, 224, 224)
    expected = model(x)
    with fp.sdpa() as calls:
        got = model(x)
    assert calls.kernel_calls == {"scaled_dot_product_attention": 12}
    assert not calls.fallbacks
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
