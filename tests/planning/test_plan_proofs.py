"""Plans run what they rewrite, and leave layers that no batch holds to the budget."""

import pytest
import torch
from small_models import block, inputs
from torch import nn

import forwardpass as fp


def batches(count=4):
    return [inputs(64, seed) for seed in range(10, 10 + count)]


class Branching(nn.Module):
    """Short inputs go through a layer of their own."""

    def __init__(self):
        super().__init__()
        self.block, self.short = block(), nn.Linear(64, 64)

    def forward(self, x):
        return self.block(self.short(x) if len(x) < 8 else x)


@pytest.mark.every(2)
def test_layers_that_no_batch_reaches_stay():
    """It was planned, on the time of `shapes` alone: the criterion never saw it."""
    torch.manual_seed(0)
    model = Branching().eval()
    shapes = [inputs(4, 1), inputs(64, 1)]
    result = fp.plan(model, batches(), candidates="int8", max_error=0.1, shapes=shapes, target="memory")
    assert {layer.fqn for layer in result.layers} == {"block.first", "block.second", "block.head"}
    [short] = [x for x in result.evidence["layers"] if x["fqn"] == "short"]
    assert short["choice"] is None and short["candidates"]["int8"]["refused"]["code"] == "not_reached"
    assert "no batch of `batches` reaches it" in str(result)
    result = fp.plan(
        model, [*batches(), inputs(4, 9)], candidates="int8", max_error=0.1, shapes=shapes, target="memory"
    )
    assert "short" in {layer.fqn for layer in result.layers}


def test_plans_run_what_they_rewrite():
    """A layer whose input code changes before the next one reads it, through a view: plans joined the two."""

    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            keep = [x]
            y = self.a(x)
            self.scale(keep)
            return y + self.b(x)

        def scale(self, tensors):
            for t in tensors:
                t *= 4

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Changes()

        def forward(self, x):
            return self.block(x + 1)

    torch.manual_seed(0)
    model = Outer().eval()
    result = fp.plan(model, batches(), candidates="int8", max_error=0.1, target="memory")
    assert len(result.layers) == 2  # joined they were off by .5
    report = fp.swap(model, plan=result)
    assert report.joined == [] and [s.reason.code for s in report.apart] == ["disproved"]
