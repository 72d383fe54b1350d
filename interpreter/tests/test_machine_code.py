"""`python -m gpuless sass`: what the assembler's machine code shows."""

import json
import pathlib
import subprocess

import pytest

from gpuless.__main__ import main
from gpuless.commands import assembled
from gpuless.commands.machine_code import local_accesses, overwritten, parse

FOLDER = pathlib.Path(__file__).parent / "machine_code"
SOURCE = FOLDER / "wgmma_registers.cu"
FLAGS = ["-arch=sm_90a"]


def missing():
    try:
        return not all(map(assembled.tool, ("ptxas", "nvdisasm", "nvcc")))
    except FileNotFoundError:
        return True


needs_tools = pytest.mark.skipif(missing(), reason="needs nvcc, ptxas and nvdisasm")


@needs_tools
def test_registers_of_a_wgmma_under_way(capsys):
    assert main(["sass", str(SOURCE), *FLAGS, "-DEARLY=1"]) == 3
    text = capsys.readouterr().out
    lines = SOURCE.read_text().splitlines()
    place = {word: next(n for n, line in enumerate(lines, 1) if line.endswith(word)) for word in ("// A", "// PRODUCT")}
    assert "1 finding in machine code" in text and "written while a wgmma may still read A there" in text
    assert f"wgmma_registers.cu:{place['// A']}: " in text and "kernel products" in text
    assert main(["sass", str(SOURCE), *FLAGS, "-DEARLY=0"]) == 0
    assert capsys.readouterr().out == "gpuless: 0 findings in machine code\n"


@needs_tools
def test_what_ptxas_says_and_spills(capsys, tmp_path):
    assert main(["sass", "--json", str(SOURCE), *FLAGS, "-DUNWAITED=1"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert any(text.startswith("ptxas C75") for text in found), found
    spilling = tmp_path / "spilling.cu"
    spilling.write_text("""
    __global__ void spilling(const float* x, float* y) {
      float v[64];
    #pragma unroll
      for (int i = 0; i < 64; ++i) v[i] = x[i * 32 + threadIdx.x];
      __syncthreads();
    #pragma unroll
      for (int i = 0; i < 64; ++i) y[i * 32 + threadIdx.x] = v[i] * v[63 - i];
    }""")
    assert main(["sass", str(spilling), *FLAGS, "-maxrregcount=32"]) == 3
    assert capsys.readouterr().out.startswith("spills: ")
    assert main(["sass", str(spilling), *FLAGS]) == 0


@needs_tools
def test_ptx_and_cubins(capsys, tmp_path):
    for suffix in (".ptx", ".cubin"):
        made = tmp_path / f"products{suffix}"
        command = [assembled.tool("nvcc"), f"-{suffix[1:]}", *FLAGS, "-lineinfo", "-DEARLY=1", "-o", made, SOURCE]
        subprocess.run(command, check=True)
        assert main(["sass", str(made)]) == 3
        assert "wgmma_registers.cu:" in capsys.readouterr().out


def test_what_cannot_be_read(capsys, tmp_path):
    assert main(["sass", str(tmp_path / "none.cu")]) == 2
    other = tmp_path / "x.txt"
    other.write_text("")
    assert main(["sass", str(other)]) == 2
    assert "is no .cu, .ptx or .cubin" in capsys.readouterr().err


def test_a_tool_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(assembled.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="there is no nvdisasm"):
        assembled.tool("nvdisasm")


def function(*rows):
    """Of machine code a line each; a label ends in a colon."""
    text = [".text.k:"]
    for n, r in enumerate(rows):
        text.append(r if r.endswith(":") else f"        /*{16 * n:04x}*/                   {r} ;")
    (one,) = parse("\n".join(text))
    return one


PRODUCT = "HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], R24"


@pytest.mark.parametrize(
    ("rows", "registers"),
    [
        ([PRODUCT + ", gsb0", "MOV R5, R9"], [5]),
        ([PRODUCT + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R5, R9"], []),
        ([PRODUCT + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R5, R9"], [5]),
        ([PRODUCT + ", gsb0", PRODUCT.replace("R4", "R8") + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R5, R9"], []),
        ([PRODUCT + ", gsb0", PRODUCT.replace("R4", "R8") + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R9, R5"], [9]),
        ([PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R5, R9"], [5]),  # of no group: the wait is for others
        ([PRODUCT + ", gsb0", "MOV R8, R5"], []),  # reads it
        ([PRODUCT + ", gsb0", "LDS.128 R0, [R5]", "LDS.64 R6, [R5]"], [6, 7]),
        ([PRODUCT + ", gsb0", "LDSM.16.M88.4 R2, [R5]"], [4, 5]),
        ([PRODUCT + ", gsb0", "STS [R9], R5", "STG.E desc[UR4][R6.64], R5", "RED.E.ADD desc[UR4][R6.64], R5"], []),
        ([PRODUCT + ", gsb0", "ISETP.GE.AND P0, PT, R5, R6, PT"], []),
        ([PRODUCT + ", gsb0", "LOP3.LUT P1, R4, R2, 0x3, RZ, 0xc0, !PT", "SHFL.BFLY PT, R7, R6, 0x1, 0x1f"], [4, 7]),
        ([PRODUCT + ", gsb0", "IMAD.WIDE R6, R1, 0x4, R2", "R2UR UR4, R5"], [6, 7]),
        ([PRODUCT.replace("R4, gdesc", "gdesc") + ", gsb0", "MOV R5, R9"], []),  # A is in shared memory
        ([PRODUCT + ", gsb0", "@P0 BRA `(.L_x_1)", "WARPGROUP.DEPBAR.LE gsb0, 0x0", ".L_x_1:", "MOV R5, R9"], [5]),  # a path
        ([PRODUCT + ", gsb0", "BRA `(.L_x_1)", "MOV R5, R9", ".L_x_1:", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"], []),
        ([".L_x_0:", "MOV R5, R9", PRODUCT + ", gsb0", "@P0 BRA `(.L_x_0)", "EXIT"], [5]),  # the next iteration
        ([".L_x_0:", "MOV R5, R9", PRODUCT + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P0 BRA `(.L_x_0)", "EXIT"], []),
        ([PRODUCT + ", gsb0", "HGMMA.64x16x16.F32 R2, gdesc[UR4], R2, gsb0"], [4, 5, 6, 7]),  # D of another one
    ],
)  # fmt: skip
def test_writes_before_the_wait(rows, registers):
    assert [r for o in overwritten(function(*rows)) for r in o.registers] == registers


def test_local_memory():
    places = local_accesses(function("STL [R1], R4", "LDL.64 R4, [R1]", "LDG.E R4, desc[UR4][R6.64]"))
    assert [p.text.split()[0] for p in places] == ["STL", "LDL.64"]
