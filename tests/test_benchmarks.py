"""Every benchmark's baseline does the work of its operation, and the timing tells fast from slow."""

import dataclasses
import functools
import importlib
import json
import multiprocessing
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.common.timing import untracked
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


def test_a_case_that_nothing_of_ours_runs_is_left_out_with_the_reasons():
    """FP8 on a CPU: plain torch alone took 20 minutes of one operation's cases."""
    op = dispatch.operations["fp8_grouped_gemm"]
    row = bench.run_case(op, min(benchmark_cases(op), key=lambda c: c.bytes()), BASELINES[op], "cpu", rounds=2)
    assert "timings" not in row and all(f"{b}: " in row["left_out"] for b in ("cuda", "triton", "cpu"))


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
             ("attention", (1, 128, 1, 64))]  # fmt: skip
    rows = [published.Row(kind, shape, "them", "H100", 100, "their paper") for kind, shape in small]
    monkeypatch.setattr(published, "ROWS", rows)
    monkeypatch.setattr("sys.argv", ["published", "--json", str(tmp_path / "out.json")])
    published.main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [r["kind"] for r in results] == [kind for kind, _ in small]
    assert all(r["modelled"] > 0 and r["even_at"] == r["clock"] * 100 / r["modelled"] for r in results)
    said = capsys.readouterr().out
    assert "no GPU was timed" in said and "attention 1 x 128 x 1 x 64" in said


models, peers, tiers = (importlib.import_module(f"benchmarks.{m}") for m in ("models", "peers", "tiers"))
VNNI = {"avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512_vnni"}


def test_a_tier_is_one_that_the_machine_has():
    assert tiers.choose(None, None, VNNI) == ("avx512_vnni", "avx512_vnni")
    assert tiers.choose("avx2", None, VNNI) == tiers.choose(None, "avx2", VNNI) == ("avx2", "avx512_vnni")
    assert tiers.choose(None, None, VNNI | {"avx_vnni", "amx_int8"})[1] == "amx"
    assert tiers.choose(None, None, ()) == (None, None)
    for asked, held, reason in (
        ("amx", None, "it lacks amx_int8; pass one of avx2, avx512_vnni"),
        ("avx_vnni", None, "lacks avx_vnni"),
        ("sse", None, "pass one of avx2, avx_vnni, avx512_vnni, amx"),
        ("avx2", "avx512_vnni", "FORWARDPASS_CPU=avx512_vnni .* unset it"),
    ):
        with pytest.raises(ValueError, match=reason):
            tiers.choose(asked, held, VNNI)


def test_a_lower_tier_is_a_new_process_in_its_environment(monkeypatch):
    started = []
    monkeypatch.setattr(tiers.os, "execve", lambda *call: started.append(call))
    for name in ("FORWARDPASS_CPU", *tiers.TIERS["avx2"].environment):
        monkeypatch.delenv(name, raising=False)
    environment = tiers.hold_to("avx2")
    ((_, arguments, new),) = started
    assert arguments == tiers.sys.orig_argv and environment.items() <= new.items()
    assert new["FORWARDPASS_CPU"] == new["ATEN_CPU_CAPABILITY"] == "avx2" and new["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    for name, value in new.items():
        monkeypatch.setenv(name, value)
    assert tiers.hold_to("avx2") == environment and len(started) == 1


def test_a_cell_has_the_rounds_that_fit():
    def rounds(share):
        calls = {"": lambda: time.sleep(0.005)}  # 10 ms a round
        return models.time_cell(calls, "cpu", (2, 30), share, "", untracked)[""].rounds

    assert rounds(-1.0) == 2 and 3 <= rounds(0.12) <= 11 and rounds(100.0) == 30


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    from command_line import small_bert

    folder = tmp_path_factory.mktemp("small")
    small_bert(folder)
    return str(folder)


def measure(model, *options):
    args = models.arguments().parse_args(
        ["--model", model, "--device", "cpu", "--texts", "4", "--rounds", "2", *options]
    )
    args.peers = ("torch_dynamic_int8", "broken")
    return models.measure(args, "avx2", "avx512_vnni")


@pytest.fixture
def broken_peer(monkeypatch):
    """A peer that cannot be built; the names of what was."""

    def broken(subject):
        assert subject.lowered == "avx2" and subject.highest == "avx512_vnni"
        raise ZeroDivisionError("of its own")

    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer(broken, lowering="nothing"))
    return ["eager", "forwardpass int8", "torch_dynamic_int8"]


