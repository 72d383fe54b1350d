"""docs/fidelity.md: every instruction has a row, every row a witness that is there."""

import pathlib
import re

import pytest
from ptx import kernel

import gpuless
from gpuless import core

pytestmark = pytest.mark.interpreted
ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs/fidelity.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| 9.7")]


def sections(row):
    return [s.strip() for s in row[0].split(",")]


def test_every_instruction_has_a_row():
    known = [s for row in ROWS for s in sections(row)]
    missing = {r["section"] for r in core.rows() if not any(f"{r['section']}.".startswith(f"{s}.") for s in known)}
    assert not missing


REFUSED = re.findall(r"`([a-z][\w.:]+)`", TEXT.partition("| refused |")[2].partition("| other")[0])


@pytest.mark.parametrize("opcode", REFUSED)
def test_what_is_refused_runs_nowhere(opcode):
    arch = "sm_100a" if "tcgen05" in opcode or "im2col::w" in opcode else "sm_90a"
    text = kernel(f"{opcode} {{%r0}}, {{%r1}}, {{%r2}}, {{%r3}};", (), arch)
    with gpuless.gpu(arch), pytest.raises(gpuless.Finding) as e:
        gpuless.Module(text)["k"].launch(1, 32, [])
    assert e.value.kind == "unsupported" and "operands" not in e.value.message, e.value
    skipped = kernel(f"bra END;\n{opcode} {{%r0}}, {{%r1}}, {{%r2}}, {{%r3}};\nEND:", (), arch)
    with gpuless.gpu(arch):
        gpuless.Module(skipped)["k"].launch(1, 32, [])


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}: {row[1][:24]}" for row in ROWS])
def test_every_row_has_instructions_and_a_witness(row):
    there = [r["section"] for r in core.rows()]
    assert all(any(f"{section}.".startswith(f"{s}.") for section in there) for s in sections(row))
    assert re.match("exact|modelled|assumed", row[2])
    tests = re.findall(r"`(test_\w+\.py)`", row[3])
    assert tests and all((ROOT / "tests" / t).exists() for t in tests)
