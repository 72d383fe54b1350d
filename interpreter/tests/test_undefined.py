"""Values from shared memory that nothing has written: what may be done with them, and what is a finding."""

import pytest
import torch
from ptx import finding, run

pytestmark = pytest.mark.interpreted

# %r1: the lane's word of shared memory at %s, which nothing has written; %rd1: its word of %a0
LOAD = """
shl.b32 %r10, %t, 2;
add.u32 %r10, %r10, %s;
cvt.u64.u32 %rd1, %t;
shl.b64 %rd1, %rd1, 2;
add.u64 %rd1, %rd1, %a0;
ld.shared.u32 %r1, [%r10];
"""


def words():
    return torch.zeros(64, dtype=torch.int32)


def reported(body, *args, **options):
    """At the load, with what depends on it."""
    f = finding(body, *args or (words(),), **options)
    assert f.kind == "uninitialised" and "nothing has written" in f.message, f
    assert f.instruction.startswith(("ld.shared", "ldmatrix"))
    return f


@pytest.mark.parametrize(
    "use",
    [
        "",  # nothing at all
        "add.u32 %r2, %r1, 1;\nmul.wide.u32 %rd2, %r2, %r1;\ncvt.u16.u32 %h1, %r2;\nsetp.eq.u32 %p1, %r2, 0;",
        "mov.u32 %r1, 7;\nst.global.u32 [%rd1], %r1;",  # replaced
        "setp.lt.u32 %p1, %t, 8;\n@!%p1 st.global.u32 [%rd1], 1;",  # only by others
        "st.shared.u32 [%r10+128], %r1;\nbar.warp.sync -1;\nld.shared.u32 %r2, [%r10+128];\nadd.u32 %r2, %r2, 1;",
        "st.shared.u32 [%r10], 5;\nld.shared.u32 %r1, [%r10];\nst.global.u32 [%rd1], %r1;",
    ],
)
def test_nothing_depends_on_it(use):
    run(LOAD + use, words())


@pytest.mark.parametrize(
    ("use", "what"),
    [
        ("st.global.u32 [%rd1], %r1;", "st.global"),
        ("add.u32 %r2, %r1, 1;\nxor.b32 %r3, %r2, %r2;\nst.global.u32 [%rd1], %r3;", "st.global"),
        ("and.b32 %r1, %r1, 0;\nld.shared.u32 %r2, [%r1];", "ld.shared"),
        ("and.b32 %r1, %r1, 0;\nst.shared.u32 [%r1], 0;", "st.shared"),
        ("setp.eq.u32 %p1, %r1, 0;\n@%p1 mov.u32 %r2, 1;", "mov.u32"),
        ("setp.eq.u32 %p1, %r1, 0;\n@%p1 bra END;\nmov.u32 %r2, 1;\nEND:", "bra"),
        ("shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;", "shfl"),
        ("red.global.add.u32 [%rd1], %r1;", "red.global"),
        ("mbarrier.init.shared.b64 [%s+512], %r1;", "mbarrier.init"),
    ],
)
def test_what_depends_on_it(use, what):
    f = reported(LOAD + use)
    assert what in f.message and f.message.endswith("depends on it")


def test_what_is_staged_stays_undefined():
    stage = (
        "st.shared.u32 [%r10+128], %r1;\nbar.warp.sync -1;\nld.shared.u32 %r2, [%r10+128];\nst.global.u32 [%rd1], %r2;"
    )
    reported(LOAD + stage)


def test_lanes_are_apart():
    # lane 3 alone has written its word, and alone may store what it loads
    body = "setp.{} %p1, %t, 3;\n"
    write = LOAD.replace("ld.shared", "setp.eq.u32 %p1, %t, 3;\n@%p1 st.shared.u32 [%r10], 9;\nld.shared")
    y = words()
    run(write + "@%p1 st.global.u32 [%rd1], %r1;", y)
    assert y[3] == 9 and y.sum() == 9
    f = reported(write + body.format("le.u32") + "@%p1 st.global.u32 [%rd1], %r1;")
    assert f.lane == 0


