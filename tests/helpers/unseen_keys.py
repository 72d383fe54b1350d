"""Keys and values that a row does not see change no bit of it on a CPU, NaN and infinite ones too. A NaN reaches all rows that see
it."""

from __future__ import annotations

import itertools

import torch
from processes import by_threads

import forwardpass as fp
from forwardpass.dispatch import operations
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.decoder_layer import cases as decoder_cases
from forwardpass.testing import poisoned_outputs

VALUES = (torch.nan, torch.inf, -torch.inf)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def band(rows, keys, left=None, right=0):
    """[rows, keys]: which keys a row sees, the last row being at the last key."""
    distance = torch.arange(keys) - torch.arange(keys - rows, keys)[:, None]
    return (distance >= -(keys if left is None else left)) & (distance <= right)


def check(run, operands, at, key, sees, value, label):
    """Of operands [1, tokens, heads, columns], or scales without columns, number `at` gets a value at a key of the last head.

    sees: [rows], which of them see it.
    """
    clean = run(*operands)
    spoiled = [x.clone() for x in operands]
    spoiled[at][0, key, -1, ...] = value
    got = run(*spoiled)
    assert torch.equal(got[:, ~sees], clean[:, ~sees]), label
    if value != value:
        assert got[0, sees, -1].isnan().any(-1).all(), label


def attention(dtypes=FLOATS):
    """Blocks of 256 keys, tiles of rows: by the order of keys, windows, masks of both kinds."""
    rows = keys = 270
    mask = torch.rand(rows, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    forms = (
        (band(rows, keys), {"causal": True}),
        (band(rows, keys, 40, 3), {"window": (40, 3)}),
        (mask, {"mask": mask}),
        (mask, {"mask": torch.where(mask, 0.5, -torch.inf)}),
    )
    for dtype, (sees, options) in itertools.product(dtypes, forms):
        g = torch.Generator().manual_seed(0)
        operands = [torch.randn(1, rows, heads, 48, generator=g).to(dtype) for heads in (2, 1, 1)]

        def run(q, k, v):
            with fp.use_backend("cpu"), poisoned_outputs():
                return fp.ops.attention(q, k, v, **options)  # noqa: B023

        values = itertools.cycle(VALUES)
        for at, key in itertools.product((1, 2), (0, 133, 260)):
            check(run, operands, at, key, sees[:, key], value := next(values), (dtype, options, at, key, value))


def attention_decode():
    """Rows that are computed together, which see tiles of 64 keys in part; a NaN of an 8-bit cache's scale."""
    rows, keys = 7, 200
    for q_dtype, cache in ((torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.int8),
                           (torch.float32, torch.int8), (torch.bfloat16, E4M3)):  # fmt: skip
        g = torch.Generator().manual_seed(0)
        q = torch.randn(1, rows, 2, 40, generator=g).to(q_dtype)
        caches = [(torch.randn(1, keys, 1, 40, generator=g) * (1 if cache is None else 40)) for _ in range(2)]
        caches = [x.to(q_dtype) if cache is None else x.clamp(-127, 127).to(cache) for x in caches]
        scales = [torch.rand(1, keys, 1, generator=g) / 40 for _ in range(2 if cache else 0)]

        def run(q, k, v, *scales, window=None):
            pairs = dict(zip(("k_scale", "v_scale"), scales))
            with fp.use_backend("cpu"), poisoned_outputs():
                lens = torch.tensor([keys], dtype=torch.int32)
                return fp.ops.attention_decode(q, k, v, lens, window=window, **pairs)

        first = 1 if cache is None else 3
        for window, at, key in itertools.product((None, (70, 0)), (first, first + 1), (196, 130, keys - 1)):
            sees = band(rows, keys, window and window[0])[:, key]
            value = torch.nan if cache else VALUES[key % 3]
            label = (q_dtype, cache, window, at, key)
            check(lambda *x: run(*x, window=window), [q, *caches, *scales], at, key, sees, value, label)  # noqa: B023


def decoder_layer():
    """Prompts and steps of several tokens, padding on the left: in each row of x in turn, and by all numbers of threads."""
    sizes = (64, 4, 2, 16, 96)
    for case in (
        decoder_cases.Case((70,), 70, *sizes, layers=2, leftpad=True),
        decoder_cases.Case((40, 45), 40, *sizes, layers=2, dtype=torch.bfloat16, leftpad=True),
        decoder_cases.Case((70,), 5, *sizes, layers=2, scales="row"),
        decoder_cases.Case((50,), 50, 40, 2, 2, 20, 48, layers=2),
    ):
        args = case.arguments()

        def run(x):
            changed = decoder_cases.copied((x, *args[1:]))  # noqa: B023
            with poisoned_outputs():
                return operations["decoder_layer"].runs["cpu"](*changed)

        clean, place = run(args[0]), torch.arange(case.tokens)
        padding = 1 if case.leftpad else 0
        for row, value in zip((0, 3, case.tokens // 2, case.tokens - 1), itertools.cycle(VALUES)):
            x = args[0].clone()
            x[0, row, 5] = value
            sees = (place >= row) if row >= padding else place == row
            for got in by_threads(lambda: run(x)):  # noqa: B023
                assert torch.equal(got[0, ~sees], clean[0, ~sees]) and torch.equal(got[1:], clean[1:]), (case, row)
                assert got[0, sees].isnan().all(), (case, row)
