"""encoder_layer on the CPU: within rounding of the reference, bits that depend on a row and its sequence only."""

import dataclasses
import itertools

import pytest
import torch
from processes import by_threads
from rotation import in_parts, whole
from torch import nn

import forwardpass as fp
from forwardpass.dispatch import operations
from forwardpass.ops.encoder_layer import EncoderWeights, Int8Weight, cases, flat
from forwardpass.ops.encoder_layer.cases import Case
from forwardpass.ops.encoder_layer.reference import LAYER, LINEAR, LINEARS
from forwardpass.testing import poisoned_outputs

RUNS = operations["encoder_layer"].runs
#: MANY: in blocks of rows with one thread.
FEW, MANY = cases.THREADED_CASES[:2]
#: Rotated, with windows, q, k and v in one weight, without the first norm.
MODERN_FEW, MODERN_MANY, MODERN_SHARED, MODERN_OF_TORCH = (case for case in cases.THREADED_CASES if case.rotated)
#: Rows whose products and heads threads share.
SHARED = cases.THREADED_CASES[-3]
SCORE_BIAS = operations["encoder_layer"].parameters.index("score_bias")
BIASED_FEW, BIASED_MANY = (dataclasses.replace(case, score_bias=3) for case in (FEW, MANY))


def run(args, **changed):
    """The arguments are those of the schema."""
    names = operations["encoder_layer"].parameters
    with poisoned_outputs():
        return RUNS["cpu"](*(dict(zip(names, args)) | changed).values())


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("case", [whole(cases.cases())])
def test_cpu_against_reference(case, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(run(args), args)


@pytest.mark.parametrize("case", cases.THREADED_CASES, ids=str)
def test_bits_do_not_depend_on_the_threads(case):
    args = case.arguments()
    first, *others = by_threads(lambda: run(args))
    cases.assert_matches(first, args)
    assert all(torch.equal(y, first) for y in others)


@pytest.mark.parametrize(
    "case",
    [FEW, MANY, BIASED_MANY, MODERN_FEW, MODERN_MANY, dataclasses.replace(MANY, x_dtype=torch.float16, pre_norm=True)],
)
def test_layers_in_one_call_are_as_many_calls(case):
    args = case.arguments()
    x, weights = args[0], args[2]
    for i in range(case.layers):
        x = run(args, x=x, weights=weights[i * LAYER : (i + 1) * LAYER], **of_layer(args, i))
    assert torch.equal(x, run(args))


def named(args):
    return dict(zip(operations["encoder_layer"].parameters, args))


def of_layer(args, i):
    """What layer i alone has of the lists, one a layer."""
    lists = {name: x[i : i + 1] for name, x in named(args).items() if name in ("cos", "sin", "windows")}
    return {**lists, "first_norm": i > 0 or args[-1]}


def of_rows(args, rows):
    """What these rows have of what is of rows."""
    return {"x": args[0][rows]} | {name: [x[rows] for x in named(args)[name]] for name in ("cos", "sin")}


@pytest.mark.parametrize("case", [FEW, MANY, BIASED_FEW, BIASED_MANY, MODERN_FEW, MODERN_MANY])
def test_bits_are_those_of_a_sequence_alone(case):
    args, y = case.arguments(), run(case.arguments())
    for begin, end in itertools.pairwise(args[1].tolist()):
        got = run(args, **of_rows(args, slice(begin, end)), cu_seqlens=ints(0, end - begin))
        assert torch.equal(got, y[begin:end])


@pytest.mark.parametrize("case", [MODERN_FEW, MODERN_MANY])
def test_one_weight_of_q_k_and_v_gives_the_bits_of_three(case):
    args = case.arguments()
    weights = [*args[2]]
    for first in range(0, len(weights), LAYER):
        parts = [t if t is None else t.chunk(3) for t in weights[first : first + LINEAR]]
        for i in range(3):
            weights[first + i * LINEAR : first + (i + 1) * LINEAR] = [p if p is None else p[i] for p in parts]
    assert torch.equal(run(args, weights=weights), run(args))


@pytest.mark.parametrize("case", [MODERN_FEW, MODERN_MANY, MODERN_OF_TORCH])
def test_a_window_as_wide_as_the_sequences_and_angles_of_zero_change_nothing(case):
    args = case.arguments()
    y = run(args, windows=[])
    assert torch.equal(run(args, windows=[max(case.lengths)] * case.layers), y)
    zero = {"cos": [torch.ones_like(x) for x in args[11]], "sin": [torch.zeros_like(x) for x in args[12]]}
    assert torch.equal(run(args, **zero), run(args, cos=[], sin=[]))


@pytest.mark.parametrize("window", [0, 1, 5, 16, 30])
@pytest.mark.parametrize("case", [MODERN_FEW, MODERN_MANY, MODERN_OF_TORCH])
def test_rows_depend_on_those_within_their_window_alone(case, window):
    """Of one layer: a NaN and another value at one row reach the rows that see it, and no others. Padding is seen by none. Torch's
    attention multiplies a NaN behind its mask by zero."""
    case = dataclasses.replace(case, layers=1, lengths=(70, 40), windows=(window,))
    args = case.arguments()
    x, lens = args[0].clone(), ints(60, 40) if case.key_lens else None
    y = run(args, key_lens=lens)
    for row in (0, 33, 59, 65, 69):
        seen = range(max(0, row - window), min(70, row + window + 1)) if lens is None or row < 60 else [row]
        others = [i for i in range(110) if i not in seen]
        for value in (torch.nan, torch.inf) if case.h // case.heads % 16 == 0 else ():
            x.copy_(args[0])[row, 2] = value
            got = run(args, x=x, key_lens=lens)
            assert got[list(seen)].isnan().all() and torch.equal(got[others], y[others])
        x.copy_(args[0])[row] *= -1
        got = run(args, x=x, key_lens=lens)
        assert torch.equal(got[others], y[others]) and all((got[i] != y[i]).any() for i in seen)


@pytest.mark.parametrize("case", [MODERN_FEW, MODERN_MANY])
def test_the_comparison_sees_another_rotation_window_or_norm(case):
    args = dataclasses.replace(case, lengths=(60,)).arguments()
    cos, sin = args[11], args[12]
    faults = (
        {"cos": cos[::-1], "sin": sin[::-1]}, {"sin": [-x for x in sin]}, {"windows": [-1, 15, 16]}, {"windows": [-1, 16, -1]},
        {"windows": [16, 16, 16]}, {"first_norm": True}, {"pre_norm": False, "first_norm": True},
    )  # fmt: skip
    for fault in faults:
        with pytest.raises(AssertionError, match="off by"):
            cases.assert_matches(run(args, **fault), args)


@pytest.mark.parametrize("case", [FEW, MANY])
def test_packed_weights_give_the_same_bits(case):
    packed = dataclasses.replace(case, packed=True).arguments()
    assert torch.equal(run(case.arguments()), run(packed))


@pytest.mark.parametrize("case", [FEW, MANY])
def test_q_k_and_v_are_quantised_each_in_its_own_way(case):
    """They share what is alike alone: here q has zero points, k has none and is scaled, v is scaled as k is, with zero points."""
    args = case.arguments()
    weights, scale = list(args[2]), torch.linspace(0.5, 2, 64)
    for first in range(0, len(weights), LAYER):
        weights[first + LINEAR + 3] = None  # k's sum
        weights[first + LINEAR + 4] = weights[first + 2 * LINEAR + 4] = scale
    args = (*args[:2], weights, *args[3:])
    cases.assert_matches(run(args), args)


@pytest.mark.parametrize("score_bias", [None, 4])
def test_key_lens_are_a_padded_batch(score_bias):
    """What stands behind a sequence's keys is computed, and is looked at by nobody."""
    args = Case((40, 40, 40), 64, 4, 256, layers=2, score_bias=score_bias).arguments()
    y = run(args, key_lens=ints(40, 17, 1))
    packed = torch.cat([args[0][:40], args[0][40:57], args[0][80:81]])
    expected = run(args, x=packed, cu_seqlens=ints(0, 40, 57, 58))
    assert torch.equal(torch.cat([y[:40], y[40:57], y[80:81]]), expected)
    assert y.isfinite().all()
    assert run(args, key_lens=ints(40, 0, 40)).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", [FEW, MANY, BIASED_FEW, BIASED_MANY])
def test_a_nan_or_an_infinity_stays_in_its_sequence(case, value):
    args = case.arguments()
    y, x = run(args), args[0].clone()
    begin, end = args[1][1].item(), args[1][2].item()
    x[end - 1, 3] = value
    got = run(args, x=x)
    assert got[begin:end].isnan().all()
    assert torch.equal(got[:begin], y[:begin]) and torch.equal(got[end:], y[end:])


@pytest.mark.parametrize(
    ("cu_seqlens", "nan"),
    [((0, 33, 60), (60, 138)), ((0, 33, 200), (33, 138)), ((5, 138), (0, 138)), ((0, 20, 60, 50, 138), (20, 138))],
)
def test_rows_of_no_sequence_are_nan(cu_seqlens, nan):
    args = MANY.arguments()
    got = run(args, cu_seqlens=ints(*cu_seqlens))
    assert got[slice(*nan)].isnan().all()
    assert got[: nan[0]].isfinite().all() and got[nan[1] :].isfinite().all()
    full = run(args, key_lens=ints(33, 2, 64, 40))  # more keys than there are rows
    assert full[33:34].isnan().all() and full[:33].isfinite().all() and full[34:].isfinite().all()


@pytest.mark.parametrize("case", [SHARED, MODERN_SHARED], ids=str)
def test_threads_that_share_heads_find_the_same_sequences(case):
    args = case.arguments()
    for cu_seqlens in ((0, 9, 16), (0, 9, 9, 12), (0, 9, 5, 16), (3, 9, 16)):
        first, *others = by_threads(lambda: run(args, cu_seqlens=ints(*cu_seqlens), key_lens=None))  # noqa: B023
        assert all(torch.equal(y.nan_to_num(7), first.nan_to_num(7)) for y in others)
        assert first.isnan().any() == (cu_seqlens != (0, 9, 16))


@pytest.mark.parametrize("case", [BIASED_FEW, BIASED_MANY])
def test_scores_have_the_bias(case):
    """A key that it hides by -inf is as if it were not there; a NaN reaches the rows that it is added to; zeros add nothing."""
    args = dataclasses.replace(case, layers=1).arguments()
    bias = torch.zeros_like(args[SCORE_BIAS])
    assert torch.equal(run(args, score_bias=bias), run(args, score_bias=None))
    bias[:, :, 1:] = -torch.inf
    y = run(args, score_bias=bias)
    first = run(args, score_bias=None, key_lens=(args[1].diff() > 0).int())
    assert torch.equal(y, first)
    bias[1, 2, 0] = torch.nan
    got, third = run(args, score_bias=bias), [a + 2 for a, b in itertools.pairwise(args[1].tolist()) if b - a > 2]
    assert got[third].isnan().all()
    others = [i for i in range(len(y)) if i not in third]
    assert torch.equal(got[others], y[others])


@pytest.mark.parametrize("case", [BIASED_FEW, BIASED_MANY])
def test_sequences_longer_than_the_bias_are_nan(case):
    args = case.arguments()
    size = args[1].diff().max().item() - 1
    got, y = run(args, score_bias=args[SCORE_BIAS][:, :size, :size]), run(args)
    for begin, end in itertools.pairwise(args[1].tolist()):
        if end - begin > size:
            assert got[begin:end].isnan().all()
        else:
            assert torch.equal(got[begin:end], y[begin:end])


def test_nothing_and_one_token():
    args = dataclasses.replace(FEW, lengths=()).arguments()
    assert run(args).shape == (0, 64)
    args = dataclasses.replace(FEW, lengths=(0, 0)).arguments()
    assert run(args).shape == (0, 64)
    args = dataclasses.replace(FEW, lengths=(1,)).arguments()
    cases.assert_matches(run(args), args)


@pytest.mark.slow
def test_many_tokens():
    args = Case((8192,), 64, 2, 128, attention_dtype=torch.bfloat16).arguments()
    first, *others = by_threads(lambda: run(args))
    cases.assert_matches(first, args)
    assert all(torch.equal(y, first) for y in others)


def quantized(*layers):
    weight = torch.cat([layer.weight.detach() for layer in layers])
    q, scale, _ = fp.ops.quantize(weight, torch.int8)
    return Int8Weight(q, scale, torch.cat([layer.bias.detach() for layer in layers]), q.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_is_the_layer_of_torch(pre_norm):
    """In 8 bits: to a cosine of .999."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", batch_first=True, norm_first=pre_norm).eval()
    projections = [nn.Linear(64, 64) for _ in range(3)]
    in_proj = layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3)
    for linear, weight, bias in zip(projections, *in_proj):
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    norms = [(n.weight.detach(), n.bias.detach()) for n in (layer.norm1, layer.norm2)]
    linears = (*projections, layer.self_attn.out_proj, layer.linear1, layer.linear2)
    weights = EncoderWeights(*map(quantized, linears), *norms)
    x = torch.randn(2, 40, 64)
    with torch.inference_mode():
        y = fp.ops.encoder_layer(x.flatten(0, 1), ints(0, 40, 80), [weights], heads=4, eps=1e-5, pre_norm=pre_norm)
        exact = layer(x).flatten(0, 1)
    assert torch.cosine_similarity(y, exact).min() > 0.999


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts([*cases.cases()][::9], 2))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.encoder_layer_cpu.default, case.arguments())


@pytest.mark.every(2)
def test_compiles_whole():
    args = FEW.arguments()

    def f(x):
        return operations["encoder_layer"](x, *args[1:]) * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(args[0]), f(args[0]))


def weights(**changed):
    args = Case((4,), 64, 4, 256).arguments()[2]
    parts = [Int8Weight(*args[i : i + LINEAR]) for i in range(0, LINEAR * LINEARS, LINEAR)]
    norms = args[LINEAR * LINEARS :]
    return EncoderWeights(*parts, tuple(norms[:2]), tuple(norms[2:]))._replace(**changed)


LAYER_WEIGHTS = weights()


FUSED = weights(q=Int8Weight(torch.zeros(192, 64, dtype=torch.int8), torch.ones(192)), k=None, v=None)
ROTARY = torch.ones(4, 8), torch.ones(4, 8)


def part(name, **changed):
    return weights(**{name: getattr(LAYER_WEIGHTS, name)._replace(**changed)})


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("layers", "options", "error", "words"),
    [
        ([], {}, ValueError, "layers must be one EncoderWeights or more"),
        (LAYER_WEIGHTS, {}, TypeError, "layers must be a list of EncoderWeights"),
        ([part("k", weight=torch.zeros(128, 64, dtype=torch.int8))], {}, ValueError, r"k.weight must be \[64, 64\]"),
        ([part("out", weight=None)], {}, TypeError, "out must be an Int8Weight with weight and scale"),
        ([part("up", weight=torch.zeros(256, 64))], {}, TypeError, "up.weight must be an int8 tensor"),
        ([part("up", scale=torch.ones(3))], {}, ValueError, "up.scale must be contiguous with 256 elements"),
        ([part("down", bias=torch.ones(64).double())], {}, TypeError, "down.bias must be a tensor of"),
        ([part("down", sum=torch.ones(64))], {}, TypeError, "down.sum must be a tensor of torch.int32"),
        ([part("down", packed=torch.ones(64))], {}, TypeError, "packed must be an int8 tensor"),
        ([part("down", weight=torch.zeros(64, 255, dtype=torch.int8))], {}, ValueError, "down.weight"),
        ([weights(norm2=(torch.ones(64).half(), None))], {}, TypeError, "norm2's weight must be a tensor of torch.float32"),
        ([LAYER_WEIGHTS], {"heads": 5}, ValueError, "heads must be a positive divisor of the 64 columns"),
        ([LAYER_WEIGHTS], {"activation": "tanh"}, ValueError, "activation must be one of"),
        ([part("up", weight=torch.zeros(248, 64, dtype=torch.int8), scale=torch.ones(248), bias=None, sum=None)],
         {"activation": "silu_mul"}, ValueError, "a multiple of 16"),
        ([LAYER_WEIGHTS], {"key_lens": ints(3)}, ValueError, "key_lens must be contiguous with 2 elements"),
        ([LAYER_WEIGHTS], {"score_bias": torch.zeros(4, 3, 3).half()}, TypeError, "score_bias must be a tensor of torch.float32"),
        ([LAYER_WEIGHTS], {"score_bias": torch.zeros(2, 4, 3, 3)}, ValueError, r"score_bias must be \[4, S, S\]"),
        ([LAYER_WEIGHTS], {"score_bias": torch.zeros(4, 3, 4)}, ValueError, r"score_bias must be \[4, S, S\]"),
        ([LAYER_WEIGHTS], {"score_bias": torch.zeros(4, 3, 3).mT}, ValueError, "score_bias must have stride 1"),
        ([LAYER_WEIGHTS], {"cu_seqlens": ints()}, ValueError, r"cu_seqlens must be \[B \+ 1\]"),
        ([LAYER_WEIGHTS], {"x": torch.zeros(2, 2, 64)}, ValueError, r"x must be \[T, H\]"),
        ([weights(k=None, v=None)], {}, ValueError, r"q.weight must be \[192, 64\]"),
        ([weights(k=None)], {}, TypeError, "k must be an Int8Weight with weight and scale"),
        ([LAYER_WEIGHTS, FUSED], {}, ValueError, "one weight in all layers, or in none"),
        ([LAYER_WEIGHTS], {"rotary": ROTARY}, TypeError, "rotary must be a list of"),
        ([LAYER_WEIGHTS], {"rotary": [ROTARY, ROTARY]}, ValueError, r"\(cos, sin\) of each of 1 layers, and has 2"),
        ([LAYER_WEIGHTS], {"rotary": [(ROTARY[0], ROTARY[0].half())]}, TypeError, "float32 or all of x's dtype"),
        ([LAYER_WEIGHTS], {"rotary": [(ROTARY[0].half(), ROTARY[0].half())]}, TypeError, "float32 or all of x's dtype"),
        ([LAYER_WEIGHTS], {"rotary": [(torch.ones(4, 18), torch.ones(4, 18))]}, ValueError, r"\[4, R\], R even, .* at most 16"),
        ([LAYER_WEIGHTS], {"rotary": [(torch.ones(4, 7), torch.ones(4, 7))]}, ValueError, r"\[4, R\], R even"),
        ([LAYER_WEIGHTS], {"rotary": [(ROTARY[0], torch.ones(4, 6))]}, ValueError, r"\[4, R\], R even"),
        ([LAYER_WEIGHTS], {"rotary": [(torch.ones(3, 8), torch.ones(3, 8))]}, ValueError, r"\[4, R\], R even"),
        ([LAYER_WEIGHTS], {"rotary": [(torch.ones(8, 4).mT, torch.ones(8, 4).mT)]}, ValueError, "must have stride 1"),
        ([LAYER_WEIGHTS], {"windows": [3, None]}, ValueError, "windows must be one of each of 1 layers"),
        ([LAYER_WEIGHTS], {"windows": [-2]}, ValueError, "windows must be one of each of 1 layers, at least 0 or None"),
        ([LAYER_WEIGHTS], {"windows": [2.0]}, TypeError, "windows must be integers or None"),
        ([LAYER_WEIGHTS], {"first_norm": False}, ValueError, "first_norm=False is for pre_norm=True"),
        ([LAYER_WEIGHTS], {"first_norm": 0}, TypeError, "first_norm must be True or False"),
        ([LAYER_WEIGHTS], {"scale": 0.0}, ValueError, "scale must be finite and positive"),
        ([LAYER_WEIGHTS], {"attention_dtype": torch.int8}, TypeError, "attention_dtype must be float32"),
    ],
)  # fmt: skip
def test_refusals(layers, options, error, words):
    arguments = {"x": torch.zeros(4, 64), "cu_seqlens": ints(0, 1, 4), "heads": 4} | options
    x, cu_seqlens = arguments.pop("x"), arguments.pop("cu_seqlens")
    with pytest.raises(error, match=words) as e:
        fp.ops.encoder_layer(x, cu_seqlens, layers, **arguments)
    assert "\n" not in str(e.value) and str(e.value).startswith("encoder_layer")


def test_refuses_grad():
    layer = weights(norm1=(torch.ones(64, requires_grad=True), None))
    with pytest.raises(RuntimeError, match="has no backward"):
        fp.ops.encoder_layer(torch.zeros(4, 64), ints(0, 4), [layer], heads=4)


def test_cases_are_those_that_they_are_named():
    all_of = [*cases.cases()]
    assert any(c.pre_norm and c.activation == "gelu_mul" for c in all_of)
    assert any(c.h // c.heads % 16 for c in all_of) and any(sum(c.lengths) > 128 for c in all_of)
    assert len(flat([LAYER_WEIGHTS])) == LAYER and len(all_of) < 90
