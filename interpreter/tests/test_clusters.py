"""Clusters: CTAs that run together, their shared memory, barrier and mbarriers across CTAs, multicast."""

import numpy as np
import pytest
import torch
from cluster_kernels import BYTES, MBARRIER, SEEDS, START, SYNC, WAIT, launch, outcome, reported, words
from ptx import finding, integers, kernel
from rows import row

import gpuless

pytestmark = pytest.mark.interpreted


# ---- launches ----


def geometry(cluster, grid):
    """What each CTA says of itself: %cluster_ctarank, %cluster_nctarank, %clusterid and %cluster_ctaid."""
    names = [
        "cluster_ctarank",
        "cluster_nctarank",
        *(f"{r}.{d}" for r in ("clusterid", "cluster_ctaid") for d in "xyz"),
    ]
    y = torch.full((grid[2], grid[1], grid[0], len(names)), -1, dtype=torch.int32)
    body = """
    mov.u32 %r1, %ctaid.z; mov.u32 %r2, %nctaid.y; mov.u32 %r3, %ctaid.y; mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r1, %r1, %r2, %r3;
    mul.wide.u32 %rd1, %r1, 32; add.u64 %rd1, %rd1, %a0;
    """ + "\n".join(f"mov.u32 %r4, %{n}; @%p8 st.global.u32 [%rd1+{4 * i}], %r4;" for i, n in enumerate(names))
    launch(body, y, cluster=cluster, grid=grid, block=32)
    return y


