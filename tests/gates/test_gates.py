"""The gates on the kernels of this build, and every gate on a kernel that it has to stop."""

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import zipfile

import pytest

pytest.importorskip("triton")

import ada_gates
import attention_gates
import cubin
import gates
import gemm_gates
import sass
from rotation import in_parts, in_turn

import forwardpass

LIBRARY = pathlib.Path(forwardpass.__file__).parent / "_kernels.so"
HERE = pathlib.Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_90a", "sm_120")
HEAD_DIM_128 = (
    "AttentionInstance{dtype=f16, head_dim=128, value_dim=128, modified=false, paged=false}, WgmmaAttentionTile{"
)
MMA_128 = ("MmaConfig<Int8, MmaTile{m=128, n=128, warps_m=2, warps_n=2, stage_k=64, stages=3, blocks_per_sm=2, experts=0}, "
           "OneTile, MmaMainloop, FragmentEpilogue>")  # fmt: skip
MMA_64 = MMA_128.replace("m=128, n", "m=64, n")
WGMMA_128 = ("WgmmaConfig<Int8, WgmmaTile{m=128, n=128, stages=6, stage_k=128, experts=0}, ClusterTiles, ExactMainloop, "
             "FragmentEpilogue>")  # fmt: skip
W8A16_16 = ("MmaConfig<W8a16, MmaTile{m=16, n=128, warps_m=1, warps_n=4, stage_k=128, stages=3, blocks_per_sm=1, experts=0}, "
            "OneTile, UpconvertingMmaMainloop, TransposedEpilogue>")  # fmt: skip


@pytest.fixture(scope="module")
def commands():
    entries = gates.compile_commands() if (gates.ROOT / "build/ninja/build.ninja").exists() else []
    if not entries:
        pytest.skip("the kernels were not built in this checkout, so there is no nvcc command to repeat")
    return entries


def compiled(commands, output, *arches):
    """gate_kernels_*.cu of these architectures, without the build's own checks."""
    nvcc = shlex.split(commands[0]["command"].lstrip("("))[0]
    flags = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in arches]
    source = HERE / f"gate_kernels_sm{arches[0]}.cu"
    flags += ["-std=c++17", "-lineinfo", "-Xptxas", "--suppress-debug-info", "-Icsrc"]
    subprocess.run([nvcc, *flags, "-c", source, "-o", output], cwd=gates.ROOT, check=True)
    return output


@pytest.fixture(autouse=True)
def tensor_core_table_of_gate_kernels(monkeypatch):
    monkeypatch.setattr(gates, "TENSOR_CORE", [(r"int8_gemm", r"", ["IMMA"]), *gates.TENSOR_CORE])


@pytest.fixture(scope="module")
def bad_object(commands, tmp_path_factory):
    return compiled(commands, tmp_path_factory.mktemp("gates") / "sm80.o", "80", "89")


@pytest.fixture(scope="module")
def bad(commands, bad_object, tmp_path_factory):
    """{(kernel, architecture): Kernel}"""
    objects = bad_object, compiled(commands, tmp_path_factory.mktemp("gates") / "sm90a.o", "90a")
    return {(k.name.split("<")[0], k.arch): k for o in objects for k in cubin.kernels(o)}


@pytest.fixture(scope="module")
def kernels():
    """Those of this build."""
    if not LIBRARY.exists():
        pytest.skip("this build has no CUDA kernels")
    return cubin.kernels(LIBRARY)


@pytest.mark.every(3)
def test_the_build_has_every_kernel(kernels):
    assert {"quantize_kernel", "norm_quantize_kernel"} <= {k.name.split("<")[0] for k in kernels}
    assert not gates.missing_architectures(kernels)
    assert {k.arch for k in kernels} == {*ARCHITECTURES}
    assert all(k.threads for k in kernels), "a kernel without launch bounds"


#: whose machine code is read: one of them in `make test`
ONE_ARCHITECTURE = in_parts(ARCHITECTURES, len(ARCHITECTURES))


