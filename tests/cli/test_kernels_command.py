"""`forwardpass kernels`: a swapped model's layers by their CUDA kernels, without a GPU."""

import json

import pytest
import torch
from command_line import run

from forwardpass import dispatch
from forwardpass.cli import kernels
from forwardpass.dispatch.interpreted import KERNELS
from forwardpass.nn import Int8Linear

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself"),
    pytest.mark.skipif(not KERNELS.exists(), reason="built without CUDA kernels"),
]


@pytest.mark.every(2)
def test_layers_run_by_their_kernels(folder, tmp_path):
    out = tmp_path / "kernels.json"
    done = run("kernels", str(folder), "--gpu", "sm_80", "--json", str(out))
    assert done.exit_code == 0, done.stderr
    assert "CUDA kernels on gpuless's sm_80" in done.stdout and "none in" in done.stdout
    found = json.loads(out.read_text())
    assert found["schema"] == "forwardpass.kernels/1" and found["precision"] == "int8"
    assert sum(layer["count"] for layer in found["layers"]) >= 6
    for layer in found["layers"]:
        assert (
            layer["errors"]["cuda"] < 1e-6 and layer["launches"] and layer["modelled_us"] > 0 and not layer["findings"]
        )


def test_a_wrong_kernel_shows(monkeypatch):
    """One whose result is off by a per cent."""
    layer = Int8Linear.from_torch(torch.nn.Linear(64, 64))
    forward = Int8Linear.forward

    def off(layer, x):
        return forward(layer, x) * (1.01 if dispatch.interpreter() else 1)

    monkeypatch.setattr(Int8Linear, "forward", off)
    (row,) = kernels.examine(torch.nn.Sequential(layer), ["0"], {"input": torch.randn(4, 64)}, "sm_80")
    assert row.errors["cuda"] == pytest.approx(0.01, rel=1e-3) and row.errors["cpu"] < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "sm_70"), "not 'sm_70'"),
        (("--gpu", "sm_100a"), "no CUDA kernels for the B200"),
        (("--precision", "bf16"), "bf16 runs torch's own"),
    ],
)
def test_what_it_refuses(folder, arguments, words):
    done = run("kernels", str(folder), *arguments)
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1
