"""fp.nn.MultiheadAttention beside torch's, in every form that torch's takes, and within the encoder layer."""

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted

BACKENDS = ["cpu", "reference"]
N, L, S, E, H = 2, 5, 7, 32, 4


def pair(**options):
    torch.manual_seed(0)
    original = nn.MultiheadAttention(E, H, **options).eval().requires_grad_(False)
    if original.in_proj_bias is not None:  # torch begins with zeros
        nn.init.normal_(original.in_proj_bias)
        nn.init.normal_(original.out_proj.bias)
    return original, fp.nn.MultiheadAttention.from_torch(original)


def inputs(how, batch_first, batched=True, kdim=E, vdim=E):
    g = torch.Generator().manual_seed(1)
    query = torch.randn(N, L, E, generator=g)
    if how == "self":
        tensors = (query,) * 3
    else:
        key = torch.randn(N, S, kdim, generator=g)
        tensors = (query, key, key if how == "memory" else torch.randn(N, S, vdim, generator=g))
    if not batched:
        tensors = tuple(t[0] for t in tensors)
    elif not batch_first:
        tensors = tuple(t.transpose(0, 1).contiguous() for t in tensors)
    # what is one tensor for torch has to stay one
    return {"self": (tensors[0],) * 3, "memory": (*tensors[:2], tensors[1])}.get(how, tensors)


def masks(kind, keys, batched=True, rows=L):
    g = torch.Generator().manual_seed(2)
    padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2]])
    mask = torch.rand(rows, keys, generator=g) < 0.3
    mask[:, 0] = False
    whole = torch.rand(N * H, rows, keys, generator=g) < 0.3
    whole[..., 0] = False
    bias = torch.randn(rows, keys, generator=g)
    batch = N if batched else 1
    padding, whole = padding[-1] if not batched else padding, whole[: batch * H]
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(padding.shape).masked_fill(padding, -torch.inf)},
        "mask": {"attn_mask": mask},
        "mask of each head": {"attn_mask": whole},
        "bias": {"attn_mask": bias},
        "both": {"attn_mask": mask, "key_padding_mask": padding},
        "both, bias": {"attn_mask": bias, "key_padding_mask": padding.float() * -3},
        "both, one bool": {"attn_mask": whole, "key_padding_mask": padding.float() * -3},
    }[kind]


KINDS = [
    "none",
    "padding",
    "float padding",
    "mask",
    "mask of each head",
    "bias",
    "both",
    "both, bias",
    "both, one bool",
]


