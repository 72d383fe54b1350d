"""Control flow, barriers and the scheduler: which lanes go where, in which order, and who waits for whom."""

import pytest
import torch
from rows import row

import gpuless

pytestmark = pytest.mark.interpreted

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"
# every test kernel: out[thread of the grid] = %r0
FRAME = """
.visible .entry k(.param .u64 out)
{{
  .reg .pred %p<32>;
  .reg .b32 %r<64>;
  .reg .b64 %rd<16>;
  .shared .align 16 .b8 scratch[4096];
  ld.param.u64 %rd0, [out];
  mov.u32 %r60, %tid.x;
  mov.u32 %r61, %ntid.x;
  mov.u32 %r62, %ctaid.x;
  mad.lo.u32 %r63, %r62, %r61, %r60;
  mul.wide.u32 %rd1, %r63, 4;
  add.u64 %rd0, %rd0, %rd1;
{body}
  st.global.u32 [%rd0], %r0;
  ret;
}}
"""


def run(body, threads=32, grid=1, seed=0, functions=""):
    module = gpuless.Module(HEAD + functions + FRAME.format(body=body), arch="sm_90a")
    out = torch.full((threads * grid,), -1, dtype=torch.int32)
    with gpuless.gpu("sm_90a", seed=seed):
        module["k"].launch(grid, threads, [out])
    return out


@row("bra.uni?", "ret.uni?")
def test_divergent_branches_reconverge():
    # each lane takes tid & 3 of four ways; a warp-wide vote after the join sees all 32 lanes
    out = run("""
  and.b32 %r1, %r60, 3;
  setp.eq.u32 %p0, %r1, 0;
  setp.eq.u32 %p1, %r1, 1;
  setp.lt.u32 %p2, %r1, 2;
  @!%p2 bra HIGH;
  @%p0 bra ZERO;
  mov.u32 %r2, 111;
  bra.uni JOIN;
ZERO:
  mov.u32 %r2, 100;
  bra.uni JOIN;
HIGH:
  add.u32 %r2, %r1, 200;
JOIN:
  vote.sync.ballot.b32 %r3, %p0, 0xffffffff;
  add.u32 %r0, %r2, %r3;
""")
    lane = torch.arange(32)
    ballot = sum(1 << i for i in range(0, 32, 4))
    way = torch.tensor([100, 111, 202, 203])[lane % 4]
    assert torch.equal(out, (way + ballot).to(torch.int32))


# %r2 = 65537, a matrix of ones, by an instruction that wants a whole warp
MATRIX = "mov.b32 %r3, 65537;\n  movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r3;"


def test_branches_reconverge_where_the_join_lies_before_them():
    # a rotated loop: its latch, where the branch's two ways meet, comes first
    out = run(f"""
  mov.u32 %r0, 0;
  mov.u32 %r1, 0;
  setp.lt.u32 %p0, %r60, 2;
  bra.uni BODY;
LATCH:
  add.u32 %r1, %r1, 1;
  setp.eq.u32 %p1, %r1, 3;
  @%p1 bra DONE;
BODY:
  {MATRIX}
  add.u32 %r0, %r0, %r2;
  @!%p0 bra LATCH;
  add.u32 %r0, %r0, 1;
  bra.uni LATCH;
DONE:
""")
    assert torch.equal(out, (3 * 65537 + 3 * (torch.arange(32) < 2)).to(torch.int32))


