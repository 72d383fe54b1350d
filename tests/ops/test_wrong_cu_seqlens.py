"""Packed sequences whose cu_seqlens fall, or lead beyond the tensor: on every backend the rows that this concerns are NaN, and all
others have the bits that they have without. Nobody waits for the device to see that; FORWARDPASS_DEBUG=1 does, and refuses the
call."""

import dataclasses

import pytest
import torch
from every_backend import EVERY_BACKEND, in_turn_of_triton, running
from processes import fork, two_threads
from rotation import paired

from forwardpass import dispatch
from forwardpass.ops.attention import cases
from forwardpass.testing import assert_equal

F16, BF16 = torch.float16, torch.bfloat16
MOST, LEAST = 2**31 - 1, -(2**31)
ROWS, KEYS = (0, 60, 60, 190, 200), (0, 70, 75, 210, 230)  # in order; the second sequence has no rows


@dataclasses.dataclass(frozen=True)
class Wrong:
    """The numbers that take the place of ROWS' and of KEYS', by their index, and how many sequences are known then."""

    known: int
    of_q: dict[int, int] = dataclasses.field(default_factory=dict)
    of_k: dict[int, int] = dataclasses.field(default_factory=dict)

    def __str__(self):
        return f"q {self.of_q} k {self.of_k}"

    def starts(self):
        return [torch.tensor([wrong.get(i, n) for i, n in enumerate(right)], dtype=torch.int32)
                for right, wrong in ((ROWS, self.of_q), (KEYS, self.of_k))]  # fmt: skip


WRONG = (
    Wrong(4),
    Wrong(2, {3: 59}),  # falls from 60
    Wrong(0, {2: 59}),
    Wrong(1, {2: 195}),  # the next one falls below it
    Wrong(3, {4: 201}),
    Wrong(3, {4: MOST}),
    Wrong(2, {4: 189}),
    Wrong(2, {4: LEAST}),
    Wrong(4, {4: 195}),  # rows of no sequence
    Wrong(0, {0: 1}),
    Wrong(0, {0: -1}),
    Wrong(0, {0: MOST, 1: MOST, 2: MOST, 3: MOST, 4: MOST}),
    Wrong(0, {0: 200, 1: 150, 2: 100, 3: 50, 4: 0}),
    Wrong(1, {2: 10**6, 3: 10**6, 4: 10**6}),
    Wrong(1, {}, {3: 74}),
    Wrong(3, {}, {4: 231}),
    Wrong(2, {}, {4: LEAST}),
    Wrong(0, {}, {0: 3}),
    Wrong(0, {}, {0: LEAST, 1: MOST, 2: LEAST, 3: MOST, 4: LEAST}),
    Wrong(4, {}, {4: 229}),  # a key of no sequence touches no row
    Wrong(1, {4: 201}, {3: -7}),
    Wrong(2, {4: 0}, {4: 231}),
)  # fmt: skip
OPTIONS = (
    {"causal": True},
    {"alibi": "bh", "sinks": "dtype"},
    {"window": (50, 3), "sinks": "float32"},
    {"alibi": "h", "dtype": BF16},
)


def arguments(wrong, index=0, **options):
    """The arguments with these cu_seqlens, and with those that are in order."""
    case = cases.Case((ROWS[-1], KEYS[-1]), heads=(4, 2), packed=True, batch=4, awkward=False,
                      **{**OPTIONS[index % len(OPTIONS)], **options})  # fmt: skip
    q, k, v, *others = case.arguments()
    args = q[: ROWS[-1]], k[: KEYS[-1]], v[: KEYS[-1]], *others
    names = dispatch.operations["attention"].parameters
    at = names.index("cu_seqlens_q")
    return [(*args[:at], *starts.starts(), *args[at + 2 :]) for starts in (wrong, Wrong(4))]


def with_lse(args):
    """attention_with_lse, whose results lie where memory is neither NaN nor 0."""
    q, v = args[0], args[2]
    outputs = [torch.full(shape, 7.0, dtype=dtype) for shape, dtype in
               (((*q.shape[:2], v.shape[2]), q.dtype), ((q.shape[1], q.shape[0]), torch.float32)) for _ in range(3)]  # fmt: skip
    del outputs
    return dispatch.operations["attention_with_lse"](*args)


def check(wrong, args, right):
    (o, lse), (whole, whole_lse) = with_lse(args), with_lse(right)
    last = int(wrong.starts()[0][wrong.known]) if wrong.known else 0
    assert o[last:].isnan().all() and lse[:, last:].isnan().all()
    assert o[:last].isfinite().all() and lse[:, :last].isfinite().all()
    for b in range(wrong.known):
        if not {b, b + 1} & {*wrong.of_q, *wrong.of_k}:
            rows = slice(ROWS[b], ROWS[b + 1])
            assert_equal(o[rows], whole[rows], f"o of {b}")
            assert_equal(lse[:, rows].contiguous(), whole_lse[:, rows].contiguous(), f"lse of {b}")


