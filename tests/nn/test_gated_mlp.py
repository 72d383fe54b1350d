"""GatedMLP: what its three layers compute, from two products."""

import pytest
import torch
from module_copies import copied_and_cast
from rotation import paired
from torch import nn

import forwardpass as fp
from forwardpass.nn import Bf16Linear, Fp8Linear, GatedMLP, Int8Linear, W8A16Linear

CLASSES = (Int8Linear, W8A16Linear, Fp8Linear, Bf16Linear)
#: Of outputs of about 0.5: between the products a rounding less, which the next quantisation may take for a step.
DIFFERS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def layers(cls=Int8Linear, k=72, i=40, n=24, bias=True, dtype=torch.float32, activation="silu", **options):
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(a, b, bias=bias).to(dtype) for a, b in ((k, i), (k, i), (i, n)))
    return (cls.from_torch(gate, activation=activation, **options), cls.from_torch(up, **options),
            cls.from_torch(down, **options))  # fmt: skip


def smoothed(scale, **options):
    return Int8Linear.from_torch(nn.Linear(72, 40), channel_scale=torch.full((72,), scale), **options)


@torch.no_grad()
def apart(x, gate, up, down):
    return down(gate(x) * up(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_is_what_its_layers_are(cls, bias, dtype):
    if cls is Bf16Linear and dtype != torch.float32:
        pytest.skip("bfloat16 layers are for float32 models")
    for activation in ("silu", "gelu", "gelu_tanh"):
        gate, up, down = layers(cls, bias=bias, dtype=dtype, activation=activation)
        mlp = GatedMLP.from_layers(gate, up, down)
        for rows in ((1,), (3,), (2, 35), (0,)):
            x = torch.randn(*rows, 72).to(dtype)
            y = mlp(x)
            assert y.shape == (*rows, 24) and y.dtype == dtype
            torch.testing.assert_close(y, apart(x, gate, up, down), rtol=0, atol=DIFFERS[dtype])


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_another_gate_is_another_result(cls):
    """The comparison above can fail: of gate and up exchanged it does."""
    gate, up, down = layers(cls)
    gate.activation, up.activation = None, "silu"
    x = torch.randn(3, 72)
    exchanged = GatedMLP.from_layers(up, gate, down)(x)
    gate.activation, up.activation = "silu", None
    assert (exchanged - apart(x, gate, up, down)).abs().max() > 1e-2


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_exact(cls):
    mlp = GatedMLP.from_layers(*layers(cls))
    x = torch.randn(5, 72)
    exact = mlp.exact(x)
    assert exact.dtype == torch.float64
    bound = 2e-2 if cls is Bf16Linear else 1e-5  # the product of bfloat16 is rounded to bfloat16
    torch.testing.assert_close(mlp(x).double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("cls", CLASSES)
def test_separate_gives_the_layers_back(cls):
    three = layers(cls)
    separate = GatedMLP.from_layers(*three).separate()
    assert list(separate) == ["gate_proj", "up_proj", "down_proj"]
    for before, after in zip(three, separate.values()):
        assert after.activation == before.activation and after.config() == before.config()
        for name, t in before._buffers.items():
            assert t is None or torch.equal(t.float(), after._buffers[name].float()), name


@copied_and_cast
@torch.no_grad()
def test_copied_and_cast(change):
    mlp = GatedMLP.from_layers(*layers(bias=False))
    x = torch.randn(3, 72)
    y = mlp(x)
    assert torch.equal(change(mlp)(x), y)
    assert mlp.gate_up.qweight.stride(0) % 16 == 0


@torch.no_grad()
def test_compiled_and_exported():
    mlp = GatedMLP.from_layers(*layers())
    x = torch.randn(3, 72)
    torch.compiler.reset()
    assert torch.equal(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))
    assert torch.equal(torch.export.export(mlp, (x,)).module()(x), mlp(x))


@pytest.mark.parametrize(
    ("three", "words"),
    [
        (lambda: layers(activation="relu"), "not relu"),
        (lambda: layers(activation=None), "not None"),
        (lambda: layers(i=44), "multiple of 8 of outputs, not 44"),
        (lambda: layers(Fp8Linear, scales="tensor"), "not by output"),
        (lambda: (layers()[0], layers(W8A16Linear)[1], layers()[2]), "several kinds"),
        (lambda: (layers()[0], layers(bias=False)[1], layers()[2]), "differ"),
        (lambda: (layers()[0], layers()[0], layers()[2]), "up must have no activation"),
        (lambda: (*layers()[:2], layers(i=48)[2]), "48 inputs"),
        (lambda: (smoothed(2.0, activation="silu"), smoothed(1.0), layers()[2]), "channel_scale differs"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(three, words):
    with pytest.raises(ValueError, match=words):
        GatedMLP.from_layers(*three())


def test_a_gradient_is_refused():
    mlp = GatedMLP.from_layers(*layers())
    with pytest.raises(RuntimeError, match="backward"):
        mlp(torch.randn(3, 72, requires_grad=True))


@pytest.mark.parametrize("cls", [Int8Linear, W8A16Linear])
@torch.no_grad()
def test_fewer_bytes_between_the_products(cls):
    """gate and up are never written: what is between the two products has I columns."""
    mlp, written = GatedMLP.from_layers(*layers(cls)), []
    mlp.gate_up.register_forward_hook(lambda *call: written.append(call[-1].shape[-1]))
    mlp(torch.randn(3, 72))
    assert written == [40]


@pytest.mark.every(2)
@pytest.mark.parametrize(("arch", "backend"), paired(["sm_80", "sm_89", "sm_90a"], ["cuda", "triton"]))
@torch.no_grad()
def test_on_gpus(arch, backend):
    """By the interpreter: fewer launches than the layers have, and the same result but for a rounding between."""
    for cls in (Int8Linear, W8A16Linear, *((Fp8Linear,) if arch != "sm_80" else ())):
        three = layers(cls, k=80, i=48, n=24, dtype=torch.bfloat16)
        mlp = GatedMLP.from_layers(*three)
        x = torch.randn(5, 80, dtype=torch.bfloat16)
        with fp.interpret(arch, counters=True) as device, fp.use_backend(backend):
            y = mlp(x)
        launches = sum(k.launches for k in device.kernels())
        with fp.interpret(arch, counters=True) as device, fp.use_backend(backend):
            beside = three[2](three[0](x) * three[1](x))
        assert launches < sum(k.launches for k in device.kernels())
        torch.testing.assert_close(y.double(), mlp.exact(x), rtol=2**-7, atol=DIFFERS[torch.bfloat16])
        torch.testing.assert_close(y, beside, rtol=0, atol=DIFFERS[torch.bfloat16])
