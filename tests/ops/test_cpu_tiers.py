"""Every tier of the CPU, each in a process of its own: the kernels that have other code there."""

import subprocess
import sys

import pytest
import torch
from cpu_tiers import ATTENTION, GEMMS
from processes import two_threads
from rotation import A_QUARTER, in_turn

TIERS = torch.ops.forwardpass._cpu_tiers().split(",")


def run(checks, parts, **environment):
    command = [sys.executable, "-m", "cpu_tiers", str(parts), *(check.__name__ for check in checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=two_threads(environment))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("parts", A_QUARTER)
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(tier, parts):
    checks = (*GEMMS, *ATTENTION) if tier in ("baseline", "avx2", "avx512") else GEMMS
    assert run(checks, parts, FORWARDPASS_CPU=tier) == tier


@pytest.mark.parametrize("capability", in_turn(["default", "avx2"]))
def test_it_may_be_torch_that_takes_less(capability):
    below_avx512 = [t for t in TIERS if t in ("baseline", "avx2", "avx_vnni")]
    expected = {"default": "baseline", "avx2": below_avx512[-1]}[capability]
    assert run(GEMMS[:1], 4, ATEN_CPU_CAPABILITY=capability) == expected
