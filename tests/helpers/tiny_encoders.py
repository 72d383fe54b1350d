"""Text encoders of tiny sizes whose layers become one operation: how they are built, swapped, run and compared."""

import pytest
import torch
from torch import nn

import forwardpass as fp

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "vocab_size": 99,
}
IDS = torch.arange(40).reshape(2, 20) % 99
PADDED = torch.ones(2, 20, dtype=torch.int64)
PADDED[1, 12:] = 0


def bert(kind="Bert", **changed):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "pad_token_id": 98, **changed})
    return getattr(transformers, f"{kind}Model")(config).eval()


def distilbert():
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(dim=64, n_heads=4, n_layers=3, hidden_dim=256, vocab_size=99)
    return transformers.DistilBertModel(config).eval()


def mpnet():
    """With position biases that matter."""
    model = bert("MPNet")
    nn.init.normal_(model.encoder.relative_attention_bias.weight, std=2.0)
    return model


def modernbert(**changed):
    """Its second and third layer see two tokens to each side, and have another rotation."""
    special = {f"{name}_token_id": i for name, i in {"pad": 98, "cls": 1, "sep": 2, "bos": 1, "eos": 2}.items()}
    model = bert("ModernBert", **special, **{"local_attention": 4, "initializer_range": 0.1, **changed})
    nn.init.normal_(model.embeddings.norm.weight)  # of ones a second norm would do nothing
    for layer in model.layers:  # whose attention would matter little
        nn.init.normal_(layer.attn.Wo.weight, std=0.07)
    return model


def layers_of(model):
    return model.layers if hasattr(model, "layers") else model.encoder.layer


def list_of(model):
    return "layers" if hasattr(model, "layers") else "encoder.layer"


def last_of(layer):
    """A module that the layer calls towards its end."""
    return layer.mlp_norm if hasattr(layer, "mlp_norm") else layer.output


def swapped(model, **options):
    report = fp.swap(model, "int8", **{"include": "**", **options})
    return model, report


@torch.inference_mode()
def hidden(model, ids=IDS, **inputs):
    return model(ids, **inputs).last_hidden_state


def close(a, b, mask=None):
    a, b = (x.flatten(0, 1) if mask is None else x[mask.bool()] for x in (a, b))
    return torch.cosine_similarity(a, b).min() > 0.999
