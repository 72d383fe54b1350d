"""`forwardpass doctor`: what works here, what does not, and why."""

import importlib
import json
import pathlib

import pytest
import torch
from command_line import run

import forwardpass as fp
from forwardpass.cli import console, doctor
from forwardpass.common import environment


@pytest.fixture(scope="module")
def examined():
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["problems"]) == (0, [])
    return found


@pytest.fixture
def one_operation(monkeypatch):
    """Is looked at: all take a second and a half."""
    monkeypatch.setattr(fp.dispatch, "operations", {"quantize": fp.dispatch.operations["quantize"]})


@pytest.mark.every(3)
def test_doctor_json(examined):
    found = examined
    assert found["schema"] == "forwardpass.doctor/1"
    assert {"versions", "device", "gpus", "build", "driver", "nvcc", "kernels", "measured", "problems"} <= set(found)
    assert found["versions"]["torch"] == torch.__version__
    rows = {(k["operation"], k["backend"]): k for k in found["kernels"]}
    assert set(rows) == {(o, b) for o in fp.dispatch.operations for b in fp.dispatch.BACKENDS}
    for k in rows.values():
        assert (k["code"] is None) == (k["text"] is None) == (k["fix"] is None)
    assert rows["quantize", "cpu"]["parity"]["ok"]
    assert rows["quantize", "reference"]["code"] is None
    if not torch.cuda.is_available():
        assert rows["quantize", "cuda"]["code"] in ("no_gpu", "not_built")


@pytest.mark.every(2)
def test_doctor_knows_what_can_be_interpreted(examined):
    found = examined["interpreter"]
    assert found["problem"] is None
    names = {"sm_80": "A100", "sm_89": "L40S", "sm_90a": "H100", "sm_100a": "B200", "sm_120": "RTX PRO 6000"}
    assert found["architectures"] == names
    rows = {(k["operation"], k["backend"]): k["code"] for k in found["kernels"]}
    assert set(rows) == {(o, b) for o in fp.dispatch.operations for b in ("cuda", "triton")}
    assert rows["quantize", "cuda"] in (None, "not_built")
    said = console.describe_interpreter(found)
    assert said.startswith("A100 (sm_80), L40S (sm_89), H100 (sm_90a), B200 (sm_100a), RTX PRO 6000 (sm_120): ")
    assert ("kernels of every operation" in said) == (set(rows.values()) == {None})
    quantize = [k for k in found["kernels"] if k["operation"] == "quantize"]
    others = [k | {"operation": "other", "code": "no_fp8", "text": "it is old"} for k in quantize]
    said = console.describe_interpreter(found | {"kernels": [k | {"code": None} for k in quantize] + others})
    assert said.endswith(
        ": cuda and triton kernels of quantize; no cuda kernels: it is old; no triton kernels: it is old"
    )
    assert console.describe_interpreter({"problem": "it is missing; reinstall"}) == "none: it is missing; reinstall"


def test_doctor_table(examined, monkeypatch):
    command = importlib.import_module("forwardpass.cli.commands.doctor_command")
    monkeypatch.setattr(command, "examine", lambda: examined)  # once is enough
    result = run("doctor")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for operation in fp.dispatch.operations:
        assert any(line.split()[:1] == [operation] for line in lines)
    assert max(map(len, lines)) <= 100 and len(lines) <= 21 + len(fp.dispatch.operations)
    if not torch.cuda.is_available():
        assert (
            sum("this torch was built without CUDA" in line or "no GPU" in line for line in lines) <= 1
        )  # not for each


@pytest.mark.parametrize(
    ("tier", "instructions", "line"),
    [
        ("amx", "AMX", "products by AMX"),
        ("avx512_vnni", "VNNI", "products by VNNI"),
        ("avx512", "AVX2", "products by AVX2"),
        ("avx_vnni", "AVX-VNNI", "products by AVX-VNNI"),
        ("avx2", "AVX2", "products by AVX2"),
        ("baseline", None, "no gain"),
        (None, None, "no gain"),
    ],
)
@pytest.mark.usefixtures("one_operation")
def test_doctor_says_what_int8_gains_here(tier, instructions, line, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "cpu_tier", lambda: tier)
        patch.delitem(environment.INT8_INSTRUCTIONS, "baseline")
        patch.setattr(pathlib.Path, "read_text", lambda path: "model name\t: a CPU\n")
        cpu = environment.device()
    assert (cpu["name"], cpu["int8"]) == ("a CPU", instructions)
    monkeypatch.setattr(doctor.environment, "device", lambda name="cpu": cpu)
    row = next(x for x in run("doctor").stdout.splitlines() if x.startswith("int8  "))
    assert row.split(None, 1)[1].startswith(line)


def test_doctor_does_not_blame_an_a100_for_its_tensor_cores(monkeypatch):
    with fp.interpret("sm_80"), monkeypatch.context() as m:
        m.setattr(fp.dispatch, "operations", {"fp8_gemm": fp.dispatch.operations["fp8_gemm"]})
        m.setattr(torch.cuda, "is_available", lambda: True)
        m.setattr(torch.cuda, "device_count", lambda: 1)
        m.setattr(doctor.environment, "device", lambda name="cpu": {"name": name})
        found = doctor.examine()
    codes = {k["backend"]: k["code"] for k in found["kernels"]}
    assert codes == {"cuda": "no_fp8", "triton": "no_fp8", "cpu": "not_written", "reference": None}
    assert found["problems"] == []


@pytest.mark.usefixtures("one_operation")
def test_doctor_finds_a_kernel_that_is_wrong(monkeypatch):
    op = fp.dispatch.operations["quantize"]
    right = op.runs["cpu"]
    monkeypatch.setitem(op.runs, "cpu", lambda *args: tuple(r * 2 for r in right(*args)))
    op._bound.clear()
    result = run("doctor", "--json")
    op._bound.clear()
    assert result.exit_code == 1
    assert "quantize on cpu differs" in json.loads(result.stdout)["problems"][0]


@pytest.mark.usefixtures("one_operation")
def test_doctor_finds_a_kernel_that_raises(monkeypatch):
    def broken(*args):
        raise RuntimeError("an illegal\n instruction")

    op = fp.dispatch.operations["quantize"]
    monkeypatch.setitem(op.runs, "cpu", broken)
    op._bound.clear()
    result = run("doctor")
    op._bound.clear()
    assert result.exit_code == 1
    assert "RuntimeError: an illegal instruction" in " ".join(result.stdout.split())


@pytest.mark.usefixtures("one_operation")
def test_doctor_knows_an_old_driver(monkeypatch):
    monkeypatch.setitem(fp.dispatch.library.build_info, "nvcc", "13.0")
    monkeypatch.setattr(doctor.environment, "driver", lambda: "550.54.15")
    assert "550.54.15" in doctor.examine()["problems"][0]
    monkeypatch.setattr(doctor.environment, "driver", lambda: "580.65.06")
    assert doctor.examine()["problems"] == []