# ---- matrices: A at %s has rows 0 to 7 written, B at %s + 1024 columns 0 to 3 ----

MMA = """
shl.b32 %r10, %t, 4;
add.u32 %r10, %r10, %s;
setp.lt.u32 %p1, %t, 8;
setp.lt.u32 %p2, %t, 4;
@%p1 st.shared.v4.b32 [%r10], {{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}};
@%p1 st.shared.v4.b32 [%r10+256], {{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}};
@%p2 st.shared.v4.b32 [%r10+1024], {{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}};
@%p2 st.shared.v4.b32 [%r10+1152], {{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}};
bar.warp.sync -1;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r10];
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r5, %r6}}, [%r10+1024];
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}},
  {{%f10, %f10, %f10, %f10}};
cvt.u64.u32 %rd1, %t;
shl.b64 %rd1, %rd1, 2;
add.u64 %rd1, %rd1, %a0;
and.b32 %r11, %t, 3;
setp.lt.u32 %p3, %r11, 2;
{}
"""
ZERO = "mov.f32 %f10, 0f00000000;\n"


@pytest.mark.parametrize("register", [1, 2])
def test_rows_and_columns_of_mma(register):
    y = torch.zeros(32)
    run(ZERO + MMA.format(f"@%p3 st.global.f32 [%rd1], %f{register};"), y)
    assert y.tolist() == [16.0, 16.0, 0.0, 0.0] * 8
    # the columns 4 to 7 in the same register
    f = reported(ZERO + MMA.format(f"st.global.f32 [%rd1], %f{register};"), torch.zeros(32))
    assert "ldmatrix.sync.aligned.m8n8.x2" in f.instruction or "x4" in f.instruction


@pytest.mark.parametrize("register", [3, 4])
def test_rows_that_nobody_wrote(register):
    f = reported(ZERO + MMA.format(f"@%p3 st.global.f32 [%rd1], %f{register};"), torch.zeros(32))
    assert "st.global.f32" in f.message


def test_accumulators_of_mma():
    # C undefined in lane 0, whose D then is, alone
    undefined = "ld.shared.f32 %f10, [%s+2048];\nsetp.ne.u32 %p4, %t, 0;\n@%p4 mov.f32 %f10, 0f00000000;\n"
    y = torch.zeros(32)
    run(undefined + MMA.format("and.pred %p3, %p3, %p4;\n@%p3 st.global.f32 [%rd1], %f1;"), y)
    assert y.tolist() == [0.0, 16.0, 0.0, 0.0] + [16.0, 16.0, 0.0, 0.0] * 7
    assert reported(undefined + MMA.format("@%p3 st.global.f32 [%rd1], %f1;"), torch.zeros(32)).lane == 0


def test_without_checks():
    run(LOAD + "st.global.u32 [%rd1], %r1;", words(), checks=False)


def test_transposed_matrices_are_undefined_by_column():
    # row 0 of the matrix is missing: of the transposed one, column 0, which lanes 0, 4, 8... hold
    body = """
    shl.b32 %r10, %t, 4;
    add.u32 %r10, %r10, %s;
    setp.ne.u32 %p1, %t, 0;
    setp.lt.u32 %p2, %t, 8;
    and.pred %p1, %p1, %p2;
    @%p1 st.shared.v4.b32 [%r10], {%t, %t, %t, %t};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r1}, [%r10];
    cvt.u64.u32 %rd1, %t;
    shl.b64 %rd1, %rd1, 2;
    add.u64 %rd1, %rd1, %a0;
    and.b32 %r2, %t, 3;
    setp.ne.u32 %p3, %r2, 0;
    """
    y = words()
    run(body + "@%p3 st.global.b32 [%rd1], %r1;", y)
    reported(body + "st.global.b32 [%rd1], %r1;")
