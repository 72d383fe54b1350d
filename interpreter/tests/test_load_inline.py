"""torch's own compilation of extensions with CUDA sources, `load_inline`, under `python -m gpuless run`."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from gpuless import core

torch = pytest.importorskip("torch")
pytest.importorskip("ninja")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(shutil.which("nvcc") is None or not core.CUDART.exists(), reason="there is no nvcc"),
]
FRONTS = pathlib.Path(__file__).parent / "fronts"
SOURCE = FRONTS / "load_inline.cu"
#: seconds: a compilation takes 80 of a core's, and on a machine with two cores and twelve builds it was not over after 600
LIMIT = 3600
#: lines that torch puts before the source, in its file cuda.cu
HEADERS = 3
#: what torch asks the patched functions when it builds an extension, then an import that lacks a symbol
ASKS = """
import sys
import torch.utils.cpp_extension as extension
print(extension._prepare_ldflags([], True, False, False, False)[0])
print(*extension._prepare_ldflags(["-lmine"], False, False, False, False))
print(*extension._prepare_ldflags(["-lmine"], True, False, False, False))
print(*extension.include_paths("cuda"))
print(*extension.include_paths())
print(extension._join_cuda_home("bin", "nvcc"))
try:
    extension._import_module_from_library("lacking", sys.argv[1], True)
except ImportError as error:
    print(error)
"""


def gpuless(script, *arguments, **environment):
    command = [sys.executable, "-m", "gpuless", "run", "--gpu", "sm_90a", str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ | environment)


def test_what_torch_is_told(tmp_path):
    script, source = tmp_path / "asks.py", tmp_path / "lacking.c"
    script.write_text(ASKS)
    source.write_text(
        "void* _ZN2at4cuda6absentEv(void);\nvoid* PyInit_lacking(void) { return _ZN2at4cuda6absentEv(); }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", tmp_path / "lacking.so"], check=True)
    done = gpuless(script, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 4, done.stdout + done.stderr  # it launches nothing
    first, without_cuda, with_cuda, cuda_paths, paths, nvcc, error = done.stdout.splitlines()
    (toolkit,) = (tmp_path / "cache" / "gpuless").iterdir()
    ours = toolkit / "lib64" / "c10_cuda.o"
    assert first == str(ours) and ours.exists()
    assert "-lmine" in without_cuda and "cuda" not in without_cuda
    assert "-lmine" in with_cuda and "-ltorch_cuda" not in with_cuda and "-lc10_cuda" not in with_cuda
    assert f"-L{toolkit}/lib64 -lcudart" in with_cuda
    assert cuda_paths.split()[-1].endswith("gpuless/cuda/extension/include") and "gpuless" not in paths
    assert nvcc == f"{toolkit}/bin/nvcc"
    assert error == (
        "the extension lacking needs _ZN2at4cuda6absentEv, which neither torch for CPUs nor gpuless has: "
        "torch's own CUDA library is not interpreted"
    )


def test_nothing_changes_without_an_interpreted_gpu():
    script = (
        "import gpuless, torch.utils.cpp_extension as e\n"
        "with gpuless.gpu('sm_90a'): pass\n"
        "print({f.__module__ for f in (e._join_cuda_home, e.include_paths, e._prepare_ldflags, e._import_module_from_library)})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{'torch.utils.cpp_extension'}\n", done.stdout + done.stderr


def line(text):
    """Where torch's file cuda.cu has the first line that begins with this."""
    return HEADERS + next(
        i for i, code in enumerate(SOURCE.read_text().splitlines(), 1) if code.strip().startswith(text)
    )


@pytest.mark.slow
def test_load_inline(tmp_path_factory):
    """Three runs in one test: the first compiles for all of them, which takes 80 core-seconds."""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions"))}
    right, past, race = (
        gpuless(FRONTS / "load_inline_script.py", *bug, **environment) for bug in ([], ["past"], ["race"])
    )
    assert (right.returncode, right.stdout) == (0, "PASS\n"), right.stdout + right.stderr
    assert "clean: 0 findings, 4 launches on sm_90a" in right.stderr
    assert (past.returncode, past.stdout) == (3, "PASS\n"), past.stdout + past.stderr
    assert "out_of_bounds: write of 4 bytes" in past.stderr and "(4000 bytes)" in past.stderr
    assert f"cuda.cu:{line('if (i < n) y[i]')}" in past.stderr
    assert race.returncode == 3 and "race: " in race.stderr, race.stdout + race.stderr
    for text in ("part[threadIdx.x] = sum", "if (threadIdx.x < half)"):
        assert f"cuda.cu:{line(text)}" in race.stderr
