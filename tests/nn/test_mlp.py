"""MLP, and 8 bits between the two products of either MLP: what the layers give one by one, in fewer launches and bytes."""

import copy

import pytest
import torch
from module_copies import copied_and_cast
from rotation import in_turn
from torch import nn

import forwardpass as fp
from forwardpass.nn import MLP, Bf16Linear, Fp8Linear, GatedMLP, Int8Linear, W8A16Linear
from forwardpass.ops.common.quantized_rows import E4M3

K, I, N = 80, 256, 24  # noqa: E741
STEP = 0.01  #: of the static scales; what they quantise is below 1.2


def linears(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return (nn.Linear(a, b, bias=bias).to(dtype) for a, b in ((K, I), (K, I), (I, N)))


def static(cls, smoothed=False, **options):
    """Arguments of a layer whose scale is the same for all inputs."""
    scale = torch.full((1,), STEP if cls is Int8Linear else STEP / 4)
    channel = {"channel_scale": torch.rand(I, generator=torch.Generator().manual_seed(1)) + 0.5} if smoothed else {}
    return {"input_scale": scale, **({"symmetric": True} if cls is Int8Linear else {}), **channel, **options}


def build(cls, gated, down=None, dtype=torch.float32, activation="gelu", up=None):
    gate, beside, last = linears(dtype)
    last, up = cls.from_torch(last, **(static(cls) if down is None else down)), up or {}
    if gated:
        return GatedMLP.from_layers(
            cls.from_torch(gate, activation=activation, **up), cls.from_torch(beside, **up), last
        )
    return MLP.from_layers(cls.from_torch(gate, activation=activation, **up), last)


def neighbours(a, b):
    """How many values lie between a and b at most, of int8 or e4m3."""
    if a.dtype == E4M3:
        bits = [t.contiguous().view(torch.uint8).int() for t in (a, b)]
        a, b = (torch.where(t < 128, t, 128 - t) for t in bits)
    return (a.int() - b.int()).abs().max()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("cls", [Int8Linear, W8A16Linear, Fp8Linear, Bf16Linear])
@torch.no_grad()
def test_is_what_its_layers_are(cls, activation):
    up, _, down = linears()
    up, down = cls.from_torch(up, activation=activation), cls.from_torch(down)
    mlp = MLP.from_layers(up, down)
    for rows in ((1,), (2, 35), (0,)):
        x = torch.randn(*rows, K)
        y = mlp(x)
        assert y.shape == (*rows, N) and torch.equal(y, down(up(x)))
        if rows != (0,):
            bound = 2e-2 if cls is Bf16Linear else 1e-3  # a step of what the second one quantises
            torch.testing.assert_close(y.double(), mlp.exact(x), rtol=0, atol=bound)
    assert mlp.separate() == {"up": up, "down": down} and mlp.config() == {"up": up.config(), "down": down.config()}


@copied_and_cast
@torch.no_grad()
def test_copied_and_cast(change):
    up, _, down = linears(bias=False)
    dropout = nn.Dropout().eval()
    mlp = MLP.from_layers(
        Int8Linear.from_torch(up, activation="gelu"), Int8Linear.from_torch(down), names=("fc1", "fc2"),
        between={"dropout": dropout},
    )  # fmt: skip
    assert {*mlp.state_dict()} == {
        f"{n}.{b}" for n in ("fc1", "fc2") for b in ("qweight", "weight_scale", "weight_sum", "anchor")
    }
    x = torch.randn(3, K)
    y = mlp(x)
    assert torch.equal(change(mlp)(x), y)


@pytest.mark.every(2)
@torch.no_grad()
def test_compiled_and_exported():
    up, _, down = linears()
    mlp = MLP.from_layers(Int8Linear.from_torch(up, activation="gelu"), Int8Linear.from_torch(down))
    x = torch.randn(3, K)
    torch.compiler.reset()
    assert torch.equal(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))
    assert torch.equal(torch.export.export(mlp.eval(), (x,)).module()(x), mlp(x))


