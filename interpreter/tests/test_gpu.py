"""gpuless.gpu and what hangs on it: what is refused, and what is restored."""

import pathlib
import pickle
import re
import subprocess
import sys
import threading

import pytest
import torch
from api_kernels import COPY

import gpuless
from gpuless import Module, core, current, tensor_map

pytestmark = pytest.mark.interpreted


def copy(x, y, shift=0, threads=32):
    Module(COPY)["copy"].launch(1, threads, [x, y, shift])


@pytest.fixture
def words():
    return torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)


def test_a_module_runs_what_it_was_given(words):
    x, y = words
    with gpuless.gpu("sm_80") as device:
        copy(x, y)
    assert torch.equal(x, y)
    assert device.counters["launches"] == 1
    assert device.counters["warp_instructions"] >= 10
    assert device.findings == []


def test_a_finding_has_its_place_and_the_way_to_repeat_it(words):
    x, y = words
    with gpuless.gpu("sm_89", seed=7) as device, pytest.raises(gpuless.Finding, match="argument 0 of copy") as e:
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
    with gpuless.gpu("sm_80") as device:
        copy(x, y)
        with pytest.raises(gpuless.Finding) as e:
            copy(x.data_ptr(), y)  # an address, and whose it is was forgotten
        assert e.value.kind == "out_of_bounds"
        device.register(x, "the table")
        copy(x.data_ptr(), y)


def test_the_core_follows():
    device = core.load().gpuless_device
    device.restype = core.c_char_p
    with gpuless.gpu("sm_90a"):
        with gpuless.gpu("sm_80"):
            assert device() == b"sm_80"
        assert device() == b"sm_90a"
    assert not device()


def test_threads_have_devices_of_their_own(words):
    """Launches take turns; each is on its thread's device."""
    found = {}

    def launch(arch, seed):
        x, y = words[0].clone(), words[1].clone()
        with gpuless.gpu(arch, seed=seed):
            for _ in range(20):
                copy(x, y)
                try:
                    copy(x, y, shift=1)
                except gpuless.Finding as e:
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


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"GPULESS_ARCH": "sm_75"},
            "GPULESS_ARCH: .*sm_80, sm_89, sm_90a, sm_100a, sm_120, not 'sm_75'",
        ),
        ({"GPULESS_ARCH": "sm_80", "GPULESS_SEED": "-1"}, "SEED is an integer.*not '-1'"),
    ],
)
def test_the_environment_is_refused_in_a_sentence(environment, words):
    done = python("import gpuless", **environment)
    assert done.returncode == 1
    assert re.search(words, done.stderr.splitlines()[-1])


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
def test_what_gpu_refuses(arguments, words):
    with pytest.raises(ValueError, match=words), gpuless.gpu(**arguments):
        pass


def test_what_launches_refuse(words):
    x, y = words
    with pytest.raises(RuntimeError, match=r"within `with gpuless.gpu"):
        copy(x, y)
    kernel = Module(COPY)["copy"]
    with pytest.raises(KeyError, match="no kernel 'paste'; it has copy"):
        kernel.module["paste"]
    with gpuless.gpu("sm_80"):
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
    with gpuless.gpu("sm_80"), pytest.raises(gpuless.Finding, match=words) as e:
        Module(ptx)["k"].launch(1, 32, [])
    assert (e.value.kind, e.value.ptx_line) == ("unsupported", 5)


def test_a_module_of_its_own_device(words):
    x, y = words
    Module(COPY, arch="sm_89")["copy"].launch(1, 32, [x, y, 0])
    assert torch.equal(x, y)


def test_guard_mode_sees_more(words):
    """A view's kernel may reach the rest of its storage, in guard mode only its elements."""
    big, y = torch.arange(64, dtype=torch.int32), words[1]
    with gpuless.gpu("sm_80"):
        copy(big[:32], y, shift=8)
    assert torch.equal(y, big[8:40])
    with gpuless.gpu("sm_80", guard=True), pytest.raises(gpuless.Finding, match="argument 0 of copy") as e:
        copy(big[:32], y, shift=8)
    assert (e.value.kind, e.value.lane) == ("out_of_bounds", 24)


