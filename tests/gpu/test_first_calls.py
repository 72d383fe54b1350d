"""What the first call of a process meets: a graph that is being captured, a GPU that is not the current one.

Each in a process of its own, as kernels are loaded at their first call on each GPU::

    PYTHONPATH=tests/helpers python tests/gpu/test_first_calls.py capture cuda quantize
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from matching import cases_of, check

from forwardpass import dispatch

pytestmark = pytest.mark.gpu


def in_capture(operation, args):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = operation(*args)
    graph.replay()
    torch.cuda.synchronize()
    return got


def call(operation, args):
    return operation(*args)


#: name -> (how the operation is called, the GPU of its arguments; the current one stays cuda:0)
CALLS = {"capture": (in_capture, "cuda:0"), "second": (call, "cuda:1")}


def run(how, backend, name):
    operation = dispatch.operations[name]
    cases = [c for c in cases_of(operation).cases() if getattr(c, "op", name) == name]
    calling, device = CALLS[how]
    with dispatch.use_backend(backend):
        supported = (args for c in cases if not operation.why_not(backend, *(args := c.arguments(device))))
        args = next(a for a in supported if a[0].numel())
        check(operation, args, calling, **({"truncating": True} if name.startswith("fp8") else {}))


def first_call(how, backend, name):
    helpers = str(pathlib.Path(__file__).parents[1] / "helpers")
    path = os.pathsep.join(filter(None, (helpers, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, how, backend, name]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize("name", dispatch.operations)
@pytest.mark.parametrize("how", CALLS)
def test_cuda(how, name):
    if how == "second" and torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    if reason := dispatch.operations[name].why_not_on("cuda", torch.device("cuda", 0)):
        pytest.skip(str(reason))
    done = first_call(how, "cuda", name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["quantize", "int8_gemm", "attention"])
@pytest.mark.parametrize("how", CALLS)
def test_triton(how, name):
    """Triton loads a kernel by a call that captures forbid: it works, or says what to do."""
    if how == "second" and torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    done = first_call(how, "triton", name)
    assert done.returncode == 0 or (how == "capture" and "call it once before the capture" in done.stderr), done.stderr


if __name__ == "__main__":
    run(*sys.argv[1:])
