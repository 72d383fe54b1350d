"""`python -m tests.interpreted.mutants`: damages kernels' PTX, one statement at a time, and tells what nobody noticed.

A mutant is detected by a finding, by a result (of whatever memory the kernel can touch, padding included) that is not
that of the unmutated kernel, or by no end within ten times its warp instructions; in one of the launches that reach its
statement, at one of three seeds, or at one for arithmetic, to which the schedule is no matter. What is not detected needs
a reviewed reason in mutant_reasons.json.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import itertools
import json
import math
import pathlib
import struct
import sys
import time

import torch

import forwardpass as fp
from forwardpass.ops.common.activations import GATED
from forwardpass.ops.common.rotated_cases import whole_blocks
from forwardpass.ops.common.rotation import SIZES
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_conv2d import cases as int8_conv2d
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.testing import apart, poisoned_outputs
from gpuless import Module

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.append(str(pathlib.Path(__file__).parents[2] / "interpreter/tests"))  # the witnesses

import mutant_attention
import mutant_convolution
import mutant_decode
import mutant_edits
import mutant_experts
import mutant_gemms
import mutant_operands
from mutant_instances import instance_launches
from mutant_launches import reached, recording
from triton_version import triton_version, what_is_against_the_isa_is_an_error

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
SEEDS = range(3)
INSTANCES = {
    name: instance
    for module in (mutant_gemms, mutant_convolution, mutant_attention, mutant_operands, mutant_decode, mutant_experts)
    for name, instance in module.INSTANCES.items()
}
TRITON = triton_version()
REASONS = pathlib.Path(__file__).with_name("mutant_reasons.json")
#: of the launches that reach the same statements, the shortest that these are mutated in
ENOUGH = 2
#: Beside its own shape, which is small or odd, the options of each case run at each of these (rows, columns): rows that
#: end within each of a thread's vectors. Where rows are reduced, also at these with one thread to a row and as many
#: columns more as it keeps in registers, and with eight warps to a row.
SHAPES = (*((8, 8 * vector + n) for vector in range(4) for n in (3, 7)), (8, 32))
IN_REGISTERS, NARROW, WARPS = 32, 128, ((5, 1047), (5, 1048), (16, 4104))
#: K of products of few rows and columns that are sums of two and of seven parts: the compiler adds up four at a time
SPLIT_K = (512, 1792)  # two parts, and seven
#: an instance of each kernel: its operation's cases of this dtype
OPERATIONS = {
    "quantize": {"x_dtype": torch.float32},
    "norm_quantize": {"x_dtype": torch.float16},
    "activation_quantize": {"x_dtype": torch.float32},
    "dequant_activation": {"acc_dtype": torch.int32},
    "quantize_rotated": {"x_dtype": torch.float32},
}
#: of these alone; the rest of the kernel is that of another subject
FILES = {"quantize_rotated": ("csrc/device/rotate.cuh",)}
WITNESSES = ("int8_matmul", "fp8_matmul", "fp8_descriptor_matmul", "bf16_matmul", "fp16_attention", "softmax", "layer_norm",
             "sum_by_the_last", "split_k_matmul", "histogram")  # fmt: skip


def operation_launches(name, arch):
    op, rotated = name.removesuffix("_rotated"), name.endswith("_rotated")
    module = importlib.import_module(f"forwardpass.ops.{op}.cases")
    # each case in the one instance; bf16 weights belong to bf16 rows
    rotations = ((SIZES if rotated else (None,)),) if hasattr(module, "ROTATIONS") else ()
    cases = [dataclasses.replace(c, **OPERATIONS[name]) for c in module.cases(*rotations) if math.prod(c.shape)]
    if name == "dequant_activation":  # of gated ones with a zero point the cases have one, of int8 that saturate
        cases.append(module.Case((3, 32), epilogue=EpilogueCase(activation=GATED[0], zero_point="row")))
    if name == "norm_quantize":
        cases = [c for c in cases if torch.bfloat16 not in (c.weight, c.bias, c.ada_scale, c.ada_shift)]
    torch.use_deterministic_algorithms(True)
    with recording() as launches, poisoned_outputs(), fp.interpret(arch, approximate=False), fp.use_backend("cuda"):
        for case in cases:
            args = case.arguments()
            module.assert_matches(fp.dispatch.operations[getattr(case, "op", op)](*args), args)
        longer = [(rows, columns + IN_REGISTERS) for rows, columns in SHAPES]
        shapes = SHAPES if name == "dequant_activation" else (*SHAPES, *WARPS, *longer)
        for case, shape, aligned in itertools.product(options(cases), shapes, (True, False)):
            whole = shape[0], -(-shape[1] // 16) * 16 if needs_whole(case) else shape[1]
            whole = whole_blocks(whole, getattr(case, "rotate", None))
            args = dataclasses.replace(case, shape=whole).arguments()
            args = [place(t, aligned) if isinstance(t, torch.Tensor) else t for t in args]
            fp.dispatch.operations[getattr(case, "op", op)](*args)
            if shape in longer and not rotated:
                narrow(launches[-1])
        if name == "dequant_activation":
            for op, case in split_products(cases):
                fp.dispatch.operations[op](*case.arguments())
    torch.use_deterministic_algorithms(False)
    return [launch for launch in launches if launch.kernel == launches[0].kernel]


def split_products(cases):
    """Those whose parts this kernel adds up, with the epilogues of `cases` and what products alone have: a residual, a gate of
    adaLN, and a residual before the activation."""
    scaled = [case for case in options(cases) if case.epilogue.a_scale and case.epilogue.b_scale]
    for case, n, k in itertools.product(scaled, (3, 7, 32), SPLIT_K):
        yield "int8_gemm", int8_gemm.Case(5, -(-n // 16) * 16 if needs_whole(case) else n, k, case.epilogue)
    for dtype, layout in itertools.product((torch.float32, torch.float16, torch.bfloat16), ("aligned", "apart")):
        residual = EpilogueCase(out_dtype=dtype, residual=layout)
        for gated, n in itertools.product((False, True), (3, 7, 32)):
            yield "int8_gemm", int8_gemm.Case(6, n, SPLIT_K[-1], dataclasses.replace(residual, ada_gate=gated))
        first = dataclasses.replace(residual, activation="relu")
        yield "int8_conv2d", int8_conv2d.Case((1, 3, 3), 128, 24, epilogue=first, residual_first=True)


def narrow(launch):
    """One thread to a segment, by what its RowsLaunch says (csrc/device/quantize_rows.cuh). As launched by the package,
    a row has more columns than its threads keep in registers from 16385 on."""
    at = parameters(launch.ptx, launch.kernel)[1][0]
    _, _, segments = struct.unpack_from("iiq", launch.parameters, at)
    struct.pack_into("ii", launch.parameters, at, 1, NARROW)
    launch.config = (-(-segments // NARROW), 1, 1), (NARROW, 1, 1), *launch.config[2:]


@functools.lru_cache
def parameters(ptx, kernel):
    return Module(mutant_edits.only(ptx, kernel))[kernel].parameters


def options(cases):
    """The cases without their shapes, each once."""
    return dict.fromkeys(dataclasses.replace(case, shape=()) for case in cases)


def place(t, aligned):
    """A vector at an aligned address or one element behind one; a matrix, with other values, whose rows begin likewise."""
    if t.dim() == 1:
        return t if aligned else torch.cat([t[:1], t])[1:]
    t = spread(t) if t.is_floating_point() else t
    return apart(t, padding=16 - t.shape[1] % 16 + (not aligned))


def spread(like):
    """Normal values, so that each of them matters and not only the awkward ones; each row has its extremes elsewhere, as
    what a maximum misses shows only where it stands: the first eight rows at their ends, the others in one
    warp's columns after the other."""
    rows, columns = like.shape
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(1))
    for row in range(rows):
        at = columns - 1 - row if row < 8 else (row - 8) * columns // (2 * rows - 16)
        x[row, at % columns], x[row, (at + columns // 3) % columns] = 40, -30
    return x.to(like.dtype)


def needs_whole(case):
    """Whether the contract takes whole vectors alone."""
    return getattr(case, "layout", "") == "interleaved8" or (
        hasattr(case, "epilogue") and case.epilogue.activation in GATED
    )


def witness_launches(name, arch):
    import witness_cases
    import witness_kernels

    with recording() as launches, fp.interpret(arch, approximate=False):
        witness_cases.CASES[name][0](witness_kernels, torch.Generator().manual_seed(0))
    return launches


def subjects(architectures=ARCHITECTURES):
    """(name, architecture) of all that is mutated."""
    import witness_cases

    of = {name: witness_cases.CASES[name][1] for name in WITNESSES}
    of |= {name: instance.architectures for name, instance in INSTANCES.items()}
    for name, arch in itertools.product((*OPERATIONS, *of), architectures):
        if name in OPERATIONS or arch in of[name]:
            yield name, arch


def launches_of(name, arch):
    if name in INSTANCES:
        return instance_launches(INSTANCES[name], arch)
    return (operation_launches if name in OPERATIONS else witness_launches)(name, arch)


class Subject:
    """A kernel on an architecture: its launches, which statements each of them reaches, its mutants."""

    def __init__(self, name, arch):
        self.name, self.arch = name, arch
        self.launches = launches_of(name, arch)
        kernel = self.launches[0].kernel
        self.text = mutant_edits.only(self.launches[0].ptx, kernel)
        self.mutants = mutant_edits.mutants(self.text, name, arch)
        files = INSTANCES[name].files if name in INSTANCES else FILES.get(name)
        self.mutants = [m for m in self.mutants if not files or m.file in files]
        if name in INSTANCES:
            self.mutants = [m for m in self.mutants if m.file not in mutant_gemms.EPILOGUE or not m.arithmetic]
        module = Module(self.text)
        lines = {m.line - 1 for m in self.mutants}
        assert all(launch.kernel == kernel for launch in self.launches)
        for launch in self.launches:
            launch.learn(module, arch, [0])
        self.launches.sort(key=lambda launch: launch.steps)  # the shape of most of them says nothing new
        alike = collections.defaultdict(list)
        for launch, launch.reached in zip(self.launches, reached(self.launches, self.text, arch, lines)):
            alike[frozenset(launch.reached)].append(launch)
        if name not in INSTANCES:  # whose launches are chosen one by one
            self.launches = [launch for launches in alike.values() for launch in launches[:ENOUGH]]

    def detected(self, *mutants):
        """By what, and at which seed: of one mutant, or of several at once. (None, None): by nothing."""
        text = self.text
        for m in mutants:
            text = mutant_edits.apply(text, m)
        launches = [launch for launch in self.launches if any(m.line - 1 in launch.reached for m in mutants)]
        if not launches:
            return "unreached", None
        module = Module(text)  # a mutant that does not parse is none: that raises
        for seed in SEEDS[:1] if all(m.arithmetic for m in mutants) else SEEDS:
            for launch in launches:
                if by := launch.detects(module, self.arch, seed):
                    return by, seed
        return None, None


def run(architectures=ARCHITECTURES, names=None, chosen=lambda mutant: True, say=lambda text: None):
    """[(mutant, by what it was detected, seed)]."""
    results = []
    for name, arch in subjects(architectures):
        if names and name not in names:
            continue
        start = time.perf_counter()
        subject = Subject(name, arch)
        mutants = [m for m in subject.mutants if chosen(m)]
        found = [(m, *subject.detected(m)) for m in mutants]
        results += found
        missed = sum(by is None for _, by, _ in found)
        say(f"{name} {arch}: {len(found)} mutants in {len(subject.launches)} launches, {missed} not detected, "
            f"{sum(by == 'unreached' for _, by, _ in found)} not reached, {time.perf_counter() - start:.1f} s")  # fmt: skip
    return results


def reasons():
    """(source line, kind) -> why such a mutant changes nothing; of code that one version of Triton makes, {version: why}."""
    found = {}
    for line, of in json.loads(REASONS.read_text()).items():
        for kind, why in of.items():
            if why := why if isinstance(why, str) else why.get(f"triton {TRITON}"):
                found[line, kind] = why
    return found


def report(results):
    known = reasons()
    table = collections.defaultdict(collections.Counter)
    for m, by, _ in results:
        table[m.kind.removesuffix(" again")][by or "undetected"] += 1
    detected = collections.Counter(m.key for m, by, _ in results if by not in (None, "unreached"))
    columns = sorted({c for row in table.values() for c in row})
    undetected = [
        {"mutant": m.id, "source": f"{m.file}:{m.source}", "text": m.source_text, "kind": m.kind, "before": m.before,
         "after": m.after, "by": by or "undetected",
         "twins": detected[m.key],  # of the same source line and kind, that are detected
         "reason": known.get(m.key)}
        for m, by, _ in results
        if by in (None, "unreached")
    ]  # fmt: skip
    totals = {kind: dict(row) for kind, row in sorted(table.items())}
    return {"mutants": len(results), "kinds": totals, "columns": columns, "undetected": undetected}


def markdown(made):
    columns = made["columns"]
    lines = [f"| {made['mutants']} mutants | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind, row in made["kinds"].items():
        lines.append(f"| {kind} | {' | '.join(str(row.get(c, '')) for c in columns)} |")
    groups = collections.defaultdict(list)
    for u in made["undetected"]:
        groups[u["source"], u["text"], u["kind"], u["by"], u["reason"]].append(u)
    lines.append("")
    for (source, text, kind, by, reason), of in sorted(groups.items()):
        what = f"`{of[0]['before']}` -> `{of[0]['after']}`"
        lines.append(
            f"- {source} `{text}`: {kind}, {by} in {len(of)}, detected in {of[0]['twins']} ({what}): {reason or '**no reason**'}"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.interpreted.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="kernels; all by default")
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--json", type=pathlib.Path, help="where the report goes")
    given = parser.parse_args()
    what_is_against_the_isa_is_an_error()  # as in the tests
    made = report(run(given.arch, given.names, say=lambda text: print(text, flush=True)))
    print(markdown(made))
    if given.json:
        given.json.write_text(json.dumps(made, indent=1) + "\n")
    return any(u["reason"] is None for u in made["undetected"])


if __name__ == "__main__":
    sys.exit(main())
