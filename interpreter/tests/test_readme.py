"""The README's example does what it says."""

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted
README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example(tmp_path):
    code, output = re.findall(r"```\w*\n(.*?)```", README.read_text(), re.S)[:2]
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
