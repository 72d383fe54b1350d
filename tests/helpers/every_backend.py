"""The backends and architectures on which tests run an operation."""

import contextlib

import pytest
from rotation import in_parts, number

import forwardpass as fp
from forwardpass.testing import poisoned_outputs

#: One in so many of the cases that Triton has to compile GEMMs and attention for, a second or two each.
OF_TRITON = 240
#: (backend, the architecture to interpret): each backend, and each kind of kernel
EVERY_BACKEND = (
    ("reference", None),
    ("cpu", None),
    ("cuda", "sm_80"),
    ("cuda", "sm_90a"),
    ("triton", "sm_80"),
    ("triton", "sm_90a"),
)


def not_in_turn(arch, architectures=("sm_80", "sm_90a"), every=2):
    """Marks of a test of Triton: slow, but for one in `every` architectures, which those are follows from the commit. Most of what
    such a test takes is to compile its kernel for an architecture. The tests of one operation run on each of them all the same."""
    digit = number() // 7919  # which says nothing of the remainders that choose parts
    return [pytest.mark.slow] * ((architectures.index(arch) + digit) % every > 0)


def in_turn_of_triton(backends=EVERY_BACKEND):
    """Parameters (backend, arch)."""
    return [
        pytest.param(backend, arch, id=f"{backend}-{arch}", marks=not_in_turn(arch) if backend == "triton" else ())
        for backend, arch in backends
    ]


def cuda_and_triton(params, architectures, at=0, every=2):
    """Parameters (implementation, *values) of those of a test, whose value at `at` is an architecture, or what else is in turn."""
    return [
        pytest.param(
            implementation,
            *p.values,
            id=None if p.id is None else f"{implementation}-{p.id}",
            marks=(*p.marks, *(not_in_turn(p.values[at], architectures, every) if implementation == "triton" else ())),
        )
        for implementation in ("cuda", "triton")
        for p in params
    ]


@contextlib.contextmanager
def running(backend, arch, poisoned=True, **options):
    """On a GPU guarded: what is read or written outside of the tensors is an error."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fp.use_backend(backend))
        if poisoned:
            stack.enter_context(poisoned_outputs())
        if arch is not None:
            stack.enter_context(fp.interpret(arch, **{"seed": 0, "guard": True, "approximate": False, **options}))
        yield


def on_each(architectures, cases, parts, *values, slow=()):
    """(cases, *values, arch): a part of the cases on each architecture, on each another one. With a part per architecture, each
    case runs on one. slow: the architectures of which all is slow, because their code is that of another."""
    cases = list(cases)
    return [
        p
        for shift, arch in enumerate(architectures)
        for p in in_parts(cases, parts, *values, arch, shift=shift, marks=[pytest.mark.slow] * (arch in slow))
    ]


def on_cuda(cases, parts=4):
    return on_each(("sm_90a", "sm_80", "sm_89", "sm_120"), cases, parts)


def in_triton(cases, parts=8):
    """Triton takes a second or two to compile a kernel for a case."""
    return on_each(("sm_80", "sm_90a"), cases, parts)


def interpreted(operation, args, backend, arch, seed):
    """The result, of a run without a finding."""
    with poisoned_outputs(), fp.use_backend(backend), fp.interpret(arch, seed=seed, guard=True) as device:
        result = operation(*args)
    assert device.findings == []
    return result
