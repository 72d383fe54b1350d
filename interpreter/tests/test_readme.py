"""The README's example does what it says."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from gpuless import core

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not core.KERNELS.exists(),
        reason="it needs Triton and the CUDA kernels",
    ),
]

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example(tmp_path):
    section = README.read_text().split("## Run GPU kernels without a GPU\n")[1].split("\n## ")[0]
    code, output = re.findall(r"```\w*\n(.*?)```", section, re.S)[:2]
    printed, finding = output.split("...\n")  # between them is the traceback
    script = tmp_path / "double.py"
    script.write_text(code)
    path = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=path)
    assert done.stdout == printed
    assert done.returncode == 1

    def anonymous(text):  # without addresses, line breaks, and what another version of Triton spells differently
        text = re.sub(r"0x[0-9a-f]+|PTX line .*", "", text.replace(str(script), script.name))
        return " ".join(text.split())

    assert anonymous(done.stderr).endswith(anonymous(finding))