@pytest.mark.parametrize("seed", range(3))
def test_aligned_instructions_wait_for_lanes_that_may_still_come(seed):
    # lane 0 waits long for another warp, 1 and 2 for each other, before the warp's lanes meet
    out = run(f"""
  mov.u32 %r5, scratch;
  setp.eq.u32 %p0, %r60, 0;
  @%p0 mbarrier.init.shared.b64 [%r5], 1;
  bar.sync 0;
  mov.u32 %r2, 0;
  setp.ge.u32 %p1, %r60, 32;
  @%p1 bra LATE;
  setp.gt.u32 %p2, %r60, 2;
  @%p2 bra JOIN;
  @%p0 bra WAIT;
  bar.warp.sync 6;
  bra.uni JOIN;
WAIT:
  mbarrier.try_wait.parity.shared.b64 %p3, [%r5], 0;
  @!%p3 bra WAIT;
JOIN:
  {MATRIX}
  bra.uni DONE;
LATE:
  add.u32 %r2, %r2, 1;
  setp.lt.u32 %p4, %r2, 50000;
  @%p4 bra LATE;
  setp.eq.u32 %p5, %r60, 32;
  @%p5 mbarrier.arrive.shared.b64 _, [%r5];
DONE:
  mov.u32 %r0, %r2;
""", threads=64, seed=seed)  # fmt: skip
    assert torch.equal(out, torch.where(torch.arange(64) < 32, 65537, 50000).to(torch.int32))


def test_aligned_instructions_that_lanes_come_to_in_turn_are_found():
    # even lanes in even turns, odd ones in odd turns: never together, though each half comes by
    f = finding(
        f"""
  mov.u32 %r0, 0;
  mov.u32 %r1, 0;
LOOP:
  xor.b32 %r4, %r60, %r1;
  and.b32 %r4, %r4, 1;
  setp.ne.u32 %p0, %r4, 0;
  @%p0 bra NEXT;
  {MATRIX}
NEXT:
  add.u32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, 4;
  @%p1 bra LOOP;
""",
        threads=32,
    )
    assert f.kind == "barrier" and "16 are here" in f.message


def test_predicates_of_lanes_that_wait_outlive_the_halves_of_lanes_that_loop():
    # The loop is long enough for the other lanes to take turns between its instructions. A place that %h1 and a predicate
    # of theirs shared would change all lanes' predicates: two of its values are as wide as a mask.
    out = run("""
  .reg .b16 %h<4>;
  mov.u32 %r0, 0;
  mov.u32 %r1, 0;
  setp.lt.u32 %p0, %r60, 2;
LOOP:
  cvt.u16.u32 %h1, %r1;
  add.u16 %h2, %h1, 21845;
  cvt.u32.u16 %r2, %h2;
  xor.b32 %r3, %r2, %r1;
  add.u32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, 5000;
  and.pred %p2, %p1, %p0;
  @%p2 bra LOOP;
  setp.gt.u32 %p3, %r60, 4;
  setp.gt.u32 %p4, %r60, 8;
  setp.gt.u32 %p5, %r60, 12;
  setp.gt.u32 %p6, %r60, 16;
  mov.u32 %r0, %r3;
  selp.u32 %r4, 1, 0, %p3;
  selp.u32 %r5, 1, 0, %p4;
  selp.u32 %r6, 1, 0, %p5;
  selp.u32 %r7, 1, 0, %p6;
  add.u32 %r4, %r4, %r5;
  add.u32 %r4, %r4, %r6;
  add.u32 %r0, %r4, %r7;
""")
    lane = torch.arange(32)
    assert torch.equal(out, sum((lane > n).int() for n in (4, 8, 12, 16)))