def test_models_beside_their_peers(small_model, broken_peer):
    result = measure(small_model, "--batch", "1,2", "--length", "8")
    assert result["not_run"] == {"broken": "failed: ZeroDivisionError: of its own"}
    assert list(result["peers"]) == broken_peer and result["lowered"] and result["texts"] == 4
    assert [(c["batch"], c["length"], c["tokens"], c["rounds"]) for c in result["cells"]] == [
        (1, 8, 8, 2),
        (2, 8, 16, 2),
    ]
    for cell in result["cells"]:
        assert list(cell["timings"]) == broken_peer
        assert all(0 < t["low"] <= t["median"] <= t["high"] for t in cell["timings"].values())
    assert result["peers"]["eager"]["cosine_min"] == pytest.approx(1)
    assert 0.9 < result["peers"]["forwardpass int8"]["cosine_min"] < 1 - 1e-9
    said = "\n".join(models.table_lines(result))
    assert said.count("fastest peer with") == 2 and "FORWARDPASS_CPU" in said and "FBGEMM" in said
    json.dumps(result)


def test_grid_and_ragged_texts(small_model, broken_peer, monkeypatch):
    cells = [models.Cell(threads, 2, 8) for threads in (1, 2)]
    monkeypatch.setitem(models.MODES, "grid", dataclasses.replace(models.MODES["grid"], cells=lambda args: cells))
    monkeypatch.setitem(
        peers.PEERS, "torch_dynamic_int8", dataclasses.replace(peers.PEERS["torch_dynamic_int8"], recompiled="it is")
    )
    threads = torch.get_num_threads()
    result = measure(small_model, "--grid")
    assert torch.get_num_threads() == threads and [c["threads"] for c in result["cells"]] == [1, 2]
    assert result["not_run"]["torch_dynamic_int8"] == "it is" and list(result["cells"][0]["timings"]) == broken_peer[:2]
    assert len(list(models.grid_lines(result))) == 1 + 2 + 3

    result = measure(small_model, "--ragged")
    (cell,) = result["cells"]
    assert cell["batches"] == result["ragged_batches"] == 1
    assert list(cell["timings"]) == broken_peer and 4 < cell["tokens"] < 4 * 512
    line = next(line for line in models.ragged_lines(result) if line.startswith("eager"))
    assert f"{cell['tokens'] / cell['timings']['eager']['median'] * 1e3:.0f} [" in line


def test_compiled_is_beside_compiled():
    assert {"fp32 compiled", "forwardpass int8 compiled"} <= set(models.MODES["compiled"].peers)
    assert {"fp32 compiled", "forwardpass int8 compiled"}.isdisjoint(
        models.MODES["table"].peers + models.MODES["grid"].peers
    )
    ms = {"eager": 40.0, "fp32 compiled": 36.0, "forwardpass int8": 13.0, "forwardpass int8 compiled": 12.0}
    timings = {n: {"median": t, "low": t, "high": t} for n, t in ms.items()}
    cell = {"threads": 2, "batch": 8, "length": 128, "rounds": 9, "timings": timings}
    said = {name: {"cosine_min": 1.0, "instructions": "AVX2", "lowering": ""} for name in ms}
    line = list(models.compiled_lines({"peers": said, "cells": [cell], "lowered": False}))[-1]
    assert line == "8 x 128, 2 threads, both under torch.compile: ours is 3.00 times as fast as fp32"


