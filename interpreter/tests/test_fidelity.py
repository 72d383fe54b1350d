"""docs/fidelity.md: every instruction has a row, every row a witness that is there."""

import pathlib
import re

import pytest

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


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}: {row[1][:24]}" for row in ROWS])
def test_every_row_has_instructions_and_a_witness(row):
    there = [r["section"] for r in core.rows()]
    assert all(any(f"{section}.".startswith(f"{s}.") for section in there) for s in sections(row))
    assert re.match("exact|modelled|assumed", row[2])
    tests = re.findall(r"`(test_\w+\.py)`", row[3])
    assert tests and all((ROOT / "tests" / t).exists() for t in tests)
