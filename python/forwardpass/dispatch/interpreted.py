"""gpuless, the interpreter of GPU kernels, with this package's operations bound to it. It is a package of its own, imported on
first use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..common.imports import when_imported
from . import choice, library
from .operation import Operation, is_of_subclass, operations
from .reason import Reason, Unsupported

if TYPE_CHECKING:
    import gpuless

#: the objects of _kernels.so, linked against gpuless's stand-in for cudart
KERNELS = library.FOLDER / "_kernels_interpreted.so"

MISSING = ("to run GPU kernels without a GPU, forwardpass needs gpuless, which is in its repository: pip install ./interpreter, "
           "then build forwardpass again (--no-build-isolation) to have its CUDA kernels there too")  # fmt: skip


def load() -> Any:
    """The package gpuless; ImportError, with the command that installs it, where it is missing."""
    try:
        importlib.import_module("gpuless.core")
        return sys.modules["gpuless"]
    except ModuleNotFoundError as e:
        if e.name not in ("gpuless", "gpuless.core"):
            raise
        raise ImportError(MISSING) from None


class Interpreted:
    """An interpreted GPU that runs this package's kernels: dispatch.Interpreter."""

    def __init__(self, device: gpuless.Device):
        self.device, self.arch = device, device.arch
        self._why_not = {"cuda": _why_not_cuda(device.arch), "triton": _why_not_triton()}
        if KERNELS.exists():
            torch.ops.forwardpass._set_library(1, str(KERNELS))

    @property
    def memory(self) -> str:
        return self.device.memory

    def why_not(self, backend: str) -> Reason | None:
        return self._why_not[backend]

    def active(self) -> contextlib.AbstractContextManager[None]:
        from gpuless.current import using

        return using(self.device)

    @staticmethod
    def bind(operation: Operation, run: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_call, operation, run)


def _call(operation: Operation, run: Callable[..., Any], *args: Any) -> Any:
    interpreter = choice.interpreter()
    assert isinstance(interpreter, Interpreted)
    if any(map(is_of_subclass, args)):
        return run(*args)  # a fake tensor has no data to interpret
    return interpreter.device.call(_operator(operation, run), run, args)


#: by operation and kernel; torch.compile warns of a functools.cache
_operators: dict[tuple[str, Callable[..., Any]], gpuless.operators.Operator] = {}


def _operator(operation: Operation, kernel: Callable[..., Any]) -> gpuless.operators.Operator:
    from gpuless.operators import Operator

    key = operation.name, kernel
    if key not in _operators:
        report = torch.ops.forwardpass._set_storage_hook
        _operators[key] = Operator(
            operation.name, tuple(operation.parameters), kernel, frozenset(operation.writes), report
        )
    return _operators[key]


def _why_not_cuda(arch: str) -> Reason | None:
    if arch == "sm_100a":  # gpuless runs others' programs there
        return Reason(
            "arch", "forwardpass has no CUDA kernels for the B200 (sm_100a)", "use its Triton kernels, or another GPU"
        )
    if not KERNELS.exists():
        skipped = library.build_info.get("cuda_skipped") or library.build_info.get("gpuless_skipped")
        return Reason("not_built", f"built without CUDA kernels for gpuless: {skipped or f'there is no {KERNELS.name}'}",
                      "reinstall where `nvcc` is found and gpuless is installed (--no-build-isolation)")  # fmt: skip
    built, installed = library.build_info.get("gpuless"), load().__version__
    if built != installed:
        return Reason("version", f"its CUDA kernels were built for gpuless {built}, and {installed} is installed",
                      f"build forwardpass again, or install gpuless {built}")  # fmt: skip
    return None


def _why_not_triton() -> Reason | None:
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return None
    return Reason("triton_interpret", "TRITON_INTERPRET gives the kernels to Triton's own interpreter", "unset it")


@contextlib.contextmanager
def interpret(arch: str = "sm_90a", **options: Any) -> Iterator[gpuless.Device]:
    """Within the block and this thread, CUDA and Triton kernels take CPU tensors, and are executed and checked without a GPU.

    It is `gpuless.gpu` with this package's operations bound to it: they have the backends "cuda" and "triton" there, and prefer
    them. GPULESS_ARCH=sm_90a does the same for a whole process.

    Args:
        arch, options: as `gpuless.gpu` takes them: seed, guard, counters, timeline, findings, ignore, ….

    Yields:
        The `gpuless.Device`: its counters, and its findings.

    Raises:
        ImportError: gpuless is not installed.
        gpuless.Finding: out of the block, by the call that launched the kernel.
        Unsupported: this installation or this CPU cannot interpret.
        ValueError: as `gpuless.gpu` raises it.
    """
    gpuless = load()
    if problem := gpuless.core.why_not() or library.why_no_ops():
        raise Unsupported(problem, dict.fromkeys(("cuda", "triton"), Reason("not_built", problem, "")))
    with gpuless.gpu(arch, **options) as device, choice.interpreted_by(Interpreted(device)):
        yield device


def follow() -> None:
    """A process's interpreted GPU runs this package's kernels as well: one that there is, or will be."""
    if os.environ.get("FORWARDPASS_INTERPRET"):  # else a test run that counts on it would check nothing
        raise ValueError(
            "FORWARDPASS_INTERPRET is now GPULESS_ARCH, and FORWARDPASS_INTERPRET_SEED and its like GPULESS_SEED"
        )
    when_imported("gpuless.current", _follow)
    if os.environ.get("GPULESS_ARCH"):
        load()


def _follow() -> None:
    from gpuless.current import when_everywhere

    when_everywhere(_interpret_everywhere)


def _interpret_everywhere(device: gpuless.Device) -> None:
    from gpuless import operators

    choice.interpret_everywhere(Interpreted(device))
    operators.add(_operator(o, o.runs["cuda"]) for o in operations.values() if "cuda" in o.runs)