def test_the_rival_is_the_fastest_that_is_the_same_model():
    def timing(ms):
        return {"median": ms, "low": ms, "high": ms}

    cosines = {"eager": 1.0, "forwardpass int8": 0.9994, "forwardpass w8a16": 0.9992, "close": 0.9991, "far": 0.998}
    ms = {"eager": 40.0, "forwardpass int8": 10.0, "forwardpass w8a16": 5.0, "close": 15.0, "far": 8.0}
    cell = {"threads": 2, "batch": 8, "length": 128, "rounds": 9, "timings": {n: timing(t) for n, t in ms.items()}}
    said = {n: {"cosine_min": c, "instructions": "AVX2", "lowering": ""} for n, c in cosines.items()}
    result = {"peers": said, "cells": [cell], "lowered": False}
    assert list(models.table_lines(result))[-1] == (
        "8 x 128, 2 threads, 9 rounds: fastest peer with a lowest cosine >= 0.999: close, 15.0 ms; "
        "ours, with 0.99940: 10.0 ms, 1.50 times as fast"
    )
    eager, same, fastest = list(models.grid_lines(result))[-3:]
    assert eager.endswith("no cell below 1.0") and same.endswith("no cell below 1.0")
    assert fastest.endswith("below 1.0 in 1: 8 x 128, 2 threads")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--grid", "--batch", "8"], "drop --batch and --length"),
        (["--peers", "eager,nobody"], "unknown peers nobody"),
        (["--tier", "sse"], "there is no tier sse"),
        (["--model", "no folder"], "neither a folder"),
    ],
)
def test_models_refuse_what_they_cannot_run(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["models", *arguments])
    with pytest.raises(SystemExit):
        models.main()
    assert reason in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory):
    from command_line import small_llama

    return str(small_llama(tmp_path_factory.mktemp("decoder"), max_position_embeddings=300))


def generated(model, *options, module="generate_peers"):
    """module: whose `make` makes candidates; by default in this process, which has what tests patch."""
    generate = importlib.import_module("benchmarks.generate")
    args = generate.arguments().parse_args(
        ["--model", model, "--texts", "1", "--rounds", "2", "--steps", "3", *options]
    )
    *_, result = generate.measure(args, importlib.import_module(f"benchmarks.{module}").make)
    return generate, result


def test_generate_beside_its_peers(small_decoder, monkeypatch):
    from forwardpass.common.models.decoding import Decoding

    peers = importlib.import_module("benchmarks.generate_peers")

    def failing(subject):
        def prepare(cell):
            raise ZeroDivisionError("of its own")

        return dataclasses.replace(peers.eager_fp32(subject), prepare=prepare)

    def absent(subject):
        peers.need("no_such_package", "no-such-package")

    monkeypatch.setitem(peers.PEERS, "absent", absent)
    monkeypatch.setitem(peers.PEERS, "failing", failing)
    asked = ("--peers", "eager bf16,llama.cpp Q8_0,absent,failing", "--precisions", "int8,w8a16+head")
    generate, result = generated(small_decoder, "--batch", "1,2", "--prompt", "4", *asked)
    ran = ["forwardpass int8", "forwardpass w8a16+head", "eager fp32", "eager bf16"]
    assert list(result["candidates"]) == [*ran, "failing"]
    assert "no-such-package" in result["not_run"]["absent"] and result["not_run"]["llama.cpp Q8_0"]
    assert result["not_run"]["compiled fp32"] == "not asked for"
    assert [(c["batch"], c["prompt"], c["steps"], c["rounds"]) for c in result["cells"]] == [(1, 4, 3, 2), (2, 4, 3, 2)]
    sizes = {name: c["weight_bytes"] for name, c in result["candidates"].items()}
    assert sizes["forwardpass w8a16+head"] < sizes["eager bf16"] < sizes["eager fp32"]
    for cell in result["cells"]:
        assert (
            cell["not_run"] == {"failing": "failed: ZeroDivisionError: of its own"}
            and list(cell["tokens_per_s"]) == ran
        )
        for name, phases in cell["tokens_per_s"].items():
            assert all(0 < phases[p]["low"] <= phases[p]["median"] <= phases[p]["high"] for p in ("prefill", "decode"))
            moved = cell["decode_bytes"][name]
            rate = moved["a_token"] * phases["decode"]["median"] / result["copy_bytes_per_s"]
            assert moved["of_copy"] == pytest.approx(rate)
    # 2 layers of 2 heads of 16 values, keys and values, fp32, and of the 3 steps the half
    cache = 2 * 2 * 2 * 16 * (4 + 1.5) * 4
    assert result["cells"][1]["decode_bytes"]["eager fp32"]["a_token"] == sizes["eager fp32"] / 2 + cache
    perplexities = [c["perplexity"] for c in result["candidates"].values()]
    assert max(perplexities) < 1.05 * min(perplexities) and result["perplexity_tokens"] == 255
    said = "\n".join(generate.lines(result))
    assert str(Decoding(2, 4, 3)) in said and "compiled fp32           not run: not asked for" in said
    json.dumps(result)


