"""Every spelling of the rows that work by lane against its model, and no row of the table without a test."""

import shutil
import subprocess

import numpy as np
import pytest
import rows

pytestmark = pytest.mark.interpreted
rows.import_all()

CASES = [(spec, rows.Opcode(op)) for spec in rows.lanewise for op in rows.spellings(spec.pattern)]


@pytest.mark.parametrize("spec", rows.lanewise, ids=lambda s: s.pattern)
def test_by_lane(spec):
    for op in rows.spellings(spec.pattern):
        rows.check(spec, rows.Opcode(op))


def test_every_row_has_a_test():
    from gpuless import core

    table = {r["pattern"] for r in core.rows()}
    untested, unknown = sorted(table - rows.covered.keys()), sorted(rows.covered.keys() - table)
    assert not untested, "rows of the table that no test names:\n" + "\n".join(untested)
    assert not unknown, "tests of rows that the table does not have:\n" + "\n".join(unknown)


@pytest.mark.skipif(not shutil.which("ptxas"), reason="needs ptxas")
@pytest.mark.parametrize(("arch", "isa"), sorted({(spec.arch, spec.isa) for spec in rows.lanewise}))
def test_ptxas_knows_every_spelling(tmp_path, arch, isa):
    """The table must not take what the assembler refuses."""
    kernels = []
    for n, (spec, op) in enumerate(case for case in CASES if (case[0].arch, case[0].isa) == (arch, isa)):
        destination, sources = rows.types_of(spec, op)
        inputs = {name: rows.DTYPES[t] for name, t in zip(rows.NAMES, sources)}
        kernels.append(rows.kernel(rows.body_of(spec, op), inputs, {"d": rows.DTYPES[destination]}, f"k{n}"))
    (tmp_path / "all.ptx").write_text(rows.module(*kernels, arch=arch, isa=isa))
    made = subprocess.run(
        ["ptxas", "-O0", f"-arch={arch}", "-o", "/dev/null", tmp_path / "all.ptx"], capture_output=True, text=True
    )
    if "Unsupported .version" in made.stderr:
        pytest.skip(f"this ptxas has no PTX ISA {isa}")
    assert made.returncode == 0, made.stderr[-3000:]


def test_divergence():
    """A lane by lane loop runs where a warp is not whole: the same results, and the other lanes keep what they had."""
    rng = np.random.default_rng(0)
    a, b = rows.sample(["s32", "s32"], rng)
    p = rng.integers(0, 2, len(a)).astype(bool)
    result = rows.run("mov.u32 %d, 7; @%p add.s32 %d, %a, %b;", dict(a=a, b=b, p=p), {"d": np.dtype(np.int32)})["d"]
    with np.errstate(over="ignore"):
        assert np.array_equal(result, np.where(p, a + b, 7))
