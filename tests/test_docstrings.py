"""The examples in docstrings run as they stand, and every public function that changes or reads a model has one."""

import doctest

import pytest
import torch
from stored_formats import llama
from torch import nn
from transformers import AutoModelForCausalLM

import forwardpass as fp
from forwardpass.nn import layer
from forwardpass.swap import precision

WITH_EXAMPLE = (
    "Config",
    "export_pretrained",
    "load_pretrained",
    "parity",
    "plan",
    "register_linear",
    "register_precision",
    "report",
    "restore",
    "save_pretrained",
    "swap",
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        self.head = nn.Linear(256, 256)

    def forward(self, x):
        return self.head(self.body(x))


def build_model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layer, "_LINEAR", set(layer._LINEAR))
    monkeypatch.setattr(precision, "PRECISIONS", list(precision.PRECISIONS))
    if name == "load_pretrained":
        saved = build_model()
        fp.swap(saved, "int8")
        fp.save_pretrained(saved, "checkpoint")
    if name == "Config":
        llama().save_pretrained("floats")
    batches = [torch.randn(32, 256, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    names = {
        "fp": fp,
        "torch": torch,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "model": llama() if name == "export_pretrained" else build_model(),
        "build_model": build_model,
        "batches": batches,
        "x": batches[0],
    }
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(fp, name), name, globs=names)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = []
    assert runner.run(example, out=said.append).failed == 0, "".join(said)
