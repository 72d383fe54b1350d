"""What this thread chose: a backend by name, and an interpreter that runs GPU kernels on CPU tensors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .reason import Reason

if TYPE_CHECKING:
    from .operation import Explain, Operation

BACKENDS = ("cuda", "triton", "cpu", "reference")


class Interpreter(Protocol):
    """What runs the CUDA and Triton kernels without a GPU: the seam between gpuless (interpreted.py) and the rest.

    `memory` is the device type of the tensors that it takes: "cpu", or "cuda" where torch's cuda device is this one. `bind` gives
    what a call on CPU tensors goes to, for all interpreters of this architecture, in all threads. Within `active()` this thread's
    launches of other kernels run there too.
    """

    arch: str

    @property
    def memory(self) -> str: ...

    def why_not(self, backend: str) -> Reason | None: ...

    def active(self) -> contextlib.AbstractContextManager[None]: ...

    def bind(self, operation: Operation, run: Callable[..., Any]) -> Callable[..., Any]: ...


class Choice(threading.local):
    # Attributes of the instance, made for each thread: torch.compile of torch 2.11 reads a class's default in their place.
    everywhere: ClassVar[Interpreter | None] = None  # what threads begin with

    def __init__(self) -> None:
        self.backend: str | Explain = "auto"
        self.interpret(Choice.everywhere)

    def interpret(self, interpreter: Interpreter | None) -> None:
        self.interpreter = interpreter
        #: of the GPU that CPU tensors are for; a string is all that torch.compile can guard
        self.arch = interpreter.arch if interpreter is not None and interpreter.memory == "cpu" else None


selected = Choice()


def interpreter() -> Interpreter | None:
    """This thread's, None where CUDA and Triton kernels run on a GPU alone."""
    return selected.interpreter


def interpret_everywhere(default: Interpreter) -> None:
    """In this thread and in those that begin later, outside of blocks of `interpreted_by`."""
    Choice.everywhere = default
    selected.interpret(default)


@contextlib.contextmanager
def interpreted_by(instance: Interpreter) -> Iterator[None]:
    """Within the block and this thread, `instance` runs the CUDA and Triton kernels."""
    before = selected.interpreter
    selected.interpret(instance)
    try:
        yield
    finally:
        selected.interpret(before)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block and this thread, operations run on `name`: "cuda", "triton", "cpu", "reference" or "auto".

    A backend that cannot run a call raises `Unsupported` with the reason. Inside `torch.compile` the choice that is in force
    when a function is first compiled stays with its graph.
    """
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"use_backend takes one of {', '.join((*BACKENDS, 'auto'))}, not {name!r}")
    before, selected.backend = selected.backend, name
    try:
        yield
    finally:
        selected.backend = before


def current_choice() -> dict[str, Any]:
    """What `use_backend` and an interpreter chose in this thread, for `choosing` in another."""
    return dict(vars(selected))


@contextlib.contextmanager
def choosing(choice: dict[str, Any]) -> Iterator[None]:
    """Within the block this thread has what `current_choice` returned."""
    before = current_choice()
    vars(selected).update(choice)
    try:
        with contextlib.nullcontext() if selected.interpreter is None else selected.interpreter.active():
            yield
    finally:
        vars(selected).update(before)


def asked_for_by_name() -> bool:
    """Whether `use_backend` names one in this thread: what cannot run there raises."""
    return selected.backend != "auto"