@pytest.mark.every(3)
@pytest.mark.parametrize("arch", ONE_ARCHITECTURE)
def test_the_built_kernels_pass(kernels, arch):
    borrowed = [k for k in gates.elsewhere(kernels) if k.arch == arch]
    assert bool(borrowed) == (arch == "sm_89")
    kernels = [k for k in kernels if k.arch == arch]
    assert not [f"{k.name} on {arch}: {sentence}" for k in kernels + borrowed for sentence in gates.failures(k)]
    assert len(gates.table(kernels).splitlines()) == 1 + len(kernels)
    gemms = [k for k in kernels if re.search("gem[mv]", k.name)]
    assert gemms and all(gates.tensor_core(k.name, k.arch) and gemm_gates.counted(k) for k in gemms)
    assert all(gemm_gates.claims(k.name) for k in gemms if "Config<" in k.name)
    assert len(gemm_gates.table(kernels).splitlines()) == 2 + len(gemms)
    attention = [k for k in kernels if re.match("attention_(mma|wgmma)", k.name)]
    left_out = [k for k in attention if gates.left_out(k)]
    assert {"m=128, n=64" in k.name for k in left_out} == ({True} if arch in ("sm_90", "sm_120") else set())
    attention = [k for k in attention if k not in left_out]
    assert attention and all(attention_gates.claims(k.name) and attention_gates.counted(k) for k in attention)
    assert len(attention_gates.table(kernels).splitlines()) == 2 + len(attention)

    for k in kernels:
        functions = [block for label, block in k.code.block_of.items() if label.startswith("$")]
        blocks = range(min(functions, default=len(k.code.starts)))
        lost = [k.code.body(block)[0] for block in blocks if block not in k.code.successors]
        padding = {"BRA", "NOP"}
        assert {i.name for i in lost} <= padding, (
            f"{k.name} on {k.arch}: code that no branch seems to reach, {lost[:3]}"
        )


#: (elements that must have grouped GEMMs in an architecture's code, the least number of tiles that they share with GEMMs)
GROUPED = {"sm_80": ({"Int8"}, 4), "sm_89": ({"E4m3Blocks"}, 2), "sm_90": (set(), 0), "sm_90a": ({"Int8", "E4m3Blocks"}, 6),
           "sm_120": (set(), 2)}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ONE_ARCHITECTURE)
def test_main_loops_of_experts_are_those_of_one_product(kernels, arch):
    """Issued instructions, of each tile that both have, at most 3 % more."""
    issued = {False: {}, True: {}}
    for k in (k for k in kernels if k.arch == arch):
        if tile := re.match(r"gemm_(\w+)_kernel<\w+<(\w+), \w+\{m=(\d+), n=(\d+),", k.name):
            kind, element, *rest = tile.groups()
            tile = (kind, element.replace("Optional", ""), *rest)
            issued["Grouped" in k.name][tile] = gemm_gates.counted(k)[0]
    elements, shared = GROUPED[arch]
    assert {element for _, element, *_ in issued[True]} >= elements
    both = issued[True].keys() & issued[False].keys()
    assert len(both) >= shared, (arch, len(both))
    more = {tile: issued[True][tile] / issued[False][tile] for tile in both}
    assert max(more.values(), default=1) <= 1.03, more


@pytest.mark.every(3)
def test_the_command_reports_and_fails(bad_object, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gates, "assembler_messages", lambda commands: ["x.cu: C7510"])
    wheel = tmp_path / "forwardpass.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(bad_object, "forwardpass/_kernels.so")
    assert gates.main(str(wheel)) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^kernel +arch +registers", printed, re.M) and re.search(
        r"compiled instances +14$", printed, re.M
    )
    for sentence in (
        "int8_gemm_dp4a_kernel on sm_80: no loop",
        "x.cu: C7510",
    ):
        assert f"FAILS  {sentence}" in printed
    zipfile.ZipFile(wheel, "w").close()
    with pytest.raises(SystemExit, match="has no CUDA kernels"):
        gates.main(str(wheel))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("kernel", "arch"),
    [
        ("int8_gemm_kernel", "sm_80"),
        ("int8_gemm_kernel", "sm_89"),
        ("attention_kernel", "sm_90a"),
        ("declared_kernel", "sm_80"),
    ],
)
def test_a_right_kernel_passes(bad, kernel, arch):
    assert gates.failures(bad[kernel, arch]) == []


