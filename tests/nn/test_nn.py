"""fp.nn: drop-in layers keep nn.Linear's manners."""

import copy
import io
import pickle
import shutil
import threading

import pytest
import torch
from rotation import A_QUARTER, some_of
from torch import nn

import forwardpass as fp
from forwardpass.nn import Bf16Linear, Fp8Linear, Int8Linear, W8A16Linear
from forwardpass.nn.linear.quantized_linear import quantize_weight
from forwardpass.ops.common.quantized_rows import E4M3


def bits(t):
    return t.contiguous().view(torch.uint8)  # torch compares no e4m3


SIZES = [(1, 1), (3, 5), (64, 48), (130, 33), (260, 130)]


def linear(k, n, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, dtype=dtype).eval()


def variants(m):
    k = m.in_features
    yield W8A16Linear.from_torch(m)
    yield Int8Linear.from_torch(m)
    yield Int8Linear.from_torch(m, symmetric=True)
    yield Int8Linear.from_torch(m, channel_scale=torch.rand(k) + 0.5)
    yield Int8Linear.from_torch(
        m, input_scale=torch.tensor([0.05]), input_zero_point=torch.tensor([3], dtype=torch.int32)
    )
    yield Int8Linear.from_torch(m, symmetric=True, input_scale=torch.tensor([0.05]))
    yield W8A16Linear.from_torch(m, weight_dtype=E4M3)
    yield W8A16Linear.from_torch(m, scales="group")
    yield W8A16Linear.from_torch(m, weight_dtype="float8_e4m3fn", scales="group")
    for scales in ("tensor", "row", "block"):
        yield Fp8Linear.from_torch(m, scales=scales)
    yield Fp8Linear.from_torch(m, scales="block", channel_scale=torch.rand(k) + 0.5)
    yield Fp8Linear.from_torch(m, scales="tensor", input_scale=torch.tensor([0.05]))
    yield Fp8Linear.from_torch(m, channel_scale=torch.rand(k) + 0.5, input_scale=torch.tensor([0.05]))
    yield Bf16Linear.from_torch(m)


def bound(layer):
    """About 1.6 times what is found; the static ones saturate at 6.4."""
    if isinstance(layer, Fp8Linear):
        return 0.06
    if isinstance(layer, Bf16Linear):
        return 0.0055
    if isinstance(layer, W8A16Linear):
        return 0.0065 if layer.qweight.dtype == torch.int8 else 0.042
    static, smoothed = layer.input_scale is not None, layer.channel_scale is not None
    return 0.025 if static else 0.019 if smoothed else 0.0135


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_close_to_the_linear_it_came_from(size, bias):
    m = linear(*size, bias)
    x = torch.randn(2, 7, size[0])
    y = m(x)
    for layer in variants(m):
        error = (layer(x) - y).norm() / y.norm()
        assert layer(x).shape == y.shape
        assert error < bound(layer), layer
        assert f"in_features={size[0]}" in repr(layer)


@torch.inference_mode()
def test_exact_is_forward_without_rounding():
    m, x = linear(260, 130), torch.randn(7, 260)
    for layer in variants(m):
        exact = layer.exact(x)
        assert exact.dtype == torch.float64
        bound = 2**-8 if isinstance(layer, Bf16Linear) else 1e-6  # which rounds its product
        assert (layer(x) - exact).norm() < bound * exact.norm(), layer


@torch.inference_mode()
def test_smoothing_changes_the_quantisation_only():
    m = linear(64, 32)
    x = torch.randn(50, 64)
    x[:, 3] *= 60  # an outlier channel, which costs the others their steps
    channel = torch.ones(64)
    channel[3] = 1 / 8
    plain, smooth = Int8Linear.from_torch(m), Int8Linear.from_torch(m, channel_scale=channel)
    error = [(layer(x) - m(x)).norm().item() for layer in (plain, smooth)]
    assert error[1] < 0.5 * error[0]


