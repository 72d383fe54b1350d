"""Dispatch: who runs a call, who is asked for by name, and what is said about it."""

import contextlib
import importlib
import itertools
import logging
import sys
import threading

import pytest
import torch
from processes import fork
from torch.utils._python_dispatch import TorchDispatchMode

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.dispatch import BACKENDS, only_reference_on, operations

X = torch.randn(3, 40)


def chosen():
    return fp.explain("quantize", X, torch.int8).backend


def test_auto_takes_the_first_that_can():
    assert chosen() == "cpu"
    with fp.use_backend("reference"):
        assert chosen() == "reference"
        with fp.use_backend("auto"):
            assert chosen() == "cpu"
    assert chosen() == "cpu"


def test_a_choice_is_of_its_thread():
    seen = []
    with fp.use_backend("reference"):
        t = threading.Thread(target=lambda: seen.append(chosen()))
        t.start()
        t.join()
    assert seen == ["cpu"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="cuda, triton, cpu, reference, auto, not 'gpu'"), fp.use_backend("gpu"):
        pass
    with pytest.raises(KeyError, match="no operation 'quantise'"):
        fp.explain("quantise")


def test_an_export_to_onnx_says_what_to_do(monkeypatch):
    """As `torch.onnx.export` captures a model; its own message is of a missing ONNX function, and of pull requests to PyTorch."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512)).eval()
    fp.swap(model, "int8")
    torch.export.export(model, (torch.ones(2, 512),))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"ONNX has none such: export the original model \(fp.restore\(model\) first\)"
    ):
        torch.export.export(model, (torch.ones(2, 512),))


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        (
            (),
            {},
            r"explain\('int8_linear', x, weight, weight_scale, …\), and was called with others: missing a required argument: 'x'",
        ),
        ((X,), {}, "missing a required argument: 'weight'"),
        ((X, X, X), {"sale": 1}, "got an unexpected keyword argument 'sale'"),
    ],
)
def test_explain_wants_the_arguments_of_the_call(args, options, words):
    with pytest.raises(TypeError, match="explain takes the arguments of the call that it explains, .*" + words):
        fp.explain("int8_linear", *args, **options)


def test_explain_runs_nothing_and_checks_everything():
    table = fp.explain("int8_linear", X, torch.zeros(8, 40, dtype=torch.int8), torch.ones(8))
    assert list(table) == ["cuda", "triton", "cpu", "reference"]
    assert table["cpu"] is None
    assert table["cuda"].code == "device"
    assert "int8_linear(x=float32[3, 40]" in str(table)
    assert "-> cpu" in str(table)
    with pytest.raises(ValueError, match="weight_sum"):
        fp.explain("int8_linear", X, torch.zeros(8, 40, dtype=torch.int8), torch.ones(8), symmetric=False)
    assert chosen() == "cpu"  # after an error too


def test_a_call_checked_once_is_checked_again_for_another_shape():
    fp.ops.quantize(X, torch.int8, channel_scale=torch.ones(40))
    with pytest.raises(ValueError, match="40 elements"):
        fp.ops.quantize(X, torch.int8, channel_scale=torch.ones(39))


@pytest.mark.every(3)
def test_dispatch_is_logged_once_a_shape():
    code = """
import torch, forwardpass as fp
for n in (8, 8, 9):
    fp.ops.quantize(torch.ones(2, n), torch.int8)
