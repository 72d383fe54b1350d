"""Builds gpuless: a C++ compiler for its library, and the headers of a CUDA toolkit for what stands in for cudart. Environment:

GPULESS_BUILD_STRICT  1: a warning fails the build; 0 (default): it is printed
GPULESS_BUILD_HOST    1: the parser and the number formats as Python objects too, for tests: they bind the wheel to one Python;
                      needs pybind11
CXX                   default g++; a g++ >= 12, no clang++; arguments may follow ("ccache g++")
CUDA_HOME, MAX_JOBS   as everywhere

Without a toolkit (no nvcc on PATH, in CUDA_HOME or of PyPI) there is the library alone: Triton's kernels and PTX run, and
`python -m gpuless build` says that CUDA programs do not.
"""

import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
STRICT, HOST = (os.environ.get(f"GPULESS_BUILD_{name}", "0") == "1" for name in ("STRICT", "HOST"))
HEADERS = ("gpuless.h", "cudart.h", "profile.h")


def cxx():
    """The C++ compiler as a list of words; ends the build where it cannot be used."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    try:
        macros = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True
        ).stdout
    except OSError:
        sys.exit(f"gpuless: there is no C++ compiler {command[0]!r}: install g++, or set CXX to one")
    version = re.search(r"^#define __GNUC__ (\d+)$", macros, re.M)
    if "#define __clang__ " in macros or not version or int(version[1]) < 12:
        sys.exit(
            f"gpuless: it needs g++ 12 or later, and {shlex.join(command)} is none: apt install g++-12, and set CXX=g++-12"
        )
    if "#define __x86_64__ 1" not in macros or sys.platform != "linux":
        sys.exit(f"gpuless: it needs Linux on an x86-64 CPU with AVX2, and this builds for {platform.machine()}")
    return command


def cuda_home():
    """The toolkit root as nvcc itself reports it (a wrapper script on PATH fools a guess), else the PyPI one, else None."""
    env = os.environ.get("CUDA_HOME")
    if nvcc := shutil.which(f"{env}/bin/nvcc" if env else "nvcc"):
        dry = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
        if top := re.search(r"^#\$ TOP=(.*)$", subprocess.run(dry, capture_output=True, text=True).stderr, re.M):
            return pathlib.Path(top[1]).resolve()
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations if spec else ():
        if (home := pathlib.Path(base, "cu13")).joinpath("bin/nvcc").exists():
            return home
    return None


def major(home):
    """The toolkit's major version, by which libcudart.so is called: structures of cudart change with it."""
    return int(re.search(r"define CUDA_VERSION (\d+)", (home / "include/cuda.h").read_text())[1]) // 1000