@pytest.mark.parametrize(
    ("kernel", "arch", "sentences"),
    [
        (
            "spilling_kernel",
            "sm_80",
            [r"\d+ bytes of local memory a thread", r"local memory in the main loop: \d+ (LDL|STL)"],
        ),
        ("declared_kernel", "sm_89", ["128256 bytes of shared memory, a block has at most 101376"]),
        ("undeclared_kernel", "sm_80", ["dynamic shared memory of a size that nothing states"]),
        ("int8_gemm_dp4a_kernel", "sm_80", ["no loop with a tensor-core instruction, IMMA.* expected"]),
        ("int8_gemm_straight_kernel", "sm_80", ["no loop with a tensor-core instruction"]),
        ("int8_gemm_f16_kernel", "sm_80", [r"no IMMA.* in the main loop, which has \d+ HMMA.16816.F32"]),
    ],
)
def test_a_bad_kernel_fails(bad, kernel, arch, sentences):
    messages = gates.failures(bad[kernel, arch])
    assert len(messages) == len(sentences) and all(map(re.match, sentences, messages)), messages


@pytest.mark.every(3)
def test_what_attention_s_main_loop_issues(kernels):
    k = next(k for k in kernels if k.arch == "sm_90a" and HEAD_DIM_128 in k.name)
    issued = attention_gates.counted(k)
    assert 6 < issued <= 6.5 and attention_gates.failures(k) == []
    shortest = k.code.shortest_trip(k.code.main_loop)
    assert 64 <= len(k.code.main_loop.instructions) - len(shortest) <= 70  # what rescales
    assert sum(bool(sass.MMA.match(i.opcode)) for i in shortest) == k.code.main_loop.mma.total()
    fewer_keys = dataclasses.replace(k, name=k.name.replace("n=128}", "n=64}"))
    assert attention_gates.failures(fewer_keys) == [
        f"{2 * issued:.2f} instructions a score in the main loop, the bar is 6.5",
        f"{64 * 2 * 128 * 256 // 8} multiply-accumulates of a warp in the main loop, its Config's block has {64 * 128 * 256 // 8}",
    ]
    assert attention_gates.failures(dataclasses.replace(k, threads=256)) == ["256 threads, its Config says 384"]


def as_gemm(kernel, config, **different):
    return dataclasses.replace(kernel, name=f"gemm_mma_kernel<{config}, SharedBytes<0u> >", **different)


def test_what_a_gemm_s_main_loop_issues(bad, monkeypatch):
    k = as_gemm(bad["int8_gemm_kernel", "sm_80"], MMA_128, dynamic_shared=49152)
    instructions = len(k.code.main_loop.instructions)
    issued, other = instructions * 2**20 / (4 * 16 * 8 * 32), (instructions - 4) / 4
    assert gemm_gates.counted(k) == (issued, other) and issued > 450 and 2 < other < 3.66
    bar = f"{issued:.0f} instructions for 2^20 multiply-accumulates in the main loop, the bar is 450"
    assert gemm_gates.failures(k) == [bar]
    assert gemm_gates.failures(as_gemm(k, MMA_64)) == []  # has no bar
    assert gemm_gates.counted(bad["int8_gemm_kernel", "sm_80"]) is None  # by its name no GEMM of ours
    assert re.search(rf" {issued:.0f} +0 +450 +{other:.2f}  1192, 3.66", gemm_gates.table([k]))
    monkeypatch.setattr(gemm_gates.SM80, "other", 2.0)
    assert gemm_gates.failures(k) == [bar, f"{other:.2f} instructions beside each MMA, CUTLASS has 2 (sm_80 int8)"]
    assert gemm_gates.macs("IGMMA.64x256x32.S8.S8") == 16 * 256 * 32
    assert gemm_gates.macs("HMMA.16816.F32.BF16") == 16 * 8 * 16
    assert gemm_gates.macs("IMMA.16832.S8.S8") == gemm_gates.macs("QMMA.16832.F32.E4M3.E4M3") == 16 * 8 * 32
    with pytest.raises(ValueError, match="DMMA"):
        gemm_gates.macs("DMMA.884")


