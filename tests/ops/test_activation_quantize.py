"""activation_quantize: every backend stays within the activation's bound of the fp64 reference, its scale too."""

import pytest
import torch
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.activation_quantize import OPERATION, cases, reference
from forwardpass.ops.common.activations import EXACT, GATED, LIPSCHITZ, PLAIN, activate, element_bound
from forwardpass.ops.common.quantized_rows import pad_rows
from forwardpass.testing import assert_close, poisoned_outputs

CASES = list(cases.cases())


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu_matches_reference(case, seed):
    args = case.arguments(seed=seed)
    with poisoned_outputs():
        got = torch.ops.forwardpass.activation_quantize_cpu(*args)
    cases.assert_matches(got, args)


@pytest.mark.parametrize("case", [whole(c for c in CASES[::7] if 0 not in c.shape)])
def test_the_comparison_can_fail(case):
    """A step or two more in the least elements, and a scale or a zero point that is off by little, are all seen."""
    args = case.arguments()
    q, scale, zero_point = reference.activation_quantize(*args)
    cases.assert_matches((q, scale, zero_point), args)
    values = q.float()
    least = values.abs() == values.abs().min()
    off = pad_rows(torch.where(least, values + 2, values).to(q.dtype))
    wrong = [(off, scale, zero_point), (q, scale * (1.001 if case.rotate is None else 1.1), zero_point)]
    if not case.symmetric:
        wrong.append((q, scale, zero_point + 2))
    for got in wrong:
        with pytest.raises(AssertionError):
            cases.assert_matches(got, args)


def test_reference_means_what_it_says():
    gate, up = torch.tensor([[1.0, -2.0, 0.5, 3.0]]), torch.tensor([[2.0, 4.0, -1.0, 1.0]])
    expected = gate / (1 + (-gate).exp()) * up
    x = torch.cat([gate, up], 1)
    q, s, z = reference.activation_quantize(x, "silu_mul", torch.int8, None, "halves", True, None)
    torch.testing.assert_close(q.float() * s[:, None], expected, atol=s.item() / 2, rtol=0)
    assert s.tolist() == pytest.approx([expected.abs().max().item() / 127])
    assert z.numel() == 0


def test_layouts_agree():
    gate, up = torch.randn(3, 40), torch.randn(3, 40)
    halves = fp.ops.activation_quantize(torch.cat([gate, up], 1), "gelu_mul", torch.int8)
    blocks = fp.ops.interleave_gate_up(gate, up, dim=1)
    assert blocks[:, :16].equal(torch.cat([gate[:, :8], up[:, :8]], 1))
    assert all(a.equal(b) for a, b in zip(fp.ops.separate_gate_up(blocks, dim=1), (gate, up)))
    interleaved = fp.ops.activation_quantize(blocks, "gelu_mul", torch.int8, layout="interleaved8")
    assert all(a.equal(b) for a, b in zip(interleaved, halves))


def test_interleaves_the_rows_of_a_weight():
    gate, up = torch.arange(16.0).view(16, 1), torch.arange(16.0).view(16, 1) + 100
    rows = fp.ops.interleave_gate_up(gate, up)
    assert rows.flatten().tolist() == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]
    for wrong, words in (((gate, up[:8]), "one shape"), ((gate[:12], up[:12]), "multiple of 8")):
        with pytest.raises(ValueError, match=words):
            fp.ops.interleave_gate_up(*wrong)
    with pytest.raises(ValueError, match="multiple of 16"):
        fp.ops.separate_gate_up(rows[:24])


@pytest.mark.every(2)
@pytest.mark.parametrize("activation", PLAIN)
def test_cpu_activation_within_its_own_bound(activation):
    """2^-22.5 |x|, tighter than what all backends keep, over every sign and exponent; one column a row leaves |value|
    in the scale."""
    bits = torch.arange(0, 2**32, 4093, dtype=torch.int64).to(torch.int32)  # a prime step
    x = bits.view(torch.float32)
    x = x[x.isfinite() & (x.abs() < 1e30) & (x.abs() > 1e-28)].unsqueeze(1).contiguous()
    _, scale, _ = torch.ops.forwardpass.activation_quantize_cpu(x, activation, torch.int8, None, "halves", True, None)
    expected = activate(activation, x.double()).abs().squeeze(1)
    own = 0.0 if activation == "relu" else 2.0**-22.5 * x.double().abs().squeeze(1)
    assert_close(scale.double() * 127, expected, own + 2.0**-22.9 * expected + 2.0**-99)


