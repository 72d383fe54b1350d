"""decoder_layer on the CPU: within rounding of the reference, bits that depend on a sequence only."""

import dataclasses

import pytest
import torch
from processes import by_threads
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.dispatch import operations
from forwardpass.ops.decoder_layer import DecoderWeights, Int8Weight, cases, flat
from forwardpass.ops.decoder_layer.cases import Case, copied
from forwardpass.ops.decoder_layer.reference import LAYER, LINEAR, LINEARS
from forwardpass.testing import poisoned_outputs

OPERATION = operations["decoder_layer"]
RUNS = OPERATION.runs
E4M3 = torch.float8_e4m3fn
SIZES = (64, 4, 2, 16, 96)
STEP, PROMPTS, OTHER_HEADS = cases.THREADED_CASES[:3]


def run(args, **changed):
    """(what it gives, the arguments with the caches that it has changed). The arguments are those of the schema."""
    args = copied(tuple((dict(zip(OPERATION.parameters, args)) | changed).values()))
    with poisoned_outputs():
        return RUNS["cpu"](*args), args


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def same(a, b):
    """Bits of results and caches."""
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for i in (1, 2) for x, y in zip(a[1][i], b[1][i]))


@pytest.mark.parametrize("case", [whole(cases.cases())])
def test_cpu_against_reference(case, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(*run(args), args)


@pytest.mark.parametrize("case", cases.THREADED_CASES, ids=str)
def test_bits_do_not_depend_on_the_threads(case):
    args = case.arguments()
    first, *others = by_threads(lambda: run(args))
    cases.assert_matches(*first, args)
    assert all(same(y, first) for y in others)


def part_of(args, first, last):
    """The arguments of some layers."""
    names = OPERATION.parameters
    changed = {
        "k_caches": args[1][first:last],
        "v_caches": args[2][first:last],
        "weights": args[4][first * LAYER : last * LAYER],
    }
    return tuple((dict(zip(names, args)) | changed).values())


@pytest.mark.parametrize(
    "case",
    [STEP, PROMPTS, dataclasses.replace(PROMPTS, dtype=torch.float16), dataclasses.replace(PROMPTS, scales="row")],
)
def test_layers_in_one_call_are_as_many_calls(case):
    args = case.arguments()
    y, after = run(args)
    x = args[0]
    for i in range(case.layers):
        x, one = run(part_of(args, i, i + 1), x=x)
        assert torch.equal(one[1][0], after[1][i]) and torch.equal(one[2][0], after[2][i])
    assert torch.equal(x, y)


def of_sequence(args, b):
    at = slice(b, b + 1)
    x, k_caches, v_caches, seq_lens, weights, heads, cos, sin, *rest, pad, weight_only = args
    return (
        x[at], [t[at] for t in k_caches], [t[at] for t in v_caches], seq_lens[at], weights, heads, cos[at], sin[at], *rest,
        pad if pad is None else pad[at], weight_only,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        STEP,
        # each by itself has rows enough to be shared among threads, too
        dataclasses.replace(PROMPTS, lengths=(80, 75, 70), tokens=70, leftpad=True),
        OTHER_HEADS,
        dataclasses.replace(PROMPTS, scales="row", weight_dtype=E4M3),
    ],
)
def test_bits_are_those_of_a_sequence_alone(case):
    args = case.arguments()
    y = run(args)[0]
    for b in range(len(case.lengths)):
        assert torch.equal(run(of_sequence(args, b))[0][0], y[b])


def test_a_prompt_and_steps_are_a_longer_prompt():
    """But for what attention rounds in another order, and what that moves over a tie between two steps of 8 bits."""
    args = Case((48,), 48, *SIZES, layers=2).arguments()
    y, after = run(args)
    caches = [[t.clone() for t in x] for x in args[1:3]]
    rest = args[4:6], args[8:]
    for first, last in ((0, 40), (40, 47), (47, 48)):
        rotary = (t[:, first:last] for t in args[6:8])
        part = RUNS["cpu"](args[0][:, first:last], *caches, ints(last), *rest[0], *rotary, *rest[1])
        assert torch.cosine_similarity(part, y[:, first:last], dim=2).min() > 0.9999
    for i in (0, 1):
        for got, want in zip(caches[i], after[1 + i]):
            assert torch.cosine_similarity(got[:, :48].flatten(2), want[:, :48].flatten(2), dim=2).min() > 0.9999


