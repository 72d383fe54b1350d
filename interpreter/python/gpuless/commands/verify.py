"""`python -m gpuless verify`: a kernel against a reference."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import re
import tempfile
import textwrap

from .. import core
from ..verdicts.verdict import Report
from ..verification.session import Verification
from ..verification.specification import Additions, read_specification
from .build import ARCHITECTURE, build
from .run import add_report_options, write_reports


def verify(arguments: list[str]) -> int:
    """The exit code of the verdict."""
    options = _parser().parse_args(arguments)
    if options.candidate.suffix not in (".py", ".cu") or not options.candidate.is_file():
        raise ValueError(f"the candidate is KERNEL.py or KERNEL.cu, and {options.candidate} is no such file")
    if not options.time_limit > 0:
        raise ValueError(f"--time-limit is a number of seconds, not {options.time_limit}")
    spec = read_specification(options.reference, _additions(options))
    entry = options.entry or ("ModelNew" if spec.models else "candidate")
    if spec.models and options.candidate.suffix == ".cu":
        raise ValueError(f"{options.reference} has a Model: the candidate is a .py file with a class {entry}")
    with tempfile.TemporaryDirectory() as folder:
        library = (
            compiled(options.candidate, options.gpu, folder, options.flag) if options.candidate.suffix == ".cu" else ""
        )
        if library is None:
            report = Report(
                str(options.candidate), options.gpu, [], errors=[f"nvcc does not compile {options.candidate}"]
            )
        else:
            report = Verification(
                options.candidate, spec, options.gpu, entry, options.time_limit, library=library,
                coverage=options.coverage, keep_going=options.keep_going, strict=options.strict,
            ).run()  # fmt: skip
    print(text(report))
    write_reports(report, options)
    return report.verdict.exit_code


def _additions(options: argparse.Namespace) -> Additions:
    sizes = {}
    for text in options.size:
        match = re.fullmatch(r"([^=]+)=(\d+)(?:\.\.(\d+))?", text)
        if not match:
            raise ValueError(f"--size is NAME=N or NAME=FROM..TO, not {text!r}")
        sizes[match[1]] = int(match[2]), int(match[3] or match[2])
    without = dict(text.partition("=")[::2] for text in options.without)
    precision = options.precision
    with contextlib.suppress(TypeError, ValueError):
        precision = float(options.precision)
    return Additions(sizes, options.allow, without, precision)


def compiled(candidate: pathlib.Path, arch: str, folder: str, flags: list[str]) -> str | None:
    """The library of its kernels and its host functions; None where nvcc refuses it."""
    library = str(pathlib.Path(folder) / "candidate.so")
    command = [str(candidate), "-shared", "-Xcompiler", "-fPIC", "-o", library, *flags]
    if not any(flag.startswith(ARCHITECTURE) for flag in flags):  # PTX for the one GPU that it runs on
        command.append(f"-arch={arch}")
    return None if build(command, core.CUDART) else library


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpuless verify",
        description="Calls a kernel with sizes and inputs that kernels are wrong on, and compares with a reference in float64. "
        "docs/verify.md describes the reference file. The exit code is the verdict: 0 clean, 2 error, 3 finding, 4 incomplete.",
    )
    parser.add_argument("candidate", type=pathlib.Path, help="KERNEL.py or KERNEL.cu")
    parser.add_argument("--reference", type=pathlib.Path, required=True, metavar="FILE", help="what it has to compute")
    parser.add_argument(
        "--entry",
        help="the function, or the class, that is called (default: candidate; ModelNew where the reference is a Model)",
    )
    parser.add_argument("--gpu", default="sm_90a", choices=core.ARCHITECTURES, help="which (default: %(default)s)")
    parser.add_argument(
        "--time-limit", type=float, default=600, metavar="SECONDS", help="longer is incomplete (default: %(default)s)"
    )
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first call that fails")
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="NAME=FROM..TO",
        help="in place of the reference file's; or NAME=N",
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="OP", help="may be left to torch, such as convolution"
    )
    parser.add_argument("--precision", help="that is allowed: tf32, float16, bfloat16, approximate, or a unit roundoff")
    parser.add_argument(
        "--without", action="append", default=[], metavar="KIND=REASON", help="inputs that the kernel need not take"
    )
    parser.add_argument("--flag", action="append", default=[], help="for nvcc, such as --flag=-O1")
    add_report_options(parser)
    return parser


def text(report: Report) -> str:
    """A line for each call; what is wrong; the findings."""
    lines = []
    for case in report.cases:
        share = "" if case.error is None or case.problem else f"  {case.error:.2g} of the bound"
        mark = "FAIL" if case.problem else "skip" if case.kind == "refused" else "ok  "
        lines.append(f"{mark} {case.name}{share}")
        if case.problem:
            lines += textwrap.wrap(
                f"{case.kind}: {case.problem}", 100, initial_indent=" " * 5, subsequent_indent=" " * 9
            )
    lines += [f"\n{finding}" for finding in report.findings]
    return "\n".join(lines)