@pytest.mark.every(2)
@pytest.mark.parametrize(("backend", "arch"), in_turn_of_triton())
@pytest.mark.parametrize(("index", "wrong"), list(enumerate(WRONG)), ids=str)
def test_rows_that_they_concern_are_nan(index, wrong, backend, arch):
    args, right = arguments(wrong, index)
    with running(backend, arch, poisoned=False):
        check(wrong, args, right)


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)], ids=str)
def test_of_each_tile(dims, modified, arch):
    """Of each of the CUDA kernels: of one number that falls, whose sequences follow one that is known, and of rows of none."""
    options = {"softcap": 20.0} if modified else {}
    for wrong in (Wrong(2, {4: 189}), Wrong(1, {}, {3: 74}), Wrong(4, {4: 195})):
        args, right = arguments(wrong, dims=dims, **options)
        with running("cuda", arch, poisoned=False):
            check(wrong, args, right)


@pytest.mark.every(2)
@pytest.mark.parametrize(("sequences", "backend"), paired([127, 128, 129, 300], EVERY_BACKEND))
def test_of_many_sequences(sequences, backend):
    """The first wrong number is any thread's, and of either."""
    backend, arch = backend
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 * sequences, 1, 32, generator=g).half() for _ in range(3))
    right = torch.arange(sequences + 1, dtype=torch.int32) * 2
    for i, at in enumerate((1, 2, 127, sequences - 1, sequences)):
        starts = [right.clone(), right.clone()]
        starts[i % 2][at] = 10**9 if i % 3 else -1
        known = at - 1 if i % 3 else max(at - 2, 0)
        args = (q, k, v, None, True, None, None, 0.0, None, None, None, *starts, False)
        with running(backend, arch, poisoned=False):
            o, lse = with_lse(args)
        assert o[2 * known :].isnan().all() and lse[:, 2 * known :].isnan().all()
        assert o[: 2 * known].isfinite().all() and lse[:, : 2 * known].isfinite().all()


@pytest.mark.parametrize(("backend", "arch"), in_turn_of_triton())
def test_of_nothing(backend, arch):
    """No sequences, and no keys."""
    q, x = torch.randn(40, 2, 64).half(), torch.randn(0, 2, 64).half()

    def run(of_q, of_k, k):
        starts = (torch.tensor(n, dtype=torch.int32) for n in (of_q, of_k))
        return with_lse((q, k, k, None, False, None, None, 0.0, None, None, None, *starts, False))

    with running(backend, arch, poisoned=False):
        for k in (x, q):
            o, lse = run([0], [0], k)
            assert o.isnan().all() and lse.isnan().all()
        o, lse = run([0, 10, 30, 40], [0, 0, 0, 0], x)
        assert not o.any() and lse.isneginf().all()
        o, lse = run([0, 10, 30, 40], [0, 0, 0, 1], x)
        assert not o[:30].any() and lse[:, :30].isneginf().all() and o[30:].isnan().all() and lse[:, 30:].isnan().all()
        o, lse = run([0, 10, 30, 35], [0, 0, 0, 0], x)
        assert not o[:35].any() and o[35:].isnan().all() and lse[:, 35:].isnan().all()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_whatever_the_seed(backend):
    """Of the interpreter: warps in other orders, copies that end at other times, approximate results elsewhere."""
    wrong = Wrong(2, {4: 189})
    args, _ = arguments(wrong)
    for seed in range(4):
        with running(backend, "sm_90a", seed=seed, multiprocessors=2):
            o, _ = with_lse(args)
        assert o[:60].isfinite().all() and o[60:].isnan().all()


_DEBUG = """
import pytest, torch
import forwardpass as fp
from every_backend import running

def ints(*values):
    return torch.tensor(values, dtype=torch.int32)

X = torch.ones(4, 2, 64, dtype=torch.float16)
for backend, arch in (("reference", None), ("cpu", None), ("cuda", "sm_90a")):
    for of_q, of_k, words in (
        (ints(0, 1, 4), ints(0, 1, 5), "cu_seqlens_k must rise from 0 to at most 4, the rows of k, and entry 2 is 5"),
        (ints(0, 3, 2), ints(0, 1, 4), "cu_seqlens_q must rise from 0 to 4, the rows of q, and entry 2 is 2"),
        (ints(1, 3, 4), ints(0, 1, 4), "cu_seqlens_q must rise from 0 to 4, the rows of q, and entry 0 is 1"),
        (ints(0, 3, 3), ints(0, 1, 4), "cu_seqlens_q must rise from 0 to 4, the rows of q, and entry 2 is 3"),
        (ints(0, 3, 4), ints(-1, 1, 4), "entry 0 is -1"),
    ):
        for _ in range(2):
            with running(backend, arch), pytest.raises(ValueError, match=words):
                fp.ops.attention(X, X, X, cu_seqlens_q=of_q, cu_seqlens_k=of_k)
    with running(backend, arch):
        assert fp.ops.attention(X, X, X, cu_seqlens_q=ints(0, 3, 4), cu_seqlens_k=ints(0, 2, 3)).eq(1).all()
"""


@pytest.mark.every(2)
def test_debug_refuses_them():
    done = fork.run(_DEBUG, env=two_threads({"FORWARDPASS_DEBUG": "1"}))
    assert done.returncode == 0, done.stderr
