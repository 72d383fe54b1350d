"""Benchmarks of whole models beside their peers."""

import dataclasses
import importlib
import json
import multiprocessing
import time

import pytest
import torch

import forwardpass as fp
from forwardpass.common.timing import untracked
from forwardpass.swap import rules

bench = pytest.importorskip("benchmarks.bench", reason="benchmarks are in the checkout only; run pytest from its root")
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


@pytest.fixture
def no_tier(monkeypatch):
    """The environment of a process that is held to no tier. One that is begins a new process, in the place of pytest's."""
    for name in ("FORWARDPASS_CPU", *tiers.TIERS["avx2"].environment):
        monkeypatch.delenv(name, raising=False)


def test_a_lower_tier_is_a_new_process_in_its_environment(no_tier, monkeypatch):
    started = []
    monkeypatch.setattr(tiers.os, "execve", lambda *call: started.append(call))
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


@pytest.mark.every(2)
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


@pytest.mark.every(2)
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
def test_models_refuse_what_they_cannot_run(arguments, reason, no_tier, monkeypatch, capsys):
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


@pytest.mark.every(2)
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


@pytest.mark.every(3)
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

    seen, swap = [], fp.swap

    def with_cache(model, precision=None, *, kv_cache=None, dry_run=False, **options):
        seen.append((dry_run, kv_cache))
        return swap(model, precision, kv_cache=kv_cache, dry_run=dry_run, **options)

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


def test_generate_has_the_layers_as_one_operation_or_says_why_not(tmp_path, monkeypatch):
    from command_line import small_llama

    from forwardpass.integrations.transformers.stacks import decoder_stack

    tokens, operation = [], decoder_stack.OPERATION

    def counted(*args):
        tokens.append(args[0].shape[1])
        return operation(*args)

    monkeypatch.setattr(decoder_stack, "OPERATION", counted)
    options = ("--batch", "1", "--prompt", "4", "--peers", "", "--precisions", "int8+head+decoder,bf16+decoder")
    model = small_llama(
        tmp_path, num_key_value_heads=4, max_position_embeddings=300
    )  # layers that are no smaller than others
    _, result = generated(str(model), *options)
    assert list(result["candidates"]) == ["forwardpass int8+head+decoder", "eager fp32"], str(result["not_run"])
    assert tokens.count(4) > 0 and tokens.count(1) == 3 * tokens.count(4)
    assert "its layers are no operation: " in result["not_run"]["forwardpass bf16+decoder"]


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


def test_networks_of_convolutions_beside_peers(monkeypatch, capsys, tmp_path):
    """Small random networks on noise; a peer that is not there says so, and one that does other work has another share."""
    from conv_models import build

    networks = importlib.import_module("benchmarks.convolution_peers")

    def absent(subject):
        raise ModuleNotFoundError("No module named 'peer'")

    noise = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(networks, "photographs", lambda mean, deviation: (noise[:6], noise[6:]))
    monkeypatch.setattr(networks, "NETWORKS", {"resnet": networks.Network(lambda: build("resnet"), ([], []), True)})
    kept = {name: networks.CANDIDATES[name] for name in ("fp32", "int8", "torch int8")}
    wrong = {"wrong": lambda s: lambda x: -s.model(x), "absent": absent}
    monkeypatch.setattr(networks, "CANDIDATES", kept | wrong)
    file = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "--rounds", "2", "--threads", "1", "--json", str(file)])
    networks.main()
    result = json.loads(file.read_text())["networks"]["resnet"]
    rows = result["candidates"]
    assert (
        rows["fp32"]["same_best_class"] == 1 and rows["int8"]["relative_error"] < 0.05 < rows["wrong"]["relative_error"]
    )
    assert {*rows} == {*kept, "wrong"} and result["missing"] == {
        "absent": "ModuleNotFoundError: No module named 'peer'"
    }
    printed = capsys.readouterr().out
    assert "resnet, torch int8: " in printed and "resnet, absent: ModuleNotFoundError" in printed
    monkeypatch.setattr(networks, "measure", absent)  # the file has this network
    networks.main()
    assert capsys.readouterr().out == printed
    monkeypatch.setattr("sys.argv", ["benchmark", "--threads", "1", "--images", "3", "--json", str(file)])
    with pytest.raises(SystemExit, match=r"another images: name another file"):
        networks.main()


def test_shares_of_convolutions(monkeypatch):
    """Of a small random network on noise: each layer's product is counted, and the model is left as it was."""
    from conv_models import build

    monkeypatch.setattr(rules, "LEAST_CONVOLUTIONS_ON_CPU", {})  # of AVX2 they are larger
    models = importlib.import_module("benchmarks.convolution_models")
    noise = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        subject = models.Subject("resnet", build("resnet"), noise[:6], noise[6:])
        rows = models.shares(subject)
        assert torch.equal(subject.logits(), subject.expected)
    assert {r["fqn"] for r in rows} == {
        s.fqn for s in fp.swap(subject.model, "int8", dry_run=True, calibrate=[()]).swapped
    }
    for part in ("of_error", "of_products"):
        assert sum(r[part] for r in rows) == pytest.approx(1) and all(0 < r[part] < 1 for r in rows)
    first = dict(subject.model.named_modules())[rows[0]["fqn"]]
    assert rows[0]["products"] % first.weight.numel() == 0
    ratios = [r["of_error"] / r["of_products"] for r in rows]
    assert ratios == sorted(ratios, reverse=True)
