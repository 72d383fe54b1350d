"""Builds forwardpass: a C++ compiler for the torch side and the CPU kernels, nvcc for the CUDA kernels, ninja to drive both.

No GPU is needed, and any torch >= 2.11 serves (CPU or CUDA). torch's CUDAExtension is not used: it wants a CUDA torch
and guesses CUDA_HOME. Environment:

FORWARDPASS_BUILD_CUDA    auto (default): CUDA kernels where there is an nvcc; 1: required; 0: none, earlier ones removed
FORWARDPASS_BUILD_STRICT  1: a warning fails the build, and so does a spill; 0 (default): it is printed
TORCH_CUDA_ARCH_LIST      default: the architectures of the GPUs that torch finds, else all; "all" is "8.0 8.9 9.0a 12.0".
                          PTX is there of every entry to 9.0, with or without "+PTX"; 9.0 means 9.0a too. What the
                          kernels or this nvcc cannot be built for is left out, and named
FORWARDPASS_BUILD_MACHINE_CODE
                          1 (default); 0: PTX alone, which gpuless runs and a GPU's driver compiles when it loads it
CXX                       default g++; a g++ >= 12, no clang++; arguments may follow ("ccache g++"). It compiles nvcc's host
                          code too, unless NVCC_CCBIN or CUDAHOSTCXX names another
CUDA_HOME, MAX_JOBS       as everywhere

Where gpuless is installed, which runs kernels without a GPU, the CUDA kernels are linked a second time, against its stand-in for
cudart.

The machine that CXX compiles for decides what is built. To compile for another machine, FORWARDPASS_BUILD_TORCH is a torch of that
machine, unpacked from its wheel; there are no CUDA kernels then:

    CXX=aarch64-linux-gnu-g++ FORWARDPASS_BUILD_TORCH=unpacked/torch python setup.py bdist_wheel
"""

import functools
import importlib.metadata
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

ROOT = pathlib.Path(__file__).parent.resolve()


def choice(name, *allowed):
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        sys.exit(f"forwardpass: {name} is {' or '.join(allowed)}, not {value!r}")
    return value


WANT_CUDA = choice("FORWARDPASS_BUILD_CUDA", "auto", "0", "1")
STRICT = choice("FORWARDPASS_BUILD_STRICT", "0", "1") == "1"
MACHINE_CODE = choice("FORWARDPASS_BUILD_MACHINE_CODE", "1", "0") == "1"


@functools.cache
def torch_folder():
    """That of the torch to compile against, which need not be importable; None where there is none."""
    if folder := os.environ.get("FORWARDPASS_BUILD_TORCH"):
        return pathlib.Path(folder).resolve()
    spec = importlib.util.find_spec("torch")
    return (
        pathlib.Path(spec.submodule_search_locations[0]).resolve() if spec and spec.submodule_search_locations else None
    )


def torch_says(name):
    """A string of torch/version.py, None where there is none of it."""
    if torch_folder() is None:
        return None
    path = torch_folder() / "version.py"
    if not path.exists():
        sys.exit(f"forwardpass: {torch_folder()} is no torch folder, there is no version.py in it")
    match = re.search(rf"^{name}(?:: .*)? = '(.*)'", path.read_text(), re.M)
    return match[1] if match else None


def torch_cuda_major():
    """The CUDA major of the torch we build beside, None for a CPU torch: its driver must be able to run our kernels."""
    cuda = torch_says("cuda")
    return int(cuda.split(".")[0]) if cuda else None


# nvcc 13 with everything that it calls, no more
TOOLCHAIN = ["nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-cuda-runtime==13.0.96",
             "nvidia-nvvm==13.0.88", "nvidia-cuda-cccl==13.0.85"]  # fmt: skip


def toolchain():
    """The packages of PyPI that make an nvcc, none where there is one, where none is wanted or where PyPI has none."""
    if WANT_CUDA == "0" or sys.platform != "linux" or cuda_home() is not None or why_no_toolchain():
        return []
    return TOOLCHAIN


def why_no_toolchain():
    """None, or the sentence that says why pip cannot install an nvcc for this torch."""
    if torch_cuda_major() in (None, 13):
        return None
    # nvidia-cuda-nvcc-cu12 contains ptxas alone
    return (f"torch was built for CUDA {torch_says('cuda')}, and PyPI has an nvcc for CUDA 13 only: install NVIDIA's CUDA "
            f"{torch_cuda_major()} toolkit and set CUDA_HOME to it, or install a torch built for CUDA 13")  # fmt: skip


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


