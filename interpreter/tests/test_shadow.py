"""Races, initialisation and flight, as far as loads, stores and atomics go: each finding, and what must raise none.

A block of two warps and more. Whatever is unordered is so in every schedule, but the message depends on who came first.
"""

import re

import pytest
import torch
from ptx import integers, kernel
from shadow_launches import SEEDS, WARPS, always, launch, silent

import gpuless

pytestmark = pytest.mark.interpreted


INITIALISE = "shl.b32 %r9, %t, 2;\nadd.u32 %r9, %r9, %s;\nst.shared.u32 [%r9], 0;\nbar.sync 0;\n"


# ---- Shared memory: what is not ordered ----


def test_write_after_write():
    f = always("race", "mov.u32 %r2, %s;\nst.shared.u32 [%r2], %r0;")
    assert re.match(r"write by warp [01] at PTX line \d+, then write by warp [01] at PTX line \d+ of shared", f.message)
    assert "nothing orders the two" in f.message and f.other_ptx_line == f.ptx_line and not f.within_warp
    assert "PTX line" in f.message and f.warp in (0, 1)


def test_write_of_what_is_there():
    """Triton has each warp that holds a copy of a value store it."""
    silent("st.shared.u32 [%s], 7;")
    silent("st.shared.v4.u32 [%s], {7, 8, 9, 10};\nst.shared.u8 [%s+4], 8;")
    always("race", "st.shared.v2.u32 [%s], {7, %r0};")  # the second word differs
    always(
        "race", "@%p0 st.shared.u32 [%s], 7;\n@%p1 st.shared.u32 [%s], 7;\nld.shared.u32 %r2, [%s];"
    )  # but not after a read


def test_read_after_write():
    f = always("race", INITIALISE + "@%p0 st.shared.u32 [%s], 1;\n@%p1 ld.shared.u32 %r2, [%s];")
    assert "nothing orders the two" in f.message and f.other_ptx_line


def test_write_after_read():
    body = INITIALISE + "@%p1 ld.shared.u32 %r2, [%s];\n@%p0 st.shared.u32 [%s], 1;"
    messages = [f.message for f in launch(body)]
    assert any(re.match("read by warp 1 at .*, then write by warp 0 at", m) for m in messages), messages
    # either of the two may come first; which, the seed says alone, whatever was launched before
    assert len(set(messages)) == 2
    assert [f.message for f in launch(body)] == messages


def test_a_barrier_orders():
    silent(
        "@%p0 st.shared.u32 [%s], 1;\nbar.sync 0;\nld.shared.u32 %r2, [%s];\nbar.sync 0;\n@%p1 st.shared.u32 [%s], 2;"
    )


def test_a_barrier_of_others_does_not():
    # warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2
    body = """@%p0 st.shared.u32 [%s], 1;
    shr.u32 %r2, %t, 6;
    add.u32 %r2, %r2, 1;
    bar.sync %r2, 64;
    setp.eq.u32 %p2, %r0, {};
    @%p2 ld.shared.u32 %r3, [%s];"""
    silent(body.format(1), block=128)
    always("race uninitialised", body.format(2), block=128)


def test_reuse_of_a_buffer_between_barriers():
    silent("""mov.u32 %r5, 0;
    mad.lo.u32 %r2, %t, 16, %s;
    xor.b32 %r3, %t, 32;
    mad.lo.u32 %r3, %r3, 16, %s;
    LOOP:
    st.shared.v4.u32 [%r2], {%r5, %r5, %r5, %r5};
    bar.sync 0;
    ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r3];
    bar.sync 0;
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p2, %r5, 20;
    @%p2 bra LOOP;""")  # fmt: skip


def test_reuse_of_a_buffer_without_the_second_barrier():
    found = launch("""mov.u32 %r5, 0;
    mad.lo.u32 %r2, %t, 16, %s;
    xor.b32 %r3, %t, 32;
    mad.lo.u32 %r3, %r3, 16, %s;
    LOOP:
    st.shared.v4.u32 [%r2], {%r5, %r5, %r5, %r5};
    bar.sync 0;
    ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r3];
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p2, %r5, 20;
    @%p2 bra LOOP;""")  # fmt: skip
    assert len(found) == len(SEEDS) and {f.kind for f in found} == {"race"}


