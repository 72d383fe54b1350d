"""fp.interpret and what hangs on it: who is interpreted and who is not, what is refused, and what is restored."""

import importlib.util
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from api_kernels import COPY

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.interpreter import Module, core, tensor_map

pytestmark = pytest.mark.interpreted

X = torch.randn(3, 40)


def chosen():
    return fp.explain("quantize", X, torch.int8).backend


def needs_cuda_kernels():
    return pytest.mark.skipif(not core.KERNELS.exists(), reason="built without CUDA kernels")


def copy(x, y, shift=0, threads=32):
    Module(COPY)["copy"].launch(1, threads, [x, y, shift])


@pytest.fixture
def words():
    return torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)


def test_a_module_runs_what_it_was_given(words):
    x, y = words
    with fp.interpret("sm_80") as device:
        copy(x, y)
    assert torch.equal(x, y)
    assert device.counters["launches"] == 1
    assert device.counters["warp_instructions"] >= 10
    assert device.findings == []


def test_a_finding_has_its_place_and_the_way_to_repeat_it(words):
    x, y = words
    with fp.interpret("sm_89", seed=7) as device, pytest.raises(fp.InterpreterFinding, match="argument 0 of copy") as e:
        copy(x, y, shift=1)
    found = e.value
    assert device.findings == [found]
    assert (found.kind, found.kernel, found.block, found.warp, found.lane) == (
        "out_of_bounds",
        "copy",
        (0, 0, 0),
        0,
        31,
    )
    assert (found.arch, found.seed) == ("sm_89", 7)
    assert found.address == x.data_ptr() + 32 * 4
    assert "ld.global.u32" in found.instruction
    assert COPY.splitlines()[found.ptx_line - 1].strip().startswith("ld.global.u32")
    assert "seed 7" in str(found)
    again = pickle.loads(pickle.dumps(found))
    assert (type(again), str(again), again.__dict__) == (type(found), str(found), found.__dict__)


def test_storage_is_known_for_one_launch_only(words):
    x, y = words
    with fp.interpret("sm_80") as device:
        copy(x, y)
        with pytest.raises(fp.InterpreterFinding) as e:
            copy(x.data_ptr(), y)  # an address, and whose it is was forgotten
        assert e.value.kind == "out_of_bounds"
        device.register(x, "the table")
        copy(x.data_ptr(), y)


def test_blocks_nest_and_are_left():
    assert (chosen(), dispatch.interpreter()) == ("cpu", None)
    with fp.interpret("sm_90a") as outer:
        assert chosen() in ("cuda", "triton")
        with fp.interpret("sm_80") as inner:
            assert dispatch.interpreter() is inner
        assert dispatch.interpreter() is outer
        with fp.use_backend("cpu"):
            assert chosen() == "cpu"
    with pytest.raises(KeyError), fp.interpret("sm_80"):
        raise KeyError
    assert (chosen(), dispatch.interpreter()) == ("cpu", None)


def test_the_core_follows():
    device = core.load().fpi_device
    device.restype = core.c_char_p
    with fp.interpret("sm_90a"):
        with fp.interpret("sm_80"):
            assert device() == b"sm_80"
        assert device() == b"sm_90a"
    assert not device()


def test_another_thread_is_not_interpreted():
    seen = []
    with fp.interpret("sm_90a"):
        t = threading.Thread(target=lambda: seen.append(chosen()))
        t.start()
        t.join()
    assert seen == ["cpu"]


def test_threads_have_devices_of_their_own(words):
    """Launches take turns; each is on its thread's device."""
    found = {}

    def launch(arch, seed):
        x, y = words[0].clone(), words[1].clone()
        with fp.interpret(arch, seed=seed):
            for _ in range(20):
                copy(x, y)
                try:
                    copy(x, y, shift=1)
                except fp.InterpreterFinding as e:
                    found.setdefault((arch, seed), set()).add((e.arch, e.seed))

    jobs = [("sm_80", 1), ("sm_89", 2), ("sm_90a", 3)]
    threads = [threading.Thread(target=launch, args=job) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {job: {job} for job in jobs}


def python(code, **environment):
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_environment_interprets_every_thread():
    code = """
import threading, torch, forwardpass as fp
print(fp.explain("quantize", torch.ones(2, 8), torch.int8).backend)
t = threading.Thread(target=lambda: print(fp.dispatch.interpreter()))
t.start(); t.join()
with fp.interpret("sm_80") as device:
    print(fp.dispatch.interpreter() is device)
print(fp.dispatch.interpreter())
"""
    done = python(code, FORWARDPASS_INTERPRET="sm_89", FORWARDPASS_INTERPRET_SEED="5")
    first, second, third, fourth = done.stdout.splitlines()
    assert first in ("cuda", "triton"), done.stderr
    assert second == fourth == "<interpreted L40S (sm_89), seed 5>"
    assert third == "True"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"FORWARDPASS_INTERPRET": "sm_75"},
            "FORWARDPASS_INTERPRET: .*sm_80, sm_89, sm_90a, sm_100a, sm_120, not 'sm_75'",
        ),
        ({"FORWARDPASS_INTERPRET": "sm_80", "FORWARDPASS_INTERPRET_SEED": "-1"}, "SEED is an integer.*not '-1'"),
    ],
)
def test_the_environment_is_refused_in_a_sentence(environment, words):
    done = python("import forwardpass", **environment)
    assert done.returncode == 1
    assert re.search(words, done.stderr.splitlines()[-1])


