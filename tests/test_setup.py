"""setup.py without compiling: what it names, what it refuses, and the rules that it gives ninja."""

import importlib.machinery
import importlib.util
import json
import pathlib
import platform
import re
import runpy
import shutil
import subprocess
import sys
import types

import pytest

import forwardpass as fp
from forwardpass.cli.console import print_examination

ROOT = pathlib.Path(__file__).parents[1]
VARIABLES = (
    "CUDA_HOME", "CUDAHOSTCXX", "CXX", "FORWARDPASS_BUILD_CUDA", "FORWARDPASS_BUILD_MACHINE_CODE", "FORWARDPASS_BUILD_STRICT",
    "FORWARDPASS_BUILD_TORCH", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No variable of ours is set, and nvcc is one of CUDA 13 that compiles nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "cuda"
    (home / "lib64").mkdir(parents=True)
    script(
        home / "bin/nvcc",
        f"""case "$1" in
--dryrun) echo '#$ TOP={home}' >&2;;
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
--list-gpu-arch) for a in 75 80 86 89 90 100 120; do echo compute_$a; done;;
esac""",
    )
    monkeypatch.setenv("CUDA_HOME", str(home))


@pytest.fixture
def setup_py(clean, monkeypatch):
    """What setup.py defines, where these variables are set."""

    def load(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
        setuptools = pytest.importorskip("setuptools")
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        return types.SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))

    return load