# ---- Shared memory: neighbours ----


@pytest.mark.parametrize(("kind", "size", "r"), [("u8", 1, "h"), ("u16", 2, "h"), ("u32", 4, "r"), ("u64", 8, "rd")])
@pytest.mark.parametrize("warps", [2, 4, 16])
def test_warps_write_to_neighbouring_parts_of_one_granule(kind, size, r, warps):
    # lane l of warp w touches part l * warps + w: whole first by all, so that the granules split while they are in use
    body = f"""mad.lo.u32 %r2, %t, 16, %s;
    st.shared.v4.u32 [%r2], {{%r0, %r0, %r0, %r0}};
    bar.sync 0;
    mad.lo.u32 %r3, %r1, {warps}, %r0;
    mad.lo.u32 %r3, %r3, {size}, %s;
    mov.b{max(16, size * 8)} %{r}5, 1;
    st.shared.{kind} [%r3], %{r}5;
    ld.shared.{kind} %{r}6, [%r3];
    bar.sync 0;
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r2];
    bar.sync 0;
    st.shared.v4.u32 [%r2], {{%r0, %r0, %r0, %r0}};
    st.shared.{kind} [%r2], %{r}5;"""
    silent(body, block=warps * 32, shared=8192)


@pytest.mark.parametrize(("kind", "size", "r"), [("u8", 1, "h"), ("u16", 2, "h"), ("u32", 4, "r")])
def test_one_part_of_a_granule_is_enough_for_a_race(kind, size, r):
    # warp 1 writes its own part, and one byte or word of warp 0's
    body = f"""mul.lo.u32 %r3, %r0, {size};
    add.u32 %r3, %s, %r3;
    add.u32 %r5, %r0, 1;
    cvt.u16.u32 %h5, %r5;
    st.shared.{kind} [%r3], %{r}5;
    @%p1 st.shared.{kind} [%s], %{r}5;"""
    f = always("race", body)
    assert f"shared 0x0..{size:#x}" in f.message


def test_a_read_of_one_word_and_a_write_to_the_next():
    silent("""@%p0 st.shared.v4.u32 [%s], {%r0, %r0, %r0, %r0};
    bar.sync 0;
    @%p0 ld.shared.u32 %r2, [%s];
    @%p1 st.shared.u32 [%s+4], 5;
    @%p1 ld.shared.u16 %h1, [%s+8];
    @%p0 st.shared.u16 [%s+10], %h1;""")  # fmt: skip


# ---- Shared memory: initialisation ----


@pytest.mark.parametrize("read", ["ld.shared.u8 %h1, [%s+15];\nst.global.u8 [%a0], %h1;",
                                  "ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%s];\nst.global.u32 [%a0], %r5;",
                                  "atom.shared.add.u32 %r2, [%s+12], 1;", "ld.volatile.shared.u32 %r2, [%s+12];"])  # fmt: skip
def test_uninitialised(read):
    f = always(
        "uninitialised",
        f"@%p1 ret;\nst.shared.v2.u32 [%s], {{%r0, %r0}};\nst.shared.u32 [%s+8], %r0;\n{read}",
        integers(1),
    )
    assert "nothing has written" in f.message and f.address in (12, 15)


def test_what_the_block_before_wrote_is_not_written():
    # every block checks its own; the first one writes
    body = """mov.u32 %r2, %ctaid.x;
    setp.eq.u32 %p2, %r2, 0;
    @%p2 st.shared.u32 [%s], 1;
    ld.shared.u32 %r3, [%s];
    @!%p2 red.global.add.u32 [%a0], %r3;"""
    f = always("uninitialised", body, integers(1), grid=6, block=32)
    assert f.block[0] == 1


# ---- Shared memory: strong accesses ----


def test_atomics_meet_atomics():
    silent(INITIALISE + "atom.shared.add.u32 %r2, [%s], 1;\nred.shared.add.u32 [%s], 1;")


