"""Builds forwardpass: g++ for the torch side and the CPU kernels, nvcc for the CUDA kernels, ninja to drive both.

No GPU is needed, and any torch >= 2.11 serves (CPU or CUDA). torch's CUDAExtension is not used: it wants a CUDA torch
and guesses CUDA_HOME. Environment:

FORWARDPASS_BUILD_CUDA  auto (default): CUDA kernels where there is an nvcc; 1: required; 0: none, earlier ones removed
TORCH_CUDA_ARCH_LIST    default "8.0 8.9 9.0a"; every entry's PTX is there, with or without "+PTX"
CUDA_HOME, MAX_JOBS     as everywhere
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).parent.resolve()
# setuptools before 77 cannot read this pyproject.toml; for metadata and an sdist it is all that is needed
NEEDED = {"setuptools": "77", "ninja": "1.10", "torch": "2.11"}
BUILDING = not {"egg_info", "sdist", "dist_info", "toolchain", "--version", "--help"} & set(sys.argv[1:])


def release(text):
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def require_build_tools():
    """pip's --no-build-isolation checks nothing, and its users see the first ImportError: say all of it at once."""
    found = {}
    for name in NEEDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    bad = {n: v for n, v in found.items() if v is None or release(v) < release(NEEDED[n])}
    if (BUILDING and bad) or "setuptools" in bad:
        has = ", ".join(f"{n} {v or 'is missing'}" for n, v in bad.items())
        fix = " ".join(f"'{n}>={NEEDED[n]}'" for n in bad)
        sys.exit(f"forwardpass: the build needs {', '.join(f'{n} >= {v}' for n, v in NEEDED.items())}; here {has}. "
                 f"Run: {sys.executable} -m pip install {fix}")  # fmt: skip


if "toolchain" not in sys.argv:  # asked before there is a setuptools
    require_build_tools()

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

WANT_CUDA = os.environ.get("FORWARDPASS_BUILD_CUDA", "auto")
if WANT_CUDA not in ("auto", "0", "1"):
    sys.exit(f"forwardpass: FORWARDPASS_BUILD_CUDA is auto, 0 or 1, not {WANT_CUDA!r}")
# the interpreter's host-only objects in Python (csrc/interpreter/python), which bind the wheel to one Python version
WANT_HOST = os.environ.get("FORWARDPASS_BUILD_INTERPRETER", "0")
if WANT_HOST not in ("0", "1"):
    sys.exit(f"forwardpass: FORWARDPASS_BUILD_INTERPRETER is 0 or 1, not {WANT_HOST!r}")


