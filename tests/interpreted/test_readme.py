"""The README's example of an interpreted GPU does what it says."""

import pathlib
import re

import pytest
from processes import fork

from forwardpass.dispatch.interpreted import KERNELS

pytestmark = [pytest.mark.interpreted, pytest.mark.skipif(not KERNELS.exists(), reason="built without CUDA kernels")]
README = pathlib.Path(__file__).parents[2] / "README.md"


@pytest.mark.every(2)
def test_the_example():
    section = README.read_text().split("## Run its kernels without a GPU\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    (said,) = re.findall(r"# (cuda True)$", code, re.M)
    done = fork.run(code)
    assert done.stdout == f"{said}\n", done.stderr