@functools.cache
def cxx():
    """(the C++ compiler as a list of words, the machine that it compiles for)"""
    command = shlex.split(os.environ.get("CXX") or "g++")
    try:
        process = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True)
    except OSError:
        sys.exit(f"forwardpass: there is no C++ compiler {command[0]!r}: install g++, or set CXX to one")
    machine, _, system = process.stdout.strip().partition("-")
    if process.returncode or not system:
        sys.exit(f"forwardpass: CXX={shlex.join(command)!r} does not answer -dumpmachine "
                 f"({process.stderr.strip() or process.returncode}): set it to a g++")  # fmt: skip
    if "linux" not in system:
        sys.exit(f"forwardpass: it is for Linux only, and {shlex.join(command)} compiles for {process.stdout.strip()}")
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True).stdout
    name = "clang++" if "#define __clang__ " in macros else "g++"  # which says that it is g++ 4, too
    version = re.search(rf"^#define {'__clang_major__' if name == 'clang++' else '__GNUC__'} (\d+)$", macros, re.M)
    if name == "clang++" or not version or int(version[1]) < 12:
        sys.exit(f"forwardpass: the CPU kernels need g++ 12 or later, and {shlex.join(command)} is {name} "
                 f"{version[1] if version else 'of no version'}: apt install g++-12, and set CXX=g++-12")  # fmt: skip
    return command, machine


@functools.cache
def gpuless():
    """(the folder of the gpuless to link against, None where there is none; its version, or the sentence that says why not)"""
    spec = importlib.util.find_spec("gpuless")
    if spec is None:
        return None, "gpuless was not installed where it was built"
    folder = pathlib.Path(spec.submodule_search_locations[0])
    if not folder.joinpath("_cudart.a").exists():
        return None, "the gpuless there was built without a CUDA toolkit"
    return folder, json.loads(folder.joinpath("_build.json").read_text())["version"]


def why_no_cuda():
    """None, or the sentence that says why this build has no CUDA kernels; with FORWARDPASS_BUILD_CUDA=1 it is fatal."""
    if WANT_CUDA == "0":
        return "FORWARDPASS_BUILD_CUDA=0"
    if cxx()[1] != platform.machine():
        return f"compiled on {platform.machine()} for {cxx()[1]}: build on {cxx()[1]} to have them"
    if cuda_home() is None:
        install = f"set CUDA_HOME, or run {sys.executable} -m pip install {' '.join(toolchain())}"
        return f"there is no nvcc: {why_no_toolchain() or install}"
    major, torch_major = int(nvcc_release(cuda_home()).split(".")[0]), torch_cuda_major()
    if torch_major and major != torch_major:
        return (f"nvcc in {cuda_home()} is CUDA {major}, torch was built for CUDA {torch_major}, and its driver may not run "
                f"the other's kernels: set CUDA_HOME to a CUDA {torch_major} toolkit")  # fmt: skip
    built, left_out = arches()
    if not built:
        return f"of TORCH_CUDA_ARCH_LIST nothing can be built: {'; '.join(left_out)}"
    return None


# what a wheel has, then the names that torch takes in TORCH_CUDA_ARCH_LIST; those before Volta are of no CUDA that we build with
NAMED_ARCHES = {
    "all": "8.0 8.9 9.0a 12.0",
    "Volta": "7.0", "Turing": "7.5", "Ampere": "8.0 8.6", "Ampere+Tegra": "8.7", "Ada": "8.9", "Hopper": "9.0",
    "Blackwell": "10.0 10.3 12.0 12.1", "Blackwell+Tegra": "11.0",
}  # fmt: skip