def test_padding_on_the_left_counts_for_nothing():
    args = Case((40,), 40, *SIZES).arguments()
    poisoned = args[0].clone()
    poisoned[:, :7] = 1e4
    y = run(args, leftpad=ints(7))[0]
    assert torch.equal(run(args, x=poisoned, leftpad=ints(7))[0][:, 7:], y[:, 7:])
    assert not torch.equal(run(args)[0][:, 7:], y[:, 7:])


@pytest.mark.parametrize("case", [STEP, PROMPTS, OTHER_HEADS])
def test_lengths_out_of_range_are_nan_and_write_nothing(case):
    args = case.arguments()
    room = args[1][0].shape[1]
    lens = [*case.lengths]
    for bad in (-1, room + 1):
        y, after = run(args, seq_lens=ints(bad, *lens[1:]))
        assert y[0].isnan().all() and y[1:].isfinite().all()
        assert all(torch.equal(a[0], b[0]) for i in (1, 2) for a, b in zip(after[i], args[i]))
    y = run(args, leftpad=ints(-1, *([0] * (len(lens) - 1))))[0]
    assert y[0].isnan().all() and y[1:].isfinite().all()
    y, _ = run(args, seq_lens=ints(0, *lens[1:]))
    assert y.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [STEP, PROMPTS])
def test_a_nan_or_an_infinity_stays_in_its_sequence(case, value):
    args = case.arguments()
    x = args[0].clone()
    x[1, -1, 3] = value
    got, y = run(args, x=x)[0], run(args)[0]
    assert got[1, -1].isnan().all()
    assert torch.equal(got[0], y[0]) and torch.equal(got[2], y[2])


@pytest.mark.parametrize("case", [STEP, PROMPTS])
def test_what_lies_beyond_a_sequence_is_not_read(case):
    args = copied(case.arguments())
    y = run(args)[0]
    for caches in args[1:3]:
        for cache in caches:
            for b, n in enumerate(case.lengths):
                cache[b, n:] = torch.nan
    assert torch.equal(run(args)[0], y)


@pytest.mark.parametrize("case", [STEP, PROMPTS])
def test_packed_weights_give_the_same_bits(case):
    assert same(run(case.arguments()), run(dataclasses.replace(case, packed=True).arguments()))


def test_nothing():
    args = dataclasses.replace(STEP, lengths=()).arguments()
    assert run(args)[0].shape == (0, 1, 64)
    args = dataclasses.replace(STEP, tokens=0).arguments()
    assert run(args)[0].shape == (3, 0, 64)


@pytest.mark.slow
def test_many_tokens():
    args = Case((8192,), 8192, 64, 2, 1, 32, 128, dtype=torch.bfloat16).arguments()
    first, *others = by_threads(lambda: run(args))
    cases.assert_matches(*first, args)
    assert all(same(y, first) for y in others)


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts([*cases.cases()][::9], 2))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.forwardpass.decoder_layer_cpu.default, case.arguments())


@pytest.mark.every(2)
def test_compiles_whole():
    args = STEP.arguments()

    def f(x, k_caches, v_caches):
        return OPERATION(x, k_caches, v_caches, *args[3:]) * 2

    one, two = copied(args), copied(args)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(*one[:3])
    assert torch.equal(y, f(*two[:3])) and same((y, one), (y, two))


def weights(**changed):
    args = Case((4,), 4, *SIZES).arguments()[4]
    parts = [Int8Weight(*args[i : i + LINEAR]) for i in range(0, LINEAR * LINEARS, LINEAR)]
    return DecoderWeights(*parts, *args[LINEAR * LINEARS :])._replace(**changed)


LAYER_WEIGHTS = weights()
PARTS = ("qkv", "out", "up", "down")
WEIGHT_ONLY = fp.ops.W8a16Weight(torch.zeros(64, 64, dtype=torch.int8), torch.ones(64))


def part(name, **changed):
    return weights(**{name: getattr(LAYER_WEIGHTS, name)._replace(**changed)})