def test_element_bound_covers_the_slope():
    x = torch.linspace(-6, 6, 200001, dtype=torch.float64)
    for activation in PLAIN:
        slope = activate(activation, x).diff() / x.diff()
        assert slope.abs().max() < LIPSCHITZ[activation] + 1e-9
    x, up = torch.tensor(1.5, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    off = 0.01 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    for activation in GATED:
        worst = (activate(activation, x + off[:, 0], up + off[:, 1]) - activate(activation, x, up)).abs().max()
        assert worst <= element_bound(activation, x, up, 0.01, 0.01) < 1.3 * worst


@pytest.mark.parametrize("case", in_parts(CASES[::9], 4))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.activation_quantize_cpu.default, case.arguments())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
def test_not_finite_shows_in_the_scale(activation, value):
    """As in torch, relu(-infinity) is 0, and relu6 of infinity 6; the others make a NaN of it."""
    x = torch.randn(3, 70)
    x[1, 33] = value
    expected = activate(activation, x).isfinite() if activation in EXACT else x.isfinite()
    for backend in ("cpu", "reference"):
        with fp.use_backend(backend):
            _, scale, _ = fp.ops.activation_quantize(x, activation, torch.int8)
        assert scale.isfinite().tolist() == expected.all(1).tolist()


def test_rows_of_zeros():
    q, scale, zero_point = fp.ops.activation_quantize(torch.zeros(2, 32), "silu_mul", torch.int8, symmetric=False)
    assert q.unique().tolist() == [-128]
    assert zero_point.tolist() == [-128] * 2
    assert ((scale > 0) & (scale < 1e-30)).all()


def test_compiles_whole():
    x = torch.randn(9, 48)

    def f(t):
        q, s, _ = fp.ops.activation_quantize(t, "silu_mul", torch.int8, layout="interleaved8")
        return q.float() * s[:, None]

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((torch.ones(2, 4, dtype=torch.int32), "gelu", torch.int8), {}, TypeError, "bfloat16, not torch.int32"),
        ((torch.ones(2, 4), "swish", torch.int8), {}, ValueError, "silu, relu6, hard_swish, silu_mul"),
        ((torch.ones(2, 4), None, torch.int8), {}, ValueError, "not None"),
        ((torch.ones(2, 4), "gelu", torch.int8), {"layout": "thirds"}, ValueError, "interleaved8, not 'thirds'"),
        ((torch.ones(2, 16), "gelu", torch.int8), {"layout": "interleaved8"}, ValueError, "gelu has no gate"),
        ((torch.ones(2, 5), "silu_mul", torch.int8), {}, ValueError, "multiple of 2, and x has shape"),
        ((torch.ones(2, 24), "silu_mul", torch.int8), {"layout": "interleaved8"}, ValueError, "multiple of 16"),
        ((torch.ones(4, 3).t(), "gelu", torch.int8), {}, ValueError, "contiguous"),
        ((torch.ones(2, 4), "gelu", torch.float8_e4m3fn), {"symmetric": False}, ValueError, "symmetric=True"),
        ((torch.ones(2, 4), "gelu", torch.int8), {"group_size": 0}, ValueError, "positive integer"),
        ((torch.ones(2, 4), "silu_mul", torch.int8), {"channel_scale": torch.ones(4)}, ValueError, "2 elements"),
    ],
)
def test_refusals(args, kwargs, error, words):
    with pytest.raises(error, match=words) as e:
        fp.ops.activation_quantize(*args, **kwargs)
    assert "\n" not in str(e.value)


def test_refused_beneath_python_too():
    call = torch.ops.forwardpass.activation_quantize_cpu
    for columns, activation, layout in ((5, "silu_mul", "halves"), (24, "silu_mul", "interleaved8"),
                                        (16, "gelu", "interleaved8"), (4, "swish", "halves")):  # fmt: skip
        with pytest.raises(RuntimeError, match="activation_quantize"):
            call(torch.ones(2, columns), activation, torch.int8, None, layout, True, None)


def test_refuses_grad():
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference_mode"):
        fp.ops.activation_quantize(x, "gelu", torch.int8)


def test_the_backend_table_is_complete():
    assert set(OPERATION.runs) == {"cuda", "triton", "cpu", "reference"}
