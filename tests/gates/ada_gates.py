"""Whether a GPU of 8.9 loses anything where it runs the code for 8.0: setup.py gives few files code of their own for 8.9.

Both are compiled, and what their main loops issue is counted by class. The code for 8.0 may issue more of a class by 2 % of the
loop at most, or by two instructions. A kernel of KNOWN issues more, and is as fast: memory binds it by so much that the timeline
gives the same time.

Beyond main loops: int8_gemm's epilogue to e4m3, which no module uses, converts by hand. Modelled on an L40S, 512 x 1024 with K 256
take 13.6 us for 12.3; outputs of 16 bits and of int8 take the same time, and so does e4m3 where K is divided (K 1024).
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable

import cubin
import sass

#: By the kernel's name: modelled microseconds on an L40S of the code for 8.0 and for 8.9, and of what.
KNOWN: dict[str, tuple[float, float, str]] = {
    r"attention_decode_kernel<DecodeConfig<e4m3, 128>": (15.6, 15.6, "32 heads of q, 8 of an e4m3 cache of 4096 keys"),
    r"attention_decode_kernel<DecodeConfig<e4m3, 256>": (27.1, 27.0, "the same at head dim 256"),
}
MOST_MORE = 0.02

CLASSES = {
    "tensor cores": r"[A-Z]MMA",
    "shared memory": r"LDSM|LDS|STS|STSM|ATOMS|SHFL",
    "global memory": r"LDG|STG|LDGSTS|LD|ST|RED|ATOM|ATOMG|LDC|ULDC",
    "special functions": r"MUFU",
    "conversions": r"I2FP?|F2I|F2F|F2FP|I2I|I2IP|FRND",
    "half": r"H(ADD|MUL|FMA|SET|SETP|MNMX)2?",
    "float": r"F(ADD|MUL|FMA|SETP|SEL|MNMX|SET|CHK)",
    "waits": r"BAR|DEPBAR|LDGDEPBAR|MEMBAR|WARPSYNC|NANOSLEEP",
    "branches": r"BRA|BSSY|BSYNC|CALL|RET|EXIT|BREAK|BRX|VOTE|VOTEU|PLOP3|YIELD|R2P|P2R",
}


def kind(i: sass.Instruction) -> str:
    """Its class; what none of CLASSES names is integer arithmetic or a move."""
    return next((name for name, opcodes in CLASSES.items() if re.fullmatch(opcodes, i.name)), "integers, moves")


def by_class(k: cubin.Kernel) -> collections.Counter:
    """Instructions of the main loop, NOPs apart; without a loop all of the kernel."""
    instructions = k.code.main_loop.instructions if k.code.main_loop else k.code.instructions
    return collections.Counter(kind(i) for i in instructions if not i.is_nop)


def losses(on_80: cubin.Kernel, on_89: cubin.Kernel) -> list[str]:
    """Of which class the code for 8.0 issues more."""
    theirs, own = by_class(on_80), by_class(on_89)
    return [
        f"{theirs[name]} {name} in the main loop of the code for 8.0, {own[name]} in that for 8.9"
        for name in sorted(theirs)
        if theirs[name] > own[name] + max(2, MOST_MORE * own.total())  # HFMA2 is a move, too
    ]


def known(name: str) -> bool:
    return any(re.match(pattern, name) for pattern in KNOWN)


def shared(kernels: list[cubin.Kernel]) -> list[cubin.Kernel]:
    """Those for 8.0 of files that have no code for 8.9."""
    own = {k.source for k in kernels if k.arch == "sm_89"}
    return [k for k in kernels if k.arch == "sm_80" and k.source not in own]


def table(pairs: list[tuple[cubin.Kernel, cubin.Kernel]]) -> str:
    lines = [
        "main loops of the code for 8.0 that 8.9 runs, beside its own: instructions, registers, and where they differ"
    ]
    for k, own in sorted(pairs, key=lambda pair: pair[0].name):
        a, b = by_class(k), by_class(own)
        differing = ", ".join(f"{name} {a[name]} for {b[name]}" for name in sorted(a | b) if a[name] != b[name])
        lines.append(f"{a.total():>6}{b.total():>6}{k.registers:>5}{own.registers:>5}  {k.name}  {differing}".rstrip())
    for pattern, (on_80, on_89, shape) in KNOWN.items():
        lines.append(f"modelled on an L40S: {on_80} us for {on_89}, {shape}, {pattern}")
    return "\n".join(lines)


def compare(
    kernels: list[cubin.Kernel], commands: list[dict[str, str]], compile_again: Callable[..., str | None]
) -> tuple[list[tuple[cubin.Kernel, cubin.Kernel]], list[str]]:
    """(pairs of a kernel for 8.0 and the same for 8.9, sentences): those files are compiled again, for 8.9."""
    pairs, messages = [], []
    of_source: dict[str, dict[str, cubin.Kernel]] = collections.defaultdict(dict)
    for k in shared(kernels):
        of_source[k.source][k.name] = k
    for entry in commands:
        if entry["file"] not in of_source:
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = pathlib.Path(folder, "sm_89.o")
            if message := compile_again(entry, ["89"], output):
                messages.append(f"{entry['file']} for 89: {message.strip()}")
                continue
            own = {k.name: k for k in cubin.kernels(output) if k.arch == "sm_89"}
        for name, k in of_source[entry["file"]].items():
            if len(own[name].code.instructions) > 16:  # else it is empty there, as its blocks do not fit
                pairs.append((k, own[name]))
    messages += [f"{k.name}: {sentence}" for k, own in pairs if not known(k.name) for sentence in losses(k, own)]
    return pairs, messages