@pytest.mark.parametrize(
    ("config", "different", "sentence"),
    [
        (
            MMA_64,
            {"dynamic_shared": 36863},
            "36863 bytes of dynamic shared memory, .* 3 stages are 36864",
        ),
        (MMA_64.replace("warps_n=2", "warps_n=4"), {}, "128 threads, its Config says 256"),
        (
            MMA_64.replace("sm=2", "sm=3"),
            {"registers": 240},
            "2 blocks fit a multiprocessor, its Config says 3",
        ),
        (
            WGMMA_128,
            {"threads": 384, "dynamic_shared": 196608, "registers": 176},
            "0 blocks fit",
        ),
        (W8A16_16, {"dynamic_shared": 61439}, "61439 bytes of dynamic shared"),
    ],
)
def test_what_a_config_claims(bad, config, different, sentence):
    right = {"dynamic_shared": 61440, "registers": 128, **different}
    messages = gemm_gates.failures(as_gemm(bad["attention_kernel", "sm_90a"], config, **right))
    messages = [s for s in messages if "main loop" not in s and "beside each MMA" not in s]
    assert len(messages) == 1 and re.match(sentence, messages[0]), messages


def test_a_wgmma_kernel_loads_by_tma(bad):
    k = dataclasses.replace(bad["attention_kernel", "sm_90a"], name="gemm_wgmma_kernel<Config>")
    assert gemm_gates.failures(k) == ["no loop loads by TMA (UTMALDG)"]


def test_what_is_read_of_a_kernel(bad):
    k = bad["int8_gemm_kernel", "sm_80"]
    assert len(k.code.loops) == 3 and k.code.main_loop.mma == {"IMMA.16832.S8.S8": 4}
    assert k.threads == 128 and k.source.endswith("tests/gates/gate_kernels_sm80.cu")
    assert bad["attention_kernel", "sm_90a"].code.main_loop.mma == {"HGMMA.64x8x16.F32": 4}
    assert bad["attention_kernel", "sm_90a"].static_shared == 16, "the system's 1024 bytes are no kernel's"
    declared, undeclared = bad["declared_kernel", "sm_80"], bad["undeclared_kernel", "sm_80"]
    assert (declared.static_shared, declared.dynamic_shared, declared.blocks_per_sm) == (256, 128000, 1)
    assert declared.uses_dynamic_shared and undeclared.uses_dynamic_shared
    assert undeclared.threads is None and undeclared.blocks_per_sm is None
    assert not k.uses_dynamic_shared, "an array of the file that this kernel does not use"
    table = gates.table(list(bad.values()))
    assert re.search(r"declared_kernel<.*  sm_80 .* 256 \+ 128000 +1 of 256 threads ", table)
    assert re.search(r"undeclared_kernel .* no launch bounds ", table)
    assert re.search(r"int8_gemm_kernel .* 4 IMMA.16832.S8.S8$", table, re.M)


def test_machine_code_has_no_copy_of_its_ptx(tmp_path):
    if not LIBRARY.exists():
        pytest.skip("this build has no CUDA kernels")
    cubin.tool("cuobjdump", "-xelf", "unpermute_sm80", LIBRARY.resolve(), cwd=tmp_path)
    images = [path.read_bytes() for path in tmp_path.iterdir()]
    assert images
    assert not any(name.startswith((".nv_debug", ".debug_line")) for i in images for name in cubin.sections(i))


@pytest.mark.every(3)
def test_machine_code_without_its_ptx_is_refused(commands, tmp_path):
    nvcc = shlex.split(commands[0]["command"].lstrip("("))[0]
    (source := tmp_path / "kernel_sm80.cu").write_text("__global__ void kernel() {}")
    output = tmp_path / "kernel.o"
    subprocess.run([nvcc, "-gencode=arch=compute_80,code=sm_80", "-c", source, "-o", output], check=True)
    with pytest.raises(ValueError, match="it has none of _Z6kernelv"):
        cubin.kernels(output)