def test_candidates_have_processes_of_their_own(small_decoder, tmp_path):
    own, peers = (importlib.import_module(f"benchmarks.{name}") for name in ("own_process", "generate_peers"))
    from forwardpass.cli.source import find_model
    from forwardpass.common.models.decoding import Decoding

    subject, rows = peers.Subject(find_model(small_decoder), tmp_path), torch.arange(2, 34).view(2, 16)
    here, there = peers.make("eager fp32", subject), own.make("eager fp32", subject)
    assert (there.weight_bytes, there.cache_itemsize) == (here.weight_bytes, here.cache_itemsize)
    with torch.inference_mode():
        torch.testing.assert_close(there.losses(rows), here.losses(rows))
    before = time.perf_counter()
    times = [before, *there.prepare(Decoding(2, 16, 3))(rows, 3), time.perf_counter()]
    assert times == sorted(times) and len(times) == 7
    with pytest.raises(peers.Failed, match="failed: IndexError"):
        there.losses(rows + 10**6)
    assert there.losses(rows).shape == (30,)  # goes on after that
    with pytest.raises(peers.Missing):
        own.make("llama.cpp Q8_0", subject)  # of a model that is no GGUF file, if it is installed
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(peers.Failed, match="its process ended with -9"):
        there.losses(rows)


@pytest.mark.slow
def test_generate_compiled(small_decoder):
    """Ours and the peer: steps of every cell are compiled, and none fails. In one process one would run the other's code, as the
    guards that tell models of one class apart are dropped."""
    asked = ("--peers", "compiled fp32", "--precisions", "int8+head+compiled", "--kv-cache", "auto")
    _, result = generated(small_decoder, "--batch", "1,2", "--prompt", "4", *asked, module="own_process")
    for cell in result["cells"]:
        assert cell["not_run"] == {}
        assert list(cell["tokens_per_s"]) == ["forwardpass int8+head+compiled", "eager fp32", "compiled fp32"]


def test_generate_passes_kv_cache_on(small_decoder, monkeypatch):
    import forwardpass as fp

    seen, swap = [], fp.swap

    def with_cache(model, precision=None, *, plan=None, kv_cache=None, dry_run=False):
        seen.append((dry_run, kv_cache))
        return swap(model, precision, plan=plan, kv_cache=kv_cache, dry_run=dry_run)

    options = ("--batch", "1", "--prompt", "4", "--peers", "", "--precisions", "int8", "--kv-cache", "int8")
    monkeypatch.setattr(fp, "swap", with_cache)
    _, result = generated(small_decoder, *options)
    assert seen == [(True, None), (False, "int8")] and result["kv_cache"] == "int8"
    moved = result["cells"][0]["decode_bytes"]
    sizes = {n: c["weight_bytes"] for n, c in result["candidates"].items()}
    caches = [moved[n]["a_token"] - sizes[n] for n in ("forwardpass int8", "eager fp32")]
    assert caches[1] == 4 * caches[0] > 0
    _, result = generated(small_decoder, *options[:-1], "auto")  # of the model's dtype, as eager's
    moved = result["cells"][0]["decode_bytes"]
    assert moved["forwardpass int8"]["a_token"] - sizes["forwardpass int8"] == caches[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--peers", "nobody"), "unknown peers nobody"),
        (("--precisions", "int3"), "there is no precision 'int3'"),
        (("--prompt", "299"), "302 tokens"),
    ],
)
def test_generate_refuses(small_decoder, options, reason):
    with pytest.raises(ValueError, match=reason):
        generated(small_decoder, *options)


def test_each_installed_peer_of_generate_runs(small_decoder):
    """Of those that take a folder; they are compared by their perplexity."""
    if importlib.util.find_spec("ctranslate2") is None:
        pytest.skip("the extra bench is not installed")
    options = ("--batch", "2", "--prompt", "4", "--peers", "ctranslate2 int8", "--precisions", "int8")
    _, result = generated(small_decoder, *options)
    rates, found = result["cells"][0]["tokens_per_s"], result["candidates"]
    assert set(rates["ctranslate2 int8"]) == {"prefill", "decode"}
    assert found["ctranslate2 int8"]["perplexity"] == pytest.approx(found["eager fp32"]["perplexity"], rel=0.02)