def run(*arguments, **variables):
    """setup.py, by a Python with no site-packages."""
    return subprocess.run([sys.executable, "-S", "setup.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={"PATH": "/nonexistent", **variables})  # fmt: skip


def test_toolchain_needs_the_standard_library_alone():
    done = run("toolchain")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # a requirements file: one package a line
    assert lines[0].startswith("nvidia-cuda-nvcc==13.")
    assert len(lines) == 5 and not any(" " in line for line in lines)
    assert run("toolchain", FORWARDPASS_BUILD_CUDA="0").stdout == ""


def test_toolchain_of_a_torch_for_cuda_12_says_what_to_install(tmp_path):
    """nvidia-cuda-nvcc-cu12 contains no nvcc."""
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("cuda = '12.8'\n")
    done = run("toolchain", PYTHONPATH=str(tmp_path))
    assert (
        done.returncode == 0 and done.stdout == ""
    )  # an empty requirements file, and the build goes on without kernels
    (said,) = done.stderr.splitlines()
    assert "torch was built for CUDA 12.8" in said and "set CUDA_HOME" in said and "CUDA 12 toolkit" in said
    assert run("toolchain", PYTHONPATH=str(tmp_path), FORWARDPASS_BUILD_CUDA="0").stderr == ""


@pytest.mark.parametrize("version", [None, "68.1.2"])
def test_a_missing_or_old_setuptools_is_one_sentence(tmp_path, version):
    if version:
        (tmp_path / "setuptools.py").touch()
        info = tmp_path / f"setuptools-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: setuptools\nVersion: {version}\n")
    done = run("bdist_wheel", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert f"setuptools {version or 'is missing'}" in said and "-m pip install 'setuptools>=77'" in said
    assert run("toolchain", PYTHONPATH=str(tmp_path)).returncode == 0


@pytest.mark.parametrize(
    ("listed", "built", "left_out"),
    [
        ("", ["80", "89", "90a", "120"], []),
        ("all", ["80", "89", "90a", "120"], []),
        ("all 8.6", ["80", "89", "90a", "120", "86"], []),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["80", "86", "90a", "100", "120"], ["7.5 (the kernels need 8.0 or later)"]),
        ("9.0;9.0a ", ["90a"], []),
        ("Ampere;Hopper+PTX", ["80", "86", "90a"], []),
        ("10.0a, 12.1", ["100"], ["12.1 (nvcc 13.0 does not know it)"]),
    ],
)
def test_architectures(setup_py, listed, built, left_out):
    made = setup_py(TORCH_CUDA_ARCH_LIST=listed)
    assert made.arches() == (built, left_out)
    hopper = made.gencode(ROOT / "csrc/kernels/attention/table_sm90a.cu")
    assert hopper == (["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"] if "90a" in built else [])


@pytest.mark.parametrize(
    ("listed", "quantize", "fp8"),
    [
        (
            "8.0 9.0 12.0",
            ["80,code=[sm_80,compute_80]", "90,code=[sm_90,sm_120,compute_90]"],
            ["90,code=[sm_120,compute_90]"],
        ),
        ("8.9 12.0", *[["89,code=[sm_89,compute_89]", "120,code=[sm_120,compute_120]"]] * 2),
        ("9.0a", ["90,code=[sm_90,compute_90]"], []),  # for that GPU alone, which never runs table_fp8_sm89.cu
    ],
)
def test_code_for_blackwell_is_made_of_ptx_for_hopper(setup_py, listed, quantize, fp8):
    made = setup_py(TORCH_CUDA_ARCH_LIST=listed)
    for name, flags in (("quantize/quantize_sm80.cu", quantize), ("gemm/table_fp8_sm89.cu", fp8)):
        assert made.gencode(ROOT / "csrc/kernels" / name) == [f"-gencode=arch=compute_{f}" for f in flags]


def test_without_machine_code_there_is_ptx_of_the_same_architectures(setup_py):
    made = setup_py(TORCH_CUDA_ARCH_LIST="8.0 9.0a 12.0", FORWARDPASS_BUILD_MACHINE_CODE="0")
    quantize = made.gencode(ROOT / "csrc/kernels/quantize/quantize_sm80.cu")
    assert quantize == [f"-gencode=arch=compute_{a},code=[compute_{a}]" for a in ("80", "90")]
    hopper = made.gencode(ROOT / "csrc/kernels/attention/table_sm90a.cu")
    assert hopper == ["-gencode=arch=compute_90a,code=[compute_90a]"]


def test_8_9_has_code_of_its_own_where_e4m3_is_converted(setup_py):
    """Else it runs that for 8.0 (tests/gates/ada_gates.py compares them)."""
    sources = [(p.name.removesuffix("_sm80.cu"), p) for p in (ROOT / "csrc/kernels").rglob("*_sm80.cu")]
    names, own = {name for name, _ in sources}, set(setup_py().OWN_CODE_ON_89)
    assert {"table_modified", "table_int8", "pad_rows"} <= names - own and own <= names
    for listed, arches in (("8.0 8.9", ["80"]), ("8.9", ["89"])):
        made = setup_py(TORCH_CUDA_ARCH_LIST=listed)
        for name, source in sources:
            flags = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in arches]
            if name in own and listed == "8.0 8.9":
                flags.append("-gencode=arch=compute_89,code=[sm_89,compute_89]")
            assert made.gencode(source) == flags, name


@pytest.mark.parametrize(
    ("cuda", "gpus", "built"),
    [
        ("13.0", [], ["80", "89", "90a", "120"]),
        ("13.0", [(9, 0)], ["90a"]),
        ("13.0", [(8, 9), (8, 6), (8, 9)], ["89", "86"]),
        ("13.0", [(7, 5), (8, 0)], ["80"]),
        ("13.0", [(7, 5)], ["80", "89", "90a", "120"]),
        ("13.0", [(12, 1)], ["80", "89", "90a", "120"]),  # this nvcc does not know it, and it runs the code for 12.0
        (None, [(9, 0)], ["80", "89", "90a", "120"]),  # a CPU build of torch sees no GPU
        ("13.0", None, ["80", "89", "90a", "120"]),  # and one that cannot be imported
    ],
    ids=str,
)
def test_the_gpus_that_torch_finds_are_the_default(setup_py, monkeypatch, tmp_path, cuda, gpus, built):
    folder = tmp_path / "site/torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: str = {cuda!r}\n")
    (folder / "__init__.py").write_text(
        f"""class cuda:
    device_count = staticmethod(lambda: len({gpus}))
    get_device_capability = staticmethod(lambda i: {gpus}[i])
"""
    )
    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None, is_package=True)
    torch.__spec__.submodule_search_locations.append(str(folder))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    assert setup_py().arches() == (built, [])
    assert setup_py(TORCH_CUDA_ARCH_LIST="8.0").arches() == (["80"], [])
    assert setup_py(TORCH_CUDA_ARCH_LIST="all").arches()[0] == ["80", "89", "90a", "120"]