def test_atomics_do_not_excuse_plain_accesses():
    found = launch(INITIALISE + "@%p0 st.shared.u32 [%s], 1;\n@%p1 atom.shared.add.u32 %r2, [%s], 1;")
    assert len(found) == len(SEEDS) and {f.kind for f in found} == {"race"}
    found = launch(INITIALISE + "@%p0 ld.shared.u32 %r3, [%s];\n@%p1 atom.shared.add.u32 %r2, [%s], 1;")
    assert len(found) == len(SEEDS) and {f.kind for f in found} == {"race"}


def test_a_flag_in_shared_memory_orders():
    silent(INITIALISE + """@%p1 bra WAIT;
    st.shared.u32 [%s+64], 42;
    st.release.cta.shared.u32 [%s], 1;
    bra DONE;
    WAIT:
    ld.acquire.cta.shared.u32 %r2, [%s];
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra WAIT;
    ld.shared.u32 %r3, [%s+64];
    DONE:""")  # fmt: skip


# ---- Global memory within a launch ----


def memory(n=1024):
    return torch.zeros(n, dtype=torch.int32)


def test_two_warps_write_the_same_global_word():
    f = always("race", "st.global.u32 [%a0], %r0;", memory())
    assert re.match(
        r"write by warp [01] of this block at PTX line \d+, then write by warp [01] at PTX line \d+", f.message
    )
    assert "argument 0" in f.message and f.other_ptx_line == f.ptx_line
    silent("@%p0 st.global.u32 [%a0], %r0;\nbar.sync 0;\n@%p1 st.global.u32 [%a0], %r0;", memory())


def test_a_warp_reads_what_another_wrote():
    found = launch("@%p0 st.global.u32 [%a0], %r0;\n@%p1 ld.global.u32 %r2, [%a0];", memory())
    assert found and {f.kind for f in found} == {"race"}  # the read first leaves no trace
    silent("@%p0 st.global.u32 [%a0], %r0;\nbar.sync 0;\n@%p1 ld.global.u32 %r2, [%a0];", memory())


def test_tritons_warps_may_load_what_their_twin_stored():
    x = memory()
    load, store = "ld.global.u32 %r2, [%a0];\n", "st.global.u32 [%a0], %r2;"
    for body, wanted in ((load + "@%p0 " + store, None), (load + store, "race")):
        found = set()
        for seed in SEEDS:
            text = "// Generated by LLVM NVPTX Back-End\n" + kernel(WARPS + body, (x,), block=64)
            with gpuless.gpu("sm_90a", seed=seed):
                try:
                    gpuless.Module(text)["k"].launch(1, 64, (x,))
                    found.add(None)
                except gpuless.Finding as f:
                    found.add(f.kind)
        assert found == {wanted}


@pytest.mark.parametrize(("kind", "size", "r"), [("u8", 1, "h"), ("u16", 2, "h"), ("u32", 4, "r")])
def test_blocks_write_to_neighbouring_bytes(kind, size, r):
    body = f"""mov.u32 %r2, %ctaid.x;
    mad.lo.u32 %r2, %r2, 64, %t;
    mad.lo.u32 %r2, %r2, {size}, 3;
    and.b32 %r3, %r2, {~(size - 1)};
    cvt.u64.u32 %rd1, %r3;
    add.u64 %rd1, %a0, %rd1;
    mov.b16 %h5, 1;
    mov.b32 %r5, 1;
    st.global.{kind} [%rd1], %{r}5;
    ld.global.{kind} %{r}6, [%rd1];"""
    silent(body, memory(), grid=8)


def test_two_blocks_write_the_same_byte():
    f = always("race", "mov.b16 %h5, 1;\n@%p1 ret;\nst.global.u8 [%a0+7], %h5;", memory(), grid=8)
    assert re.match(r"write by warp 0 of block \([0-7], 0, 0\) at", f.message) and "byte 7 of argument 0" in f.message


