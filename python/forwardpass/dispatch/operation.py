"""An operation: its public function, its argument check, its implementations, and which of them runs a call.

`explain` prints the table for a call, and FORWARDPASS_LOG=dispatch logs the choice once per new shape.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import library
from .choice import BACKENDS, selected
from .devices import DEBUG, WHY_NOT, gpu_capability, gpu_takes
from .reason import Reason, Unsupported

GPU_BACKENDS = ("cuda", "triton")

#: CUDA's text for error 900, cudaErrorStreamCaptureUnsupported
IN_CAPTURE = "not permitted when stream is capturing"

operations: dict[str, Operation] = {}

_log = logging.getLogger("forwardpass.dispatch")
if "dispatch" in os.environ.get("FORWARDPASS_LOG", "").split(","):
    _handler = logging.StreamHandler(sys.stderr)
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    _log.addHandler(_handler)
    _log.setLevel(logging.INFO)


class Operation:
    """One operation: its public function, its argument check, and its implementations in the order they are preferred.

    Args:
        function: the public function.
        check: takes the schema's arguments by position; raises TypeError or ValueError in one sentence.
        reference: the specification in plain torch, same returns; its parameters, in order, are the schema's, but for those by
            keyword alone.
        fake: shapes, dtypes and strides of what the compiled implementations return.
        backends: the compiled ones that exist; "triton" is registered by `<package>.triton_kernel`, imported on first use.
        why_not: further limits of a backend, beyond its device and its library: `{"triton": f(*args) -> Reason | None}`. Who asks
            before there is a call knows the first arguments alone, on any device: the others are then None.
        why_not_arch: f("cuda" or "triton", (major, minor)) -> Reason | None, what those kernels ask of a GPU beyond (8, 0).
        notes: f(*args) -> sentences on what the op does besides its kernel (a copy of an unaligned operand, its bytes).
        writes: the names of the arguments that it changes, tensors or lists of tensors.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        check: Callable[..., None],
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backends: tuple[str, ...] = ("cuda", "triton", "cpu"),
        why_not: dict[str, Callable[..., Reason | None]] | None = None,
        why_not_arch: Callable[[str, tuple[int, int]], Reason | None] | None = None,
        notes: Callable[..., list[str]] | None = None,
        writes: tuple[str, ...] = (),
    ):
        self.name, self.function = function.__name__, function
        named = inspect.signature(reference).parameters.items()
        self.parameters = tuple(name for name, p in named if p.kind is not p.KEYWORD_ONLY)
        self.package = function.__module__
        self.check, self.fake, self.notes, self.writes = check, fake, notes, writes
        self.limits, self.why_not_arch = why_not or {}, why_not_arch
        self.runs: dict[str, Callable[..., Any]] = {"reference": reference}
        for backend in backends if library.load_error is None else ():
            # as in csrc/torch/ops.cpp; the reference needs no schema, torch.compile sees through it
            try:
                self.runs[backend] = getattr(torch.ops.forwardpass, f"{self.name}_{backend}").default
            except AttributeError as e:
                library.load_error = RuntimeError(
                    f"_ops.so is of another version than these files ({e}): reinstall forwardpass"
                )
                break
            torch.library.register_fake(f"forwardpass::{self.name}_{backend}", self._fake)
        self.compiled = backends
        self._bound: dict[Any, Callable[..., Any]] = {}
        self._bound_by_shape: dict[Any, Callable[..., Any]] = {}
        operations[self.name] = self

    def _fake(self, *args: Any) -> Any:
        """One meta tensor among others brings a call here, whose results nothing would fill; so does an export to ONNX, which has
        no such operation, and would say so after a minute on a large model, without saying what to do."""
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(f"{self.name} is an operation of forwardpass, and ONNX has none such: export the original model "
                               "(fp.restore(model) first), and quantise it with the tools of its runtime")  # fmt: skip
        devices = {a.device for a in args if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{self.name} takes tensors of one device, not of {', '.join(map(str, devices))}")
        return self.fake(*args)

    def why_not_on(self, backend: str, device: torch.device, *args: Any) -> Reason | None:
        """None where `backend` can run this operation on `device`, else the reason.

        args: a call's arguments, or the first of them, for the limits beyond the device; meta tensors serve.
        """
        if backend != "reference" and backend not in self.compiled:
            return Reason("not_written", "it has no such implementation", "use another backend")
        if reason := WHY_NOT[backend](device):
            return reason
        if backend in GPU_BACKENDS and (reason := self._why_not_arch(backend, device)):
            return reason
        if not args or backend not in self.limits:
            return None
        unknown = [None] * (len(self.parameters) - len(args))
        return self.limits[backend](*args, *unknown)

    def too_old(self, device: torch.device) -> Reason | None:
        """Why the GPU that takes this device's tensors, where one does, runs no kernel of this operation, whatever is installed."""
        reasons = [self._why_not_arch(backend, device) for backend in GPU_BACKENDS]
        return reasons[0] if all(reasons) else None

    def _why_not_arch(self, backend: str, device: torch.device) -> Reason | None:
        if self.why_not_arch is None or not gpu_takes(device):
            return None
        return self.why_not_arch(backend, gpu_capability(device))

    def why_not(self, backend: str, *args: Any) -> Reason | None:
        """None where `backend` can run these arguments, else the reason."""
        return self.why_not_on(backend, args[0].device, *args)

    def choose(self, *args: Any) -> str:
        """The backend that runs these arguments; raises Unsupported with every reason where there is none."""
        assert isinstance(selected.backend, str)
        backends = BACKENDS if selected.backend == "auto" else (selected.backend,)
        for backend in backends:
            if self.why_not(backend, *args) is None:
                return backend
        reasons = {b: r for b in backends if (r := self.why_not(b, *args))}
        raise Unsupported(f"{self.name}: " + "; ".join(f"{b}: {r}" for b, r in reasons.items()), reasons)

    def _bind(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        self.check(*args)
        if isinstance(selected.backend, Explain):
            raise self._explain(args, selected.backend)
        backend = self.choose(*args)
        if backend == "triton":
            importlib.import_module(f"{self.package}.triton_kernel")  # registers itself
        run = self.runs[backend]
        if backend in ("cuda", "triton") and args[0].device.type == "cpu":
            assert selected.interpreter  # else no GPU kernel takes CPU tensors
            return selected.interpreter.bind(self, run)
        return run

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(map(requires_grad, args)):
            self._refuse_grad()
        if torch.compiler.is_dynamo_compiling():
            may_interpret = selected.backend in ("auto", "cuda", "triton")
            if may_interpret and selected.arch and args[0].device.type == "cpu" and "cuda" in self.compiled:
                # a graph would have the kernel and nothing of what is around it
                raise RuntimeError(
                    f"{self.name} cannot be interpreted within a graph: leave out fullgraph=True or torch.compile"
                )
            return self._bind(args)(*args)
        # What the compiled implementations check each time is not looked at again in Python: a key of shapes, strides and
        # values made 10.5 us of int8_gemm's 7.5, on one core of an EPYC without AVX-512.
        x = args[0]
        try:
            key = (selected.backend, selected.arch, x.dtype, x.device, *map(type, args))
        except AttributeError:  # no tensor: the check says what should have been there
            return self._unbound(*args)
        run = self._bound.get(key)
        if run is None:
            run = self._bound[key] = self._bind_checked(args)
        try:
            return run(*args)
        except RuntimeError as e:
            self.check(*args)  # what an implementation refuses has a better sentence there
            if IN_CAPTURE in str(e):
                raise RuntimeError(f"{self.name}: kernels are loaded at their first call, which the capture of a graph forbids: "
                                   "call it once before the capture with arguments of these shapes") from e  # fmt: skip
            raise

    def _unbound(self, *args: Any) -> Any:
        return self._bind(args)(*args)

    def _bind_checked(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What runs these arguments, and all others of such types on this device."""
        if DEBUG:
            return self._unbound  # each call is checked in Python
        run, backend = self._bind(args), self.choose(*args)
        if backend not in ("cuda", "cpu") or _log.isEnabledFor(logging.INFO) or any(map(is_of_subclass, args)):
            return self._by_shape  # Triton and plain torch check nothing, and a log has every shape
        if any(self.why_not_on(b, args[0].device) is None for b in self.limits):
            return self._by_shape  # what limits a backend that this device has may be a shape
        return getattr(run, "_op", run)  # torch's OpOverload without its __call__, a Python function that calls this

    def _by_shape(self, *args: Any) -> Any:
        """Checked once for each key of all that the arguments are; of operations with limits, which are of shapes too."""
        key: list[Any] = [selected.backend, selected.arch]
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is torch.nn.Parameter:
                key += (a.shape, a.stride(), a.dtype, a.device)
            elif isinstance(a, Tensor):  # a subclass, fake or wrapping: its shapes may be symbols
                return self._unbound(*args)
            else:
                key.append(a)
        hit = tuple(key)
        try:
            run = self._bound_by_shape.get(hit)
        except TypeError:  # an unhashable argument
            return self._unbound(*args)
        if run is None:
            run = self._bind(args)
            if len(self._bound_by_shape) > 4096:
                self._bound_by_shape.clear()
            self._bound_by_shape[hit] = run
            if _log.isEnabledFor(logging.INFO):
                _log.info("%s -> %s", self.describe(args), self.choose(*args))
        try:
            return run(*args)
        except RuntimeError:
            self.check(*args)  # what tensors on a CPU hold is not in the key: a better sentence on it
            raise

    def results(self, run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """What run(*args) returns; of an operation that writes into its arguments those too, of which it is given copies."""
        if not self.writes:
            returned = run(*args)
            return (returned,) if isinstance(returned, Tensor) else returned
        written = [n in self.writes and a is not None for n, a in zip(self.parameters, args)]
        copies = tuple(_copied(a) if w else a for w, a in zip(written, args))
        returned = run(*copies)
        parts = (a for w, a in zip(written, copies) if w)
        changed = tuple(t for part in parts for t in (part if isinstance(part, list) else (part,)))
        return changed if returned is None else (returned, *changed)

    def _explain(self, args: tuple[Any, ...], request: Explain) -> Explain:
        table = {b: self.why_not(b, *args) for b in BACKENDS}
        backends = BACKENDS if request.backend_name == "auto" else (request.backend_name,)
        backend = next((b for b in backends if table[b] is None), None)
        request.explanation = Explanation(self.describe(args), backend, table)
        return request

    def _refuse_grad(self) -> None:
        raise RuntimeError(f"forwardpass.ops.{self.name} is for inference and has no backward: "
                           "call it under torch.inference_mode(), or detach its inputs")  # fmt: skip

    def describe(self, args: tuple[Any, ...]) -> str:
        """`name(x=float16[2, 384], …)`, and the notes on these arguments."""

        def one(a: Any) -> str:
            if isinstance(a, list):
                return f"{len(a)} tensors"
            return f"{str(a.dtype)[6:]}{list(a.shape)}" if isinstance(a, Tensor) else repr(a)

        text = ", ".join(f"{n}={one(a)}" for n, a in zip(self.parameters, args) if a is not None)
        notes = self.notes(*args) if self.notes else []
        return f"{self.name}({text})" + "".join(f" [{n}]" for n in notes)


def _copied(a: Any) -> Any:
    return [t.clone() for t in a] if isinstance(a, list) else a.clone()


def requires_grad(a: Any) -> bool:
    """Whether an argument is a tensor that does, or a list with one."""
    return a.requires_grad if isinstance(a, Tensor) else isinstance(a, list) and any(map(requires_grad, a))


def is_of_subclass(a: Any) -> bool:
    """Whether it is a tensor that is fake, or wraps others."""
    return isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter)


def only_reference_on(operation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a first argument of this dtype on this device finds nothing faster than the plain-torch reference."""
    op, x = operations[operation], torch.empty(0, dtype=dtype, device="meta")
    return all(op.why_not_on(b, device, x) for b in BACKENDS if b != "reference")


class Explanation(dict[str, "Reason | None"]):
    """Backend -> Reason, or None where it can run; prints as a table."""

    def __init__(self, call: str, backend: str | None, table: dict[str, Reason | None]):
        super().__init__(table)
        self.call, self.backend = call, backend

    def __str__(self) -> str:
        mark = {True: "->", False: "  "}
        return "\n".join([self.call, *(f"{mark[b == self.backend]} {b:<10}{r or 'can run'}" for b, r in self.items())])


class Explain(Exception):
    """In the place of a backend's name: the next operation explains itself, by raising this, and runs nothing."""

    def __init__(self, backend_name: str):
        super().__init__()
        self.backend_name = backend_name
        self.explanation: Explanation | None = None


def explain(name: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation of `fp.ops.<name>(*args, **kwargs)` would run, and why each other one would not.

    Nothing is run.

    Raises:
        KeyError: there is no operation of this name.
        TypeError: the arguments are not those of the operation; or what the call itself raises, as ValueError, on arguments that
            no implementation takes.
    """
    if name not in operations:
        raise KeyError(f"there is no operation {name!r}; there are {', '.join(sorted(operations))}")
    signature = inspect.signature(operations[name].function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as e:
        required = [p.name for p in signature.parameters.values() if p.default is p.empty]
        raise TypeError(f"explain takes the arguments of the call that it explains, explain({name!r}, {', '.join(required)}, …), "
                        f"and was called with others: {e}") from None  # fmt: skip
    backend_name = selected.backend
    assert isinstance(backend_name, str)
    selected.backend = Explain(backend_name)
    try:
        operations[name].function(*args, **kwargs)
    except Explain as e:
        return e.explanation or Explanation(name, None, {})
    finally:
        selected.backend = backend_name
    raise AssertionError(f"{name} called no operation")
