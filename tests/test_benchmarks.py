"""Every benchmark's baseline does the work of its operation, and the timing tells fast from slow."""

import dataclasses
import functools
import importlib
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.dispatch.interpreted import KERNELS
from forwardpass.testing import benchmark_cases, poisoned_outputs

bench = pytest.importorskip("benchmarks.bench", reason="benchmarks are in the checkout only; run pytest from its root")
MODULES = sorted({op.package.split(".")[-1] for op in dispatch.operations.values()})
BASELINES = {op: b for m in MODULES for op, b in importlib.import_module(f"benchmarks.{m}").BASELINES.items()}


def test_every_operation_has_a_benchmark():
    assert set(BASELINES) == set(dispatch.operations.values())


@functools.cache
def scaled_mm_takes_rows():
    """Whether torch._scaled_mm has a scale per row on a CPU too, which torch 2.11 has not."""
    a, one = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(a, a.t(), one, one.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.every(2)
@pytest.mark.parametrize("op", BASELINES, ids=lambda op: op.name)
def test_baseline_does_the_same_work(op):
    if op.name in ("fp8_gemm", "fp8_linear", "fp8_grouped_gemm") and not scaled_mm_takes_rows():
        pytest.skip("the baseline, torch._scaled_mm, takes no scales per row on the CPU with this torch")
    case = min(benchmark_cases(op), key=lambda c: c.bytes())
    fewer = {"counts": case.counts[:8]} if hasattr(case, "counts") else {}  # experts, of 128
    call = bench.as_a_layer_has_them(dataclasses.replace(case, **fewer).arguments())
    expected = op.results(lambda *args: BASELINES[op](**dict(zip(op.parameters, args))), call)
    bench.check_same_work(op.name, op.results(op, call), expected)
    with pytest.raises(SystemExit, match="other work"):
        bench.check_same_work(op.name, [t.double() * 2 + 1 for t in op.results(op, call)], expected)


def test_a_row_has_every_figure():
    op = dispatch.operations["quantize"]
    case = min(benchmark_cases(op), key=lambda c: c.bytes())
    row = bench.run_case(op, case, BASELINES[op], "cpu", rounds=2)
    assert {"cpu", "torch eager", "torch.compile"} <= set(row["timings"])
    for t in row["timings"].values():
        assert t["low"] <= t["median"] <= t["high"]
        assert t["gb_per_s"] == pytest.approx(row["bytes"] / t["median"] / 1e6)
        assert set(t["times_as_fast_as"]) == {"torch eager", "torch.compile"}
    assert row["case"] in bench.table_row(row)


@pytest.mark.every(3)
def test_a_case_that_nothing_of_ours_runs_is_left_out_with_the_reasons():
    """FP8 on a CPU: plain torch alone took 20 minutes of one operation's cases."""
    op = dispatch.operations["fp8_grouped_gemm"]
    row = bench.run_case(op, min(benchmark_cases(op), key=lambda c: c.bytes()), BASELINES[op], "cpu", rounds=2)
    assert "timings" not in row and all(f"{b}: " in row["left_out"] for b in ("cuda", "triton", "cpu"))


def test_a_case_of_a_gpus_size_is_left_out_on_a_cpu(monkeypatch):
    """Of attention plain torch took 17 s a call, and its table an hour."""
    op = dispatch.operations["quantize"]
    monkeypatch.setattr(bench, "LONGEST", 0)
    row = bench.run_case(op, min(benchmark_cases(op), key=lambda c: c.bytes()), BASELINES[op], "cpu", rounds=2)
    assert "timings" not in row and "plain torch takes 0 s a call on this CPU" in row["left_out"]


def test_slow_cases_have_fewer_rounds(monkeypatch):
    op, asked = dispatch.operations["quantize"], []
    monkeypatch.setattr(
        bench, "interleave", lambda calls, device, rounds, on_round: asked.extend(map(rounds, (1, 4, 60))) or {}
    )
    with pytest.raises(KeyError):  # there are no timings
        bench.run_case(op, min(benchmark_cases(op), key=lambda c: c.bytes()), BASELINES[op], "cpu", rounds=15)
    assert asked == [15, 8, 5]


def test_the_clock_of_a_row_is_the_median_of_those_that_are_known():
    assert bench.median_clock([None, None]) is None and bench.median_clock([1500, None, 1700, 1600]) == 1600


def needs_kernels(module):
    from gpuless import core

    if core.why_not() or not KERNELS.exists():
        pytest.skip("there are no CUDA kernels that could be interpreted")
    return importlib.import_module(f"benchmarks.{module}")


@pytest.fixture
def host_overhead():
    return needs_kernels("host_overhead")


@pytest.fixture
def gemm():
    return needs_kernels("gemm")


def test_host_time_of_every_operation_that_has_a_cuda_kernel(host_overhead):
    found, missing = host_overhead.measure(50)
    kernels = {op.name for op in dispatch.operations.values() if "cuda" in op.compiled}
    assert not kernels & missing.keys(), missing
    assert kernels | {"Int8Linear"} <= found.keys() and host_overhead.BARS.keys() <= found.keys() | missing.keys()
    assert [found[name]["launches"] for name in ("quantize", "int8_gemm", "int8_linear", "Int8Linear")] == [1, 1, 2, 2]
    assert all(0.5 < f["us"] < 1000 for f in found.values())


class Recorded(TorchDispatchMode):
    """The names of the ATen operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten":
            self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_host_time_is_of_the_call_alone(host_overhead):
    """A conversion of the experts' weights was timed with one: 208 us in place of 4.5. Inputs are looked at in other shapes."""
    with torch.inference_mode(), host_overhead.launching_nothing():
        for name, call in host_overhead.calls().items():
            call()
            with Recorded() as r:
                call()
            assert r.names <= {"empty", "empty_strided", "view", "permute", "flatten", "unflatten", "contiguous"}, name


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


@pytest.mark.every(2)
def test_every_gemm_is_counted_and_modelled(gemm):
    assert gemm.OPERATIONS.keys() == {
        n for n in dispatch.operations if ("gemm" in n or "linear" in n) and "grouped" not in n
    }
    op, shape = dispatch.operations["int8_gemm"], (256, 8192, 256)
    case = gemm.make_case(op, *shape, {})
    row = gemm.interpreted_row(op, "", "cuda", "sm_80", case, shape, loop=True)
    assert row["least_bytes"] == 256 * 256 + 8192 * 256 + 2 * 256 * 8192
    assert row["least_bytes"] <= row["dram_bytes"] <= 1.1 * row["least_bytes"] and row["dram_bytes"] < row["l2_bytes"]
    # of 64 x 64 x 32 a warp, 32 mma and 8 ldmatrix are the least
    assert 2**20 / (16 * 8 * 32) * 40 / 32 < row["main_loop"]["ptx_per_mi_mac"] < row["ptx_per_mi_mac"]
    assert row["main_loop"]["wavefronts_per_ideal"] == 1
    assert row["modelled_us"] > 0 and row["binding"]
    line = gemm.interpreted_line(row)
    assert f"{row['modelled_us']:.2f} us by {row['binding']}" in line and f"{row['ptx_per_mi_mac']:.0f}" in line


def test_a_gemm_that_this_gpu_lacks_says_so(gemm, capsys, monkeypatch):
    monkeypatch.setattr(gemm, "SHAPES", ((1, 64, 64), (2, 64, 64)))
    rows = gemm.interpret_all("sm_80", ["fp8_gemm_quantize"])
    assert len(rows) == 4 and all("sm_80" in row["missing"] for row in rows)
    printed = capsys.readouterr().out
    assert "modelled" in printed and "fp8_gemm_quantize blocks 1 x 64 x 64" in printed
    assert printed.count("not there") == 2  # of each implementation once


def test_peers_of_a_gemm_are_timed_and_those_that_raise_say_why():
    gemm, on_gpu = (importlib.import_module(f"benchmarks.{m}") for m in ("gemm", "gemm_on_gpu"))
    op, shape = dispatch.operations["int8_gemm"], (32, 64, 128)
    row = on_gpu.measure(op, "", gemm.make_case(op, *shape, {}), shape, "cpu", rounds=2)
    assert row["timings"].keys() == {"torch._int_mm", "bf16 F.linear", "torch.compile"}
    assert row["missing"].keys() == {"cuda", "triton"} and "Unsupported" in row["missing"]["cuda"]
    for t in row["timings"].values():
        assert t["tflops"] == pytest.approx(2 * 32 * 64 * 128 / t["median"] / 1e9) and t["with_host"] > 0
    op = dispatch.operations["fp8_gemm"]
    row = on_gpu.measure(op, "blocks", gemm.make_case(op, *shape, {"blocks": True}), shape, "cpu", rounds=2)
    assert "scaling" in row["missing"]["torch._scaled_mm"] and "torch.compile" in row["timings"]
    said = importlib.import_module("benchmarks.on_gpu").lines(row)
    assert "torch._scaled_mm" in said and "not measured: " in said
    row = on_gpu.measure(op, "rows", gemm.make_case(op, *shape, {}), shape, "cpu", rounds=2)
    assert "torch._scaled_mm" in row["timings" if scaled_mm_takes_rows() else "missing"]


def cases_of_bars():
    gemm, gemms, attention = (
        importlib.import_module(f"benchmarks.{m}") for m in ("gemm", "gemm_on_gpu", "attention_on_gpu")
    )
    for bar in gemms.BARS:
        yield (
            bar,
            gemm.make_case(dispatch.operations[bar.operation], *bar.shape, gemm.OPERATIONS[bar.operation][bar.variant]),
        )
    for bar in attention.BARS:
        assert bar.shape[0] in attention.LENGTHS and bar.shape[1] in attention.HEAD_DIMS
        yield bar, attention.make_case(*bar.shape, bar.variant)


def test_bars():
    on_gpu = importlib.import_module("benchmarks.on_gpu")
    for bar, case in cases_of_bars():
        gpu = {on_gpu.A100: "NVIDIA A100-SXM4-80GB", on_gpu.ADA: "NVIDIA L40S", on_gpu.H200: "NVIDIA H200"}
        name = gpu.get(bar.gpu, "NVIDIA H100 80GB HBM3")
        ms = {"TFLOP/s": case.flops() / bar.least / 1e9, "% of peak": case.flops() / (7.33 * bar.least) / 1e9,
              "% of bandwidth": case.bytes() / (33.52 * bar.least) / 1e6}[bar.unit]  # fmt: skip
        assert on_gpu.achieved(bar, name, case, ms) == pytest.approx(bar.least)
        assert on_gpu.achieved(bar, name, case, 2 * ms) == pytest.approx(bar.least / 2)
        if bar.unit != "TFLOP/s":
            assert on_gpu.achieved(bar, "another", case, ms) is None
    figures = {
        **dict.fromkeys(("median", "low", "high", "with_host", "tflops", "gb_per_s"), 1.0),
        "times_as_fast_as": {},
        "sustained": {"milliseconds": 1.2, "sm_mhz": 1590.0, "tflops": 0.8, "gb_per_s": 0.9},
    }
    row = {"operation": "fp8_gemm", "variant": "rows", "shape": (1, 2, 3), "timings": {"cuda": figures}, "missing": {}}
    said = [
        on_gpu.lines(
            {**row, "bars": [{"least": 10.0, "unit": "TFLOP/s", "source": "x", "achieved": a, "sustained": 8}]}
        )
        for a in (9, 11, None)
    ]
    assert "cuda 9: MISSED" in said[0] and "cuda 11: ok" in said[1] and "not known" in said[2]
    assert "sustained 8: MISSED" in said[1] and "at 1590 MHz" in said[0]


def test_attention_is_timed_beside_each_of_torchs_kernels(monkeypatch):
    attention, on_gpu = (importlib.import_module(f"benchmarks.{m}") for m in ("attention", "attention_on_gpu"))
    monkeypatch.setattr(on_gpu, "ROWS", 128)
    monkeypatch.setattr(on_gpu, "WIDTH", 128)
    flops = {}
    for variant in ("full", "causal", "padding"):
        row = on_gpu.measure(64, 64, variant, "cpu", 2, attention.sdpa)
        assert {"SDPA flash", "cuda", "triton"} <= row["timings"].keys() | row["missing"].keys()
        assert "Unsupported" in row["missing"]["cuda"] and "SDPA flash" in row["timings"]
        flops[variant] = row["timings"]["SDPA flash"]["tflops"] * row["timings"]["SDPA flash"]["median"] * 1e9
    # two sequences of two heads; of causal half, with the diagonal
    assert flops["full"] == pytest.approx(flops["padding"]) == pytest.approx(4 * 64 * 64 * 64 * 2 * 2)
    assert flops["causal"] == pytest.approx(flops["full"] * 65 / 128)


def test_tritons_own_attention_is_a_peer_of_what_it_takes(tmp_path):
    attention = needs_kernels("attention")
    tutorial = importlib.import_module("benchmarks.triton_tutorial").Tutorial
    with pytest.raises(RuntimeError, match="06-fused-attention"):
        tutorial(str(tmp_path / "missing.py"), "sm_80")
    file = tmp_path / "06-fused-attention.py"
    file.write_text("import torch\n")
    with pytest.raises(RuntimeError, match="no attention and _attn_fwd"):
        tutorial(str(file), "sm_80")
    file.write_text("""
import torch
from types import SimpleNamespace
from forwardpass.ops.attention.reference import attention as exact
import forwardpass as fp

CAPABILITY = torch.cuda.get_device_capability()
Config = lambda m, n: SimpleNamespace(kwargs={"BLOCK_M": m, "BLOCK_N": n})
_attn_fwd = SimpleNamespace(configs=[Config(64, 128), Config(128, 64)], cache={})


def attention(q, k, v, causal, scale, warp_specialize):  # rows after heads; the second configuration computes twice
    assert q.is_contiguous() and q.shape == (1, 16, 1024, 64) and torch.cuda.get_device_capability() == CAPABILITY == (8, 0)
    for _ in range(_attn_fwd.configs[0].kwargs["BLOCK_M"] // 64):
        fp.ops.quantize(q.flatten(0, 2), torch.int8)
""")
    peer = tutorial(str(file), "sm_80")
    taken = [c for c in attention.SHAPES if peer.takes(c)]
    assert [(c.dims[0], c.causal) for c in taken] == [(d, c) for d in (64, 128, 256) for c in (False, True)]
    full, causal = (attention.row_of_tutorial(peer, c) for c in taken[:2])
    assert "BLOCK_M': 64" in full["config"] and "BLOCK_M': 128" in causal["config"]
    assert causal["modelled_us"] == pytest.approx(2 * full["modelled_us"])
    assert f"{full['modelled_us']:.2f} us" in attention.line(full)


def test_attention_is_counted_and_modelled():
    attention = needs_kernels("attention")
    case = dataclasses.replace(attention.SHAPES[0], sizes=(128, 128), heads=(2, 2))  # few keys: no split-KV
    row = attention.row_of("cuda", "sm_80", case)
    assert row["least_bytes"] == 2 * 2 * 64 * (2 * 128 + 2 * 128)
    assert row["least_bytes"] <= row["dram_bytes"] <= 1.1 * row["least_bytes"]
    # of 32 rows by 64 keys a warp, 128 mma and twice the exponentials' instructions are the least
    assert 2 + 2 < row["main_loop_ptx_per_score"] < row["ptx_per_score"]
    assert row["modelled_us"] > 0 and row["binding"] and row["wavefronts_per_ideal"] == 1
    causal = attention.row_of("cuda", "sm_80", dataclasses.replace(case, causal=True))
    assert causal["tflops"] < row["tflops"] and "main_loop_ptx_per_score" not in causal
    assert "missing" in attention.row_of("cuda", "sm_80", dataclasses.replace(case, dims=(320, 320)))


@pytest.mark.interpreted
def test_published_figures_beside_modelled_ones(monkeypatch, capsys, tmp_path):
    published = needs_kernels("published")
    small = [("int8", (130, 256, 128)), ("fp8 block", (130, 256, 128)), ("fp8 rowwise", (130, 256, 128)),
             ("attention", (1, 128, 1, 64)), ("attention int8", (1, 128, 1, 64)), ("attention fp8", (1, 128, 1, 64))]  # fmt: skip
    rows = [published.Row(kind, shape, "them", "H100", 100, "their paper") for kind, shape in small]
    rows += [dataclasses.replace(rows[-1], who="nobody", published=None), dataclasses.replace(rows[-1], share=0.5)]
    monkeypatch.setattr(published, "ROWS", rows)
    monkeypatch.setattr("sys.argv", ["published", "--json", str(tmp_path / "out.json")])
    published.main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    *results, nobodys, half = results
    assert [r["kind"] for r in results] == [kind for kind, _ in small]
    assert all(r["modelled"] > 0 and r["even_at"] == r["clock"] * 100 / r["modelled"] for r in results)
    assert [0 < r["quantising"] < 1 for r in results] == [
        r["kind"] in ("attention int8", "attention fp8") for r in results
    ]
    assert nobodys["even_at"] is None and half["modelled"] == results[-1]["modelled"] / 2
    said = capsys.readouterr().out
    assert "no GPU was timed" in said and "attention 1 x 128 x 1 x 64" in said