def test_a_block_reads_what_another_wrote():
    body = """mov.u32 %r2, %ctaid.x;
    setp.eq.u32 %p2, %r2, 0;
    @%p2 st.global.u32 [%a0], 1;
    @%p2 ret;
    {}
    ld.global.u32 %r3, [%a0];"""
    assert {f.kind for f in launch(body.format(""), memory(), grid=8, block=32)} == {"race"}
    assert {f.kind for f in launch(body.format("membar.gl;"), memory(), grid=8, block=32)} == {"race"}


def test_read_only_loads_of_what_the_launch_wrote():
    f = always("race", "@%p1 ret;\nst.global.u32 [%a0], 1;\nmembar.gl;\nld.global.nc.u32 %r2, [%a0];", memory())
    assert ".nc" in f.message
    silent("@%p1 ret;\nst.global.u32 [%a0], 1;\nmembar.gl;\nld.global.nc.u32 %r2, [%a0+4];", memory())


def test_the_last_block_adds_up_what_the_others_wrote():
    x, counter, y = memory(), memory(4), memory(4)
    body = """mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd1, %r2, 4;
    add.u64 %rd1, %a0, %rd1;
    setp.ne.u32 %p2, %t, 0;
    @%p2 ret;
    add.u32 %r3, %r2, 1;
    st.global.u32 [%rd1], %r3;
    membar.gl;
    atom.global.inc.u32 %r4, [%a1], 7;
    setp.ne.u32 %p3, %r4, 7;
    @%p3 ret;
    membar.gl;
    ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%a0];
    ld.global.v4.u32 {%r9, %r10, %r11, %r12}, [%a0+16];
    add.u32 %r5, %r5, %r6;
    add.u32 %r7, %r7, %r8;
    add.u32 %r9, %r9, %r10;
    add.u32 %r11, %r11, %r12;
    add.u32 %r5, %r5, %r7;
    add.u32 %r9, %r9, %r11;
    add.u32 %r5, %r5, %r9;
    st.global.u32 [%a2], %r5;"""
    silent(body, x, counter, y, grid=8)
    assert y[0] == 36


# ---- Global memory between the blocks of a launch ----

# Each of 8 blocks stores its row of 64, thread 0 counts the block, and the last block reads all rows.
STORE = """mov.u32 %r2, %ctaid.x;
mad.lo.u32 %r2, %r2, 64, %t;
mad.wide.u32 %rd1, %r2, 4, %a0;
st.global.u32 [%rd1], %r2;
"""
BARRIER = "bar.sync 0;\n"
COUNT = """setp.eq.u32 %p2, %t, 0;
@%p2 atom.acq_rel.gpu.global.add.u32 %r4, [%a1], 1;
@%p2 st.shared.u32 [%s], %r4;
"""
COUNT_RELAXED = COUNT.replace("acq_rel", "relaxed")
FENCE = "fence.acq_rel.gpu;\n"
EXIT_BUT_LAST = """ld.shared.u32 %r4, [%s];
setp.ne.u32 %p3, %r4, 7;
@%p3 ret;
"""
READ_ALL = """mul.wide.u32 %rd2, %t, 4;
add.u64 %rd2, %a0, %rd2;
mov.u32 %r5, 0;
mov.u32 %r6, 0;
NEXT:
ld.global.u32 %r7, [%rd2];
add.u32 %r6, %r6, %r7;
add.u64 %rd2, %rd2, 256;
add.u32 %r5, %r5, 1;
setp.lt.u32 %p4, %r5, 8;
@%p4 bra NEXT;
mad.wide.u32 %rd3, %t, 4, %a2;
st.global.u32 [%rd3], %r6;
"""
OTHERS = "@%p0 red.release.gpu.global.add.u32 [%a1+4], 1;\n"  # releases that nobody waits for


def rows_are_read(*parts):
    """Of a kernel made of these: the findings; the sums are right where there was none."""
    found = []
    for seed in SEEDS:
        y = memory(64)
        found += launch("".join(parts), memory(), memory(4), y, grid=8, seeds=[seed])
        assert found or torch.equal(y, sum(64 * b + torch.arange(64, dtype=torch.int32) for b in range(8)))
    return found


