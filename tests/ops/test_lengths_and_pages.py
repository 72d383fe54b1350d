"""Lengths, paddings and pages that are out of range, which only the device knows: on every backend the rows that they touch are
NaN, all others are what they would be without, and nothing outside of the cache is read or written."""

import dataclasses

import pytest
import torch
from every_backend import EVERY_BACKEND, in_turn_of_triton, not_in_turn, running
from rotation import in_parts

import forwardpass as fp
from forwardpass.ops.append_kv import OPERATION as APPEND_KV
from forwardpass.ops.append_kv import cases as append_cases
from forwardpass.ops.attention_decode import OPERATION as ATTENTION_DECODE
from forwardpass.ops.attention_decode import cases
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.testing import assert_equal, poisoned_outputs

F16, BF16, I8 = torch.float16, torch.bfloat16, torch.int8
#: q's dtype and the cache's; cases take them in turn
TYPES = ((F16, None), (BF16, None), (BF16, I8), (F16, E4M3))
LENGTHS = (40, 300, 33)
ROOM = 307  # of the cache: the longest and seven more, in pages of 16 a page more
ALL = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """What is out of range, and the rows of four for each of three sequences that are NaN. built: the lengths of the cache."""

    name: str
    lost: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...] = LENGTHS
    built: tuple[int, ...] = LENGTHS
    pages: tuple[tuple[int, int, int], ...] = ()  # sequence, column of the table, what is written there
    leftpad: tuple[int, ...] = ()
    page: int | None = 16
    window: int | None = None
    options: tuple[tuple[str, object], ...] = ()
    rows: int = 4  # of more than 16 the GPU has one multiprocessor, where attention's kernels run them

    def __str__(self):
        return self.name

    def arguments(self, index):
        """What is out of range, and the same with all of it in range."""
        dtype, cache = TYPES[index % len(TYPES)]
        case = cases.Case(self.built, self.rows, 64, (4, 2), dtype, cache, self.page, window=self.window, batch_invariant=True,
                          leftpad=self.leftpad, seq_lens=self.lengths, pages=self.pages, **dict(self.options))  # fmt: skip
        right = dataclasses.replace(case, leftpad=tuple(max(n, 0) for n in self.leftpad), seq_lens=(), pages=())
        return case.arguments(), right.arguments()


NONE = ((), (), ())
FIRST, SECOND, LAST = (ALL, (), ()), ((), ALL, ()), ((), (), ALL)
PAGED_ROOM = 16 * 21
WRONG = (
    Wrong("a length of one more than the pages", SECOND, (40, PAGED_ROOM + 1, 33)),
    Wrong("a length of one more than the rows", SECOND, (40, ROOM + 1, 33), page=None),
    Wrong("a length of a million", FIRST, (10**6, 300, 33)),
    Wrong("the largest length", FIRST, (2**31 - 1, 300, 33), page=None),
    Wrong("the largest length, in pages", LAST, (40, 300, 2**31 - 1)),
    Wrong("a length of -1", LAST, (40, 300, -1)),
    Wrong("the least length", LAST, (40, 300, -(2**31)), page=None),
    Wrong("all lengths", (ALL, ALL, ALL), (-1, ROOM + 1, 2**30), page=None),
    Wrong("a length beyond, with sinks", SECOND, (40, 10**6, 33), options=(("sinks", "float32"),)),
    Wrong("a length below, with sinks and a window", FIRST, (-5, 300, 33), window=9, options=(("sinks", "dtype"),)),
    Wrong("no first page", FIRST, pages=((0, 0, -1),)),
    Wrong("no last page", SECOND, pages=((1, 18, -1),)),
    Wrong("no page in the middle", SECOND, pages=((1, 7, -1),)),
    Wrong("no page in the second part", SECOND, (40, 2200, 33), (40, 2200, 33), pages=((1, 132, -1),)),
    Wrong("one page more than there are", SECOND, pages=((1, 7, 27),)),
    Wrong("the largest page", FIRST, pages=((0, 1, 2**31 - 1),)),
    Wrong("the least page", FIRST, pages=((0, 1, -(2**31)),)),
    Wrong("no pages, with sinks and a softcap", SECOND, pages=((1, 0, -1), (1, 18, 999)),
          options=(("sinks", "float32"), ("softcap", 8.0))),
    Wrong("pages of all", (ALL, ALL, ALL), pages=((0, 0, -1), (1, 18, 10**6), (2, 1, -7))),
    Wrong("no page for the last row", ((), (), (3,)), pages=((2, 2, -1),)),
    Wrong("no page for the last two rows", ((2, 3), (), ()), (34, 300, 33), pages=((0, 2, -1),)),
    Wrong("no page in the window of the first row", ((), (0,), ()), (40, 297, 33), pages=((1, 17, -1),), window=6),
    Wrong("no page of one token, between rows that see both sides", ((), (1, 2), ()), page=1, pages=((1, 297, -1),), window=1),
    Wrong("no page of one token, of a row's own", ((), (3,), ()), page=1, pages=((1, 299, 10**6),)),
    Wrong("a padding of -1", FIRST, leftpad=(-1, 0, 3)),
    Wrong("the least padding, and a window", SECOND, leftpad=(3, -(2**31), 0), window=70, page=None),
)  # fmt: skip
#: In range, at its edge: no row is NaN.
RIGHT = (
    Wrong("a length of all rows", NONE, page=None, options=(("awkward", False),)),
    Wrong("no length", NONE, (0, 300, 0), pages=((0, 0, -1), (2, 0, 99))),
    Wrong("no page behind a length", NONE, pages=((0, 3, -1), (2, 3, 10**6))),
    Wrong("no page before a window", NONE, pages=((1, 0, -1), (1, 13, -1)), window=70),
    Wrong("no page before a padding", NONE, pages=((1, 0, -1), (1, 1, 99)), leftpad=(0, 32, 0)),
    Wrong("a padding beyond a length", NONE, leftpad=(99, 0, 40), pages=((0, 0, -1),)),
)