@pytest.mark.parametrize(("cluster", "grid"), [((2, 1, 1), (4, 3, 1)), ((2, 2, 1), (4, 4, 2)), ((1, 3, 2), (2, 3, 4))])
def test_special_registers(cluster, grid):
    y = geometry(cluster, grid)
    for z, yy, x in np.ndindex(grid[2], grid[1], grid[0]):
        at, of = (x, yy, z), cluster
        inside, which = [a % c for a, c in zip(at, of)], [a // c for a, c in zip(at, of)]
        rank = inside[0] + of[0] * (inside[1] + of[1] * inside[2])
        assert y[z, yy, x].tolist() == [rank, of[0] * of[1] * of[2], *which, *inside]


@pytest.mark.parametrize(
    ("options", "directive"),
    [
        ({"cluster": 2, "grid": 3}, ""),  # does not divide the grid
        ({"cluster": 32, "grid": 32}, ""),
        ({"cluster": (3, 2, 3), "grid": (3, 2, 3)}, ""),
        ({"cluster": 0, "grid": 2}, ""),
        ({"cluster": 4, "grid": 4}, ".reqnctapercluster 2"),
        ({"cluster": 1, "grid": 3}, ".reqnctapercluster 2"),
        ({"cluster": 4, "grid": 4}, ".maxclusterrank 2"),
        ({"cluster": 2, "grid": 2, "arch": "sm_89"}, ""),  # clusters came with sm_90
    ],
)
def test_invalid_cluster_sizes(options, directive):
    arch = options.pop("arch", "sm_90a")
    text = kernel("", [], arch).replace(".reqntid 32", f".reqntid 32\n{directive}")
    with gpuless.gpu(arch), pytest.raises(RuntimeError, match=r"CUDA error 912 .*a cluster of \("):
        gpuless.Module(text)["k"].launch(block=32, args=[], **options)


def test_cluster_of_the_kernel():
    y = words(4)
    body = START + "@%p8 st.global.u32 [%rd30], %r31;"
    text = kernel(body, [y]).replace(".reqntid 32", ".reqntid 32\n.reqnctapercluster 2, 1, 1")
    text = text.replace("mul.wide.u32 %rd30, %r34, 4", "mov.u32 %r34, %ctaid.x;\nmul.wide.u32 %rd30, %r34, 4")
    with gpuless.gpu("sm_90a"):
        gpuless.Module(text)["k"].launch(4, 32, [y])
    assert y.tolist() == [2] * 4


# ---- distributed shared memory ----

ADDRESSES = {
    "shared::cluster": "mapa.shared::cluster.u32 %r1, %r33, %r32;",
    "generic": "cvt.u64.u32 %rd1, %r33;\ncvta.shared.u64 %rd1, %rd1;\nmapa.u64 %rd1, %rd1, %r32;",
}
AT = {"shared::cluster": (".shared::cluster", "%r1"), "generic": ("", "%rd1")}


@row("mapa.shared::cluster?.u32|u64", "getctarank.shared::cluster?.u32|u64")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", ADDRESSES)
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_reads_of_the_next_cta(how, cluster, seed):
    space, at = AT[how]
    body = f"""
    st.shared.u32 [%r33], %r34;
    {SYNC}{ADDRESSES[how]}
    ld{space}.u32 %r2, [{at}];
    getctarank{space}.{"u32" if space else "u64"} %r3, {at};
    mad.lo.u32 %r2, %r3, 1000, %r2;
    st.global.u32 [%rd30], %r2;
    {SYNC}"""
    y = words(cluster * 2 * 64)
    launch(body, y, cluster=cluster, grid=2 * cluster, seed=seed)
    cta, thread = np.divmod(np.arange(len(y)), 64)
    rank = (cta % cluster + 1) % cluster
    other = cta // cluster * cluster + rank
    assert y.tolist() == (rank * 1000 + other * 64 + thread).tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", ADDRESSES)
def test_writes_and_atomics_of_the_next_cta(how, seed):
    space, at = AT[how]
    body = f"""
    {ADDRESSES[how]}
    st{space}.u32 [{at}], %r34;
    {SYNC}
    atom{space}.add.u32 %r2, [{at}], 7;
    red{space}.add.u32 [{at}], 5;
    {SYNC}
    ld.shared.u32 %r3, [%r33];
    st.global.u32 [%rd30], %r3;
    sub.u32 %r2, %r2, %r34;
    st.global.u32 [%rd30+1024], %r2;"""
    y = words(512)
    launch(body, y, cluster=4, seed=seed)
    assert y[:256].tolist() == [(i + 192) % 256 + 12 for i in range(256)] and not y[256:].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_own_memory_through_every_address(seed):
    body = """
    st.shared.u32 [%r33], 1;
    mapa.shared::cluster.u32 %r1, %r33, %r30;
    red.shared::cluster.add.u32 [%r1], 2;
    ld.shared::cta.u32 %r2, [%r1];
    red.shared::cluster.add.u32 [%r33], %r2;
    cvt.u64.u32 %rd1, %r1;
    cvta.shared::cluster.u64 %rd1, %rd1;
    red.add.u32 [%rd1], 10;
    ld.shared.u32 %r2, [%r33];
    isspacep.shared::cta %p1, %rd1;
    isspacep.shared::cluster %p2, %rd1;
    @%p1 add.u32 %r2, %r2, 100;
    @%p2 add.u32 %r2, %r2, 1000;
    xor.b32 %r3, %r30, 1;
    mapa.u64 %rd2, %rd1, %r3;
    isspacep.shared %p1, %rd2;
    isspacep.shared::cluster %p2, %rd2;
    @%p1 add.u32 %r2, %r2, 10000;
    @%p2 add.u32 %r2, %r2, 100000;
    st.global.u32 [%rd30], %r2;"""
    y = words(128)
    launch(body, y, seed=seed)
    assert y.tolist() == [101116] * 128


PEER = "mapa.shared::cluster.u32 %r1, %r33, %r32;\n"


@pytest.mark.parametrize(
    ("body", "kinds", "why"),
    [
        # nothing orders the write before the read, or the two are ordered by a barrier of one CTA
        (f"st.shared.u32 [%r33], 1;\n{PEER}ld.shared::cluster.u32 %r2, [%r1];\n{SYNC}", "race uninitialised", ""),
        (f"st.shared.u32 [%r33], 1;\nbar.sync 0;\n{PEER}ld.shared::cluster.u32 %r2, [%r1];\n{SYNC}", "race uninitialised", ""),
        (f"st.shared.u32 [%r33], 1;\nbarrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;\n{PEER}"
         f"ld.shared::cluster.u32 %r2, [%r1];\n{SYNC}", "race", "rank"),
        # read, then written again
        (f"st.shared.u32 [%r33], 1;\n{SYNC}{PEER}ld.shared::cluster.u32 %r2, [%r1];\nst.shared.u32 [%r33], 2;\n{SYNC}",
         "race", "rank"),
        # both write
        (f"{PEER}st.shared::cluster.u32 [%r1], 1;\nst.shared.u32 [%r33], 2;\n{SYNC}", "race", "rank"),
        # exits under a reader, or before it reads
        (f"st.shared.u32 [%r33], 1;\n{SYNC}{PEER}ld.shared::cluster.u32 %r2, [%r1];", "race out_of_bounds", "exit"),
        (f"{PEER}@%p8 st.shared::cluster.u32 [%r1], 1;", "race out_of_bounds", "exit"),
        # addresses
        (f"{PEER}st.shared.u32 [%r1], 1;\n{SYNC}", "illegal", "shared::cluster"),
        ("mapa.shared::cluster.u32 %r1, %s, 2;", "illegal", "cluster of 2"),
        (f"mapa.shared::cluster.u32 %r1, %s, %r32;\nst.shared::cluster.u32 [%r1+4096], 1;\n{SYNC}", "out_of_bounds", "4096"),
        ("mapa.u64 %rd1, %a0, 1;", "illegal", "generic"),
        ("getctarank.u64 %r1, %a0;", "illegal", "generic"),
    ],
)  # fmt: skip
def test_distributed_shared_memory_misused(body, kinds, why):
    f = reported(body, words(128), kinds=kinds)
    assert why in f.message, f


def test_a_fence_makes_a_relaxed_arrival_release():
    body = f"""
    st.shared.u32 [%r33], %r34;
    fence.acq_rel.cluster;
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.aligned;
    {PEER}ld.shared::cluster.u32 %r2, [%r1];
    st.global.u32 [%rd30], %r2;
    {SYNC}"""
    for seed in SEEDS:
        y = words(128)
        launch(body, y, seed=seed)
        assert y.tolist() == [*range(64, 128), *range(64)]


def test_global_memory_between_the_ctas_of_a_cluster():
    # Ordered by the cluster's barrier, and only by that.
    body = """
    st.global.u32 [%rd30], %r34;
    {}
    mul.wide.u32 %rd1, %r32, 256;
    mul.wide.u32 %rd2, %t, 4;
    add.u64 %rd1, %rd1, %rd2;
    add.u64 %rd1, %rd1, %a0;
    ld.global.u32 %r2, [%rd1];
    st.global.u32 [%rd30+512], %r2;"""
    for seed in SEEDS:
        y = words(256)
        launch(body.format(SYNC), y, seed=seed)
        assert y[128:].tolist() == [*range(64, 128), *range(64)]
    for barrier in ("", "bar.sync 0;", "barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;"):
        found = [f for seed in SEEDS if (f := outcome(body.format(barrier), words(256), seed=seed))]
        assert {f.kind for f in found} == {"race"} and all("block (" in f.message for f in found)
        assert len(found) >= 3, "a write that comes after the read leaves no trace, but these come before often enough"


def test_a_flag_in_global_memory_orders_a_cluster():
    body = f"""
    setp.eq.u32 %p1, %r30, 0;
    @!%p1 bra reader;
    st.shared.u32 [%r33], %t;
    bar.sync 0;
    @%p8 st.release.cluster.global.u32 [%a0+1024], 1;
    bra end;
    reader:
    @!%p8 bra there;
    spin:
    ld.acquire.cluster.global.u32 %r2, [%a0+1024];
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra spin;
    there:
    bar.sync 0;
    {PEER}
    ld.shared::cluster.u32 %r2, [%r1];
    st.global.u32 [%rd30], %r2;
    end:
    {SYNC}"""
    for seed in SEEDS:
        y = words(257)
        launch(body, y, seed=seed)
        assert y[64:128].tolist() == list(range(64))


# ---- mbarriers of other CTAs ----


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("space", [".shared::cluster", ""])
@pytest.mark.parametrize("semantics", ["", ".release.cluster"])
def test_remote_arrivals(space, semantics, seed):
    # Every thread of the other CTA has written a word before it arrives.
    to = PEER if space else PEER + "cvt.u64.u32 %rd1, %r2;\n"
    body = f"""
    {MBARRIER.format(64)}
    mapa.shared::cluster.u32 %r2, %s, %r32;
    add.u32 %r33, %r33, 64;
    {to}
    st.shared::cluster.u32 [%r1], %r34;
    {"" if space else "cvt.u64.u32 %rd1, %s; cvta.shared.u64 %rd1, %rd1; mapa.u64 %rd1, %rd1, %r32;"}
    mbarrier.arrive{semantics}{space}.b64 _, [{"%r2" if space else "%rd1"}];
    {WAIT.format(0)}
    ld.shared.u32 %r3, [%r33];
    st.global.u32 [%rd30], %r3;
    {SYNC}"""
    y = words(128)
    launch(body, y, seed=seed)
    assert y.tolist() == [*range(64, 128), *range(64)]


@pytest.mark.parametrize(
    ("body", "kinds", "why"),
    [
        # not initialised, or nothing says so to the cluster
        (f"@%p8 mbarrier.init.shared::cta.b64 [%s], 1;\nbar.sync 0;\nmapa.shared::cluster.u32 %r2, %s, %r32;\n"
         f"@%p8 mbarrier.arrive.shared::cluster.b64 _, [%r2];\n{SYNC}", "race mbarrier", ""),
        ("@%p8 mbarrier.init.shared::cta.b64 [%s], 1;\nbarrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;\n"
         f"mapa.shared::cluster.u32 %r2, %s, %r32;\n@%p8 mbarrier.arrive.shared::cluster.b64 _, [%r2];\n{SYNC}", "race", ""),
        # relaxed: what the other CTA wrote is not known
        (f"{MBARRIER.format(64)}mapa.shared::cluster.u32 %r2, %s, %r32;\nadd.u32 %r33, %r33, 64;\n{PEER}"
         "st.shared::cluster.u32 [%r1], 1;\nmbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r2];\n"
         f"{WAIT.format(0)}ld.shared.u32 %r3, [%r33];\n{SYNC}", "race", "rank"),
        (f"{MBARRIER.format(1)}mapa.shared::cluster.u32 %r2, %s, %r32;\n"
         f"mbarrier.arrive.shared::cluster.b64 %rd1, [%r2];\n{SYNC}", "illegal", "no state"),
        (f"{MBARRIER.format(1)}mapa.shared::cluster.u32 %r2, %s, %r32;\n"
         f"mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0;\n{SYNC}", "illegal", "another CTA"),
        # nobody waits for the arrival before the CTA exits
        (f"{MBARRIER.format(1)}mapa.shared::cluster.u32 %r2, %s, %r32;\n"
         "@%p8 mbarrier.arrive.shared::cluster.b64 _, [%r2];", "race out_of_bounds", "exit"),
    ],
)  # fmt: skip
def test_remote_arrivals_misused(body, kinds, why):
    f = reported(body, words(128), kinds=kinds)
    assert why in f.message, f


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarriers_known_by_their_fence_alone(seed):
    # As CUTLASS does: the fence of the initialisation, then a relaxed arrival at the cluster's barrier.
    init = MBARRIER.format(1).replace("arrive.aligned", "arrive.relaxed.aligned")
    body = f"""{init}
    mapa.shared::cluster.u32 %r2, %s, %r32;
    @%p8 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
    {WAIT.format(0)}
    {SYNC}"""
    launch(body, seed=seed)


# ---- multicast ----

LOADS = {
    "bulk": f"cp.async.bulk.shared::cluster.global.{BYTES}.multicast::cluster [%s+128], [%a0+{{offset}}], 512, [%s], %h1;",
    "tensor": f"cp.async.bulk.tensor.2d.shared::cluster.global.tile.{BYTES}.multicast::cluster [%s+128], [%a1, {{{{0, {{row}}}}}}],"
    " [%s], %h1;",
}  # fmt: skip


def multicast(kind, masks, expected_bytes=None, before="", after="", cluster=4):
    """CTA r loads rows r * 8.. of 8 to the CTAs of masks[r]; each reads what it has got."""
    parts = [MBARRIER.format(1), "mov.u32 %r9, 0;"]
    for rank, mask in enumerate(masks):
        got = sum(m >> rank & 1 for m in masks) * 512 if expected_bytes is None else expected_bytes
        parts += [
            f"setp.ne.u32 %p2, %r30, {rank};\n@%p2 bra next{rank};",
            f"@%p8 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], {got};" if got else "",
            "setp.eq.u32 %p3, %t, 0;\nmov.b16 %h1, " + str(mask) + ";",
            "@%p3 " + LOADS[kind].format(offset=rank * 512, row=rank * 8) if mask else "",
            f"next{rank}:",
        ]
    parts += [before, WAIT.format(0), "ld.shared.v2.u32 {%r4, %r5}, [%r33];", "mul.wide.u32 %rd1, %r34, 8;",
              "add.u64 %rd1, %rd1, %a2;", "st.global.v2.u32 [%rd1], {%r4, %r5};", after]  # fmt: skip
    return "mad.lo.u32 %r33, %t, 8, %s;\nadd.u32 %r33, %r33, 128;\n" + "\n".join(parts)


@row(
    f"cp.async.bulk.shared::cluster.global.{BYTES}.multicast::cluster.L2::cache_hint?",
    f"cp.async.bulk.tensor.1d|2d|3d|4d|5d.shared::cluster.global.tile?.{BYTES}.multicast::cluster.L2::cache_hint?",
)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", LOADS)
def test_multicast(kind, seed):
    x, y = integers(32, 16), torch.zeros(4, 128, dtype=torch.int32)
    launch(multicast(kind, [0b0101, 0b1010, 0, 0], after=SYNC), x, gpuless.tensor_map(x, box=(8, 16)), y, cluster=4,
           seed=seed)  # fmt: skip
    blocks = x.reshape(4, 128)
    assert torch.equal(y, blocks[[0, 1, 0, 1]])


@pytest.mark.parametrize("seed", SEEDS)
def test_who_waited_for_a_multicast_may_exit(seed):
    # rank 0 sends to all and stays; nothing orders the others' exit after the thread that sent, and nothing has to
    body = f"""{MBARRIER.format(1)}
    @%p8 mbarrier.arrive.expect_tx.shared.b64 _, [%s], 64;
    setp.eq.u32 %p2, %r30, 0;
    and.pred %p2, %p2, %p8;
    mov.u16 %h1, 15;
    @%p2 cp.async.bulk.shared::cluster.global.{BYTES}.multicast::cluster [%s+64], [%a0], 64, [%s], %h1;
    {WAIT.format(0)}"""
    launch(body, integers(16), cluster=4, block=32, seed=seed)


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize(
    ("masks", "options", "kinds", "why"),
    [
        ([0b0111, 0b1000, 0, 0], {"expected_bytes": 256}, "deadlock", ""),  # more bytes come than are expected
        ([0b0011, 0b1000, 0, 0], {"expected_bytes": 512}, "deadlock", ""),  # one CTA gets nothing
        ([0b10011, 0, 0, 0], {}, "illegal", "mask"),
        ([0b0011, 0b0010, 0b1100, 0], {}, "in_flight race", ""),  # two into one place
    ],
)  # fmt: skip
def test_multicast_misused(kind, masks, options, kinds, why):
    x, y = integers(32, 16), torch.zeros(4, 128, dtype=torch.int32)
    f = reported(multicast(kind, masks, after=SYNC, **options), x, gpuless.tensor_map(x, box=(8, 16)), y, kinds=kinds,
                 cluster=4)  # fmt: skip
    assert why in f.message, f


def test_the_mbarrier_lies_with_the_destination():
    body = f"""{MBARRIER.format(1)}
    add.u32 %r1, %s, 64; mapa.shared::cluster.u32 %r1, %r1, %r32;
    @%p8 cp.async.bulk.shared::cluster.global.{BYTES} [%r1], [%a0], 16, [%s];
    {SYNC}"""
    assert "destination" in reported(body, words(4), kinds="illegal").message


def test_cta_groups_are_refused():
    body = f"cp.async.bulk.tensor.1d.shared::cta.global.{BYTES}.cta_group::1 [%s], [%a0, {{0}}], [%s];"
    assert "cta_group" in finding(body, words(4)).message