@pytest.mark.parametrize("releases", [0, 1, 63, 64, 65, 300])  # 64 are kept apart
def test_the_last_block_reads_what_a_barrier_put_before_the_atomics(releases):
    others = OTHERS * releases
    for count in ((BARRIER, COUNT), (BARRIER, FENCE, COUNT_RELAXED), (FENCE, BARRIER, COUNT_RELAXED)):
        parts = (others, STORE, others, *count, others, BARRIER, others, EXIT_BUT_LAST, READ_ALL)
        found = rows_are_read(*parts)
        assert not found, found[0]


@pytest.mark.parametrize("before", [1, 2])
def test_releases_since_the_one_that_was_acquired(before):
    """Block 0 goes on releasing while block 1, on another thread, has acquired and counts to a million: of the releases of
    long ago two and two have become one, which covers what either did."""
    y = memory(64)
    body = f"""mov.u32 %r2, %ctaid.x;
    setp.ne.u32 %p2, %r2, 0;
    mul.wide.u32 %rd1, %t, 4;
    add.u64 %rd2, %a0, %rd1;
    @%p2 bra reader;
    {OTHERS * before}
    st.global.u32 [%rd2], %t;
    bar.sync 0;
    @%p0 st.release.gpu.global.u32 [%a1], 1;
    acknowledged:
    ld.acquire.gpu.global.u32 %r4, [%a1+128];
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra acknowledged;
    {OTHERS * 200}
    ret;
    reader:
    ld.acquire.gpu.global.u32 %r4, [%a1];
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra reader;
    bar.sync 0;
    @%p0 st.release.gpu.global.u32 [%a1+128], 1;
    mov.u32 %r5, 0;
    meanwhile:
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p4, %r5, 1000000;
    @%p4 bra meanwhile;
    ld.global.u32 %r6, [%rd2];
    add.u64 %rd3, %a2, %rd1;
    st.global.u32 [%rd3], %r6;"""
    silent(body, memory(), memory(64), y, grid=2, seeds=[0])
    assert y.tolist() == list(range(64))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        pytest.param((STORE, COUNT, BARRIER, EXIT_BUT_LAST, READ_ALL), "a fence is due", id="no barrier before"),
        pytest.param((COUNT, STORE, BARRIER, EXIT_BUT_LAST, READ_ALL), "a fence is due", id="released too early"),
        pytest.param((STORE, BARRIER, READ_ALL, COUNT, BARRIER, EXIT_BUT_LAST), "nothing orders", id="read too early"),
        pytest.param((STORE, BARRIER, FENCE, READ_ALL), "nothing orders", id="a fence alone"),
        pytest.param(
            (STORE, BARRIER, COUNT_RELAXED, BARRIER, EXIT_BUT_LAST, READ_ALL), "nothing orders", id="no fence before"
        ),
        pytest.param(
            (FENCE, STORE, BARRIER, COUNT_RELAXED, BARRIER, EXIT_BUT_LAST, READ_ALL),
            "a fence is due",
            id="fenced too early",
        ),
        pytest.param(
            (STORE, BARRIER, "@%p0 atom.acq_rel.gpu.global.add.u32 %r4, [%a1], 1;\n", READ_ALL),
            "nothing orders",
            id="one warp acquires",
        ),
    ],
)
def test_the_last_block_reads_what_was_not_released(parts, words):
    found = rows_are_read(*parts)
    assert len(found) == len(SEEDS) and {f.kind for f in found} == {"race"}
    assert any(words in f.message and re.match(r"write by warp \d of block", f.message) for f in found), [
        f.message for f in found
    ]


# ---- Global memory between launches ----

WRITE = "@%p1 ret;\nst.global.u32 [%a0], 1;"
READ = "ld.global.u32 %r2, [%a0];\n"


def pair(first, second, *args, programmatic=True, between=lambda: None):
    with gpuless.gpu("sm_90a"):
        a, b = (gpuless.Module(kernel(WARPS + body, args, block=64)) for body in (first, second))
        a["k"].launch(1, 64, args)
        between()
        b["k"].launch(1, 64, args, programmatic=programmatic)


