"""shfl, vote, match, redux, elect, activemask, and what makes a thread wait or stop."""

import re

import numpy as np
import pytest
from rows import row, run

pytestmark = pytest.mark.interpreted

U32, BOOL = np.dtype(np.uint32), np.dtype(bool)
LANES = np.arange(32)


def finding(body, inputs, outputs, **options):
    import gpuless

    with pytest.raises(gpuless.Finding) as caught:
        run(body, inputs, outputs, threads=32, **options)
    return caught.value


def shfl(mode, a, b, c):
    """The ISA's pseudocode, for a full warp."""
    d, p = a.copy(), np.zeros(32, bool)
    for lane in range(32):
        value, clamp, mask = int(b[lane]) & 31, int(c[lane]) & 31, int(c[lane]) >> 8 & 31
        highest, lowest = lane & mask | clamp & ~mask, lane & mask
        j = {"up": lane - value, "down": lane + value, "bfly": lane ^ value, "idx": lowest | value & ~mask}[mode]
        p[lane] = j >= highest if mode == "up" else j <= highest
        d[lane] = a[j if p[lane] else lane]
    return d, p


@row("shfl.sync.up|down|bfly|idx.b32")
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    rng = np.random.default_rng(7)
    ours = 0 if mode == "up" else 31
    for width in (32, 16, 8, 4, 2, 1):  # as __shfl_sync makes c
        for _ in range(4):
            a, b = rng.integers(0, 2**32, (2, 32), dtype=np.uint32)
            b %= 40
            c = np.full(32, (32 - width) << 8 | ours, np.uint32)
            check_shfl(mode, a, b, c)
    for _ in range(16):  # anything goes, as long as the source lane exists
        a, b, c = rng.integers(0, 2**32, (3, 32), dtype=np.uint32)
        check_shfl(mode, a, b, c)


def check_shfl(mode, a, b, c):
    body = f"""shfl.sync.{mode}.b32 %d|%p, %a, %b, %c, 0xffffffff;
    mov.b32 %e, %a; shfl.sync.{mode}.b32 %e, %e, %b, %c, -1;"""
    result = run(body, dict(a=a, b=b, c=c), dict(d=U32, p=BOOL, e=U32), threads=32)
    d, p = shfl(mode, a, b, c)
    assert np.array_equal(result["d"], d) and np.array_equal(result["p"], p) and np.array_equal(result["e"], d)


@row("shfl.sync.up|down|bfly|idx.b32")
def test_shfl_in_groups():
    """Each half of a warp by itself, in one instruction and on two paths."""
    a = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint32)
    mask = np.where(LANES < 16, 0x0000FFFF, 0xFFFF0000).astype(np.uint32)
    body = """shfl.sync.bfly.b32 %d, %a, 5, 31, %m;
    mov.b32 %e, 0;
    setp.lt.u32 %p, %lane, 16;
    @%p bra LOW;
    shfl.sync.bfly.b32 %e, %a, 3, 31, 0xffff0000;
    bra JOIN;
    LOW: shfl.sync.bfly.b32 %e, %a, 6, 31, 0x0000ffff;
    JOIN: bar.warp.sync 0xffffffff;"""
    for seed in range(4):
        result = run(".reg .pred %p;" + body, dict(a=a, m=mask), dict(d=U32, e=U32), threads=32, seed=seed)
        assert np.array_equal(result["d"], a[LANES ^ 5])
        assert np.array_equal(result["e"], a[np.where(LANES < 16, LANES ^ 6, LANES ^ 3)])