@torch.no_grad()
def test_dropouts_drop_in_training():
    up, _, down = linears()
    layers = Int8Linear.from_torch(up, activation="gelu"), Int8Linear.from_torch(down)
    x = torch.randn(64, K)
    for place in ("between", "behind"):
        mlp = MLP.from_layers(*layers, **{place: {"dropout": nn.Dropout()}}).eval()
        y = mlp(x)
        assert torch.equal(y, layers[1](layers[0](x)))
        mlp.train()
        torch.manual_seed(0)
        dropped = mlp(x)
        torch.manual_seed(0)
        h = nn.functional.dropout(layers[0](x)) if place == "between" else layers[0](x)
        expected = layers[1](h) if place == "between" else nn.functional.dropout(layers[1](h))
        assert torch.equal(dropped, expected) and not torch.equal(dropped, y)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda g, u, d: MLP.from_layers(Int8Linear.from_torch(g), d), "not None"),
        (lambda g, u, d: MLP.from_layers(Int8Linear.from_torch(d_of(d), activation="relu"), d), "24 outputs"),
        (lambda g, u, d: GatedMLP.from_halves(Int8Linear.from_torch(g), d, "relu"), "not relu"),
        (lambda g, u, d: GatedMLP.from_halves(Int8Linear.from_torch(g, activation="silu"), d, "silu"), "an activation"),
        (lambda g, u, d: GatedMLP.from_halves(Int8Linear.from_torch(nn.Linear(K, 24)), d, "silu"), "no multiple of 8"),
        (lambda g, u, d: GatedMLP.from_halves(Fp8Linear.from_torch(g, scales="tensor"), d, "silu"), "not by output"),
        (lambda g, u, d: GatedMLP.from_halves(Int8Linear.from_torch(g), d, "silu"), "128 outputs"),
        (
            lambda g, u, d: GatedMLP.from_halves(Fp8Linear.from_torch(nn.Linear(K, 128), scales="block"), d, "silu"),
            "a block",
        ),
    ],
)
def test_refused_with_the_reason(make, words):
    gate, up, down = linears()
    with pytest.raises(ValueError, match=words):
        make(gate, up, Int8Linear.from_torch(down))


def d_of(down):
    return nn.Linear(K, down.out_features)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Int8Linear, {}),
        (W8A16Linear, {}),
        (W8A16Linear, {"scales": "group"}),
        (Fp8Linear, {}),
        (Fp8Linear, {"scales": "block"}),
        (Bf16Linear, {}),
    ],
)
@torch.no_grad()
def test_halves_are_gate_and_up(cls, options):
    """One layer of both is the GatedMLP of the two, and is given back as it was."""
    gate, up, down = linears()
    both = nn.Linear(K, 2 * I)
    both.weight, both.bias = (nn.Parameter(torch.cat([getattr(m, n) for m in (gate, up)])) for n in ("weight", "bias"))
    both, down = cls.from_torch(both, **options), cls.from_torch(down, **options)
    mlp = GatedMLP.from_halves(both, down, "silu")
    layers = cls.from_torch(gate, activation="silu", **options), cls.from_torch(up, **options), down
    x = torch.randn(5, K)
    assert torch.equal(mlp(x), GatedMLP.from_layers(*layers)(x))
    torch.testing.assert_close(mlp(x), down(layers[0](x) * layers[1](x)), rtol=0, atol=2e-5)
    torch.testing.assert_close(mlp(x).double(), mlp.exact(x), rtol=0, atol=2e-2 if cls is Bf16Linear else 1e-5)
    for before, after in zip(layers, GatedMLP.from_layers(*layers).separate().values()):
        assert after.config() == before.config() and torch.equal(
            after(x if after is not down else both(x)[..., :I]), before(x if after is not down else both(x)[..., :I])
        )
    again = mlp.separate()
    assert [*again] == ["gate_up_proj", "down_proj"] and again["down_proj"] is down
    again = again["gate_up_proj"]
    assert again.config() == both.config() and torch.equal(again(x), both(x))


# ---- 8 bits between the products


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("cls", [Int8Linear, Fp8Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_within_a_step_of_what_the_second_layer_quantises(dtype, cls, gated, smoothed, backend):
    """Between the two there is one rounding to 16 bits less, and 1 / scale is not rounded: the next value at most."""
    if cls is Fp8Linear and backend == "cpu":
        pytest.skip("a CPU has no fp8")
    mlp = build(cls, gated, static(cls, smoothed), dtype)
    x = torch.randn(40, K, dtype=dtype)
    with fp.use_backend(backend):
        h, handed = mlp.layers[0](x), mlp.layers[0](x, mlp.layers[1])
    expected, *_ = fp.ops.quantize(
        h, handed.values.dtype, scale=mlp.layers[1].input_scale, channel_scale=mlp.layers[1].channel_scale
    )
    assert handed.scale is mlp.layers[1].input_scale and handed.dtype == dtype
    assert neighbours(handed.values, expected) <= 1
    differ = (handed.values.float() != expected.float()).double().mean()
    assert differ < (0.01 if dtype == torch.float32 else 0.1)
    assert handed.values.float().abs().max() > (50 if cls is Int8Linear else 100)  # the steps are not too wide to see
    back = (handed.values.float() * STEP / (1 if cls is Int8Linear else 4)).to(dtype)
    if not smoothed and dtype == torch.float32:  # the very product of these values
        assert torch.equal(mlp.layers[1](handed), mlp.layers[1](back))
    with fp.use_backend("reference"):
        exact = mlp.layers[1].exact(handed)
        assert exact.dtype == torch.float64
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mlp.layers[1](handed).double(), exact, rtol=0, atol=bound)


@torch.no_grad()
def test_on_a_cpu_each_layer_quantises_its_own_input():
    mlp = build(Int8Linear, gated=False)
    x = torch.randn(9, K)
    assert torch.equal(mlp(x), mlp.layers[1](mlp.layers[0](x)))


@torch.no_grad()
def test_a_smoothed_layer_that_is_loaded_divides_by_its_new_scales():
    one, other = (build(Int8Linear, False, static(Int8Linear, channel_scale=torch.full((I,), c))) for c in (1.0, 2.0))
    assert one.layers[1].divisor() is one.layers[1].divisor()  # once for all calls
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.layers[1].divisor(), torch.full((I,), STEP / 2))
    assert copy.deepcopy(one).layers[1]._divided == (None, None, None)