def rules(out, home, version):
    """(the text of build.ninja, the number of files it compiles)"""
    q, compiler = shlex.quote, shlex.join(cxx())
    # Everything is compiled from here by its relative name: messages, line tables and depfiles name no folder of ours.
    # -ffp-contract=off, because the arithmetic says where an fma is.
    # build/ninja is first for precompiled.h.gch, which g++ takes in place of csrc/precompiled.h where it fits.
    compile_cxx = (f"{compiler} -MD -MF $out.d -std=c++20 -iquote build/ninja -iquote csrc -O3 -fPIC -fvisibility=hidden "
                   f"-Wall -Wextra{' -Werror' * STRICT} -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=off "
                   "$flags -c $in -o $out")  # fmt: skip
    text = [
        "ninja_required_version = 1.8\nbuilddir = build/ninja",
        f"rule cxx\n command = {compile_cxx}\n depfile = $out.d\n deps = gcc\n description = {compiler} $in",
        f"rule link\n command = {compiler} -shared $in $flags -o $out\n description = link $out",
        # One member, so that whoever needs a name of it gets what runs before main too.
        f"rule archive\n command = rm -f $out && {compiler} -r -nostdlib $in -o $flags && ar rcs $out $flags\n"
        " description = archive $out",
    ]

    def path(p):
        return re.sub(r"([$ :])", r"$\1", str(p))

    def objects(sources, flags="", after="", kind=""):
        outputs = []
        for s in sorted(sources):
            s = s.relative_to(ROOT)
            outputs.append(f"build/ninja/{kind}{str(s).replace('/', '.')}.o")
            extra = f" -DGPULESS_VERSION='\"{version}\"'" if s.name == "core.cpp" else ""
            text.append(f"build {outputs[-1]}: cxx {s}{after}\n flags = {flags}{extra}")
        return " ".join(outputs)

    csrc = ROOT / "csrc"
    # Its handlers are loops over 32 lanes, which want AVX2 (2013); the matrix products look for AVX-512 at run time.
    avx2 = "-march=x86-64-v3 -mtune=generic"
    text.append(f"build build/ninja/precompiled.h.gch: cxx csrc/precompiled.h\n flags = {avx2} -x c++-header")
    files = (*csrc.glob("*.cpp"), *csrc.glob("rows/*.cpp"), *csrc.glob("explore/*.cpp"))
    core = objects(files, f"{avx2} -include precompiled.h", " | build/ninja/precompiled.h.gch")
    exports = "-Wl,--version-script=csrc/exports.map"
    flags = f"{exports} -Wl,-soname,libgpuless.so -Wl,-Bsymbolic -Wl,-z,defs -lpthread"
    text.append(f"build {path(out / 'libgpuless.so')}: link {core} | csrc/exports.map\n flags = {flags}")
    if HOST:
        import pybind11

        python = sysconfig.get_path("include")
        if not pathlib.Path(python, "Python.h").exists():
            sys.exit(f"gpuless: GPULESS_BUILD_HOST=1 needs Python's headers, and {python} has no Python.h: install them "
                     "(apt install python3-dev), or leave the variable out")  # fmt: skip
        include = " ".join(f"-isystem {q(p)}" for p in (python, pybind11.get_include()))
        parser = " ".join(f"build/ninja/csrc.{name}.cpp.o" for name in ("parser", "types"))
        name = out / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
        text.append(
            f"build {path(name)}: link {objects(csrc.glob('python/*.cpp'), include)} {parser} | csrc/exports.map\n"
            f" flags = {exports} -Wl,-Bsymbolic"
        )
    if home:
        cuda = f"-isystem {q(f'{home}/include')}"
        standin = sorted(csrc.glob("standin/*.cpp"))
        program = objects([p for p in standin if p.stem == "program"], cuda)
        cudart = objects([p for p in standin if p.stem != "program"], cuda)
        cublas = objects(csrc.glob("standin/cublas/*.cpp"), f"{cuda} -march=x86-64-v3")
        # The same by name, for what opens libcuda.so.1 or cudart itself: NVRTC's users, Numba, TileLang.
        opened = objects([p for p in standin if p.stem != "program"], f"{cuda} -fvisibility=default", kind="driver.")
        exports = "csrc/standin/opened.map"
        for name, file in {"libcuda.so.1": "libcuda.so.1", f"libcudart.so.{major(home)}": "_cudart.so"}.items():
            text.append(
                f"build {path(out / file)}: link {opened} {path(out / 'libgpuless.so')} | {exports}\n"
                f" flags = -Wl,-soname,{name} -Wl,-Bsymbolic -Wl,-z,defs -Wl,-rpath,'$$ORIGIN'"
                f" -Wl,--version-script={exports}"
            )
        for name, members in {"_standin": f"{cudart} {program}", "_cudart": cudart, "_cublas": cublas}.items():
            text.append(f"build {path(out / name)}.a: archive {members}\n flags = build/ninja/{name}.o")
    return "\n".join(text) + "\n", sum(rule.startswith("build build/ninja/") for rule in text)


class Build(build_ext):
    """Writes build.ninja and runs it: libgpuless.so always; where there is a toolkit, what stands in for cudart and cuBLAS:
    _standin.a for programs, _cudart.a for libraries, _cublas.a for both, libcuda.so.1 and _cudart.so for what opens
    the libraries itself. _build.json says which."""

    def run(self):
        out = pathlib.Path(self.get_ext_fullpath("gpuless.libgpuless")).parent.resolve()
        home, version = cuda_home(), self.distribution.get_version()
        (ROOT / "build/ninja").mkdir(parents=True, exist_ok=True)
        (out / "include").mkdir(parents=True, exist_ok=True)
        for header in HEADERS:
            shutil.copy(ROOT / "csrc" / header, out / "include")
        if home is None:
            print(
                "gpuless: there is no CUDA toolkit here: building what runs Triton's kernels and PTX, and no CUDA programs"
            )
            for name in (
                "_standin.a",
                "_cudart.a",
                "_cudart.so",
                "libcuda.so.1",
                "_cublas.a",
            ):  # pip builds in the tree: an earlier build's would be shipped
                out.joinpath(name).unlink(missing_ok=True)
        text, count = rules(out, home, version)
        (ROOT / "build/ninja/build.ninja").write_text(text)
        import ninja

        jobs = os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))
        print(f"gpuless: {count} files, {jobs} at once", flush=True)
        ninja_program = pathlib.Path(ninja.BIN_DIR, "ninja")
        subprocess.check_call([ninja_program, "-f", "build/ninja/build.ninja", f"-j{jobs}"], cwd=ROOT)
        info = {"version": version, "programs": home is not None}
        out.joinpath("_build.json").write_text(json.dumps(info, indent=1) + "\n")


class Wheel(bdist_wheel):
    def get_tag(self):  # no Python C API in any other library: every Python 3 (free-threaded too), this platform
        python, abi, system = super().get_tag()
        return (python, abi, system) if HOST else ("py3", "none", system)


setup(ext_modules=[Extension("gpuless.libgpuless", [])], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