def test_a_programmatic_launch_waits_before_it_reads():
    x = memory()
    with pytest.raises(gpuless.Finding, match=r"missing griddepcontrol\.wait") as caught:
        pair(WRITE, READ, x)
    assert caught.value.kind == "race" and caught.value.address == x.data_ptr()
    with pytest.raises(gpuless.Finding, match=r"missing griddepcontrol\.wait"):
        pair(WRITE, READ + "griddepcontrol.wait;", x)
    with pytest.raises(gpuless.Finding, match=r"missing griddepcontrol\.wait"):
        pair(WRITE, "@%p1 ret;\nst.global.u32 [%a0], 5;", x)
    pair(WRITE, "griddepcontrol.wait;\n" + READ, x)
    pair(WRITE, "griddepcontrol.wait;\n@%p1 ret;\nst.global.u32 [%a0], 5;", x)
    pair(WRITE, "ld.global.u32 %r2, [%a0+4];", x)
    pair(WRITE, READ, x, programmatic=False)


def test_a_programmatic_launch_reads_by_nc_what_nobody_writes():
    """Waiting is not enough: the launch may have begun before the one before it wrote."""
    x, nc = memory(), READ.replace(".global", ".global.nc")
    for body in (nc, "griddepcontrol.wait;\n" + nc):
        with pytest.raises(gpuless.Finding, match=r"\.nc is for data that does not change") as caught:
            pair(WRITE, body, x)
        assert caught.value.kind == "race" and caught.value.address == x.data_ptr()
    pair(WRITE, "griddepcontrol.wait;\nld.global.nc.u32 %r2, [%a0+4];", x)
    pair(WRITE, nc, x, programmatic=False)


def test_a_barrier_passes_the_wait_on():
    x = memory()
    pair(WRITE, "@%p0 griddepcontrol.wait;\nbar.sync 0;\n" + READ, x)
    with pytest.raises(gpuless.Finding, match=r"missing griddepcontrol\.wait"):
        pair(WRITE, "@%p0 griddepcontrol.wait;\n" + READ, x)


def test_what_came_before_an_ordinary_launch_is_over():
    x, y = memory(), memory()
    with gpuless.gpu("sm_90a"):
        texts = [kernel(WARPS + body, (x, y), block=64) for body in (WRITE, WRITE.replace("%a0", "%a1"), READ)]
        first, second, third = (gpuless.Module(t)["k"] for t in texts)
        first.launch(1, 64, (x, y))
        second.launch(1, 64, (x, y))
        third.launch(1, 64, (x, y), programmatic=True)  # may overtake the second alone
        first.launch(1, 64, (x, y))
        second.launch(1, 64, (x, y), programmatic=True)
        with pytest.raises(gpuless.Finding, match=r"missing griddepcontrol\.wait"):
            third.launch(1, 64, (x, y), programmatic=True)  # the second has not waited for the first


def test_intervals_that_nest_and_overlap():
    x = integers(64)
    # the same tensor, a part of it, and one that crosses the part's end
    args = (x[8:24], x, x[16:40], x[8:24])
    silent("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%a0+48];\nld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%a1+112];", *args)
    found = launch("ld.global.u32 %r2, [%a1+256];", *args)
    assert len(found) == len(SEEDS) and {f.kind for f in found} == {"out_of_bounds"}


def test_blocks_that_overwrite_what_others_read():
    # Each moves its part of the memory down by a word, so it reads the next block's first one.
    body = """
    mad.lo.u32 %r2, %ctaid.x, 64, %t;
    shl.b32 %r2, %r2, 2;
    cvt.u64.u32 %rd0, %r2;
    add.u64 %rd0, %rd0, %a0;
    ld.global.u32 %r3, [%rd0+4];
    bar.sync 0;
    st.global.u32 [%rd0{other}], %r3;"""
    x = torch.zeros(1024, dtype=torch.int32)
    silent(body.format(other="+1024"), x, grid=3)
    module = gpuless.Module(kernel(body.format(other=""), [x], block=64))
    for seed in range(1, 8, 2):  # with even ones the blocks begin in their order
        with gpuless.gpu("sm_90a", seed=seed, threads=1), pytest.raises(gpuless.Finding, match="race"):
            module["k"].launch(3, 64, [x])