def test_from_torch_leaves_the_module_as_it_was():
    m = linear(16, 8)
    before = {k: (v.data_ptr(), v.clone()) for k, v in m.state_dict().items()}
    layer = Int8Linear.from_torch(m)
    layer.bias.zero_()
    for k, v in m.state_dict().items():
        assert v.data_ptr() == before[k][0]
        assert torch.equal(v, before[k][1])


@torch.inference_mode()
def test_state_dict_deepcopy_pickle_give_the_same_bits():
    m = linear(33, 9)
    x = torch.randn(5, 33)
    for layer in variants(m):
        y = layer(x)
        assert layer.qweight.itemsize > 1 or layer.qweight.stride(0) % 16 == 0
        empty = type(layer)(**layer.config())
        assert empty.load_state_dict(layer.state_dict(), strict=True)
        assert empty.qweight.stride(0) == layer.qweight.stride(0)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        for other in (empty, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), y)
            assert other.config() == layer.config()
        assert [(n, p.numel()) for n, p in layer.named_parameters()] == [("anchor", 0)]


@torch.inference_mode()
def test_casting_keeps_scales_and_integers():
    m = linear(33, 9)
    for layer in variants(m):
        y = layer(torch.ones(2, 33))
        for dtype in (torch.bfloat16, torch.float16):
            cast = copy.deepcopy(layer).to(dtype)
            for name, buffer in cast.named_buffers():
                expected = dtype if name == "bias" else getattr(layer, name).dtype
                assert buffer.dtype == expected, name
                if name != "bias":
                    assert torch.equal(bits(buffer), bits(getattr(layer, name))), name
            got = cast(torch.ones(2, 33, dtype=dtype))
            assert got.dtype == dtype
            assert torch.allclose(got.float(), y, atol=0.02)
        assert torch.equal(copy.deepcopy(layer).double().float()(torch.ones(2, 33)), y)


@torch.inference_mode()
def test_any_layout_and_any_shape():
    layouts = (
        torch.randn(16),
        torch.randn(0, 16),
        torch.randn(2, 3, 4, 16),
        torch.randn(16, 5).t(),
        torch.randn(4, 6, 16).transpose(0, 1),
        torch.randn(4, 32)[:, ::2],
        torch.randn(4, 32)[:, :16],
        torch.randn(1, 16).expand(5, 16),
    )
    for layer in variants(linear(16, 8)):
        for x in layouts:
            y = layer(x)
            assert y.shape == (*x.shape[:-1], 8)
            assert torch.equal(y, layer(x.contiguous()))


def test_meta_and_back():
    for layer in variants(linear(33, 9)):
        empty = type(layer)(**layer.config(), device="meta")
        assert empty.qweight.is_meta
        empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
        with torch.inference_mode():
            assert torch.equal(empty(torch.ones(2, 33)), layer(torch.ones(2, 33)))


def test_refuses_grad_and_says_how():
    for layer in variants(linear(16, 8)):
        with pytest.raises(RuntimeError, match="inference_mode"):
            layer(torch.ones(2, 16, requires_grad=True))
        layer(torch.ones(2, 16))  # grad mode alone is no reason