def test_architectures_that_are_all_too_old(setup_py):
    made = setup_py(TORCH_CUDA_ARCH_LIST="7.0;7.5")
    assert "nothing can be built: 7.0 (the kernels need 8.0 or later); 7.5 (the" in made.why_no_cuda()


def test_an_architecture_that_is_none(setup_py):
    with pytest.raises(SystemExit, match=r"8\.0, 9\.0a or 8\.9\+PTX, or are of .*Hopper.*, not 'Hoper'"):
        setup_py(TORCH_CUDA_ARCH_LIST="8.0 Hoper").arches()


def test_doctor_names_the_architectures_that_were_left_out(monkeypatch):
    from rich.console import Console

    info = {
        "torch": "2",
        "nvcc": "13.0",
        "arches": ["sm_80"],
        "arches_left_out": ["7.5 (the kernels need 8.0 or later)"],
    }
    found = {"versions": {}, "build": info, "driver": {"needed": None, "present": None}, "nvcc": None, "gpus": [],
             "device": {"name": "a CPU", "capability": "AVX2", "int8": None, "threads": 2, "cores": 2}, "problems": [],
             "kernels": [{"operation": "quantize", "backend": "cpu", "code": None, "parity": None}],
             "interpreter": {"problem": "none"}}  # fmt: skip
    console = Console(width=300, record=True, quiet=False)
    print_examination(found, console)
    printed = " ".join(console.export_text().split())
    assert "CUDA 13.0 for sm_80, without 7.5 (the kernels need 8.0 or later)" in printed


def test_a_build_without_gpuless_says_so_and_leaves_no_library_for_it(setup_py, monkeypatch, tmp_path, capsys):
    """What an earlier build made for gpuless would be shipped."""
    made = setup_py()
    out, run = tmp_path / "out", made.Build.run
    stale = script(out / "_kernels_interpreted.so", "")
    monkeypatch.setitem(run.__globals__, "ROOT", tmp_path)
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    monkeypatch.setitem(run.__globals__, "gpuless", lambda: (None, "gpuless is not there"))
    monkeypatch.setattr(subprocess, "check_call", lambda command, cwd: None)
    run(
        types.SimpleNamespace(
            get_ext_fullpath=lambda _: out / "_ops.so", distribution=types.SimpleNamespace(get_version=str)
        )
    )
    assert not stale.exists()
    assert "building no CUDA kernels for gpuless: gpuless is not there" in capsys.readouterr().out
    info = json.loads((out / "_build.json").read_text())
    assert (info["gpuless"], info["gpuless_skipped"]) == (None, "gpuless is not there")


def rules(made, tmp_path):
    text, count = made.rules(tmp_path / "out", tmp_path, None if made.why_no_cuda() else made.cuda_home())
    assert count == text.count("\nbuild build/ninja/")
    return text


def command(text, rule):
    return text.partition(f"rule {rule}\n command = ")[2].partition("\n")[0]


