"""Bugs that others confirmed are found, at the line of the mistake, and their fixes are silent and right: docs/recall.md."""

import dataclasses
import pathlib

import pytest
import torch
from cached_ptx import NVCC
from recall_bugs import BUGS, FOLDER, SEEDS, SOURCES, integers, module_of, written

import gpuless

pytestmark = [pytest.mark.interpreted, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]

PAGE = pathlib.Path(__file__).parents[1] / "docs/recall.md"


def test_the_page_has_all():
    assert set(BUGS) == set(SOURCES)
    rows = {row.split("|")[1].strip().strip("`"): row for row in PAGE.read_text().splitlines() if row.startswith("| `")}
    assert list(rows) == sorted(BUGS)
    for name, bug in BUGS.items():
        assert bug.link in rows[name], name
        assert ("missed" in rows[name]) == bool(bug.miss) and ("explored" in rows[name]) == bool(bug.explore), name


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if not bug.miss])
def test_found(name):
    bug = BUGS[name]
    for seed in range(SEEDS):
        if bug.is_mended:
            assert torch.equal(*bug.run(True, seed))
            continue
        with pytest.raises(gpuless.Finding) as raised:
            bug.run(True, seed)
        finding = raised.value
        assert finding.kind in bug.kinds, f"seed {seed}: {finding}"
        assert pathlib.Path(finding.file).name == bug.source.name, f"seed {seed}: {finding}"
        assert finding.line in bug.lines, f"seed {seed}: {finding}"
        assert bool(finding.schedule) == bool(bug.explore)
        if bug.explore:
            dataclasses.replace(bug, explore=0).run(True, seed)  # the seed's own order does not show it


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if bug.miss])
def test_missed(name):
    """Whoever mends it moves it to the others."""
    for seed in range(SEEDS):
        BUGS[name].run(True, seed)


@pytest.mark.parametrize("name", BUGS)
def test_the_fix_is_silent(name):
    for seed in range(SEEDS):
        got, expected = BUGS[name].run(False, seed)
        assert torch.equal(got, expected), f"seed {seed}"


@pytest.mark.parametrize("name", ["bulk_pipeline", "tensor_pipeline"])
def test_what_is_no_hazard(name):
    """Pipelines through TMA that racecheck calls hazards: silent at every seed, and in all orders."""
    x = integers(4, 32)
    for seed in range(SEEDS):
        with gpuless.gpu("sm_90a", seed=seed, explore=1000 if seed == 0 else 0) as device:
            kernel = module_of(FOLDER / "false_hazards.cu")[name]
            source = x if name == "bulk_pipeline" else gpuless.tensor_map(x, box=(1, 32))
            assert torch.equal(written(kernel, source, 4, 32, block=64), 2 * x)
        assert all(launch.complete for launch in device.explored) and bool(device.explored) == (seed == 0)
