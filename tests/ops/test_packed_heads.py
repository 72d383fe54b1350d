"""GQA's packing on wgmma: all query heads of a kv head are rows of one tile, where rows of a cache are too few to fill tiles and
too many for decode's kernel to be as fast as memory."""

import dataclasses

import pytest
import torch
from rotation import some_of

import forwardpass as fp
from forwardpass.ops.attention_decode import WITH_LSE, cases
from forwardpass.testing import assert_equal, poisoned_outputs

F16, BF16 = torch.float16, torch.bfloat16
DECODE, WGMMA, COMBINE = "attention_decode_kernel", "attention_wgmma_kernel", "combine_attention_kernel"
#: And how many tiles of rows they are: of 128 rows each, of 192 at head dim 64.
CASES = (
    (cases.Case((300, 40, 0), 9, 128, (8, 2), F16, page=16, sinks="float32"), 6),
    (cases.Case((300, 400), 5, 64, (8, 1), page=32, window=100), 2),
    (cases.Case((257, 33), 33, 96, (16, 2), page=None, layout="heads first"), 12),
    (cases.Case((150, 140), 5, 256, (64, 1), F16, page=64, softcap=8.0, sinks="dtype", layout="together"), 6),
    (cases.Case((90, 300), 3, 192, (32, 2), page=16, value_dim=128, window=40), 4),
    (cases.Case((40, 200), 50, 64, (4, 1), page=16), 4),
    (cases.Case((130,), 1, 128, (64, 1), page=16), 1),
)


def run(args, seed=0, arch="sm_90a", **options):
    """The result, and the thread blocks of each kernel."""
    options = {"guard": True, "counters": True, "approximate": False, **options}
    with fp.interpret(arch, seed=seed, **options) as gpu, fp.use_backend("cuda"), poisoned_outputs():
        result = WITH_LSE(*args)
        assert gpu.findings == []
        names = (DECODE, WGMMA, COMBINE, "attention_mma_kernel", "combine_decode_kernel")
        return result, {n: k.grid[0] for k in gpu.kernels() for n in names if n in k.kernel}


@pytest.mark.parametrize("parts", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_heads_are_rows_of_a_tile(parts, seed):
    for case, tiles in some_of(CASES, parts):
        args = case.arguments(seed=seed)
        result, kernels = run(args, seed)
        assert kernels == {WGMMA: tiles}, case
        cases.assert_matches(result, args)


@pytest.mark.every(2)
@pytest.mark.parametrize("multiprocessors", [2, 24])
def test_their_keys_are_shared(multiprocessors, seed):
    """Split-KV, and persistent blocks with several tiles each."""
    case = cases.Case((1500, 900), 10, 128, (16, 4), F16, page=16, sinks="float32", window=1200)
    args = case.arguments(seed=seed)
    result, kernels = run(args, seed, multiprocessors=multiprocessors)
    assert kernels.keys() == ({WGMMA, COMBINE} if multiprocessors > 8 else {WGMMA})
    cases.assert_matches(result, args)


def test_a_row_has_the_bits_of_its_head_alone():
    """However heads are packed."""
    case = cases.Case((300, 77), 40, 128, (4, 1), page=16)
    args = case.arguments()
    (o, lse), kernels = run(args)
    assert kernels == {WGMMA: 4}
    for head in range(4):
        alone, _ = run((args[0][:, :, head : head + 1], *args[1:]))
        assert_equal(o[:, :, head : head + 1].contiguous(), alone[0])
        assert_equal(lse[:, head : head + 1].contiguous(), alone[1])


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("change", "arch", "kernel"),
    [
        ({"rows": 4}, "sm_90a", DECODE),  # 32 rows that share keys: memory binds
        ({"alibi": "head"}, "sm_90a", DECODE),  # slopes are of heads
        ({"heads": (6, 1)}, "sm_90a", DECODE),  # no power of two
        ({"cache": torch.int8}, "sm_90a", DECODE),
        ({"leftpad": (3,)}, "sm_90a", DECODE),
        ({"page": 24}, "sm_90a", DECODE),  # not by TMA
        ({}, "sm_80", DECODE),
        ({"rows": 128}, "sm_90a", WGMMA),  # heads fill tiles of their own
    ],
    ids=str,
)
def test_others_are_not_packed(change, arch, kernel):
    case = dataclasses.replace(cases.Case((300,), 8, 64, (8, 1), page=16), **change)
    args = case.arguments()
    result, kernels = run(args, arch=arch, multiprocessors=1)
    assert kernel in kernels
    cases.assert_matches(result, args)