def test_cxx_may_have_arguments_and_is_the_host_compiler_of_nvcc(setup_py, tmp_path):
    compiler = script(tmp_path / "my cache", 'exec "$@"')
    text = rules(setup_py(CXX=f"'{compiler}' g++ -pipe"), tmp_path)
    for rule in ("cxx", "link"):
        assert command(text, rule).startswith(f"'{compiler}' g++ -pipe ")
    assert f"bin/nvcc -ccbin {tmp_path}/host-c++ " in command(text, "nvcc")
    done = subprocess.run([tmp_path / "host-c++", "-dumpmachine"], capture_output=True, text=True)
    assert done.stdout.startswith(platform.machine())


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({}, None),
        ({"CXX": "g++"}, "g++"),
        ({"CXX": "g++", "CUDAHOSTCXX": "/usr/bin/g++-13"}, "/usr/bin/g++-13"),
        ({"CUDAHOSTCXX": "/usr/bin/g++-13", "NVCC_CCBIN": "/usr/bin/g++-12"}, "/usr/bin/g++-12"),
        ({"CXX": "g++", "NVCC_PREPEND_FLAGS": "-ccbin=g++"}, None),  # conda's activation sets both
    ],
)
def test_the_host_compiler_of_nvcc(setup_py, tmp_path, variables, host):
    text = command(rules(setup_py(**variables), tmp_path), "nvcc")
    assert ("bin/nvcc -MD" if host is None else f"bin/nvcc -ccbin {host} -MD") in text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("case $1 in -dumpmachine) echo arm64-apple-darwin24.1.0;; esac", "for Linux only, .* for arm64-apple-darwin"),
        ("exit 1", "does not answer -dumpmachine"),
        ("case $1 in -dumpmachine) echo x86_64-linux-gnu;; *) echo '#define __GNUC__ 11';; esac", r"is g\+\+ 11: apt .* CXX="),
        ("case $1 in -dumpmachine) echo x86_64-pc-linux-gnu;; *) printf '#define __GNUC__ 4\\n#define __clang__ 1\\n"
         "#define __clang_major__ 19\\n';; esac", r"need g\+\+ 12 or later, .* is clang\+\+ 19"),
        (None, r"there is no C\+\+ compiler"),
    ],
)  # fmt: skip
def test_a_compiler_that_cannot(setup_py, tmp_path, asked, words):
    compiler = tmp_path / "c++"
    if asked:
        script(compiler, asked)
    with pytest.raises(SystemExit, match=words):
        setup_py(CXX=str(compiler)).cxx()


@pytest.mark.parametrize("strict", ["0", "1"])
def test_warnings_stop_a_strict_build_only(setup_py, tmp_path, strict):
    text = rules(setup_py(FORWARDPASS_BUILD_STRICT=strict), tmp_path)
    assert [command(text, rule).count("-Werror") for rule in ("cxx", "nvcc")] == ([1, 2] if strict == "1" else [0, 0])
    # the rule as a shell sees it, with an nvcc that has nothing to say, then something
    line = command(text, "nvcc").replace("$out", "o").replace("$$", "$").replace("$flags -c $in", "")
    said = "ptxas info : (C7510) wgmma serialized"
    for message, code in (("", 0), (said, int(strict))):
        script(tmp_path / "cuda/bin/nvcc", f"printf '{message}'")
        done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, message)


def aarch64(path):
    text = "case $1 in -dumpmachine) echo aarch64-linux-gnu;; *) echo '#define __GNUC__ 14';; esac"
    return str(script(path / "aarch64-linux-gnu-g++", text))


