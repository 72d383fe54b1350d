"""This package's kernels where a whole process's GPU is an interpreted one: torch's cuda device, and after a finding."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from rotation import in_turn

import forwardpass as fp
from forwardpass import dispatch

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted
CHECKS = pathlib.Path(__file__).parent / "swapped_checks.py"


@pytest.mark.every(3)
@pytest.mark.parametrize("guard", in_turn([[], ["--gpu-guard"]]))
def test_swapped_models_run_on_it(guard):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={CHECKS.parent}",
               "--noconftest", "-rA", "-q", "--gpu=sm_90a", "--gpu-seeds=1", *guard, str(CHECKS)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S*?::\S+", done.stdout, re.M)
    assert len(outcomes) > 10 and set(outcomes) == {"PASSED"}
    assert re.search(r"^\d{2,} launches with 1 schedule .*, 0 findings", done.stdout, re.M)


@pytest.mark.every(3)
def test_a_script_runs_a_swapped_model(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, forwardpass as fp\n"
        "model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)).cuda().half(), torch.randn(2, 64).cuda().half()\n"
        "with torch.inference_mode():\n"
        "    expected = model(x)\n"
        "    fp.swap(model, 'int8')\n"
        "    print(fp.explain('int8_linear', x, model[0].qweight, model[0].weight_scale).backend)\n"
        "    print(float((model(x) - expected).norm() / expected.norm()) < 0.02)\n"
    )
    command = [sys.executable, "-m", "gpuless", "run", "--gpu", "sm_80", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["cuda", "True"], done.stdout + done.stderr
    assert re.search(r"gpuless: clean: 0 findings, \d+ launches on sm_80", done.stderr), done.stderr


def test_an_operation_runs_after_a_finding():
    """append_kv is launched by cudaLaunchKernelEx, which returns its error, and quantize by <<<...>>>, which does not."""
    keys, values = torch.randn(2, 1, 64, 2, 64, dtype=torch.float16)
    with fp.interpret("sm_90a", seed=1), fp.use_backend("cuda"):
        if reason := dispatch.interpreter().why_not("cuda"):
            pytest.skip(str(reason))
        with pytest.raises(fp.types.InterpreterFinding, match="race"):  # the new keys lie where they are written
            fp.ops.append_kv(
                keys[:, 8:12], values[:, 8:12].clone(), keys, values, torch.tensor([11], dtype=torch.int32)
            )
        q, _, _ = fp.ops.quantize(torch.ones(4, 64), torch.int8)
    assert (q == 127).all()
