"""The process that runs the candidate: on the interpreted GPU, told what to call with, and judged elsewhere.

It sees inputs and never the reference. It notes what only it can see: launches, operations that were left to torch, memory
that outputs share, inputs that were changed.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import cuda, device
from ..cuda.watching import watchers
from ..finding import TimeLimit
from .models import SEED
from .wire import DTYPES, Wire, as_bytes, name_of

#: operations that make, move or describe data, and compute nothing
MOVES = frozenset({
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
    "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill", "zero", "copy", "_to_copy", "clone",
    "detach", "alias", "view", "_unsafe_view", "_reshape_alias", "as_strided", "slice", "select", "unsqueeze",
    "squeeze", "transpose", "t", "permute", "expand", "unbind", "split", "split_with_sizes", "unfold", "lift_fresh",
    "cat", "stack", "constant_pad_nd", "contiguous", "_local_scalar_dense", "is_pinned", "set_", "resize", "arange",
    "diagonal", "movedim",
})  # fmt: skip
#: reads of single numbers, such as a size that lies on the device
SCALARS = 8


class Watch(TorchDispatchMode):
    """Notes the operations of a call: those of its own thread, and those on the GPU's tensors of every other."""

    def __init__(self, allowed: Sequence[str]):
        super().__init__()
        self.allowed = MOVES.union(allowed)
        self.computed: dict[str, None] = {}
        self.to_host: dict[str, None] = {}
        self.scalars = 0
        self.thread = threading.get_ident()

    def __enter__(self) -> Any:
        watchers.append(self._elsewhere)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        watchers.remove(self._elsewhere)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._note(function, args, result)
        return result

    def _elsewhere(self, function: Any, args: Any, result: Any) -> None:
        if threading.get_ident() != self.thread:
            self._note(function, args, result)

    def _note(self, function: Any, args: Any, result: Any) -> None:
        name = function._schema.name.rpartition("::")[2]
        if name.rstrip("_") not in self.allowed and name not in self.allowed:
            self.computed[name] = None
        elif name == "_local_scalar_dense":
            self.scalars += 1
        elif name in ("_to_copy", "copy_") and _crosses(result, args):
            self.to_host[name] = None

    def problem(self) -> tuple[str, str] | None:
        if self.computed:
            return (
                "left_to_torch",
                f"torch computed {', '.join(self.computed)}: the kernel has to (ALLOWED or --allow lists exceptions)",
            )
        if self.to_host or self.scalars > SCALARS:
            return "left_to_host", "the candidate copied the GPU's data to the host, where no kernel computes"
        return None