def lost_rows(wrong):
    lost = torch.zeros(3, wrong.rows, dtype=torch.bool)
    for b, rows in enumerate(wrong.lost):
        lost[b, list(rows)] = True
    return lost


def on_backends(cases):
    """Every numbered case on each backend; of a GPU's two architectures on one, and in the slow tests on the other. Of Triton's two
    the slow tests have one whole."""
    for backend, arch in EVERY_BACKEND:
        shift = EVERY_BACKEND.index((backend, arch)) % 2
        marks = not_in_turn(arch) if backend == "triton" else ()
        yield from in_parts(enumerate(cases), 2 if arch else 1, backend, arch, shift=shift, marks=marks)


MANY = tuple(range(56))
#: The same of many rows, in attention's kernels: of 16 bits, which are every second one.
PREFILLED = (
    Wrong("a length of one more than the pages, of many rows", ((), MANY, ()), (40, PAGED_ROOM + 1, 33), rows=56),
    Wrong("a length of one more than the rows, of many", (MANY, (), ()), (ROOM + 1, 300, 33), page=None, rows=56),
    Wrong("lengths of -1 and of many rows, with sinks", ((), (), MANY), (40, 300, -1), rows=56,
          options=(("sinks", "float32"),)),
    Wrong("no page for the last of many rows", ((), MANY[52:], ()), pages=((1, 37, -1),), page=8, rows=56),
    Wrong("no page in the windows of some of many rows", ((), MANY[24:35], ()), page=1, pages=((1, 268, 10**6),), window=10,
          rows=56),
    Wrong("no first page, of many rows and a softcap", ((), (), MANY[23:]), pages=((2, 0, -1),), rows=56,
          options=(("softcap", 8.0),)),
    Wrong("no page behind many rows", NONE, pages=((0, 3, -1), (2, 3, 10**6)), rows=56),
    Wrong("no page before the windows of many rows", NONE, pages=((1, 0, -1), (1, 9, -1)), window=70, rows=56),
)  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize(("numbered", "backend", "arch"), list(on_backends((*WRONG, *RIGHT, *PREFILLED))))
def test_attention_decode(numbered, backend, arch):
    index, wrong = numbered
    index = index % 2 if wrong.rows > 4 else index
    given, args = wrong.arguments(index)
    lost = lost_rows(wrong)
    with running(backend, arch, multiprocessors=4 if wrong.rows == 4 else 1):
        got, right = ATTENTION_DECODE(*given), ATTENTION_DECODE(*args)
    assert torch.equal(got.isnan().all((-1, -2)), lost)
    assert torch.equal(got.isnan().any((-1, -2)), lost)
    untouched = [b for b in range(3) if not lost[b].any() and wrong.lengths[b] == wrong.built[b]]
    untouched = [b for b in untouched if not wrong.leftpad or wrong.leftpad[b] >= 0]
    assert untouched or wrong.lost == (ALL, ALL, ALL)
    assert_equal(got[untouched], right[untouched])
    cases.assert_matches(got, given)  # also of a sequence that has both kinds of rows


@dataclasses.dataclass(frozen=True)
class Dropped:
    """What is out of range, and which of three new tokens of each of three sequences are lost."""

    name: str
    lost: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...] = (17, 40, 2)  # of the last the first token is padding
    pages: tuple[tuple[int, int, int], ...] = ()
    page: int | None = 16

    def __str__(self):
        return self.name

    def arguments(self, index):
        dtype, cache = TYPES[index % len(TYPES)]
        case = append_cases.Case((17, 40, 2), 3, 40, 2, dtype, cache, self.page, rotary="half", q_heads=4, norm="qk")
        args = list(case.arguments())
        args[4] = torch.tensor(self.lengths, dtype=torch.int32)
        for b, column, page in self.pages:
            args[5][b, column] = page
        return tuple(args)