def test_shfl_findings():
    a = np.zeros(32, np.uint32)
    outputs = dict(d=U32)
    head = ".reg .pred %p; mov.b32 %d, 0; setp.lt.u32 %p, %lane, 16;"

    def kind(body):
        found = finding(head + body, dict(a=a), outputs)
        return found.kind, str(found)

    # half of the lanes that the membermask names are predicated off
    assert_found(kind("@%p shfl.sync.bfly.b32 %d, %a, 1, 31, 0xffffffff;"), "names lane 16")
    # or are on another path
    assert_found(
        kind("@%p bra LOW; bra END; LOW: shfl.sync.bfly.b32 %d, %a, 1, 31, 0xffffffff; END: bar.sync 0;"),
        "names lane 16",
    )
    # the lower half reads the upper one, which does not take part
    assert_found(kind("@%p shfl.sync.bfly.b32 %d, %a, 16, 31, 0x0000ffff;"), "reads lane 16")
    # a lane executes it that the membermask leaves out
    assert_found(kind("shfl.sync.bfly.b32 %d, %a, 1, 31, 0x0000ffff;"), "does not name")
    # lanes disagree on who takes part
    different = "mov.b32 %a, 0xffffffff; @%p mov.b32 %a, 0x0000ffff; shfl.sync.bfly.b32 %d, %a, 0, 31, %a;"
    assert_found(kind(different), "does not name|different membermasks")
    overlapping = "mov.b32 %a, 0x0000ffff; @!%p mov.b32 %a, 0xffffffff; shfl.sync.bfly.b32 %d, %a, 0, 31, %a;"
    assert_found(kind(overlapping), "different membermasks")


def assert_found(kind_and_text, words):
    kind, text = kind_and_text
    assert kind == "barrier" and re.search(words, text), text


def test_lanes_that_have_exited():
    """A membermask may name them; they do not count."""
    body = """.reg .pred %p; setp.ge.u32 %p, %lane, 20; st.global.b32 [%at_d], 7; @%p exit;
    vote.sync.ballot.b32 %d, 1, 0xffffffff;"""
    result = run(body, dict(a=np.zeros(32, np.uint32)), dict(d=U32), threads=32)["d"]
    assert np.array_equal(result, np.where(LANES < 20, 2**20 - 1, 7))


@row("vote.sync.all|any|uni.pred", "vote.sync.ballot.b32", "vote.ballot.sync.b32")
@pytest.mark.parametrize("which", range(8))
def test_vote(which):
    rng = np.random.default_rng(which)
    a = [np.zeros(32, bool), np.ones(32, bool), LANES == 9, LANES != 9][which] if which < 4 else rng.random(32) < 0.5
    body = "".join(
        f"vote.sync.{m}.pred %{m}, %a, -1; vote.sync.{m}.pred %n{m}, !%a, -1;" for m in ("all", "any", "uni")
    )
    body += "vote.sync.ballot.b32 %d, %a, -1; vote.ballot.sync.b32 %e, !%a, -1;"
    outputs = {**dict.fromkeys(["all", "any", "uni", "nall", "nany", "nuni"], BOOL), "d": U32, "e": U32}
    result = run(body, dict(a=a), outputs, threads=32)
    uniform = a.all() or not a.any()
    expected = {
        "all": a.all(),
        "any": a.any(),
        "uni": uniform,
        "nall": not a.any(),
        "nany": not a.all(),
        "nuni": uniform,
    }
    for name, e in expected.items():
        assert np.all(result[name] == e), name
    ballot = sum(1 << i for i in range(32) if a[i])
    assert np.all(result["d"] == ballot) and np.all(result["e"] == 2**32 - 1 - ballot)


@row("vote.sync.ballot.b32", "activemask.b32")
def test_parts_of_a_warp():
    a = np.random.default_rng(0).random(32) < 0.5
    body = """.reg .pred %p; mov.b32 %d, 0; mov.b32 %e, 0; and.b32 %f, %lane, 4; setp.ne.b32 %p, %f, 0;
    @%p vote.sync.ballot.b32 %d, %a, 0xf0f0f0f0; @%p activemask.b32 %e; activemask.b32 %f;"""
    result = run(body, dict(a=a), dict(d=U32, e=U32, f=U32), threads=32)
    named = LANES & 4 != 0
    assert np.array_equal(result["d"], np.where(named, sum(1 << i for i in range(32) if a[i] and named[i]), 0))
    assert np.array_equal(result["e"], np.where(named, 0xF0F0F0F0, 0)) and np.all(result["f"] == 2**32 - 1)