def test_another_machine(setup_py, monkeypatch, tmp_path):
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    made = setup_py(CXX=aarch64(tmp_path), FORWARDPASS_BUILD_TORCH=str(torch))
    assert "build on aarch64 to have them" in made.why_no_cuda()
    text = rules(made, tmp_path)
    assert f"-L{torch}/lib" in text and "_ops.so" in text
    assert "x86-64" not in text and "_kernels" not in text
    wheel = made.Wheel(__import__("setuptools").Distribution({"name": "x"}))
    wheel.ensure_finalized()
    assert wheel.get_tag() == ("py3", "none", "linux_aarch64")


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (None, "gpuless was not installed where it was built"),
        ((), "the gpuless there was built without a CUDA toolkit"),
        (("_cudart.a",), "9.9"),
    ],
)
def test_gpuless_is_linked_against_where_it_is_installed(setup_py, monkeypatch, tmp_path, parts, why):
    folder = tmp_path / "site" / "gpuless"
    if parts is not None:
        folder.mkdir(parents=True)
        folder.joinpath("__init__.py").touch()
        folder.joinpath("_build.json").write_text('{"version": "9.9"}')
        for part in parts:
            folder.joinpath(part).touch()
    found = importlib.util.find_spec
    spec = importlib.machinery.PathFinder.find_spec("gpuless", [str(tmp_path / "site")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "gpuless" else found(name, *a))
    made = setup_py()
    assert made.gpuless() == (folder if parts else None, why)
    text = rules(made, tmp_path)
    assert "_kernels.so: link" in text
    assert ("_kernels_interpreted.so: link" in text) == (f"{folder}/libgpuless.so" in text) == bool(parts)


def test_linux_only(clean, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(SystemExit, match="it is for Linux only, and this is Darwin"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_the_libraries_need_no_glibc_after_2_34():
    """That of Red Hat 9 and Ubuntu 22.04: the wheel's tag is made from these (atoi binds to 2.38 where there is one)."""
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    for library in fp.dispatch.library.FOLDER.glob("_*.so"):
        said = subprocess.run(["readelf", "-W", "-V", library], capture_output=True, text=True, check=True).stdout
        needed = [int(minor) for minor in re.findall(r"Name: GLIBC_2\.(\d+)", said)]
        assert needed and max(needed) <= 34, library.name


def test_the_libraries_export_their_c_functions_alone():
    """Any other name could be replaced by another library's, and replace it there."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    for library in fp.dispatch.library.FOLDER.glob("_*.so"):
        table = subprocess.run(
            ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
        ).stdout
        names = [line.split()[-1] for line in table.splitlines()]
        assert [n for n in names if not n.startswith("forwardpass_")] == [], library.name


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_refuses_a_python_without_the_pinned_packages(tmp_path, monkeypatch):
    old = f"""case "$1" in
-c) exec {sys.executable} -c 'import sys; sys.version_info = (3, 10, 13, "final", 0); exec(sys.argv[1])' "$2";;
*) exit 99;;
esac"""
    command = ["make", "-W", "constraints.txt", ".venv/cpu", f"PYTHON={script(tmp_path / 'python3', old)}"]
    for name in ("MAKEFLAGS", "MAKELEVEL"):  # of the make that runs the tests
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (said, stopped) = done.stderr.splitlines()
    assert done.returncode == 2 and stopped.startswith("make: ***") and done.stdout == ""
    assert said == (
        "make: the versions in constraints.txt need Python 3.11 or later, and "
        f"{tmp_path}/python3 is 3.10: name another, as in make demo PYTHON=python3.12"
    )


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("fails", [(), ("python",), ("mypy",), ("ruff", "python")], ids=str)
def test_make_test_fails_if_the_tests_or_lint_do(tmp_path, monkeypatch, fails):
    """And runs both, whichever fails; lint's output comes last."""
    for name in ("MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("csrc", "interpreter/csrc", "python", "interpreter/python"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
        (tmp_path / "interpreter" / name).touch()
    for tool in ("python", "ruff", "clang-format", "mypy"):
        script(tmp_path / ".venv/bin" / tool, f"echo {tool} ran; exit {int(tool in fails)}")
    for name in ("cpu", "dev"):
        (tmp_path / ".venv" / name).touch()
    done = subprocess.run(["make", "test"], cwd=tmp_path, capture_output=True, text=True)
    assert bool(done.returncode) == bool(fails), done.stderr
    tests, lint = done.stdout.index("python ran"), done.stdout.index("ruff ran")
    assert tests < lint and ("mypy ran" in done.stdout) == ("ruff" not in fails)
    assert ("make lint FAILED" in done.stdout) == bool({"mypy", "ruff"} & {*fails})