"""
    run = fork.run(code, env={"FORWARDPASS_LOG": "dispatch", "PATH": "", "PYTHONPATH": ":".join(sys.path)})
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if "forwardpass.dispatch" in line]
    assert len(lines) == 2
    assert lines[0].endswith("-> cpu")
    assert logging.getLogger("forwardpass.dispatch").handlers == []


def test_compiled_code_keeps_the_choice():
    def f(x):
        return fp.ops.quantize(x, torch.int8)[0]

    torch.compiler.reset()
    with fp.use_backend("triton"), pytest.raises(Exception, match=r"take CUDA tensors|Unsupported|Observed exception"):
        torch.compile(f, backend="eager", fullgraph=True)(torch.randn(2, 64))


def test_a_layer_is_checked_again_by_what_it_is_bound_to():
    """After a call that went well, only the dtype and the device of x are looked at in Python."""
    layer, x = fp.nn.Int8Linear.from_torch(torch.nn.Linear(32, 16)), torch.randn(2, 32)
    with torch.inference_mode():
        expected = layer(x)
        with pytest.raises(ValueError, match=r"weight must be \[N, 31\] for x \(2, 31\)"):
            layer(x[:, :31])
        with fp.use_backend("reference"):
            assert torch.equal(layer(x), expected)
        with fp.use_backend("triton"), pytest.raises(fp.Unsupported):
            layer(x)
        whole = {name: getattr(layer, name) for name in ("qweight", "weight_scale", "bias")}
        for name, buffer in whole.items():
            setattr(layer, name, buffer.to("meta"))
            with pytest.raises(ValueError, match="is on meta"):
                layer(x)
            setattr(layer, name, buffer)
        assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="for inference"):
        layer(x.requires_grad_())


def test_a_layer_logs_every_shape_too(monkeypatch, caplog):
    layer = fp.nn.Int8Linear.from_torch(torch.nn.Linear(40, 16))
    monkeypatch.setattr(operations["int8_linear"], "_bound", {})
    with caplog.at_level(logging.INFO, "forwardpass.dispatch"), torch.inference_mode():
        for rows in (41, 42, 42):
            layer(torch.randn(rows, 40))
    assert [f"x=float32[{rows}, 40]" in m for rows, m in zip((41, 42), caplog.messages, strict=True)] == [True, True]


@pytest.mark.parametrize("layer", ["Int8Linear", "W8A16Linear"])
def test_a_layer_is_one_operation(layer):
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    module = getattr(fp.nn, layer).from_torch(torch.nn.Linear(40, 16))
    with torch.inference_mode(), fp.use_backend("cpu"):
        module(X)  # whose check makes tensors
        with Calls():
            module(X)
    assert called == [f"forwardpass.{module.operation}_cpu.default"]


@pytest.mark.every(2)
def test_limits_are_asked_as_swap_and_plan_ask_them():
    """Before there is a call: with its first arguments alone, on the meta device, and of any dtype of the first."""
    calls = {op: first_case(op).arguments() for op in operations.values()}
    for arch in (None, "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120"):
        with fp.interpret(arch) if arch else contextlib.nullcontext():
            for op, args in calls.items():
                limits_of_first_arguments(op, args)
                for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
                    assert isinstance(only_reference_on(op.name, torch.device("cpu"), dtype), bool)


def first_case(op):
    module = importlib.import_module(f"{op.package}.cases")
    cases = itertools.chain(module.cases(), module.BENCHMARK_CASES)
    return next(case for case in cases if getattr(case, "op", op.name) == op.name)


def limits_of_first_arguments(op, args):
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    for backend in BACKENDS:
        whole = op.why_not(backend, *args)
        for n in range(len(args) + 1):
            reason = op.why_not_on(backend, torch.device("cpu"), *meta[:n])
            assert reason in (None, whole), (op.name, backend, n)  # what is not known yet is no reason
            reason = op.why_not_on(backend, torch.device("cuda", 0), *meta[:n])
            assert reason is None or isinstance(reason, fp.types.Reason), (op.name, backend, n)


def test_a_first_call_that_a_capture_forbids_says_what_to_do(monkeypatch):
    def refused(*args):
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    op = operations["quantize"]
    monkeypatch.setattr(op, "_bound", {})
    monkeypatch.setattr(op, "_bound_by_shape", {})
    monkeypatch.setitem(op.runs, "reference", refused)
    with (
        fp.use_backend("reference"),
        pytest.raises(RuntimeError, match=r"^quantize: .*call it once before the capture"),
    ):
        fp.ops.quantize(X, torch.int8)


@pytest.mark.parametrize(
    ("arches", "runs"),
    [
        (["sm_80", "sm_89", "sm_90a", "sm_120"], {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)}),
        (["sm_89"], {(8, 9), (9, 0), (10, 0), (12, 1)}),
        (["sm_90a"], {(9, 0)}),  # which leaves out the portable kernels that it never runs
        (["compute_90a"], {(9, 0)}),  # PTX alone
        (["compute_80"], {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)}),
    ],
)
def test_which_gpus_a_build_is_for(monkeypatch, arches, runs):
    monkeypatch.setitem(dispatch.library.build_info, "arches", arches)
    capabilities = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)}
    assert {c for c in capabilities if dispatch.library.runs_on(c)} == runs