def test_dynamic_shared_memory_in_a_function_that_is_not_inlined():
    ptx = """
.extern .shared .align 16 .b8 bytes[];
.func (.param .b32 a) helper()
{ mov.u32 %r1, bytes; }
.visible .entry first(.param .u64 p)
{ ret; }
.entry second()
{ mov.u32 %r1, bytes_of_another; }
"""
    assert cubin.entries(ptx) == {"first", "second"}
    assert cubin.users_of_dynamic_shared(ptx) == {"first", "second"}, "either may call it"
    assert cubin.users_of_dynamic_shared(ptx.replace("%r1, bytes; }", "%r1, 0; }")) == set()


# Of the CUDA occupancy calculator's rules, worked out by hand: the limit that binds is named.
@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 128, 255, 0, 2),  # registers: 8 warps of 8192
        ("sm_80", 256, 64, 0, 4),  # registers
        ("sm_80", 256, 32, 0, 8),  # threads, 2048
        ("sm_89", 256, 40, 0, 6),  # threads, 1536
        ("sm_90", 32, 16, 0, 32),  # blocks
        ("sm_89", 32, 16, 0, 24),  # blocks
        ("sm_90", 128, 32, 227 * 1024, 1),  # shared memory
        ("sm_80", 128, 32, 81 * 1024, 2),  # shared memory: 82 KB of 164 each, with the system's
        ("sm_80", 128, 32, 81 * 1024 + 1, 1),
        ("sm_90", 384, 168, 0, 1),  # registers: 12 warps of 5376, 12 an SM
    ],
)
def test_blocks_per_sm(arch, threads, registers, shared, blocks):
    assert cubin.limits(arch).blocks_per_sm(threads, registers, shared) == blocks


def test_tensor_core_table():
    assert gates.tensor_core("quantize_kernel<(Dtype)0>", "sm_80") == []
    assert gates.tensor_core("gemm_mma_kernel<MmaConfig<E4m3Blocks, MmaTile{m=128}>>", "sm_89") == [r"QMMA\b"]
    assert gates.tensor_core("gemv_kernel<i8>", "sm_90") == [r"IMMA\b"]
    assert gates.tensor_core("gemv_kernel<e4m3>", "sm_90") == [r"HMMA\b"]
    assert len(gates.tensor_core("attention_8bit_kernel<Config>", "sm_89")) == 2


def test_a_kernel_that_lacks_an_architecture_is_named(bad):
    assert gates.missing_architectures([bad["attention_kernel", "sm_90a"]]) == []
    source = "csrc/kernels/quantize/quantize_sm80.cu"
    (message,) = gates.missing_architectures(
        [dataclasses.replace(bad["spilling_kernel", arch], source=source) for arch in ("sm_80", "sm_89")]
    )
    assert message == "spilling_kernel: not compiled for sm_90, sm_120"
    # beside a file for 9.0a, which gate_kernels_sm80.cu has
    (message,) = gates.missing_architectures([bad["spilling_kernel", arch] for arch in ("sm_80", "sm_89")])
    assert message == "spilling_kernel: not compiled for sm_120"
    (message,) = gates.missing_architectures([bad["spilling_kernel", "sm_80"]])
    assert message == "spilling_kernel: not compiled for sm_120", "8.9 runs the code for 8.0"


def test_8_9_runs_the_code_for_8_0_that_fits(kernels):
    elsewhere = {(k.source.removeprefix("csrc/kernels/"), k.arch) for k in gates.elsewhere(kernels)}
    shared = "attention/table_sm80.cu", "attention_decode/attention_decode_sm80.cu"
    assert {(source, "sm_89") for source in shared} <= elsewhere
    own = "quantize/quantize_sm80.cu", "gemm/table_w8a16_sm80.cu", "gemm/table_fp8_sm89.cu"
    assert not {source for source, _ in elsewhere} & set(own)
    head_dim_128 = r".*\bMmaAttentionConfig<.*head_dim=128, value_dim=128, modified=false"
    tiles = [k.name for k in gates.elsewhere(kernels) if re.match(head_dim_128, k.name)]
    assert tiles and all("n=32" in tile for tile in tiles), (
        "of 64 keys, which an L40S does not hold, 8.0 alone has code"
    )