def test_guard_mode_copies_results_back_and_keeps_strides():
    rows = torch.arange(64, dtype=torch.int32).view(8, 8)
    y = torch.zeros(8, 8, dtype=torch.int32)[:, 0]  # stride 8: written as 32 words from the first on
    with gpuless.gpu("sm_80", guard=True):
        copy(rows[:4], flat := torch.zeros(32, dtype=torch.int32))
        assert torch.equal(flat, torch.arange(32, dtype=torch.int32))
        with pytest.raises(gpuless.Finding, match="written outside of its elements: 112 bytes") as e:
            copy(rows[:4], y)
    assert e.value.kind == "out_of_bounds"


def test_guard_mode_keeps_what_arguments_share(words):
    x, _ = words
    with gpuless.gpu("sm_80", guard=True):
        copy(x[8:], x[:24], threads=24)  # in place: y[i] = x[i + 8], and every lane loads before it stores
    assert x.tolist() == [*range(8, 32), *range(24, 32)]


def test_tensor_maps_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="stride 1, not 16"):
        tensor_map(torch.zeros(16, 16).t(), (8, 8))
    with pytest.raises(ValueError, match="one number for each of the 2 dimensions"):
        tensor_map(torch.zeros(16, 16), (8,))
    with pytest.raises(ValueError, match=r"\[0, 32, 64, 128, \(128, 32\)\]"):
        tensor_map(torch.zeros(16, 16), (8, 8), swizzle=16)
    with pytest.raises(TypeError, match="complex64"):
        tensor_map(torch.zeros(16, 16, dtype=torch.complex64), (8, 8))


def test_an_old_cpu_is_told_so(monkeypatch):
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda self: "model name: old\nflags\t\t: fpu sse2 avx f16c\nbugs:\n"
    )
    reason = core.why_not.__wrapped__()
    assert "this one lacks avx2, bmi2, fma:" in reason


def test_blocks_nest_and_are_left(words):
    assert current.device_or_none() is None
    with gpuless.gpu("sm_90a") as outer:
        with gpuless.gpu("sm_80") as inner:
            assert current.device() is inner
        assert current.device() is outer
    with pytest.raises(KeyError), gpuless.gpu("sm_80"):
        raise KeyError
    assert current.device_or_none() is None
    with pytest.raises(RuntimeError, match="no GPU is interpreted in this thread"):
        copy(*words)


def test_the_environment_is_for_every_thread():
    code = """
import threading, gpuless
from gpuless import current
print(current.device())
t = threading.Thread(target=lambda: print(current.device()))
t.start(); t.join()
with gpuless.gpu("sm_80") as device:
    print(current.device() is device)
"""
    done = python(code, GPULESS_ARCH="sm_89", GPULESS_SEED="5")
    first, second, third = done.stdout.splitlines()
    assert first == second == "<interpreted L40S (sm_89), seed 5>" and third == "True", done.stderr


def test_a_device_for_the_process_is_told_to_whoever_asks():
    code = """
import gpuless
from gpuless import current, device
seen = []
current.when_everywhere(seen.append)
device.install_process(gpu := device.make("sm_80"))
current.when_everywhere(seen.append)
print(seen == [gpu, gpu])
"""
    assert python(code).stdout == "True\n"


def test_no_torch_comes_with_the_import():
    done = python(
        "import sys, gpuless, gpuless.core, gpuless.commands.build, gpuless.__main__; print('torch' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr
    assert {*dir(gpuless)} == {*gpuless.__all__, "__version__"}
    assert all(getattr(gpuless, name) for name in gpuless.__all__)


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(core, "__version__", "99")
    assert "libgpuless.so is of gpuless" in core.why_not.__wrapped__()
