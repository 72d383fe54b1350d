"""Where the keys of prefill on wgmma come from: by TMA out of a cache, paged or contiguous, they give a row the bits that they give
it in a tensor of their own. Nothing is read of pages or rows that are no sequence's, which are poisoned."""

import re

import pytest
import torch
from rotation import some_of

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.attention_decode import WITH_LSE, cases
from forwardpass.testing import assert_equal, poisoned_outputs

F16, BF16 = torch.float16, torch.bfloat16
#: Pages that are parts of a block of keys (of 128, 112, 80 or 64), one or more blocks, or neither; head dims of every kernel; rows
#: of several tiles, more rows than keys, and sequences without any.
CASES = (
    cases.Case((300, 40, 150), 40, 64, (2, 2), page=16),
    cases.Case((300, 0, 33, 200), 130, 128, (4, 2), F16, page=32, sinks="float32"),
    cases.Case((200, 64), 64, 80, (4, 4), page=64, window=50, layout="together"),
    cases.Case((150, 140), 129, 256, (2, 1), F16, page=16, layout="apart", scale=0.3),
    cases.Case((300, 70), 65, 64, (3, 1), page=None, layout="heads first"),
    cases.Case((290, 65), 40, 128, (2, 2), page=48, alibi="batch", sinks="dtype"),
    cases.Case((90, 300), 70, 192, (2, 2), F16, page=112, value_dim=128),
    cases.Case((90, 300), 70, 192, (2, 2), page=256, window=40, layout="heads first"),
    cases.Case((600, 257), 200, 96, (2, 1), F16, page=128),
    cases.Case((300, 5), 300, 256, (1, 1), page=80, softcap=8.0, alibi="head"),
    cases.Case((257, 128), 70, 104, (6, 2), F16, page=None, layout="together"),
)


def run(operation, args, seed=0, arch="sm_90a", **options):
    """The result, and the names of the kernels. Of a GPU of one multiprocessor, where prefill is faster for many rows."""
    options = {"guard": True, "multiprocessors": 1, "counters": True, "approximate": False, **options}
    with fp.interpret(arch, seed=seed, **options) as gpu, fp.use_backend("cuda"), poisoned_outputs():
        result = operation(*args)
        return result, {re.search(r"(attention|combine)_\w+?_kernel", k.kernel)[0] for k in gpu.kernels()}


def keys_of(cache, table, b, n):
    """[1, n, Hk, D], the rows of a sequence."""
    if table is None:
        return cache[b : b + 1, :n].contiguous()
    page = cache.shape[1]
    return torch.stack([cache[table[b, i // page], i % page] for i in range(n)])[None] if n else cache[:1, :0]


@pytest.mark.every(2)
@pytest.mark.parametrize("parts", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cache_has_the_bits_of_tensors(parts, seed):
    for case in some_of(CASES, parts):
        args = case.arguments(seed=seed)
        (o, lse), kernels = run(WITH_LSE, args, seed)
        assert kernels == {"attention_wgmma_kernel"}
        cases.assert_matches((o, lse), args)
        q, k, v, _, table, *_ = args
        for b, n in enumerate(case.lengths):
            if n == 0:
                continue
            keys = [keys_of(x, table, b, n) for x in (k, v)]
            slopes = args[14] if args[14] is None or args[14].dim() == 1 else args[14][b]
            dense = (q[b : b + 1], *keys, case.scale, True, case.window, None, case.softcap)
            dense += (None, slopes, args[11], None, None, False)
            alone, _ = run(dispatch.operations["attention_with_lse"], dense)
            assert_equal(o[b : b + 1], alone[0])
            assert_equal(lse[b : b + 1], alone[1])


@pytest.mark.every(2)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_whatever_the_seed(seed, multiprocessors):
    """Of the interpreter: warps in other orders, copies that end at other times; a block has tiles of several sequences."""
    case = cases.Case((150, 0, 333), 140, 64, (2, 1), F16, page=48, sinks="float32", batch_invariant=True)
    args = case.arguments()
    result, kernels = run(WITH_LSE, args, seed, multiprocessors=multiprocessors)
    assert kernels == {"attention_wgmma_kernel"}
    cases.assert_matches(result, args)


def test_a_key_without_a_page_is_nan_where_it_is_seen():
    """And no other row is changed, of that sequence or another."""
    case = cases.Case((300, 300, 90), 150, 64, (2, 2), F16, page=16, batch_invariant=True, window=100)
    args = case.arguments()
    (right, right_lse), _ = run(WITH_LSE, args)
    table = args[4].clone()
    table[0, 13], table[1, 12] = -1, args[1].shape[0]  # keys 208 to 223, and 192 to 207
    (o, lse), _ = run(WITH_LSE, (*args[:4], table, *args[5:]))
    position = 150 + torch.arange(150)
    for b, first in ((0, 208), (1, 192)):
        sees = (position >= first) & (position - 100 <= first + 15)
        assert 0 < sees.sum() < 150
        assert o[b, sees].isnan().all() and lse[b, :, sees].isnan().all()
        assert_equal(o[b, ~sees], right[b, ~sees])
        assert_equal(lse[b, :, ~sees], right_lse[b, :, ~sees])
    assert_equal(o[2], right[2])


@pytest.mark.parametrize("length", [-1, 321])
def test_a_length_beyond_the_cache_is_nan(length):
    case = cases.Case((300, 40), 40, 128, (2, 2), page=16)
    args = case.arguments()
    room = args[4].shape[1] * 16
    (right, _), _ = run(WITH_LSE, args)
    lengths = torch.tensor([room + 1 if length > 0 else -1, 40], dtype=torch.int32)
    (o, lse), _ = run(WITH_LSE, (*args[:3], lengths, *args[4:]))
    assert o[0].isnan().all() and lse[0].isnan().all()
    assert_equal(o[1], right[1])


def test_pages_that_are_no_whole_swizzle_atoms_are_of_mma():
    """TMA's boxes are; cp.async copies rows one by one."""
    case = cases.Case((130, 90), 64, 64, (2, 2), page=24)
    args = case.arguments()
    result, kernels = run(WITH_LSE, args)
    assert kernels == {"attention_mma_kernel"}
    cases.assert_matches(result, args)
