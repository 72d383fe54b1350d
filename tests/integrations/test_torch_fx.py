"""Traces by torch.fx: modules of a swapped model are their leaves, and a trace changes nothing of the model."""

import warnings

import pytest
import torch
from torch import nn

import forwardpass as fp


def test_a_swapped_model_is_traced():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    fp.swap(model, "int8")
    x = torch.randn(3, 64)
    with torch.inference_mode():
        expected = model(x)
        traced = torch.fx.symbolic_trace(model)
        assert torch.equal(traced(x), expected) and torch.equal(model(x), expected)
    calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert calls == ["0", "1", "2"]


class Widened(fp.nn.Int8Linear):
    """A class of somebody else's."""


def test_a_class_that_derives_from_ours_is_a_leaf():
    layer = Widened(64, 32)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_features_of_a_swapped_convolutional_network(name):
    """create_feature_extractor traces twice, while torch.fx has a function of its own for the call of a module."""
    models = pytest.importorskip("torchvision.models")
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    torch.manual_seed(0)
    model, x = getattr(models, name)().eval(), torch.randn(2, 3, 64, 64)
    names = get_graph_node_names(model)
    with torch.inference_mode():
        fp.swap(model, "int8", calibrate=[x, x.flip(0)])
        expected = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert get_graph_node_names(model) == names
            features = create_feature_extractor(model, {"flatten": "last"})
            last = features(x)["last"]
            assert torch.equal(model(x), expected)
        head = model.fc if name == "resnet18" else model.classifier
        assert torch.equal(head(last), expected)
