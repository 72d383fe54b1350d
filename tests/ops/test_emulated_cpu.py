"""Tiers of the CPU that the tests' machine may lack, by their own instructions: emulated_cpu.cpp runs them."""

import pathlib
import platform
import subprocess
import sys

import pytest
import torch
from processes import two_threads

TIERS = torch.ops.forwardpass._cpu_tiers().split(",")


@pytest.fixture(scope="module")
def emulated_cpu(tmp_path_factory):
    """A library that, preloaded, runs the instructions of AMX and of AVX-VNNI, 0.1 ms each."""
    if platform.machine() != "x86_64":
        pytest.skip("its instructions are x86-64's")
    library = tmp_path_factory.mktemp("emulated_cpu") / "emulated_cpu.so"
    source = pathlib.Path(__file__).with_name("emulated_cpu.cpp")
    subprocess.run(["g++", "-std=c++20", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    return str(library)


def cpu_flags():
    """What the kernel has the CPU's instructions listed as."""
    return set(pathlib.Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())


def test_what_the_cpu_has_is_not_emulated(emulated_cpu):
    """Some of AMX's instructions do not trap on a CPU that has it: the sums were wrong."""
    emulates = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).forwardpass_emulates; f.restype = ctypes.c_bool;"
        "print(*map(f, (b'avxvnni', b'amx-int8', b'avx2')))"
    )
    said = subprocess.run([sys.executable, "-c", emulates, emulated_cpu], capture_output=True, text=True, check=True)
    lacks = [str(flag not in cpu_flags()) for flag in ("avx_vnni", "amx_int8")]
    assert said.stdout.split() == [*lacks, "False"]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("tier", "least", "shapes"),
    [
        ("avx_vnni", "avx2", [[1, 1, 1], [5, 3, 70], [7, 17, 150], [33, 2, 64]]),
        ("amx", "avx512_vnni", [[14, 17, 70], [34, 40, 64], [65, 33, 200]]),
    ],
)
def test_tiers_that_the_cpu_may_lack_are_exact(tier, least, shapes, emulated_cpu):
    """By their own instructions: an AVX-512 CPU has another encoding of AVX-VNNI's. Those that the CPU has are not emulated."""
    if least not in TIERS:
        pytest.skip(f"the tier {tier} needs instructions of {least} that are not emulated")
    if tier == "amx" and "amx_int8" in cpu_flags() and "amx" not in TIERS:
        pytest.skip("the kernel lets no process use this CPU's AMX tiles, whose instructions then trap in part")
    code = f"c.exact_sums({shapes}); c.small_convolutions(); c.few_rows_by_threads(); print(c.environment.cpu_tier())"
    done = run(code, tier, LD_PRELOAD=emulated_cpu)
    assert done.stdout.strip() == tier, done.stderr


def run(code, tier, **environment):
    command = [sys.executable, "-c", f"import cpu_tiers as c; {code}"]
    env = two_threads({"FORWARDPASS_CPU": tier, **environment})
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.every(3)
def test_attention_8bit_on_tiles_has_the_bits_of_vnni(emulated_cpu):
    """Rows, columns and keys that are whole tiles and that are not; the other tiers' floats are added in another order."""
    if "avx512_vnni" not in TIERS:
        pytest.skip("the tier amx needs instructions of avx512_vnni that are not emulated")
    on_tiles, by_vnni = (
        run("c.print_attention_8bit()", tier, **preloaded)
        for tier, preloaded in (("amx", {"LD_PRELOAD": emulated_cpu}), ("avx512_vnni", {}))
    )
    assert on_tiles.stdout.startswith("amx") and by_vnni.stdout.startswith("avx512_vnni"), (
        on_tiles.stderr + by_vnni.stderr
    )
    assert on_tiles.stdout.splitlines()[1:] == by_vnni.stdout.splitlines()[1:]