def test_losses_on_8_9_are_named(bad):
    right, scalar = bad["int8_gemm_kernel", "sm_80"], bad["int8_gemm_dp4a_kernel", "sm_80"]
    assert ada_gates.by_class(right)["tensor cores"] == 4
    assert ada_gates.losses(right, bad["int8_gemm_kernel", "sm_89"]) == []
    assert "4 tensor cores in the main loop of the code for 8.0, 0 in that for 8.9" in ada_gates.losses(right, scalar)


@pytest.mark.every(2)
def test_files_without_code_for_8_9_are_compiled_for_it(bad, bad_object, commands):
    """And compared: a kernel that differs is named, by one for 8.0 under another's name."""
    kernels = [k for (name, arch), k in bad.items() if arch == "sm_80" and name != "spilling_kernel"]
    source = str((HERE / "gate_kernels_sm80.cu").relative_to(gates.ROOT))
    entries = [{**commands[0], "file": source}]

    def compile_again(entry, arches, output):
        assert (entry["file"], arches) == (source, ["89"])
        shutil.copy(bad_object, output)

    kernels = [dataclasses.replace(k, source=source) for k in kernels]
    pairs, sentences = ada_gates.compare(kernels, entries, compile_again)
    assert sentences == [] and {k.arch for k, _ in pairs} == {"sm_80"} and len(pairs) >= 5
    assert len(ada_gates.table(pairs).splitlines()) == 1 + len(pairs) + len(ada_gates.KNOWN)
    other = next(k for k in kernels if k.name.startswith("int8_gemm_dp4a"))
    wrong = [
        dataclasses.replace(k, mangled=other.mangled) if k.name.startswith("int8_gemm_straight") else k for k in kernels
    ]
    pairs, sentences = ada_gates.compare(wrong, entries, compile_again)
    assert sentences and all(s.startswith("int8_gemm_straight_kernel: ") for s in sentences)
    assert ada_gates.compare(kernels, entries, lambda *_: "C7510")[1] == [f"{source} for 89: C7510"]


@pytest.mark.slow
def test_8_9_loses_nothing_by_the_code_for_8_0(kernels, commands):
    pairs, sentences = ada_gates.compare(kernels, commands, gates.compile_again)
    assert len(pairs) > 30 and not sentences


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="sm_75: the limits are known of sm_80, sm_89, sm_90, sm_120"):
        cubin.limits("sm_75")


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("source", "defined", "arch", "message"),
    in_turn(
        [
            ("gate_kernels_sm90a.cu", "", "90a", None),
            ("gate_kernels_sm90a.cu", "#define SERIALISED\n", "90a", "C7514"),
            ("gate_kernels_sm80.cu", "", "100a", "spilling_kernel"),
        ]
    ),
)
def test_the_assembler_s_messages_stop_the_build(commands, tmp_path, source, defined, arch, message):
    (copied := tmp_path / source).write_text(defined + (HERE / source).read_text())
    said = gates.compile_again(commands[0], [arch], tmp_path / "kernels.o", copied)
    assert said is None if message is None else message in said


def test_the_assembler_s_messages_in_a_log_of_the_build(commands, monkeypatch, tmp_path):
    output = tmp_path / "x.o"
    monkeypatch.setattr(gates, "compile_again", lambda *args: None)
    entries = [{**commands[0], "output": str(output)}]
    assert "no log of its compilation" in gates.assembler_messages(entries)[0]
    output.with_suffix(".o.log").write_text("")
    assert gates.assembler_messages(entries) == []
    output.with_suffix(".o.log").write_text("ptxas info : (C7510) wgmma serialized")
    assert "C7510" in gates.assembler_messages(entries)[0]


@pytest.mark.slow
def test_the_kernels_compile_for_the_architectures_that_are_not_shipped(commands):
    assert gates.assembler_messages(commands) == []
