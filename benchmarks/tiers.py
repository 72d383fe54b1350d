"""Tiers of x86 CPUs, and the environment that holds a process to one of them, so that a machine can stand for a lesser one."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Collection
from dataclasses import dataclass

#: What our own kernels may use, of a process that is held to less than the machine has.
OURS = "FORWARDPASS_CPU"


@dataclass(frozen=True)
class Tier:
    """flags: those of /proc/cpuinfo that it takes; environment: what holds torch and the libraries in it to the tier."""

    flags: frozenset[str]
    environment: dict[str, str]


#: The lowest first. FBGEMM has torch's dynamic INT8 products. Of MKL and FBGEMM nothing is beyond AVX-512 in float32 and VNNI.
TIERS = {
    "avx2": Tier(
        frozenset({"avx2", "fma", "bmi2"}),
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        },
    ),
    "avx_vnni": Tier(
        frozenset({"avx2", "fma", "bmi2", "avx_vnni"}),
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
            "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        },
    ),
    "avx512_vnni": Tier(frozenset({"avx512f", "avx512bw", "avx512_vnni"}), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
    "amx": Tier(frozenset({"avx512f", "avx512bw", "avx512_vnni", "amx_int8"}), {}),
}


def cpu_flags() -> frozenset[str]:
    """Those of /proc/cpuinfo, none where there is no such file."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def choose(argument: str | None, environment: str | None, flags: Collection[str]) -> tuple[str | None, str | None]:
    """(the tier to measure, the machine's own), None where the machine has none.

    argument: what the command asks for; environment: what holds this process to a tier; with neither it is the machine's own.

    Raises:
        ValueError: in one sentence, where the two differ, there is no such tier, or the machine lacks it.
    """
    possible = [name for name, tier in TIERS.items() if tier.flags <= set(flags)]
    highest = possible[-1] if possible else None
    if argument and environment and argument != environment:
        raise ValueError(
            f"the tier asked for is {argument}, and {OURS}={environment} holds this process to another: unset it"
        )
    tier = argument or environment or highest
    if tier and tier not in TIERS:
        raise ValueError(f"there is no tier {tier}: pass one of {', '.join(TIERS)}")
    if tier and tier not in possible:
        lacking = ", ".join(sorted(TIERS[tier].flags - set(flags)))
        raise ValueError(f"this CPU is no {tier}: it lacks {lacking}; pass one of {', '.join(possible) or 'none'}")
    return tier, highest


def hold_to(tier: str) -> dict[str, str]:
    """Starts this process again in the environment of a tier below the machine's, unless it is in it; returns that environment.

    Libraries read theirs when they are loaded, torch among them: nothing but a new process has it for all.
    """
    environment = {OURS: tier, **TIERS[tier].environment}
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **environment})
    return environment