def close(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.every(2)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", ["self", "memory", "three"])
@torch.inference_mode()
def test_as_torch(how, batch_first, kind, backend):
    original, ours = pair(batch_first=batch_first)
    for batched in (True, False):
        tensors = inputs(how, batch_first, batched)
        given = masks(kind, L if how == "self" else S, batched)
        expected = original(*tensors, need_weights=False, **given)
        with fp.use_backend(backend), counted(Calls()) as calls:
            got = ours(*tensors, need_weights=False, **given)
        close(got[0], expected[0])
        assert got[1] is None
        assert got[0].is_contiguous() or not expected[0].is_contiguous()
        assert calls.kernel_calls == {"MultiheadAttention": 1}
        assert not calls.fallbacks


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"kdim": 24, "vdim": 40}, {"kdim": 24, "vdim": 40, "bias": False}]
)
@torch.inference_mode()
def test_forms_of_the_projections(options):
    original, ours = pair(batch_first=True, **options)
    tensors = inputs("three", True, kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    close(ours(*tensors, need_weights=False)[0], original(*tensors, need_weights=False)[0])
    if "kdim" not in options:
        for how in ("self", "memory"):
            tensors = inputs(how, True)
            close(ours(*tensors, need_weights=False)[0], original(*tensors, need_weights=False)[0])


@pytest.mark.parametrize("kind", ["none", "padding", "float padding"])
@torch.inference_mode()
def test_the_causal_hint_stands_for_its_mask(kind):
    original, ours = pair(batch_first=True)
    x = inputs("self", True)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    given = {"attn_mask": mask, "is_causal": True, "need_weights": False, **masks(kind, L)}
    close(ours(*x, **given)[0], original(*x, **given)[0])
    close(ours(*x, **{**given, "attn_mask": torch.zeros(L, L)})[0], ours(*x, **given)[0])  # it is not read
    with pytest.raises(ValueError, match="is_causal=True is a hint about attn_mask, which is missing"):
        ours(*x, is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
@torch.inference_mode()
def test_weights_are_torchs_and_counted(batch_first, average):
    original, ours = pair(batch_first=batch_first)
    for how in ("self", "memory", "three"):
        tensors = inputs(how, batch_first)
        with counted(Calls()) as calls:
            got = ours(*tensors, average_attn_weights=average)
        expected = original(*tensors, average_attn_weights=average)
        close(got[0], expected[0])
        close(got[1], expected[1])
        assert [(call, reason.code, n) for (call, reason), n in calls.fallbacks.items()] == [
            ("MultiheadAttention", "need_weights", 1)
        ]
        assert "pass need_weights=False" in str(calls)


def test_state_and_copies():
    original, ours = pair(batch_first=True)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), original.parameters()))
    again = fp.nn.MultiheadAttention(E, H, batch_first=True).eval()
    again.load_state_dict(original.state_dict())
    x = inputs("self", True)
    with torch.inference_mode():
        expected = ours(*x, need_weights=False)[0]
        for other in (again, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(other) is fp.nn.MultiheadAttention
            assert torch.equal(other(*x, need_weights=False)[0], expected)


@torch.no_grad()
def test_a_row_without_keys_gives_the_bias():
    _, ours = pair(batch_first=True)
    x = inputs("self", True)
    got = ours(*x, key_padding_mask=torch.ones(N, L, dtype=torch.bool), need_weights=False)[0]
    assert torch.equal(got, ours.out_proj.bias.expand_as(got))


def test_refusals():
    x = inputs("self", True)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} puts a key and a value"):
            fp.nn.MultiheadAttention(E, H, **options)
        with pytest.raises(ValueError, match=f"from_torch: {next(iter(options))} puts"):
            fp.nn.MultiheadAttention.from_torch(nn.MultiheadAttention(E, H, **options))
    with pytest.raises(ValueError, match="it is a Linear, not an"):
        fp.nn.MultiheadAttention.from_torch(nn.Linear(2, 2))
    _, ours = pair(batch_first=True, dropout=0.1)
    with pytest.raises(RuntimeError, match=r"no dropout: call eval\(\)"):
        ours.train()(*x)
    ours.eval()
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[N, S\], here \[2, 5\]"):
        ours(*x, key_padding_mask=torch.zeros(L, N, dtype=torch.bool), need_weights=False)
    with pytest.raises(
        ValueError, match=r"attn_mask must be .* here \[5, 5\] or \[8, 5, 5\], and has shape \(2, 5, 5\)"
    ):
        ours(*x, attn_mask=torch.zeros(N, L, L), need_weights=False)
    with pytest.raises(TypeError, match=r"masks must be bool or float, not torch\.int64"):
        ours(*x, attn_mask=torch.zeros(L, L, dtype=torch.int64), need_weights=False)
    with pytest.raises(ValueError, match="query, key and value must all be"):
        ours(x[0], x[0][0], x[0][0], need_weights=False)
    with pytest.raises(RuntimeError, match="inference_mode"):
        ours.requires_grad_()(*x, need_weights=False)
    with pytest.raises(TypeError, match="use_nested_tensor"):
        ours(*(torch.nested.nested_tensor([x[0][0]]),) * 3, need_weights=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_halves_and_autocast(dtype):
    original, ours = pair(batch_first=True)
    x = inputs("self", True)
    exact = original(*x, need_weights=False)[0]
    with torch.autocast("cpu", dtype):
        got = ours(*x, attn_mask=torch.zeros(L, L), need_weights=False)[0]
    assert got.dtype == dtype
    assert (got - exact).norm() < 0.02 * exact.norm()
    got = copy.deepcopy(ours).to(dtype)(*(t.to(dtype) for t in x), need_weights=False)[0]
    assert (got - exact).norm() < 0.02 * exact.norm()


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_compiles(kind):
    _, ours = pair(batch_first=True)
    torch._dynamo.reset()
    x, given = inputs("memory", True), masks(kind, S)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=False)
    close(compiled(*x, need_weights=False, **given)[0], ours(*x, need_weights=False, **given)[0])


@torch.no_grad()
def test_under_inductor_and_exported():
    _, ours = pair(batch_first=True)
    torch._dynamo.reset()
    x = inputs("memory", True)
    expected = ours(*x, need_weights=False)[0]
    close(torch.export.export(ours, x, {"need_weights": False}).module()(*x, need_weights=False)[0], expected)
    if shutil.which("g++"):
        close(torch.compile(ours, fullgraph=True, backend="inductor")(*x, need_weights=False)[0], expected)


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 64, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "mask", "bias"])
@torch.no_grad()
def test_the_fast_path_of_the_encoder_layer_does_not_pass_it_by(kind, norm_first):
    layer = encoder(norm_first=norm_first).layers[0]
    x = inputs("self", True)[0]
    given = {"src_mask": masks(kind, L).get("attn_mask")}
    torch.backends.mha.set_fastpath_enabled(False)  # which takes a float mask for a bool one, and gives NaN
    expected = layer(x, **given)
    torch.backends.mha.set_fastpath_enabled(True)
    layer.self_attn = fp.nn.MultiheadAttention.from_torch(layer.self_attn)
    with counted(Calls()) as calls:
        close(layer(x, **given), expected)
    assert calls.kernel_calls == {"MultiheadAttention": 1}
    assert not calls.fallbacks
