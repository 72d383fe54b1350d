"""The examples in docstrings run as they stand. Every public function that changes or reads a model has one, and so has every
operation and module."""

import doctest
import inspect
import re

import pytest
import torch
from stored_formats import llama
from torch import nn
from transformers import AutoModelForCausalLM

import forwardpass as fp
from forwardpass.nn.linear import quantized_linear as layer
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
    run_example(getattr(fp, name), names)


@pytest.mark.parametrize(
    "public", [f"ops.{name}" for name in fp.ops.__all__] + [f"nn.{name}" for name in fp.nn.__all__]
)
def test_examples_of_operations_and_modules(public):
    module, name = public.split(".")
    torch.manual_seed(0)
    try:
        run_example(getattr(getattr(fp, module), name), {"fp": fp, "torch": torch})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", fp.ops.__all__)
def test_contracts_of_operations(name):
    """Each has a contract, which names every argument, or the operation that has the same ones."""
    operation = getattr(fp.ops, name)
    contract = inspect.getdoc(operation)
    assert all(f"\n{part}:" in contract for part in ("Args", "Returns", "Raises", "Example")), name
    given = re.search(r"^Args:\n(.*?)^\S", contract, re.M | re.S)[1]
    same = re.search(r"as in (\w+), and so is everything", given)
    if same:
        given += inspect.getdoc(getattr(fp.ops, same[1]))
    named = ", ".join(re.findall(r"(?:^ {4}|; )([\w, ]+):", given, re.M)).split(", ")
    assert inspect.signature(operation).parameters.keys() <= set(named)


def run_example(documented, names):
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, documented.__name__, globs=names)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = []
    assert runner.run(example, out=said.append).failed == 0, "".join(said)
