"""Bulk copies against numpy, and what is reported when they are misused. Tensor copies: test_rows_tensor_map.py."""

import itertools

import pytest
import torch
from ptx import MBARRIER, WAIT, assert_refused, copied, finding, integers, outcome, run
from rows import row

pytestmark = pytest.mark.interpreted

SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [16, 48, 2000])
@pytest.mark.parametrize(("space", "hint"), [("shared::cluster", ""), ("shared::cta", ".L2::cache_hint")])
def test_bulk_load(size, space, hint, seed):
    x, y = integers(512), torch.zeros(512, dtype=torch.int32)
    policy = ", %rd9" if hint else ""
    body = f"""{MBARRIER}
    mov.b64 %rd9, 0;
    mov.u32 %r1, {size};
    @%p0 cp.async.bulk.prefetch.L2.global{hint} [%a0], %r1{policy};
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], %r1;
    @%p0 cp.async.bulk.{space}.global.mbarrier::complete_tx::bytes{hint} [%s+64], [%a0+16], %r1, [%s]{policy};
    {WAIT.format(0)}
    {copied("%s+64", "%a1", size // 4, "out")}"""
    run(body, x, y, seed=seed)
    assert torch.equal(y[: size // 4], x[4:][: size // 4]) and not y[size // 4 :].any()


STORE = """
{copy}
{fence}
bar.sync 0;
setp.eq.u32 %p0, %t, 0;
@!%p0 bra join;
cp.async.bulk.global.shared::cta.bulk_group{hint} [%a1+{to}], [%s+256], {size}{policy};
cp.async.bulk.commit_group;
{wait}
join:
{after}
"""


def store(
    size=1024, fence="fence.proxy.async;", hint="", policy="", wait="cp.async.bulk.wait_group 0;", after="", to=0
):
    copy = copied("%a0", "%s+256", size // 4, "in")
    return STORE.format(copy=copy, fence=fence, hint=hint, policy=policy, size=size, wait=wait, after=after, to=to)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [16, 1024])
@pytest.mark.parametrize("wait", ["cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"])
def test_bulk_store(size, wait, seed):
    x, y = integers(256), torch.zeros(512, dtype=torch.int32)
    run(store(size, hint=".L2::cache_hint", policy=", 0", wait=wait, to=512), x, y, seed=seed)
    assert torch.equal(y[128:][: size // 4], x[: size // 4]) and not y[:128].any() and not y[128 + size // 4 :].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fence", "enough"),
    [
        ("fence.proxy.async;", True),
        ("fence.proxy.async.shared::cta;", True),
        ("fence.proxy.async.shared::cluster;", True),
        ("fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;", True),
        ("fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;", False),
        ("fence.proxy.async.global;", False),
        ("fence.proxy.alias;", False),
        ("fence.proxy.tensormap::generic.release.gpu;", False),
        ("fence.mbarrier_init.release.cluster;", False),
        ("fence.acquire.sync_restrict::shared::cluster.cluster;", False),
        ("fence.release.sync_restrict::shared::cta.cluster;", False),
        ("membar.cta;", False),
        ("membar.gl;", False),
        ("membar.sys;", False),
        *[
            (f"fence{sem}.{scope};", False)
            for sem in ("", ".sc", ".acq_rel")
            for scope in ("cta", "cluster", "gpu", "sys")
        ],
        ("fence.acquire.gpu;\nfence.release.gpu;", False),
        ("", False),
    ],
)
def test_fences_before_a_bulk_store(fence, enough, seed):
    x, y = integers(256), torch.zeros(256, dtype=torch.int32)
    if enough:
        run(store(fence=fence), x, y, seed=seed)
        assert torch.equal(x, y)
    else:
        f = finding(store(fence=fence), x, y, seed=seed)
        assert f.kind == "race" and "fence.proxy.async" in f.message and "cp.async.bulk" in f.instruction, f


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("wait", "enough"),
    [
        ("cp.async.bulk.wait_group 0;", True),
        ("cp.async.bulk.wait_group.read 0;", True),
        ("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 1;", True),
        ("cp.async.bulk.wait_group 1;", False),
        ("cp.async.bulk.wait_group.read 1;", False),
        ("", False),
    ],
)
def test_source_of_a_bulk_store_is_written_again(wait, enough, seed):
    x, y = integers(256), torch.zeros(256, dtype=torch.int32)
    body = store(wait=wait, after="bar.sync 0;\n@%p0 st.shared.b32 [%s+512], 1;")
    if enough:
        run(body, x, y, seed=seed)
        assert torch.equal(x, y)
    else:
        assert finding(body, x, y, seed=seed).kind in ("race", "in_flight")


BULK_STORE = "cp.async.bulk.global.shared::cta.bulk_group [%a{n}], [%s+{at}], {size};"
READERS = {
    "store of warp 0": f"@%p0 {BULK_STORE}\n@%p0 cp.async.bulk.commit_group;",
    "store of warp 1": f"@%p1 {BULK_STORE}\n@%p1 cp.async.bulk.commit_group;",
    "load of warp 2": "@%p2 ld.shared.u32 %r2, [%s+16];",
    "byte of warp 2": "@%p2 ld.shared.u8 %h2, [%s+17];",
}


@pytest.mark.parametrize("unfinished", [None, 0, 1])
@pytest.mark.parametrize("parts", [((0, 64), (16, 16)), ((16, 16), (0, 64))])
@pytest.mark.parametrize("order", list(itertools.permutations(READERS, 3)))
def test_whoever_reads_a_source_is_remembered(order, parts, unfinished):
    """Asynchronous operations and a warp read the same bytes, in turns; then they are written again."""
    reads = [READERS[r].format(n=r[-1], at=parts[int(r[-1]) % 2][0], size=parts[int(r[-1]) % 2][1]) for r in order]
    waits = [f"@%p{n} cp.async.bulk.wait_group.read 0;" for n in range(2) if n != unfinished]
    body = f"""
    setp.eq.u32 %p0, %t, 0;
    setp.eq.u32 %p1, %t, 32;
    setp.eq.u32 %p2, %t, 64;
    shl.b32 %r1, %t, 2;
    add.u32 %r1, %r1, %s;
    st.shared.u32 [%r1], %t;
    fence.proxy.async;
    bar.sync 0;
    {"".join(f"{read}{chr(10)}bar.sync 0;{chr(10)}" for read in reads)}
    {"".join(waits)}
    bar.sync 0;
    @%p2 st.shared.u32 [%s+16], 7;
    bar.sync 0;
    @%p0 cp.async.bulk.wait_group 0;
    @%p1 cp.async.bulk.wait_group 0;"""
    for seed in SEEDS:
        x, y = (torch.zeros(32, dtype=torch.int32) for _ in range(2))
        if unfinished is None or f"store of warp {unfinished}" not in order:
            run(body, x, y, block=96, seed=seed)
        else:
            assert finding(body, x, y, block=96, seed=seed).kind in ("race", "in_flight")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("late", [False, True])
def test_bulk_load_is_in_flight(late, seed):
    # Read without the wait, or after a wait for something else: the phase is over when its bytes are there.
    y = torch.zeros(4, dtype=torch.int32)
    body = f"""{MBARRIER}
    @%p0 mbarrier.arrive{{}} _, [%s]{{}};
    @%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s+64], [%a0], 16, [%s];
    bar.sync 0;
    {WAIT.format(0) if late else ""}
    ld.shared.b32 %r1, [%s+64];
    @%p0 st.global.b32 [%a1], %r1;"""
    wrong = body.format(".shared::cta.b64", "") if late else body.format(".expect_tx.shared::cta.b64", ", 16")
    assert finding(wrong, integers(4), y, seed=seed).kind in ("in_flight", "mbarrier")


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarrier_of_a_bulk_load_must_be_initialised_before(seed):
    body = """
    setp.eq.u32 %p0, %t, 0;
    setp.eq.u32 %p1, %t, 32;
    @%p0 mbarrier.init.shared::cta.b64 [%s], 1;
    @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s+64], [%a0], 16, [%s];
    """
    assert finding(body, integers(4), block=64, seed=seed).kind in ("race", "mbarrier")


def test_bulk_loads_under_way_are_kept_apart():
    # Warp 0 waits for the last, and reads the first once warp 1 has waited for it and said so in a way that orders nothing.
    bulk = "@%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
    wait = "{label}:\nmbarrier.try_wait.parity{semantics}.shared::cta.b64 %p1, [%s+{at}], 0;\n@!%p1 bra {label};\n"
    body = "\n".join(
        [
            "setp.eq.u32 %p0, %t, 0;",
            *[f"@%p0 mbarrier.init.shared::cta.b64 [%s+{8 * i}], 1;" for i in range(16)],
            "bar.sync 0;",
            *[f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s+{8 * i}], 16;" for i in range(15)],
            *[f"{bulk} [%s+{256 + 16 * i}], [%a0], 16, [%s+{8 * i}];" for i in range(15)],
            "setp.ge.u32 %p2, %t, 32;\n@%p2 bra second;",
            wait.format(label="last", semantics="", at=112),
            wait.format(label="word", semantics=".relaxed.cta", at=120),
            "@%p0 ld.shared.b32 %r1, [%s+256];\nret;\nsecond:",
            wait.format(label="first", semantics="", at=0),
            "setp.eq.u32 %p3, %t, 32;\n@%p3 mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%s+120];",
        ]
    )
    kinds = {outcome(body, integers(4), block=64, seed=seed) for seed in range(20)}
    assert kinds == {"in_flight"}, kinds


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("threads", [32, 1024])
@pytest.mark.parametrize("seed", range(3))
def test_bulk_stores_by_every_thread(threads, waits, seed):
    # 1024 are more than are told apart. Each thread overwrites what it has stored.
    body = f"""
    shl.b32 %r0, %t, 4;
    cvt.u64.u32 %rd0, %r0;
    add.u64 %rd0, %rd0, %a0;
    add.u32 %r0, %r0, %s;
    st.shared.v4.b32 [%r0], {{%t, %t, %t, %t}};
    fence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r0], 16;
    cp.async.bulk.commit_group;
    {"cp.async.bulk.wait_group.read 0;" if waits else ""}
    st.shared.b32 [%r0], 0;
    cp.async.bulk.wait_group 0;"""
    y = torch.zeros(threads, 4, dtype=torch.int32)
    options = {"block": threads, "shared": threads * 16, "seed": seed}
    if waits:
        run(body, y, **options)
        assert torch.equal(y, torch.arange(threads, dtype=torch.int32)[:, None].expand(threads, 4))
    else:
        assert finding(body, y, **options).kind == "in_flight"


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_thread_waits_for_its_own_bulk_stores_alone(both, seed):
    body = f"""
    setp.lt.u32 %p1, %t, 2;
    setp.eq.u32 %p2, %t, 1;
    shl.b32 %r0, %t, 4;
    cvt.u64.u32 %rd0, %r0;
    add.u64 %rd0, %rd0, %a0;
    add.u32 %r0, %r0, %s;
    @%p1 st.shared.v4.b32 [%r0], {{%t, %t, %t, %t}};
    fence.proxy.async;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r0], 16;
    cp.async.bulk.commit_group;
    {"" if both else "@%p2 "}cp.async.bulk.wait_group.read 0;
    bar.warp.sync 0xffffffff;
    @%p2 st.shared.b32 [%s], 7;
    cp.async.bulk.wait_group 0;"""
    y = torch.zeros(2, 4, dtype=torch.int32)
    assert outcome(body, y, seed=seed) == ("" if both else "in_flight")


BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


@pytest.mark.parametrize(
    ("body", "kind", "why"),
    [
        (f"@%p0 {BULK} [%s+64], [%a0], 24, [%s];", "illegal", "multiple of 16"),
        (f"@%p0 {BULK} [%s+72], [%a0], 32, [%s];", "misaligned", "16 bytes"),
        (f"@%p0 {BULK} [%s+64], [%a0+8], 32, [%s];", "misaligned", "16 bytes"),
        (f"@%p0 {BULK} [%s+64], [%a0], 32, [%s+4];", "misaligned", "8 bytes"),
        (f"@%p0 {BULK} [%s+64], [%a0], 32, [%s+8];", "mbarrier", "init has not run"),
        (f"@%p0 {BULK} [%s+4080], [%a0], 32, [%s];", "out_of_bounds", ""),
        (f"@%p0 {BULK} [%s+64], [%a0+2032], 32, [%s];", "out_of_bounds", "argument"),
        (f"@%p0 {BULK} [%s], [%a0], 32, [%s];", "mbarrier", "mbarrier object"),
        (f"@%p0 {BULK} [%s+64], [%a0], 32, [%s];\n@%p0 {BULK} [%s+80], [%a0], 32, [%s];", "in_flight", ""),
        ("@%p0 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%s+64], 32;", "uninitialised", ""),
        ("@%p0 cp.async.bulk.prefetch.L2.global [%a0+2048], 16;", "out_of_bounds", "argument"),
    ],
)
def test_bulk_misused(body, kind, why):
    f = finding(MBARRIER + body, integers(512))
    assert f.kind == kind and why in f.message and f.lane in (-1, 0), f


# ---- refusals ----

BYTES = "mbarrier::complete_tx::bytes"
DIMENSIONS = "1d|2d|3d|4d|5d"
OTHER_MODES = "im2col::w|im2col::w::128|im2col_no_offs"
MODES = f"im2col|{OTHER_MODES}"
OPERATIONS = "add|min|max|inc|dec|and|or|xor"


@row(
    f"cp.reduce.async.bulk.tensor.{DIMENSIONS}.global.shared::cta.{OPERATIONS}.im2col_no_offs.bulk_group.L2::cache_hint?",
    f"cp.async.bulk.tensor.{DIMENSIONS}.shared::cluster.global.{OTHER_MODES}.{BYTES}.multicast::cluster.L2::cache_hint?",
    f"cp.async.bulk.tensor.{DIMENSIONS}.shared::cluster|shared::cta.global.{OTHER_MODES}.{BYTES}.L2::cache_hint?",
    f"cp.async.bulk.tensor.{DIMENSIONS}.global.shared::cta.{MODES}.bulk_group.L2::cache_hint?",
    f"cp.async.bulk.prefetch.tensor.{DIMENSIONS}.L2.global.{MODES}.L2::cache_hint?",
)
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"cp.async.bulk.shared::cluster.global.{BYTES}.multicast::cluster [%s], [%a0], 16, [%s];", "mask of CTAs"),
        (f"cp.async.bulk.tensor.1d.shared::cluster.global.{BYTES}.multicast::cluster [%s], [%a0, {{0}}], [%s];", "mask of"),
        (f"cp.async.bulk.tensor.3d.shared::cluster.global.im2col::w.{BYTES}.multicast::cluster [%s], [%a0, {{0, 0, 0}}],"
         " [%s], {0}, %h1;", "im2col"),
        (f"cp.async.bulk.tensor.1d.shared::cluster.global.{BYTES}.cta_group::2 [%s], [%a0, {{0}}], [%s];", "sm_100"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.bf16 [%a0], [%s], 16;", "not known"),
        (f"cp.reduce.async.bulk.shared::cluster.shared::cta.{BYTES}.add.f32 [%s], [%s], 16, [%s];", "not known"),
        ("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.im2col_no_offs.bulk_group [%a0, {0, 0, 0}], [%s];", "im2col"),
        (f"cp.async.bulk.tensor.3d.shared::cluster.global.im2col::w.{BYTES} [%s], [%a0, {{0, 0, 0}}], [%s], {{0}};",
         "im2col"),
        ("cp.async.bulk.prefetch.tensor.3d.L2.global.im2col [%a0, {0, 0, 0}], {0};", "im2col"),
        (f"cp.async.bulk.tensor.2d.shared::cta.global.{BYTES} [%s], [%a0, {{0}}], [%s];", "2 coordinates"),
        (f"cp.async.bulk.tensor.2d.shared::cta.global.{BYTES} [%s], [%a0], [%s];", "coordinates"),
        (f"cp.async.bulk.shared::cta.global.{BYTES} [%s], [%a0], 16;", ""),
        ("cp.async.bulk.global.shared::cta.bulk_group [%a0], [%s], 16, 0;", "cache-policy"),
        ("cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%a0], [%s], 16, %h1;", "not known"),
        ("cp.async.bulk.wait_group;", "number of groups"),
        ("tensormap.replace.tile.rank.global.b1024.b64 [%a0], 1;", "type"),
        ("tensormap.replace.tile.box_dim.global.b1024.b32 [%a0], 1;", "ordinal"),
        ("tensormap.replace.tile.box_dim.global.b1024.b32 [%a0], 5, 1;", "ordinal"),
        ("tensormap.replace.tile.global_stride.global.b1024.b64 [%a0], 4, 16;", "ordinal"),
        ("tensormap.replace.tile.swizzle_atomicity.global.b1024.b32 [%a0], 0;", "not known"),
        ("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%a0], [%s], 64;", "128"),
        ("fence.proxy.tensormap::generic.acquire.gpu [%a0], 64;", "128"),
    ],
)  # fmt: skip
def test_refused(body, why):
    assert why in assert_refused(body, integers(64))