@row("match.any|all.sync.b32|b64")
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("distinct", [1, 2, 5, 40])
def test_match(size, distinct):
    rng = np.random.default_rng(distinct)
    # 64-bit values that differ in their upper halves only
    a = (rng.integers(0, distinct, 32).astype(f"u{size // 8}") << (size - 8)) | 3
    body = (
        f"match.any.sync.b{size} %d, %a, -1; match.all.sync.b{size} %e|%p, %a, -1; match.all.sync.b{size} %f, %a, -1;"
    )
    result = run(body, dict(a=a), dict(d=U32, e=U32, p=BOOL, f=U32), threads=32)
    any_of = [sum(1 << k for k in range(32) if a[k] == x) for x in a]
    all_same = len(set(a.tolist())) == 1
    assert result["d"].tolist() == any_of
    assert np.all(result["e"] == (2**32 - 1 if all_same else 0)) and np.all(result["p"] == all_same)
    assert np.array_equal(result["e"], result["f"])


@row(
    "redux.sync.add.u32|s32", "redux.sync.min.u32", "redux.sync.min.s32", "redux.sync.max.u32", "redux.sync.max.s32",
    "redux.sync.and.b32", "redux.sync.or.b32", "redux.sync.xor.b32",
)  # fmt: skip
@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0F0F1234])
def test_redux(mask):
    a = np.random.default_rng(mask).integers(0, 2**32, 32, dtype=np.uint32)
    inside = np.array([mask >> i & 1 for i in range(32)], bool)
    x, signed = a[inside], a[inside].view(np.int32)
    expected = {
        "add.u32": x.sum(dtype=np.uint32), "add.s32": x.sum(dtype=np.uint32), "min.u32": x.min(), "max.u32": x.max(),
        "min.s32": signed.min(), "max.s32": signed.max(), "and.b32": np.bitwise_and.reduce(x),
        "or.b32": np.bitwise_or.reduce(x), "xor.b32": np.bitwise_xor.reduce(x),
    }  # fmt: skip
    names = {op: "d" + op.replace(".", "") for op in expected}
    body = f".reg .pred %p; shr.u32 %lane, {mask}, %lane; and.b32 %lane, %lane, 1; setp.ne.b32 %p, %lane, 0;"
    body += "".join(f"mov.b32 %{n}, 9; @%p redux.sync.{op} %{n}, %a, {mask};" for op, n in names.items())
    result = run(body, dict(a=a), dict.fromkeys(names.values(), U32), threads=32)
    for op, e in expected.items():
        assert np.array_equal(result[names[op]], np.where(inside, e.view(np.uint32), 9)), op


@row("elect.sync")
def test_elect():
    body = """.reg .pred %q; setp.ge.u32 %q, %lane, 3; mov.b32 %e, 99; mov.pred %r, 0;
    elect.sync %d|%p, 0xffffffff; @%q elect.sync %e|%r, 0xfffffff8; elect.sync _|%s, -1;"""
    result = run(body, dict(a=np.zeros(32, np.uint32)), dict(d=U32, p=BOOL, e=U32, r=BOOL, s=BOOL), threads=32)
    assert (
        np.all(result["d"] == 0) and np.array_equal(result["p"], LANES == 0) and np.array_equal(result["s"], LANES == 0)
    )
    assert np.array_equal(result["e"], np.where(LANES >= 3, 3, 99)) and np.array_equal(result["r"], LANES == 3)


@row("nanosleep.u32", "pmevent.mask?")
def test_nothing_much():
    a = np.arange(32, dtype=np.uint32)
    result = run(
        "nanosleep.u32 100; nanosleep.u32 %a; pmevent 3; pmevent.mask 5; mov.b32 %d, %a;", dict(a=a), dict(d=U32)
    )
    assert np.array_equal(result["d"], a)


@row("trap", "brkpt")
@pytest.mark.parametrize(("op", "word"), [("trap", "trap"), ("brkpt", "breakpoint")])
def test_stops(op, word):
    body = f".reg .pred %p; setp.eq.u32 %p, %lane, 5; mov.b32 %d, 0; @%p {op};"
    found = finding(body, dict(a=np.zeros(32, np.uint32)), dict(d=U32))
    assert found.kind == "illegal" and word in str(found) and found.lane == 5