@pytest.mark.parametrize(
    ("down", "hands_over"),
    [
        (lambda m: Int8Linear.from_torch(m, **static(Int8Linear)), True),
        (lambda m: Int8Linear.from_torch(m), False),
        (lambda m: Int8Linear.from_torch(m, input_scale=torch.ones(1), input_zero_point=torch.ones(1).int()), False),
        (lambda m: W8A16Linear.from_torch(m), False),
        (lambda m: Fp8Linear.from_torch(m, **static(Fp8Linear)), False),
    ],
)
def test_what_quantises_for_another(down, hands_over):
    up, _, last = linears()
    assert Int8Linear.from_torch(up).quantizes_for(down(last), last.weight.device) is hands_over


@pytest.mark.parametrize(("arch", "expected"), [("sm_89", ()), ("sm_90a", ("block",)), ("sm_120", ())])
def test_what_quantises_for_fp8(arch, expected):
    up, _, last = linears()
    up, cpu = Fp8Linear.from_torch(up), last.weight.device
    with fp.interpret(arch):
        for scales in ("block", "row", "tensor"):
            down = Fp8Linear.from_torch(last, scales=scales)
            assert up.quantizes_for(down, cpu) is (scales in expected)
            smoothed = Fp8Linear.from_torch(last, scales=scales, channel_scale=torch.ones(I))
            assert not up.quantizes_for(smoothed, cpu)
        assert not up.quantizes_for(Int8Linear.from_torch(last), cpu)


BLOCKS = {"scales": "block"}
#: Architecture, class, the second layer if not static, the first.
CASES = [("sm_80", Int8Linear, None, {}), ("sm_89", Fp8Linear, None, {}), ("sm_90a", Int8Linear, None, {}),
         ("sm_90a", Fp8Linear, None, {}), ("sm_90a", Fp8Linear, BLOCKS, {}), ("sm_90a", Fp8Linear, BLOCKS, BLOCKS),
         ("sm_90a", Fp8Linear, None, BLOCKS), ("sm_89", Fp8Linear, None, BLOCKS), ("sm_120", Int8Linear, None, {})]  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("arch", "cls", "down", "up"), in_turn(CASES, 3), ids=lambda x: getattr(x, "__name__", str(x)))
@torch.no_grad()
def test_on_gpus(arch, cls, down, up, backend):
    """By the interpreter: a launch less than the two layers have, fewer bytes, and within a step's effect the same result."""
    dtype = torch.bfloat16
    for gated in (False, True):
        mlp = build(cls, gated, down or static(cls, smoothed=gated), dtype, up=up)
        x = torch.randn(5, K, dtype=dtype)
        results, counted = [], []
        for call in (mlp, lambda x, mlp=mlp: mlp.layers[1](mlp.layers[0](x))):
            with fp.interpret(arch, counters=True) as device, fp.use_backend(backend):
                results.append(call(x))
            kernels = device.kernels()
            counted.append((sum(k.launches for k in kernels), sum(k.footprint_written for k in kernels)))
            assert device.findings == []
        assert counted[0][0] == counted[1][0] - 1 == 3 and counted[0][1] < counted[1][1]
        with fp.interpret(arch):
            exact = mlp.exact(x)
        torch.testing.assert_close(results[0].double(), exact, rtol=2**-7, atol=STEP)
        torch.testing.assert_close(results[0], results[1], rtol=2**-7, atol=STEP)


@torch.no_grad()
def test_hooks_and_dropouts_on_gpus():
    """Hooks of the layers are called; a dropout that drops something gets floats."""
    up, _, down = linears(torch.bfloat16)
    layers = Int8Linear.from_torch(up, activation="gelu"), Int8Linear.from_torch(down, **static(Int8Linear))
    mlp, between = MLP.from_layers(*layers, between={"dropout": nn.Dropout()}).eval(), []
    mlp.down.register_forward_pre_hook(lambda m, args: between.append(args[0]))
    x = torch.randn(3, K, dtype=torch.bfloat16)
    with fp.interpret("sm_80"):
        mlp(x)
        mlp.train()
        dropped = mlp(x)
    assert between[0].values.dtype == torch.int8 and between[1].dtype == torch.bfloat16
    assert (between[1] == 0).float().mean() > 0.3 and dropped.isfinite().all()
