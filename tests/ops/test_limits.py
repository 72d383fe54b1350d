"""Every documented limit on every backend and architecture: right at its last value, and beyond it what the table says."""

import contextlib
import itertools

import pytest
import torch
from every_backend import not_in_turn
from limits import LIMITS, NAN, PAGE, REFUSED, RIGHT, written
from matching import cases_of, check
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.dispatch import BACKENDS, operations

pytestmark = pytest.mark.usefixtures("poisoned")
ARCHITECTURES = ("sm_90a", "sm_80", "sm_89", "sm_120")


def cells(limits):
    """(limits of an operation, backend, architecture or None): each limit on one architecture, and on all in the slow tests."""
    for op, backend in itertools.product(dict.fromkeys(limit.op for limit in limits), BACKENDS):
        if backend != "reference" and backend not in operations[op].compiled:
            continue
        archs = ARCHITECTURES if backend in ("cuda", "triton") else (None,)
        for shift, arch in enumerate(archs):
            marks = [pytest.mark.interpreted] * (arch is not None)
            if backend == "triton":
                marks += not_in_turn(arch, ARCHITECTURES, every=4)
            quick, slow = ([x for x in limits if x.op == op and x.slow == is_slow] for is_slow in (False, True))
            yield from in_parts(quick, len(archs), backend, arch, label=op, shift=shift, marks=marks)
            if slow:
                yield whole(slow, backend, arch, label=f"{op}-slow", marks=[*marks, pytest.mark.slow])


@contextlib.contextmanager
def on(backend, arch):
    with fp.use_backend(backend), fp.interpret(arch) if arch else contextlib.nullcontext():
        yield


def has_no_kernel(limit, backend, arch):
    """FP8 on an A100."""
    with on(backend, arch):
        return operations[limit.op].why_not_on(backend, torch.device("cpu"))


@pytest.mark.every(3)
@pytest.mark.parametrize(("limit", "backend", "arch"), list(cells([limit for limit in LIMITS if limit.tried])))
def test_last(limit, backend, arch):
    args = limit.make(limit.last)
    with on(backend, arch):
        if has_no_kernel(limit, backend, arch) or backend in limit.refuses_last:
            refused(limit, args, fp.Unsupported)
        else:
            check(operations[limit.op], args)


@pytest.mark.parametrize(
    ("limit", "backend", "arch"),
    list(cells([limit for limit in LIMITS if limit.beyond is not None and not limit.slow])),
)
def test_beyond(limit, backend, arch):
    args, then = limit.make(limit.beyond), limit.then[backend]
    with on(backend, arch):
        if then == REFUSED or has_no_kernel(limit, backend, arch):
            refused(limit, args, (ValueError, TypeError, fp.Unsupported))
        elif then == RIGHT:
            check(operations[limit.op], args)
        else:
            assert then == NAN
            got = result(operations[limit.op], args)
            nan = got.isnan()
            assert torch.equal(nan, limit.nan_rows.unsqueeze(-1).expand(got.shape)), nan.flatten(1).any(-1)


def result(operation, args):
    """append_kv's is an argument, q_out."""
    if not operation.writes:
        return operation(*args)
    args = cases_of(operation).copied(args)
    operation(*args)
    return args[operation.parameters.index("q_out")]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [limit for limit in LIMITS if limit.beyond is not None and limit.slow], ids=str)
def test_beyond_what_is_large(limit):
    args = limit.make(limit.beyond)
    for backend in BACKENDS:
        with on(backend, "sm_90a" if backend in ("cuda", "triton") else None):
            refused(limit, args, (ValueError, fp.Unsupported))


def refused(limit, args, errors):
    with pytest.raises(errors) as e:
        operations[limit.op](*args)
    assert "\n" not in str(e.value) and str(e.value).startswith(f"{limit.op}: ")


def test_the_page_has_the_table():
    assert PAGE.read_text() == written(PAGE.read_text()), "PYTHONPATH=tests/helpers python -m limits writes it"


def test_every_operation_with_a_limit_is_there():
    assert {limit.op for limit in LIMITS} >= operations.keys() - {
        "attention_with_lse",
        "attention_8bit_with_lse",
        "attention_decode_with_lse",
        "decoder_layer",
        "encoder_layer",
        "quantize_attention",
        "w8a16_gemm",
        "fp8_linear",
    }