def _crosses(result: Any, args: Any) -> bool:
    """From the GPU to the CPU."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    return (
        isinstance(result, Tensor)
        and result.device.type == "cpu"
        and source.device.type == "cuda"
        and result.numel() > 1
    )


class Candidate:
    """What is called, and how."""

    def __init__(self, message: dict[str, Any]):
        path = pathlib.Path(message["path"])
        if message["library"]:
            function = getattr(ctypes.CDLL(message["library"]), message["entry"], None)
            if function is None:
                raise AttributeError(f'{path} has no extern "C" function {message["entry"]}')
            self.function: Callable[..., Any] = function
        else:
            sys.path.insert(0, str(path.parent))
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if not callable(getattr(module, message["entry"], None)):
                raise AttributeError(f"{path} has no function {message['entry']} (--entry)")
            self.function = getattr(module, message["entry"])
        self.is_library = bool(message["library"])
        self.init_inputs: str | None = None  # the arguments that a model of KernelBench's format was made with

    def make(self, init_inputs: str) -> None:
        """The model, when its sizes are others than before. What its constructor computes is no part of a call."""
        if init_inputs != self.init_inputs:
            torch.manual_seed(SEED)
            self.model = self.function(*ast.literal_eval(init_inputs)).cuda()
            self.init_inputs = init_inputs

    def call(self, args: list[Any], message: dict[str, Any], gpu: device.Device) -> list[Any]:
        if not self.is_library:
            result = self.function(*args) if message["model"] is None else self.model(*args)
            return list(result) if isinstance(result, (tuple, list)) else [result]
        outputs = [torch.empty(o["shape"], dtype=DTYPES[o["dtype"]], device="cuda") for o in message["outputs"]]
        numbers = [*args, *outputs, *message["sizes"]]
        with gpu.running():
            self.function(*map(_as_c, numbers))
        return outputs


def _as_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


class Worker:
    def __init__(self, wire: Wire, gpu: device.Device):
        self.wire, self.gpu = wire, gpu
        self.candidate: Candidate | None = None
        self.storages: list[Tensor] = []
        self.earlier: list[tuple[Tensor, bytes]] = []  # outputs of earlier calls, and what they held

    def load(self, message: dict[str, Any]) -> None:
        try:
            self.candidate = Candidate(message)
        except BaseException as e:  # a candidate may do anything, exit too
            self.wire.send({"error": _words(e)})
        else:
            self.wire.send({"error": ""})

    def call(self, message: dict[str, Any], blobs: list[bytes]) -> None:
        args = self._arguments(message, blobs)
        self.gpu.reseed(message["seed"])
        findings = len(self.gpu.findings)
        begin = time.monotonic()
        reply: dict[str, Any] = {"error": "", "problem": None, "refused": "", "outputs": []}
        answers: list[bytes] = []
        watch = Watch(message["allowed"])
        try:
            assert self.candidate is not None
            if message["model"] is not None:
                self.candidate.make(message["model"])
            launches = self.gpu.counters["launches"]
            with watch, torch.no_grad():
                outputs = self.candidate.call(args, message, self.gpu)
            reply["problem"] = self._problem(outputs, blobs, watch, self.gpu.counters["launches"] - launches)
            if all(isinstance(o, Tensor) for o in outputs):
                reply["outputs"] = [{"dtype": name_of(o.dtype), "shape": list(o.shape)} for o in outputs]
                answers = [as_bytes(o.cpu()) for o in outputs]
                self.earlier = [*self.earlier, *zip(outputs, answers)][-8:]
        except TimeLimit as e:
            reply["refused"] = str(e)
        except BaseException as e:
            is_limit = isinstance(e, NotImplementedError) and "the interpreted GPU" in str(e)
            reply["refused" if is_limit else "error"] = _words(e)
        reply["seconds"] = time.monotonic() - begin
        latest = self.gpu.findings[findings:]
        reply["findings"] = sum(f.kind != "unsupported" and f.breaks == "hardware" for f in latest)
        for finding in latest:
            if finding.kind == "unsupported":  # its launch did nothing: what came of the call says nothing
                reply["refused"] = finding.message
        self.wire.send(reply, answers)

    def _arguments(self, message: dict[str, Any], blobs: list[bytes]) -> list[Any]:
        """On the GPU; in the memory of the call before, where the message says so and it fits."""
        if not message["reuses"] or [s.numel() for s in self.storages] != [len(b) for b in blobs]:
            self.storages = [torch.empty(len(b), dtype=torch.uint8, device="cuda") for b in blobs]
        for storage, blob in zip(self.storages, blobs):
            storage.copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8))
        return [self._argument(a) for a in message["args"]]

    def _argument(self, a: dict[str, Any]) -> Any:
        if "value" in a:
            return a["value"]
        whole = self.storages[a["storage"]].view(DTYPES[a["dtype"]])
        return whole.as_strided(a["shape"], a["strides"], a["offset"])

    def _problem(self, outputs: list[Any], blobs: list[bytes], watch: Watch, launches: int) -> tuple[str, str] | None:
        if wrong := [type(o).__name__ for o in outputs if not isinstance(o, Tensor)]:
            return "contract", f"the candidate returned {', '.join(wrong)} instead of tensors"
        if off := [str(o.device) for o in outputs if not o.is_cuda]:
            return "contract", f"the candidate returned a tensor on {off[0]}, and its inputs are on cuda"
        if problem := watch.problem():
            return problem
        if not launches:
            return "no_launch", "the candidate launched no kernel in this call"
        inputs = {s.untyped_storage().data_ptr() for s in self.storages}
        if any(o.numel() and o.untyped_storage().data_ptr() in inputs for o in outputs):
            return "aliased_output", "the output is in the memory of an input"
        if any(as_bytes(s.cpu()) != b for s, b in zip(self.storages, blobs)):
            return "changed_input", "the candidate changed an input, or what lies between its elements"
        if any(as_bytes(o.cpu()) != data for o, data in self.earlier):
            return "reused_output", "the output of an earlier call changed: it is in the memory of this call's"
        return None


def _words(e: BaseException) -> str:
    """The last lines of a traceback: the candidate's own frame, and the error."""
    frames = traceback.extract_tb(e.__traceback__)
    candidates = [f for f in frames if "gpuless" not in f.filename and "importlib" not in f.filename][:1]
    where = f"{candidates[0].filename}:{candidates[0].lineno}: " if candidates else ""
    return f"{where}{type(e).__name__}: {str(e).strip() or 'no reason'}"


def main(arch: str, reading: str, writing: str, budget: str) -> None:
    # What a shell starts in the background ignores interrupts, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wire = Wire(int(reading), int(writing))
    gpu = device.make(arch, findings="collect")
    cuda.present(gpu)
    worker = Worker(wire, gpu)
    os.dup2(2, 1)  # what a candidate prints is not the command's output
    while True:
        message, blobs = wire.receive()
        if message["do"] == "end":
            break
        gpu.time_limit(float(budget))
        if message["do"] == "load":
            worker.load(message)
        else:
            worker.call(message, blobs)


if __name__ == "__main__":
    main(*sys.argv[1:])
