"""Static gates of the compiled kernels: python tests/gates/gates.py WHEEL, after a build here. Prints the figures, and exits 1
if any fails.

An instance is one kernel template on one architecture's machine code. Gated: no local memory (spills or a stack), shared
memory within the architecture's limit and declared, a main loop with the tensor-core instruction that it should have, no
message of the assembler, on a B200 too, and the budgets. Compile time is that of the last build of each file.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import ninja

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "helpers"))

import ada_gates
import attention_gates
import cubin
import gemm_gates

ROOT = pathlib.Path(__file__).parents[2]
BUDGETS = {"compile time, core seconds": 900, "wheel, MB": 30}
SHIPPED = ("80", "89", "90", "120")  # of portable files; a file of one architecture is built for that one
COMPILE_ONLY = ("100a",)  # runs the portable files' PTX: the assembler has to accept it without a message
# but for mma.sync of fp8 where it is emulated, on 9.0 and 10.0, which takes more registers than there are: it runs, and spills
EMULATED = dict.fromkeys(("table_fp8_sm89.cu", "table_8bit_fp8_sm89.cu", "table_8bit_fp8_modified_sm89.cu"), ("100a",))

# What the main loop of a kernel has to contain, by the kernel's name and architecture: patterns of opcodes, each of them. The
# first entry that matches counts; a kernel that matches none is bound by memory and needs none.
TENSOR_CORE = [
    (r"gemm_mma_kernel<MmaConfig<Int8\b", r"", ["IMMA"]),
    (r"gemm_mma_kernel<MmaConfig<E4m3", r"", ["QMMA"]),
    (r"gemm_mma_kernel<MmaConfig<W8a16\b", r"", ["HMMA"]),
    (r"gemm_wgmma_kernel<WgmmaConfig<Int8\b", r"", ["IGMMA"]),
    (r"gemm_wgmma_kernel<WgmmaConfig<E4m3", r"", ["QGMMA"]),
    (r"gemm_wgmma_kernel<WgmmaConfig<Upconverted", r"", ["HGMMA"]),
    (r"gemv_kernel<i8>", r"", ["IMMA"]),
    (r"gemv_kernel", r"", ["HMMA"]),
    (r"attention_mma_kernel<Int8AttentionConfig<AttentionInstance{dtype=e4m3", r"", ["IMMA", "QMMA"]),
    (r"attention_mma_kernel<Int8AttentionConfig", r"", ["IMMA"]),
    (r"attention_wgmma_kernel<Int8WgmmaAttentionConfig<AttentionInstance{dtype=e4m3", r"", ["IGMMA", "QGMMA"]),
    (r"attention_wgmma_kernel<Int8WgmmaAttentionConfig", r"", ["IGMMA"]),
    (r"attention_8bit", r"", ["IG?MMA", "[QH]G?MMA"]),
    (r"attention", r"", ["HG?MMA"]),
]


def tensor_core(name: str, arch: str) -> list[str]:
    """Patterns of the opcodes."""
    kinds = next(
        (kinds for names, arches, kinds in TENSOR_CORE if re.match(names, name) and re.match(arches, arch)), []
    )
    return [rf"{kind}\b" for kind in kinds]


#: Of attention on mma.sync beyond 8.0, whatever a multiprocessor has (kSharedKib in csrc/kernels/attention/mma.cuh).
MOST_BEYOND_80 = 100 * 1024


def held(k: cubin.Kernel) -> bool:
    """Whether a multiprocessor holds as many of its blocks as its name says: else it is not launched there."""
    c = attention_gates.claims(k.name)
    most = k.limits.sm_shared if k.arch == "sm_80" or "wgmma" in k.name else min(k.limits.sm_shared, MOST_BEYOND_80)
    return c is None or c.blocks * (k.shared + k.limits.RESERVED) <= most


def left_out(k: cubin.Kernel) -> bool:
    """Empty on an architecture where it is not launched."""
    return not held(k) and len(k.code.instructions) - sum(i.is_nop for i in k.code.instructions) < 4


def failures(k: cubin.Kernel) -> list[str]:
    """Sentences, without the kernel's name."""
    if left_out(k):
        return []
    messages = []
    loop, expected = k.code.main_loop, tensor_core(k.name, k.arch)
    if k.local:
        messages.append(
            f"{k.local} bytes of local memory a thread: registers were spilled, or an array is indexed at run time"
        )
    if loop and loop.local:
        messages.append(f"local memory in the main loop: {mix(loop.local)}")
    if k.shared > k.limits.block_shared:
        messages.append(f"{k.shared} bytes of shared memory, a block has at most {k.limits.block_shared}")
    if k.uses_dynamic_shared and k.dynamic_shared is None:
        messages.append("dynamic shared memory of a size that nothing states: see csrc/device/shared_bytes.cuh")
    messages += [f"{used} registers are used behind a setmaxnreg that leaves {left}"
                 for left, used in k.code.registers_behind_release() if used > left]  # fmt: skip
    if expected and not (loop and loop.mma):
        messages.append(f"no loop with a tensor-core instruction, {' and '.join(expected)} expected")
    elif missing := [e for e in expected if not any(re.match(e, opcode) for opcode in loop.mma)]:
        messages.append(f"no {' and no '.join(missing)} in the main loop, which has {mix(loop.mma)}")
    return messages + gemm_gates.failures(k) + attention_gates.failures(k)