@pytest.mark.parametrize("seed", range(5))
def test_loops_of_different_length(seed):
    out = run("""
  mov.u32 %r0, 0;
  mov.u32 %r1, 0;
LOOP:
  setp.ge.u32 %p0, %r1, %r60;
  @%p0 bra DONE;
  add.u32 %r1, %r1, 1;
  add.u32 %r0, %r0, %r1;
  bra.uni LOOP;
DONE:
""", threads=70, seed=seed)  # fmt: skip
    n = torch.arange(70)
    assert torch.equal(out, (n * (n + 1) // 2).to(torch.int32))


@row("brx.idx.uni?")
def test_brx_idx():
    out = run("""
  rem.u32 %r1, %r60, 3;
TABLE: .branchtargets A, B, C;
  brx.idx %r1, TABLE;
A:
  mov.u32 %r0, 10;
  bra DONE;
B:
  mov.u32 %r0, 20;
  bra DONE;
C:
  mov.u32 %r0, 30;
DONE:
""")
    assert torch.equal(out, torch.tensor([10, 20, 30], dtype=torch.int32)[torch.arange(32) % 3])


FACTORIAL = """
.func (.param .b32 result) factorial(.param .b32 n)
{
  .reg .pred %p<2>;
  .reg .b32 %r<8>;
  ld.param.u32 %r0, [n];
  setp.gt.u32 %p0, %r0, 1;
  mov.u32 %r1, 1;
  @!%p0 bra END;
  sub.u32 %r2, %r0, 1;
  {
    .param .b32 a;
    .param .b32 r;
    st.param.b32 [a], %r2;
    call.uni (r), factorial, (a);
    ld.param.b32 %r3, [r];
  }
  mul.lo.u32 %r1, %r0, %r3;
END:
  st.param.b32 [result], %r1;
  ret;
}
"""


@row("call.uni?")
def test_recursion_by_lane():
    out = run("""
  and.b32 %r1, %r60, 7;
  {
    .param .b32 a;
    .param .b32 r;
    st.param.b32 [a], %r1;
    call.uni (r), factorial, (a);
    ld.param.b32 %r0, [r];
  }
""", functions=FACTORIAL)  # fmt: skip
    factorials = torch.tensor([1, 1, 2, 6, 24, 120, 720, 5040], dtype=torch.int32)
    assert torch.equal(out, factorials[torch.arange(32) % 8])


def test_indirect_calls_go_to_each_lanes_function():
    two = """
.func (.param .b32 o) twice(.param .b32 i)
{
  .reg .b32 %r<2>;
  ld.param.u32 %r0, [i];
  add.u32 %r0, %r0, %r0;
  st.param.b32 [o], %r0;
  ret;
}
.func (.param .b32 o) negative(.param .b32 i)
{
  .reg .b32 %r<2>;
  ld.param.u32 %r0, [i];
  neg.s32 %r0, %r0;
  st.param.b32 [o], %r0;
  ret;
}
"""
    out = run("""
  mov.u64 %rd2, twice;
  mov.u64 %rd3, negative;
  and.b32 %r1, %r60, 1;
  setp.eq.u32 %p0, %r1, 0;
  selp.b64 %rd4, %rd2, %rd3, %p0;
  {
    .param .b32 a;
    .param .b32 r;
    st.param.b32 [a], %r60;
    P: .callprototype (.param .b32 _) _ (.param .b32 _);
    call (r), %rd4, (a), P;
    ld.param.b32 %r0, [r];
  }
""", functions=two)  # fmt: skip
    n = torch.arange(32)
    assert torch.equal(out, torch.where(n % 2 == 0, 2 * n, -n).to(torch.int32))


@row("exit")
def test_exit_of_some_lanes():
    out = run(
        """
  mov.u32 %r0, 5;
  setp.gt.u32 %p0, %r60, 40;
  @%p0 exit;
  bar.sync 0;
""",
        threads=64,
    )
    assert torch.equal(out, torch.where(torch.arange(64) > 40, -1, 5).to(torch.int32))


@pytest.mark.parametrize("seed", range(10))
def test_a_barrier_orders_shared_memory(seed):
    # thread t reads what thread t + 37 (mod 128) wrote, twice over the same place
    out = run(
        """
  mov.u32 %r1, scratch;
  shl.b32 %r2, %r60, 2;
  add.u32 %r3, %r1, %r2;
  add.u32 %r4, %r60, 37;
  and.b32 %r4, %r4, 127;
  shl.b32 %r4, %r4, 2;
  add.u32 %r4, %r1, %r4;
  st.shared.u32 [%r3], %r60;
  bar.sync 0;
  ld.shared.u32 %r5, [%r4];
  bar.sync 0;
  add.u32 %r6, %r60, 1000;
  st.shared.u32 [%r3], %r6;
  barrier.sync 1, 128;
  ld.shared.u32 %r7, [%r4];
  add.u32 %r0, %r5, %r7;
""",
        threads=128,
        seed=seed,
    )
    n = (torch.arange(128) + 37) % 128
    assert torch.equal(out, (2 * n + 1000).to(torch.int32))


@row("bar|barrier.cta?.sync|arrive.aligned?")
@pytest.mark.parametrize("seed", range(10))
def test_arrive_and_sync_are_a_one_way_barrier(seed):
    # warp 0 produces and goes on, warp 1 consumes
    out = run(
        """
  mov.u32 %r1, scratch;
  and.b32 %r2, %r60, 31;
  shl.b32 %r2, %r2, 2;
  add.u32 %r3, %r1, %r2;
  setp.ge.u32 %p0, %r60, 32;
  mov.u32 %r0, 7;
  @%p0 bra CONSUMER;
  st.shared.u32 [%r3], %r60;
  bar.arrive 3, 64;
  bra.uni DONE;
CONSUMER:
  bar.sync 3, 64;
  ld.shared.u32 %r0, [%r3];
DONE:
""",
        threads=64,
        seed=seed,
    )
    assert torch.equal(out, torch.cat([torch.full((32,), 7), torch.arange(32)]).to(torch.int32))


@row("bar|barrier.cta?.red.popc|and|or.aligned?.u32|pred")
@pytest.mark.parametrize(("op", "expected"), [("popc", 2 * 33), ("and", 0), ("or", 1)])
def test_barrier_reductions(op, expected):
    destination = "%r0" if op == "popc" else "%p1"
    tail = "  add.u32 %r0, %r0, %r0;" if op == "popc" else "  selp.u32 %r0, 1, 0, %p1;"
    out = run(
        f"""
  setp.lt.u32 %p0, %r60, 33;
  barrier.red.{op}.{"u32" if op == "popc" else "pred"} {destination}, 0, %p0;
{tail}
""",
        threads=96,
    )
    assert torch.equal(out, torch.full((96,), expected, dtype=torch.int32))


def finding(body, threads=64, seed=0):
    with pytest.raises(gpuless.Finding) as caught:
        run(body, threads=threads, seed=seed)
    return caught.value


def test_an_aligned_barrier_needs_the_whole_warp():
    f = finding(
        """
  and.b32 %r1, %r60, 1;
  setp.eq.u32 %p0, %r1, 0;
  mov.u32 %r0, 0;
  @%p0 bar.sync 0;
""",
        threads=32,
    )
    assert f.kind == "barrier" and "aligned" in f.message


def test_a_barrier_that_a_warp_never_reaches():
    f = finding("""
  setp.lt.u32 %p0, %r60, 32;
  mov.u32 %r0, 0;
  @%p0 bra SKIP;
  bar.sync 0, 64;
SKIP:
""")
    assert f.kind == "deadlock" and "bar.sync" in f.message


def test_counts_of_a_barrier_must_agree():
    f = finding(
        """
  setp.ge.u32 %p1, %r60, 64;
  mov.u32 %r0, 0;
  @%p1 bra DONE;
  setp.lt.u32 %p0, %r60, 32;
  @%p0 bra OTHER;
  bar.sync 1, 64;
  bra.uni DONE;
OTHER:
  bar.sync 1, 96;
DONE:
""",
        threads=96,
    )
    assert f.kind == "barrier"


@row("bar.warp.sync")
def test_bar_warp_sync_waits_for_the_lanes_of_its_mask():
    out = run("""
  setp.lt.u32 %p0, %r60, 16;
  mov.u32 %r0, 0;
  @%p0 bra LOW;
  mov.u32 %r0, 1;
  bar.warp.sync 0xffff0000;
  bra.uni DONE;
LOW:
  mov.u32 %r0, 2;
  bar.warp.sync 0x0000ffff;
DONE:
""")
    assert torch.equal(out, torch.tensor([2] * 16 + [1] * 16, dtype=torch.int32))
    f = finding(
        """
  setp.lt.u32 %p0, %r60, 16;
  mov.u32 %r0, 0;
  @%p0 exit;
  setp.lt.u32 %p1, %r60, 20;
  @%p1 bra ELSE;
  bar.warp.sync 0xffff0000;
  bra.uni DONE;
ELSE:
  bar.warp.sync 0x000f0000;
  bar.sync 0;
DONE:
  mov.u32 %r0, 1;
""",
        threads=32,
    )
    assert f.kind == "barrier" and "bar.sync 0" in f.instruction


def test_bar_warp_sync_meets_others_of_its_kind():
    out = run("""
  and.b32 %r1, %r60, 1;
  setp.eq.u32 %p0, %r1, 0;
  @%p0 bra EVEN;
  mov.u32 %r0, 1;
  bar.warp.sync 0xffffffff;
  bra.uni DONE;
EVEN:
  mov.u32 %r0, 2;
  bar.warp.sync 0xffffffff;
DONE:
""")
    assert torch.equal(out, torch.tensor([2, 1] * 16, dtype=torch.int32))


def test_a_spinning_strand_does_not_starve_its_warp():
    # lane 0 spins, at the lower address, on what lane 1 writes later
    out = run("""
  mov.u32 %r1, scratch;
  mov.u32 %r2, 0;
  setp.eq.u32 %p0, %r60, 0;
  @%p0 st.volatile.shared.u32 [%r1], %r2;
  bar.warp.sync 0xffffffff;
  @!%p0 bra WRITER;
SPIN:
  ld.volatile.shared.u32 %r3, [%r1];
  setp.eq.u32 %p1, %r3, 0;
  @%p1 bra SPIN;
  bra.uni DONE;
WRITER:
  setp.eq.u32 %p2, %r60, 1;
  mov.u32 %r3, 42;
  @%p2 st.volatile.shared.u32 [%r1], %r3;
DONE:
  mov.u32 %r0, %r3;
""")
    assert torch.equal(out, torch.full((32,), 42, dtype=torch.int32))


def test_ctas_that_wait_for_each_other_run_side_by_side():
    module = gpuless.Module(
        HEAD
        + """
.visible .entry k(.param .u64 flags)
{
  .reg .pred %p<4>;
  .reg .b32 %r<8>;
  .reg .b64 %rd<8>;
  ld.param.u64 %rd0, [flags];
  mov.u32 %r0, %ctaid.x;
  mov.u32 %r1, %nctaid.x;
  mov.u32 %r2, %tid.x;
  setp.ne.u32 %p0, %r2, 0;
  @%p0 ret;
  atom.release.gpu.global.add.u32 %r3, [%rd0], 1;
WAIT:
  ld.acquire.gpu.global.u32 %r4, [%rd0];
  setp.lt.u32 %p1, %r4, %r1;
  @%p1 bra WAIT;
  ret;
}
""",
        arch="sm_90a",
    )
    flags = torch.zeros(1, dtype=torch.int32)
    module["k"].launch(7, 32, [flags])
    assert flags.item() == 7


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("frobnicate.u32 %r0, %r1;", "frobnicate.u32"),
        ("add.wrong.u32 %r0, %r1, %r2;", "add.wrong.u32"),
        ("bra NOWHERE;", "NOWHERE"),
        ("mov.u32 %r0, %nonsense;", "%nonsense"),
        ("add.u32 %rd0, %r1, %r2;", "size"),
    ],
)
def test_what_is_unknown_is_refused_with_its_line(line, words):
    with pytest.raises(gpuless.Finding) as caught:
        run("  " + line)
    f = caught.value
    assert f.kind == "unsupported" and words in str(f) and f.ptx_line > 10
