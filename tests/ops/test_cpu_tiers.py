"""Every tier of the CPU, each in a process of its own: the kernels that have other code there."""

import subprocess
import sys

import pytest
import torch
from cpu_tiers import GEMMS, OF_WIDTHS, attention_8bit
from processes import fork, two_threads
from rotation import in_turn

TIERS = torch.ops.forwardpass._cpu_tiers().split(",")


@pytest.mark.parametrize("parts", [12, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(tier, parts):
    checks = (*GEMMS, *OF_WIDTHS) if tier in ("baseline", "avx2", "avx512") else (*GEMMS, attention_8bit)
    script = "import sys, cpu_tiers; cpu_tiers.main(*sys.argv[1:])"
    done = fork.run(script, parts, *(check.__name__ for check in checks), env=two_threads({"FORWARDPASS_CPU": tier}))
    assert (done.stdout.strip(), done.returncode) == (tier, 0), done.stderr


@pytest.mark.every(3)
@pytest.mark.parametrize("capability", in_turn(["default", "avx2"]))
def test_it_may_be_torch_that_takes_less(capability):
    below_avx512 = [t for t in TIERS if t in ("baseline", "avx2", "avx_vnni")]
    expected = {"default": "baseline", "avx2": below_avx512[-1]}[capability]
    command = [sys.executable, "-m", "cpu_tiers", "4", GEMMS[0].__name__]
    done = subprocess.run(command, capture_output=True, text=True, env=two_threads({"ATEN_CPU_CAPABILITY": capability}))
    assert (done.stdout.strip(), done.returncode) == (expected, 0), done.stderr