TOKENS = (0, 1, 2)
DROPPED = (
    Dropped("nothing", NONE),
    Dropped("a length of one more than the pages", ((), TOKENS, ()), (17, 16 * 4 + 1, 2)),
    Dropped("a length of one more than the rows", (TOKENS, (), ()), (46, 40, 2), page=None),
    Dropped("the largest length", ((), (), TOKENS), (17, 40, 2**31 - 1)),
    Dropped("a length of -1", (TOKENS, (), ()), (-1, 40, 2)),
    Dropped("the least lengths", (TOKENS, TOKENS, TOKENS), (-(2**31),) * 3, page=None),
    Dropped("no last page", ((2,), (), ()), pages=((0, 1, -1),)),
    Dropped("one page more than there are", ((), TOKENS, ()), pages=((1, 2, 8),)),
    Dropped("the largest page and the least", ((0, 1), (), (1, 2)), pages=((0, 0, 2**31 - 1), (2, 0, -(2**31)))),
    Dropped("pages that no token goes to", NONE, pages=((1, 0, -1), (1, 3, 10**6), (0, 2, -5))),
)


@pytest.mark.every(2)
@pytest.mark.parametrize(("numbered", "backend", "arch"), list(on_backends(DROPPED)))
def test_append_kv(numbered, backend, arch):
    """Of a token without a place nothing is written, and q is NaN; the rest has the bits of a call with nothing but it."""
    index, dropped = numbered
    args = dropped.arguments(index)
    want = append_cases.copied(args)
    with running(backend, arch):
        APPEND_KV(*args)
    lost = torch.zeros(3, 3, dtype=torch.bool)
    for b, tokens in enumerate(dropped.lost):
        lost[b, list(tokens)] = True
    assert torch.equal(args[11].isnan().all((-1, -2)), lost) and torch.equal(args[11].isnan().any((-1, -2)), lost)
    append_one_by_one(want, lost)
    append_cases.assert_matches(args, want)


def append_one_by_one(args, lost):
    """By the reference, each token that is not lost, as the last of a sequence."""
    k, v, k_cache, v_cache, lengths, table, k_scale, v_scale, cos, sin, q, q_out, *norms = args
    q_out.fill_(torch.nan)
    for b, t in (~lost).nonzero().tolist():
        one, token = slice(b, b + 1), slice(t, t + 1)
        caches = (x if table is not None else x[one] for x in (k_cache, v_cache))
        scales = (x if x is None or table is not None else x[one] for x in (k_scale, v_scale))
        length = (lengths[one] - (k.shape[1] - 1 - t)).clamp(min=0)
        with fp.use_backend("reference"):
            APPEND_KV(
                k[one, token], v[one, token], *caches, length, None if table is None else table[one], *scales,
                cos[one, token], sin[one, token], q[one, token], q_out[one, token], *norms,
            )  # fmt: skip


@pytest.mark.parametrize(("backend", "arch"), in_turn_of_triton())
def test_a_dropped_token_shows_in_the_next_step(backend, arch):
    """By the same lengths and table, also where append_kv returns nothing."""
    k, q = torch.randn(3, 1, 2, 64).half(), torch.randn(3, 1, 4, 64).half()
    pages = torch.randn(2, 6, 16, 2, 64).half()
    table = torch.tensor([[0, 1], [2, -1], [4, 5]], dtype=torch.int32)
    lengths = torch.tensor([33, 17, 32], dtype=torch.int32)  # no room, no page, the last row
    before = pages.clone()
    with running(backend, arch):
        assert fp.ops.append_kv(k, k, *pages, lengths, block_table=table) is None
        o = fp.ops.attention_decode(q, *pages, lengths, block_table=table)
    assert o.isnan().all((1, 2, 3)).tolist() == [True, True, False] and not o[2].isnan().any()
    written = (pages != before).any(-1).any(-1).any(0)  # [pages, rows]
    assert written.nonzero().tolist() == [[5, 15]]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_whatever_the_seed(backend):
    """Of the interpreter: warps in other orders, copies that end at other times, approximate results elsewhere."""
    wrong = Wrong("", SECOND, pages=((1, 7, -1),))
    args, _ = wrong.arguments(0)
    for seed in range(4):
        with (
            fp.use_backend(backend),
            poisoned_outputs(),
            fp.interpret("sm_90a", seed=seed, guard=True, multiprocessors=4),
        ):
            got = ATTENTION_DECODE(*args)
        assert torch.equal(got.isnan().any((-1, -2)), lost_rows(wrong))
        assert torch.equal(got.isnan().all((-1, -2)), lost_rows(wrong))