@functools.cache
def default_arches():
    """TORCH_CUDA_ARCH_LIST where nobody sets it: those of the GPUs that torch finds here; without a GPU, all.

    GPUs that nothing can be compiled for do not count: a 12.1 that this nvcc does not know runs the code for 12.0.
    """
    if torch_says("cuda") is None or os.environ.get("FORWARDPASS_BUILD_TORCH"):
        return "all"
    code = (
        "import torch as t; print(*('%d.%d' % t.cuda.get_device_capability(i) for i in range(t.cuda.device_count())))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return " ".join(arch for arch in dict.fromkeys(process.stdout.split()) if not arches_of(arch)[1]) or "all"


def arches():
    """arches_of(TORCH_CUDA_ARCH_LIST), or of its default."""
    return arches_of(os.environ.get("TORCH_CUDA_ARCH_LIST") or default_arches())


@functools.cache
def arches_of(text):
    """(["80", "90a"], ["7.5 (the kernels need 8.0 or later)"]) from TORCH_CUDA_ARCH_LIST: what is built, what is left out."""
    listed = subprocess.run([cuda_home() / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    supported = re.findall(r"compute_(\d+)", listed)
    built, left_out = {}, []
    for word in re.findall(r"[^\s;,]+", text):
        name = word.removesuffix("+PTX")
        for entry in NAMED_ARCHES.get(name, name).split():
            m = re.fullmatch(r"(\d+)\.(\d)[af]?", entry)
            if not m:
                sys.exit("forwardpass: TORCH_CUDA_ARCH_LIST entries look like 8.0, 9.0a or 8.9+PTX, or are of "
                         f"{', '.join(NAMED_ARCHES)}, not {word!r}")  # fmt: skip
            arch = m[1] + m[2]
            if int(arch) < 80:
                left_out.append(f"{entry} (the kernels need 8.0 or later)")
            elif arch not in supported:
                left_out.append(f"{entry} (nvcc {nvcc_release(cuda_home())} does not know it)")
            else:  # Hopper's own kernels are for 9.0a; all others are portable
                built["90a" if arch == "90" else arch] = None
    return list(built), left_out


#: Portable files that have machine code of their own for 8.9, where one instruction converts from or to e4m3, and about ten on 8.0.
#: A GPU of 8.9 runs the code for 8.0 of every other file; tests/gates/ada_gates.py compiles both, and compares them.
OWN_CODE_ON_89 = ("activation_quantize", "append_kv", "dequant_activation", "gemv", "norm_quantize",
                  "permute_quantize", "quantize", "table_w8a16", "table_w8a16_grouped")  # fmt: skip

#: Portable files whose kernels a GPU of 9.0 runs too, beside its own of the same name: of what TMA cannot load.
CODE_BESIDE_90A = ("table_int8_conv2d",)


def code_of(source):
    """{architecture of PTX: those of the machine code made of it} for one file.

    Its name says the lowest architecture that runs it (…_sm80.cu; …_sm90a.cu: that one only).

    A file without an "a" is portable: built for the plain architectures. PTX comes with each: the interpreter runs it, and
    the driver makes code of it for GPUs that came later. Where there is 9.0, Blackwell's code is made of 9.0's PTX: for 12.0 nvcc
    makes other PTX (packed fp32), which the kernels have no need of and the tests would have to run as well.
    """
    minimum = re.search(r"_sm(\d+a?)\.cu$", source.name)[1]
    if minimum.endswith("a"):
        return {a: [a] for a in arches()[0] if a == minimum}
    plain = sorted(n for n in (int(a.rstrip("a")) for a in arches()[0]) if n >= int(minimum))
    if 80 in plain and source.name.removesuffix("_sm80.cu") not in OWN_CODE_ON_89:
        plain = [n for n in plain if n != 89]
    # On 9.0 an operation's kernels for 9.0a run; of its portable ones there is PTX, for later GPUs and for builds without
    # 9.0a. The same of what begins at 8.9: fp8 mma.sync is emulated on 9.0, and spills.
    portable = minimum == "89" or source.with_name(re.sub(r"_sm\d+a?\.cu$", "_sm90a.cu", source.name)).exists()
    portable = portable and source.name.removesuffix("_sm80.cu") not in CODE_BESIDE_90A
    if portable and arches()[0] == ["90a"]:  # a build for that GPU alone
        return {}
    code = {a: [a] * (not (portable and a == 90)) for a in plain if a <= 90 or 90 not in plain}
    for a in plain:
        if a not in code:
            code[90].append(a)
    return code


def gencode(source):
    """nvcc's -gencode flags of one file; none where none of its architectures is built."""
    return [f"-gencode=arch=compute_{ptx},code=[{','.join([*(f'sm_{a}' for a in code * MACHINE_CODE), f'compute_{ptx}'])}]"
            for ptx, code in code_of(source).items()]  # fmt: skip


def jobs(sources):
    """One g++ or nvcc process needs about 1.5 GB here (measured: 0.9 for a stable-ABI file, 0.6 for a kernel)."""
    # not SC_AVPHYS_PAGES, which counts what the page cache holds as taken
    available = re.search(r"^MemAvailable: +(\d+) kB", pathlib.Path("/proc/meminfo").read_text(), re.M)
    free, cores = int(available[1]) / 2**20, len(os.sched_getaffinity(0))
    limit = int(os.environ.get("MAX_JOBS") or cores)
    n = max(1, min(limit, int(free * 0.8 / 1.5), sources))
    print(f"forwardpass: {n} jobs = min({limit} {'MAX_JOBS' if os.environ.get('MAX_JOBS') else 'cores'}, "
          f"0.8 * {free:.1f} GiB free / 1.5 GiB a job, {sources} files)", flush=True)  # fmt: skip
    return n


def nvcc_host(script):
    """nvcc's flag for the compiler of host code: NVCC_CCBIN, CUDAHOSTCXX (cmake's) or CXX; none where nvcc has been told.

    nvcc takes one file, so that a CXX of several words is put into `script`.
    """
    command, _ = cxx()
    host = os.environ.get("NVCC_CCBIN") or os.environ.get("CUDAHOSTCXX")
    flags = os.environ.get("NVCC_PREPEND_FLAGS", "") + os.environ.get("NVCC_APPEND_FLAGS", "")
    if not (host or os.environ.get("CXX")) or "-ccbin" in flags or "--compiler-bindir" in flags:
        return ""
    if not host and len(command) > 1:
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        host = str(script)
    return f" -ccbin {shlex.quote(host or command[0])}"


def rules(out, obj, home):
    """(the text of build.ninja, the number of files it compiles)"""
    q = shlex.quote  # for the shell; ninja quotes $in and $out itself
    t = torch_folder()
    command, _ = cxx()
    compiler = shlex.join(command)
    # Everything is compiled from the root by its relative name: messages, line tables and depfiles name no folder of ours.
    common = "-MD -MF $out.d -std=c++20"
    include = f"{t}/include"  # torch's headers put __FILE__ into messages too
    # -iquote, as <torch/…> is torch's and "torch/…" is csrc's; -ffp-contract=off, because the formulas say where an fma is.
    # -O2 compiles in 9 tenths of the time, but g++ unrolls loops over vectors at -O3 alone: attention took 7 times as long.
    # build/ninja is first for torch/precompiled.h.gch, which g++ takes in place of the header of csrc where it fits.
    compile_cxx = (f"{compiler} {common} -iquote build/ninja -iquote csrc -O3 -fPIC -fvisibility=hidden "
                   f"-Wall -Wextra{' -Werror' * STRICT} -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=off "
                   f"-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {q(include)} {q(f'-ffile-prefix-map={include}/=')} "
                   f"$flags -c $in -o $out")  # fmt: skip
    depfile = " depfile = $out.d\n deps = gcc\n"
    text = [
        "ninja_required_version = 1.8\nbuilddir = build/ninja",
        f"rule cxx\n command = {compile_cxx}\n{depfile} description = {compiler} $in",
        f"rule link\n command = {compiler} -shared $in $flags -Wl,--version-script=csrc/exports.map -o $out\n"
        " description = link $out",
    ]

    def path(p):
        return re.sub(r"([$ :])", r"$\1", str(p))

    def objects(rule, sources, flags=lambda s: "", after=""):
        outputs = []
        for s in sources:
            s = s.relative_to(ROOT)
            outputs.append(f"build/ninja/{str(s).replace('/', '.')}.o")
            text.append(f"build {outputs[-1]}: {rule} {s}{after}\n flags = {flags(s)}")
        return " ".join(outputs)

    csrc = ROOT / "csrc"
    cpp = sorted(p for p in csrc.rglob("*.cpp") if p.relative_to(csrc).parts[0] != "kernels")
    text.append("build build/ninja/torch/precompiled.h.gch: cxx csrc/torch/precompiled.h\n flags = -x c++-header")
    ops = objects("cxx", cpp, lambda s: "-include torch/precompiled.h", " | build/ninja/torch/precompiled.h.gch")
    flags = f"-L{q(f'{t}/lib')} -ltorch_cpu -ldl -Wl,-z,defs"
    text.append(f"build {path(out / '_ops.so')}: link {ops} | csrc/exports.map\n flags = {flags}")
    if home:
        # ninja goes by this order. norm_quantize takes longest: begun last, it keeps one core busy when the others have ended.
        cu = sorted(
            (p for p in csrc.glob("kernels/**/*_sm*.cu") if gencode(p)),
            key=lambda p: (p.parent.name != "norm_quantize", p),
        )
        lib = next(p for p in (home / "lib64", home / "lib") if p.is_dir())
        # -lineinfo: gpuless reads lines of the source from the PTX. ptxas would copy that PTX, compressed 40 % of the library,
        # into the machine code for each architecture. Compression by size takes a second or two a file, and that of machine code
        # comes to a quarter of what it is by balance; of PTX to two thirds.
        compression = "size" if MACHINE_CODE else "balance"
        nvcc = (f"{q(f'{home}/bin/nvcc')}{nvcc_host(obj / 'host-c++')} {common} -Icsrc -O3 -lineinfo --compress-mode={compression}"
                f"{' -Werror all-warnings' * STRICT} -Xptxas --suppress-debug-info,-warn-spills,-warn-lmem-usage"
                f"{',-Werror' * STRICT} -Xcompiler -fPIC,-fvisibility=hidden $flags -c $in -o $out")  # fmt: skip
        # Strict: any ptxas warning fails the build: a spill (-warn-spills, -warn-lmem-usage), or C75xx, which is only an "info".
        checked = (
            f"({nvcc}) > $out.log 2>&1 && ! grep -q 'C75[0-9][0-9]' $out.log || (cat $out.log; rm -f $out; false)"
            if STRICT
            else f"({nvcc}) > $out.log 2>&1; code=$$?; cat $out.log; exit $$code"
        )
        text.append(f"rule nvcc\n command = {checked}\n{depfile} description = nvcc $in")
        # cudart's names must never be dynamic symbols: a CUDA torch has libcudart in the global scope and would win.
        # -z defs: a runtime call that is missing is a link error that names it.
        hide = "-Wl,-Bsymbolic -Wl,--exclude-libs,ALL -Wl,-z,defs"
        cuda = f"-isystem {q(f'{home}/include')}"
        kernels = objects("nvcc", cu, lambda s: " ".join(gencode(s)))
        kernels += " " + objects("cxx", sorted(csrc.glob("kernels/**/*.cpp")), lambda s: cuda)
        flags = f"{hide} -L{q(str(lib))} -lcudart_static -ldl -lrt -lpthread"
        text.append(f"build {path(out / '_kernels.so')}: link {kernels} | csrc/exports.map\n flags = {flags}")
    if home and (folder := gpuless()[0]):
        # The same objects against gpuless's stand-in for cudart. Whoever opens it has opened libgpuless.so before.
        archive, library = folder / "_cudart.a", folder / "libgpuless.so"
        inputs = f"{kernels} | csrc/exports.map {path(archive)} {path(library)}"
        flags = f"{hide} -Wl,--whole-archive {q(str(archive))} -Wl,--no-whole-archive {q(str(library))}"
        text.append(f"build {path(out / '_kernels_interpreted.so')}: link {inputs}\n flags = {flags}")
    return "\n".join(text) + "\n", sum(rule.startswith("build build/ninja/") for rule in text)


if sys.argv[1:] == ["toolchain"]:
    # A requirements file for pip. With the standard library alone, as it is asked before there is a setuptools. Not a command
    # of setuptools: those print "running toolchain" first, and pip would install a stranger's package.
    if packages := toolchain():
        print(*packages, sep="\n")
    elif WANT_CUDA != "0" and cuda_home() is None and (why := why_no_toolchain()):
        print(f"forwardpass: there is no nvcc: {why}", file=sys.stderr)
    sys.exit()

# setuptools before 77 cannot read this pyproject.toml; for metadata and an sdist it is all that is needed
NEEDED = {"setuptools": "77", "ninja": "1.10", "torch": "2.11"}
BUILDING = not {"egg_info", "sdist", "dist_info", "--version", "--help"} & set(sys.argv[1:])


def release(text):
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def require_build_tools():
    """pip's --no-build-isolation checks nothing, and its users see the first ImportError: say all of it at once."""
    if BUILDING and sys.platform != "linux":
        sys.exit(f"forwardpass: it is for Linux only, and this is {platform.system()}")
    versions = {}
    for name in NEEDED:
        try:
            versions[name] = torch_says("__version__") if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    bad = {n: v for n, v in versions.items() if v is None or release(v) < release(NEEDED[n])}
    if (BUILDING and bad) or "setuptools" in bad:
        has = ", ".join(f"{n} {v or 'is missing'}" for n, v in bad.items())
        fix = " ".join(f"'{n}>={NEEDED[n]}'" for n in bad)
        sys.exit(f"forwardpass: the build needs {', '.join(f'{n} >= {v}' for n, v in NEEDED.items())}; here {has}. "
                 f"Run: {sys.executable} -m pip install {fix}")  # fmt: skip


require_build_tools()

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402


class Build(build_ext):
    """Writes build.ninja and runs it: _ops.so always; where there is an nvcc the kernels (_kernels.so); with gpuless too, the
    kernels again (_kernels_interpreted.so). _build.json says which, for `doctor`."""

    def run(self):
        out = pathlib.Path(self.get_ext_fullpath("forwardpass._ops")).parent.resolve()
        obj = ROOT / "build" / "ninja"  # build_temp is new with each pip: nothing would be incremental
        no_cuda, (folder, version) = why_no_cuda(), gpuless()
        if no_cuda and WANT_CUDA == "1":
            sys.exit(f"forwardpass: FORWARDPASS_BUILD_CUDA=1, but {no_cuda}")
        out.mkdir(parents=True, exist_ok=True)
        obj.mkdir(parents=True, exist_ok=True)
        # pip builds in the tree: what an earlier build has made would be shipped
        for name in ["_kernels.so"] * bool(no_cuda) + ["_kernels_interpreted.so"] * (bool(no_cuda) or folder is None):
            out.joinpath(name).unlink(missing_ok=True)
        built, left_out = ([], []) if no_cuda else arches()
        if no_cuda:
            print(f"forwardpass: building without CUDA kernels: {no_cuda}")
        else:
            without = f"; left out of TORCH_CUDA_ARCH_LIST: {', '.join(left_out)}" if left_out else ""
            chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_arches() == "all"
            why = "" if chosen else ", the GPUs here (TORCH_CUDA_ARCH_LIST=all builds for all)"
            what = "" if MACHINE_CODE else ", in PTX alone (FORWARDPASS_BUILD_MACHINE_CODE=0)"
            print(f"forwardpass: building CUDA kernels for {', '.join(f'sm_{a}' for a in built)}{what}{why}{without}")
        if folder is None and not no_cuda:
            print(f"forwardpass: building no CUDA kernels for gpuless: {version}")
        text, count = rules(out, obj, None if no_cuda else cuda_home())
        obj.joinpath("build.ninja").write_text(text)
        import ninja

        subprocess.check_call(
            [pathlib.Path(ninja.BIN_DIR, "ninja"), "-f", obj / "build.ninja", f"-j{jobs(count)}"], cwd=ROOT
        )
        info = {"version": self.distribution.get_version(), "torch": torch_says("__version__"),
                "machine": cxx()[1], "gpuless": version if folder else None,
                "gpuless_skipped": None if folder else version,
                "cuda_skipped": no_cuda, "nvcc": None if no_cuda else nvcc_release(cuda_home()),
                "arches": [f"{'sm' if MACHINE_CODE else 'compute'}_{a}" for a in built], "arches_left_out": left_out}  # fmt: skip
        out.joinpath("_build.json").write_text(json.dumps(info, indent=1) + "\n")


class Wheel(bdist_wheel):
    def get_tag(self):  # no Python C API in any other library: every Python 3 (free-threaded too), this platform
        _, _, system = super().get_tag()
        if cxx()[1] != platform.machine():
            system = f"linux_{cxx()[1]}"
        return "py3", "none", system


setup(
    ext_modules=[Extension("forwardpass._ops", [])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    # read by build isolation only: a machine with no toolkit gets one for the build
    setup_requires=toolchain(),
)
