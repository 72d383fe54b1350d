"""Every benchmark's baseline does the work of its operation, and the timing tells fast from slow."""

import importlib
import time

import pytest
import torch

import forwardpass as fp
from forwardpass import backend
from forwardpass.testing import benchmark_cases, poisoned_outputs
from forwardpass.timing import interleave

bench = pytest.importorskip("benchmarks.bench", reason="benchmarks are in the checkout only; run pytest from its root")
MODULES = sorted({op.package.split(".")[-1] for op in backend.operations.values()})
BASELINES = {op: b for m in MODULES for op, b in importlib.import_module(f"benchmarks.{m}").BASELINES.items()}


def test_every_operation_has_a_benchmark():
    assert set(BASELINES) == set(backend.operations.values())


@pytest.mark.parametrize("op", BASELINES, ids=lambda op: op.name)
def test_baseline_does_the_same_work(op):
    case = min(benchmark_cases(op), key=lambda c: c.bytes())
    call = bench.as_a_layer_has_them(case.arguments())
    expected = BASELINES[op](**dict(zip(op.parameters, call)))
    bench.check_same_work(op.name, op(*call), expected)
    with pytest.raises(SystemExit, match="other work"):
        bench.check_same_work(op.name, [t.double() * 2 + 1 for t in bench.tensors(op(*call))], expected)


def test_a_row_has_every_figure():
    op = backend.operations["quantize"]
    case = min(benchmark_cases(op), key=lambda c: c.bytes())
    row = bench.run_case(op, case, BASELINES[op], "cpu", rounds=2)
    assert {"cpu", "torch eager", "torch.compile"} <= set(row["timings"])
    for t in row["timings"].values():
        assert t["low"] <= t["median"] <= t["high"]
        assert t["gb_per_s"] == pytest.approx(row["bytes"] / t["median"] / 1e6)
        assert set(t["times_as_fast_as"]) == {"torch eager", "torch.compile"}
    assert row["case"] in bench.table_row(row)


def test_timing_tells_fast_from_slow():
    told = []
    timings = interleave(
        {"slow": lambda: time.sleep(0.01), "fast": lambda: torch.ones(4).sum()},
        rounds=3,
        warmup=1,
        on_round=lambda: told.append(1),
    )
    assert timings["fast"].median < 5 < 9 < timings["slow"].median
    assert len(told) == 4


@pytest.fixture
def host_overhead():
    from forwardpass.interpreter import core

    if core.why_not() or not core.KERNELS.exists():
        pytest.skip("there are no CUDA kernels that could be interpreted")
    return importlib.import_module("benchmarks.host_overhead")


def test_host_time_of_every_operation_that_has_a_cuda_kernel(host_overhead):
    found, missing = host_overhead.measure(50)
    kernels = {op.name for op in backend.operations.values() if "cuda" in op.compiled}
    assert not kernels & missing.keys(), missing
    assert kernels | {"Int8Linear"} <= found.keys() and host_overhead.BARS.keys() <= found.keys() | missing.keys()
    assert [found[name]["launches"] for name in ("quantize", "int8_gemm", "int8_linear", "Int8Linear")] == [1, 1, 2, 2]
    assert all(0.5 < f["us"] < 1000 for f in found.values())


def test_kernels_run_again_once_host_time_was_measured(host_overhead):
    """Also where a GPU is interpreted while launches are dropped."""
    x = torch.randn(4, 32)

    def runs() -> bool:
        return torch.equal(fp.ops.quantize(x, torch.int8)[0], expected)

    with fp.use_backend("reference"):
        expected = fp.ops.quantize(x, torch.int8)[0]
    with poisoned_outputs():
        with host_overhead.launching_nothing() as launches:
            assert not runs() and launches() == 1 and launches() == 0
            with fp.interpret("sm_80"):
                assert runs()
            assert launches() == 0
        with fp.interpret("sm_90a"):
            assert runs()
        with pytest.raises(ZeroDivisionError), host_overhead.launching_nothing():
            raise ZeroDivisionError
        with fp.interpret("sm_90a"):
            assert runs()