def test_importing_forwardpass_does_not_import_the_interpreter():
    done = python("import sys, forwardpass; print([m for m in sys.modules if 'forwardpass.interpreter' in m])")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"arch": "sm_100"}, "sm_80, sm_89, sm_90a, sm_100a, sm_120, not 'sm_100'"),
        ({"arch": "sm_100a", "timeline": True}, "timeline=True knows no tcgen05"),
        ({"arch": "sm_90"}, "not 'sm_90'"),
        ({"seed": -1}, "seed is an integer"),
        ({"threads": -2}, "threads is a number"),
    ],
)
def test_what_interpret_refuses(arguments, words):
    with pytest.raises(ValueError, match=words), fp.interpret(**arguments):
        pass


def test_what_launches_refuse(words):
    x, y = words
    with pytest.raises(RuntimeError, match=r"within `with fp.interpret"):
        copy(x, y)
    kernel = Module(COPY)["copy"]
    with pytest.raises(KeyError, match="no kernel 'paste'; it has copy"):
        kernel.module["paste"]
    with fp.interpret("sm_80"):
        for args, error, said in [
            ([x, y], TypeError, "takes 3 arguments, not 2"),
            ([x, y, 2**32], OverflowError, "has 4 bytes"),
            ([x, y, b"12"], TypeError, "has 4 bytes, and a bytes of 2"),
            ([x, y, x], TypeError, "has 4 bytes, and a Tensor of 8"),
            ([x, y, "1"], TypeError, "not str"),
            ([x.to("meta"), y, 0], ValueError, "takes CPU tensors"),
        ]:
            with pytest.raises(error, match=said):
                kernel.launch(1, 32, args)
        with pytest.raises(ValueError, match="one to three numbers"):
            kernel.launch((1, 1, 1, 1), 32, [x, y, 0])
        with pytest.raises(RuntimeError, match=r"CUDA error 9 .*blocks of \(2048, 1, 1\) threads: .* 1024 together"):
            kernel.launch(1, 2048, [x, y, 0])
        with pytest.raises(RuntimeError, match=r"CUDA error 1 .*200000 bytes of dynamic .* block of sm_80 has 166912"):
            kernel.launch(1, 32, [x, y, 0], shared=200_000)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("bogus.u32 1;", "bogus.u32 is not known"),
        ("ld.param.u32 %r1, [no_such];", "no_such"),
        ("} ret;", "does not parse"),
    ],
)
def test_ptx_that_is_not_known_is_named(body, words):
    ptx = f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {{ .reg .b32 %r<2>;\n{body} }}"
    with fp.interpret("sm_80"), pytest.raises(fp.InterpreterFinding, match=words) as e:
        Module(ptx)["k"].launch(1, 32, [])
    assert (e.value.kind, e.value.ptx_line) == ("unsupported", 5)


def test_a_module_of_its_own_device(words):
    x, y = words
    Module(COPY, arch="sm_89")["copy"].launch(1, 32, [x, y, 0])
    assert torch.equal(x, y)


def test_guard_mode_sees_more(words):
    """A view's kernel may reach the rest of its storage, in guard mode only its elements."""
    big, y = torch.arange(64, dtype=torch.int32), words[1]
    with fp.interpret("sm_80"):
        copy(big[:32], y, shift=8)
    assert torch.equal(y, big[8:40])
    with fp.interpret("sm_80", guard=True), pytest.raises(fp.InterpreterFinding, match="argument 0 of copy") as e:
        copy(big[:32], y, shift=8)
    assert (e.value.kind, e.value.lane) == ("out_of_bounds", 24)


def test_guard_mode_copies_results_back_and_keeps_strides():
    rows = torch.arange(64, dtype=torch.int32).view(8, 8)
    y = torch.zeros(8, 8, dtype=torch.int32)[:, 0]  # stride 8: written as 32 words from the first on
    with fp.interpret("sm_80", guard=True):
        copy(rows[:4], flat := torch.zeros(32, dtype=torch.int32))
        assert torch.equal(flat, torch.arange(32, dtype=torch.int32))
        with pytest.raises(fp.InterpreterFinding, match="written outside of its elements: 112 bytes") as e:
            copy(rows[:4], y)
    assert e.value.kind == "out_of_bounds"


def test_guard_mode_keeps_what_arguments_share(words):
    x, _ = words
    with fp.interpret("sm_80", guard=True):
        copy(x[8:], x[:24], threads=24)  # in place: y[i] = x[i + 8], and every lane loads before it stores
    assert x.tolist() == [*range(8, 32), *range(24, 32)]


def test_tensor_maps_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="stride 1, not 16"):
        tensor_map(torch.zeros(16, 16).t(), (8, 8))
    with pytest.raises(ValueError, match="one number for each of the 2 dimensions"):
        tensor_map(torch.zeros(16, 16), (8,))
    with pytest.raises(ValueError, match=r"\[0, 32, 64, 128\]"):
        tensor_map(torch.zeros(16, 16), (8, 8), swizzle=16)
    with pytest.raises(TypeError, match="complex64"):
        tensor_map(torch.zeros(16, 16, dtype=torch.complex64), (8, 8))


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


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("_interpreter.so", "Unsupported: this installation has no interpreter .*; reinstall forwardpass"),
        ("_ops.so", "Unsupported: the op library did not load"),
        (
            "_kernels_interpreted.so",
            "Unsupported: quantize: cuda: built without CUDA kernels: .*; reinstall where `nvcc`",
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
        assert device.why_not("triton").code == "triton_interpret"


def test_an_old_cpu_is_told_so(monkeypatch):
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda self: "model name: old\nflags\t\t: fpu sse2 avx f16c\nbugs:\n"
    )
    reason = core.why_not.__wrapped__()
    assert reason.code == "cpu"
    assert "this one lacks avx2, bmi2, fma;" in str(reason)
