"""`forwardpass size-batch`: the policy that it prints, writes and tries."""

import importlib
import json

import pytest
from command_line import refused, run

from forwardpass.serving import size_batch
from forwardpass.serving.load_generator import Load
from forwardpass.serving.queueing import Arrivals, Spread


@pytest.mark.every(3)
def test_size_batch_gives_a_policy_and_tries_it(folder, tmp_path):
    files = {"json": tmp_path / "size.json", "plot": tmp_path / "size.png"}
    result = run("size-batch", folder, "--slo-ms", 60_000, "--rate", 50, "--length", 8, "--max-batch", 2, "--seconds", 0.1,
                 "--check", 0.5, "--price-per-hour", 1, *(x for n, f in files.items() for x in (f"--{n}", f)))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "p99 within 60000 ms at 50 requests a second: max_batch=" in result.stdout
    written = json.loads(files["json"].read_text())
    replicas = written["policy"]["replicas"]  # more than one where the machine is slow
    requests = round(0.5 * 50 / replicas)
    assert f"real run of {requests} requests" in result.stdout and "holds the objective" in " ".join(
        result.stdout.split()
    )
    assert written["policy"]["max_batch"] in (1, 2) and written["policy"]["max_wait_ms"] >= 0
    assert written["check"]["requests"] == requests and written["check"]["ok"]
    assert written["policy"]["cost_per_million"] == pytest.approx(replicas / (50 * 3600) * 1e6)
    assert files["plot"].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.every(3)
def test_size_batch_tries_what_it_simulated(folder, monkeypatch):
    """One of three replicas gets each third request; a run that took longer than any that was simulated is said to."""
    sent = []

    def trial(model, make_batch, policy, arrivals, forward):
        sent.append(arrivals)
        return Load([0.001 if len(sent) == 1 else 60.0] * len(arrivals), [0.0] * len(arrivals))

    three = size_batch.Candidate(1, 0.0, 3, {"p50": 1.0, "p95": 1.0, "p99": 1.0}, 0.5, 1.0, None)
    size = ("size-batch", folder, "--length", 8, "--max-batch", 1, "--seconds", 0.1, "--rate", 30, "--check", 2)
    monkeypatch.setattr(importlib.import_module("forwardpass.cli.commands.size_batch_command"), "try_policy", trial)
    monkeypatch.setattr(size_batch, "_choose", lambda *args: (three, Spread(20, 0.5, 1.5), [], None))
    holds, fails = (" ".join(run(*size, "--slo-ms", 100).stdout.split()) for _ in range(2))
    assert sent == [Arrivals(30.0).of_replica(3, 20, seed=1)] * 2
    assert "3 replicas, which take turns" in holds and "in 95% of runs of 20 requests p99 is 0.5 to 1.5 ms" in holds
    assert "holds the objective" in holds and "not as simulated" not in holds
    assert "FAILS the objective p99 is not as simulated" in fails


@pytest.mark.every(3)
def test_size_batch_with_a_trace_an_objective_that_cannot_hold_and_bad_usage(folder, tmp_path):
    trace = tmp_path / "trace.txt"
    trace.write_text("\n".join(str(i / 20) for i in range(40)))
    size = ("size-batch", folder, "--length", 8, "--max-batch", 1, "--seconds", 0.1, "--check", 0.3)
    result = run(*size, "--slo-ms", 60_000, "--trace", trace, "--json", "-")
    written = json.loads(result.stdout)
    assert result.exit_code == 0 and written["check"]["requests"] == -(-7 // written["policy"]["replicas"])
    result = run(*size, "--slo-ms", 0.001, "--rate", 5, "--json", "-")
    assert result.exit_code == 1 and json.loads(result.stdout)["policy"] is None
    assert "no policy holds p99 within 0.001 ms" in result.stderr
    refused(run(*size, "--slo-ms", 50), "either --rate or --trace: neither was given")
    refused(run(*size, "--slo-ms", 0, "--rate", 5), "--slo-ms is a number above 0, not 0")
    refused(run(*size, "--slo-ms", 50, "--trace", tmp_path / "none"), "No such file")
    refused(run(*size, "--slo-ms", 50, "--rate", 5, "--precision", "int9"), "--precision is one of")