def cache(*shape, **options):
    return torch.zeros(*(shape or (1, 8, 2, 16)), **options)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("layers", "options", "error", "words"),
    [
        ([], {}, ValueError, "layers must be one DecoderWeights for each cache: 1, not 0"),
        (LAYER_WEIGHTS, {}, TypeError, "layers must be a list of DecoderWeights"),
        ([part("qkv", weight=torch.zeros(64, 64, dtype=torch.int8))], {}, ValueError, r"qkv.weight must be \[128, 64\]"),
        ([weights(out=WEIGHT_ONLY)], {}, TypeError, "must all be Int8Weight, or all W8a16Weight"),
        ([weights(**dict.fromkeys(PARTS, WEIGHT_ONLY))], {}, ValueError, r"qkv.weight must be \[128, 64\], and has 64 rows"),
        ([weights(**dict.fromkeys(PARTS, WEIGHT_ONLY._replace(weight=torch.ones(64, 64))))], {}, TypeError,
         "qkv.weight must be an int8 or float8_e4m3fn tensor"),
        ([part("out", weight=None)], {}, TypeError, "out must be an Int8Weight with weight and scale"),
        ([part("up", scale=torch.ones(3))], {}, ValueError, "up.scale must be contiguous with 192 elements"),
        ([weights(norm2=torch.ones(64).half())], {}, TypeError, "norm2 must be a tensor of torch.float32"),
        ([weights(norm1=None)], {}, TypeError, "norm1 must be a tensor of torch.float32 or x's dtype, and is None"),
        ([LAYER_WEIGHTS], {"heads": 3}, ValueError, "heads must be a positive multiple of the 2 heads"),
        ([LAYER_WEIGHTS], {"activation": "tanh"}, ValueError, "activation must be one of"),
        ([LAYER_WEIGHTS], {"leftpad": ints(3, 4)}, ValueError, "leftpad must be contiguous with 1 element"),
        ([LAYER_WEIGHTS], {"seq_lens": ints(3, 4)}, ValueError, r"seq_lens must be contiguous \[1\]"),
        ([LAYER_WEIGHTS], {"x": torch.zeros(4, 64)}, ValueError, r"x must be \[B, S, H\]"),
        ([LAYER_WEIGHTS], {"scale": 0.0}, ValueError, "scale must be finite and positive"),
        ([LAYER_WEIGHTS], {"k_caches": []}, ValueError, "each layer has a k_cache and a v_cache, and there are 0 and 1"),
        ([LAYER_WEIGHTS], {"k_caches": cache()}, TypeError, "k_caches must be a list of tensors"),
        ([LAYER_WEIGHTS], {"k_caches": [cache(dtype=torch.float16)]}, TypeError, "must be a tensor of x's dtype"),
        ([LAYER_WEIGHTS], {"v_caches": [cache(1, 8, 2, 8)]}, ValueError, "Hk and D those of the first"),
        ([LAYER_WEIGHTS], {"k_caches": [cache(1, 1, 2, 16).expand(1, 8, 2, 16)]}, ValueError, "cannot be written"),
        ([LAYER_WEIGHTS], {"rotary": (torch.ones(1, 4, 6), torch.ones(1, 4, 8))}, ValueError, "must have one shape and dtype"),
        ([LAYER_WEIGHTS], {"rotary": (torch.ones(1, 4, 18),) * 2}, ValueError, "must have 2 to 16 columns"),
        ([LAYER_WEIGHTS], {"rotary": (torch.ones(1, 4, 8), None)}, TypeError, "sin of rotary must be a tensor"),
    ],
)  # fmt: skip
def test_refusals(layers, options, error, words):
    arguments = {
        "x": torch.zeros(1, 4, 64),
        "k_caches": [cache()],
        "v_caches": [cache()],
        "seq_lens": ints(4),
        "heads": 4,
    }
    arguments |= options
    first = [arguments.pop(name) for name in ("x", "k_caches", "v_caches", "seq_lens")]
    with pytest.raises(error, match=words) as e:
        fp.ops.decoder_layer(*first, layers, **arguments)
    assert "\n" not in str(e.value) and str(e.value).startswith("decoder_layer")


def test_one_memory_for_keys_and_values_is_refused():
    both = cache()
    with pytest.raises(ValueError, match="are the same memory"):
        fp.ops.decoder_layer(torch.zeros(1, 4, 64), [both], [both], ints(4), [LAYER_WEIGHTS], heads=4)


def test_refuses_grad():
    layer = weights(norm1=torch.ones(64, requires_grad=True))
    with pytest.raises(RuntimeError, match="has no backward"):
        fp.ops.decoder_layer(torch.zeros(1, 4, 64), [cache()], [cache()], ints(4), [layer], heads=4)


def test_cases_are_those_that_they_are_named():
    all_of = [*cases.cases()]
    assert any(c.columns % 16 for c in all_of) and any(len(c.lengths) * c.tokens > 128 for c in all_of)
    assert len(flat([LAYER_WEIGHTS])) == LAYER and len(all_of) < 90
