"""fp.interpret and what hangs on it: which calls are interpreted and which are not, and what is restored."""

import importlib.util
import re
import shutil
import sys
import threading

import pytest
import torch
from processes import fork

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.dispatch.interpreted import KERNELS

pytestmark = pytest.mark.interpreted

X = torch.randn(3, 40)


def chosen():
    return fp.explain("quantize", X, torch.int8).backend


def needs_cuda_kernels():
    return pytest.mark.skipif(not KERNELS.exists(), reason="built without CUDA kernels")


def test_blocks_nest_and_are_left():
    assert (chosen(), dispatch.interpreter()) == ("cpu", None)
    with fp.interpret("sm_90a") as outer:
        assert chosen() in ("cuda", "triton")
        with fp.interpret("sm_80") as inner:
            assert dispatch.interpreter().device is inner
        assert dispatch.interpreter().device is outer
        with fp.use_backend("cpu"):
            assert chosen() == "cpu"
    with pytest.raises(KeyError), fp.interpret("sm_80"):
        raise KeyError
    assert (chosen(), dispatch.interpreter()) == ("cpu", None)


def test_another_thread_is_not_interpreted():
    seen = []
    with fp.interpret("sm_90a"):
        t = threading.Thread(target=lambda: seen.append(chosen()))
        t.start()
        t.join()
    assert seen == ["cpu"]


def python(code, **environment):
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    return fork.run(code, env=environment)


def test_the_environment_interprets_every_thread():
    code = """
import threading, torch, forwardpass as fp
print(fp.explain("quantize", torch.ones(2, 8), torch.int8).backend)
t = threading.Thread(target=lambda: print(fp.dispatch.interpreter().device))
t.start(); t.join()
with fp.interpret("sm_80") as device:
    print(fp.dispatch.interpreter().device is device)
print(fp.dispatch.interpreter().device)
"""
    done = python(code, GPULESS_ARCH="sm_89", GPULESS_SEED="5")
    first, second, third, fourth = done.stdout.splitlines()
    assert first in ("cuda", "triton"), done.stderr
    assert second == fourth == "<interpreted L40S (sm_89), seed 5>"
    assert third == "True"


def test_the_variable_of_before_is_refused():
    done = python("import forwardpass", FORWARDPASS_INTERPRET="sm_80")
    assert done.returncode == 1 and "FORWARDPASS_INTERPRET is now GPULESS_ARCH" in done.stderr


def test_importing_forwardpass_does_not_import_gpuless():
    done = python("import sys, forwardpass; print([m for m in sys.modules if 'gpuless' in m])")
    assert done.stdout.strip() == "[]"


@needs_cuda_kernels()
@pytest.mark.parametrize("guard", [False, True])
def test_operations_run_their_cuda_kernels(guard):
    with fp.use_backend("reference"):
        expected = fp.ops.quantize(X, torch.int8)
    with fp.interpret("sm_80", guard=guard) as device, fp.use_backend("cuda"):
        got = fp.ops.quantize(X, torch.int8)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))
    assert device.counters["launches"] == 1
    with fp.use_backend("cuda"), pytest.raises(fp.Unsupported, match="CUDA tensors"):
        fp.ops.quantize(X, torch.int8)


@needs_cuda_kernels()
def test_compiled_calls_are_interpreted_or_refused():
    def f(x):
        return fp.ops.quantize(x, torch.int8)[0].float() + 1

    with fp.interpret("sm_80") as device, fp.use_backend("cuda"):
        expected = f(X)
        launches = device.counters["launches"]
        with pytest.raises(Exception, match="cannot be interpreted within a graph"):
            torch.compile(f, backend="eager", fullgraph=True)(X)
        torch.compiler.reset()
        assert torch.equal(torch.compile(f, backend="eager")(X), expected)
        assert device.counters["launches"] == launches + 1


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("_ops.so", "Unsupported: the op library did not load"),
        (
            "_kernels_interpreted.so",
            "Unsupported: quantize: cuda: built without CUDA kernels for gpuless: .*; reinstall where `nvcc`",
        ),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(missing, words, tmp_path):
    package = tmp_path / "forwardpass"
    shutil.copytree(fp.dispatch.library.FOLDER, package, ignore=shutil.ignore_patterns(missing, "__pycache__"))
    code = """
import torch, forwardpass as fp
with fp.interpret("sm_80"), fp.use_backend("cuda"):
    fp.ops.quantize(torch.ones(2, 8), torch.int8)
"""
    path = [p for p in sys.path if p and p != str(fp.dispatch.library.FOLDER.parent)]
    done = python(code, PYTHONPATH=":".join([str(tmp_path), *path]))
    assert re.search(words, done.stderr.splitlines()[-1]), done.stderr


@needs_cuda_kernels()
def test_triton_may_be_absent(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else found(name, *a))
    dispatch.why_no_triton.cache_clear()
    try:
        with fp.interpret("sm_80"):
            assert fp.explain("quantize", X, torch.int8)["triton"].code == "not_installed"
            assert fp.ops.quantize(X, torch.int8)[0].shape == X.shape
    finally:
        dispatch.why_no_triton.cache_clear()


def test_tritons_own_interpreter_is_not_mixed_in(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fp.interpret("sm_80") as device:
        assert device is dispatch.interpreter().device
        assert dispatch.interpreter().why_not("triton").code == "triton_interpret"


def test_gpuless_may_be_absent():
    """The import and the operations go on; what needs it says how to get it."""
    code = """
import sys
sys.modules["gpuless"] = None
import torch, forwardpass as fp
print(fp.ops.quantize(torch.ones(2, 8), torch.int8)[0].shape, hasattr(fp, "InterpreterFinding"))
with fp.interpret("sm_80"):
    pass
"""
    done = python(code)
    assert done.stdout == "torch.Size([2, 8]) False\n", done.stderr
    assert re.search(r"ImportError: .* needs gpuless, .*: pip install ./interpreter", done.stderr.splitlines()[-1])


@needs_cuda_kernels()
def test_kernels_of_another_gpuless_are_refused(monkeypatch):
    monkeypatch.setitem(dispatch.library.build_info, "gpuless", "0.0.1")
    with fp.interpret("sm_80"):
        reason = fp.explain("quantize", X, torch.int8)["cuda"]
    assert re.match(r"its CUDA kernels were built for gpuless 0\.0\.1, and .* is installed; build", str(reason))


def test_another_thread_takes_the_choice_along():
    seen = []

    def work(choice):
        with dispatch.choosing(choice):
            seen.append((chosen(), current.device()))

    from gpuless import current

    with fp.interpret("sm_90a") as device:
        t = threading.Thread(target=work, args=[dispatch.current_choice()])
        t.start()
        t.join()
    assert seen == [("cuda" if KERNELS.exists() else "triton", device)]