def mix(opcodes: collections.Counter) -> str:
    return ", ".join(f"{n} {opcode}" for opcode, n in opcodes.most_common())


def table(kernels: list[cubin.Kernel]) -> str:
    """A loop's instructions are those of all its branches; what it calls (a division's slow path) is not in the count."""
    rows = [
        (
            "kernel",
            "arch",
            "registers",
            "shared memory",
            "CTAs/SM",
            "loop instructions",
            "MMA of the loop, or its loads",
        )
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        loop = k.code.main_loop
        shared = f"{k.static_shared} + {k.dynamic_shared}" if k.dynamic_shared else f"{k.static_shared}"
        blocks = f"{k.blocks_per_sm} of {k.threads} threads" if k.threads else "no launch bounds"
        count = f"{len(loop.instructions)}{f' + {loop.calls} calls' if loop.calls else ''}" if loop else "no loop"
        rows.append(
            (k.name, k.arch, str(k.registers), shared, blocks, count, mix(loop.mma or loop.loads) if loop else "")
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def missing_architectures(kernels: list[cubin.Kernel]) -> list[str]:
    built = collections.defaultdict(set)
    for k in kernels:
        built[k.source, k.name].add(k.arch)
    messages = []
    for (source, name), arches in sorted(built.items()):
        minimum = lowest_architecture(source)
        targets = [minimum] if minimum.endswith("a") else [a for a in SHIPPED if int(a) >= int(minimum)]
        sibling = ROOT / re.sub(r"_sm\d+\.cu$", "_sm90a.cu", source)
        if not minimum.endswith("a") and (minimum == "89" or sibling.exists()):
            targets.remove("90")  # the operation has other kernels there, or none
        if minimum == "80":
            targets.remove("89")  # it runs the code for 8.0: ada_gates.py
        if missing := [f"sm_{a}" for a in targets if f"sm_{a}" not in arches]:
            messages.append(f"{name}: not compiled for {', '.join(missing)}")
    return messages


def elsewhere(kernels: list[cubin.Kernel]) -> list[cubin.Kernel]:
    """Those for 8.0 as a GPU of 8.9 has them, where there is no other code for it."""
    return [k for shared in ada_gates.shared(kernels) if held(k := dataclasses.replace(shared, arch="sm_89"))]


def lowest_architecture(source: str) -> str:
    """From a kernel file's name: 80, or 90a of a file for that architecture alone."""
    return re.search(r"_sm(\d+a?)\.cu$", source)[1]


def compile_commands() -> list[dict[str, str]]:
    """Of every kernel file, as the build ran it: {file, output, command}."""
    rules = ROOT / "build/ninja/build.ninja"
    if not rules.exists():
        sys.exit(
            "there is no build/ninja/build.ninja: build the kernels here first (python setup.py build_ext --inplace)"
        )
    command = [pathlib.Path(ninja.BIN_DIR, "ninja"), "-f", rules, "-t", "compdb", "nvcc"]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def compile_again(
    entry: dict[str, str], arches, output: pathlib.Path, source: pathlib.Path | None = None
) -> str | None:
    """What the build would say, None where nothing, had it these architectures (and another source)."""
    flags = " ".join(f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in arches)
    command = re.sub(r"-gencode=\S+( -gencode=\S+)*", flags, entry["command"]).replace(entry["output"], str(output))
    if source:
        command = command.replace(entry["file"], str(source))
    process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    return process.stdout + process.stderr or ("it failed without a message" if process.returncode else None)


def compile_only(file: str) -> tuple[str, ...]:
    emulated = EMULATED.get(pathlib.Path(file).name, ())
    return tuple(a for a in COMPILE_ONLY if a not in emulated)


def assembler_messages(commands: list[dict[str, str]]) -> list[str]:
    """From the logs of the build, then of a compilation for the architectures that are not shipped."""
    messages = []
    for entry in commands:
        log = ROOT / (entry["output"] + ".log")
        text = log.read_text() if log.exists() else "no log of its compilation: build it here"
        if re.search(r"C75\d\d|warning|no log", text):
            messages.append(f"{entry['file']}: {text.strip()}")
    portable = [entry for entry in commands if not lowest_architecture(entry["file"]).endswith("a")]
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        portable = [entry for entry in portable if compile_only(entry["file"])]
        outputs = [pathlib.Path(folder, f"{i}.o") for i in range(len(portable))]
        stderrs = pool.map(
            lambda entry, output: compile_again(entry, compile_only(entry["file"]), output), portable, outputs
        )
        messages += [
            f"{entry['file']} for {', '.join(compile_only(entry['file']))}: {t.strip()}"
            for entry, t in zip(portable, stderrs)
            if t
        ]
    return messages


def compile_seconds(log: pathlib.Path) -> float:
    """The nvcc processes of ninja's log, one core each."""
    seconds = {}
    for line in log.read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        if output.endswith(".cu.o"):
            seconds[output] = (int(end) - int(start)) / 1000
    return sum(seconds.values())


def main(wheel: str) -> int:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as z:
        if "forwardpass/_kernels.so" not in z.namelist():
            sys.exit(f"{wheel} has no CUDA kernels: build it where there is an nvcc")
        kernels = cubin.kernels(pathlib.Path(z.extract("forwardpass/_kernels.so", folder)))
    if not kernels:
        sys.exit("no kernel was found: the gates measured nothing")
    commands = compile_commands()
    pairs, losses = ada_gates.compare(kernels, commands, compile_again)
    tables = table(kernels), gemm_gates.table(kernels), attention_gates.table(kernels), ada_gates.table(pairs)
    print(*tables, sep="\n\n", end="\n\n")
    figures = {
        "compile time, core seconds": compile_seconds(ROOT / "build/ninja/.ninja_log"),
        "wheel, MB": pathlib.Path(wheel).stat().st_size / 1e6,
    }
    print(f"{'compiled instances':<28}{sum(not left_out(k) for k in kernels):>8}")
    for name, n in figures.items():
        print(f"{name:<28}{n:>8.1f} of {BUDGETS[name]:>4}")
    failed = [f"{k.name} on {k.arch}: {sentence}" for k in kernels + elsewhere(kernels) for sentence in failures(k)]
    failed += losses + missing_architectures(kernels) + assembler_messages(commands)
    failed += [f"{name}: {n:.1f}, the budget is {BUDGETS[name]}" for name, n in figures.items() if n > BUDGETS[name]]
    print("", *(f"FAILS  {sentence}" for sentence in failed), f"{len(failed)} gates failed", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
