"""Prefill of few tiles of many keys (split-KV): several blocks share the keys of a tile, and a second kernel combines them."""

import dataclasses

import pytest
import torch
from rotation import some_of

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.attention import cases
from forwardpass.ops.attention_decode import WITH_LSE
from forwardpass.ops.attention_decode import cases as of_cache
from forwardpass.testing import assert_equal, poisoned_outputs

COMBINE = "combine_attention_kernel"
ARCHES = ("sm_80", "sm_90a")
F16, BF16 = torch.float16, torch.bfloat16
#: On an A100 each is of one to four tiles of rows, in two to seven parts.
FEW = (
    cases.Case((100, 1500), (128, 128), F16, heads=(2, 1), lse=True),
    cases.Case((140, 900), (64, 64), BF16, 1, (2, 2), causal=True, sinks="float32", lse=True),
    cases.Case((70, 1100), (192, 128), BF16, 1, (2, 2), causal=True, window=(400, None), lse=True),
    cases.Case((33, 700), (256, 256), F16, 1, (2, 1), softcap=8.0, mask="bool bij", alibi="bh", lse=True),
    cases.Case((600, 520), (96, 96), F16, 1, (1, 1), causal=True, sinks="dtype", lse=True),  # rows without keys
)
OF_CACHE = (
    of_cache.Case((1500, 300, 0), 56, 128, (2, 2), page=5, sinks="float32"),
    of_cache.Case((700, 1100), 130, 64, (2, 1), F16, page=16, window=500, softcap=8.0, alibi="head"),
)


def run(operation, args, seed=0, arch="sm_80", **options):
    """The result, and the names of the kernels."""
    with fp.interpret(arch, seed=seed, guard=True, counters=True, **options) as gpu:
        with fp.use_backend("cuda"), poisoned_outputs():
            result = operation(*args)
        assert gpu.findings == []
        return result, " ".join(k.kernel for k in gpu.kernels())


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_keys_of_few_tiles_are_shared(parts, arch, seed):
    for case in some_of(FEW, parts, shift=ARCHES.index(arch)):
        args = case.arguments(seed=seed)
        result, kernels = run(dispatch.operations[case.op], args, seed, arch)
        assert COMBINE in kernels
        cases.assert_matches(result, args)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_keys_of_a_cache_are_shared(parts, arch, seed):
    for case in some_of(OF_CACHE, parts, shift=ARCHES.index(arch)):
        args = case.arguments(seed=seed)
        result, kernels = run(WITH_LSE, args, seed, arch, multiprocessors=24)
        assert COMBINE in kernels and "decode" not in kernels
        of_cache.assert_matches(result, args)


@pytest.mark.parametrize("arch", ARCHES)
def test_whatever_the_seed(arch):
    case = cases.Case((40, 600), (64, 64), F16, 1, (1, 1), causal=True, lse=True)
    args = case.arguments()
    for seed in range(3):
        result, kernels = run(dispatch.operations[case.op], args, seed, arch)
        assert COMBINE in kernels
        cases.assert_matches(result, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"batch_invariant": True}, {}),
        ({"sizes": (100, 300)}, {}),  # there are too few keys
        ({"window": (100, None)}, {}),  # too few that a row sees
        ({"packed": True}, {}),  # only the device knows them
        ({"batch": 2}, {"multiprocessors": 3}),  # tiles that fill the GPU
    ],
    ids=str,
)
def test_others_are_computed_whole(change, options, arch):
    case = dataclasses.replace(cases.Case((100, 800), (64, 64), F16, 1, (2, 2), causal=True), **change)
    args = case.arguments()
    result, kernels = run(dispatch.operations[case.op], args, arch=arch, **options)
    assert COMBINE not in kernels
    cases.assert_matches(result, args)


def test_a_batch_invariant_row_is_that_of_its_own():
    case = cases.Case((40, 700), (64, 64), F16, 3, (2, 2), causal=True, batch_invariant=True)
    args = case.arguments()
    together, _ = run(dispatch.operations[case.op], args)
    for b in range(3):
        alone, _ = run(dispatch.operations[case.op], (*(x[b : b + 1] for x in args[:3]), *args[3:]))
        assert_equal(alone, together[b : b + 1])