@pytest.mark.parametrize("cls", [Bf16Linear, Fp8Linear, Int8Linear, W8A16Linear])
def test_threads(cls):
    layer = cls.from_torch(linear(64, 48))
    x = torch.randn(20, 64)
    expected, wrong = layer(x), []

    def work():
        for _ in range(50):
            if not torch.equal(layer(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.every(2)
@pytest.mark.parametrize("parts", A_QUARTER)
@torch.inference_mode()
def test_compiles_whole(parts):
    x = torch.randn(5, 33)
    for layer in some_of(variants(linear(33, 9)), parts):
        torch.compiler.reset()  # one forward for all of them, and more variants than torch keeps of a function
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Int8Linear.from_torch(nn.Conv2d(1, 1, 1)), "Conv2d, not an nn.Linear"),
        (lambda: Int8Linear.from_torch(nn.Linear(4, 4, device="meta")), "meta device"),
        (lambda: Int8Linear.from_torch(nn.Linear(4, 4, dtype=torch.float64)), "float64"),
        (lambda: Int8Linear.from_torch(nn.Linear(65537, 1)), "overflow"),
        (lambda: Int8Linear.from_torch(nn.Linear(4, 4), channel_scale=torch.ones(3)), "4 elements"),
        (lambda: Int8Linear.from_torch(nn.Linear(4, 4), input_scale=torch.ones(1)), "input_zero_point"),
        (
            lambda: Int8Linear.from_torch(
                nn.Linear(4, 4), quantized=(torch.ones(4, 3, dtype=torch.int8), torch.ones(4))
            ),
            r"int8 \[4, 4\]",
        ),
        (lambda: Int8Linear(4, 4, dtype="flat16"), "flat16"),
        (lambda: Fp8Linear(4, 4, scales="group"), "tensor, row, block, not 'group'"),
        (lambda: Fp8Linear(4, 4, scales="block", static=True), "static activations"),
        (lambda: Fp8Linear.from_torch(nn.Linear(4, 4), channel_scale=torch.ones(3)), "4 elements"),
        (
            lambda: Fp8Linear.from_torch(nn.Linear(4, 4), scales="block", input_scale=torch.ones(1)),
            "static activations",
        ),
        (lambda: Fp8Linear.from_torch(nn.Linear(4, 4, device="meta")), "meta device"),
        (lambda: W8A16Linear(4, 4, weight_dtype=torch.float16), "int8 or float8_e4m3fn"),
        (lambda: W8A16Linear(4, 4, scales="block"), "row, group, not 'block'"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert "\n" not in str(e.value)


@torch.inference_mode()
def test_nan_shows():
    x = torch.randn(3, 33)
    x[1, 5] = float("nan")
    for layer in variants(linear(33, 9)):
        static_int8 = isinstance(layer, Int8Linear) and layer.input_scale is not None
        nan = layer(x).isnan().all(1).tolist()
        assert nan == [False, not static_int8, False], layer  # int8 has no NaN, and a static scale none either


def test_conv1d_is_a_transposed_linear():
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    conv = transformers.pytorch_utils.Conv1D(8, 16)  # 16 in, 8 out
    with torch.inference_mode():
        x = torch.randn(5, 16)
        for cls in (Bf16Linear, Fp8Linear, Int8Linear, W8A16Linear):
            layer = cls.from_torch(conv)
            assert (layer.in_features, layer.out_features) == (16, 8)
            assert (layer(x) - conv(x)).norm() / conv(x).norm() < 0.06


def test_w8a16_dtype_follows_the_input():
    with torch.inference_mode():
        layer = fp.nn.W8A16Linear.from_torch(linear(16, 8, dtype=torch.bfloat16))
        assert layer.bias.dtype == torch.bfloat16
        assert layer(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.inference_mode()
def test_bf16_multiplies_rounded_operands_and_keeps_the_bias():
    m, x = linear(64, 48), torch.randn(9, 64)
    layer = Bf16Linear.from_torch(m)
    product = (x.bfloat16().double() @ m.weight.bfloat16().double().t()).bfloat16().float()
    assert torch.allclose(layer(x), product + m.bias, rtol=2**-7, atol=0)
    assert torch.equal(layer(torch.zeros(1, 64))[0], m.bias)
    assert layer(x.half()).dtype == torch.float16


def test_bf16_leaves_16_bits_alone():
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="16 bits already"):
            Bf16Linear.from_torch(linear(16, 8, dtype=dtype))


@pytest.mark.parametrize(("scales", "dtype"), [("tensor", E4M3), ("row", E4M3), ("group", torch.int8), ("block", E4M3)])
@pytest.mark.parametrize("size", [(1, 1), (130, 260), (256, 128)])
def test_weights_use_the_whole_range_of_each_scale(scales, dtype, size):
    n, k = size
    w = torch.randn(n, k) * (torch.arange(n)[:, None] // 128 * 7 + 1) * (torch.arange(k) // 128 * 50 + 1)
    q, scale = quantize_weight(w, dtype, scales)
    assert q.stride(0) % 16 == 0
    tall, wide = {"tensor": (n, k), "row": (1, k), "group": (1, 128), "block": (128, 128)}[scales]
    most = 448 if dtype == E4M3 else 127
    for i in range(0, n, tall):
        for j in range(0, k, wide):
            assert q[i : i + tall, j : j + wide].float().abs().max() == most
    each = scale.reshape(-1, scale.shape[-1] if scale.dim() == 2 else 1).repeat_interleave(tall, 0)[:n]
    each = each.repeat_interleave(wide, 1)[:, :k]
    assert (
        (q.float() * each - w).abs() <= w.abs() * 2.0**-4 + each * (0.5 if dtype == torch.int8 else 2.0**-10) * 1.01
    ).all()


def test_fp8_asks_for_a_gpu_that_has_it():
    m = linear(64, 48)
    with fp.interpret("sm_80"):
        assert Fp8Linear.why_not(m).code == "no_fp8"
        with pytest.raises(ValueError, match=r'sm_80.*sm_89 on.*precision="int8"'):
            Fp8Linear.from_torch(m)
        assert Int8Linear.why_not(m) is None
    for arch in ("sm_89", "sm_90a"):
        with fp.interpret(arch):
            assert Fp8Linear.why_not(m) is None


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("precision", ["int8", "fp8", "w8a16"])
def test_float_weights_are_not_loaded_into_a_quantised_layer(precision, strict):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    weights = model.state_dict()
    fp.swap(model, precision)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"load_state_dict: 0\.qweight holds .* the state dict has torch\.float32"
    ) as e:
        model.load_state_dict(weights, strict=strict)
    assert "fp.restore" in str(e.value) and "\n" not in str(e.value)
    assert all(torch.equal(t.float(), before[name].float()) for name, t in model.state_dict().items())
    fp.restore(model)
    model.load_state_dict(weights, strict=strict)


def test_quantised_weights_are_not_loaded_without_their_scales():
    def layer(**options):
        return fp.nn.Int8Linear.from_torch(torch.nn.Linear(64, 64), **options)

    plain, smoothed = layer(), layer(channel_scale=torch.full((64,), 2.0))
    part = {name: t for name, t in layer().state_dict().items() if name != "weight_scale"}
    for weights in (smoothed.state_dict(), layer(symmetric=True).state_dict(), part):
        before = plain.qweight.clone()
        with pytest.raises(RuntimeError, match="load_state_dict"):
            plain.load_state_dict(weights, strict=False)
        assert torch.equal(plain.qweight, before)
    plain.load_state_dict(other := layer().state_dict(), strict=False)
    assert torch.equal(plain.qweight, other["qweight"])
    plain.load_state_dict({}, strict=False)
    bf16 = fp.nn.Bf16Linear.from_torch(torch.nn.Linear(64, 64))
    bf16.load_state_dict(torch.nn.Linear(64, 64).state_dict())  # rounds, as a swap does
    with pytest.raises(RuntimeError, match="load_state_dict"):
        bf16.load_state_dict(other, strict=False)


@pytest.mark.every(2)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize("cls", [W8A16Linear, Int8Linear, Fp8Linear, Bf16Linear])
@torch.inference_mode()
def test_under_inductor(cls):
    layer, x = cls.from_torch(linear(33, 48), activation="gelu"), torch.randn(5, 33)  # rows padded to 48 in memory
    got, expected = torch.compile(layer, backend="inductor", fullgraph=True)(x), layer(x)
    if cls is Fp8Linear:  # the reference in plain torch, whose GELU inductor writes anew
        torch.testing.assert_close(got, expected, rtol=2**-20, atol=2**-20)
    else:
        assert torch.equal(got, expected)


@pytest.mark.every(3)
@torch.no_grad()
def test_exports():
    x = torch.randn(5, 33)
    for layer in variants(linear(33, 48)):
        model = nn.Sequential(layer)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x)), layer