def torch_cuda_major():
    """The CUDA major of the torch we build beside, None for a CPU torch: its driver must be able to run our kernels."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = pathlib.Path(spec.submodule_search_locations[0], "version.py").read_text()
    cuda = re.search(r"^cuda(?:: .*)? = '(\d+)", text, re.M)
    return int(cuda[1]) if cuda else None


# nvcc with everything that it calls, no more; the cu12 names are those of CUDA 12
TOOLCHAINS = {
    13: ["nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-cuda-runtime==13.0.96",
         "nvidia-nvvm==13.0.88", "nvidia-cuda-cccl==13.0.85"],
    12: ["nvidia-cuda-nvcc-cu12>=12.8,<13", "nvidia-cuda-runtime-cu12>=12.8,<13", "nvidia-cuda-cccl-cu12>=12.8,<13"],
}  # fmt: skip
TOOLCHAIN = TOOLCHAINS.get(torch_cuda_major() or 13, TOOLCHAINS[13])


@functools.cache
def cuda_home():
    """The toolkit root as nvcc itself reports it (a wrapper script on PATH fools a guess), else the PyPI one, else None."""
    env = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{env}/bin/nvcc" if env else "nvcc")
    if nvcc:
        dry = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
        if top := re.search(r"^#\$ TOP=(.*)$", subprocess.run(dry, capture_output=True, text=True).stderr, re.M):
            return pathlib.Path(top[1]).resolve()
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations if spec else ():
        for name in ("cu13", "cuda_nvcc"):
            if (home := pathlib.Path(base, name)).joinpath("bin/nvcc").exists():
                return home
    return None


def nvcc_release(home):
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def why_no_cuda():
    """None, or the sentence that says why this build has no CUDA kernels; with FORWARDPASS_BUILD_CUDA=1 it is fatal."""
    if WANT_CUDA == "0":
        return "FORWARDPASS_BUILD_CUDA=0"
    if cuda_home() is None:
        return f"there is no nvcc: set CUDA_HOME, or run {sys.executable} -m pip install {' '.join(TOOLCHAIN)}"
    major, torch_major = int(nvcc_release(cuda_home()).split(".")[0]), torch_cuda_major()
    if torch_major and major != torch_major:
        return (f"nvcc in {cuda_home()} is CUDA {major}, torch was built for CUDA {torch_major}, and its driver may not run "
                f"the other's kernels: set CUDA_HOME to a CUDA {torch_major} toolkit")  # fmt: skip
    return None


def arches():
    """["80"] from TORCH_CUDA_ARCH_LIST."""
    found = []
    for entry in re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 8.9 9.0a"):
        m = re.fullmatch(r"(\d+)\.(\d)(a|f)?(?:\+PTX)?", entry)
        if not m:
            sys.exit(f"forwardpass: TORCH_CUDA_ARCH_LIST entries look like 8.0, 9.0a or 8.9+PTX, not {entry!r}")
        found.append(m[1] + m[2] + (m[3] or ""))
    if min(int(a.rstrip("af")) for a in found) < 80:
        sys.exit(
            "forwardpass: the kernels need compute capability 8.0 (A100) or later; remove older TORCH_CUDA_ARCH_LIST entries"
        )
    return found


def gencode(source):
    """-gencode flags of one file: its name says the lowest architecture that runs it (…_sm80.cu; …_sm90a.cu: that one only).

    A file without an "a" is portable: built for the plain architectures. PTX comes with each: the interpreter runs it, and
    of the highest plain one the driver makes code for GPUs that came later (Blackwell).
    """
    minimum = re.search(r"_sm(\d+a?)\.cu$", source.name)[1]
    if minimum.endswith("a"):
        mine = [a for a in arches() if a == minimum]
    else:
        mine = sorted({int(a.rstrip("af")) for a in arches() if int(a.rstrip("af")) >= int(minimum)})
    # On 9.0 an operation's kernels for 9.0a run; of its portable ones there is PTX, for later GPUs and for builds without
    # 9.0a. (fp8 mma.sync is emulated on 9.0, and spills.)
    own = source.with_name(re.sub(r"_sm\d+a?\.cu$", "_sm90a.cu", source.name)).exists()
    return [f"-gencode=arch=compute_{a},code=[{'' if own and a == 90 else f'sm_{a},'}compute_{a}]" for a in mine]


def jobs(sources):
    """One g++ or nvcc process needs about 1.5 GB here (measured: 0.9 for a stable-ABI file, 0.6 for a kernel)."""
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free, cores = pages * size / 2**30, len(os.sched_getaffinity(0))
    wanted = int(os.environ.get("MAX_JOBS") or cores)
    n = max(1, min(wanted, int(free * 0.8 / 1.5), sources))
    print(f"forwardpass: {n} jobs = min({wanted} {'MAX_JOBS' if os.environ.get('MAX_JOBS') else 'cores'}, "
          f"0.8 * {free:.1f} GiB free / 1.5 GiB a job, {sources} files)", flush=True)  # fmt: skip
    return n


class Build(build_ext):
    """Writes build.ninja and runs it: _ops.so and _interpreter.so always, where there is an nvcc the kernels, twice
    (_kernels.so, _kernels_interpreted.so), and the stand-in for programs (_standin.a); _build.json for `doctor`."""

    def run(self):
        out = pathlib.Path(self.get_ext_fullpath("forwardpass._ops")).parent.resolve()
        obj = ROOT / "build" / "ninja"  # build_temp is new with each pip: nothing would be incremental
        skipped = why_no_cuda()
        if skipped and WANT_CUDA == "1":
            sys.exit(f"forwardpass: FORWARDPASS_BUILD_CUDA=1, but {skipped}")
        for folder in (out, obj):
            folder.mkdir(parents=True, exist_ok=True)
        if skipped:  # pip builds in the tree: an earlier build's kernels would be shipped
            for name in ("_kernels.so", "_kernels_interpreted.so", "_standin.a"):
                out.joinpath(name).unlink(missing_ok=True)
            print(f"forwardpass: building without CUDA kernels: {skipped}", flush=True)
        rules, count = self.ninja(out, None if skipped else cuda_home())
        obj.joinpath("build.ninja").write_text(rules)
        import ninja

        subprocess.check_call(
            [pathlib.Path(ninja.BIN_DIR, "ninja"), "-f", obj / "build.ninja", f"-j{jobs(count)}"], cwd=ROOT
        )
        import torch

        info = {"version": self.distribution.get_version(), "torch": torch.__version__, "cuda_skipped": skipped,
                "nvcc": None if skipped else nvcc_release(cuda_home()),
                "arches": [] if skipped else [f"sm_{a}" for a in arches()]}  # fmt: skip
        out.joinpath("_build.json").write_text(json.dumps(info, indent=1) + "\n")

    def ninja(self, out, home):
        """(the text of build.ninja, the number of files it compiles)"""
        import torch

        q = shlex.quote  # for the shell; ninja quotes $in and $out itself
        t = pathlib.Path(torch.__file__).parent
        # Everything is compiled from the root by its relative name: messages, line tables and depfiles name no folder of ours.
        common = "-MD -MF $out.d -std=c++17 -Icsrc"
        include = f"{t}/include"  # torch's headers put __FILE__ into messages too
        # -ffp-contract=off, because the formulas say where an fma is
        cxx = (f"g++ {common} -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-psabi -fno-math-errno "
               f"-fno-trapping-math -ffp-contract=off -DTORCH_TARGET_VERSION=0x020b000000000000 "
               f"-isystem {q(include)} {q(f'-ffile-prefix-map={include}/=')} $flags -c $in -o $out")  # fmt: skip
        depfile = " depfile = $out.d\n deps = gcc\n"
        text = [
            "ninja_required_version = 1.8\nbuilddir = build/ninja",
            f"rule cxx\n command = {cxx}\n{depfile} description = g++ $in",
            "rule link\n command = g++ -shared $in $flags -o $out\n description = link $out",
            # One member, so that whoever needs a name of it gets what runs before main too.
            "rule archive\n command = rm -f $out && g++ -r -nostdlib $in -o $flags && ar rcs $out $flags\n"
            " description = archive $out",
        ]

        def path(p):
            return re.sub(r"([$ :])", r"$\1", str(p))

        def objects(rule, sources, flags=lambda s: ""):
            made = []
            for s in sources:
                s = s.relative_to(ROOT)
                made.append(f"build/ninja/{str(s).replace('/', '.')}.o")
                text.append(f"build {made[-1]}: {rule} {s}\n flags = {flags(s)}")
            return " ".join(made)

        csrc = ROOT / "csrc"
        cpp = sorted(p for p in csrc.rglob("*.cpp") if p.relative_to(csrc).parts[0] != "interpreter")
        flags = f"-L{q(f'{t}/lib')} -ltorch_cpu -ldl -Wl,-z,defs"
        text.append(f"build {path(out / '_ops.so')}: link {objects('cxx', cpp)}\n flags = {flags}")
        # Its handlers are loops over 32 lanes, which want AVX2 (2013); the matrix products look for AVX-512 at run time.
        core = sorted((*csrc.glob("interpreter/*.cpp"), *csrc.glob("interpreter/rows/*.cpp")))
        core_flags = "-march=x86-64-v3 -mtune=generic"
        flags = "-Wl,-soname,_interpreter.so -Wl,-Bsymbolic -Wl,-z,defs -lpthread"
        text.append(
            f"build {path(out / '_interpreter.so')}: link {objects('cxx', core, lambda s: core_flags)}\n flags = {flags}"
        )
        host = sorted(ROOT.glob("csrc/interpreter/python/*.cpp")) if WANT_HOST == "1" else []
        if host:  # pybind11 is among torch's headers
            python = f"-isystem {q(sysconfig.get_path('include'))}"
            made = objects("cxx", host, lambda s: python)
            made += "".join(f" build/ninja/csrc.interpreter.{name}.cpp.o" for name in ("parser", "types"))
            name = f"interpreter/_host{sysconfig.get_config_var('EXT_SUFFIX')}"
            text.append(f"build {path(out / name)}: link {made}\n flags = -Wl,-Bsymbolic")
        cu, standin = [], []
        if home:
            cu = sorted(p for p in ROOT.glob("csrc/**/*_sm*.cu") if gencode(p))
            lib = next(p for p in (home / "lib64", home / "lib") if p.is_dir())
            # Any ptxas warning fails the build: a spill (-warn-spills, -warn-lmem-usage), or C75xx, which is only an "info".
            nvcc = (f"{q(f'{home}/bin/nvcc')} {common} -O3 -lineinfo --compress-mode=size -Werror all-warnings "
                    f"-Xptxas -warn-spills,-warn-lmem-usage,-Werror -Xcompiler -fPIC,-fvisibility=hidden "
                    f"$flags -c $in -o $out")  # fmt: skip
            checked = (
                f"({nvcc}) > $out.log 2>&1 && ! grep -q 'C75[0-9][0-9]' $out.log || (cat $out.log; rm -f $out; false)"
            )
            text.append(f"rule nvcc\n command = {checked}\n{depfile} description = nvcc $in")
            # cudart's names must never be dynamic symbols: a CUDA torch has libcudart in the global scope and would win.
            # -z defs: a runtime call that is missing is a link error that names it.
            hide = "-Wl,-Bsymbolic -Wl,--exclude-libs,ALL -Wl,-z,defs"
            kernels = objects("nvcc", cu, lambda s: " ".join(gencode(s)))
            flags = f"{hide} -L{q(str(lib))} -lcudart_static -ldl -lrt -lpthread"
            text.append(f"build {path(out / '_kernels.so')}: link {kernels}\n flags = {flags}")
            # The same objects against the interpreter's stand-in for cudart; programs get it as an archive.
            standin = sorted(ROOT.glob("csrc/interpreter/standin/*.cpp"))
            cuda = f"-isystem {q(f'{home}/include')}"
            program = objects("cxx", [p for p in standin if p.stem == "program"], lambda s: cuda)
            cudart = objects("cxx", [p for p in standin if p.stem != "program"], lambda s: cuda)
            interpreter = path(out / "_interpreter.so")
            flags = f"{hide} -Wl,-rpath,'$$ORIGIN'"
            text.append(
                f"build {path(out / '_kernels_interpreted.so')}: link {kernels} {cudart} {interpreter}\n flags = {flags}"
            )
            text.append(f"build {path(out / '_standin.a')}: archive {cudart} {program}\n flags = build/ninja/standin.o")
        return "\n".join(text) + "\n", len(cpp) + len(core) + len(host) + len(cu) + len(standin)


class Wheel(bdist_wheel):
    def get_tag(self):  # no Python C API in any other library: every Python 3 (free-threaded too), this platform
        return super().get_tag() if WANT_HOST == "1" else ("py3", "none", super().get_tag()[2])


if sys.argv[1:] == ["toolchain"]:
    # `python setup.py toolchain | xargs -r pip install`: what makes an nvcc, or nothing where there is one. Not a setuptools
    # command: those print "running toolchain" first, and pip would install a stranger's package called running.
    if WANT_CUDA != "0" and cuda_home() is None:
        print(*TOOLCHAIN)
    sys.exit()

setup(
    ext_modules=[Extension("forwardpass._ops", [])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    # read by build isolation only: a machine with no toolkit gets one for the build
    setup_requires=TOOLCHAIN if WANT_CUDA != "0" and cuda_home() is None else [],
)
