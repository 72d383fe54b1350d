"""Loops of machine code: written by hand, and of kernels from Triton's compiler, whose counts follow from their tiles."""

import subprocess

import pytest

pytest.importorskip("triton")

import cubin
import sass
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def function(*lines):
    """A label ends in a colon; anything else is an instruction."""
    text = [line if line.endswith(":") else f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines)]
    return sass.functions("\n".join([".text.kernel:", *text]))["kernel"]


MASKED = [".L_masked:", "LDG.E.128 R4, [R2.64]", "IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8", "FSEL R1, R2, R3, P2",
          "@P0 BRA `(.L_masked)"]  # fmt: skip
STEADY = [".L_steady:", "NOP", "LDG.E.128 R4, [R2.64]", "@P3 IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8",
          "@!UPT UIADD3 URZ, URZ, URZ, URZ", "@!P0 BRA `(.L_steady)"]  # fmt: skip


def test_the_unmasked_loop_is_the_main_one_inside_a_loop_over_tiles():
    f = function(".L_tile:", *MASKED, *STEADY, "STG.E [R2.64], R8", "@P1 BRA `(.L_tile)", "EXIT")
    assert len(f.loops) == 3
    assert len(f.main_loop.instructions) == 3, "predicated instructions count, NOPs do not"
    assert f.main_loop.nops == 2, "by name, and never under its predicate"
    assert f.main_loop.mma == {"IMMA.16832.S8.S8": 1}


def test_the_shorter_branch_of_a_loop_whose_branches_each_end_it():
    mma = "IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8"
    f = function(
        ".L_head:", "@P1 BRA `(.L_mask)", mma, "@P0 BRA `(.L_head)", "EXIT",
        ".L_mask:", "FSEL R1, R2, R3, P2", mma, "@P0 BRA `(.L_head)", "EXIT",
    )  # fmt: skip
    assert [len(loop.instructions) for loop in f.loops] == [3, 4]
    assert f.main_loop is f.loops[0]


def test_the_shortest_trip_skips_what_may_be_skipped():
    mma = "HGMMA.64x8x16.F32 R24, gdesc[UR8], R24"
    f = function(
        ".L_main:", mma, "@P2 BRA `(.L_long)", "@P0 BRA `(.L_as_it_is)", "FMUL R1, R1, R2", "FMUL R3, R3, R2",
        ".L_as_it_is:", "NOP", "FADD R1, R1, R3", "@P1 BRA `(.L_main)", "EXIT",
        ".L_long:", "FADD R5, R5, R5", "FADD R5, R5, R5", "BRA `(.L_as_it_is)",
    )  # fmt: skip
    assert len(f.main_loop.instructions) == 7
    shortest = f.shortest_trip(f.main_loop)
    assert [i.name for i in shortest] == ["HGMMA", "BRA", "BRA", "FADD", "BRA"]


def test_the_shortest_trip_multiplies_all():
    mma = "HGMMA.64x8x16.F32 R24, gdesc[UR8], R24"
    f = function(
        ".L_main:", mma, "@P0 BRA `(.L_narrow)", "FADD R5, R5, R5", mma,
        ".L_narrow:", "@P2 BRA `(.L_end)", "FMUL R1, R1, R2",
        ".L_end:", "FADD R1, R1, R3", "@P1 BRA `(.L_main)", "EXIT",
    )  # fmt: skip
    assert [i.name for i in f.shortest_trip(f.main_loop)] == ["HGMMA", "BRA", "FADD", "HGMMA", "BRA", "FADD", "BRA"]


def test_registers_behind_a_release():
    f = function(
        "IMAD R200, R1, R2, R3", "@P0 BRA `(.L_consumer)", "USETMAXREG.DEALLOC.CTAPOOL 0x18", "LDG.E.128 R16, [R22.64]",
        ".L_load:", "IMAD.WIDE R20, R1, R2, R3", "@P1 BRA `(.L_load)", "EXIT",
        ".L_consumer:", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "FADD R239, R1, R2", "EXIT",
    )  # fmt: skip
    assert f.registers_behind_release() == [(24, 24)]
    assert function("USETMAXREG.DEALLOC.CTAPOOL 0x18", "LDG.E.64 R24, [R2.64]", "EXIT").registers_behind_release() == [
        (24, 26)
    ]
    assert function("FADD R239, R1, R2", "EXIT").registers_behind_release() == []


def test_more_tensor_core_instructions_before_fewer_instructions():
    f = function(*STEADY, ".L_wide:", *["HGMMA.64x128x16.F32 R24, gdesc[UR8], R24"] * 2, "@P0 BRA `(.L_wide)", "EXIT")
    assert f.main_loop.mma == {"HGMMA.64x128x16.F32": 2}


def test_a_slow_path_behind_the_kernel_is_no_loop_and_not_in_the_count():
    f = function(
        ".L_main:", "SYNCS.PHASECHK.TRYWAIT P0, [R3], R0", "@!P0 BRA `(.L_slow)", ".L_ready:",
        "HGMMA.64x8x16.F32 R24, gdesc[UR8], R24", "@P1 BRA `(.L_main)", "STG.E [R2.64], R24", "EXIT",
        ".L_slow:", "SYNCS.PHASECHK.TRYWAIT P0, [R3], R0", "@!P0 BRA `(.L_slow)", "BRA `(.L_ready)",
    )  # fmt: skip
    assert [len(loop.instructions) for loop in f.loops] == [4, 2]
    assert f.main_loop is f.loops[0]


