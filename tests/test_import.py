"""`import forwardpass`: cheap, quiet, and not prevented by a broken library."""

import json
import shutil
import subprocess
import sys

import pytest
from processes import fork
from rotation import in_turn

import forwardpass as fp


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs).stdout


@pytest.mark.every(3)
def test_costs_less_than_three_tenths_of_a_second_and_no_cuda():
    """Of a core: other tests run beside it, and the least of several is what it costs."""
    code = """
import time, torch
before = time.process_time()
import forwardpass
took = time.process_time() - before
print(took, torch.cuda.is_initialized())
"""
    for _ in range(5):
        took, initialized = python(code).split()
        assert initialized == "False"
        if float(took) < 0.3:
            break
    assert float(took) < 0.3


def test_imports_nothing_but_torch():
    code = """
import sys, torch
before = set(sys.modules)
import forwardpass
new = {m.partition(".")[0] for m in set(sys.modules) - before}
print(*(new & {"transformers", "safetensors", "typer", "rich", "triton", "numpy", "huggingface_hub"}))
"""
    done = fork.run(code)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


@pytest.mark.every(3)
@pytest.mark.parametrize("damage", in_turn(["missing", "broken", "of another version"]))
def test_a_library_that_does_not_load_is_said_when_it_is_needed(tmp_path, damage):
    package = tmp_path / "forwardpass"
    shutil.copytree(fp.dispatch.library.FOLDER, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if damage == "broken":
        (package / "_ops.so").write_bytes(b"not a library")
    if damage == "of another version":
        shutil.copy(fp.dispatch.library.FOLDER / "_ops.so", package)
        info = package / "_build.json"
        info.write_text(json.dumps({**json.loads(info.read_text()), "version": "0.0.1"}))
    code = """
import torch, forwardpass as fp
x = torch.ones(2, 8)
q, scale, _ = fp.ops.quantize(x, torch.int8)   # the reference needs no library
print(int(q[0, 0]))
try:
    with fp.use_backend("cpu"):
        fp.ops.quantize(x, torch.int8)
except fp.Unsupported as e:
    print(e)
"""
    first, second = python(code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""}).splitlines()
    assert first == "127"
    assert "op library did not load" in second
    if damage == "of another version":
        assert f"_ops.so is of forwardpass 0.0.1, and these files are of {fp.__version__}: reinstall" in second
