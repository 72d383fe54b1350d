"""What works on this machine, what does not, and why: the facts behind `forwardpass doctor`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from .. import dispatch
from ..common import environment
from ..common.models.compare import finite_relative_error
from ..dispatch import BACKENDS, Operation, Reason, interpreted, library
from ..testing import benchmark_cases

#: Relative L2 error beside the reference: int8 rounds to the other side now and then, a broken kernel is far off. Of several layers
#: in one call these roundings add up as random ones do, by the root of their number.
PARITY_BOUND = 1e-2
#: Reasons for which a machine is not to blame.
EXPECTED = ("not_written", "no_fp8", "emulated_fp8")


def examine() -> dict[str, Any]:
    """All of it, as `forwardpass doctor --json` prints it; `problems` are sentences, none where all is well."""
    problems = []
    if problem := library.why_no_ops():
        problems.append(f"{problem}; reinstall forwardpass for this torch")
    elif problem := _kernels_do_not_load():
        problems.append(problem)
    gpus = (
        [environment.device(f"cuda:{i}") for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    driver = _driver()
    if driver["problem"]:
        problems.append(driver["problem"])
    kernels = [_kernel(op, b) for op in dispatch.operations.values() for b in BACKENDS]
    for k in kernels:
        if k["parity"] and not k["parity"]["ok"]:
            problems.append(f"{k['operation']} on {k['backend']} differs from its reference: {k['parity']['text']}")
        elif k["code"] and gpus and k["backend"] in ("cuda", "triton") and k["code"] not in EXPECTED:
            problems.append(
                f"there is a GPU, and {k['operation']} has no {k['backend']} kernel for it: {k['text']}; {k['fix']}"
            )
    return {
        "schema": "forwardpass.doctor/1",
        "versions": environment.versions(),
        "device": environment.device(),
        "gpus": gpus,
        "build": library.build_info,
        "driver": driver,
        "nvcc": environment.nvcc(),
        "kernels": kernels,
        "interpreter": _interpreter(),
        "measured": ["kernels.parity"],
        "problems": problems,
    }


def _kernels_do_not_load() -> str | None:
    """The op library opens the kernel library when a kernel is first called; here it is tried."""
    if not library.KERNELS.exists():
        return None
    try:
        ctypes.CDLL(str(library.KERNELS))
    except OSError as e:
        return f"the kernel library does not load: {e}; reinstall forwardpass"
    return None


def _interpreter() -> dict[str, Any]:
    """Whether kernels can be run without a GPU, for which architectures, and which; nothing is run here."""
    try:
        from gpuless import core, device

        problem, version = core.why_not(), interpreted.load().__version__
    except ImportError:
        return {"version": None, "problem": interpreted.MISSING, "architectures": {}, "kernels": []}
    kernels = []
    if problem is None and library.load_error is None:
        with dispatch.interpreted_by(interpreted.Interpreted(device.make("sm_90a"))):
            for op in dispatch.operations.values():
                for name in ("cuda", "triton"):
                    why = op.why_not_on(name, torch.device("cpu"))
                    kernels.append({"operation": op.name, "backend": name, "code": why.code if why else None,
                                    "text": why.text if why else None, "fix": why.fix if why else None})  # fmt: skip
    return {
        "version": version,
        "problem": problem,
        "architectures": core.ARCHITECTURES,
        "kernels": kernels,
    }


def _driver() -> dict[str, Any]:
    """The driver that is there and the one that our kernels need: a problem only where there is one too old."""
    built = library.build_info.get("nvcc")
    minimum = environment.DRIVERS.get(int(built.split(".")[0])) if built else None
    present = environment.driver()
    problem = None
    if minimum and present and int(present.split(".")[0]) < minimum:
        problem = (
            f"the NVIDIA driver is {present}, and kernels built with CUDA {built} need {minimum} or later: update it"
        )
    return {"present": present, "needed": minimum, "problem": problem}


def _kernel(op: Operation, name: str) -> dict[str, Any]:
    """One row: an implementation, the reason if it cannot run here, and how it compares with the reference."""
    interpreter = dispatch.interpreter()
    on_gpu = name in ("cuda", "triton") and (interpreter is None or interpreter.memory == "cuda")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    reason = op.why_not_on(name, device)
    row: dict[str, Any] = {
        "operation": op.name,
        "backend": name,
        "code": None,
        "text": None,
        "fix": None,
        "parity": None,
    }
    if reason is None and name != "reference":
        try:
            row["parity"] = _parity(op, name, device)
        except Exception as e:  # whatever a broken kernel does, the other rows are still wanted
            reason = Reason(
                "failed", f"it raised {type(e).__name__}: {' '.join(str(e).split())}", "report it with this output"
            )
            row["parity"] = {"ok": False, "relative_error": None, "text": reason.text}
    if reason is not None:
        row.update(code=reason.code, text=reason.text, fix=reason.fix)
    return row


@torch.inference_mode()
def _parity(op: Operation, name: str, device: torch.device) -> dict[str, Any]:
    """The op's smallest benchmark case on this backend, beside the reference on the same device."""
    case = min(benchmark_cases(op), key=lambda c: c.bytes())
    args = case.arguments(str(device))
    with dispatch.use_backend(name):
        actual = op.results(op, args)
    pairs = zip(actual, op.results(op.runs["reference"], args))
    worst = max((finite_relative_error(g, e) for g, e in pairs if e.numel()), default=0.0)
    bound = PARITY_BOUND * getattr(case, "layers", 1) ** 0.5
    return {"ok": worst <= bound, "relative_error": worst, "text": f"relative error {worst:.1e}"}
