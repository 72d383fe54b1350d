"""Hooks that are there within a block only."""

import pytest
import torch
from torch import nn

from forwardpass.common.models.modules import hooked


class Failing(nn.Module):
    def forward(self, x=None):
        if x is None:
            raise ValueError("no input")
        return x + 1


@pytest.mark.parametrize("always", [False, True])
def test_hooked(always):
    calls, module = [], Failing()

    def before(key, module, x):
        calls.append(("before", key, x))

    def after(key, module, x, y):
        calls.append(("after", key, x, y))

    with hooked([("name", module)], before, after, always=always):
        assert module(x=torch.ones(())) == 2
        assert calls == [("before", "name", 1), ("after", "name", 1, 2)]
        calls.clear()
        with pytest.raises(ValueError, match="no input"):
            module()
        assert calls == [("before", "name", None)] + [("after", "name", None, None)] * always
    assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(KeyError), hooked([("name", module)], after=after):
        raise KeyError
    assert not module._forward_hooks