def test_bsync_continues_where_bssy_says():
    f = function(
        ".L_main:", "BSSY B0, `(.L_after)", "@P0 BRA `(.L_else)", "LDG.E R4, [R2.64]", "BSYNC B0", ".L_out:", "EXIT",
        ".L_else:", "LDL R4, [R1]", "BSYNC B0", ".L_after:", "@P1 BRA P2, `(.L_main)", "BRA `(.L_out)",
    )  # fmt: skip
    (loop,) = f.loops
    assert loop.local == {"LDL": 1} and loop.loads == {"LDG.E": 1}
    assert len(loop.instructions) == 7


@pytest.mark.parametrize("branch", ["@P0 BRA", "BRA P0,", "BRA.DIV UR4,"])
def test_a_conditional_branch_falls_through(branch):
    (loop,) = function(".L_main:", f"{branch} `(.L_out)", "LDL R4, [R1]", "BRA `(.L_main)", ".L_out:", "EXIT").loops
    assert len(loop.instructions) == 3


def test_a_call_of_a_label_leads_out_of_a_loop_and_a_call_of_a_function_does_not():
    f = function(
        ".L_first:", "LDG.E R4, [R2.64]", "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)",
        "@P0 CALL.REL.NOINC `(.L_out)", "BRA `(.L_first)",
        ".L_out:", ".L_second:", "LDG.E.128 R4, [R2.64]", "@P0 BRA `(.L_second)", "EXIT",
    )  # fmt: skip
    assert [(len(loop.instructions), loop.calls) for loop in f.loops] == [(4, 1), (2, 0)]


def test_every_target_of_an_indirect_branch():
    targets = '(*"BRANCH_TARGETS .L_one,.L_two"*)'
    f = function(".L_main:", f"BRX R4 -0x1a0    {targets}", ".L_one:", "LDL R4, [R1]", "@P0 BRA `(.L_main)", "EXIT",
                 ".L_two:", "STL [R1], R4", "BRA `(.L_main)")  # fmt: skip
    assert [loop.local for loop in f.loops] == [{"LDL": 1}, {"STL": 1}]


def test_a_rotated_loop_counts_whole():
    """Entered by its condition, which stands at the end: there the back edge falls into the head from above."""
    f = function("BRA `(.L_test)", ".L_body:", "LDG.E.64 R4, [R2.64]", ".L_test:", "ISETP.NE.AND P0, PT, R1, RZ, PT",
                 "@P0 BRA `(.L_body)", "EXIT")  # fmt: skip
    assert [len(loop.instructions) for loop in f.loops] == [3]


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.128", 16), ("LDG.E.64.CONSTANT", 8), ("LDG.E", 4), ("LDG.E.U16", 2), ("LDG.E.S8", 1),
     ("LDGSTS.E.BYPASS.128", 16), ("UTMALDG.2D", 16), ("LDS.128", 0), ("LDGDEPBAR", 0), ("LDC.64", 0)],
)  # fmt: skip
def test_bytes_of_a_load(opcode, size):
    assert sass.Instruction(None, opcode, "").loaded_bytes == size


def test_no_loop_no_main_loop():
    assert function("LDG.E R4, [R2.64]", "EXIT", ".L_end:", "BRA `(.L_end)").main_loop is None


@pytest.mark.parametrize(
    ("line", "words"), [("BRX R2 -0x620", "no label says where"), ("{ dual }", "not understood as an instruction")]
)
def test_what_is_not_understood_is_an_error(line, words):
    with pytest.raises(ValueError, match=words):
        function(line, "EXIT")


@triton.jit
def matmul(a, b, c, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), OUT)
    for i in range(0, k, K):
        x = tl.load(a + rows[:, None] * k + depth[None, :] + i)
        y = tl.load(b + columns[None, :] * k + depth[:, None] + i)
        acc = tl.dot(x, y, acc, out_dtype=OUT)
    tl.store(c + rows[:, None] * N + columns[None, :], acc)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("capability", "dtype", "opcode", "count"),
    [
        (80, "i8", "IMMA.16832.S8.S8.SAT", 64 * 64 * 64 // (16 * 8 * 32) // 4),  # over four warps
        (80, "fp16", "HMMA.16816.F32", 64 * 64 * 64 // (16 * 8 * 16) // 4),
        (89, "fp8e4nv", "QMMA.16832.F32.E4M3.E4M3", 64 * 64 * 64 // (16 * 8 * 32) // 4),
        (90, "i8", "IGMMA.64x64x32.S8.S8", 2),  # over one warpgroup
        (90, "fp16", "HGMMA.64x64x16.F32", 4),
        (90, "fp8e4nv", "QGMMA.64x64x32.F32.E4M3.E4M3", 2),
    ],
)
def test_triton_matmul(capability, dtype, opcode, count, tmp_path):
    out = "int32" if dtype == "i8" else "float32"
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*i32" if dtype == "i8" else "*fp32", "k": "i32"}
    tiles = {"M": 64, "N": 64, "K": 64, "OUT": getattr(tl, out)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    kernel = triton.compile(ASTSource(matmul, signature, tiles, aligned), target=GPUTarget("cuda", capability, 32))
    path = tmp_path / "matmul.cubin"
    path.write_bytes(kernel.asm["cubin"])
    code = sass.functions(subprocess.check_output([cubin.TOOLS / "nvdisasm", "-c", path], text=True))["matmul"]
    assert code.main_loop.mma == {opcode: count}
