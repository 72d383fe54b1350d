"""plan on a real model, from the command line."""

import json
import subprocess
import sys

import pytest
from command_line import run

import forwardpass as fp


@pytest.mark.slow
@pytest.mark.alone
def test_minilm(tmp_path):
    """The budget holds end to end on texts not calibrated on, in another process too, within five minutes on two cores."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    file, budget = tmp_path / "plan.json", "0.9995"
    done = subprocess.run(
        [sys.executable, "-m", "forwardpass", "plan", "minilm", "--min-cosine", budget, "--json", str(file)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = fp.Plan.load(file)
    evidence = plan.evidence
    assert evidence["seconds"] < 300
    if not plan.layers:  # a CPU on which nothing is faster than fp32: without VNNI, without bfloat16
        assert "no candidate is faster than" in evidence["layers"][0]["reason"]
        return
    held = [a["value"] for a in evidence["attempts"] if a["holds"]][-1]
    args = ("swap", "minilm", "--plan", file, "--min-cosine", budget, "--json", "-")
    found = json.loads(run(*args).stdout)
    assert found["parity"]["cosine_min"] == pytest.approx(held, abs=1e-6) and held >= 0.9995
