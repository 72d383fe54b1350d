"""torch.library.opcheck of every op that is registered: its schema, its fake, and what autograd and AOT dispatch make of it."""

import dataclasses

import pytest
import torch
from rotation import in_turn
from torch.library import opcheck

from forwardpass.dispatch import operations
from forwardpass.testing import benchmark_cases

OPS = [(op, backend) for op in operations.values() for backend in op.compiled]
#: each operation by one of its backends, whose schemas are the same, and by the others in the slow tests
IN_TURN = [p for op in operations.values() for p in in_turn([(op, backend) for backend in op.compiled])]
#: What is about the library itself and takes no tensor.
SETTINGS = {
    "_set_library",
    "_set_poison",
    "_set_storage_hook",
    "_keep_storage",
    "_cpu_tier",
    "_cpu_tiers",
    "_cpu_has_attention",
}


def arguments(op, backend):
    """Of its smallest benchmark case, whose experts are made small; where a GPU's kernel would compute, meta tensors, on which
    the fake alone runs."""
    case = min(benchmark_cases(op), key=lambda case: case.bytes())
    if hasattr(case, "counts"):
        case = dataclasses.replace(case, n=64, k=128)
    args = case.arguments()
    return args if backend == "cpu" else [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]


def test_every_op_is_checked():
    names = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("forwardpass::")
    }
    assert names == {f"{op.name}_{backend}" for op, backend in OPS} | SETTINGS | {"pack_int8_weight"}


@pytest.mark.every(2)
@pytest.mark.parametrize(("op", "backend"), IN_TURN, ids=lambda x: x if isinstance(x, str) else x.name)
def test_opcheck(op, backend):
    opcheck(op.runs[backend], arguments(op, backend))


def test_opcheck_of_packing():
    opcheck(torch.ops.forwardpass.pack_int8_weight.default, (torch.ones(40, 70, dtype=torch.int8),))
